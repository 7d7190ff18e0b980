"""What a search meets besides well-behaved losses: outliers, few merges, missing baselines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evomerge.pareto import hypervolume
from evomerge.search.evo_merging import EvoMergingSearcher
from evomerge.search.generation import generation_size
from evomerge.search.protocol import Candidate, SearchProblem, Told, WarmPoint
from evomerge.search.registry import SEARCHERS, check_arguments, make_searcher
from evomerge.search.rounds import fence
from evomerge.space import Kind
from evomerge.testing import asked, drive, sphere, told

BRIEF = {"population": 12, "generations": 6}


def two_bowls(candidate: Candidate) -> Told:
    x = np.array(candidate.x)
    return Told(candidate.id, (float(((x - 0.2) ** 2).sum()), float(((x - 0.8) ** 2).sum())))


def warm_points(dimension: int, count: int, worst: float | None) -> tuple[WarmPoint, ...]:
    """Return points of ``two_bowls``, of which one may have a second loss of ``worst``."""
    rng = np.random.default_rng(0)
    points = []
    for number, x in enumerate(rng.random((count, dimension)).tolist()):
        losses = two_bowls(Candidate(0, tuple(x))).losses
        if number == 3 and worst is not None:
            losses = (losses[0], worst)
        points.append(WarmPoint(tuple(x), losses))
    return tuple(points)


@pytest.mark.parametrize("name", ["gp_rounds", "map"])
def test_one_broken_baseline_does_not_ruin_a_surrogate(name: str) -> None:
    found = []
    for worst in (None, 1e4):
        problem = SearchProblem(3, 2, 40, 4, 1, warm=warm_points(3, 8, worst))
        results = told(drive(make_searcher(name, BRIEF, problem), two_bowls, 40, 4, order=0))
        found.append(hypervolume(np.array([one.losses for one in results]), (1.1, 1.1)))
    assert found[1] > 0.9 * found[0]  # 0.7 with the losses as they are


def test_the_fence_is_tukeys_and_stands_nowhere_without_a_spread() -> None:
    losses = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 9.0], [1e6, 1.0]])
    # Upper quartile of five: the fourth; three times (3 - 0) beyond it.
    assert fence(losses).tolist() == [12.0, np.inf]
    assert fence(losses[:3]).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("levels", [(5, 3), (20,), (2, 2, 2, 2, 2)])
def test_bayesian_map_survives_that_it_knows_every_merge(levels: tuple[int, ...]) -> None:
    kinds = tuple(Kind("integer", count) for count in levels)
    problem = SearchProblem(len(levels), 1, 60, 4, 1, kinds=kinds)
    points = asked(drive(make_searcher("bayesian_map", BRIEF, problem), sphere, 60, 4, order=0))
    assert len({one.x for one in points}) == np.prod(levels)


@pytest.mark.parametrize("name", ["nsga2", "nsga3", "unsga3", "ga", "agemoea", "rvea"])
def test_generations_go_on_where_the_first_is_all_baselines(name: str) -> None:
    """Six of eight merges are baselines; in some seeds the first population holds no other."""
    objectives = 1 if name == "ga" else 2
    places = [(a, b, c) for a in (0.25, 0.75) for b in (0.25, 0.75) for c in (0.25, 0.75)]

    def judge(candidate: Candidate) -> Told:
        return Told(candidate.id, two_bowls(candidate).losses[:objectives])

    warm = tuple(WarmPoint(x, judge(Candidate(0, x)).losses) for x in places[:6])
    kinds = (Kind("choice", 2),) * 3
    for seed in range(12):
        problem = SearchProblem(3, objectives, 20, 2, seed, warm=warm, kinds=kinds)
        searcher = make_searcher(name, {}, problem)
        points = asked(drive(searcher, judge, 20, 2, order=0))
        assert {one.x for one in points} | set(places[:6]) == set(places), seed


def test_polish_takes_every_step_that_it_says_it_takes() -> None:
    lowest = SEARCHERS["polish"].arguments["sigma"].low
    assert lowest is not None
    start = (0.4, 0.6)
    problem = SearchProblem(2, 1, 20, 1, 0, warm=(WarmPoint(start, (1.0,)),))
    (first,) = make_searcher("polish", {"sigma": lowest}, problem).ask(1)
    assert 0.0 < np.abs(np.array(first.x) - start).max() < 10 * lowest


def test_auto_tells_the_generation_of_what_it_chose() -> None:
    problem = SearchProblem(300, 4, 800, 4, 0)
    searcher = make_searcher("auto", {}, problem)
    assert searcher.facts()["auto"].startswith("nsga3")  # type: ignore[attr-defined]
    size = generation_size("auto", {}, problem)
    assert size == generation_size("nsga3", {}, problem) > 1

    seen = []
    for _ in range(size + 1):
        (candidate,) = searcher.ask(1)
        seen.append(searcher.generation)  # type: ignore[attr-defined]
        mean = float(np.mean(candidate.x))
        searcher.tell([Told(candidate.id, (mean, 1 - mean, mean**2, 0.5))])
    assert seen == [0] * size + [1]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("map", {}), ("bayesian_map", {}), ("gp_rounds", {}), ("auto", {}), ("nsga2", {}),
     ("smsemoa", {"steady": False}), ("nsga2", {"population": 24})],
)  # fmt: skip
def test_a_generation_is_what_is_asked_before_anything_is_told(
    name: str, arguments: dict[str, object]
) -> None:
    problem = SearchProblem(4, 2, 40, 4, 0)
    searcher = make_searcher(name, arguments, problem)
    count = 0
    while searcher.ask(1):
        count += 1
    assert generation_size(name, arguments, problem) == count


def test_steady_searchers_learn_from_the_first_trial_on() -> None:
    problem = SearchProblem(4, 2, 40, 4, 0)
    assert generation_size("nsga2", {"steady": True}, problem) == 1
    assert generation_size("smsemoa", {}, problem) == 1


def test_a_failed_merge_is_never_what_a_stage_goes_on_from() -> None:
    """A failure's penalty is level with the rest, and its densities the smallest by far."""
    groups = tuple((f"{kind}.e{k}", "model") for k in range(3) for kind in ("weight", "density"))
    ranges = tuple((-1.5, 1.5) if name[0] == "w" else (0.0, 1.0) for name, _ in groups)
    problem = SearchProblem(6, 1, 60, 4, 3, groups=groups, ranges=ranges)
    searcher = EvoMergingSearcher(problem, check_arguments("evo_merging", {"population": 10}))
    first = searcher.ask(10)
    worst = min(first, key=lambda one: sum(one.x[1::2]))
    searcher.tell([Told(one.id, (0.6,), failed=one is worst) for one in first])
    stands = first[0].x[0::2]  # the weights, while densities are searched
    (later,) = searcher.ask(1)
    while later.x[0::2] == stands:
        searcher.tell([Told(later.id, (0.6,))])
        (later,) = searcher.ask(1)
    assert later.x[1::2] != worst.x[1::2]


EXPERTS = tuple(f"e{k}" for k in range(4))
GROUPS = tuple((f"weight.{name}", "all") for name in EXPERTS)


def corners(low: float, names: tuple[str, ...]) -> list[WarmPoint]:
    points = []
    for name in names:
        x = tuple(1.0 if name == other else low for other in EXPERTS)
        points.append(WarmPoint(x, sphere(Candidate(0, x)).losses, f"expert:{name}"))
    return points


def test_nested_map_says_whom_it_leaves_out() -> None:
    warm = corners(0.0, ("e0", "e1", "e3"))
    base = WarmPoint((0.0,) * 4, sphere(Candidate(0, (0.0,) * 4)).losses, "base")
    problem = SearchProblem(4, 1, 30, 4, 7, warm=(base, *warm), groups=GROUPS)
    facts = make_searcher("nested_map", BRIEF, problem).facts()  # type: ignore[attr-defined]
    assert facts["left out"] == "1 experts that have no score alone are not merged: e2"
    full = replace(problem, warm=(base, *corners(0.0, EXPERTS)))
    facts = make_searcher("nested_map", BRIEF, full).facts()  # type: ignore[attr-defined]
    assert "left out" not in facts


def test_nested_map_knows_the_base_without_its_score() -> None:
    """In a box of -1 to 1 an absent expert stands in the middle, not in the corner."""
    warm = tuple(corners(0.5, EXPERTS))
    problem = SearchProblem(4, 1, 60, 4, 7, warm=warm, groups=GROUPS, ranges=((-1.0, 1.0),) * 4)
    searcher = make_searcher("nested_map", BRIEF, problem)
    first = np.array([one.x for one in asked(drive(searcher, sphere, 6, 1, order=0))])
    assert (np.count_nonzero(first == 0.5, axis=1) >= 2).all()  # all but the first pair are absent


@pytest.mark.parametrize("name", ["nsga3", "unsga3"])
def test_more_objectives_than_members_are_searched_without_a_word(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = SearchProblem(3, 8, 10, 2, 0)
    searcher = make_searcher(name, {"population": 4}, problem)
    first = searcher.ask(20)
    assert len(first) == 8
    searcher.tell([Told(one.id, tuple(float(k) for k in range(8))) for one in first])
    assert searcher.ask(1)
    assert capsys.readouterr().out == ""
