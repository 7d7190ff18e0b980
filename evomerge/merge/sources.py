"""The resident bits of base and experts, by slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import Checkpoint
from evomerge.errors import ModelError
from evomerge.layout import Layout
from evomerge.merge.plan import KEYS
from evomerge.models import Models

Bits = npt.NDArray[Any]


def to_float32(bits: Bits, dtype: str) -> npt.NDArray[np.float32]:
    """Return the values of raw bits; float32 passes through unchanged.

    Args:
        bits: float32 values, or uint16 patterns of F16 or BF16.
        dtype: safetensors name.
    """
    if dtype == "F32":
        return np.asarray(bits, dtype=np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


class Sources:
    """Memory-mapped weights of one study's models.

    Processes on one machine share the pages of the same files, so several workers need the
    memory of one.

    Args:
        models: validated and compared.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.layout: Layout = models.layout
        self._maps: dict[tuple[str, int], Bits] = {}

    @property
    def experts(self) -> int:
        """K."""
        return len(self.models.experts)

    def base(self, slot: int) -> tuple[Bits, str]:
        """Return the bits and dtype of the base's slot."""
        return self._get(self.models.base, slot)

    def expert(self, slot: int, k: int) -> tuple[Bits, str]:
        """Return the bits and dtype of expert k's slot."""
        return self._get(self.models.experts[k], slot)

    def _get(self, checkpoint: Checkpoint, slot: int) -> tuple[Bits, str]:
        name = self.layout.slots[slot].name
        key = (checkpoint.name, slot)
        if key not in self._maps:
            self._maps[key] = checkpoint.read(name)
        return self._maps[key], checkpoint.tensors[name].dtype

    def histogram(self, slot: int, k: int) -> npt.NDArray[np.int64]:
        """Return the counts of the magnitude keys of expert k's delta [KEYS]."""
        from evomerge.merge import kernels

        histogram = np.zeros(KEYS, np.int64)
        base, base_dtype = self.base(slot)
        expert, dtype = self.expert(slot, k)
        kernels.count_keys(
            address(base), kernels.CODES[base_dtype], address(expert), kernels.CODES[dtype],
            base.size, kernels.HALF, histogram,
        )  # fmt: skip
        return histogram

    def require_finite(self) -> None:
        """Read every source once and refuse weights that are NaN or infinite.

        Raises:
            ModelError: names every such tensor.
        """
        from evomerge.merge import kernels

        problems = []
        for checkpoint in (self.models.base, *self.models.experts):
            for number, slot in enumerate(self.layout.slots):
                bits, dtype = self._get(checkpoint, number)
                bad = kernels.count_not_finite(
                    address(bits), kernels.CODES[dtype], bits.size, kernels.HALF
                )
                if bad:
                    problems.append(
                        f"{checkpoint.name}: {bad} values of {slot.name} are not finite"
                    )
        if problems:
            raise ModelError("\n".join(problems) + "\n(the checkpoint is damaged: save it again)")


def address(bits: Bits) -> int:
    """Return where the data of a contiguous array lies."""
    assert bits.flags.c_contiguous
    return int(bits.ctypes.data)
