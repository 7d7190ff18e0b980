"""The resident bits of base and experts, by slot."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import Checkpoint
from evomerge.checkpoint import to_float32 as to_float32
from evomerge.errors import ModelError, StorageError
from evomerge.layout import Layout
from evomerge.merge.factor_sources import FactorSources
from evomerge.merge.plan import KEYS
from evomerge.models import Models

Bits = npt.NDArray[Any]

#: Summed up at a time: a multiple of 8.
_CHECKED_BYTES = 64 << 20


class Sources:
    """Memory-mapped weights of one study's models.

    Processes on one machine share the pages of the same files, so several workers need the
    memory of one. What an adapter changes is folded when it is first asked for, and kept in one
    unnamed temporary file, so that its pages can leave memory like those of a checkpoint; that
    file needs four bytes per changed element in the temporary directory.
    Experts that are merged as factors are never folded: they are in ``factors``.

    Args:
        models: validated and compared.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.layout: Layout = models.layout
        experts = () if models.factored else models.experts
        self._checkpoints: tuple[Checkpoint, ...] = (models.base, *experts)
        #: By the model's place (the base is first) and slot; names are the user's.
        self._maps: dict[tuple[int, int], Bits] = {}
        self._spill: Spill | None = None

    @property
    def experts(self) -> int:
        """K; 0 where the experts are merged as factors."""
        return len(self._checkpoints) - 1

    @cached_property
    def factors(self) -> FactorSources:
        """The factors of the experts.

        Raises:
            ModelError: they are no adapters of equal form.
        """
        return FactorSources(self.models)

    def base(self, slot: int) -> tuple[Bits, str]:
        """Return the bits and dtype of the base's slot."""
        return self._get(0, slot)

    def expert(self, slot: int, k: int) -> tuple[Bits, str]:
        """Return the bits and dtype of expert k's slot."""
        return self._get(1 + k, slot)

    def _get(self, model: int, slot: int) -> tuple[Bits, str]:
        checkpoint = self._checkpoints[model]
        name = self.layout.slots[slot].name
        key = (model, slot)
        if key not in self._maps:
            bits = checkpoint.read(name)
            self._maps[key] = self._spilled(key, bits) if name in checkpoint.folds else bits
        return self._maps[key], checkpoint.tensors[name].dtype

    def _spilled(self, key: tuple[int, int], bits: Bits) -> Bits:
        if self._spill is None:
            slots = self.layout.slots
            self._spill = Spill(
                {
                    (model, number): 4 * slot.size
                    for model, checkpoint in enumerate(self._checkpoints)
                    for number, slot in enumerate(slots)
                    if slot.name in checkpoint.folds
                }
            )
        return self._spill.keep(key, bits)

    def hold(self) -> None:
        """Read every source into memory of this process.

        Memory-mapped pages leave memory when other programs need it, and the next merge waits
        for the disk; these stay.
        """
        for model in range(self.experts + 1):
            for slot in range(len(self.layout.slots)):
                bits, _ = self._get(model, slot)
                self._maps[model, slot] = np.array(bits)
        self._spill = None
        if self.models.factored:
            self.factors.hold()

    def checksums(self) -> list[int]:
        """Return the sum of the bits of every slot of every model, modulo 2^64."""
        sums = []
        for model in range(self.experts + 1):
            for slot in range(len(self.layout.slots)):
                bits, _ = self._get(model, slot)
                raw = bits.reshape(-1).view(np.uint8)
                whole = len(raw) // 8 * 8
                total = int(raw[whole:].sum(dtype=np.uint64))
                for first in range(0, whole, _CHECKED_BYTES):
                    part = raw[first : min(first + _CHECKED_BYTES, whole)]
                    total += int(part.view(np.uint64).sum(dtype=np.uint64))
                sums.append(total % 2**64)
        return [*sums, *(self.factors.checksums() if self.models.factored else ())]

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
        for model, checkpoint in enumerate(self._checkpoints):
            for number, slot in enumerate(self.layout.slots):
                bits, dtype = self._get(model, number)
                bad = kernels.count_not_finite(
                    address(bits), kernels.CODES[dtype], bits.size, kernels.HALF
                )
                if bad:
                    problems.append(
                        f"{checkpoint.name}: {bad} values of {slot.name} are not finite"
                    )
        if problems:
            raise ModelError("\n".join(problems) + "\n(the checkpoint is damaged: save it again)")
        if self.models.factored:
            self.factors.require_finite()


class Spill:
    """Folded tensors in one file that nobody sees, and one map of it.

    Args:
        sizes: bytes of each tensor, by the model's place and slot.

    Raises:
        StorageError: the file cannot be made.
    """

    def __init__(self, sizes: Mapping[tuple[int, int], int]) -> None:
        ends = np.cumsum(list(sizes.values())).tolist()
        self._starts = dict(zip(sizes, [0, *ends], strict=False))
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - as long as the map
            weakref.finalize(self, self._file.close)
            self._file.truncate(max(ends[-1], 1))  # space is taken where something is written
        except OSError as error:
            raise self._full(error) from error
        self._bytes: Bits = np.memmap(self._file, np.uint8, "r")

    def keep(self, key: tuple[int, int], bits: Bits) -> Bits:
        """Write a tensor and return the same content, read-only.

        Raises:
            StorageError: the disk is full.
        """
        if bits.size == 0:
            return bits
        start, left = self._starts[key], bits.data.cast("B")
        stop = start + len(left)
        try:
            while len(left):  # the system takes 2 GiB at a time
                left = left[os.pwrite(self._file.fileno(), left, stop - len(left)) :]
        except OSError as error:
            raise self._full(error) from error
        return self._bytes[start:stop].view(bits.dtype)

    @staticmethod
    def _full(error: OSError) -> StorageError:
        return StorageError(
            f"{tempfile.gettempdir()}: a folded adapter does not fit: {error.strerror} "
            "(free some space, or set TMPDIR to another disk)"
        )


def address(bits: Bits) -> int:
    """Return where the data of a contiguous array lies."""
    assert bits.flags.c_contiguous
    return int(bits.ctypes.data)
