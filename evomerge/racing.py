"""Racing: a merge that cannot reach the front any more is scored on no further items.

The items are scored in one order for all trials. After each rung the merge is compared with
each reference (members of the front) item by item: where its mean paired difference is worse by
more than ``z`` standard errors in every objective, it is dominated by that reference as far as
these items can tell, and scoring stops (F-race's idea, Birattari et al. 2002, with one paired
comparison per reference). The comparison is of mean item scores, whatever the objective makes
of them: for the exponential of a mean that decides the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.errors import InputError
from evomerge.estimate import mean_of
from evomerge.item_cache import Items
from evomerge.trial import Direction, Job, Objective, Race, Score


def require_rungs(rungs: Sequence[int]) -> None:
    """Refuse rungs that no trial can climb.

    Raises:
        InputError: none, one below 1, or not ascending.
    """
    if not rungs or any(rung < 1 for rung in rungs):
        raise InputError(f"rungs: expected numbers of items >= 1, got {list(rungs)}")
    if list(rungs) != sorted(set(rungs)):
        raise InputError(f"rungs: must ascend, got {list(rungs)}")


@dataclass(frozen=True, slots=True)
class Racing:
    """How a study races.

    Attributes:
        rungs: numbers of items after which to look, ascending.
        z: standard errors that it takes; 1.6 is about one chance in twenty per comparison.
        least: fewer items than these decide nothing: a sample deviation of a handful of
            differences of 0/1 scores is often 0.
        references: at most so many members of the front are compared with.
    """

    rungs: tuple[int, ...] = (10, 20, 50, 200)
    z: float = 1.6
    least: int = 10
    references: int = 8

    def __post_init__(self) -> None:
        """Refuse settings that say nothing.

        Raises:
            InputError: rungs that do not ascend, or a number out of range.
        """
        require_rungs(self.rungs)
        if not self.z > 0:
            raise InputError(f"z: must be above 0, got {self.z}")
        if self.least < 2 or self.references < 1:
            raise InputError("least: must be at least 2, and references at least 1")

    def race(
        self,
        objectives: Sequence[Objective],
        items: Items,
        known: Sequence[Sequence[float | None]],
        rivals: Sequence[Sequence[Sequence[float]]],
    ) -> Race:
        """Return the race of one trial.

        Args:
            objectives: [m].
            items: of the trial [m][I].
            known: scores that are known already [m][I].
            rivals: scores of the references on these items [R][m][<= I].
        """
        longest = max(map(len, items))
        return Race(
            items=items,
            known=tuple(map(tuple, known)),
            rungs=(*(rung for rung in self.rungs if rung < longest), longest),
            rivals=tuple(tuple(map(tuple, rival)) for rival in rivals),
            signs=tuple(
                1.0 if objective.direction is Direction.MAXIMIZE else -1.0
                for objective in objectives
            ),
            z=self.z,
            least=self.least,
        )


def beaten(race: Race, scores: Sequence[Sequence[float]]) -> bool:
    """Return whether some reference is clearly better in every objective.

    Args:
        race: the race.
        scores: of the first items of each objective [m][n].
    """
    return any(
        all(
            _clearly_worse(race, objective, mine, theirs)
            for objective, (mine, theirs) in enumerate(zip(scores, rival, strict=True))
        )
        for rival in race.rivals
    )


def _clearly_worse(
    race: Race, objective: int, mine: Sequence[float], theirs: Sequence[float]
) -> bool:
    """Return whether the paired difference is beyond z standard errors.

    The single item of an objective that has no others is no sample: its score is exact.
    """
    n = len(mine)
    if len(theirs) < n:
        return False  # the reference was not scored on these items
    sign = race.signs[objective]
    pairs = zip(theirs, mine, strict=False)
    mean, error = mean_of([sign * (other - own) for other, own in pairs])
    if len(race.items[objective]) > 1 and n < race.least:
        return False
    return mean > race.z * error


def counts_at(race: Race, rung: int) -> tuple[int, ...]:
    """Return how many items of each objective the first ``rung`` are [m]."""
    return tuple(min(rung, len(ids)) for ids in race.items)


def stopped_at(race: Race, known: Sequence[Sequence[float | None]]) -> int | None:
    """Return the rung at which known scores end the race, None where they do not.

    Args:
        race: the race.
        known: scores of the items [m][I], None where there is none yet.
    """
    for rung in race.rungs[:-1]:
        counts = counts_at(race, rung)
        rows = [
            [score for score in row[:count] if score is not None]
            for row, count in zip(known, counts, strict=True)
        ]
        if tuple(map(len, rows)) != counts:
            return None
        if beaten(race, rows):
            return rung
    return None


def fresh_counts(race: Race) -> tuple[tuple[int, ...], ...]:
    """Return how many items of a job [m] are scored when it stops, for each rung."""
    return tuple(
        tuple(
            sum(score is None for score in row[:count])
            for row, count in zip(race.known, counts_at(race, rung), strict=True)
        )
        for rung in race.rungs
    )


def run_job_items(job: Job, score: Callable[[Items], Sequence[Score]]) -> tuple[Score, ...]:
    """Score the items of a job, rung by rung where it has a race.

    Args:
        job: what to score.
        score: scores items of each objective [m][I], some of which may be empty.

    Returns:
        scores of the items of the job, or of the first of them; the value of a race is the mean
        of the item scores (the driver makes the estimate).
    """
    race = job.race
    if race is None:
        return tuple(score(job.items))
    rows = [list(row) for row in race.known]  # [m][I]
    margins: list[list[float] | None] = [[] for _ in rows]
    fresh: list[list[float]] = [[] for _ in rows]
    for rung in race.rungs:
        counts = counts_at(race, rung)
        places = [
            [index for index in range(count) if row[index] is None]
            for row, count in zip(rows, counts, strict=True)
        ]
        if any(places):
            asked = tuple(
                tuple(ids[index] for index in indices)
                for ids, indices in zip(race.items, places, strict=True)
            )
            for objective, (one, indices) in enumerate(zip(score(asked), places, strict=True)):
                fresh[objective].extend(one.items)
                graded = margins[objective]
                if graded is not None and len(one.margins) == len(indices):
                    graded.extend(one.margins)
                elif indices:
                    margins[objective] = None
                for index, value in zip(indices, one.items, strict=True):
                    rows[objective][index] = value
        if stopped_at(race, rows) is not None:
            break
    return tuple(
        Score(*(mean_of(values) if values else (0.0, 0.0)), tuple(values), tuple(graded or ()))
        for values, graded in zip(fresh, margins, strict=True)
    )
