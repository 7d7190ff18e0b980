"""The lm_eval command that repeats what a study recorded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a study scores; what ``lm_eval`` must be told to do the same.

    Attributes:
        tasks: lm-eval task, group or tag of each of the first objectives.
        num_fewshot: of each of them; None for what the task says.
        include_path: folders with task files, as the user wrote them.
        base: the base, as the user wrote it; of absolute paths the last name only.
        batch_size: requests per forward pass.
        device: ``cpu``, ``cuda``, or empty for lm-eval's choice.
        allow_task_code: whether the tasks run Python code.
        unreported: names of the objectives that lm-eval has no number for.
        metrics: of each of the first objectives, as the study file names them; empty for the
            task's own.
        settings: what ``evomerge verify`` scores by: the study's ``fitness`` section without
            paths of a machine, names of the experts, and what batches were made of.
    """

    tasks: tuple[str, ...]
    num_fewshot: tuple[int | None, ...]
    include_path: tuple[str, ...] = ()
    batch_size: int = 1
    device: str = ""
    allow_task_code: bool = False
    unreported: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""


@dataclass(frozen=True, slots=True)
class LmEvalRun:
    """One call of ``lm_eval``; a study needs several where settings differ between objectives.

    Attributes:
        samples: lm-eval document numbers by task: what the file behind ``--samples`` holds.
        objectives: numbers of the objectives that it scores.
        num_fewshot: for all its tasks.
    """

    samples: dict[str, list[int]] = field(default_factory=dict)
    objectives: list[int] = field(default_factory=list)
    num_fewshot: int | None = None


def lm_eval_runs(scoring: Scoring, items: Sequence[Sequence[str]]) -> list[LmEvalRun]:
    """Return the calls that score the given items.

    ``lm_eval`` has one few-shot number per call and one set of documents per task, so objectives
    that differ in them go to calls of their own. A group goes there as its tasks: lm-eval scores
    a task in full for which no documents are given.

    Args:
        scoring: of the study.
        items: item ids of each objective [m][I]: lm-eval's document numbers as text, behind
            ``subtask/`` for a group.
    """
    runs: list[LmEvalRun] = []
    for number, (task, shots) in enumerate(zip(scoring.tasks, scoring.num_fewshot, strict=True)):
        wanted = _documents(task, items[number])
        for run in runs:
            if run.num_fewshot == shots and all(
                run.samples.get(name, documents) == documents for name, documents in wanted.items()
            ):
                break
        else:
            run = LmEvalRun(num_fewshot=shots)
            runs.append(run)
        run.samples.update(wanted)
        run.objectives.append(number)
    return runs


def _documents(task: str, items: Sequence[str]) -> dict[str, list[int]]:
    """Return the documents of one objective by task, ascending."""
    found: dict[str, list[int]] = {}
    for item in items:
        inside, _, number = item.rpartition("/")
        found.setdefault(inside or task, []).append(int(number))
    return {name: sorted(documents) for name, documents in found.items()}


def lm_eval_notes(scoring: Scoring, runs: Sequence[LmEvalRun]) -> list[str]:
    """Return what stands between the commands and the study's scores, one sentence each.

    Args:
        scoring: of the study.
        runs: ``lm_eval_runs``.
    """
    notes = []
    first, *others = scoring.include_path or ("",)
    if others:
        folders = ", ".join(public_path(path) for path in others)
        notes.append(
            "lm_eval takes one --include_path, the study used several folders: put the task files "
            f"of {folders} into {public_path(first)} too, with the data that they name."
        )
    if len(runs) > 1:
        notes.append(
            f"The study scored all tasks together; lm_eval needs {len(runs)} calls, whose batches "
            "hold other items, so values may differ by rounding."
        )
    listed = {name for run in runs for name in run.samples}
    groups = [task for task in dict.fromkeys(scoring.tasks) if task not in listed]
    if groups:
        notes.append(
            f"lm_eval reports the tasks of {', '.join(groups)} one by one; the study's value is "
            "their mean, by size where the group says so."
        )
    if scoring.unreported:
        notes.append(
            f"lm_eval has no number for {', '.join(scoring.unreported)}: `evomerge` alone computes "
            "it."
        )
    return notes


def lm_eval_command(
    scoring: Scoring, run: LmEvalRun, checkpoint: str, dtype: str, samples: str
) -> str:
    """Return one call as a command to paste.

    Args:
        scoring: of the study.
        run: one of ``lm_eval_runs``.
        checkpoint: directory of the model, as it shall be written.
        dtype: safetensors name of the dtype.
        samples: path of the file with ``run.samples``, as it shall be written.
    """
    words = ["lm_eval", "--model", "hf"]
    words += ["--model_args", f"pretrained={checkpoint},dtype={_DTYPES[dtype]}"]
    words += ["--tasks", ",".join(run.samples)]
    if scoring.include_path:
        # It takes one folder; ``lm_eval_notes`` tells what to do about the others.
        words += ["--include_path", public_path(scoring.include_path[0])]
    words += ["--samples", samples, "--batch_size", str(scoring.batch_size)]
    if run.num_fewshot is not None:
        words += ["--num_fewshot", str(run.num_fewshot)]
    if scoring.device:
        words += ["--device", scoring.device]
    if scoring.allow_task_code:
        words += ["--confirm_run_unsafe_code"]
    return shlex.join(words)


def public_path(path: str) -> str:
    """Return a path without what it tells about a machine: an absolute one by its last name."""
    pure = PurePath(path)
    return pure.name if pure.is_absolute() or path.startswith("~") else path
