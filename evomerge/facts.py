"""What the command line reports, as plain data: the source of every ``--json`` and of tables."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from evomerge.economy import economy_facts, economy_lines, planned_trials
from evomerge.export import Exported
from evomerge.feasibility import bounds
from evomerge.gain import front_rows, gains, trial_name
from evomerge.journal import read
from evomerge.models import Models
from evomerge.prepare import Prepared
from evomerge.savings import savings_facts, savings_lines
from evomerge.space import Choices, Space
from evomerge.study_view import StudyState, StudyView
from evomerge.trial import Evaluation, Objective, Trial

#: Models that are all listed to people.
_MODELS = 20


def plan_facts(prepared: Prepared) -> dict[str, Any]:
    """Return what a study would do, as data."""
    file, space, pool = prepared.file, prepared.space, prepared.file.pool
    serial = pool.kind == "serial"
    return {
        "study": str(file.name),
        "directory": str(prepared.directory),
        "models": {
            model.name: model.pinned for model in (prepared.models.base, *prepared.models.experts)
        },
        "parameters": prepared.models.layout.parameters,
        "tensors": len(prepared.models.layout.slots),
        "dtype": space.dtype,
        "objectives": {
            objective.name: {
                "direction": str(objective.direction),
                **bounds(objective),
                "search": len(split.search),
                "validation": len(split.validation),
                "test": len(split.test),
            }
            for objective, split in zip(prepared.tasks.objectives, prepared.splits, strict=True)
        },
        "space": {
            "method": file.space.method,
            "partition": file.space.partition,
            "coefficients": space.dimension,
            "blocks": len(space.blocks),
        },
        "search": {
            "searcher": file.search.searcher,
            **({"auto": prepared.choice} if prepared.choice else {}),
            "trials": prepared.trials,
            **economy_facts(prepared.extended or file),
            **({"estimator_choice": prepared.estimate} if prepared.estimate else {}),
            "baselines": len(prepared.baselines),
            "parallel": prepared.parallel,
            "seed": file.seed,
            "weighted_mean": prepared.scalarise,
        },
        "pool": {
            "kind": pool.kind,
            "workers": 1 if serial else pool.workers,
            "cpus_per_worker": pool.cpus_per_worker,
            "gpus_per_worker": pool.gpus_per_worker,
        },
        "memory": prepared.memory.facts(),
        "warnings": list(prepared.warnings),
    }


def plan_lines(prepared: Prepared) -> dict[str, Any]:
    """Return what a study would do, for people."""
    file, space = prepared.file, prepared.space
    splits = [
        f"{_wanted(objective)}: {len(split.search)} search, "
        f"{len(split.validation)} validation, {len(split.test)} test items"
        for objective, split in zip(prepared.tasks.objectives, prepared.splits, strict=True)
    ]
    layout = prepared.models.layout
    pool = file.pool
    count = 1 if pool.kind == "serial" else min(pool.workers, prepared.parallel)
    at_once = "one" if count == 1 else str(count)
    workers = (
        "1, in this process"
        if pool.kind == "serial"
        else f"{pool.workers} on Ray, each {pool.cpus_per_worker} CPU, {pool.gpus_per_worker:g} GPU"
    )
    return {
        "study": str(file.name),
        "directory": str(prepared.directory),
        "models": _model_lines(prepared.models),
        "size": f"{layout.parameters:,} parameters, {len(layout.slots)} tensors, {space.dtype}",
        "objectives": splits,
        "space": (
            f"{file.space.method}, partition {file.space.partition}: {space.dimension} "
            f"coefficients ({len(space.blocks)} blocks)" + _mixed(space)
        ),
        "search": (
            f"{file.search.searcher}: {prepared.trials} trials{_begun(prepared)} after "
            f"{len(prepared.baselines)} baselines, {at_once} at a time, "
            f"{prepared.parallel} outstanding, seed {file.seed}"
            + (", told in order of completion" if file.search.order == "completion" else "")
            + (", on the weighted mean of the objectives" if prepared.scalarise else "")
            + "".join(f", {line}" for line in economy_lines(prepared.extended or file))
        ),
        **({"searcher": prepared.choice} if prepared.choice else {}),
        **({"estimator": prepared.estimate} if prepared.estimate else {}),
        "workers": workers,
        "memory": prepared.memory.lines(),
        "warnings": list(prepared.warnings),
    }


def _begun(prepared: Prepared) -> str:
    """Return with how many trials an extended study was begun."""
    first = planned_trials(prepared.file, prepared.splits)
    return f" (extended from {first})" if prepared.extended is not None else ""


def _model_lines(models: Models) -> list[str]:
    """Return name and source of each model; of many the first few, and how many more there are."""
    lines = [f"{model.name}: {model.pinned}" for model in (models.base, *models.experts)]
    if len(lines) <= _MODELS:
        return lines
    shown = lines[: _MODELS // 2]
    return [*shown, f"... and {len(lines) - len(shown)} more (--json lists them)"]


def _mixed(space: Space) -> str:
    """Return what is searched beside real numbers, empty where nothing is."""
    whole = {
        name
        for (name, _), kind in zip(space.groups, space.kinds, strict=False)
        if kind.name == "integer"
    }
    parts = [f"whole numbers: {', '.join(sorted(whole))}"] if whole else []
    for name, value in space.method[1].items():
        if isinstance(value, Choices):
            parts.append(f"{name}: {' or '.join(str(one).lower() for one in value.values)}")
    return "".join(f"; {part}" for part in parts)


def _wanted(objective: Objective) -> str:
    """Return an objective with its direction and bounds, e.g. ``math (maximize, min 0.6)``."""
    limits = "".join(f", {key} {value:g}" for key, value in bounds(objective).items())
    return f"{objective.name} ({objective.direction}{limits})"


def status_facts(view: StudyView) -> dict[str, Any]:
    """Return where a study stands."""
    counts = view.counts
    facts: dict[str, Any] = {
        "study": str(view.directory),
        "state": view.state.value,
        **({"reason": reason} if (reason := _interruption(view)) else {}),
        "trials": counts.done,
        "failed": counts.failed,
        "waiting": counts.waiting,
        "planned": counts.budget + len(view.contract["baselines"]),
        "front": len(view.front),
    }
    if view.front:
        facts["hypervolume"] = view.hypervolume
        facts["best"] = {
            objective.name: _best_facts(view, column)
            for column, objective in enumerate(view.objectives)
        }
    facts |= savings_facts(view)
    if estimator := view.contract["identity"].get("estimator"):
        facts["estimator_choice"] = estimator
    if view.searcher:
        facts["searcher"] = dict(view.searcher)
    if view.message:
        facts["message"] = view.message
    return facts


def _interruption(view: StudyView) -> str:
    """Return why nobody works on an unfinished study; empty where its message says it."""
    if view.state is not StudyState.INTERRUPTED:
        return ""
    if read(view.directory).records[-1]["ev"] == "extend":
        return "extended, to be continued"
    return "" if view.message else "its process ended without a word"


def _best_facts(view: StudyView, column: int) -> dict[str, Any]:
    best = view.best(view.objectives[column].name)
    evaluation = (
        view.trial(best).evaluation if view.front_split == "search" else view.validation[best]
    )
    assert evaluation is not None
    return {"value": evaluation.values[column], "trial": best, "items": view.front_split}


def status_lines(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of ``status_facts`` for people."""
    nested = {"best", "searcher", "items", "stopped_early", "violation", "reason"}
    nested |= {"estimator", "estimator_choice", "message"}
    lines = {key: value for key, value in facts.items() if key not in nested}
    if "reason" in facts:
        paused = facts["reason"].startswith("extended")
        lines["state"] = f"{'paused' if paused else facts['state']} ({facts['reason']})"
    labels = {
        "trials": "with scores, baselines included",
        "failed": "without scores",
        "waiting": "asked for, without a result yet",
        "planned": "in all, baselines included",
    }
    for key, label in labels.items():
        lines[key] = f"{facts[key]} ({label})"
    if "message" in facts:
        lines["message"] = facts["message"].splitlines()
    if "estimator_choice" in facts:
        lines["estimator"] = facts["estimator_choice"]
    if "hypervolume" in facts:
        lines["hypervolume"] = f"{facts['hypervolume']:.4f} (search items)"
    for name, best in facts.get("best", {}).items():
        lines[f"best {name}"] = (
            f"{best['value']:.4f} (trial {best['trial']}, {best['items']} items)"
        )
    return {**lines, **savings_lines(facts), **facts.get("searcher", {})}


def front_facts(view: StudyView) -> dict[str, Any]:
    """Return the front, the baselines and the gains."""
    return {
        "state": view.state.value,
        "objectives": [objective.name for objective in view.objectives],
        "front_split": view.front_split,
        "recommended": view.knee,
        "feasible": view.feasible,
        **savings_facts(view),
        **({"searcher": dict(view.searcher)} if view.searcher else {}),
        "merges": [_merge_facts(view, trial) for trial in front_rows(view, view.test)],
        "gains": [
            {
                "against": gain.against,
                **({"objective": gain.objective} if gain.objective else {}),
                "mean": gain.difference.value,
                "standard_error": gain.difference.standard_error,
                "clear": gain.difference.clear if gain.difference.comparable else None,
            }
            for gain in gains(view)
        ],
    }


def _merge_facts(view: StudyView, trial: Trial) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "trial": trial.number,
        "name": trial_name(trial),
        "kind": trial.kind,
        "front": trial.number in view.front,
        "recipe": trial.recipe.digest,
    }
    splits = {
        "search": trial.evaluation,
        "validation": view.validation.get(trial.number),
        "test": view.test.get(trial.number),
    }
    for split, evaluation in splits.items():
        if evaluation is not None:
            facts[split] = _score_facts(view, evaluation)
    return facts


def _score_facts(view: StudyView, evaluation: Evaluation) -> dict[str, Any]:
    return {
        objective.name: {
            "value": score.value,
            "standard_error": score.standard_error,
            "items": len(score.items),
        }
        for objective, score in zip(view.objectives, evaluation.scores, strict=True)
    }


def export_facts(exported: Exported, root: Path | None) -> dict[str, Any]:
    """Return what was written, and how to repeat its scores.

    Args:
        exported: what was written.
        root: folder that the tasks' relative paths start from, None where it is not known.
    """
    place = f"cd {shlex.quote(str(root.resolve()))} && " if root is not None else ""
    return {
        "directory": str(exported.out),
        "trial": exported.trial,
        "bytes": exported.bytes,
        "files": list(exported.files),
        "mergekit": "mergekit_config.yml" if exported.mergekit else None,
        **({} if exported.mergekit else {"mergekit_reason": exported.mergekit_reason}),
        "items": exported.split,
        "scores": dict(exported.expected),
        "repeat": [place + command for command in exported.commands],
        "notes": list(exported.notes),
        **({"adapter": exported.adapter.kept.facts()} if exported.adapter is not None else {}),
    }


def export_lines(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of ``export_facts`` for people."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in facts["scores"].items())
    lines = {
        "wrote": f"{facts['directory']} (trial {facts['trial']}, {facts['bytes'] / 1e6:.1f} MB)",
        "files": ", ".join(facts["files"]),
    }
    if facts["mergekit"] is None:
        lines["mergekit"] = f"none: {facts['mergekit_reason']}"
    if scores:
        lines["scores"] = f"{scores} ({facts['items']} items)"
    if "hub" in facts:
        lines["hub"] = facts["hub"]
    return {**lines, "repeat": facts["repeat"], "notes": facts["notes"]}
