"""What every search is compared with, and starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from evomerge.recipe import Recipe
from evomerge.space import Space

#: Values of the columns, and of the options.
Anchored = tuple[Mapping[str, float], Mapping[str, object]]
#: Where the method equals ``W_base + Σ_k w_k·τ_k``; None where it cannot.
Anchor = Callable[[tuple[float, ...]], Anchored | None]


@dataclass(frozen=True, slots=True)
class Baseline:
    """A merge that is scored before the search.

    Attributes:
        label: ``base``, ``expert:<name>``, ``uniform`` or ``task_arithmetic:<scale>``.
        x: the point of the space where it lies [d], None when it lies outside.
        recipe: the merge.
    """

    label: str
    x: tuple[float, ...] | None
    recipe: Recipe


def baselines(
    space: Space, experts: Sequence[str], anchor: Anchor, grid: Sequence[float]
) -> tuple[Baseline, ...]:
    """Return the base, each expert, the uniform average and a task-arithmetic grid.

    Args:
        space: gives the recipes; points of it where the method allows.
        experts: names [K].
        anchor: see ``Anchor``.
        grid: scales at which all task vectors are added with one coefficient.
    """
    count = len(experts)
    wanted: list[tuple[str, tuple[float, ...]]] = [("base", (0.0,) * count)]
    for k, name in enumerate(experts):
        one_hot = tuple(1.0 if j == k else 0.0 for j in range(count))
        wanted.append((f"expert:{name}", one_hot))
    wanted.append(("uniform", (1.0 / count,) * count))
    wanted += [(f"task_arithmetic:{scale:g}", (scale,) * count) for scale in grid]
    return tuple(_baseline(space, label, weights, anchor) for label, weights in wanted)


def _baseline(space: Space, label: str, weights: tuple[float, ...], anchor: Anchor) -> Baseline:
    values = anchor(weights)
    x = space.encode(*values) if values is not None else None
    recipe = space.task_arithmetic(weights) if x is None else space.decode(x)
    return Baseline(label, x, recipe)
