"""Dimensions that are not continuous: points moved to the middle of their bins.

Every searcher sees the unit box. Where a dimension has levels, what differs within a bin is the
same merge, so only the middle is ever asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.space import Kind

Array = NDArray[np.float64]


def snap(points: Array, kinds: Sequence[Kind]) -> Array:
    """Return points [..., d] of the unit box with their levels' middles; reals stay as they are.

    Args:
        points: anywhere; clipped to the box where a dimension has levels.
        kinds: of each dimension [d], or none where all are real.
    """
    if not kinds:
        return points
    levels = np.array([kind.levels for kind in kinds])  # [d]
    several = np.maximum(levels, 1)
    number = np.clip(np.floor(points * several), 0, several - 1)
    return np.where(levels > 0, (number + 0.5) / several, points)
