"""``ties``: trim by magnitude, elect a sign, merge what agrees."""

from __future__ import annotations

import numpy as np

from evomerge.layout import Partition
from evomerge.merge.methods.method import Method, Option, Parameter, Scope, Table, option
from evomerge.merge.plan import Divisor, Elect, Plan, ZeroSum
from evomerge.merge.stats import Stats
from evomerge.recipe import Recipe

_ELECT = {"weighted": Elect.WEIGHTED, "unweighted": Elect.UNWEIGHTED, "count": Elect.COUNT}
_DIVISOR = {"weight": Divisor.WEIGHT, "count": Divisor.COUNT}
_ZERO = {"drop": ZeroSum.DROP, "plus": ZeroSum.PLUS}


def _ties(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """W_base + λ·(Σ w_k·δ_k over agreeing experts / divisor), deltas trimmed per tensor."""
    table = Table(recipe, partition, TIES)
    weights, density = table.expert("weight"), table.expert("density")
    whole_edge = option(recipe, TIES, "edge") == "all"
    edge = np.zeros(weights.shape, np.int32)
    share = np.zeros(weights.shape, np.int64)
    for number, span in enumerate(partition.spans):
        for k in range(weights.shape[1]):
            edge[number, k], share[number, k] = stats.cut(
                span.slot, k, float(density[number, k]), whole_edge
            )
    normalize = option(recipe, TIES, "normalize")
    divisor = _DIVISOR[str(option(recipe, TIES, "divisor"))] if normalize else Divisor.ONE
    return Plan(
        base=np.ones(len(weights), np.float32),
        weights=weights.astype(np.float32),
        elect=_ELECT[str(option(recipe, TIES, "elect"))],
        divisor=divisor,
        zero_sum=_ZERO[str(option(recipe, TIES, "zero_sum"))],
        scale=table.block("lambda").astype(np.float32),
        edge=edge,
        share=share,
        seed=recipe.seed,
    )


def _anchor(weights: tuple[float, ...]) -> dict[str, tuple[float, ...]] | None:
    """Return nothing: with an election no setting is task arithmetic for several experts."""
    return None


TIES = Method(
    name="ties",
    summary="keep the largest changes, elect a sign per element, merge those that agree",
    source="Yadav et al. 2023, arXiv 2306.01708; defaults as mergekit where they differ",
    parameters=(
        Parameter("weight", Scope.EXPERT, 1.0, -16.0, 16.0, (0.0, 1.5), "scale of the task vector"),
        Parameter("density", Scope.EXPERT, 1.0, 0.0, 1.0, (0.1, 1.0), "fraction of it to keep"),
        Parameter("lambda", Scope.BLOCK, 1.0, -16.0, 16.0, (0.0, 1.5), "scale of the result"),
    ),
    options=(
        Option("normalize", True, (True, False), "divide by what agreed"),
        Option(
            "elect", "weighted", tuple(_ELECT), "sign of the weighted sum (mergekit), "
            "of the unweighted sum (paper), or of the sum of signs",
        ),
        Option("divisor", "weight", tuple(_DIVISOR), "sum of weights (mergekit) or count (paper)"),
        Option("zero_sum", "drop", tuple(_ZERO), "drawn election: keep base, or plus (mergekit)"),
        Option(
            "edge", "fraction", ("fraction", "all"),
            "equal magnitudes at the cut: keep a hashed share (exact density) or all (paper)",
        ),
    ),
    experts=(1, None),
    plan=_ties,
    anchor=_anchor,
)  # fmt: skip
