"""MAP, its Bayesian and its nested form: what is measured, what is said about it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.search.map import most_informative
from evomerge.search.nested import NestedPlan
from evomerge.search.protocol import Candidate, SearchProblem, Told, WarmPoint
from evomerge.search.quadratic import count_terms
from evomerge.search.registry import make_searcher
from evomerge.search.rounds import Known, Proposal, RoundSearcher
from evomerge.testing import asked, drive, sphere, told

Array = NDArray[np.float64]
PROBLEM = SearchProblem(3, 2, 60, 4, seed=1)


def bowls(candidate: Candidate) -> Told:
    return sphere(candidate, 2)


def test_the_optimum_of_a_quadratic_is_measured_right_behind_the_design() -> None:
    problem = SearchProblem(3, 1, 40, 4, seed=0)
    searcher = make_searcher("map", {}, problem)
    results = told(drive(searcher, lambda one: sphere(one, 1), 40, 4, order=0))
    design = 2 * count_terms(3, "full")
    best = min(result.losses[0] for result in results[design : design + 5])
    assert best < 1e-4
    assert best < min(result.losses[0] for result in results[:design])


def test_it_reports_the_error_on_points_it_had_not_seen() -> None:
    searcher = make_searcher("map", {"generations": 8}, PROBLEM)
    drive(searcher, bowls, 60, 4, order=0)
    facts = searcher.facts()  # type: ignore[attr-defined]
    assert facts["surrogate"].count("squares, identity: R2 1.000") == 2
    assert "caution" not in facts
    assert facts["prediction error"].startswith("rms on ")


def test_it_warns_of_a_surrogate_that_predicts_nothing() -> None:
    def noise(candidate: Candidate) -> Told:
        rng = np.random.default_rng(candidate.id)
        return Told(candidate.id, (float(rng.random()), float(rng.random())))

    searcher = make_searcher("map", {"generations": 4}, PROBLEM)
    drive(searcher, noise, 60, 4, order=0)
    facts = searcher.facts()  # type: ignore[attr-defined]
    assert "trust the measured scores alone" in facts["caution"]


def test_penalties_never_reach_a_surrogate() -> None:
    """A penalty of 1e6 in a fit would drown every real difference."""

    def judge(candidate: Candidate) -> Told:
        if candidate.x[0] > 0.8:
            return Told(candidate.id, (1e6, 1e6), failed=True)
        return bowls(candidate)

    searcher = make_searcher("map", {"generations": 8}, PROBLEM)
    drive(searcher, judge, 60, 4, order=0)
    facts = searcher.facts()  # type: ignore[attr-defined]
    assert facts["surrogate"].count("squares, identity: R2 1.000") == 2


def test_variance_chooses_as_gaussian_conditioning_does() -> None:
    rng = np.random.default_rng(0)
    root = rng.standard_normal((8, 8))
    covariance, noise = root @ root.T, 0.3
    rows = most_informative([covariance.copy()], [noise], 4)
    chosen: list[int] = []
    for _ in range(4):
        variances = np.diag(covariance).copy()
        if chosen:
            inner = covariance[np.ix_(chosen, chosen)] + noise * np.eye(len(chosen))
            cross = covariance[:, chosen]
            variances -= np.einsum("ij,jk,ik->i", cross, np.linalg.inv(inner), cross)
        variances[chosen] = -np.inf
        chosen.append(int(np.argmax(variances)))
    assert rows == chosen


def test_bayesian_map_measures_where_warm_points_are_not() -> None:
    """All that is known lies in one corner; the variance leads to the others."""
    rng = np.random.default_rng(0)
    corner = tuple(
        WarmPoint(tuple(x), bowls(Candidate(0, tuple(x))).losses)
        for x in (0.25 * rng.random((20, 3))).tolist()
    )
    problem = replace(PROBLEM, warm=corner)
    searcher = make_searcher("bayesian_map", {"rounds": 3}, problem)
    candidates = asked(drive(searcher, bowls, 40, 4, order=0))
    adaptive = np.array([candidate.x for candidate in candidates[15:40]])
    assert ((adaptive < 0.1) | (adaptive > 0.9)).any(axis=1).mean() > 0.5


class Recorder:
    """A proposer that remembers what it knew."""

    def __init__(self) -> None:
        self.known: list[Known] = []

    def propose(self, known: Known) -> Proposal:
        self.known.append(known)
        points = np.full((2, 3), 0.1 * len(self.known))
        return Proposal(points, None if known.told == 0 else np.zeros((2, 2)))

    def facts(self) -> dict[str, str]:
        return {"mine": "yes"}


def test_rounds_are_known_in_ask_order_without_failures_and_with_their_errors() -> None:
    recorder = Recorder()
    warm = (WarmPoint((0.0, 0.0, 0.0), (9.0, 9.0)),)
    searcher = RoundSearcher(replace(PROBLEM, warm=warm), recorder)
    assert [one.id for one in searcher.ask(5)] == [0, 1]
    assert list(searcher.ask(1)) == []
    searcher.tell([Told(1, (3.0, 4.0)), Told(0, (1.0, 2.0))])
    assert searcher.facts() == {"mine": "yes"}
    assert [one.id for one in searcher.ask(1)] == [2]
    known = recorder.known[1]
    assert known.losses.tolist() == [[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]]
    assert (known.told, known.warm, len(known.failed)) == (2, 1, 0)
    (last,) = searcher.ask(1)
    searcher.tell([Told(2, (5.0, 5.0), failed=True), Told(last.id, (3.0, -4.0))])
    searcher.ask(1)
    assert recorder.known[2].failed.tolist() == [[0.2, 0.2, 0.2]]
    assert len(recorder.known[2].losses) == 4
    assert searcher.facts()["prediction error"] == (
        "rms on 1 proposals, per objective: 3 (bias +3, spread 0); 4 (bias -4, spread 0)"
    )


def experts(count: int) -> SearchProblem:
    """One coefficient in [-0.5, 1.5] per expert; each is best in a task of its own."""
    eye = np.eye(count)
    places = {"base": np.zeros(count)} | {f"expert:{k}": eye[k] for k in range(count)}
    warm = tuple(
        WarmPoint(tuple(((x + 0.5) / 2).tolist()), tasks((x + 0.5) / 2), label)
        for label, x in places.items()
    )
    return SearchProblem(count, count, 60, 2, seed=0, warm=warm)


def tasks(x: Array) -> tuple[float, ...]:
    """Loss of task k: distance from 0.7 of expert k, a little of the others does no harm."""
    coefficients = 2 * np.asarray(x) - 0.5
    away = coefficients[None, :] - 0.7 * np.eye(len(coefficients))
    weights = 0.2 + 0.8 * np.eye(len(coefficients))
    return tuple((weights * away**2).sum(axis=1).tolist())


def test_nested_map_finds_experts_by_label_and_their_tasks() -> None:
    plan = NestedPlan(experts(4), {"rounds": 2, "population": 12, "generations": 6})
    assert [node.name for node in plan._nodes] == ["0", "1", "2", "3"]
    assert [node.own for node in plan._nodes] == [(0,), (1,), (2,), (3,)]


def test_nested_map_merges_two_by_two_and_beats_every_expert() -> None:
    problem = experts(4)
    searcher = make_searcher("nested_map", {"generations": 8}, problem)
    results = told(drive(searcher, lambda one: Told(one.id, tasks(np.array(one.x))), 60, 2, 0))
    best = min(sum(result.losses) for result in results)
    alone = min(sum(point.losses) for point in problem.warm)
    assert best < 0.8 * alone
    stages = searcher.facts()["stages"].split("; ")  # type: ignore[attr-defined]
    assert len(stages) == 3
    assert stages[-1].count("+") == 2  # the root: two pairs
    assert stages[0].endswith("from candidate 0")


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_nested_map_without_labels_takes_coordinates(dimension: int) -> None:
    problem = SearchProblem(dimension, 1, 20, 1, seed=0)
    searcher = make_searcher("nested_map", {"generations": 4}, problem)
    results = told(drive(searcher, lambda one: sphere(one, 1), 20, 1, 0))
    assert min(one.losses[0] for one in results) < 0.05


def test_the_closest_pair_is_the_first_of_the_least_difference() -> None:
    generator = np.random.default_rng(0)
    for case in range(60):
        losses = generator.integers(0, 4, (5, 2)) / 4  # many are equal
        warm = [WarmPoint((0.0,) * 5, (2.0, 2.0), "base")]
        warm += [
            WarmPoint(tuple(np.eye(5)[k]), tuple(row), f"expert:{k}")
            for k, row in enumerate(losses.tolist())
        ]
        problem = SearchProblem(5, 2, 60, 4, 0, warm=tuple(warm))
        plan = NestedPlan(problem, {"rounds": 2, "population": 12, "generations": 4})
        if case % 3 == 0:
            plan._nodes[case % 5] = replace(plan._nodes[case % 5], losses=None)
        values = [plan._value(node) for node in plan._nodes]
        pairs = list(combinations(range(5), 2))
        unknown = np.isnan(values)
        gaps = [0.0 if unknown[a] or unknown[b] else abs(values[a] - values[b]) for a, b in pairs]
        first, second = pairs[int(np.argmin(gaps))]
        assert plan._closest() == (plan._nodes[first], plan._nodes[second])
