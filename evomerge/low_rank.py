"""The change that a LoRA adapter makes to one slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from evomerge.checkpoint import TensorEntry

F32 = npt.NDArray[np.float32]

#: Elements of one block of rows: block, product and factor stay within the second-level cache.
_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one slot.

    Attributes:
        base: the slot's weights in the base [out, in], or [in, out] where transposed.
        a: A [r, in].
        b: B [out, r].
        scaling: s, in float64; rounded once to float32.
        transposed: the slot is stored as [in, out] (GPT-2's Conv1D, ``fan_in_fan_out``).
        module: what the adapter calls the module; the base's name may lack a prefix of it.
    """

    base: TensorEntry
    a: TensorEntry
    b: TensorEntry
    scaling: float
    transposed: bool
    module: str

    def fold(self) -> F32:
        """Return W0 + s·(B·A), flat, laid out as the slot [rows x columns]."""
        origin = self.base.values()
        a, b = self.a.values(), self.b.values()
        left, right = (a.T, b.T) if self.transposed else (b, a)  # [rows, r], [r, columns]
        right = np.ascontiguousarray(right)
        folded = np.empty(origin.shape, np.float32)
        step = max(_BLOCK // max(origin.shape[1], 1), 1)
        for first in range(0, len(origin), step):
            rows = slice(first, first + step)
            total = np.zeros(folded[rows].shape, np.float32)
            product = np.empty_like(total)
            for rank in range(len(right)):
                np.multiply(left[rows, rank, None], right[rank], out=product)
                total += product
            total *= np.float32(self.scaling)
            np.add(origin[rows], total, out=folded[rows])
        return folded.reshape(-1)
