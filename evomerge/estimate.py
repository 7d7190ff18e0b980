"""From item scores to the value of an objective: the contract, and the plain mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model scored on some items of one objective.

    Attributes:
        ids: of the items [n], n >= 1, each once.
        scores: of the items [n].
        margins: graded scores [n], nats; empty where the task has none.
    """

    ids: tuple[str, ...]
    scores: tuple[float, ...]
    margins: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """The value of one objective.

    Attributes:
        value: in the objective's unit.
        standard_error: of the value; 0.0 where it is exact.
        facts: of the estimator, e.g. how badly its model fits; for the record.
    """

    value: float
    standard_error: float
    facts: Mapping[str, float]


class Estimator(Protocol):
    """Turns the answers to some items into the value over all items of the search split.

    Pure: the same answers give the same estimate, in any process.
    """

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        """Return the estimate of one objective.

        Args:
            objective: its number in the study.
            answers: to at least one of its search items.
        """
        ...


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model whose answers to all search items are known before the search.

    Attributes:
        label: ``base``, ``expert:<name>``, or ``calibration:<number>`` for a merge by chance.
        answers: to the search items of each objective [m].
    """

    label: str
    answers: tuple[Answers, ...]


#: From the endpoints [K] and the number of a draw to the items that trials are scored on [m][n],
#: in the order of scoring, and to what makes values of their answers. Pure: the same endpoints
#: and number give the same items and an estimator that gives the same estimates, in any process.
#: All draws are of one size.
Prepare = Callable[[Sequence[Endpoint], int], tuple[tuple[tuple[str, ...], ...], Estimator]]


@dataclass(frozen=True, slots=True)
class Estimation:
    """An estimated fitness: few items per trial, and a model of the rest.

    Attributes:
        name: of the estimator, for the record.
        prepare: see ``Prepare``; called when all endpoints have been scored, once for a draw.
        full_every: every so many-th trial of the search is scored on all search items, which
            shows how far off the estimator is; None for never.
        calibration: merges by chance that are endpoints too, beside base and experts.
        settings: JSON-able facts that decide the estimates; they must not change when a study
            is continued.
        refresh: trials that share the items of a draw, or those of a ``generation`` of the
            searcher; None for one draw, for all of them.
    """

    name: str
    prepare: Prepare
    full_every: int | None = None
    calibration: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)
    refresh: int | Literal["generation"] | None = None


def mean_of(scores: Sequence[float], population: int | None = None) -> tuple[float, float]:
    """Return the mean, and its standard error.

    Args:
        scores: of the items [n], n >= 1.
        population: number of items that the n were drawn from; the error shrinks with what was
            seen of them (finite population correction). None where the items stand for more.

    Returns:
        The error is the sample standard deviation over the root of n; 0.0 for a single item,
        which has none.
    """
    n = len(scores)
    mean = sum(scores) / n
    if n == 1:
        return mean, 0.0
    spread = sum((score - mean) ** 2 for score in scores)
    error = math.sqrt(spread / (n - 1)) / math.sqrt(n)
    if population is not None:
        error *= math.sqrt(max(population - n, 0) / population)  # Cochran 1977, eq. 2.20
    return mean, error


class PlainMean:
    """The mean of the item scores."""

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        """Return the mean and its standard error; see ``Estimator``."""
        value, error = mean_of(answers.scores)
        return Estimate(value, error, {})
