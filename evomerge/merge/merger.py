"""Turn recipes into bits: the one place where engine, exporter and tests get weights from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import MERGEABLE
from evomerge.errors import RecipeError, suggest
from evomerge.layout import Partition, partition
from evomerge.merge.launch import Tables, launch
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Plan
from evomerge.merge.sources import Bits, Sources
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
        self._work: dict[str, npt.NDArray[np.int64]] = {}

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
        wanted = np.asarray([outputs[span.slot] is not None for span in cut.spans])
        if spans is not None:
            wanted &= spans
        pieces = self._pieces(spec)
        work = pieces[wanted[pieces[:, 0]]]
        if len(work):
            self._run(plan, Tables(self.sources, outputs, dtype), work)

    def _pieces(self, spec: str) -> npt.NDArray[np.int64]:
        """Return all pieces of work of a partition, built once: see ``launch`` [N, 4]."""
        if spec not in self._work:
            pieces: list[tuple[int, int, int, int]] = []
            for number, span in enumerate(self.partition(spec).spans):
                slot = self.layout.slots[span.slot]
                width = slot.size // max(slot.rows, 1)
                first, stop = span.start * width, span.stop * width
                pieces.extend(
                    (number, span.slot, at, min(_WORK, stop - at))
                    for at in range(first, stop, _WORK)
                )
            self._work[spec] = np.asarray(pieces, np.int64).reshape(-1, 4)
        return self._work[spec]

    def _run(self, plan: Plan, tables: Tables, work: npt.NDArray[np.int64]) -> None:
        if self._threads == 1 or len(work) == 1:
            launch(plan, tables, work)
            return
        parts = np.array_split(work, min(self._threads * 4, len(work)))
        with ThreadPoolExecutor(self._threads) as threads:
            for done in [threads.submit(launch, plan, tables, part) for part in parts]:
                done.result()
