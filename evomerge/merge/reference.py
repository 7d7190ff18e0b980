"""The NumPy twin: every method again, slowly and for reading.

It shares with the engine only the sources and, for the methods on Gram matrices, those
matrices. Masks, thresholds and elections are computed from whole arrays and full sorts. On the
CPU the engine must equal it bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.layout import partition
from evomerge.merge.methods.geometry import slerp_coefficients
from evomerge.merge.sources import Sources, to_float32
from evomerge.merge.stats import Stats, cosine
from evomerge.recipe import Recipe

F32 = npt.NDArray[np.float32]


def merge_slot(recipe: Recipe, sources: Sources, slot: int) -> npt.NDArray[Any]:
    """Return the merged bits of one slot, flat, in the recipe's dtype.

    Args:
        recipe: with a partition whose spans are whole slots.
        sources: base and experts.
        slot: index in the layout.
    """
    cut = partition(sources.layout, recipe.partition)
    (span,) = [span for span in cut.spans if span.slot == slot]
    row = dict(zip(recipe.columns, recipe.table[span.block], strict=True))
    base = to_float32(*sources.base(slot))
    experts = [to_float32(*sources.expert(slot, k)) for k in range(sources.experts)]
    names = [expert.name for expert in recipe.experts]
    options = dict(recipe.options)
    if recipe.method == "ties":
        merged = _ties(recipe, base, experts, row, names, options, sources.layout.offsets[slot])
    else:
        gram = Stats(sources).gram(span) if recipe.method == "slerp" else None
        c0, c = _coefficients(recipe.method, row, names, options, gram)
        merged = _weighted_sum(base, experts, c0, c)
    return round_to(merged, recipe.dtype)


def _coefficients(
    method: str,
    row: dict[str, float],
    names: list[str],
    options: dict[str, Any],
    gram: npt.NDArray[np.float64] | None,
) -> tuple[float, list[float]]:
    """Return c0 and c of a linear method in float64."""
    if gram is not None:
        pair = (0, 1) if len(names) == 1 else (1, 2)
        a, b = slerp_coefficients(cosine(gram, pair), row["t"])
        return a + b, [b] if len(names) == 1 else [a, b]
    weights = np.asarray([row[f"weight.{name}"] for name in names])
    normalize = options.get("normalize", method == "linear")
    if normalize:
        weights = weights / weights.sum()
    if method == "linear":
        return (1.0 if normalize else float(weights.sum())), weights.tolist()
    return 1.0, (weights * row.get("lambda", 1.0)).tolist()


def _weighted_sum(base: F32, experts: list[F32], c0: float, c: list[float]) -> F32:
    """Return c0·W0 + Σ c_k·(W_k - W0), float32 throughout, experts in order."""
    total: F32 = np.float32(c0) * base
    for weight, expert in zip(c, experts, strict=True):
        if np.float32(weight) != 0:
            total = total + np.float32(weight) * (expert - base)
    return total


def _ties(
    recipe: Recipe,
    base: F32,
    experts: list[F32],
    row: dict[str, float],
    names: list[str],
    options: dict[str, Any],
    offset: int,
) -> F32:
    """Return W0 + λ·elected sum (Yadav et al. 2023, section 4)."""
    weights = [np.float32(row.get(f"weight.{name}", 1.0)) for name in names]
    rule = options.get("elect", "weighted")
    zero = np.zeros_like(base)
    values, ballots = [], []
    for k, expert in enumerate(experts):
        density = row.get(f"density.{names[k]}", 1.0)
        delta = _trim(expert - base, density, options.get("edge"), recipe.seed, k, offset)
        active = weights[k] != 0
        values.append(weights[k] * delta if active else zero)
        ballots.append((delta if rule == "unweighted" else values[-1]) if active else zero)
    vote = zero
    for ballot in ballots:
        vote = vote + (np.sign(ballot) if rule == "count" else ballot)
    total, weight_sum, count = zero, zero, zero
    for weight, value, ballot in zip(weights, values, ballots, strict=True):
        agrees = (ballot != 0) & ((ballot > 0) == (vote >= 0))
        total = total + np.where(agrees, value, np.float32(0))
        weight_sum = weight_sum + np.where(agrees, weight, np.float32(0))
        count = count + agrees.astype(np.float32)
    if options.get("normalize", True):
        divisor = count if options.get("divisor") == "count" else weight_sum
        total = np.where(divisor != 0, total / np.where(divisor != 0, divisor, 1), total)
    if options.get("zero_sum", "drop") == "drop":
        total = np.where(vote == 0, np.float32(0), total)
    result: F32 = base + np.float32(row.get("lambda", 1.0)) * total
    return result


def _trim(delta: F32, density: float, edge: str | None, seed: int, k: int, offset: int) -> F32:
    """Keep the int(density·n) largest magnitudes, as far as 7 mantissa bits tell them apart.

    Elements that share the key at the cut are kept by the counter hash, so that the kept
    fraction is the requested one, or all of them where ``edge`` is ``all``.
    """
    keys = (delta.view(np.uint32) & np.uint32(0x7FFFFFFF)) >> np.uint32(16)
    wanted = int(density * delta.size)
    if wanted == 0:
        return np.zeros_like(delta)
    cut = np.sort(keys)[delta.size - wanted]
    at_cut = keys == cut
    share = (wanted - int((keys > cut).sum())) * 2**32 // int(at_cut.sum())
    lucky = counter_hash(seed, k, offset + np.arange(delta.size, dtype=np.int64)) < share
    keep = (keys > cut) | (at_cut & (np.True_ if edge == "all" else lucky))
    return np.where(keep, delta, np.float32(0))


def counter_hash(seed: int, k: int, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 32 uniform bits for (seed, expert, canonical element index), as int64."""
    mask = np.uint64(0xFFFFFFFF)
    start = (seed & 0xFFFFFFFF) * 0x85EBCA6B ^ (seed >> 32) ^ ((k + 1) * 0x9E3779B9)
    low, high = index.astype(np.uint64) & mask, index.astype(np.uint64) >> np.uint64(32)
    first = _mix(low ^ np.uint64(start & 0xFFFFFFFF))
    return _mix(first ^ ((high + np.uint64(0x9E3779B9)) & mask)).astype(np.int64)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finalize 32 bits held in uint64 (Appleby's fmix32)."""
    mask = np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = value ^ (value >> np.uint64(shift))
        value = (value * np.uint64(factor)) & mask
    return value ^ (value >> np.uint64(16))


def round_to(values: F32, dtype: str) -> npt.NDArray[Any]:
    """Return the bits of ``values`` rounded once, to nearest even."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint64(0x7FC0), rounded).astype(np.uint16)
