"""``passthrough``: one expert, scaled."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evomerge.layout import Partition
from evomerge.merge.methods.method import Method, Parameter, Scope, Table
from evomerge.merge.plan import Plan
from evomerge.merge.stats import Stats
from evomerge.recipe import Recipe


def _passthrough(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """scale·W_1 = scale·W_base + scale·τ_1."""
    scale = Table(recipe, partition, PASSTHROUGH).block("scale").astype(np.float32)
    return Plan(base=scale, weights=scale[:, None])


def _anchor(
    weights: tuple[float, ...], options: Mapping[str, object]
) -> dict[str, tuple[float, ...]] | None:
    """Return scale 1 for the expert itself; any other scale also scales the base."""
    return {"scale": (1.0,)} if weights == (1.0,) else None


PASSTHROUGH = Method(
    name="passthrough",
    summary="one expert, every block of it scaled",
    source="mergekit's passthrough",
    parameters=(
        Parameter("scale", Scope.BLOCK, 1.0, -16.0, 16.0, (0.5, 1.5), "factor of the weights"),
    ),
    options=(),
    experts=(1, 1),
    plan=_passthrough,
    anchor=_anchor,
)
