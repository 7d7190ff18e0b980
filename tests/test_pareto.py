from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.pareto import hypervolume, knee, nondominated, pick, spread

Floats = np.ndarray[Any, np.dtype[np.float64]]


def losses(
    max_rows: int = 12, min_rows: int = 0, max_columns: int = 4
) -> st.SearchStrategy[Floats]:
    """Rows of small integers (many ties and duplicates) or of floats."""
    shapes = st.tuples(st.integers(min_rows, max_rows), st.integers(1, max_columns))
    values = st.one_of(st.integers(0, 4).map(float), st.floats(-1e3, 1e3, width=32))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=values))


def dominates(one: Floats, two: Floats) -> bool:
    return bool((one <= two).all() and (one < two).any())


def brute_front(matrix: Floats) -> tuple[int, ...]:
    return tuple(
        i for i, row in enumerate(matrix) if not any(dominates(other, row) for other in matrix)
    )


def brute_hypervolume(matrix: Floats, corner: Floats) -> float:
    """Inclusion and exclusion over all subsets."""
    total = 0.0
    for size in range(1, len(matrix) + 1):
        for subset in itertools.combinations(range(len(matrix)), size):
            edges = np.maximum(corner - matrix[list(subset)].max(axis=0), 0.0)
            total -= (-1) ** size * float(edges.prod())
    return total


@given(losses())
def test_nondominated_agrees_with_brute_force(matrix: Floats) -> None:
    assert nondominated(matrix) == brute_front(matrix)


def test_equal_points_all_stay() -> None:
    assert nondominated([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]]) == (0, 1, 2)
    assert nondominated([[3.0], [1.0], [1.0]]) == (1, 2)
    assert nondominated([]) == ()
    assert nondominated(np.empty((0, 3))) == ()


@given(losses(max_rows=7, max_columns=3))
def test_hypervolume_agrees_with_inclusion_exclusion(matrix: Floats) -> None:
    corner = np.full(matrix.shape[1], 3.5)
    value = hypervolume(matrix, tuple(corner))
    assert value == pytest.approx(brute_hypervolume(matrix, corner), rel=1e-9, abs=1e-6)


def test_hypervolume_by_hand() -> None:
    assert hypervolume([[0.0, 0.0]], (2.0, 3.0)) == 6.0
    assert hypervolume([[0.0, 2.0], [1.0, 1.0]], (2.0, 3.0)) == pytest.approx(2.0 + 2.0 - 1.0)
    assert hypervolume([[2.0, 0.0], [5.0, -9.0]], (2.0, 3.0)) == 0.0
    assert hypervolume([], (1.0, 1.0)) == 0.0
    assert hypervolume([[0.25]], (1.0,)) == 0.75


def test_the_knee_is_where_the_front_bends() -> None:
    front = [[0.0, 1.0], [0.1, 0.6], [0.2, 0.2], [0.6, 0.1], [1.0, 0.0]]
    assert knee(front) == 2
    assert knee([[1000 * a, b / 1000 - 7] for a, b in front]) == 2
    assert knee([*front, [0.21, 0.21]]) == 2
    assert knee([[0.1, 0.1, 0.1], [1, 0, 0.5], [0.5, 1, 0], [0, 0.5, 1]]) == 0


def test_a_straight_front_has_its_knee_in_the_middle() -> None:
    assert knee([[i / 10, 1 - i / 10] for i in range(11)]) == 5


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[3.0], [1.0], [2.0]], 1),
        ([[1.0], [1.0]], 0),
        ([[1.0, 2.0]], 0),
        ([[1.0, 2.0], [2.0, 1.0]], 0),
        ([[1.0, 2.0], [1.0, 2.0]], 0),
        ([[0.0, 1.0, 5.0], [0.2, 0.2, 5.0], [1.0, 0.0, 5.0]], 1),
        ([[9.0, 9.0], [1.0, 2.0]], 1),
        ([[-1e308, 1e308], [1e308, -1e308], [0.0, 0.0], [-5e307, -5e307]], 3),
    ],
)
def test_degenerate_fronts_have_a_knee(matrix: list[list[float]], expected: int) -> None:
    assert knee(matrix) == expected


def brute_knee_depth(front: Floats) -> Floats:
    """Depth below the line through the two extreme points, by its normal form (m = 2)."""
    low, high = front.min(axis=0), front.max(axis=0)
    normal = (front - low) / np.where(high > low, high - low, 1.0)
    a, b = normal[normal[:, 0].argmin()], normal[normal[:, 1].argmin()]
    direction = b - a
    length = float(np.hypot(*direction))
    if length == 0.0:
        return np.zeros(len(front))
    return np.asarray(
        -(direction[0] * (normal[:, 1] - a[1]) - direction[1] * (normal[:, 0] - a[0])) / length
    )


@given(losses(min_rows=1).filter(lambda matrix: matrix.shape[1] == 2))
def test_the_knee_is_the_deepest_member(matrix: Floats) -> None:
    front = list(brute_front(matrix))
    depth = brute_knee_depth(matrix[front])
    assert depth[front.index(knee(matrix))] == pytest.approx(depth.max(), abs=1e-8)


@given(losses(min_rows=1), st.data())
def test_choices_are_members_whatever_scale_and_order(matrix: Floats, data: Any) -> None:
    columns = matrix.shape[1]
    weights = data.draw(st.lists(st.integers(0, 3), min_size=columns, max_size=columns))
    weights[0] += 1
    front = nondominated(matrix)
    chosen, known = pick(matrix, weights), knee(matrix)
    assert chosen in front
    assert known in front
    # Powers of two scale and normalise without rounding.
    assert pick(matrix * 4.0, [2 * weight for weight in weights]) == chosen
    assert knee(matrix * 4.0) == known


@given(losses(min_rows=1), st.data())
def test_pick_minimises_the_weighted_worst_loss(matrix: Floats, data: Any) -> None:
    columns = matrix.shape[1]
    weights = np.array(data.draw(st.lists(st.integers(1, 5), min_size=columns, max_size=columns)))
    front = list(nondominated(matrix))
    members = matrix[front]
    width = members.max(axis=0) - members.min(axis=0)
    normal = (members - members.min(axis=0)) / np.where(width > 0, width, 1.0)
    worst = (normal * weights / weights.sum()).max(axis=1)
    # The augmentation, 1e-3 times a sum of at most m, may choose a little worse.
    assert worst[front.index(pick(matrix, list(weights)))] <= worst.min() + 1e-3 * columns


def test_pick_follows_the_weights() -> None:
    front = [[0.0, 1.0], [0.1, 0.8], [0.55, 0.55], [0.8, 0.1], [1.0, 0.0]]
    assert pick(front, [1, 0]) == 0
    assert pick(front, [0, 1]) == 4
    assert pick(front, [6, 1]) == 1
    assert pick(front, [1, 6]) == 3
    # In a dent of the front, where no weighted sum would ever find it.
    assert pick(front, [1, 1]) == 2


def test_pick_never_takes_a_weakly_dominated_row() -> None:
    assert pick([[0.0, 2.0], [0.0, 1.0], [1.0, 0.0]], [1, 0]) == 1


@settings(max_examples=60)
@given(losses(max_rows=9, min_rows=1, max_columns=3), st.integers(1, 5))
def test_spread_leaves_gaps_at_most_twice_the_smallest_possible(matrix: Floats, k: int) -> None:
    front = nondominated(matrix)
    kept = spread(matrix, k)
    assert set(kept) <= set(front)
    assert len(kept) == min(k, len(front)) == len(set(kept))
    assert kept == tuple(sorted(kept))
    members = matrix[list(front)]
    width = members.max(axis=0) - members.min(axis=0)
    normal = dict(
        zip(front, (members - members.min(axis=0)) / np.where(width > 0, width, 1.0), strict=True)
    )

    def gap(chosen: tuple[int, ...]) -> float:
        return max(
            min(float(np.linalg.norm(normal[one] - normal[other])) for other in chosen)
            for one in front
        )

    if 1 < k < len(front):
        seeds = {one for one in kept if (normal[one] == 0.0).any()}
        best = min(
            gap(chosen)
            for chosen in itertools.combinations(front, k)
            if k <= matrix.shape[1] or seeds_of(normal, kept) <= set(chosen)
        )
        assert seeds or k < matrix.shape[1]
        assert gap(kept) <= 2 * best + 1e-9


def seeds_of(normal: dict[int, Floats], kept: tuple[int, ...]) -> set[int]:
    """Kept members that are best in some objective and alone in it."""
    columns = len(next(iter(normal.values())))
    best = [[one for one in normal if normal[one][j] == 0.0] for j in range(columns)]
    return {ones[0] for ones in best if len(ones) == 1 and ones[0] in kept}


def test_spread_keeps_the_best_of_each_objective() -> None:
    front = [[i / 20, (1 - i / 20) ** 2] for i in range(21)]
    assert spread(front, 2) == (0, 20)
    assert {0, 20} <= set(spread(front, 5))
    assert spread(front, 1) == (knee(front),)
    assert spread(front, 100) == tuple(range(21))
    assert spread([], 3) == ()


def test_spread_takes_equal_members_last() -> None:
    front = [[0.0, 1.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]
    assert spread(front, 3) == (0, 2, 3)
    assert spread(front, 4) == (0, 1, 2, 3)


def test_spread_does_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    t = np.sort(rng.random(15))
    front = np.stack([t, 1 - t**2], axis=1)
    chosen = {tuple(front[one]) for one in spread(front, 6)}
    for _ in range(5):
        shuffled = front[rng.permutation(15)]
        assert {tuple(shuffled[one]) for one in spread(shuffled, 6)} == chosen


@pytest.mark.parametrize("function", [nondominated, knee, lambda x: spread(x, 2)])
def test_not_finite_or_misshapen_losses_are_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"row 1 is \[nan, 0.0\]"):
        function([[0.0, 0.0], [np.nan, 0.0]])
    with pytest.raises(ValueError, match=r"expected \[n, m\], got \[2\]"):
        function([1.0, 2.0])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        spread([[1.0]], 0)
    with pytest.raises(ValueError, match="at least one row"):
        knee([])
    with pytest.raises(ValueError, match="not all 0"):
        pick([[1.0, 2.0]], [0, 0])
    with pytest.raises(ValueError, match=">= 0"):
        pick([[1.0, 2.0]], [1, -1])
    with pytest.raises(ValueError, match=r"weights: expected \[2\], got \[3\]"):
        pick([[1.0, 2.0]], [1, 1, 1])
    with pytest.raises(ValueError, match=r"losses: expected \[n, 3\], got \[1, 2\]"):
        hypervolume([[1.0, 2.0]], (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="reference"):
        hypervolume([[1.0]], (np.inf,))
