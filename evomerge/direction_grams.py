"""Inner products of what a space's columns multiply: what crossover on an arc needs."""

from __future__ import annotations

import numpy as np

from evomerge.layout import partition
from evomerge.merge.sources import Sources
from evomerge.merge.stats import Stats
from evomerge.models import Models
from evomerge.space import Space

#: B, C and C again.
Grams = tuple[tuple[tuple[float, ...], ...], ...]

_DEFAULT_NORMALIZE = {"linear": True, "task_arithmetic": False}


def direction_grams(space: Space, models: Models) -> Grams:
    """Return the inner products in each block [B][C][C], in float64; reads all weights once.

    Of full weights where the method is ``linear``, of task vectors where it is
    ``task_arithmetic``. Other spaces have none, nor have those that divide by the sum of the
    weights or search anything but the weight of every expert: then a sum of two merges is not
    the merge of the summed coefficients.
    """
    method, options = space.method
    columns = [column for column, block in space.groups if block == space.blocks[0]]
    linear = method in _DEFAULT_NORMALIZE
    # A searched option is not False either: then not every merge is linear in its coefficients.
    linear = linear and options.get("normalize", _DEFAULT_NORMALIZE[method]) is False
    if not linear or columns != [f"weight.{expert.name}" for expert in models.experts]:
        return ()
    stats = Stats(Sources(models))
    of_span = stats.gram if method == "linear" else stats.direction_gram
    grams = np.zeros((len(space.blocks), len(columns), len(columns)))
    for span in partition(models.layout, space.partition).spans:
        grams[span.block] += of_span(span)[1:, 1:]  # row 0 is the base
    return tuple(tuple(map(tuple, block)) for block in grams.tolist())
