"""Where a surrogate is measured first: warm points and a scrambled Sobol sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: scipy tabulates Sobol direction numbers up to here; beyond, points are uniform.
_SOBOL_DIMENSIONS = 21_201

#: Two points closer than this in every coordinate are one measurement: a range of two in a
#: coefficient resolves to 2e-3, below what a merge's score shows.
SAME = 1e-3

#: Coordinates that are compared first.
_GLANCE = 16


def sobol(count: int, dimension: int, generator: np.random.Generator) -> Array:
    """Return ``count`` points [count, d] of a scrambled Sobol sequence (Owen 1998)."""
    if dimension > _SOBOL_DIMENSIONS:
        return generator.random((count, dimension))
    from scipy.stats import qmc

    engine = qmc.Sobol(dimension, scramble=True, rng=generator)
    # Whole powers of two are what the sequence is balanced for; scipy warns of others.
    power = max(int(np.ceil(np.log2(max(count, 1)))), 0)
    return np.asarray(engine.random_base2(power)[:count], dtype=np.float64)


def novel(points: Array, known: Array) -> NDArray[np.bool_]:
    """Return which of ``points`` [c, d] differ from all ``known`` [n, d] and earlier points."""
    keep = np.ones(len(points), dtype=bool)
    for row, point in enumerate(points):
        keep[row] = not any(_meets(point, other) for other in (known, points[:row][keep[:row]]))
    return keep


def _meets(point: Array, others: Array) -> bool:
    """Return whether ``point`` [d] is the same as one of ``others`` [n, d]."""
    # Most differ in the first coordinates already; the rest is not looked at then.
    near = np.abs(others[:, :_GLANCE] - point[:_GLANCE]).max(axis=1, initial=0.0) < SAME
    return bool((np.abs(others[near] - point).max(axis=1, initial=0.0) < SAME).any())


def nearest_failed(points: Array, good: Array, failed: Array) -> NDArray[np.bool_]:
    """Return which of ``points`` [c, d] lie nearer to a failed point than to any good one."""
    if not len(failed):
        return np.zeros(len(points), dtype=bool)
    if not len(good):
        return np.ones(len(points), dtype=bool)
    return _nearest(points, failed) < _nearest(points, good)


def _nearest(points: Array, others: Array) -> Array:
    """Return the squared distance [c] from each of ``points`` [c, d] to the nearest other."""
    products = points @ others.T  # [c, n]
    squares = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None, :]
    return np.asarray((squares - 2.0 * products).min(axis=1))
