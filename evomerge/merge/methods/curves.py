"""Methods that keep or scale by magnitude rank: DELLA's rising probability, and rank bands."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from evomerge.layout import Partition
from evomerge.merge.methods.method import Method, Option, Parameter, Scope, Table, option
from evomerge.merge.methods.sparsify import (
    DENSITY,
    ELECTION,
    LAMBDA,
    elected_plan,
    normalize_option,
    summed_plan,
    weight_parameter,
)
from evomerge.merge.plan import ALWAYS, WHOLE, Curves, Plan, Rule, Select
from evomerge.merge.stats import F64, Stats
from evomerge.recipe import Recipe

U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]
Anchors = dict[str, tuple[float, ...]]

#: Makes the curve of (span, slot, expert): lowest key, largest passing hash, gain [keys].
CurveOf = Callable[[int, int, int], tuple[int, U32, F32]]

#: Ranks at which the gain changes: half of the changes, then 80, 95 and 99 %.
BANDS = (0.5, 0.8, 0.95, 0.99)


def curves(partition: Partition, experts: int, make: CurveOf) -> Select:
    """Return a selection by curves, one per span and expert; equal curves are stored once."""
    select = Select.everything(len(partition.spans), experts)
    shape = select.low.shape
    first, start = np.zeros(shape, np.int32), np.zeros(shape, np.int64)
    length = np.ones(shape, np.int64)
    passing: list[U32] = []
    gains: list[F32] = []
    total = 0
    for number, span in enumerate(partition.spans):
        for k in range(experts):
            lowest, limits, gain = make(number, span.slot, k)
            first[number, k], start[number, k], length[number, k] = lowest, total, len(limits)
            passing.append(limits)
            gains.append(gain)
            total += len(limits)
    table = Curves(first, start, length, np.concatenate(passing), np.concatenate(gains))
    return Select(select.low, select.high, select.at_low, select.at_high, select.inside, table)


class _Della:
    """Keep probability rising linearly with the rank of the magnitude (MAGPRUNE).

    p = (d - ε) + 2ε·rank/(n - 1) with the middle rank of equal keys; the window is narrowed
    where it would leave [0, 1].
    """

    def __init__(self, stats: Stats, density: F64, epsilon: F64, rescale: str) -> None:
        self._stats, self._rescale = stats, rescale
        self._density = density
        self._epsilon = np.minimum(epsilon, np.minimum(density, 1.0 - density))

    def __call__(self, span: int, slot: int, k: int) -> tuple[int, U32, F32]:
        first, counts = self._stats.counts(slot, k)
        size = counts.sum()
        rank = np.cumsum(counts) - (counts + 1) / 2.0  # middle rank of each key, from 0
        d, e = self._density[span, k], self._epsilon[span, k]
        keep = np.clip((d - e) + 2.0 * e * rank / max(size - 1, 1), 0.0, 1.0)
        gain = np.ones_like(keep)
        if self._rescale == "inverse":
            np.divide(1.0, keep, out=gain, where=keep > 0)
        elif self._rescale == "l1":
            mass = counts * key_values(first, len(counts))
            left = float((mass * keep).sum())
            gain[:] = float(mass.sum()) / left if left > 0 else 1.0
        limits = np.clip(np.floor(keep * WHOLE) - 1, 0, ALWAYS).astype(np.uint32)
        gain = np.where(keep * WHOLE < 1, 0.0, gain)
        return first, limits, gain.astype(np.float32)


class _Bands:
    """A gain per band of magnitude ranks; a key on a boundary gets the mean of its elements."""

    def __init__(self, stats: Stats, gains: F64) -> None:
        self._stats, self._gains = stats, gains  # gains [S, K, bands]

    def __call__(self, span: int, slot: int, k: int) -> tuple[int, U32, F32]:
        first, counts = self._stats.counts(slot, k)
        size = float(counts.sum())
        upper = np.cumsum(counts) / size
        lower = upper - counts / size
        edges = np.asarray((0.0, *BANDS, 1.0))
        # Share of each key's elements in each band, by the ranks that the key covers.
        inside = np.minimum(upper[:, None], edges[1:]) - np.maximum(lower[:, None], edges[:-1])
        inside = np.maximum(inside, 0.0)
        total = inside.sum(axis=1, keepdims=True)
        share = np.divide(inside, total, out=np.zeros_like(inside), where=total > 0)
        gain = share @ self._gains[span, k]
        return first, np.full(len(counts), ALWAYS, np.uint32), gain.astype(np.float32)


def key_values(first: int, count: int) -> F64:
    """Return the middle magnitude of each key."""
    keys = np.arange(first, first + count, dtype=np.uint32)
    return ((keys << np.uint32(16)) | np.uint32(0x8000)).view(np.float32).astype(np.float64)


def _della_select(
    recipe: Recipe, partition: Partition, stats: Stats, table: Table, method: Method
) -> Select:
    density = table.expert("density")
    rescale = str(option(recipe, method, "rescale"))
    make = _Della(stats, density, table.expert("epsilon"), rescale)
    return curves(partition, density.shape[1], make)


def _della_linear(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    table = Table(recipe, partition, DELLA_LINEAR)
    select = _della_select(recipe, partition, stats, table, DELLA_LINEAR)
    gain = np.ones(select.low.shape)  # the curves carry it
    return summed_plan(recipe, partition, table, DELLA_LINEAR, select, gain)


def _della(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    table = Table(recipe, partition, DELLA)
    select = _della_select(recipe, partition, stats, table, DELLA)
    gain = np.ones(select.low.shape)
    return elected_plan(recipe, partition, table, DELLA, select, gain)


def _rank_bands(recipe: Recipe, partition: Partition, stats: Stats) -> Plan:
    """W_base + λ·Σ w_k·gain_k(rank of |δ_k|)·δ_k."""
    table = Table(recipe, partition, RANK_BANDS)
    gains = np.stack([table.expert(f"gain{band}") for band in range(len(BANDS) + 1)], axis=2)
    weights = table.expert("weight")
    c = (weights * table.block("lambda")[:, None]).astype(np.float32)
    select = curves(partition, weights.shape[1], _Bands(stats, gains))
    return Plan(np.ones(len(c), np.float32), c, Rule.SUM, select=select, seed=recipe.seed)


def _della_anchor(weights: tuple[float, ...], options: Mapping[str, object]) -> Anchors | None:
    """Keep everything: then the sum of the task vectors is task arithmetic."""
    if options.get("normalize") and abs(sum(weights) - 1.0) > 1e-9:
        return None
    return {"weight": weights, "density": (1.0,) * len(weights), "lambda": (1.0,)}


def _bands_anchor(weights: tuple[float, ...], options: Mapping[str, object]) -> Anchors | None:
    """All gains equal: then the rank does not matter."""
    gains = {f"gain{band}": weights for band in range(len(BANDS) + 1)}
    return {**gains, "weight": (1.0,) * len(weights), "lambda": (1.0,)}


def _no_anchor(weights: tuple[float, ...], options: Mapping[str, object]) -> Anchors | None:
    return None


_EPSILON = Parameter(
    "epsilon", Scope.EXPERT, 0.15, 0.0, 0.5, (0.0, 0.2), "half the window of probabilities"
)
_DELLA_RESCALE = Option(
    "rescale", "inverse", ("inverse", "l1", "none"),
    "divide by the probability (paper), match the expected L1 norm (mergekit), or leave",
)  # fmt: skip
_PAPER = "Deep et al. 2024, arXiv 2406.11617"

DELLA_LINEAR = Method(
    name="della_linear",
    summary="drop small changes more often than large ones, then add them",
    source=_PAPER,
    parameters=(weight_parameter(), DENSITY, _EPSILON, LAMBDA),
    options=(normalize_option(False), _DELLA_RESCALE),
    experts=(1, None),
    plan=_della_linear,
    anchor=_della_anchor,
)

DELLA = Method(
    name="della",
    summary="drop small changes more often than large ones, elect signs",
    source=_PAPER,
    parameters=(weight_parameter(), DENSITY, _EPSILON, LAMBDA),
    options=(normalize_option(True), *ELECTION, _DELLA_RESCALE),
    experts=(1, None),
    plan=_della,
    anchor=_no_anchor,
)

RANK_BANDS = Method(
    name="rank_bands",
    summary="a gain for each band of magnitude ranks: 0-50, 50-80, 80-95, 95-99 %, top 1 %",
    source="new here; trimming is the gains 0, 0, 1, 1, 1",
    parameters=(
        *(
            Parameter(
                f"gain{band}", Scope.EXPERT, None, -16.0, 16.0, (0.0, 1.5), f"gain of band {band}"
            )
            for band in range(len(BANDS) + 1)
        ),
        Parameter("weight", Scope.EXPERT, 1.0, -16.0, 16.0, (0.0, 1.5), "scale of all its gains"),
        LAMBDA,
    ),
    options=(),
    experts=(1, None),
    plan=_rank_bands,
    anchor=_bands_anchor,
)
