"""Searchers made of others: tied, polish and auto."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evomerge.search.auto import RULES, choose, explain
from evomerge.search.protocol import Candidate, SearchProblem, Told, WarmPoint
from evomerge.search.registry import SEARCHERS, make_searcher
from evomerge.search.tied import levels
from evomerge.testing import asked, drive, sphere, told

GROUPS = tuple((f"weight.{k}", f"layer.{b}") for b in range(8) for k in "ab")
PROBLEM = SearchProblem(16, 1, 120, 4, seed=0, groups=GROUPS)


def test_levels_tie_columns_then_runs_of_blocks_then_nothing() -> None:
    one, four, all_ = levels(PROBLEM, 4)
    assert one.tolist() == [0, 1] * 8
    assert four.max() == 7
    assert four[:4].tolist() == [0, 1, 0, 1] or four[:4].tolist() == [0, 4, 0, 4]
    assert len(set(four[0::2].tolist()) & set(four[1::2].tolist())) == 0
    assert sorted(all_.tolist()) == list(range(16))


def test_levels_without_names_tie_all_coordinates() -> None:
    plain = replace(PROBLEM, dimension=6, groups=())
    assert [int(level.max()) + 1 for level in levels(plain, 3)] == [1, 3, 6]
    assert [int(level.max()) + 1 for level in levels(replace(plain, dimension=1), 3)] == [1]


def test_tied_begins_with_one_coefficient_per_expert() -> None:
    searcher = make_searcher("tied", {}, PROBLEM)
    points = np.array([one.x for one in asked(drive(searcher, sphere, 12, 4, order=0))])
    by_block = points.reshape(len(points), 8, 2)
    assert (by_block == by_block[:, :1]).all()
    assert len({tuple(row) for row in by_block[:, 0].tolist()}) == 12


@pytest.mark.slow
def test_tied_unties_when_the_coarse_space_stops_paying() -> None:
    """Even blocks want 0.2, odd ones 0.8: tied, nothing beats 0.09."""

    def judge(candidate: Candidate) -> Told:
        blocks = np.array(candidate.x).reshape(8, 2)
        goals = np.where(np.arange(8) % 2 == 0, 0.2, 0.8)[:, None]
        return Told(candidate.id, (float(((blocks - goals) ** 2).mean()),))

    searcher = make_searcher("tied", {"groups": 1}, replace(PROBLEM, budget=300))
    results = told(drive(searcher, judge, 300, 4, order=0))
    assert min(one.losses[0] for one in results) < 0.05
    stages = searcher.facts()["stages"].split("; ")  # type: ignore[attr-defined]
    assert stages[0] == "2 coefficients by gp_rounds from candidate 0"
    assert stages[1].startswith("16 coefficients by cma from candidate ")
    assert int(stages[1].split()[-1]) < 150  # before its share was used up


def test_tied_stays_tied_where_that_is_all_it_takes() -> None:
    """All blocks alike: the tied optimum is the optimum, and found in few trials."""
    searcher = make_searcher("tied", {}, PROBLEM)
    results = told(drive(searcher, sphere, 30, 4, order=0))
    assert min(one.losses[0] for one in results) < 1e-3


def test_polish_starts_at_the_named_point_whatever_is_better() -> None:
    start, better = (0.9,) * 6, WarmPoint((1 / 3,) * 6, (0.0,))
    problem = SearchProblem(6, 1, 60, 4, seed=0, warm=(better,), start=start)
    first = np.array([one.x for one in make_searcher("polish", {}, problem).ask(8)])
    assert np.abs(first - 0.9).max() < 0.25
    assert 0.01 < np.abs(first - 0.9).mean() < 0.1
    elsewhere = make_searcher("polish", {}, replace(problem, start=None)).ask(8)
    assert np.abs(np.array([one.x for one in elsewhere]) - 1 / 3).max() < 0.25


def test_polish_improves_its_start() -> None:
    problem = SearchProblem(6, 1, 60, 4, seed=0, start=(0.45,) * 6)
    results = told(drive(make_searcher("polish", {}, problem), sphere, 60, 4, order=0))
    assert min(one.losses[0] for one in results) < 0.5 * sphere(Candidate(0, (0.45,) * 6)).losses[0]


@pytest.mark.parametrize(
    ("problem", "searcher"),
    [
        (SearchProblem(3, 3, 60, 4, 0), "gp_rounds"),
        (SearchProblem(12, 1, 120, 8, 0), "gp_rounds"),
        (SearchProblem(3, 2, 30, 4, 0, noise=0.05), "gp_rounds"),
        (SearchProblem(16, 2, 100, 4, 0, groups=GROUPS), "gp_rounds"),
        (SearchProblem(201, 1, 240, 4, 0), "gp_rounds"),
        (SearchProblem(201, 1, 241, 4, 0), "cma"),
        (SearchProblem(201, 2, 241, 4, 0), "smsemoa"),
        (SearchProblem(202, 2, 100, 4, 0), "smsemoa"),
        (SearchProblem(3, 1, 5000, 4, 0), "cma"),
        (SearchProblem(3, 1, 6, 4, 0), "oneplusone"),
        (SearchProblem(200, 2, 100, 64, 0), "smsemoa"),
        (SearchProblem(200, 4, 100, 64, 0), "nsga3"),
    ],
)
def test_auto_follows_its_table(problem: SearchProblem, searcher: str) -> None:
    assert choose(problem).searcher == searcher
    said = explain(problem)
    assert said.startswith(f"{searcher} ({problem.dimension} coefficients, {problem.budget} trials")


def test_auto_called_a_small_search_too_large_for_surrogates() -> None:
    few = SearchProblem(24, 2, 12, 4, 0)
    assert explain(few).startswith("smsemoa (24 coefficients, 12 trials")
    assert "4 at a time leave fewer than four rounds" in explain(few)
    assert "more trials or coefficients" not in explain(few)
    assert "more trials or coefficients" in explain(SearchProblem(2000, 2, 12, 4, 0))
    assert explain(replace(few, parallel=2)).startswith("gp_rounds")


def test_auto_names_registered_searchers_that_take_the_objectives() -> None:
    for rule in RULES:
        assert SEARCHERS[rule.searcher].multi_objective or rule.objectives[1] == 1
    for objectives in (1, 2, 3, 4, 6):
        assert choose(SearchProblem(10_000, objectives, 1, 500, 0)) in RULES


def test_auto_is_the_chosen_searcher_and_says_so() -> None:
    problem = SearchProblem(3, 2, 16, 4, seed=0)
    searcher = make_searcher("auto", {}, problem)
    chosen = make_searcher("gp_rounds", {}, problem)
    calls = [drive(one, lambda c: sphere(c, 2), 16, 4, order=0) for one in (searcher, chosen)]
    assert asked(calls[0]) == asked(calls[1])
    facts = searcher.facts()  # type: ignore[attr-defined]
    assert facts["auto"].startswith("gp_rounds (3 coefficients, 16 trials, 2 objectives, 4 out")
    assert "surrogate" in facts


@pytest.mark.slow
def test_tied_goes_back_where_the_finer_spaces_did_not_pay() -> None:
    """All blocks alike and two tasks: untied, nothing can be gained."""
    problem = replace(PROBLEM, dimension=4, objectives=2, groups=())
    searcher = make_searcher("tied", {}, problem)
    drive(searcher, lambda c: sphere(c, 2), 120, 4, order=0)
    stages = searcher.facts()["stages"].split("; ")  # type: ignore[attr-defined]
    assert [stage.split()[0] for stage in stages] == ["1", "4", "1"]
