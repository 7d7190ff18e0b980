"""How many tokens fit into one forward pass, found once per worker by memory.

On a device a small and a larger pass are run and their peaks measured. What a pass takes beyond
the weights is nearly linear in its tokens, so a line through both says how many fit into the free
memory. Workers that share a device divide all of its memory, not what is free: they ask at the
same time, or before the others have loaded anything. On a CPU larger passes gain nothing; the size
is fixed, less where memory is short.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.hot.likelihood import LOGITS
from evomerge.fitness.hot.trie import Row
from evomerge.memory import available_bytes

_LOG = logging.getLogger(__name__)

#: Tokens of a forward pass on a CPU.
CPU_TOKENS = 4096
#: Largest pass on a device: beyond it nothing gets faster.
DEVICE_TOKENS = 1 << 17
#: Smallest pass.
LEAST_TOKENS = 64
#: Share of the free memory that a pass may take. Generation holds keys and values of the tokens
#: to come beside those of the prompt, and memory is cut into pieces as sizes change.
SHARE = 0.5
#: Tokens of the probe's passes, and of each of their rows.
PROBE = (1024, 4096)
PROBE_ROW = 256
#: Logits are there in the model's dtype, as their log-softmax and as a copy on the way.
_LOGIT_COPIES = 3


class Meter(Protocol):
    """Measures memory in bytes."""

    def free(self) -> int:
        """Return what a pass could still take."""
        ...

    def total(self) -> int:
        """Return what the device has, taken or not."""
        ...

    def taken(self) -> int:
        """Return what this process has taken."""
        ...

    def peak(self, work: Callable[[], None]) -> int:
        """Do some work and return what it took at most, beyond what was taken before."""
        ...


class CudaMeter:
    """The memory of a CUDA device.

    Args:
        device: which one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """Return what the driver and torch's own pool have left."""
        free, _ = torch.cuda.mem_get_info(self._device)
        pooled = torch.cuda.memory_reserved(self._device)
        return int(free) + pooled - torch.cuda.memory_allocated(self._device)

    def total(self) -> int:
        """Return what the device has, taken or not."""
        return int(torch.cuda.mem_get_info(self._device)[1])

    def taken(self) -> int:
        """Return what this process has taken."""
        return int(torch.cuda.memory_allocated(self._device))

    def peak(self, work: Callable[[], None]) -> int:
        """Do some work and return what it took at most, beyond what was taken before."""
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


@dataclass(frozen=True, slots=True)
class Line:
    """What a pass takes: ``fixed + slope · tokens`` bytes."""

    fixed: float
    slope: float

    @staticmethod
    def through(small: tuple[int, int], large: tuple[int, int]) -> Line:
        """Return the line through two passes (tokens, bytes); never one that falls."""
        slope = max((large[1] - small[1]) / (large[0] - small[0]), 0.0)
        return Line(max(small[1] - slope * small[0], 0.0), slope)

    def tokens(self, room: float, most: int) -> int:
        """Return how many tokens fit, a power of two between ``LEAST_TOKENS`` and ``most``.

        Powers of two, so that workers with a little more or less memory agree.
        """
        left = room - self.fixed
        if left <= 0:
            return LEAST_TOKENS
        fitting = most if left > self.slope * most else int(left / self.slope)
        return max(LEAST_TOKENS, (1 << fitting.bit_length()) >> 1)


def device_tokens(forward: Forward, meter: Meter, share: float = 1.0) -> int:
    """Return the tokens of a pass on a device, by two passes of the live model.

    Where even the larger probe does not fit, it is the half of what did.

    Args:
        forward: of the model.
        meter: of the device's memory.
        share: of the device that belongs to this process, weights included.
    """
    model = forward.model
    free = meter.free()
    if share < 1.0:
        free = min(free, int(share * meter.total()) - meter.taken())
    width = model.get_input_embeddings().weight.shape[0]
    logits = _LOGIT_COPIES * (LOGITS // width) * width * model.dtype.itemsize
    peaks = []
    for tokens in PROBE:
        try:
            peaks.append((tokens, meter.peak(lambda size=tokens: _pass(forward, size))))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return max(LEAST_TOKENS, (peaks[-1][0] if peaks else PROBE[0] // 4) // 2)
    line = Line.through(*peaks)
    found = line.tokens(SHARE * free - logits, DEVICE_TOKENS)
    _LOG.info(
        "batches of %d tokens: a pass takes %.1f KB per token, %.1f GB are free",
        found, line.slope / 1e3, free / 1e9,
    )  # fmt: skip
    return found


def cpu_tokens(forward: Forward, available: int | None = None) -> int:
    """Return the tokens of a pass on a CPU: ``CPU_TOKENS``, less where memory is short.

    A pass takes at most one layer's activations, which is some tens of the hidden size, keys and
    values of all layers, and the logits.

    Args:
        forward: of the model.
        available: bytes that programs can still have; asked of the system where None.
    """
    room = available_bytes() if available is None else available
    if room is None:
        return CPU_TOKENS
    config = forward.model.config.get_text_config(decoder=True)
    width, size = forward.model.get_input_embeddings().weight.shape
    item = max(forward.model.dtype.itemsize, 4)  # half precision is computed in fp32 in places
    slope = item * size * (32 + 2 * int(getattr(config, "num_hidden_layers", 0)))
    logits = _LOGIT_COPIES * min(LOGITS, CPU_TOKENS * width) * item
    return Line(float(logits), float(slope)).tokens(SHARE * room, CPU_TOKENS)


def found_tokens(forward: Forward, share: float = 1.0) -> int:
    """Return the tokens of a pass on the device of the model.

    Args:
        forward: of the model.
        share: of a GPU that belongs to this process.
    """
    if forward.device.type == "cpu":
        return cpu_tokens(forward)
    return device_tokens(forward, CudaMeter(forward.device), share)


def _pass(forward: Forward, tokens: int) -> None:
    """Run rows of about ``tokens`` tokens in all, with the logits of their last positions."""
    longest = int(getattr(forward.model.config, "max_position_embeddings", PROBE_ROW) or PROBE_ROW)
    length = min(PROBE_ROW, longest)
    places = np.arange(length, dtype=np.int64)
    ids = tuple([1] * length)
    last = np.array([length - 1], dtype=np.int64)
    rows = [
        Row(np.array(ids, dtype=np.int64), places, None, ((number, last),))
        for number in range(max(1, tokens // length))
    ]
    forward.logits(rows)
