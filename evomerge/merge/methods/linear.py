"""``linear`` and ``task_arithmetic``: the coefficients are the recipe's own numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evomerge.errors import RecipeError
from evomerge.layout import Partition
from evomerge.merge.methods.method import Method, Option, Parameter, Scope, Table, option
from evomerge.merge.plan import Plan
from evomerge.merge.stats import F64, Stats
from evomerge.recipe import Recipe

#: Weight sums below this are refused rather than divided by: mergekit's own threshold.
_SMALLEST_SUM = 1e-8

_NORMALIZE_HELP = "divide by the sum of the weights"


def normalized(weights: F64, partition: Partition) -> F64:
    """Return ``weights`` [S, K] divided by their sums over the experts.

    Raises:
        RecipeError: a sum is zero, which has no merge.
    """
    sums = weights.sum(axis=1, keepdims=True)
    bad = np.abs(sums[:, 0]) < _SMALLEST_SUM
    if bad.any():
        block = partition.blocks[partition.spans[int(np.flatnonzero(bad)[0])].block]
        raise RecipeError(
            f"table: the weights of block {block!r} sum to zero and cannot be normalized "
            "(set normalize: false, or keep one weight above zero)"
        )
    result: F64 = weights / sums
    return result


def _linear(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """Σ w_k·W_k, divided by Σ w_k: in delta form the base has coefficient Σ c_k."""
    weights = Table(recipe, partition, LINEAR).expert("weight")
    if option(recipe, LINEAR, "normalize"):
        c = normalized(weights, partition)
        c0 = np.ones(len(c))
    else:
        c, c0 = weights, weights.sum(axis=1)
    return Plan(base=c0.astype(np.float32), weights=c.astype(np.float32))


def _task_arithmetic(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """W_base + λ·Σ w_k·τ_k."""
    table = Table(recipe, partition, TASK_ARITHMETIC)
    c = table.expert("weight")
    if option(recipe, TASK_ARITHMETIC, "normalize"):
        c = normalized(c, partition)
    c = c * table.block("lambda")[:, None]
    return Plan(base=np.ones(len(c), np.float32), weights=c.astype(np.float32))


def _linear_anchor(
    weights: tuple[float, ...], options: Mapping[str, object]
) -> dict[str, tuple[float, ...]] | None:
    """Return weights that average the experts; only sums of one are averages."""
    return {"weight": weights} if abs(sum(weights) - 1.0) < 1e-9 else None


def _task_anchor(
    weights: tuple[float, ...], options: Mapping[str, object]
) -> dict[str, tuple[float, ...]] | None:
    """Return the weights; normalized ones only where dividing by their sum changes nothing."""
    if options.get("normalize") and abs(sum(weights) - 1.0) > 1e-9:
        return None
    return {"weight": weights, "lambda": (1.0,)}


LINEAR = Method(
    name="linear",
    summary="weighted average of the experts (model soup)",
    source="Wortsman et al. 2022, arXiv 2203.05482",
    parameters=(
        Parameter("weight", Scope.EXPERT, None, -16.0, 16.0, (0.0, 1.0), "share of the expert"),
    ),
    options=(Option("normalize", True, (True, False), _NORMALIZE_HELP),),
    experts=(1, None),
    plan=_linear,
    anchor=_linear_anchor,
)

TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    summary="base plus weighted task vectors",
    source="Ilharco et al. 2023, arXiv 2212.04089",
    parameters=(
        Parameter(
            "weight", Scope.EXPERT, None, -16.0, 16.0, (0.0, 1.5), "scale of the task vector"
        ),
        Parameter("lambda", Scope.BLOCK, 1.0, -16.0, 16.0, (0.0, 1.5), "scale of their sum"),
    ),
    options=(Option("normalize", False, (False, True), _NORMALIZE_HELP),),
    experts=(1, None),
    plan=_task_arithmetic,
    anchor=_task_anchor,
)
