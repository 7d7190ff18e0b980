"""The merge on a device, in plain torch: the same arithmetic, span by span.

Sources stay on the device as torch tensors. Every step is one float32 operation with its own
rounding, in the order of the CPU kernels, so the results agree bit for bit wherever the device
follows IEEE 754 (tested on the CPU device; marked tests run it on CUDA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evomerge.layout import Partition
from evomerge.merge.merger import hash_keys
from evomerge.merge.plan import KEY_SHIFT, Divisor, Elect, Plan, ZeroSum
from evomerge.merge.sources import Sources

if TYPE_CHECKING:
    import torch

_MASK = 0xFFFFFFFF


class DeviceSources:
    """Base and experts as tensors on a device.

    Args:
        sources: memory-mapped weights.
        device: where they go, e.g. ``cuda:0``.
    """

    def __init__(self, sources: Sources, device: torch.device) -> None:
        import torch

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
        if plan.elect is Elect.NONE:
            merged = _linear(plan, number, origin, experts)
        else:
            merged = _elected(plan, number, origin, experts, sources.offsets[span.slot], rows)
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


def _elected(
    plan: Plan,
    number: int,
    origin: torch.Tensor,
    experts: list[torch.Tensor],
    offset: int,
    rows: slice,
) -> torch.Tensor:
    import torch

    assert plan.edge is not None and plan.share is not None and plan.scale is not None
    keys = hash_keys(plan.seed, len(experts))
    zero = torch.zeros_like(origin)
    vote, values, ballots = zero, [], []
    for k, expert in enumerate(experts):
        weight = float(plan.weights[number, k])
        if weight == 0.0:
            continue
        delta = expert.float() - origin
        magnitude = (delta.view(torch.int32) & 0x7FFFFFFF) >> KEY_SHIFT
        cut = int(plan.edge[number, k])
        index = torch.arange(offset + rows.start, offset + rows.stop, device=origin.device)
        lucky = _counter_hash(int(keys[k]), index) < int(plan.share[number, k])
        delta = torch.where((magnitude > cut) | ((magnitude == cut) & lucky), delta, zero)
        value = delta * weight
        ballot = delta if plan.elect is Elect.UNWEIGHTED else value
        vote = vote + (torch.sign(ballot) if plan.elect is Elect.COUNT else ballot)
        values.append((value, weight))
        ballots.append(ballot)
    total, weights, kept = zero, zero, zero
    for (value, weight), ballot in zip(values, ballots, strict=True):
        agrees = (ballot != 0) & ((ballot > 0) == (vote >= 0))
        total = total + torch.where(agrees, value, zero)
        weights = weights + torch.where(agrees, torch.full_like(zero, weight), zero)
        kept = kept + agrees.float()
    if plan.divisor is not Divisor.ONE:
        divisor = weights if plan.divisor is Divisor.WEIGHT else kept
        total = torch.where(divisor != 0, total / divisor, total)
    if plan.zero_sum is ZeroSum.DROP:
        total = torch.where(vote == 0, zero, total)
    return origin + total * float(plan.scale[number])


def _counter_hash(key: int, index: torch.Tensor) -> torch.Tensor:
    """Return 32 uniform bits per index, in int64 (torch has no unsigned arithmetic)."""
    first = _mix((index & _MASK) ^ key)
    return _mix(first ^ (((index >> 32) + 0x9E3779B9) & _MASK))


def _mix(value: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = value ^ (value >> shift)
        # int64 wraps modulo 2^64, so the low 32 bits of the product are right.
        value = (value * factor) & _MASK
    return value ^ (value >> 16)
