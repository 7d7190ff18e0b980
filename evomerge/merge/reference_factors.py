"""The NumPy twin of ``lora_factors``: whole matrices, full sorts, one rank after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import to_float32
from evomerge.merge.reference import Row, round_to
from evomerge.models import Models
from evomerge.recipe import Recipe

F32 = npt.NDArray[np.float32]


def merge_slot(recipe: Recipe, models: Models, slot: int) -> npt.NDArray[Any]:
    """Return the merged bits of one slot, flat, in the recipe's dtype.

    Args:
        recipe: of method ``lora_factors``.
        models: whose experts are adapters of equal form.
        slot: index in the layout.
    """
    row = Row(recipe, 0)
    name = models.layout.slots[slot].name
    entry = models.base.tensors[name]
    base = to_float32(entry.read(), entry.dtype).reshape(entry.shape)
    weights = [np.float32(weight) for weight in row.each("weight")]
    folds = [expert.folds.get(name) for expert in models.experts]
    a, b = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    for fold, weight, density in zip(folds, weights, row.each("density"), strict=True):
        if fold is not None and weight != 0:
            a = a + weight * _trimmed(fold.a.values(), density)
            b = b + weight * fold.b.values()
    if folds[0] is None or not any(weights):
        return round_to(base.reshape(-1), recipe.dtype)
    product = np.zeros((len(b), a.shape[1]), np.float32)
    for rank in range(len(a)):
        product = product + b[:, rank, None] * a[rank]
    product = product * np.float32(folds[0].scaling)
    merged = base + (product.T if folds[0].transposed else product)
    return round_to(np.ascontiguousarray(merged).reshape(-1), recipe.dtype)


def _trimmed(a: F32, density: float) -> F32:
    """Keep the largest magnitudes, and all that equal the smallest of them."""
    count = max(round(density * a.size), 1) if density > 0 else 0
    order = np.sort(np.abs(a), axis=None)[::-1]
    stays = np.abs(a) >= order[count - 1] if count else np.zeros(a.shape, np.bool_)
    return np.where(stays, a, np.float32(0.0))
