"""The lm_eval command that repeats what a study recorded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a study scores; what ``lm_eval`` must be told to do the same.

    Attributes:
        tasks: lm-eval task of each objective [m].
        num_fewshot: of each objective [m]; None for what the task says.
        include_path: folders with task files, as the user wrote them.
        batch_size: requests per forward pass.
        device: ``cpu``, ``cuda``, or empty for lm-eval's choice.
        allow_task_code: whether the tasks run Python code.
    """

    tasks: tuple[str, ...]
    num_fewshot: tuple[int | None, ...]
    include_path: tuple[str, ...] = ()
    batch_size: int = 1
    device: str = ""
    allow_task_code: bool = False


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
    that differ in them go to calls of their own.

    Args:
        scoring: of the study.
        items: item ids of each objective [m][I]: lm-eval's document numbers as text.
    """
    runs: list[LmEvalRun] = []
    for number, (task, shots) in enumerate(zip(scoring.tasks, scoring.num_fewshot, strict=True)):
        wanted = sorted(int(item) for item in items[number])
        for run in runs:
            if run.num_fewshot == shots and run.samples.get(task, wanted) == wanted:
                break
        else:
            run = LmEvalRun(num_fewshot=shots)
            runs.append(run)
        run.samples[task] = wanted
        run.objectives.append(number)
    return runs


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
