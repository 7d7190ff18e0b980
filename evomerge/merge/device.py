"""The merge on a device, in plain torch: the same arithmetic, piece by piece.

Every step is one float32 operation with its own rounding, in the order of the CPU kernels, so
the results agree bit for bit wherever the device follows IEEE 754 (tested on the CPU device;
marked tests run it on CUDA).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from evomerge.layout import Partition
from evomerge.merge.cells import Cells
from evomerge.merge.device_sources import DeviceSources
from evomerge.merge.factor_merge import product
from evomerge.merge.launch import ballots, hash_keys
from evomerge.merge.plan import (
    HASH_STEP,
    KEY_SHIFT,
    Elect,
    Importances,
    Plan,
    Rule,
    Select,
    ZeroSum,
)

_MASK = 0xFFFFFFFF
#: Elements at a time: bounds what the intermediate results take.
_PIECE = 1 << 24


def merge(
    plan: Plan,
    cut: Partition,
    sources: DeviceSources,
    outputs: Sequence[torch.Tensor],
    spans: npt.NDArray[np.bool_],
) -> None:
    """Write merged weights into flat device tensors, in place.

    Args:
        plan: of a recipe.
        cut: its partition.
        sources: on the same device as the outputs, or brought there.
        outputs: flat tensor of each slot; its dtype is the one rounding.
        spans: which spans to write [S].
    """
    pieces = sources.pieces(cut, _PIECE)
    work = pieces[spans[pieces[:, 0]]]
    for batch in sources.batches(work, needed(plan, work)):
        for piece, (number, slot, first, count) in enumerate(batch.work.tolist()):
            # What has no coefficient is not brought; the base stands in its place, unread.
            models = [k if batch.offsets[piece, k] >= 0 else 0 for k in range(sources.experts + 1)]
            origin, *experts = [batch.values(piece, model) for model in models]
            origin = origin.float()
            if plan.rule is Rule.LINEAR:
                start = cut.spans[number].start * sources.widths[slot]
                merged = _linear(plan, number, origin, experts, first - start)
            else:
                canonical = sources.layout.offsets[slot] + first
                index = torch.arange(canonical, canonical + count, device=origin.device)
                merged = _changed(plan, number, origin, experts, index)
            outputs[slot][first : first + count].copy_(merged)


def merge_factors(
    plan: Plan,
    cut: Partition,
    sources: DeviceSources,
    outputs: Sequence[torch.Tensor],
    spans: npt.NDArray[np.bool_],
) -> None:
    """Write merges of adapters as factors; arguments as in ``merge``.

    The factors are summed on the CPU, where they lie; the product is the device's, one rank
    after the other.
    """
    pieces = sources.pieces(cut, _PIECE)
    work = pieces[spans[pieces[:, 0]]]
    host, sides = sources.on_host, dict[int, tuple[torch.Tensor, torch.Tensor]]()
    with ThreadPoolExecutor(sources.threads) as pool:
        # The sums of later modules are under way while the device works on earlier ones.
        summed = {
            number: pool.submit(product, plan, number, cut.spans[number].slot, host)
            for number in dict.fromkeys(work[:, 0].tolist())
            if plan.weights[number].any()
        }
        for batch in sources.batches(work, np.ones((len(work), 1), np.bool_)):
            for piece, (number, slot, first, count) in enumerate(batch.work.tolist()):
                merged = batch.values(piece, 0).float()
                if number in summed:
                    left, right = summed.pop(number).result()
                    sides = {number: (_to(left, merged), _to(right, merged))}
                if number in sides:
                    scaling = float(np.float32(host.factors.forms[slot].scaling))
                    merged = merged + _rows(*sides[number], first, count) * scaling
                outputs[slot][first : first + count].copy_(merged)


def _rows(left: torch.Tensor, right: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return ``count`` elements of left·right from the flat index ``first`` on."""
    width = right.shape[1]
    row, stop = first // width, -(-(first + count) // width)
    total = torch.zeros((stop - row, width), device=left.device)
    for rank in range(len(right)):
        # Two steps, because addcmul may fuse the multiplication and the addition.
        total += left[row:stop, rank, None] * right[rank]
    return total.view(-1)[first - row * width :][:count]


def _to(array: npt.NDArray[np.float32], beside: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array).to(beside.device)


def needed(plan: Plan, work: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which models each piece of work reads, the base first [N, K + 1]."""
    used = plan.weights != 0
    if plan.cells is not None:
        used = np.stack([plan.cells.any_of(column) for column in used.T], axis=1)
    if plan.joint is not None:
        used = np.ones_like(used)
    return np.concatenate([np.ones((len(work), 1), np.bool_), used[work[:, 0]]], axis=1)


def _linear(
    plan: Plan, number: int, origin: torch.Tensor, experts: list[torch.Tensor], within: int
) -> torch.Tensor:
    if plan.cells is not None:
        return _cellwise(plan, plan.cells, number, origin, experts, within)
    total = origin * float(plan.base[number])
    for k, expert in enumerate(experts):
        weight = float(plan.weights[number, k])
        if weight != 0.0:
            # Two steps, because addcmul may fuse the multiplication and the addition.
            total = total + (expert.float() - origin) * weight
    return total


def _cellwise(
    plan: Plan, cells: Cells, number: int, origin: torch.Tensor, experts: list[torch.Tensor],
    within: int,
) -> torch.Tensor:  # fmt: skip
    """Return the linear merge where rows or columns have their own coefficients.

    ``within`` is the place of the first element in its span.
    """
    width, mine = int(cells.width[number]), slice(*cells.start[number : number + 2])
    place = torch.arange(within, within + origin.numel(), device=origin.device)
    cell = place % width if cells.columns[number] else place // width

    def gains(values: npt.NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.array(values[mine])).to(origin.device)[cell]

    total = origin * gains(plan.base)
    for k, expert in enumerate(experts):
        weight = gains(plan.weights[:, k])
        moved = total + (expert.float() - origin) * weight
        total = torch.where(weight != 0.0, moved, total)
    return total


def _changed(
    plan: Plan, number: int, origin: torch.Tensor, experts: list[torch.Tensor], index: torch.Tensor
) -> torch.Tensor:
    """Return the base plus what the plan's rule makes of the deltas of one span."""
    keys = hash_keys(plan.seed, len(experts))
    active = [k for k in range(len(experts)) if plan.weights[number, k] != 0.0]
    if not active:
        return origin
    stays = _jointly(plan, number, origin, experts, index, int(keys[0]))
    deltas = []
    for k in active:
        delta = experts[k].float() - origin
        if stays is not None:
            delta = torch.where(stays, delta, 0.0)
        if plan.important is not None:
            delta = _important(plan.important, number, delta, index)
        if plan.select is not None:
            delta = _selected(plan.select, number, k, delta, _counter_hash(int(keys[k]), index))
        deltas.append(delta)
    weights = [float(plan.weights[number, k]) for k in active]
    scale = 1.0 if plan.scale is None else float(plan.scale[number])
    local = 0.0 if plan.local is None else float(plan.local[number])
    shares = [0.0 if plan.shares is None else float(plan.shares[number, k]) for k in active]
    if plan.rule is Rule.NEARSWAP:
        size = deltas[0].abs().clamp_min(1e-6)
        total = torch.clamp_max(torch.full_like(size, local) / size, 1.0) * deltas[0]
    elif plan.rule is Rule.RAM:
        total = _ram(deltas, weights, local)
    elif plan.rule is Rule.CONSENSUS:
        total = _consensus(deltas, weights, shares, local)
    elif plan.rule is Rule.SUM:
        total = _sum(deltas, weights)
    else:
        votes = [float(weight) for weight in ballots(plan)[number, active]]
        total = _elected(plan, deltas, weights, votes, shares)
    return origin + total * scale


def _jointly(
    plan: Plan, number: int, origin: torch.Tensor, experts: list[torch.Tensor],
    index: torch.Tensor, hash_key: int,
) -> torch.Tensor | None:  # fmt: skip
    """Return which elements stay for all experts, None where all do; see ``plan.Joint``."""
    if plan.joint is None or plan.joint.low[number] == 0:
        return None
    deltas = [expert.float() - origin for expert in experts]
    mean = _sum(deltas, [1.0] * len(deltas))
    # By a tensor: devices may multiply by the reciprocal of a number instead.
    mean = mean / torch.full_like(mean, float(len(deltas)))
    spread = torch.zeros_like(mean)
    for delta in deltas:
        spread = spread + (delta - mean) * (delta - mean)
    key = (spread.view(torch.int32) & 0x7FFFFFFF) >> KEY_SHIFT
    low, at_low = int(plan.joint.low[number]), int(plan.joint.at_low[number])
    return (key > low) | ((key == low) & (_counter_hash(hash_key, index) <= at_low))


def _important(
    important: Importances, number: int, delta: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Zero what is not important enough."""
    row = (index - int(important.first[number])) // int(important.width[number])
    above, below = int(row[0]), int(row[-1]) + 1
    start = int(important.start[number])
    rows = torch.from_numpy(important.rows[start + above : start + below]).to(delta.device)
    importance = delta.abs().double() * rows[row - above].double()
    return torch.where(importance >= float(important.low[number]), delta, 0.0)


def _selected(
    select: Select, number: int, k: int, delta: torch.Tensor, hashed: torch.Tensor
) -> torch.Tensor:
    """Return the delta where it stays, else zero."""
    key = (delta.view(torch.int32) & 0x7FFFFFFF) >> KEY_SHIFT
    zero = torch.zeros_like(delta)
    curves = select.curves
    if curves is not None:
        start, length = int(curves.start[number, k]), int(curves.length[number, k])
        part = slice(start, start + length)
        at = (key - int(curves.first[number, k])).clamp(0, length - 1).long()
        passing = torch.from_numpy(curves.passing[part].astype("int64")).to(delta.device)
        gain = torch.from_numpy(curves.gain[part]).to(delta.device)
        return torch.where(hashed <= passing[at], delta * gain[at], zero)
    low, high = int(select.low[number, k]), int(select.high[number, k])
    limit = torch.full_like(hashed, int(select.inside[number, k]))
    limit = torch.where(key == high, int(select.at_high[number, k]), limit)
    limit = torch.where(key == low, int(select.at_low[number, k]), limit)
    return torch.where((key >= low) & (key <= high) & (hashed <= limit), delta, zero)


def _sum(deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + delta * weight
    return total


def _ram(deltas: list[torch.Tensor], weights: list[float], epsilon: float) -> torch.Tensor:
    total, changed = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        active = delta.abs() > epsilon
        total = total + torch.where(active, delta * weight, 0.0)
        changed = changed + active.float()
    return total / changed.clamp_min(1.0)


def _consensus(
    deltas: list[torch.Tensor], weights: list[float], masks: list[float], votes: float
) -> torch.Tensor:
    merged = _sum(deltas, weights)
    claims = torch.zeros_like(merged)
    for delta, mask in zip(deltas, masks, strict=True):
        claims = claims + (delta.abs() > (merged - delta).abs() * mask).float()
    return torch.where(claims >= votes, merged, 0.0)


def _elected(
    plan: Plan, deltas: list[torch.Tensor], weights: list[float], votes: list[float],
    shares: list[float],
) -> torch.Tensor:  # fmt: skip
    zero = torch.zeros_like(deltas[0])
    counted = [delta * weight for delta, weight in zip(deltas, votes, strict=True)]
    vote = zero
    for ballot in counted:
        vote = vote + (torch.sign(ballot) if plan.elect is Elect.COUNT else ballot)
    total, divisor = zero, zero
    for delta, ballot, weight, share in zip(deltas, counted, weights, shares, strict=True):
        agrees = (ballot != 0) & ((ballot > 0) == (vote >= 0))
        total = total + torch.where(agrees, delta * weight, zero)
        divisor = divisor + torch.where(agrees, torch.full_like(zero, share), zero)
    total = total / torch.where(divisor != 0, divisor, 1.0)
    return total if plan.zero_sum is ZeroSum.PLUS else torch.where(vote == 0, zero, total)


def _counter_hash(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return 32 uniform bits per index, in int64 (torch has no unsigned arithmetic)."""
    value = ((index & _MASK) * HASH_STEP + _mix(index >> 32)) & _MASK
    value = value ^ (value >> 16)
    value = (value * 0x85EBCA6B) & _MASK
    value = value ^ (value >> 13)
    return ((value ^ key) * (key | 1)) & _MASK


def _mix(value: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = value ^ (value >> shift)
        # int64 wraps modulo 2^64, so the low 32 bits of the product are right.
        value = (value * factor) & _MASK
    return value ^ (value >> 16)
