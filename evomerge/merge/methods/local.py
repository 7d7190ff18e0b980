"""Methods whose rule is local to an element: no statistics, no tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from evomerge.layout import Partition
from evomerge.merge.methods.method import Method, Parameter, Scope, Table
from evomerge.merge.plan import Plan, Rule
from evomerge.merge.stats import Stats
from evomerge.recipe import Recipe

Anchors = dict[str, tuple[float, ...]]


def _no_anchor(weights: tuple[float, ...], options: Mapping[str, object]) -> Anchors | None:
    """Return nothing: the rule is not linear."""
    return None


def _nearswap(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """W_base + clip(t/|δ|, 0, 1)·δ: take over small differences, limit large ones to t."""
    t = Table(recipe, partition, NEARSWAP).block("t")
    spans = len(t)
    return Plan(
        base=np.ones(spans, np.float32),
        weights=np.ones((spans, 1), np.float32),
        rule=Rule.NEARSWAP,
        local=t.astype(np.float32),
    )


def _ram(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """W_base + λ·mean of w_k·δ_k over the experts with |δ_k| > ε."""
    table = Table(recipe, partition, RAM)
    weights = table.expert("weight").astype(np.float32)
    return Plan(
        base=np.ones(len(weights), np.float32),
        weights=weights,
        rule=Rule.RAM,
        scale=table.block("lambda").astype(np.float32),
        local=table.block("epsilon").astype(np.float32),
    )


def _consensus(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """W_base + λ·τ_MT where at least k masks |δ_k| > m_k·|τ_MT - δ_k| claim the element."""
    table = Table(recipe, partition, CONSENSUS)
    weights = table.expert("weight").astype(np.float32)
    return Plan(
        base=np.ones(len(weights), np.float32),
        weights=weights,
        rule=Rule.CONSENSUS,
        scale=table.block("lambda").astype(np.float32),
        shares=table.expert("mask").astype(np.float32),
        local=np.round(table.block("votes")).astype(np.float32),
    )


_LAMBDA = Parameter("lambda", Scope.BLOCK, 1.0, -16.0, 16.0, (0.0, 1.5), "scale of the result")

NEARSWAP = Method(
    name="nearswap",
    summary="take small differences of one expert over, limit large ones",
    source="mergekit's nearswap",
    parameters=(
        Parameter("t", Scope.BLOCK, None, 0.0, 16.0, (0.0, 0.01), "largest change of a weight"),
    ),
    options=(),
    experts=(1, 1),
    plan=_nearswap,
    anchor=_no_anchor,
)

RAM = Method(
    name="ram",
    summary="average each element over the experts that changed it",
    source="mergekit's ram, with weights and a scale added",
    parameters=(
        Parameter("weight", Scope.EXPERT, 1.0, -16.0, 16.0, (0.0, 1.5), "scale of the task vector"),
        Parameter("epsilon", Scope.BLOCK, 1e-5, 0.0, 16.0, (0.0, 1e-3), "smaller changes are none"),
        _LAMBDA,
    ),
    options=(),
    experts=(1, None),
    plan=_ram,
    anchor=_no_anchor,
)

CONSENSUS = Method(
    name="consensus",
    summary="keep the summed change where enough experts claim it (TALL masks)",
    source="Wang et al. 2024, arXiv 2405.07813",
    parameters=(
        Parameter("weight", Scope.EXPERT, 1.0, -16.0, 16.0, (0.0, 1.5), "scale of the task vector"),
        Parameter("mask", Scope.EXPERT, 0.4, 0.0, 16.0, (0.2, 0.6), "threshold of its mask"),
        Parameter("votes", Scope.BLOCK, 2.0, 0.0, 64.0, (0.0, 2.0), "experts needed, rounded"),
        _LAMBDA,
    ),
    options=(),
    experts=(1, None),
    plan=_consensus,
    anchor=_no_anchor,
)
