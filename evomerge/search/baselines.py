"""What every search is compared with, and starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
        label: ``base``, ``expert:<name>``, ``uniform`` or ``task_arithmetic:<scale>``. Where
            adapters are merged as factors, uniform gives each the weight 1/N, and task arithmetic
            the root of the scale, so that the own change of each is added ``scale`` times.
        x: the point of the space where it lies [d], None when it lies outside.
        recipe: the merge.
    """

    label: str
    x: tuple[float, ...] | None
    recipe: Recipe


def chosen_experts(
    experts: Sequence[str], wanted: int | Sequence[str] | Literal["all"]
) -> tuple[str, ...]:
    """Return the experts that are scored alone, in their order.

    Args:
        experts: names [K].
        wanted: names; or how many at most, which are then evenly spaced, the first and the last
            among them.
    """
    if wanted == "all" or (isinstance(wanted, int) and wanted >= len(experts)):
        return tuple(experts)
    if not isinstance(wanted, int):
        return tuple(name for name in experts if name in wanted)
    steps = max(wanted - 1, 1)
    places = [number * (len(experts) - 1) // steps for number in range(wanted)]
    return tuple(experts[place] for place in places)


def baselines(
    space: Space,
    experts: Sequence[str],
    anchor: Anchor,
    grid: Sequence[float],
    alone: Sequence[str] | None = None,
    factors: bool = False,
) -> tuple[Baseline, ...]:
    """Return the base, experts, the uniform average and a task-arithmetic grid.

    Args:
        space: gives the recipes; points of it where the method allows.
        experts: names [K].
        anchor: see ``Anchor``; of a method of factors it says what stands for it there.
        grid: scales at which all task vectors are added with one coefficient.
        alone: the experts that are scored alone; all where None.
        factors: the method merges adapters as factors, so that no task vector can be added.
    """
    count = len(experts)
    wanted: list[tuple[str, tuple[float, ...]]] = [("base", (0.0,) * count)]
    for k, name in enumerate(experts):
        if alone is None or name in alone:
            one_hot = tuple(1.0 if j == k else 0.0 for j in range(count))
            wanted.append((f"expert:{name}", one_hot))
    # The anchor of factors takes roots: those of the squares are 1/N.
    wanted.append(("uniform", (1.0 / count**2 if factors else 1.0 / count,) * count))
    wanted += [(f"task_arithmetic:{scale:g}", (scale,) * count) for scale in grid]
    return tuple(_baseline(space, label, weights, anchor, factors) for label, weights in wanted)


def _baseline(
    space: Space, label: str, weights: tuple[float, ...], anchor: Anchor, factors: bool
) -> Baseline:
    values = anchor(weights)
    x = space.encode(*values) if values is not None else None
    if x is not None:
        return Baseline(label, x, space.decode(x))
    if factors:
        assert values is not None
        return Baseline(label, None, space.outside(values[0]))
    return Baseline(label, None, space.task_arithmetic(weights))
