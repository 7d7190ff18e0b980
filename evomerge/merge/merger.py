"""Turn recipes into bits: the one place where engine, exporter and tests get weights from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import MERGEABLE
from evomerge.errors import RecipeError, suggest
from evomerge.layout import Partition, partition
from evomerge.merge import factor_merge
from evomerge.merge.cells import Cells
from evomerge.merge.factor_sources import factored
from evomerge.merge.launch import Tables, launch
from evomerge.merge.methods import METHODS
from evomerge.merge.methods.lora_factors import LORA_FACTORS
from evomerge.merge.plan import Plan, Rule
from evomerge.merge.sources import Bits, Sources
from evomerge.merge.stats import Stats
from evomerge.models import Models
from evomerge.recipe import Recipe

I64 = npt.NDArray[np.int64]

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
        self.threads = threads
        self._partitions: dict[str, Partition] = {}
        self._work: dict[tuple[str, Cells | None], tuple[I64, I64]] = {}

    @staticmethod
    def of(recipe: Recipe, models: Models, threads: int = 1) -> Merger:
        """Return a merger for one recipe: its experts stay factors where its method takes them.

        Raises:
            ModelError: the method takes adapters of equal form, and they are not.
        """
        return Merger(models_of(recipe, models), threads)

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
        options = [item.name for item in method.options]
        for name, _ in recipe.options:
            if name not in options:
                raise RecipeError(f"options: {method.name} has no {name!r}{suggest(name, options)}")
        if self._models.factored and not method.adapters:
            raise RecipeError(
                f"method: {method.name} needs whole experts, and these are kept as factors "
                "(give a recipe of lora_factors)"
            )
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
        wanted = np.asarray([outputs[span.slot] is not None for span in cut.spans])
        if spans is not None:
            wanted &= spans
        if plan.rule is Rule.FACTORS:
            factor_merge.merge(plan, cut, self.sources, outputs, dtype, wanted, self.threads)
            return
        pieces, owners = self._pieces(spec, plan.cells)
        work = pieces if wanted.all() else pieces[wanted[owners]]
        if len(work):
            self._run(plan, Tables(self.sources, outputs, dtype), work)

    def _pieces(self, spec: str, cells: Cells | None) -> tuple[I64, I64]:
        """Return all pieces of work [N, 5], see ``launch``, and their spans [N]; built once."""
        key = (spec, cells)
        if key not in self._work:
            slots, spans = self.layout.slots, self.partition(spec).spans
            slot = np.asarray([span.slot for span in spans], np.int64)
            inner = np.asarray([one.size // max(one.rows, 1) for one in slots], np.int64)[slot]
            first = np.asarray([span.start for span in spans], np.int64) * inner
            stop = np.asarray([span.stop for span in spans], np.int64) * inner
            index, along = np.arange(len(spans)), np.zeros(len(spans), np.int64)
            owners = index
            if cells is not None:
                owners, row = _repeated((stop - first) // np.maximum(cells.width, 1))
                along = cells.columns.astype(np.int64)[owners]
                index = cells.start[owners] + np.where(along, 0, row)
                first = first[owners] + row * cells.width[owners]
                stop = first + cells.width[owners]
            parts, number = _repeated(-((first - stop) // _WORK))
            at = first[parts] + number * _WORK
            cell = index[parts] + along[parts] * (at - first[parts])
            size = np.minimum(_WORK, stop[parts] - at)
            pieces = np.stack([cell, slot[owners][parts], at, size, along[parts]], axis=1)
            self._work[key] = (np.ascontiguousarray(pieces, np.int64), owners[parts])
        return self._work[key]

    def _run(self, plan: Plan, tables: Tables, work: npt.NDArray[np.int64]) -> None:
        if self.threads == 1 or len(work) == 1:
            launch(plan, tables, work)
            return
        parts = np.array_split(work, min(self.threads * 4, len(work)))
        with ThreadPoolExecutor(self.threads) as threads:
            for done in [threads.submit(launch, plan, tables, part) for part in parts]:
                done.result()


def models_of(recipe: Recipe, models: Models) -> Models:
    """Return models in the form that a recipe's method takes: with experts as factors, or whole.

    Raises:
        ModelError: the method takes adapters of equal form, and they are not.
    """
    method = METHODS.get(recipe.method)
    if method is None or not method.adapters or models.factored:
        return models
    return factored(models)


def alone(models: Models, expert: int | None, dtype: str) -> Recipe:
    """Return one expert as a recipe, or the base where ``expert`` is None."""
    base, experts = models.refs
    return Recipe(
        method=LORA_FACTORS.name if models.factored else "task_arithmetic",
        base=base,
        experts=experts,
        partition="model",
        layout=models.layout.digest,
        columns=tuple(f"weight.{one.name}" for one in experts),
        table=(tuple(float(number == expert) for number in range(len(experts))),),
        dtype=dtype,
    )


def _repeated(counts: I64) -> tuple[I64, I64]:
    """Return each index as often as its count, and how often it came before."""
    index = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return index, np.arange(len(index)) - before[index]
