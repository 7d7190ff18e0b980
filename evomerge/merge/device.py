"""The merge on a device, in plain torch: the same arithmetic, span by span.

Sources stay on the device as torch tensors. Every step is one float32 operation with its own
rounding, in the order of the CPU kernels, so the results agree bit for bit wherever the device
follows IEEE 754 (tested on the CPU device; marked tests run it on CUDA).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from evomerge.layout import Partition
from evomerge.merge.launch import ballots, hash_keys
from evomerge.merge.plan import KEY_SHIFT, Elect, Plan, Rule, Select, ZeroSum
from evomerge.merge.sources import Sources

_MASK = 0xFFFFFFFF


class DeviceSources:
    """Base and experts as tensors on a device.

    Args:
        sources: memory-mapped weights.
        device: where they go, e.g. ``cuda:0``.
    """

    def __init__(self, sources: Sources, device: torch.device) -> None:
        types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

        def move(bits: npt.NDArray[np.uint16], dtype: str) -> torch.Tensor:
            tensor = torch.from_numpy(np.array(bits)).view(types[dtype])
            return tensor.to(device)

        slots = range(len(sources.layout.slots))
        self.offsets = sources.layout.offsets
        self.rows = [slot.rows for slot in sources.layout.slots]
        self.base = [move(*sources.base(slot)) for slot in slots]
        self.experts = [
            [move(*sources.expert(slot, k)) for k in range(sources.experts)] for slot in slots
        ]


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
        sources: on the same device as the outputs.
        outputs: flat tensor of each slot; its dtype is the one rounding.
        spans: which spans to write [S].
    """
    for number, span in enumerate(cut.spans):
        if not spans[number]:
            continue
        base = sources.base[span.slot]
        width = base.numel() // max(sources.rows[span.slot], 1)
        rows = slice(span.start * width, span.stop * width)
        origin = base[rows].float()
        experts = [expert[rows] for expert in sources.experts[span.slot]]
        if plan.rule is Rule.LINEAR:
            merged = _linear(plan, number, origin, experts)
        else:
            first = sources.offsets[span.slot] + rows.start
            index = torch.arange(first, first + origin.numel(), device=origin.device)
            merged = _changed(plan, number, origin, experts, index)
        outputs[span.slot][rows].copy_(merged)


def _linear(
    plan: Plan, number: int, origin: torch.Tensor, experts: list[torch.Tensor]
) -> torch.Tensor:
    total = origin * float(plan.base[number])
    for k, expert in enumerate(experts):
        weight = float(plan.weights[number, k])
        if weight != 0.0:
            # Two steps, because addcmul may fuse the multiplication and the addition.
            total = total + (expert.float() - origin) * weight
    return total


def _changed(
    plan: Plan, number: int, origin: torch.Tensor, experts: list[torch.Tensor], index: torch.Tensor
) -> torch.Tensor:
    """Return the base plus what the plan's rule makes of the deltas of one span."""
    keys = hash_keys(plan.seed, len(experts))
    active = [k for k in range(len(experts)) if plan.weights[number, k] != 0.0]
    if not active:
        return origin
    deltas = []
    for k in active:
        delta = experts[k].float() - origin
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
    offset = _mix((index >> 32) ^ key)
    return _mix(((index & _MASK) * (key | 1) + offset) & _MASK)


def _mix(value: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = value ^ (value >> shift)
        # int64 wraps modulo 2^64, so the low 32 bits of the product are right.
        value = (value * factor) & _MASK
    return value ^ (value >> 16)
