"""What people are shown of a study: its view turned into the front page and the projection."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from evomerge.coverage import coverage, coverage_html
from evomerge.front_page import FrontData, FrontPoint, Kind, Measured
from evomerge.gain import best_expert, gains, trial_name
from evomerge.journal import JOURNAL
from evomerge.projection import Projection, Step, metric_name
from evomerge.study_record import Split
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Trial, TrialState

#: The resolved study file, beside the journal; never the name of the user's own file.
STUDY_FILE = "study.resolved.yaml"
#: The rate of trials is that of so many last ones.
_RATE_TRIALS = 20
_SECRETS = (
    (re.compile(r"(://)[^/\s@]+@"), r"\1"),  # user:password@ in addresses
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
    (re.compile(r"(?im)^(\s*[\w-]*(?:token|password|secret|api_key)\s*:\s*)\S.*$"), r"\1'***'"),
)


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
    """Return a command to paste; the directory relative to the current one where it is below."""
    directory, here = view.directory.resolve(), Path.cwd()
    shown = directory.relative_to(here) if directory.is_relative_to(here) else directory
    return f"evomerge export {shlex.quote(str(shown))} {pick} --out {out}"


def project(view: StudyView) -> Projection:
    """Return what MLflow shows of a study."""
    file = view.directory / STUDY_FILE
    files = {STUDY_FILE: redacted(file.read_text(encoding="utf-8"))} if file.exists() else {}
    covered = coverage(view)
    if covered:
        files["coverage.html"] = coverage_html(study_name(view), covered)
    return Projection(
        study=_identity(view),
        front=front_data(view),
        trials=view.trials,
        steps=tuple(_steps(view)),
        params=_params(view),
        files=files,
        state=view.state.value,
        planned=view.counts.budget + len(view.contract["baselines"]),
        words=tuple(_words(view)),
        gains=tuple(gains(view)),
        rivals=_rivals(view),
    )


def redacted(text: str) -> str:
    """Return ``text`` without credentials: everybody who can open MLflow can read it."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


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
        experts = ", ".join(expert.name for expert in recipe.experts)
        yield (
            f"Searched: {contract['dimension']} coefficients of `{recipe.method}` in "
            f"{len(recipe.table)} blocks (`{recipe.partition}`), of the experts {experts}. "
        )
    wanted = ", ".join(f"{one.name} ({one.direction.value})" for one in view.objectives)
    yield f"Objectives: {wanted}. "
    minutes = (max(view.times.values()) - min(view.times.values())) / 60 if view.times else 0.0
    yield (
        f"Used: {counts.done + counts.failed} of {counts.budget + len(contract['baselines'])} "
        f"trials, {len(contract['baselines'])} of them baselines; {counts.failed} failed; "
        f"{view.spending.scored:,} item evaluations; {minutes:.0f} minutes."
    )


def _steps(view: StudyView) -> Iterator[Step]:
    """Yield the series of the study up to the first trial without a result.

    Nothing before all baselines have one: they fix the hypervolume's reference point.
    """
    states = [trial.state for trial in view.trials]
    settled = states.index(TrialState.ASKED) if TrialState.ASKED in states else len(states)
    if settled < len(view.contract["baselines"]):
        return
    volumes = view.hypervolumes()
    best: dict[str, float] = {}
    audited = _audited(view)
    audits: dict[str, float] = {}
    failed, milliseconds, items = 0, 0, 0
    arrivals: deque[int] = deque(maxlen=_RATE_TRIALS + 1)
    for trial in view.trials[:settled]:
        failed += trial.evaluation is None
        items += sum(view.results[key].fresh for key in _searched(view, trial.number))
        audits = audited.get(trial.number, audits)
        # Of many estimates from a few items the best is a lucky one.
        partly = trial.evaluation is not None and view.history.rung_of(trial.number) is not None
        for objective, value in zip(
            view.objectives,
            trial.evaluation.values if trial.evaluation and not partly else (),
            strict=False,
        ):
            name = metric_name(f"best/{objective.name}")
            old = best.get(name)
            if old is None or objective.loss(value) < objective.loss(old):
                best[name] = value
        # Results arrive in any order; MLflow draws series over time, so time never runs back.
        milliseconds = max(milliseconds, int(view.times[trial.number] * 1000))
        metrics = {
            **best, **audits, "hypervolume": volumes[trial.number], "trials/failed": float(failed),
            "items/scored": float(items),
        }  # fmt: skip
        arrivals.append(milliseconds)
        if arrivals[-1] > arrivals[0]:
            hours = (arrivals[-1] - arrivals[0]) / 3.6e6
            metrics["trials/per hour"] = (len(arrivals) - 1) / hours
        yield Step(milliseconds, metrics)


def _searched(view: StudyView, number: int) -> list[tuple[Split, int]]:
    """Return under which keys the search's results of a trial are."""
    keys: tuple[Split, ...] = ("search", "part")
    return [(split, number) for split in keys if (split, number) in view.results]


def _audited(view: StudyView) -> dict[int, dict[str, float]]:
    """Return how far off the estimates were up to each trial that was scored in full, by trial.

    For each objective the mean absolute error of the estimates, in its unit, and beside it that
    of the plain mean of the same items.
    """
    found: dict[int, dict[str, float]] = {}
    sums: dict[str, float] = {}
    for count, audit in enumerate(view.audits, start=1):
        for column, objective in enumerate(view.objectives):
            full = audit.full[column]
            for kind, reading in (("estimate", audit.estimate), ("subset mean", audit.mean)):
                name = metric_name(f"audit/{kind} error/{objective.name}")
                sums[name] = sums.get(name, 0.0) + abs(reading.values[column] - full)
        found[audit.number] = {name: total / count for name, total in sums.items()}
    return found
