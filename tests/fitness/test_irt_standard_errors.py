"""Standard errors of means over the draws of each item design from one finite population.

Where all samples can be listed, the mean of the squared errors must be the variance of the values
exactly; else repeated draws must be covered.
"""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.estimate import Answers, mean_of
from evomerge.fitness.aggregate import Aggregate, MeanEstimator
from evomerge.fitness.irt.design import DESIGNS, choose_items
from evomerge.fitness.irt.estimators import SubsetEstimator
from evomerge.fitness.irt.population import Design, Endpoints, Population, Sample

Floats = NDArray[np.float64]
SCORES = np.random.default_rng(5).normal(2.0, 1.0, 9).round(2)
IDS = tuple("abcdefghi")
NEED_A_BANK = {"anchor_irt", "d_optimal_weights", "d_optimal_ability"}
GROUPS = ("x", "x", "x", "x", "y", "y", "y", "z", "z")


def moments(
    name: str, population: Population, samples: list[tuple[int, ...]], design: Design | None = None
) -> tuple[float, float, float]:
    """Return mean and variance of the values over all samples, and the mean squared error said."""
    values, squares = [], []
    for rows in samples:
        ids = tuple(population.ids[row] for row in rows)
        seen = population.on(design or Design("random", ids, random=True))
        found = SubsetEstimator(name, [seen]).estimate_all(0, ids, SCORES[None, list(rows)])
        values.append(found.values[0])
        squares.append(found.standard_errors[0] ** 2)
    return float(np.mean(values)), float(np.var(values)), float(np.mean(squares))


@pytest.mark.parametrize("name", ["mean", "anchor"])
@pytest.mark.parametrize("n", [2, 5, 8])
def test_the_error_of_random_items_is_exact_on_average(name: str, n: int) -> None:
    samples = list(combinations(range(9), n))
    mean, variance, said = moments(name, Population(IDS), samples)
    assert mean == pytest.approx(SCORES.mean())
    assert said == pytest.approx(variance)
    # Cochran (1977), theorem 2.2.
    assert variance == pytest.approx(SCORES.var(ddof=1) / n * (1 - n / 9))
    plain = [mean_of(SCORES[list(rows)].tolist(), 9)[1] ** 2 for rows in samples]
    assert np.mean(plain) == pytest.approx(variance)
    shared = MeanEstimator([Aggregate()], [IDS])
    mine = [
        shared.estimate(0, Answers(tuple(IDS[r] for r in rows), tuple(SCORES[list(rows)])))
        for rows in samples
    ]
    assert np.mean([one.standard_error**2 for one in mine]) == pytest.approx(variance)


@pytest.mark.parametrize("counts", [(2, 2, 2), (3, 2, 2), (4, 2, 2)])
@pytest.mark.parametrize("name", ["stratified", "anchor"])
def test_the_error_of_items_by_group_is_exact_on_average(
    name: str, counts: tuple[int, int, int]
) -> None:
    population = Population(IDS, groups=GROUPS)
    members = [[row for row in range(9) if GROUPS[row] == group] for group in "xyz"]
    picks = [list(combinations(rows, n)) for rows, n in zip(members, counts, strict=True)]
    samples = [tuple(row for part in parts for row in part) for parts in product(*picks)]
    share = {
        group: len(rows) / 9 / n for group, rows, n in zip("xyz", members, counts, strict=True)
    }

    values, squares = [], []
    for rows in samples:
        ids = tuple(IDS[row] for row in rows)
        weights = tuple(share[GROUPS[row]] for row in rows)
        seen = population.on(Design("stratified", ids, weights))
        found = SubsetEstimator(name, [seen]).estimate_all(0, ids, SCORES[None, list(rows)])
        values.append(found.values[0])
        squares.append(found.standard_errors[0] ** 2)
    assert np.mean(values) == pytest.approx(SCORES.mean())
    assert np.mean(squares) == pytest.approx(np.var(values))
    strata = dict(zip(IDS, GROUPS, strict=True))
    # Groups whose values count the same: another value, the same errors of each group.
    shared = MeanEstimator([Aggregate(strata=strata)], [IDS])
    mine = [
        shared.estimate(0, Answers(tuple(IDS[r] for r in rows), tuple(SCORES[list(rows)])))
        for rows in samples
    ]
    variance = np.var([one.value for one in mine])
    assert np.mean([one.standard_error**2 for one in mine]) == pytest.approx(variance)


def test_the_mean_of_items_by_group_is_not_charged_for_what_the_groups_differ() -> None:
    groups = ("easy",) * 50 + ("hard",) * 50
    scores = np.where(np.arange(100) < 50, 1.0, 0.0) + np.tile([0.1, -0.1], 50)
    population = Population(tuple(map(str, range(100))), groups=groups)
    design = choose_items("stratified", population, 40, 0, "task")
    rows = population.rows(design.ids)
    by_group = SubsetEstimator("mean", [population.on(design)])
    found = by_group.estimate_all(0, design.ids, scores[None, rows])
    expected = np.sqrt(0.1**2 * 50 / 49 / 40 * (1 - 40 / 100))
    assert found.standard_errors[0] == pytest.approx(expected, rel=0.15)
    as_drawn = SubsetEstimator("mean", [population]).estimate_all(0, design.ids, scores[None, rows])
    assert as_drawn.standard_errors[0] > 4 * found.standard_errors[0]


@pytest.mark.parametrize("name", ["mean", "anchor", "ppi"])
def test_the_first_items_of_a_race_are_of_any_group(name: str) -> None:
    """The errors of what halving left behind were those within groups, 16 times too small."""
    groups = ("easy",) * 50 + ("hard",) * 50
    scores = np.where(np.arange(100) < 50, 1.0, 0.0) + np.tile([0.05, -0.05], 50)
    ends = Endpoints(("base", "a"), np.random.default_rng(0).random((2, 100)), base=0)
    population = Population(tuple(map(str, range(100))), groups=groups, endpoints=ends)
    values, errors = [], []
    for seed in range(150):
        design = choose_items("stratified", population, 40, seed, "task")
        first = np.random.default_rng(seed).permutation(design.ids)[:10]
        ids = tuple(map(str, first))
        found = SubsetEstimator(name, [population.on(design)]).estimate_all(
            0, ids, scores[None, population.rows(ids)].clip(0, 1)
        )
        values.append(found.values[0])
        errors.append(found.standard_errors[0])
    spread = np.std(values)
    assert 0.8 < np.sqrt(np.mean(np.square(errors))) / spread < 1.6


def test_an_item_alone_in_its_group_is_known_where_it_is_the_whole_group() -> None:
    population = Population(IDS, groups=("x",) * 4 + ("y",) * 4 + ("z",))
    ids = ("a", "b", "e", "f", "i")
    rows = population.rows(ids)
    seen = population.on(Design("stratified", ids, (2 / 9,) * 4 + (1 / 9,)))
    found = SubsetEstimator("stratified", [seen]).estimate_all(0, ids, SCORES[None, rows])
    parts = [mean_of(SCORES[first : first + 2].tolist(), 4)[1] * 4 / 9 for first in (0, 4)]
    assert found.standard_errors[0] == pytest.approx(np.hypot(parts[0], parts[1]))


def population_of(weights: bool = False) -> tuple[Population, Floats]:
    """80 items in three topics of different difficulty, three endpoints, and one candidate."""
    rng = np.random.default_rng(2)
    topic = np.repeat([0, 1, 2], [40, 30, 10])
    chance = np.array([0.85, 0.5, 0.2])[topic]
    models = (rng.random((4, 80)) < chance).astype(float)
    ends = Endpoints(("base", "a", "b"), models[:3], models[:3] - 0.5, base=0)
    return Population(
        tuple(map(str, range(80))),
        weights=rng.uniform(0.5, 1.5, 80) if weights else np.empty(0),
        groups=tuple(f"topic{number}" for number in topic),
        endpoints=ends,
    ), models[3]


@pytest.mark.parametrize(
    ("design", "name"),
    [
        ("random", "mean"), ("random", "anchor"), ("random", "stratified"), ("random", "ppi"),
        ("stratified", "mean"), ("stratified", "anchor"), ("stratified", "stratified"),
        ("stratified", "ppi"), ("disagreement", "anchor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("n", [16, 48])
@pytest.mark.parametrize("weights", [False, True])
def test_draws_from_one_population_are_covered(
    design: str, name: str, n: int, weights: bool
) -> None:
    population, scores = population_of(weights)
    truth = float(scores @ population.weights) / 80
    values, errors = [], []
    for seed in range(400):
        chosen = choose_items(design, population, n, seed, "task")
        rows = population.rows(chosen.ids)
        margins = scores[None, rows] - 0.5
        estimator = SubsetEstimator(name, [population.on(chosen)])
        found = estimator.estimate_all(0, chosen.ids, scores[None, rows], margins)
        values.append(found.values[0])
        errors.append(found.standard_errors[0])
    spread = float(np.sqrt(np.mean((np.array(values) - truth) ** 2)))
    said = float(np.sqrt(np.mean(np.square(errors))))
    # The cross-fitted difference is not linear in the draw.
    low, high = (0.75, 1.5) if name == "ppi" else (0.87, 1.15)
    assert low < said / spread < high
    inside = np.abs(np.array(values) - truth) < 1.645 * np.array(errors)
    # Of 16 items of unequal weight the normal curve's intervals are a little short.
    assert 0.77 < inside.mean() < (0.99 if name == "ppi" else 0.96)
    # Without the correction the errors would be too large by this factor.
    if n == 48 and name != "ppi":
        assert said / np.sqrt(1 - 48 / 80) > 1.3 * spread


@pytest.mark.parametrize("design", sorted(DESIGNS.keys() - NEED_A_BANK))
def test_nothing_is_uncertain_where_all_items_are_scored(design: str) -> None:
    population, scores = population_of()
    chosen = choose_items(design, population, 80, 0, "task")
    rows = population.rows(chosen.ids)
    for name in ("mean", "anchor", "stratified"):
        # The estimator's own way, not the shortcut for whole populations.
        run = SubsetEstimator(name, [population.on(chosen)])._runs[0]
        found = run(Sample(rows, scores[None, rows]))
        assert found.values[0] == pytest.approx(scores.mean())
        assert found.standard_errors[0] == pytest.approx(0.0, abs=1e-9)


def test_anchors_leave_unknown_what_they_stand_for() -> None:
    """Equal clusters have the error of random items; an item that is its own cluster has none."""
    ids = ("a", "d", "g")
    rows = [0, 3, 6]
    equal = Population(IDS).on(Design("anchor", ids, (1 / 3,) * 3))
    found = SubsetEstimator("anchor", [equal]).estimate_all(0, ids, SCORES[None, rows])
    assert found.standard_errors[0] == pytest.approx(mean_of(SCORES[rows].tolist(), 9)[1])
    lone = Population(IDS).on(Design("anchor", ids, (7 / 9, 1 / 9, 1 / 9)))
    found = SubsetEstimator("anchor", [lone]).estimate_all(0, ids, SCORES[None, rows])
    apart = SCORES[0] - SCORES[rows] @ np.array([7, 1, 1]) / 9
    assert found.standard_errors[0] == pytest.approx(7 / 9 * abs(apart) * np.sqrt(6 / 7 * 3 / 2))
