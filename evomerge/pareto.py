"""Pareto mathematics: fronts, hypervolume, and picking members of a front.

Every loss is minimised. Points are rows of ``losses`` [n, m]; answers are row numbers, so that
the caller knows which trial is meant. Normalised losses run from 0 (best on the front) to 1
(worst on the front) in every objective; an objective that is constant on the front is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# Distances in normalised losses closer than this are equal. Float noise of the normalisation
# is about 1e-16; real differences of scores over N items are 1/N or more.
_TIE = 1e-9

# Weight of the sum in the augmented Chebyshev function: small enough to keep the Chebyshev
# order, large enough against float noise.
_AUGMENTATION = 1e-3

# Reference of hypervolume contributions in normalised losses: at 1 itself the extreme members
# would contribute nothing (Ishibuchi et al. 2018 discuss the choice).
_BEHIND = 1.1


def nondominated(losses: ArrayLike) -> tuple[int, ...]:
    """Return the rows [<= n] that no other row dominates, ascending.

    A row dominates another when it is nowhere worse and somewhere better. Equal rows do not
    dominate each other and all stay: they are different merges of the same quality.

    Args:
        losses: [n, m], finite; n may be 0.

    Raises:
        ValueError: wrong shape, or not finite.
    """
    matrix = _matrix(losses)
    if len(matrix) == 0:
        return ()
    import moocore

    mask = moocore.is_nondominated(matrix, keep_weakly=True)
    return tuple(np.flatnonzero(mask).tolist())


def ranked(losses: ArrayLike) -> tuple[int, ...]:
    """Return all rows [n] from best to worst: by fronts, and within one the lonely first.

    The sorting of NSGA-II (Deb et al. 2002): rows that nothing dominates come first, then those
    that only they dominate, and so on. Within a front the order is that of the crowding distance;
    the best of each objective are the loneliest. Of equals the earlier row comes first.

    Args:
        losses: [n, m], finite; n may be 0.

    Raises:
        ValueError: wrong shape, or not finite.
    """
    matrix = _matrix(losses)
    if len(matrix) == 0:
        return ()
    if matrix.shape[1] == 1:
        return tuple(np.argsort(matrix[:, 0], kind="stable").tolist())
    import moocore

    ranks = moocore.pareto_rank(matrix)  # [n]
    lonely = np.empty(len(matrix))
    for rank in np.unique(ranks):
        rows = np.flatnonzero(ranks == rank)
        lonely[rows] = _crowding(matrix[rows])
    return tuple(np.lexsort((np.arange(len(matrix)), -lonely, ranks)).tolist())


def _crowding(front: Matrix) -> Vector:
    """Return the crowding distance of each member of a front [f]; infinite at its ends."""
    distance = np.zeros(len(front))
    for column in front.T / 2:  # halved, so that a range of huge losses does not overflow
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if width > 0 and len(order) > 2:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return distance


def hypervolume(losses: ArrayLike, reference: Sequence[float]) -> float:
    """Return the volume between the front and ``reference``, exact (moocore).

    Points that are not better than the reference in every objective add nothing.

    Args:
        losses: [n, m], finite; n may be 0.
        reference: [m], finite; fix it for a whole study, else values cannot be compared.

    Raises:
        ValueError: wrong shape, or not finite.
    """
    matrix, corner = _matrix(losses), np.asarray(reference, dtype=np.float64)
    if corner.ndim != 1 or not np.isfinite(corner).all():
        raise ValueError(f"reference: expected finite values [m], got {reference!r}")
    if matrix.shape[1] not in (0, len(corner)):
        raise ValueError(f"losses: expected [n, {len(corner)}], got {list(matrix.shape)}")
    inside = matrix[(matrix < corner).all(axis=1)] if len(matrix) else matrix
    if len(inside) == 0:
        return 0.0
    import moocore

    return float(moocore.hypervolume(inside, ref=corner))


def knee(losses: ArrayLike) -> int:
    """Return the row where the front bends most: the best compromise without weights.

    It is the member farthest below the hyperplane through the best member of each objective,
    in normalised losses (Das 1999). Among equals, e.g. on a straight front or one of two
    points, it is the most balanced one (smallest worst loss, then smallest sum, then first).

    Args:
        losses: [n, m], finite, n >= 1; dominated rows are never chosen.

    Raises:
        ValueError: no rows, wrong shape, or not finite.
    """
    front, normal = _normalised_front(losses)
    plane = _extreme_plane(normal)
    depth = (1.0 - normal @ plane) / float(np.linalg.norm(plane))  # [f]
    tied = np.flatnonzero(depth >= depth.max() - _TIE)
    return front[_most_balanced(normal, tied)]


def pick(losses: ArrayLike, weights: Sequence[float]) -> int:
    """Return the row that serves the weights best: augmented Chebyshev (Steuer & Choo 1983).

    It minimises ``max_j w_j z_j + rho sum_j z_j`` in normalised losses z. Unlike a weighted
    sum it can reach members in dents of the front, and it never picks a dominated row.

    Args:
        losses: [n, m], finite, n >= 1.
        weights: importance of each objective [m], >= 0, not all 0; the scale is irrelevant.

    Raises:
        ValueError: no rows, wrong shape, not finite, or invalid weights.
    """
    front, normal = _normalised_front(losses)
    importance = np.asarray(weights, dtype=np.float64)
    if importance.shape != (normal.shape[1],):
        raise ValueError(f"weights: expected [{normal.shape[1]}], got {list(importance.shape)}")
    if not np.isfinite(importance).all() or (importance < 0).any() or importance.sum() == 0:
        raise ValueError(f"weights: expected finite values >= 0, not all 0, got {list(weights)}")
    weighted = normal * (importance / importance.sum())  # [f, m]
    value = weighted.max(axis=1) + _AUGMENTATION * normal.sum(axis=1)
    return front[int(np.argmin(value))]


def contributions(losses: ArrayLike) -> tuple[tuple[int, ...], Vector]:
    """Return the rows of the front [f] and the hypervolume that only each of them covers [f].

    In normalised losses, up to a reference a tenth of the front's range behind its worst value
    in every objective, so that the best members of an objective count too. Equal members share
    what is theirs: each has the contribution of one of them.

    Args:
        losses: [n, m], finite, n >= 1.

    Raises:
        ValueError: no rows, wrong shape, or not finite.
    """
    front, normal = _normalised_front(losses)
    if normal.shape[1] == 1:  # the front is one value
        return front, np.full(len(front), _BEHIND)
    members, places = np.unique(normal, axis=0, return_inverse=True)
    import moocore

    alone = moocore.hv_contributions(members, ref=np.full(members.shape[1], _BEHIND))
    volumes: Vector = np.asarray(alone, dtype=np.float64)[places.reshape(-1)]
    return front, volumes


def most_volume(losses: ArrayLike) -> int:
    """Return the row without which the front would lose most hypervolume, see ``contributions``.

    The first of equals, up to float noise.

    Args:
        losses: [n, m], finite, n >= 1; dominated rows are never chosen.

    Raises:
        ValueError: no rows, wrong shape, or not finite.
    """
    front, volumes = contributions(losses)
    return front[int(np.flatnonzero(volumes >= volumes.max() - _TIE)[0])]


def spread(losses: ArrayLike, k: int) -> tuple[int, ...]:
    """Return at most ``k`` members of the front that represent it well, ascending.

    The best member of each objective is kept when ``k`` allows; then the member farthest from
    all kept ones is added (Gonzalez 1985), so that the largest gap is at most twice the
    smallest possible. ``k`` = 1 gives the knee. Equal members come last.

    Args:
        losses: [n, m], finite; n may be 0.
        k: number of members, >= 1.

    Raises:
        ValueError: ``k`` below 1, wrong shape, or not finite.
    """
    if k < 1:
        raise ValueError(f"spread: expected k >= 1, got {k}")
    if len(_matrix(losses)) == 0:
        return ()
    if k == 1:
        return (knee(losses),)
    front, normal = _normalised_front(losses)
    if len(front) <= k:
        return front
    kept = _extremes(normal)
    kept = kept if len(kept) <= k else kept[:1]
    gap = np.min([_distances(normal, one) for one in kept], axis=0)  # [f]
    gap[list(kept)] = -1.0  # never again, even when all others are equal to a kept one
    while len(kept) < k:
        farthest = int(np.argmax(gap))
        kept = (*kept, farthest)
        gap = np.minimum(gap, _distances(normal, farthest))
        gap[farthest] = -1.0
    return tuple(sorted(front[one] for one in kept))


def _matrix(losses: ArrayLike) -> Matrix:
    """Return ``losses`` as a checked array [n, m]."""
    matrix = np.asarray(losses, dtype=np.float64)
    if matrix.size == 0 and matrix.ndim <= 2:
        return np.empty((0, matrix.shape[1] if matrix.ndim == 2 else 0))
    if matrix.ndim != 2:
        raise ValueError(f"losses: expected [n, m], got {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        row = int(np.flatnonzero(~np.isfinite(matrix).all(axis=1))[0])
        raise ValueError(f"losses: expected finite values, row {row} is {matrix[row].tolist()}")
    return matrix


def _normalised_front(losses: ArrayLike) -> tuple[tuple[int, ...], Matrix]:
    """Return the rows of the front [f] and its normalised losses [f, m]."""
    matrix = _matrix(losses)
    if len(matrix) == 0:
        raise ValueError("losses: expected at least one row, got none")
    front = nondominated(matrix)
    members = matrix[list(front)]
    # Halved, so that a range of huge losses of both signs does not overflow.
    low, high = members.min(axis=0) / 2, members.max(axis=0) / 2
    width = np.where(high > low, high - low, 1.0)
    return front, (members / 2 - low) / width


def _extremes(normal: Matrix) -> tuple[int, ...]:
    """Return the best member for each objective, without repetition."""
    chosen: dict[int, None] = {}
    for column in normal.T:
        best = np.flatnonzero(column == column.min())
        chosen[_most_balanced(normal, best)] = None
    return tuple(chosen)


def _extreme_plane(normal: Matrix) -> Vector:
    """Return a [m] of the plane a z = 1 through the best member of each objective.

    Falls back to sum(z) = 1 where those members do not span a plane that faces the origin
    (fewer than m of them, or one so placed that some a_j <= 0).
    """
    objectives = normal.shape[1]
    flat = np.ones(objectives)
    extremes = normal[list(_extremes(normal))]
    if extremes.shape != (objectives, objectives):
        return flat
    # Beyond this condition number the solution has lost half of its digits.
    if np.linalg.cond(extremes) > 1e8:
        return flat
    plane = np.asarray(np.linalg.solve(extremes, flat), dtype=np.float64)
    return plane if (plane > 0).all() else flat


def _most_balanced(normal: Matrix, rows: NDArray[np.intp]) -> int:
    """Return the one of ``rows`` with the smallest worst loss, then sum, then number."""
    worst, total = normal[rows].max(axis=1), normal[rows].sum(axis=1)
    # Rounded to the tie, so that float noise does not decide.
    order = np.lexsort((rows, np.round(total / _TIE), np.round(worst / _TIE)))
    return int(rows[order[0]])


def _distances(normal: Matrix, one: int) -> Vector:
    """Return the distance [f] of every member to member ``one``."""
    distances: Vector = np.linalg.norm(normal - normal[one], axis=1)
    return distances
