"""What people are shown of a study: its view turned into the front page and the projection."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from evomerge.checkpoint import is_local
from evomerge.coverage import coverage, coverage_html
from evomerge.front_page import FrontData, FrontPoint, Kind, Measured
from evomerge.gain import best_expert, gains, trial_name
from evomerge.journal import JOURNAL
from evomerge.lineage import lineage_html
from evomerge.merge.methods import METHODS
from evomerge.projection import Projection
from evomerge.recipe import listed
from evomerge.redaction import redacted
from evomerge.restart_record import restart_note
from evomerge.study_series import Series
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Trial

#: The resolved study file, beside the journal; never the name of the user's own file.
STUDY_FILE = "study.resolved.yaml"


def front_data(view: StudyView) -> FrontData:
    """Return what the front page shows of a study."""
    best = _best_task_arithmetic(view)
    front = set(view.front)
    points = tuple(_point(view, trial, trial.number in front, best) for trial in view.trials)
    return FrontData(
        title=study_name(view),
        subtitle=_subtitle(view),
        objectives=view.objectives,
        blocks=_blocks(view),
        points=tuple(point for point in points if point.shown is not None),
        knee=view.knee,
        command=export_command(view, "--trial {n}", study_name(view) + "-{n}"),
    )


def study_name(view: StudyView) -> str:
    """Return the name that the study was given, else its directory's."""
    name = view.contract["identity"].get("name")
    return str(name) if name else view.directory.resolve().name


def export_command(view: StudyView, pick: str, out: str) -> str:
    """Return a command to paste; it writes an adapter where adapters were merged as factors."""
    form = " --lora" if _merges_factors(view) else ""
    return f"evomerge export {shown_directory(view)} {pick}{form} --out {out}"


def verify_command(view: StudyView, out: str) -> str:
    """Return the command that checks what ``export_command`` writes: an adapter with its base."""
    base = view.trials[0].recipe.base.source if _merges_factors(view) else ""
    where = f" --base {_shown(Path(base))}" if base and is_local(base) else ""
    return f"evomerge verify {out}{where}"


def _merges_factors(view: StudyView) -> bool:
    method = METHODS.get(view.trials[0].recipe.method) if view.trials else None
    return method is not None and method.adapters


def shown_directory(view: StudyView) -> str:
    """Return a study as commands name it: relative to the current folder where it is below."""
    return _shown(view.directory)


def _shown(path: Path) -> str:
    directory, here = path.resolve(), Path.cwd()
    shown = directory.relative_to(here) if directory.is_relative_to(here) else directory
    return shlex.quote(str(shown))


def project(view: StudyView, series: Series | None = None, pages: bool = True) -> Projection:
    """Return what MLflow shows of a study.

    Args:
        view: the study.
        series: of the same study, from the call before; it is computed anew where absent.
        pages: also what stands on pages only: files and gains.
    """
    return Projection(
        study=_identity(view),
        front=front_data(view),
        trials=view.trials,
        steps=(series or Series()).steps(view),
        params=_params(view),
        files=_files(view) if pages else {},
        state=view.state.value,
        planned=view.counts.budget + len(view.contract["baselines"]),
        words=tuple(_words(view)),
        gains=tuple(gains(view)) if pages else (),
        rivals=_rivals(view),
        arrived={number: int(seconds * 1000) for number, seconds in view.times.items()},
        subset_means=view.subset_means,
        began=int(view.history.opened["t"] * 1000) if view.history.opened else 0,
        milliseconds=int(view.history.latest * 1000),
    )


def _files(view: StudyView) -> dict[str, str]:
    file = view.directory / STUDY_FILE
    files = {STUDY_FILE: redacted(file.read_text(encoding="utf-8"))} if file.exists() else {}
    covered = coverage(view)
    if covered:
        files["coverage.html"] = coverage_html(study_name(view), covered)
    if any(trial.origin is not None for trial in view.trials):
        files["lineage.html"] = lineage_html(study_name(view), view)
    return files


def _identity(view: StudyView) -> str:
    """Return the study's identity: its first record, which holds the instant it was begun."""
    with (view.directory / JOURNAL).open("rb") as file:
        return hashlib.blake2b(file.readline(), digest_size=12).hexdigest()


def _measured(evaluation: Evaluation | None) -> Measured | None:
    if evaluation is None:
        return None
    errors = tuple(score.standard_error for score in evaluation.scores)
    return Measured(evaluation.values, errors)


def _point(view: StudyView, trial: Trial, front: bool, best: int | None) -> FrontPoint:
    return FrontPoint(
        number=trial.number,
        kind=_kind(trial, best),
        label=trial.label,
        front=front,
        search=_measured(trial.evaluation),
        validation=_measured(view.validation.get(trial.number)),
        test=_measured(view.test.get(trial.number)),
        recipe=trial.recipe if front or trial.kind == "baseline" else None,
    )


def _kind(trial: Trial, best: int | None) -> Kind:
    family = trial.label.partition(":")[0]
    match family:
        case "base" | "expert" | "uniform":
            return family
        case "task_arithmetic":
            return "task_arithmetic" if trial.number == best else "grid"
    return "search"


def _best_task_arithmetic(view: StudyView) -> int | None:
    """Return the trial with the smallest weighted loss, on validation items where it can be."""
    losses = {}
    for trial in view.baselines:
        evaluation = view.scores(trial.number)
        if trial.label.startswith("task_arithmetic") and evaluation is not None:
            pairs = zip(view.objectives, evaluation.values, strict=True)
            losses[trial.number] = sum(one.weight * one.loss(value) for one, value in pairs)
    return min(losses, key=lambda number: losses[number]) if losses else None


def _blocks(view: StudyView) -> tuple[str, ...]:
    """Return the labels of the blocks; plain numbers where the study did not record them."""
    recorded = view.contract["identity"].get("blocks")
    if recorded:
        return tuple(map(str, recorded))
    rows = max((len(trial.recipe.table) for trial in view.trials), default=0)
    return tuple(map(str, range(rows)))


def _subtitle(view: StudyView) -> str:
    counts = view.counts
    parts = [
        f"{len(view.objectives)} objective{'s' * (len(view.objectives) != 1)}",
        f"{counts.done} of {counts.budget + len(view.contract['baselines'])} trials done"
        + (f", {counts.failed} failed" if counts.failed else ""),
        f"{len(view.front)} on the front (chosen on {view.front_split} items)",
    ]
    searcher = view.contract["identity"].get("searcher")
    if searcher:
        parts.insert(2, str(searcher.get("name", "")) if isinstance(searcher, dict) else searcher)
    return " · ".join(parts)


def _params(view: StudyView) -> dict[str, str]:
    """Return short facts; what is long is in the study file."""
    contract = view.contract
    params = {key: str(contract[key]) for key in ("dimension", "budget", "parallel", "seed")}
    if view.trials:
        recipe = view.trials[-1].recipe
        params |= {"method": recipe.method, "partition": recipe.partition, "dtype": recipe.dtype}
        params["experts"] = ", ".join(expert.name for expert in recipe.experts)
    params["objectives"] = ", ".join(objective.name for objective in view.objectives)
    searcher = contract["identity"].get("searcher")
    if searcher:
        text = searcher if isinstance(searcher, str) else json.dumps(searcher)
        params["searcher"] = redacted(text)
    return params


def _rivals(view: StudyView) -> tuple[str, ...]:
    expert = best_expert(view)
    return ("uniform",) if expert is None else (trial_name(expert), "uniform")


def _words(view: StudyView) -> Iterator[str]:
    """Yield what is searched, for what, and what it cost, as sentences in Markdown."""
    contract, counts = view.contract, view.counts
    if view.trials:
        recipe = view.trials[-1].recipe
        experts = listed([expert.name for expert in recipe.experts])
        yield (
            f"Searched: {contract['dimension']} coefficients of `{recipe.method}` in "
            f"{len(recipe.table)} block{'s' * (len(recipe.table) != 1)} (`{recipe.partition}`), of "
            f"the expert{'s' * (len(recipe.experts) != 1)} {experts}. "
        )
    wanted = ", ".join(f"{one.name} ({one.direction.value})" for one in view.objectives)
    yield f"Objectives: {wanted}. "
    minutes = (max(view.times.values()) - min(view.times.values())) / 60 if view.times else 0.0
    yield (
        f"Used: {counts.done + counts.failed} of {counts.budget + len(contract['baselines'])} "
        f"trials, {len(contract['baselines'])} of them baselines; {counts.failed} failed; "
        f"{view.spending.scored:,} item evaluations; {minutes:.0f} minutes."
    )
    restarted = restart_note(view.history.provenance.restarts)
    if restarted:
        yield f" The search was restarted {restarted}."
