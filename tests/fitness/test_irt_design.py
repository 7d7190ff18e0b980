"""Item sets: chances, anchors, and greedy optimality against brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from irt_population import graded_case
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.fitness.irt.ability import sigmoid
from evomerge.fitness.irt.anchors import anchors
from evomerge.fitness.irt.bank import ItemBank
from evomerge.fitness.irt.design import DESIGNS, choose_items
from evomerge.fitness.irt.optimal_design import greedy_d_optimal, greedy_value_optimal
from evomerge.fitness.irt.population import Endpoints, Population

Floats = NDArray[np.float64]


@pytest.mark.parametrize("name", DESIGNS)
class TestEveryDesign:
    def test_it_chooses_different_items_and_the_same_ones_again(self, name: str) -> None:
        _, population = graded_case()
        chosen = choose_items(name, population, 24, 7, "task")
        assert len(chosen.ids) == len(set(chosen.ids)) == 24
        assert set(chosen.ids) <= set(population.ids)
        assert chosen == choose_items(name, population, 24, 7, "task")
        assert chosen.ids != choose_items(name, population, 24, 8, "task").ids
        if chosen.weights:
            assert sum(chosen.weights) == pytest.approx(1.0)
            assert min(chosen.weights) > 0

    def test_too_many_items_are_refused(self, name: str) -> None:
        _, population = graded_case()
        for n in (0, 601):
            with pytest.raises(InputError, match=f"expected 1 to 600 items, got {n}"):
                choose_items(name, population, n, 0, "task")

    def test_what_it_needs_is_said(self, name: str) -> None:
        bare = Population(("x", "y", "z"))
        if name == "random":
            assert len(choose_items(name, bare, 2, 0, "task").ids) == 2
            return
        with pytest.raises(InputError, match=r"design: \w+: (needs|expected at least)"):
            choose_items(name, bare, 2, 0, "task")


def test_unknown_design_is_answered_with_the_nearest() -> None:
    _, population = graded_case()
    with pytest.raises(InputError, match=r"unknown 'randon' .did you mean 'random'"):
        choose_items("randon", population, 5, 0, "task")


def test_random_items_have_equal_chances() -> None:
    population = Population(tuple(map(str, range(40))))
    counts = np.zeros(40)
    for seed in range(2000):
        chosen = choose_items("random", population, 10, seed, "task")
        assert chosen.random
        counts[population.rows(chosen.ids)] += 1
    # 500 +- 19.4 each; 4.5 standard deviations for the largest of 40.
    assert np.abs(counts - 500).max() < 88


def test_two_objectives_are_drawn_independently() -> None:
    population = Population(tuple(map(str, range(400))))
    first, second = (set(choose_items("random", population, 40, 0, name).ids) for name in "ab")
    assert len(first & second) < 15


def test_stratified_items_are_proportional_and_weighted_where_they_cannot_be() -> None:
    groups = ("large",) * 60 + ("small",) * 30 + ("tiny",) * 10
    population = Population(tuple(map(str, range(100))), groups=groups)
    even = choose_items("stratified", population, 10, 0, "task")
    taken = [groups[row] for row in population.rows(even.ids)]
    assert [taken.count(name) for name in ("large", "small", "tiny")] == [6, 3, 1]
    assert even.random
    assert np.allclose(even.weights, 0.1)
    odd = choose_items("stratified", population, 4, 0, "task")
    rows = population.rows(odd.ids)
    taken = [groups[row] for row in rows]
    assert [taken.count(name) for name in ("large", "small", "tiny")] == [2, 1, 1]
    assert not odd.random
    mass = {
        name: sum(w for w, g in zip(odd.weights, taken, strict=True) if g == name) for name in taken
    }
    assert mass == pytest.approx({"large": 0.6, "small": 0.3, "tiny": 0.1})
    with pytest.raises(InputError, match="at least one item for each of 3 groups"):
        choose_items("stratified", population, 2, 0, "task")


def test_disagreement_items_come_with_their_exact_chances() -> None:
    """The weighted mean of any score is that of the population, on average over the draws."""
    rng = np.random.default_rng(0)
    scores = (rng.random((4, 60)) < 0.5).astype(float)
    scores[:, :20] = 1.0
    population = Population(
        tuple(map(str, range(60))), endpoints=Endpoints(("a", "b", "c", "d"), scores)
    )
    spread = scores.var(axis=0)
    want = spread + spread.mean()
    chance = 12 * want / want.sum()
    assert chance.max() < 1
    counts = np.zeros(60)
    for seed in range(1500):
        chosen = choose_items("disagreement", population, 12, seed, "task")
        rows = population.rows(chosen.ids)
        counts[rows] += 1
        expected = (1 / chance[rows]) / (1 / chance[rows]).sum()
        assert np.allclose(chosen.weights, expected)
    deviation = np.sqrt(1500 * chance * (1 - chance))
    assert np.abs((counts - 1500 * chance) / deviation).max() < 4.5


def test_disagreement_takes_every_item_that_is_certain() -> None:
    scores = np.ones((2, 50))
    scores[0, :5] = 0.0
    population = Population(tuple(map(str, range(50))), endpoints=Endpoints(("a", "b"), scores))
    for seed in range(20):
        chosen = choose_items("disagreement", population, 10, seed, "task")
        assert {"0", "1", "2", "3", "4"} <= set(chosen.ids)


def test_anchors_stand_for_the_clusters() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    cluster = np.repeat([0, 1, 2], [50, 30, 20])
    points = centres[cluster] + rng.normal(0, 0.5, (100, 2))
    population = Population(tuple(map(str, range(100))))
    chosen = anchors(population, 3, 0, points, "anchor")
    rows = population.rows(chosen.ids)
    shares = dict(zip(cluster[rows].tolist(), chosen.weights, strict=True))
    assert shares == pytest.approx({0: 0.5, 1: 0.3, 2: 0.2})
    for row in rows:
        mean = points[cluster == cluster[row]].mean(axis=0)
        nearest = np.argmin(((points - mean) ** 2).sum(axis=1))
        assert row == nearest


def test_anchors_go_by_the_models_of_the_bank_where_it_holds_their_scores() -> None:
    rng = np.random.default_rng(3)
    ids = tuple(f"i{number}" for number in range(40))
    # Four kinds of items, which the bank's models tell apart and the endpoints do not.
    kind = np.arange(40) % 4
    scores = np.eye(4)[kind].T[rng.integers(4, size=12)]
    bank = ItemBank("m2pl", ids, np.ones((40, 1)), np.zeros(40), responses=scores)
    endpoints = Endpoints(("base", "a"), np.full((2, 40), 0.5), None, 0)
    population = Population(ids, endpoints=endpoints, bank=bank)
    chosen = choose_items("anchor", population, 4, 0, "task")
    assert {int(item[1:]) % 4 for item in chosen.ids} == {0, 1, 2, 3}
    assert chosen.weights == pytest.approx((0.25,) * 4)
    # In another order of items they are still found by id.
    turned = Population(ids[::-1], endpoints=endpoints, bank=bank)
    again = choose_items("anchor", turned, 4, 0, "task")
    assert {int(item[1:]) % 4 for item in again.ids} == {0, 1, 2, 3}


def test_anchors_survive_equal_items() -> None:
    population = Population(tuple(map(str, range(12))))
    features = np.repeat(np.eye(2), 6, axis=0)
    chosen = anchors(population, 5, 0, features, "anchor")
    assert len(set(chosen.ids)) == 5
    assert sum(chosen.weights) == pytest.approx(1.0)


def criterion(rows: tuple[int, ...], x: Floats, draws: Floats, precision: Floats) -> float:
    total = 0.0
    for draw in draws:
        p = sigmoid(x @ draw)
        information = precision + sum(p[i] * (1 - p[i]) * np.outer(x[i], x[i]) for i in rows)
        total += float(np.linalg.slogdet(information)[1])
    return total


def test_every_greedy_step_is_the_best_one_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    x, draws, precision = (
        rng.normal(size=(25, 3)),
        rng.normal(size=(4, 3)),
        np.diag([1.0, 2.0, 0.5]),
    )
    rows = greedy_d_optimal(x, np.zeros(25), draws, precision, 6, rng, among=1).tolist()
    for step in range(6):
        before = tuple(rows[:step])
        gains = {
            i: criterion((*before, i), x, draws, precision) for i in range(25) if i not in before
        }
        assert gains[rows[step]] == pytest.approx(max(gains.values()), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_set_is_nearly_the_best_of_all(seed: int) -> None:
    """A greedy set gains at least 1 - 1/e of the best one's (Nemhauser et al. 1978)."""
    rng = np.random.default_rng(seed)
    x, draws, precision = 2 * rng.normal(size=(12, 3)), rng.normal(size=(3, 3)), np.eye(3)
    rows = greedy_d_optimal(x, np.zeros(12), draws, precision, 4, rng, among=1)
    every = [criterion(rows_, x, draws, precision) for rows_ in combinations(range(12), 4)]
    assert criterion(tuple(rows.tolist()), x, draws, precision) > 0.97 * max(every)
    assert max(every) > 1.3 * float(np.median(every))


def test_value_optimal_steps_are_the_best_by_brute_force() -> None:
    rng = np.random.default_rng(1)
    x, gradients = rng.normal(size=(20, 3)), rng.normal(size=(4, 3))
    precision = np.diag([0.1, 1.0, 1.0])

    def left(rows: tuple[int, ...]) -> float:
        covariance = np.linalg.inv(precision + x[list(rows)].T @ x[list(rows)])
        return float(np.einsum("rp,pq,rq->", gradients, covariance, gradients))

    rows = greedy_value_optimal(x, gradients, precision, 5, rng, among=1).tolist()
    for step in range(5):
        before = tuple(rows[:step])
        losses = {i: left((*before, i)) for i in range(20) if i not in before}
        assert losses[rows[step]] == pytest.approx(min(losses.values()), abs=1e-12)


def test_margin_designs_need_margins() -> None:
    _, population = graded_case()
    assert population.endpoints is not None
    without = replace(population, endpoints=replace(population.endpoints, margins=None))
    for name in ("d_optimal_margins", "value_optimal_margins"):
        with pytest.raises(InputError, match=f"{name}: the endpoints have no margins"):
            choose_items(name, without, 5, 0, "task")


def test_population_refuses_what_does_not_fit() -> None:
    scores = np.zeros((2, 3))
    for make, words in (
        (lambda: Population(()), "item ids .I >= 1., each once, got 0"),
        (lambda: Population(("x", "x")), "got 2 with 1 different"),
        (
            lambda: Population(("x",), training=scores),
            r"training: expected \[M, I=1\], got \[2, 3\]",
        ),
        (lambda: Population(("x",), weights=np.array([0.0])), "positive numbers"),
        (lambda: Population(("x", "y"), groups=("a",)), "groups: expected .I=2. names, got 1"),
        (lambda: Population(("x",), endpoints=Endpoints(("a", "b"), scores)), "the 1 items, got 3"),
        (lambda: Endpoints(("a",), scores), r"expected \[K, I\] = \[1, 3\], got \[2, 3\]"),
        (lambda: Endpoints(("a", "b"), scores + np.nan), "not all finite"),
        (lambda: Endpoints(("a", "b"), scores, base=2), "a number below 2, got 2"),
    ):
        with pytest.raises(InputError, match=words):
            make()
