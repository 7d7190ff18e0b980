"""Statistics of paired item scores: exact and corrected tests, and the bootstrap."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evomerge.fitness.aggregate import Aggregate
from evomerge.trial import Direction, Objective

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Share of the bootstrap that an interval holds.
LEVEL = 0.95
#: Enough that an end of an interval is known to about a sixtieth of the interval's width.
DRAWS = 2000
#: Draws made at a time: keeps the indices of a thousand items below 4 MB.
_CHUNK = 500


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values [n] corrected so that any false alarm among them is as rare as said.

    The smallest is multiplied by n, the next by n - 1, and none becomes smaller than one before
    it (Holm 1979).
    """
    order = sorted(range(len(values)), key=lambda row: values[row])
    corrected, floor = [0.0] * len(values), 0.0
    for place, row in enumerate(order):
        floor = max(floor, min(1.0, values[row] * (len(values) - place)))
        corrected[row] = floor
    return corrected


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p-value of McNemar's exact test on the numbers of flips."""
    if better + worse == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse, 0.5).pvalue)


def t_test(difference: float, error: float, items: int) -> float | None:
    """Return the two-sided p-value of Student's t; None where all differences are equal."""
    if items < 2 or error == 0:
        return None
    from scipy.stats import t

    return float(2 * t.sf(abs(difference) / error, items - 1))


def interval(samples: NDArray[np.float64]) -> tuple[float, float]:
    """Return the middle share ``LEVEL`` of bootstrapped values [draws]."""
    import numpy as np

    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Resampling:
    """How often each item is drawn when items are drawn again, the same for the same items.

    Objectives with the same items share their draws, so that the mean over objectives keeps what
    they have in common.

    Args:
        draws: how many times.
    """

    def __init__(self, draws: int) -> None:
        self.draws = draws
        self._counts: dict[tuple[str, ...], NDArray[np.uint16]] = {}

    def sums(self, ids: tuple[str, ...], values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums of rows of values [v, I] over the items drawn [v, draws]."""
        import numpy as np

        if ids not in self._counts:
            self._counts[ids] = self._draw(ids)
        counts = self._counts[ids]
        chunks = range(0, self.draws, _CHUNK)
        parts = [counts[start : start + _CHUNK].astype(np.float64) @ values.T for start in chunks]
        return np.concatenate(parts).T

    def _draw(self, ids: tuple[str, ...]) -> NDArray[np.uint16]:
        """Return counts [draws, I]; their seed is made of the ids."""
        import numpy as np

        rng, size = np.random.default_rng(zlib.crc32("\n".join(ids).encode())), len(ids)
        parts = []
        for start in range(0, self.draws, _CHUNK):
            rows = min(_CHUNK, self.draws - start)
            drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
            counted = np.bincount(drawn.ravel(), minlength=rows * size)
            parts.append(counted.reshape(rows, size).astype(np.uint16))
        return np.concatenate(parts)


def bootstrap(
    objective: Objective,
    aggregate: Aggregate,
    ids: Sequence[str],
    mine: Sequence[float],
    other: Sequence[float],
    resampling: Resampling,
) -> NDArray[np.float64]:
    """Return the difference in value for items drawn again [draws]; positive is better.

    The items of each stratum are drawn from that stratum.
    """
    import numpy as np

    strata: dict[str, list[int]] = {}
    for place, item in enumerate(ids):
        strata.setdefault(aggregate.strata[item] if aggregate.strata else "", []).append(place)
    weights = np.array([aggregate.weights[item] if aggregate.weights else 1.0 for item in ids])
    rows = np.array([weights, np.array(mine) * weights, np.array(other) * weights])  # [3, I]
    total = np.zeros(resampling.draws)
    for places in strata.values():
        units, ours, theirs = resampling.sums(tuple(ids[p] for p in places), rows[:, places])
        total += _linked(aggregate, ours / units) - _linked(aggregate, theirs / units)
    sign = 1.0 if objective.direction is Direction.MAXIMIZE else -1.0
    return sign * total / len(strata)


def _linked(aggregate: Aggregate, means: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    if aggregate.link == "exp":
        return np.exp(means)
    return means / math.log(2) if aggregate.link == "bits" else means
