"""Paired comparison of two trials on the same items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.fitness.aggregate import Aggregate
from evomerge.item_cache import Items
from evomerge.trial import Direction, Evaluation, Objective


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better one trial is than another.

    Attributes:
        value: mean over the objectives of the difference in value; positive is better.
        standard_error: of ``value``, from the paired item differences.
        items: of the objective that has fewest.
    """

    value: float
    standard_error: float
    items: int

    @property
    def comparable(self) -> bool:
        """Whether there is anything to tell apart: not on one item, nor where all are equal."""
        return self.items > 1 and (self.standard_error > 0 or self.value != 0)

    @property
    def clear(self) -> bool:
        """Whether the difference stands outside twice its standard error; never on one item."""
        return self.comparable and abs(self.value) > 2 * self.standard_error


def paired_difference(
    objectives: Sequence[Objective],
    ours: Evaluation,
    theirs: Evaluation,
    items: Items = (),
    aggregates: Sequence[Aggregate] = (),
) -> Difference:
    """Compare two evaluations of the same items, item by item.

    The variance is that of the paired differences, carried through what makes values of item
    scores by the delta method (``Aggregate.effects``): weights, groups of tasks and perplexities
    are right. Of a plain mean it is ``s² / n`` with s² the sample variance of the differences.
    Objectives on the same items, such as two metrics of one task, are correlated through them.
    Others count as independent, and so do all without ``items``: an id is a place in a task, and
    two tasks have the same ones.

    Args:
        objectives: [m]; a minimised objective counts with its sign turned.
        ours: scores [m][I].
        theirs: scores on the same items in the same order [m][I].
        items: ids [m][I]; needed with ``aggregates``.
        aggregates: how the value of each objective is made of item scores [m]; plain means where
            absent.

    Raises:
        ValueError: the evaluations do not have the same number of items.
        EvaluationError: a value is too large to be a number.
    """
    m = len(objectives)
    items = items or tuple(
        tuple(f"{column}:{row}" for row in range(len(score.items)))
        for column, score in enumerate(ours.scores)
    )
    aggregates = aggregates or (Aggregate(),) * m
    total, singles = 0.0, 0.0
    # Of an item, on the sum over the objectives that are scored on the same items.
    effects: dict[tuple[int, str], float] = {}
    columns = zip(objectives, aggregates, items, ours.scores, theirs.scores, strict=True)
    for objective, aggregate, ids, mine, other in columns:
        first = items.index(ids)
        sign = 1.0 if objective.direction is Direction.MAXIMIZE else -1.0
        values = [aggregate.estimate(ids, score.items)[0] for score in (mine, other)]
        total += sign * (values[0] - values[1])
        pairs = zip(
            aggregate.effects(ids, mine.items), aggregate.effects(ids, other.items), strict=True
        )
        differences = [sign * (a - b) for a, b in pairs]
        singles += aggregate.of_single_items(ids, differences)
        for item, difference in zip(ids, differences, strict=True):
            effects[first, item] = effects.get((first, item), 0.0) + difference
    variance = math.fsum(effect**2 for effect in effects.values()) + singles
    fewest = min(len(score.items) for score in ours.scores)
    return Difference(total / m, math.sqrt(variance) / m, fewest)


def aggregate_fields(aggregates: Sequence[Aggregate]) -> list[dict[str, Any]] | None:
    """Return aggregates [m] as JSON data; None where all are plain means."""
    if all(one == Aggregate() for one in aggregates):
        return None
    return [
        {
            "link": one.link,
            **({"weights": dict(one.weights)} if one.weights else {}),
            **({"strata": dict(one.strata)} if one.strata else {}),
        }
        for one in aggregates
    ]


def aggregates_from(fields: Sequence[Mapping[str, Any]] | None) -> tuple[Aggregate, ...]:
    """Return the aggregates that ``aggregate_fields`` wrote; none where all are plain means."""
    return tuple(
        Aggregate(one["link"], one.get("weights", {}), one.get("strata", {}))
        for one in fields or ()
    )
