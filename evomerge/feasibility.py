"""Constraints: what violates one, how much, and that the feasible come first.

Deb's rule (Deb 2000): of two merges the feasible one is better; of two infeasible ones that
which violates less; of two feasible ones that which dominates.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from evomerge.pareto import nondominated
from evomerge.trial import Objective


def bounds(objective: Objective) -> dict[str, float]:
    """Return the bounds of an objective, ``min`` and ``max``; those that it has."""
    pairs = {"min": objective.minimum, "max": objective.maximum}
    return {key: bound for key, bound in pairs.items() if bound is not None}


def keeps_bounds(objective: Objective, value: float) -> bool:
    """Return whether a value is inside the bounds of its objective."""
    return violation((objective,), (value,)) == 0


def bounds_note(objectives: Sequence[Objective]) -> str:
    """Return the bounds of all objectives as the meaning of a mark, e.g. for a caption."""
    limits = ", ".join(
        f"{one.name} {key} {bound:g}" for one in objectives for key, bound in bounds(one).items()
    )
    return f"outside its bounds ({limits})"


def constrained(objectives: Sequence[Objective]) -> bool:
    """Return whether any objective has a bound."""
    return any(one.minimum is not None or one.maximum is not None for one in objectives)


def violation(objectives: Sequence[Objective], values: Sequence[float]) -> float:
    """Return by how much values [m] leave their bounds; 0.0 where they keep them all.

    It is the sum over the bounds of the excess in units of the bound (of 1 for a bound of 0),
    so that bounds in different units can be added.
    """
    total = 0.0
    for objective, value in zip(objectives, values, strict=True):
        for bound, excess in (
            (objective.minimum, (objective.minimum or 0.0) - value),
            (objective.maximum, value - (objective.maximum or 0.0)),
        ):
            if bound is not None and excess > 0:
                total += excess / (abs(bound) or 1.0)
    return min(total, sys.float_info.max)


def best_rows(losses: Sequence[Sequence[float]], violations: Sequence[float]) -> tuple[int, ...]:
    """Return the rows of the front: the nondominated feasible ones.

    Where nothing is feasible they are the nondominated among those that violate least.

    Args:
        losses: [n, m], finite.
        violations: [n].
    """
    if not losses:
        return ()
    least = min(violations)
    rows = [row for row, value in enumerate(violations) if value == least]
    return tuple(rows[place] for place in nondominated([losses[row] for row in rows]))
