"""``lora_factors``: many LoRA adapters of one base become one of the same rank."""

from __future__ import annotations

from collections.abc import Mapping
from math import copysign, sqrt

import numpy as np

from evomerge.errors import RecipeError
from evomerge.layout import Partition
from evomerge.merge.factors import with_fixed_sign
from evomerge.merge.methods.method import Method, Parameter, Scope, Table
from evomerge.merge.plan import Plan, Rule
from evomerge.merge.stats import Stats
from evomerge.recipe import Recipe


def _lora_factors(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """W_base + s·(Σ β_k·B_k)·(Σ β_k·S(A_k; α_k)), see ``merge.factors``."""
    if partition.spec != "model":
        raise RecipeError(
            f"partition: lora_factors has one row of coefficients, for the whole model; got "
            f"{partition.spec!r} (model)"
        )
    table = Table(recipe, partition, LORA_FACTORS)
    weights = table.expert("weight").astype(np.float32)  # [S, N]
    densities = table.expert("density")[0]
    sources = stats.sources.factors
    cuts = np.zeros_like(weights)
    for number, span in enumerate(partition.spans):
        if span.slot in sources.forms:
            cuts[number] = sources.cuts(span.slot, densities)
        else:
            weights[number] = 0.0
    ones = np.ones(len(weights), np.float32)
    return Plan(base=ones, weights=weights, rule=Rule.FACTORS, shares=cuts)


def _anchor(
    weights: tuple[float, ...], options: Mapping[str, object]
) -> dict[str, tuple[float, ...]] | None:
    """Return β for which each adapter's own change s·B_k·A_k is added ``weights[k]`` times.

    That is the root, because the change is quadratic in β. Cross terms B_i·A_j come with it, so
    that it is task arithmetic only where at most one weight is not zero.
    """
    roots = tuple(copysign(sqrt(abs(weight)), weight) for weight in weights)
    return {"weight": roots, "density": (1.0,) * len(weights)}


def _twins(columns: tuple[str, ...], row: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Return the row with the sign of β fixed, then -β: both are the same merge, bit for bit."""
    places = [n for n, column in enumerate(columns) if column.startswith("weight.")]
    fixed = with_fixed_sign([row[place] for place in places]) if places else ()
    pairs = (fixed, tuple(-value + 0.0 for value in fixed))
    changes = [dict(zip(places, one, strict=True)) for one in pairs]
    first, second = (tuple(one.get(n, value) for n, value in enumerate(row)) for one in changes)
    return first, second


LORA_FACTORS = Method(
    name="lora_factors",
    summary="sum A and B of LoRA adapters apart: one adapter of their rank (partition: model)",
    source="Huang et al. 2023 (LoraHub), arXiv 2307.13269; densities as in Evo-Merging's code",
    parameters=(
        Parameter(
            "weight", Scope.EXPERT, None, -16.0, 16.0, (-1.5, 1.5),
            "of A and of B, so that it acts squared; all signs turned is the same merge",
        ),
        Parameter(
            "density", Scope.EXPERT, 1.0, 0.0, 1.0, (0.0, 1.0),
            "share of each A that stays, the largest magnitudes; B stays whole",
        ),
    ),
    options=(),
    experts=(1, None),
    plan=_lora_factors,
    anchor=_anchor,
    adapters=True,
    twins=_twins,
)  # fmt: skip
