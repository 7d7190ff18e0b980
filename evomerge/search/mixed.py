"""Operators of pymoo's genetic algorithms where some dimensions have levels.

Real dimensions keep SBX crossover and polynomial mutation. Their steps are too small to leave a
level, and a choice has no in-between, so dimensions with levels are inherited from either parent
(uniform crossover) and mutated by levels, as in pymoo's mixed-variable mating. Points stay points
of the unit box: survival, warm points and replay are those of the other searchers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.kinds import snap
from evomerge.space import Kind

Array = NDArray[np.float64]


def with_levels(sbx: Any, pm: Any, kinds: Sequence[Kind]) -> tuple[Any, Any]:
    """Return crossover and mutation classes for dimensions of the given kinds [d].

    Args:
        sbx: pymoo's class of SBX crossover.
        pm: pymoo's class of polynomial mutation.
        kinds: of the dimensions.
    """
    levels = np.array([kind.levels for kind in kinds])  # [d]
    leveled = np.flatnonzero(levels)
    ordered = np.array([kind.name == "integer" for kind in kinds])[leveled]

    class Crossover(sbx):  # type: ignore[misc]  # pymoo ships no types
        def _do(self, problem: Any, pairs: Array, *, random_state: Any, **more: Any) -> Array:
            """Return children [2, n, d] of parents ``pairs`` [2, n, d]."""
            parents = pairs[:, :, leveled].copy()
            children = super()._do(problem, pairs, random_state=random_state, **more)
            swapped = random_state.random(parents.shape[1:]) < 0.5
            children[:, :, leveled] = np.where(swapped, parents[::-1], parents)
            return np.asarray(children)

    class Mutation(pm):  # type: ignore[misc]  # pymoo ships no types
        def _do(self, problem: Any, points: Array, *, random_state: Any, **more: Any) -> Array:
            """Return ``points`` [n, d] mutated."""
            before = points[:, leveled].copy()
            mutated = super()._do(problem, points, random_state=random_state, **more)
            chance = float(self.get_prob_var(problem))
            moved = _moved(before, levels[leveled], ordered, random_state)
            changes = random_state.random(before.shape) < chance
            mutated[:, leveled] = np.where(changes, moved, before)
            return snap(mutated, kinds)

    return Crossover, Mutation


def _moved(
    points: Array, levels: NDArray[np.intp], ordered: NDArray[np.bool_], random_state: Any
) -> Array:
    """Return other levels [n, l] than those of ``points`` [n, l].

    A choice takes any other one. A whole number does so half of the time; else it takes the next
    one, up or down: neighbours are alike.
    """
    number = np.floor(points * levels)
    other = (number + 1 + np.floor(random_state.random(points.shape) * (levels - 1))) % levels
    step = np.where(random_state.random(points.shape) < 0.5, 1, -1)
    inside = (number + step >= 0) & (number + step < levels)
    near = ordered & inside & (random_state.random(points.shape) < 0.5)
    return np.asarray((np.where(near, number + step, other) + 0.5) / levels)
