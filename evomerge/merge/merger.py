"""Turn recipes into bits: the one place where engine, exporter and tests get weights from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import MERGEABLE
from evomerge.errors import RecipeError, suggest
from evomerge.layout import Partition, partition
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Elect, Plan, ZeroSum
from evomerge.merge.sources import Bits, Sources, address
from evomerge.merge.stats import Stats
from evomerge.models import Models
from evomerge.recipe import Recipe

#: Elements per piece of work: small enough to balance threads, large enough to be one stream.
_WORK = 1 << 18


class Merger:
    """Plans recipes over one set of models and writes the merged bits wherever asked.

    Args:
        models: validated and compared.
        threads: CPU threads; the result does not depend on it.
    """

    def __init__(self, models: Models, threads: int = 1) -> None:
        self.sources = Sources(models)
        self.stats = Stats(self.sources)
        self.layout = models.layout
        self._models = models
        self._threads = threads
        self._partitions: dict[str, Partition] = {}

    def partition(self, spec: str) -> Partition:
        """Return a partition of the layout, built once."""
        if spec not in self._partitions:
            self._partitions[spec] = partition(self.layout, spec)
        return self._partitions[spec]

    def plan(self, recipe: Recipe) -> Plan:
        """Return the numbers that the kernels need for a recipe.

        Raises:
            RecipeError: made for other models, or malformed.
        """
        self._require_same_models(recipe)
        if recipe.method not in METHODS:
            raise RecipeError(f"method: unknown {recipe.method!r}{suggest(recipe.method, METHODS)}")
        method = METHODS[recipe.method]
        low, high = method.experts
        count = len(recipe.experts)
        if count < low or (high is not None and count > high):
            raise RecipeError(f"method: {method.name} takes {low} to {high} experts, got {count}")
        return method.plan(recipe, self.partition(recipe.partition), self.stats)

    def _require_same_models(self, recipe: Recipe) -> None:
        base, experts = self._models.refs
        ours = [base.fingerprint, *(expert.fingerprint for expert in experts)]
        theirs = [recipe.base.fingerprint, *(expert.fingerprint for expert in recipe.experts)]
        if ours != theirs:
            raise RecipeError(
                "recipe: made for other weights than these models have "
                "(give the models that the recipe names, in its order)"
            )
        if recipe.layout != self.layout.digest:
            raise RecipeError("recipe: made for another layout than these models have")
        if recipe.dtype not in MERGEABLE:
            raise RecipeError(f"dtype: unknown {recipe.dtype!r}{suggest(recipe.dtype, MERGEABLE)}")

    def merge(
        self,
        plan: Plan,
        spec: str,
        outputs: Sequence[Bits | None],
        dtype: str,
        spans: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Write merged bits.

        Args:
            plan: of a recipe.
            spec: its partition.
            outputs: one flat array of bits per slot, None for slots that are not wanted.
            dtype: safetensors name of the outputs' dtype.
            spans: which spans to write [S]; all where None.
        """
        cut = self.partition(spec)
        chosen = [
            number
            for number, span in enumerate(cut.spans)
            if outputs[span.slot] is not None and (spans is None or spans[number])
        ]
        work = self._work(cut, chosen)
        if len(work):
            self._run(plan, _Tables(self.sources, cut, outputs, dtype), work)

    def _work(self, cut: Partition, chosen: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return pieces (span, first element, elements) [N, 3]."""
        pieces: list[tuple[int, int, int]] = []
        for number in chosen:
            span = cut.spans[number]
            slot = self.layout.slots[span.slot]
            width = slot.size // max(slot.rows, 1)
            first, stop = span.start * width, span.stop * width
            pieces.extend((number, at, min(_WORK, stop - at)) for at in range(first, stop, _WORK))
        return np.asarray(pieces, np.int64).reshape(-1, 3)

    def _run(self, plan: Plan, tables: _Tables, work: npt.NDArray[np.int64]) -> None:
        if self._threads == 1 or len(work) == 1:
            _launch(plan, tables, work)
            return
        parts = np.array_split(work, min(self._threads * 4, len(work)))
        with ThreadPoolExecutor(self._threads) as threads:
            for done in [threads.submit(_launch, plan, tables, part) for part in parts]:
                done.result()


class _Tables:
    """Addresses and dtype codes per span, as the kernels take them."""

    def __init__(
        self, sources: Sources, cut: Partition, outputs: Sequence[Bits | None], dtype: str
    ) -> None:
        from evomerge.merge.kernels import CODES

        spans, experts = len(cut.spans), sources.experts
        self.out = np.zeros(spans, np.int64)
        self.out_code = np.full(spans, CODES[dtype], np.int64)
        self.base = np.zeros(spans, np.int64)
        self.base_code = np.zeros(spans, np.int64)
        self.experts = np.zeros((spans, experts), np.int64)
        self.codes = np.zeros((spans, experts), np.int64)
        self.canonical = np.asarray([sources.layout.offsets[span.slot] for span in cut.spans])
        self._keep: list[npt.NDArray[Any]] = []  # the arrays must outlive their addresses
        for number, span in enumerate(cut.spans):
            output = outputs[span.slot]
            if output is None:
                continue
            bits, code = sources.base(span.slot)
            self.out[number], self.base[number] = address(output), address(bits)
            self.base_code[number] = CODES[code]
            self._keep += [output, bits]
            for k in range(experts):
                bits, code = sources.expert(span.slot, k)
                self.experts[number, k], self.codes[number, k] = address(bits), CODES[code]
                self._keep.append(bits)


def hash_keys(seed: int, experts: int) -> npt.NDArray[np.uint32]:
    """Return the key of each expert's counter hash [K], from the recipe's seed."""
    mask = 0xFFFFFFFF
    keys = [
        ((seed & mask) * 0x85EBCA6B ^ (seed >> 32) ^ ((k + 1) * 0x9E3779B9)) & mask
        for k in range(experts)
    ]
    return np.asarray(keys, np.uint32)


def _launch(plan: Plan, tables: _Tables, work: npt.NDArray[np.int64]) -> None:
    """Run one kernel over some pieces of work."""
    from evomerge.merge import kernels

    if plan.elect is Elect.NONE:
        kernels.merge_linear(
            work, tables.out, tables.out_code, tables.base, tables.base_code,
            tables.experts, tables.codes, plan.base, plan.weights, kernels.HALF,
        )  # fmt: skip
        return
    kernels.merge_elected(
        work, tables.out, tables.out_code, tables.base, tables.base_code,
        tables.experts, tables.codes, plan.weights, plan.scale, plan.edge, plan.share,
        hash_keys(plan.seed, plan.weights.shape[1]), tables.canonical,
        int(plan.elect), int(plan.divisor), plan.zero_sum is ZeroSum.PLUS, kernels.HALF,
    )  # fmt: skip
