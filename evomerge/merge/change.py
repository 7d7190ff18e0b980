"""How far a merge is from the base: by its coefficients, or by its weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from evomerge.errors import EvaluationError
from evomerge.merge.binding import TORCH_DTYPES, bind
from evomerge.merge.merger import Merger
from evomerge.merge.plan import Rule
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    import torch

#: Elements that are compared at a time: float32 copies of both take 128 MiB.
_ELEMENTS = 1 << 24


def coefficient_norm(merger: Merger, recipe: Recipe) -> float:
    """Return the mean over all weights of |c0 - 1| + Σ_k |scale·c_k|.

    c0 is the coefficient of the base where the merge is linear and c_k that of expert k's task
    vector, so that the base has 0, an expert 1, and every block counts by its size: a finer
    partition with equal coefficients has the same norm. Of adapters merged as factors it is
    Σ_k |β_k|, although the weights change with the square of β.

    Args:
        merger: over the study's models.
        recipe: of the merge.
    """
    plan = merger.plan(recipe)
    spans = merger.partition(recipe.partition).spans
    if plan.rule is Rule.FACTORS:  # of whole adapters: every slot has them, or none
        return float(np.abs(plan.weights.astype(np.float64)).max(axis=0).sum())
    slots = merger.layout.slots
    sizes = np.asarray(
        [
            (span.stop - span.start)
            * slots[span.slot].size
            / max((*slots[span.slot].shape, 1)[0], 1)
            for span in spans
        ]
    )
    norm = np.abs(plan.weights.astype(np.float64)).sum(axis=1)
    if plan.cells is not None:
        # A cell is a part of its span that is as large as the others.
        cells = np.diff(plan.cells.start)
        sizes = np.repeat(sizes / np.maximum(cells, 1), cells)
    elif plan.scale is not None:
        norm *= np.abs(plan.scale.astype(np.float64))
    if plan.rule is Rule.LINEAR:
        norm += np.abs(plan.base.astype(np.float64) - 1.0)
    return float((norm * sizes).sum() / sizes.sum())


class Change:
    """Compares a live model with the base, tensor by tensor.

    The base's weights are read from where they are mapped; that is one pass over them.

    Args:
        merger: over the study's models.
        model: of the base's architecture.
    """

    def __init__(self, merger: Merger, model: torch.nn.Module) -> None:
        self._sources = merger.sources
        self._slots = merger.layout.slots
        self._binding = bind(self._slots, model)

    def relative(self) -> float:
        """Return ||W - W0|| / ||W0|| over all weights, W as the model holds them now.

        Raises:
            EvaluationError: it is not a number.
        """
        import torch

        apart = whole = 0.0
        with torch.inference_mode():
            for number, slot in enumerate(self._slots):
                bits, dtype = self._sources.base(number)
                flat = np.asarray(bits).reshape(-1)
                width = slot.size // slot.shape[0] if slot.shape else 1
                for piece in self._binding.pieces[number]:
                    view = piece.view if slot.shape else piece.view.reshape(1)
                    rows = max(_ELEMENTS // max(width, 1), 1)
                    for start in range(0, len(view), rows):
                        mine = view[start : start + rows].reshape(-1)
                        first = (piece.start + start) * width if slot.shape else 0
                        # A copy: torch does not share memory that is mapped read-only.
                        stored = torch.from_numpy(flat[first : first + mine.numel()].copy())
                        stored = stored.view(getattr(torch, TORCH_DTYPES[dtype])).to(mine.device)
                        base = stored.float()
                        apart += float((mine.float() - base).square().sum(dtype=torch.float64))
                        whole += float(base.square().sum(dtype=torch.float64))
        value = math.sqrt(apart / whole) if whole else math.inf
        if not math.isfinite(value):
            raise EvaluationError(f"distance from the base: {value} is not a number")
        return value
