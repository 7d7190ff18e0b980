"""Watches the weights that a worker keeps in memory for days.

Memory fails, and so do programs that share it. A worker never loads its models again, and writes
only those spans of the live model whose numbers changed, so one wrong byte would stay in every
score from then on. Of the live model a part is compared after every scoring, another part each
time; now and then the whole live model is made anew and compared, and the sources against what
they summed to when they were loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: The live model is compared in so many parts, one after the other.
PARTS = 100
#: Bytes of a part at most, so that large models do not wait for it.
PART_BYTES = 16 << 20
#: After so many merges everything is compared.
FULL_EVERY = 100


class Guard:
    """Remembers what the weights were.

    Args:
        model: whose parameters are watched.
        sources: sums up what merges are made of; see ``Engine.checksum``.
        full_every: merges between two complete checks.
    """

    def __init__(
        self, model: torch.nn.Module, sources: Callable[[], int], full_every: int = FULL_EVERY
    ) -> None:
        self._tensors = [one.detach() for one in model.parameters()]
        total = sum(one.numel() * one.element_size() for one in self._tensors)
        self._share = min(1.0 / PARTS, PART_BYTES / max(1, total))
        self._sources = sources
        self._full_every = full_every
        self._loaded = sources()
        self._merges = 0
        self._part = 0
        self._digest = b""

    def mark(self) -> None:
        """Remember the next part of the weights as they are now, after a merge."""
        self._merges += 1
        self._part = (self._part + 1) % int(1 / self._share)
        self._digest = self._sample()

    def intact(self) -> bool:
        """Return whether the part that was remembered last is still what it was."""
        return not self._digest or self._sample() == self._digest

    def full_due(self) -> bool:
        """Return whether it is time to compare everything."""
        return self._merges % self._full_every == self._full_every - 1

    def sources_intact(self) -> bool:
        """Return whether base and experts still sum to what they did."""
        return self._sources() == self._loaded

    def total(self) -> tuple[int, ...]:
        """Return a sum over the bits of every parameter, on the device where it lies."""
        return tuple(bit_sum(one) for one in self._tensors)

    def _sample(self) -> bytes:
        import torch

        digest = blake2b(digest_size=16)
        for one in self._tensors:
            flat = one.contiguous().view(-1)
            size = -(-flat.numel() * self._share // 1)
            first = int(self._part * self._share * flat.numel())
            part = flat[first : first + int(size)]
            digest.update(part.view(torch.uint8).cpu().numpy().tobytes())
        return digest.digest()


def bit_sum(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's bits as integers, modulo 2^64; any one changed bit shows."""
    import torch

    raw = tensor.contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // 8 * 8
    if raw.data_ptr() % 8:
        whole = 0
    total = int(raw[whole:].sum(dtype=torch.int64))
    if whole:
        total += int(raw[:whole].view(torch.int64).sum())
    return total % 2**64
