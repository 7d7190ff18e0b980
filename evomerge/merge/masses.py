"""How much the experts changed each part of a model: what ``importance(n)`` divides blocks by."""

from __future__ import annotations

import numpy as np

from evomerge.errors import ModelError
from evomerge.layout import partition
from evomerge.merge.sources import Sources, to_float32

#: Elements decoded at a time: the scratch stays in the cache, whatever the size of a tensor.
_BLOCK = 1 << 16


def task_vector_masses(sources: Sources) -> dict[str, float]:
    """Return Σ_k |W_k - W_base|₁ of each block of the ``layer`` partition, by its label.

    Expert Merging++ (operators.md B7) with all first-stage coefficients equal. Reads all weights
    of all models once; the sums are the same on every machine.

    Raises:
        ModelError: a weight is not finite.
    """
    cut = partition(sources.layout, "layer")
    masses = dict.fromkeys(cut.blocks, 0.0)
    for span in cut.spans:
        for k in range(sources.experts):
            mass = _mass(sources, span.slot, k)
            if not np.isfinite(mass):
                raise ModelError(
                    f"{sources.models.experts[k].name}: values of "
                    f"{sources.layout.slots[span.slot].name} are not finite, here or in the base "
                    "(the checkpoint is damaged: save it again)"
                )
            masses[cut.blocks[span.block]] += mass
    return masses


def _mass(sources: Sources, slot: int, k: int) -> float:
    """Return the sum of the magnitudes of one delta."""
    (base, base_dtype), (expert, dtype) = sources.base(slot), sources.expert(slot, k)
    total = 0.0
    for first in range(0, base.size, _BLOCK):
        piece = slice(first, first + _BLOCK)
        with np.errstate(invalid="ignore"):  # inf - inf; the caller says where
            delta = to_float32(expert[piece], dtype).astype(np.float64) - to_float32(
                base[piece], base_dtype
            )
        total += float(np.abs(delta).sum())
    return total
