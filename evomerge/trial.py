"""The records that travel between searcher, study, pool and worker.

Everything here is a frozen record of numbers and words, a few KB at most, and
none of it knows torch, Ray or the searchers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

from evomerge.recipe import Recipe


class Direction(StrEnum):
    """Whether a larger or a smaller value of an objective is better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"


@dataclass(frozen=True, slots=True)
class Objective:
    """One thing that "good" means.

    Attributes:
        name: unique within a study; letters, digits, ``_``, ``-``, ``.`` only, so that it is
            a valid MLflow metric name.
        direction: whether larger or smaller is better.
        unit: what the value counts, e.g. ``fraction``, ``tokens``, ``nats``.
        weight: share in the scalar that single-objective searchers see.
        minimum: a merge with a smaller value is not wanted whatever else it does (``min:`` in
            the study file), in ``unit``; None for any.
        maximum: the same for larger values.
    """

    name: str
    direction: Direction = Direction.MAXIMIZE
    unit: str = "fraction"
    weight: float = 1.0
    minimum: float | None = None
    maximum: float | None = None

    def loss(self, value: float) -> float:
        """Return ``value`` with its sign turned so that smaller is better."""
        return -value if self.direction is Direction.MAXIMIZE else value


@dataclass(frozen=True, slots=True)
class Score:
    """The value of one objective for one trial.

    Attributes:
        value: the estimate, in the objective's unit; always finite.
        standard_error: of ``value``, same unit; 0.0 when the value is exact.
        items: item scores [I], in the order of the item ids that were asked for.
        margins: a graded form of the item scores [I], in nats: how much likelier the right
            answer is than the best wrong one; empty where the task has none.
    """

    value: float
    standard_error: float
    items: tuple[float, ...]
    margins: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a fitness returns for one model.

    Attributes:
        scores: one per objective [m], in the study's order of objectives.
        seconds: wall time by phase, e.g. ``{"merge": 0.02, "score": 1.4}``.
    """

    scores: tuple[Score, ...]
    seconds: Mapping[str, float]

    @property
    def values(self) -> tuple[float, ...]:
        """Objective values [m]."""
        return tuple(score.value for score in self.scores)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a trial has no evaluation.

    Attributes:
        kind: ``error`` (exception on the worker), ``crash`` (the worker died), ``timeout``,
            ``oom`` (out of memory, with half the batch too), ``bad_result`` (wrong count or not
            finite).
        message: one line for the user.
    """

    kind: Literal["error", "crash", "timeout", "oom", "bad_result"]
    message: str


class TrialState(StrEnum):
    """The life of a trial, as the journal tells it."""

    ASKED = "asked"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a candidate was made from.

    Attributes:
        parents: their numbers; whose numbers, of candidates or of trials, depends on the place.
        how: in a few words.
    """

    parents: tuple[int, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate's life.

    Attributes:
        number: 0, 1, 2, ... in the order of asking; baselines come first.
        kind: ``baseline`` or ``search``; re-scored finalists are not new trials.
        label: for baselines ``base``, ``expert:<name>``, ``uniform``,
            ``task_arithmetic:<scale>``; empty for search trials.
        x: the candidate in the unit box [d]; None for a baseline outside the space.
        recipe: the decoded merge.
        state: where it stands.
        evaluation: on the search items; present when DONE.
        failure: present when FAILED.
        attempts: how many times it was handed to a worker.
        origin: the trials that it was made from, where the searcher says so.
    """

    number: int
    kind: Literal["baseline", "search"]
    label: str
    x: tuple[float, ...] | None
    recipe: Recipe
    state: TrialState = TrialState.ASKED
    evaluation: Evaluation | None = None
    failure: Failure | None = None
    attempts: int = 0
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Race:
    """When a worker may stop scoring: the merge cannot reach the front any more.

    Attributes:
        items: all items of the trial in the order in which they are scored [m][I].
        known: their scores as far as they are known already [m][I]; None for those of the job.
        rungs: numbers of items per objective after which to look, ascending; the last one is at
            least I. An objective with fewer items than a rung has all of them.
        rivals: scores of the references on the same items, in the same order [R][m][<= I].
        signs: 1.0 where a larger score is better, -1.0 where a smaller one is [m].
        z: standard errors of the mean paired difference that it takes to be clearly worse.
        least: fewer items than these never say that something is clearly worse.
    """

    items: tuple[tuple[str, ...], ...]
    known: tuple[tuple[float | None, ...], ...]
    rungs: tuple[int, ...]
    rivals: tuple[tuple[tuple[float, ...], ...], ...]
    signs: tuple[float, ...]
    z: float
    least: int


@dataclass(frozen=True, slots=True)
class Job:
    """What a pool hands to a worker: a few KB.

    Attributes:
        number: identifies the job within its pool; never reused while in flight.
        recipe: the merge to apply.
        items: item ids to score for each objective, in the study's order of objectives [m];
            empty for an objective whose scores are all known.
        race: when to stop early; None for never. The item scores that come back are then those
            of the first items of each objective, up to one of the rungs.
    """

    number: int
    recipe: Recipe
    items: tuple[tuple[str, ...], ...]
    race: Race | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pool returns for a job, exactly once.

    Attributes:
        number: of the job.
        result: the evaluation, or why there is none.
        attempts: how many workers tried.
        worker: name of the worker that gave the result, for the record.
    """

    number: int
    result: Evaluation | Failure
    attempts: int
    worker: str


class Worker(Protocol):
    """Holds the models resident and runs one job at a time."""

    def run(self, job: Job) -> Evaluation:
        """Apply the recipe, score the items and return the evaluation.

        Raises:
            Exception: anything; the pool turns it into a ``Failure``.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Return facts for the record: device, dtype, residency, batch size."""
        ...


class WorkerFactory(Protocol):
    """Builds a worker where it will live; must be picklable and a few KB."""

    def __call__(self) -> Worker:
        """Load the models and build the fitness."""
        ...
