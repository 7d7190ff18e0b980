"""Paired comparison of two trials on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.trial import Direction, Evaluation, Objective


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better one trial is than another.

    Attributes:
        value: mean over the objectives of the mean item difference; positive is better.
        standard_error: of ``value``, from the paired item differences.
        items: of the objective that has fewest.
    """

    value: float
    standard_error: float
    items: int

    @property
    def clear(self) -> bool:
        """Whether the difference stands outside twice its standard error; never on one item."""
        return self.items > 1 and abs(self.value) > 2 * self.standard_error


def paired_difference(
    objectives: Sequence[Objective], ours: Evaluation, theirs: Evaluation
) -> Difference:
    """Compare two evaluations of the same items, item by item.

    The items of different objectives count as independent, so the variance of the mean over m
    objectives is ``Σ_j s_j² / n_j / m²`` with s_j² the sample variance of the differences. Two
    metrics of one task share their items: then this is too small, by √m at most.

    Args:
        objectives: [m]; a minimised objective counts with its sign turned.
        ours: scores [m][I].
        theirs: scores on the same items in the same order [m][I].

    Raises:
        ValueError: the evaluations do not have the same number of items.
    """
    total, variance = 0.0, 0.0
    for objective, mine, other in zip(objectives, ours.scores, theirs.scores, strict=True):
        sign = 1.0 if objective.direction is Direction.MAXIMIZE else -1.0
        differences = [sign * (a - b) for a, b in zip(mine.items, other.items, strict=True)]
        count = len(differences)
        mean = math.fsum(differences) / count
        total += mean
        if count > 1:
            squares = math.fsum((value - mean) ** 2 for value in differences)
            variance += squares / (count - 1) / count
    m = len(objectives)
    fewest = min(len(score.items) for score in ours.scores)
    return Difference(total / m, math.sqrt(variance) / m, fewest)
