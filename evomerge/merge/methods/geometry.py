"""``slerp``: linear, once the Gram matrix has given the angle."""

from __future__ import annotations

import math

import numpy as np

from evomerge.layout import Partition
from evomerge.merge.methods.method import Method, Parameter, Scope, Table
from evomerge.merge.plan import Plan
from evomerge.merge.stats import Stats, cosine
from evomerge.recipe import Recipe

#: Above this cosine mergekit interpolates linearly: sin(angle) is too small to divide by.
_PARALLEL = 0.9995


def slerp_coefficients(cos: float | None, t: float) -> tuple[float, float]:
    """Return the coefficients of the two ends (Shoemake 1985); lerp where they are parallel."""
    if cos is None or abs(cos) > _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cos)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _slerp(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """Interpolate per tensor between the base and one expert, or between two experts.

    In delta form a·A + b·B has the base at a + b: with A the base the delta of A is zero.
    """
    t = Table(recipe, partition, SLERP).block("t")
    experts = len(recipe.experts)
    pair = (0, 1) if experts == 1 else (1, 2)
    c0, c = np.empty(len(t)), np.empty((len(t), experts))
    for number, span in enumerate(partition.spans):
        a, b = slerp_coefficients(cosine(stats.gram(span), pair), float(t[number]))
        c0[number] = a + b
        c[number] = (b,) if experts == 1 else (a, b)
    return Plan(base=c0.astype(np.float32), weights=c.astype(np.float32))


def _anchor(weights: tuple[float, ...]) -> dict[str, tuple[float, ...]] | None:
    """Return t where it is exactly one end; in between slerp is not task arithmetic."""
    ends = {(0.0,): 0.0, (1.0,): 1.0, (1.0, 0.0): 0.0, (0.0, 1.0): 1.0}
    return {"t": (ends[weights],)} if weights in ends else None


SLERP = Method(
    name="slerp",
    summary="along the arc from the base to one expert, or from one expert to the other",
    source="Shoemake 1985; mergekit's slerp, per tensor",
    parameters=(
        Parameter(
            "t", Scope.BLOCK, None, 0.0, 1.0, (0.0, 1.0), "0 is the first model, 1 the second"
        ),
    ),
    options=(),
    experts=(1, 2),
    plan=_slerp,
    anchor=_anchor,
)
