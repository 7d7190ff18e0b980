"""The factors of a repository of LoRA adapters, read where they lie and summed for a candidate.

    A_m = Σ_k β_k·S(A_k; α_k)        B_m = Σ_k β_k·B_k

See ``factors`` for the formulas. No adapter is ever folded: what a worker keeps beside the base
are the adapters' own files, memory-mapped, which workers of one machine share. Sums run over the
adapters upwards, in float32; those with β = 0 are left out.

Axes: ``N`` adapters, ``r`` rank.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import ITEM_BYTES, MERGEABLE, Checkpoint, TensorEntry, to_float32
from evomerge.errors import ModelError, StorageError
from evomerge.file_map import map_file
from evomerge.models import Models

Bits = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

#: The bits of a float without its sign.
_MAGNITUDE: dict[str, np.unsignedinteger[Any]] = {
    "F32": np.uint32(0x7FFFFFFF), "F16": np.uint16(0x7FFF), "BF16": np.uint16(0x7FFF),
}  # fmt: skip
#: Summed up at a time: a multiple of 8.
_CHECKED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Form:
    """What the factors of one slot are like, in all adapters.

    Attributes:
        rank: r.
        rows, columns: of the module: B is [rows, r], A is [r, columns].
        scaling: s.
        transposed: the slot is stored as [columns, rows].
    """

    rank: int
    rows: int
    columns: int
    scaling: float
    transposed: bool


Forms = dict[str, Form]


def forms_of(models: Models, expert: int) -> Forms:
    """Return the form of an adapter's factors by slot; empty for a checkpoint."""
    return _forms(models.experts[expert])


def _forms(expert: Checkpoint) -> Forms:
    return {
        slot: Form(fold.a.shape[0], fold.b.shape[0], fold.a.shape[1], fold.scaling, fold.transposed)
        for slot, fold in sorted(expert.folds.items())
    }


def factored(models: Models, where: str = "models.experts") -> Models:
    """Return models whose experts are merged as factors.

    Args:
        models: opened and compared.
        where: dotted path for messages.

    Raises:
        ModelError: every expert whose factors cannot be added to the others', one line each.
    """
    problems = list(factor_problems(models.base, models.experts, where))
    if problems:
        raise ModelError("\n".join(problems))
    return replace(models, factored=True)


def factor_problems(
    base: Checkpoint, experts: Sequence[Checkpoint], where: str = "models.experts"
) -> Iterator[str]:
    """Yield what is no plain adapter, or is unlike most of the adapters."""
    forms = [_forms(expert) for expert in experts]
    # Most of them decide what is odd; of equally many the first.
    counts = Counter(tuple(one.items()) for one in forms if one)
    usual: Forms = dict(counts.most_common(1)[0][0]) if counts else {}
    first = next((e.name for e, one in zip(experts, forms, strict=True) if one == usual), "")
    for expert, found in zip(experts, forms, strict=True):
        path = f"{where}.{expert.name}"
        if not found:
            yield (
                f"{path}: is no LoRA adapter, and lora_factors merges nothing else (leave it out, "
                "or merge by task_arithmetic, which takes both)"
            )
            continue
        whole = [
            name
            for name, entry in expert.tensors.items()
            if name not in found and entry != base.tensors.get(name)
        ]
        if whole:
            yield (
                f"{path}: saves {', '.join(whole[:3])} whole (modules_to_save), which are no "
                "factors (leave it out, or merge by task_arithmetic)"
            )
        difference = _difference(found, usual, first)
        if difference:
            yield (
                f"{path}: {difference} (factors can only be added where modules, rank and scaling "
                "are equal)"
            )


def _difference(found: Forms, usual: Forms, first: str) -> str:
    """Return what tells an adapter from ``first``, one of the usual; empty where nothing does."""
    other = sorted(set(found) ^ set(usual))
    if other:
        mine, theirs = ("changes", "does not") if other[0] in found else ("does not change", "does")
        count = f"; {len(other)} modules differ" if len(other) > 1 else ""
        return f"{mine} {other[0]}, {first} {theirs}{count}"
    for slot, form in found.items():
        if form.rank != usual[slot].rank:
            return f"{slot} has rank {form.rank}, {usual[slot].rank} in {first}"
        if form.scaling != usual[slot].scaling:
            return f"{slot} has scaling {form.scaling:g}, {usual[slot].scaling:g} in {first}"
        if form.transposed != usual[slot].transposed:
            return f"{slot} is read the other way round than in {first} (fan_in_fan_out)"
    return ""


def factor_bytes(models: Models, which: str = "ab") -> int:
    """Return the bytes of the factors of all experts, as stored; ``a``, ``b`` or both."""
    return sum(
        (entry.stop - entry.start)
        for expert in models.experts
        for fold in expert.folds.values()
        for name, entry in (("a", fold.a), ("b", fold.b))
        if name in which
    )


class FactorSources:
    """The factors of all experts of some models.

    Args:
        models: whose experts are adapters of equal form.

    Raises:
        ModelError: they are not, see ``factored``.
    """

    def __init__(self, models: Models) -> None:
        if not models.factored:
            models = factored(models)
        self._models = models
        self._names = {slot.name: number for number, slot in enumerate(models.layout.slots)}
        #: Form of each slot that the adapters change.
        self.forms: Mapping[int, Form] = {
            self._names[name]: form for name, form in forms_of(models, 0).items()
        }
        self._files: list[Bits] = [map_file(self._path(k)) for k in range(self.count)]
        self._tables: dict[tuple[int, str], tuple[npt.NDArray[np.int64], ...]] = {}
        self._magnitudes: Bits | None = None
        self._places: dict[tuple[int, int], int] = {}

    @property
    def count(self) -> int:
        """N."""
        return len(self._models.experts)

    def entry(self, slot: int, k: int, factor: str) -> TensorEntry:
        """Return where a factor of expert k lies; ``factor`` is ``A`` or ``B``."""
        fold = self._models.experts[k].folds[self._models.layout.slots[slot].name]
        return fold.a if factor == "A" else fold.b

    def bits(self, slot: int, k: int, factor: str) -> Bits:
        """Return a factor as stored, flat and read-only."""
        entry = self.entry(slot, k, factor)
        return self._files[k][entry.start : entry.stop].view(MERGEABLE[entry.dtype])

    def _path(self, k: int) -> Path:
        return self.entry(next(iter(self.forms)), k, "A").shard

    def hold(self) -> None:
        """Read all factors into memory of this process; see ``Sources.hold``."""
        self._files = [np.array(file) for file in self._files]
        self._tables.clear()

    def checksums(self) -> list[int]:
        """Return the sum of the bits of every adapter's file, modulo 2^64."""
        return [_bit_sum(file) for file in self._files]

    def require_finite(self) -> None:
        """Refuse factors that are NaN or infinite.

        Raises:
            ModelError: names every such tensor.
        """
        from evomerge.merge import kernels

        problems = []
        for k, expert in enumerate(self._models.experts):
            for slot in self.forms:
                for factor in "AB":
                    bits, code = self.bits(slot, k, factor), self.entry(slot, k, factor).dtype
                    bad = kernels.count_not_finite(
                        int(bits.ctypes.data), kernels.CODES[code], bits.size, kernels.HALF
                    )
                    if bad:
                        name = self._models.layout.slots[slot].name
                        problems.append(
                            f"{expert.name}: {bad} values of {factor} of {name} are not finite"
                        )
        if problems:
            raise ModelError("\n".join(problems) + "\n(the adapter is damaged: save it again)")

    def cuts(self, slot: int, densities: npt.NDArray[np.float64]) -> F32:
        """Return the smallest |A| that stays in each adapter [N].

        round(α·n) of n entries stay, at least one for α > 0, none for α = 0; all that equal the
        last one stay with it, as in the published code.

        Args:
            slot: one of ``forms``.
            densities: α [N], in [0, 1].
        """
        form = self.forms[slot]
        size = form.rank * form.columns
        kept = np.maximum(np.rint(densities * size).astype(np.int64), 1)
        cuts = np.where(densities == 0.0, np.float32(np.inf), np.float32(0.0)).astype(np.float32)
        for k in np.flatnonzero((densities > 0.0) & (kept < size)):
            dtype = self.entry(slot, int(k), "A").dtype
            bits = self._sorted_magnitudes(slot, int(k))
            place = size - int(kept[k])
            cuts[k] = to_float32(bits[place : place + 1].view(MERGEABLE[dtype]), dtype)[0]
        return cuts

    def _sorted_magnitudes(self, slot: int, k: int) -> Bits:
        """Return the bits of |A| of an adapter, ascending; all are sorted once.

        They lie in one unnamed temporary file, so that their pages can leave memory.
        """
        if self._magnitudes is None:
            try:
                with tempfile.TemporaryFile() as file:
                    for place in self.forms:
                        for adapter in range(self.count):
                            self._places[place, adapter] = file.tell()
                            file.write(self._sorted(place, adapter).data.cast("B"))
                    file.flush()
                    self._magnitudes = np.memmap(file, np.uint8, "r")
            except OSError as error:
                raise StorageError(
                    f"{tempfile.gettempdir()}: the sorted magnitudes of the adapters do not fit: "
                    f"{error.strerror} (free some space, or set TMPDIR to another disk)"
                ) from error
        entry = self.entry(slot, k, "A")
        start = self._places[slot, k]
        raw = self._magnitudes[start : start + entry.stop - entry.start]
        return raw.view(_MAGNITUDE[entry.dtype].dtype)

    def _sorted(self, slot: int, k: int) -> Bits:
        """Return the bits of |A| of an adapter, ascending.

        Bit patterns of floats without their sign are in the order of the floats.
        """
        mask = _MAGNITUDE[self.entry(slot, k, "A").dtype]
        return np.sort(self.bits(slot, k, "A").view(mask.dtype) & mask)

    def merged(self, slot: int, weights: F32, cuts: F32) -> tuple[F32, F32]:
        """Return A_m [r, columns] and B_m [rows, r] of one slot.

        Args:
            slot: one of ``forms``.
            weights: β [N].
            cuts: smallest |A| that stays [N].
        """
        form = self.forms[slot]
        a = self._sum(slot, "A", weights, cuts).reshape(form.rank, form.columns)
        b = self._sum(slot, "B", weights, np.zeros_like(cuts)).reshape(form.rows, form.rank)
        return a, b

    def _sum(self, slot: int, factor: str, weights: F32, cuts: F32) -> F32:
        from evomerge.merge import kernels

        addresses, codes = self._table(slot, factor)
        form = self.forms[slot]
        total = np.zeros(form.rank * (form.columns if factor == "A" else form.rows), np.float32)
        kernels.sum_factors(addresses, codes, weights, cuts, kernels.HALF, total)
        return total

    def _table(self, slot: int, factor: str) -> tuple[npt.NDArray[np.int64], ...]:
        """Return addresses and dtype codes of one factor in all adapters [N]."""
        from evomerge.merge import kernels

        key = (slot, factor)
        if key not in self._tables:
            where = [int(self.bits(slot, k, factor).ctypes.data) for k in range(self.count)]
            codes = [kernels.CODES[self.entry(slot, k, factor).dtype] for k in range(self.count)]
            self._tables[key] = np.asarray(where, np.int64), np.asarray(codes, np.int64)
        return self._tables[key]


def sides(form: Form, a: F32, b: F32) -> tuple[F32, F32]:
    """Return [slot rows, r] and [r, slot columns], whose product is the change over s."""
    left, right = (a.T, b.T) if form.transposed else (b, a)
    return np.ascontiguousarray(left), np.ascontiguousarray(right)


def _bit_sum(raw: Bits) -> int:
    whole = len(raw) // 8 * 8
    total = int(raw[whole:].sum(dtype=np.uint64))
    for first in range(0, whole, _CHECKED_BYTES):
        part = raw[first : min(first + _CHECKED_BYTES, whole)]
        total += int(part.view(np.uint64).sum(dtype=np.uint64))
    return total % 2**64


def stored_bytes(models: Models) -> int:
    """Return the bytes of what merges are made of: base and experts, or base and factors."""
    whole = 0
    for model in (models.base, *(() if models.factored else models.experts)):
        for slot in models.layout.slots:
            entry = model.tensors.get(slot.name)
            whole += slot.size * ITEM_BYTES[entry.dtype if entry is not None else slot.dtype]
    return whole + (factor_bytes(models) if models.factored else 0)
