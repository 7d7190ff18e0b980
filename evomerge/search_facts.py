"""What a searcher may know of a study beside the losses: names, noise, where to start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from math import sqrt

from evomerge.config import StudyFile
from evomerge.economy import planned_trials
from evomerge.fitness.splits import ItemSplit
from evomerge.restart_record import EARLIER
from evomerge.search.baselines import Baseline
from evomerge.search.protocol import SearchProblem
from evomerge.search.registry import find_searcher
from evomerge.search.surrogate_entries import SURROGATES
from evomerge.space import Space
from evomerge.trial import Objective

#: Label of the baseline that a search is told to start from.
START = "start"
#: Members that every archive of M2N2 has room for, where the study file names no other size.
_ARCHIVE = 10


def outstanding(file: StudyFile) -> int:
    """Return how many trials a study has asked for and not told of, at most."""
    workers = 1 if file.pool.kind == "serial" else file.pool.workers
    return file.search.parallel or 2 * workers


def on_weighted_mean(file: StudyFile, objectives: int) -> bool:
    """Return whether the searcher sees one weighted loss instead of all."""
    return objectives > 1 and not find_searcher(file.search.searcher).multi_objective


def search_size(file: StudyFile, space: Space, splits: Sequence[ItemSplit]) -> SearchProblem:
    """Return what a searcher is given to search, before anything is scored.

    Args:
        file: the study file, its estimator decided.
        space: what is searched.
        splits: item ids of each objective [m].
    """
    losses = 1 if on_weighted_mean(file, len(splits)) else len(splits)
    trials = planned_trials(file, splits)
    return SearchProblem(space.dimension, losses, trials, outstanding(file), file.seed)


def informed(
    problem: SearchProblem, space: Space, baselines: Sequence[Baseline], noise: float | None
) -> SearchProblem:
    """Return ``problem`` with what the study knows of it.

    Args:
        problem: from the study.
        space: names the dimensions.
        baselines: name the warm points, and the one to start from.
        noise: see ``expected_noise``.
    """
    labels = {one.x: one.label for one in reversed(baselines) if one.x is not None}
    warm = tuple(
        point if point.label else replace(point, label=labels.get(point.x, ""))
        for point in problem.warm
    )
    start = next((one.x for one in baselines if one.label == START), None)
    return replace(
        problem, warm=warm, groups=space.groups, ranges=space.ranges, start=start, noise=noise,
        kinds=space.kinds,
    )  # fmt: skip


def taking_over(
    problem: SearchProblem, searcher: str, arguments: Mapping[str, object]
) -> SearchProblem:
    """Return ``problem`` for a fresh searcher that goes on from the trials of another one.

    A search for one loss starts at the best point; polish, which was given a merge to improve, at
    the best of this merge and what came of it, whatever another baseline is worth. M2N2 asks
    again for everything that it starts from, so it gets an archive of the best points, on which
    at most half of its trials go; on items that they were scored on no worker is asked.

    Args:
        problem: informed.
        searcher: its name.
        arguments: as in the study file.
    """
    if not any(point.label.startswith(EARLIER) for point in problem.warm):
        return problem
    if problem.objectives > 1:
        return problem
    order = sorted(range(len(problem.warm)), key=lambda row: problem.warm[row].losses[0])
    starts = order
    if searcher == "polish" and problem.start is not None:
        starts = [
            row for row in order
            if problem.warm[row].x == problem.start or problem.warm[row].label.startswith(EARLIER)
        ]  # fmt: skip
    problem = replace(problem, start=problem.warm[starts[0]].x)
    if searcher != "m2n2":
        return problem
    archive = arguments.get("archive")
    size = archive if isinstance(archive, int) else _ARCHIVE
    kept = sorted(order[: max(2, min(size, problem.budget // 2))])
    return replace(problem, warm=tuple(problem.warm[row] for row in kept))


def surrogate_versions(searcher: str) -> dict[str, dict[str, str]]:
    """Return the versions that only surrogates depend on, for the study's identity.

    Other searchers do without: their studies go on whatever becomes of these libraries.
    """
    entry = SURROGATES.get(searcher)
    if entry is None or entry.library == "nevergrad":
        return {}
    return {"libraries": {name: version(name) for name in ("scipy", "scikit-learn")}}


def expected_noise(
    objectives: Sequence[Objective],
    splits: Sequence[ItemSplit],
    sources: Sequence[str | None],
    per_trial: int | None,
) -> float | None:
    """Return the largest standard error that a loss can have, None where that is not known.

    A mean of I scores between 0 and 1 has at most ``0.5 / sqrt(I)``; other units have no bound.
    What draws no items is a property of the merge, and exact.

    Args:
        objectives: [m].
        splits: of each objective [m].
        sources: what its items are drawn from [m]; None where nothing is drawn.
        per_trial: items of a trial, where it is not scored on all of them.
    """
    rows = zip(objectives, splits, sources, strict=True)
    drawn = [(objective, split) for objective, split, source in rows if source is not None]
    if any(objective.unit != "fraction" for objective, _ in drawn):
        return None
    counts = [len(split.search) for _, split in drawn]
    return max((0.5 / sqrt(min(count, per_trial or count)) for count in counts), default=0.0)
