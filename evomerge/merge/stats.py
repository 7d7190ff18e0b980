"""Statistics of the sources that methods turn into coefficients; each computed once, cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import MERGEABLE
from evomerge.layout import Layout, Span
from evomerge.merge.plan import KEYS, WHOLE
from evomerge.merge.sources import Sources, to_float32

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

#: Elements decoded at a time for Gram matrices: bounds the float64 scratch to 8 MiB per model.
_GRAM_BLOCK = 1 << 20


class Stats:
    """Gram matrices and magnitude histograms of one set of sources.

    Args:
        sources: base and experts.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._grams: dict[tuple[int, int, int], F64] = {}
        self._tails: dict[tuple[int, int], tuple[int, I64]] = {}

    @property
    def layout(self) -> Layout:
        """The slots that the statistics are about."""
        return self._sources.layout

    def gram(self, span: Span) -> F64:
        """Return the inner products of the full weights on one span, in float64.

        Returns:
            [K + 1, K + 1]; row 0 is the base, row k + 1 expert k.
        """
        key = (span.slot, span.start, span.stop)
        if key not in self._grams:
            self._grams[key] = self._gram(span)
        return self._grams[key]

    def _gram(self, span: Span) -> F64:
        slot = self.layout.slots[span.slot]
        width = slot.size // max(slot.rows, 1)
        arrays = [self._sources.base(span.slot)]
        arrays += [self._sources.expert(span.slot, k) for k in range(self._sources.experts)]
        total = np.zeros((len(arrays), len(arrays)))
        for first in range(span.start * width, span.stop * width, _GRAM_BLOCK):
            stop = min(first + _GRAM_BLOCK, span.stop * width)
            block = np.stack([_decode(bits[first:stop], dtype) for bits, dtype in arrays])
            total += block @ block.T
        return total

    def cut(self, slot: int, expert: int, density: float, whole_edge: bool) -> tuple[int, int]:
        """Return where to cut one delta so that ``density`` of its elements stay.

        The histogram is exact, so ``int(density * n)`` elements lie above the cut once the
        share of the edge bin is counted in.

        Args:
            slot: index in the layout.
            expert: k.
            density: fraction to keep, in [0, 1].
            whole_edge: keep all of the edge bin, as references with ``>=`` do.

        Returns:
            The magnitude key at the cut, and the share of that key that stays, times 2^32.
        """
        size = self.layout.slots[slot].size
        wanted = int(density * size)
        if wanted == 0:
            return KEYS, 0
        first, at_least = self._tail(slot, expert)
        # at_least falls with the key; the edge is the largest key with enough at or above it.
        edge = int(np.searchsorted(-at_least, -wanted, side="right")) - 1
        if whole_edge:
            return first + edge, WHOLE
        above = int(at_least[edge + 1]) if edge + 1 < len(at_least) else 0
        within = int(at_least[edge]) - above
        return first + edge, (wanted - above) * WHOLE // within

    def _tail(self, slot: int, expert: int) -> tuple[int, I64]:
        """Return the lowest occupied key, and the number of elements at or above each key."""
        key = (slot, expert)
        if key not in self._tails:
            histogram = self._sources.histogram(slot, expert)
            occupied = np.flatnonzero(histogram)
            first, last = int(occupied[0]), int(occupied[-1])
            tail = np.cumsum(histogram[first : last + 1][::-1])[::-1]
            self._tails[key] = (first, np.ascontiguousarray(tail))
        return self._tails[key]


def _decode(bits: npt.NDArray[Any], dtype: str) -> F64:
    assert dtype in MERGEABLE
    return to_float32(bits, dtype).astype(np.float64)


def cosine(gram: F64, pair: Sequence[int]) -> float | None:
    """Return the cosine between two rows of a Gram matrix, None where one is zero."""
    i, j = pair
    norms = float(np.sqrt(gram[i, i]) * np.sqrt(gram[j, j]))
    return float(np.clip(gram[i, j] / norms, -1.0, 1.0)) if norms > 0.0 else None
