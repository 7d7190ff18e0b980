"""Successive halving: who goes on, what the others are told, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_journals import Shuffled, cut, essence_of, events_of
from toy_study import OBJECTIVES, ToySearcher, ToyStudyFactory, item_score, toy_splits, toy_study

from evomerge.errors import InputError
from evomerge.estimate import mean_of
from evomerge.halving import Halving, best_first
from evomerge.journal import JOURNAL, read
from evomerge.pareto import nondominated, ranked
from evomerge.search.protocol import SearchProblem
from evomerge.study import Study
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Failure

ONE = (OBJECTIVES[0],)
ITEMS = (tuple(f"a{index}" for index in range(40)), tuple(f"b{index}" for index in range(15)))
#: The searcher of the toy study asks in generations of six.
GENERATION = 6


def halved(directory: Path, **changes: Any) -> Study:
    arguments: dict[str, Any] = {
        "objectives": ONE, "splits": toy_splits(1, 40), "racing": Halving((5, 10)), "budget": 24,
        **changes,
    }  # fmt: skip
    return toy_study(directory, **arguments)


def searched(view: StudyView) -> list[int]:
    return [trial.number for trial in view.trials if trial.kind == "search"]


# -- arithmetic -----------------------------------------------------------------------------


def test_rungs_end_before_all_items_and_one_in_eta_goes_on_rounded_up() -> None:
    halving = Halving((10, 20, 40), 3)
    assert halving.stages(ITEMS) == (10, 20)
    assert halving.stages((ITEMS[1],)) == (10,)
    assert [halving.kept(entered) for entered in (1, 2, 3, 4, 9, 10)] == [1, 1, 1, 2, 3, 4]


def test_the_cost_of_a_bracket_is_what_its_rungs_sum_up_to() -> None:
    # 9 trials on 10 + 10 items, 3 on 10 more of the first and 5 of the second, 1 on 20 more.
    assert Halving((10, 20), 3).cost(ITEMS, 9) == 9 * 20 + 3 * 15 + 1 * 20
    assert Halving((100,)).cost(ITEMS, 4) == 4 * 55


@pytest.mark.parametrize(
    "wrong",
    [{"rungs": ()}, {"rungs": (20, 10)}, {"rungs": (0, 1)}, {"eta": 1}, {"bracket": 1}],
)  # fmt: skip
def test_settings_that_say_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Halving(**wrong)


points = st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 2), min_size=1, max_size=12)


@given(points)
def test_ranking_takes_front_after_front(losses: list[tuple[float, ...]]) -> None:
    order = ranked(losses)
    assert sorted(order) == list(range(len(losses)))
    rest = list(range(len(losses)))
    while rest:
        front = {rest[place] for place in nondominated([losses[row] for row in rest])}
        assert set(order[: len(front)]) == front
        order = order[len(front) :]
        rest = [row for row in rest if row not in front]


def test_within_a_front_its_ends_come_first_and_then_the_lonely() -> None:
    losses = [(0.0, 10.0), (1.0, 8.0), (2.0, 7.0), (6.0, 1.0), (10.0, 0.0)]
    # Crowding: rows 0 and 4 are ends; row 3 has gaps .8 + .7, row 2 .5 + .7, row 1 .2 + .3.
    assert ranked(losses) == (0, 4, 3, 2, 1)
    assert ranked([(2.0,), (1.0,), (2.0,)]) == (1, 0, 2)
    assert ranked([]) == ()


def test_what_keeps_its_constraints_comes_first_then_the_smaller_violation() -> None:
    losses = [(0.0,), (1.0,), (5.0,), (4.0,)]
    assert best_first(losses, [0.5, 0.1, 0.0, 0.0]) == (3, 2, 1, 0)


# -- a study that halves --------------------------------------------------------------------


def test_the_best_half_of_each_generation_goes_on(tmp_path: Path) -> None:
    view = halved(tmp_path / "s").run()
    numbers = searched(view)
    (order,) = view.items_of("search", numbers[0])
    rungs = {n: view.results["search", n].rung for n in numbers}
    for start in range(0, len(numbers), GENERATION):
        runners = numbers[start : start + GENERATION]
        for rung, kept in ((5, 3), (10, 2)):

            def worth(number: int, rung: int = rung) -> float:
                row = view.trials[number].recipe.table[0]
                return mean_of([item_score(row, 0, item) for item in order[:rung]])[0]

            best = sorted(runners, key=lambda n: (-worth(n), n))[:kept]
            assert {n for n in runners if rungs[n] != rung} == set(best)
            runners = [n for n in runners if n in best]
        assert [rungs[n] for n in runners] == [None, None]


def test_those_left_behind_are_told_their_estimate_with_its_error(tmp_path: Path) -> None:
    told: list[ToySearcher] = []

    def remember(problem: SearchProblem) -> ToySearcher:
        told.append(ToySearcher(problem))
        return told[-1]

    view = halved(tmp_path / "s", make_searcher=remember).run()
    left = 0
    for place, number in enumerate(searched(view)):
        result = view.results["search", number]
        evaluation = view.told(number)
        (score,) = evaluation.scores
        assert told[0].told[place].losses == (-score.value,)
        if result.rung is not None:
            left += 1
            assert len(score.items) == result.rung
            assert (score.value, score.standard_error) == mean_of(score.items)
            assert told[0].told[place].items == (), "not the items of the others"
    assert left == 16
    assert view.spending.stops == left
    # 4 generations: 6 trials on 5 items, 3 on 5 more, 2 on 30 more.
    spent = view.spending
    assert spent.search == 4 * (6 * 5 + 3 * 5 + 2 * 30)
    assert spent.saved == 24 * 40 - spent.search


def test_a_steady_searcher_is_halved_in_brackets(tmp_path: Path) -> None:
    view = halved(
        tmp_path / "s", searcher="cma", racing=Halving((5,), 4, bracket=8), budget=20
    ).run()
    rungs = [view.results["search", number].rung for number in searched(view)]
    assert [sum(rung is None for rung in rungs[at : at + 8]) for at in (0, 8, 16)] == [2, 2, 1]
    asks = [record["trial"] for record in events_of(tmp_path / "s", "ask")]
    assert asks == sorted(asks)


def test_finalists_went_farthest_and_are_completed(tmp_path: Path) -> None:
    view = halved(tmp_path / "s", finalists=12, budget=18).run()
    numbers = searched(view)
    whole = [n for n in numbers if view.results["search", n].rung is None]
    assert len(whole) == 6
    completed = [n for (split, n) in view.results if split == "complete"]
    # With 3 baselines, 3 more belong to the 12; they are of those that left last.
    assert len(completed) == 3
    assert all(view.results["search", n].rung == 10 for n in completed)
    assert all(view.results["complete", n].fresh == 30 for n in completed), "scored again"
    for number in completed:
        value = view.results["complete", number].value
        assert isinstance(value, Evaluation)
        assert value.seconds == {"score": 0.001}, "what its parts took is in the search result"
    assert set(whole) | set(completed) <= set(view.validation)
    for number in view.validation:
        evaluation = view.trials[number].evaluation
        assert evaluation is not None
        assert len(evaluation.scores[0].items) == 40


def test_an_estimate_from_few_items_is_on_no_front(tmp_path: Path) -> None:
    view = halved(tmp_path / "s", budget=12).run()
    # As if the study were still running: the front is the provisional one.
    lines = (tmp_path / "s" / JOURNAL).read_bytes().splitlines(keepends=True)
    events = [record["ev"] for record in read(tmp_path / "s").records]
    cut(tmp_path / "s", events.index("score") if "score" in events else len(lines) - 1)
    running = StudyView.load(tmp_path / "s")
    assert running.front_split == "search"
    assert all(running.results["search", n].rung is None for n in running.front)
    volumes = running.hypervolumes()
    for number, (before, after) in enumerate(pairwise(volumes), start=1):
        if view.results["search", number].rung is not None:
            assert after == before


@pytest.mark.parametrize("budget", [200, 457, 700])
@pytest.mark.parametrize("limit", [10.0, 0.5])
def test_a_budget_of_items_is_not_exceeded(tmp_path: Path, budget: int, limit: float) -> None:
    view = halved(tmp_path / "s", budget=None, item_budget=budget, limit=limit, finalists=1).run()
    spent = sum(
        view.results[split, n].fresh
        for (split, n) in view.results
        if split in ("search", "part") and n in searched(view)
    )
    assert 0 < spent <= budget
    assert spent > budget - Halving((5, 10)).cost(((*ITEMS[0],),), 7)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_failures_leave_their_place_empty_whoever_works(tmp_path: Path, count: int) -> None:
    def run(name: str, workers: int) -> Path:
        factory = ToyStudyFactory(tmp_path / f"{name}.log", limit=0.75)
        halved(tmp_path / name, make_pool=lambda: Shuffled(factory, workers)).run()
        return tmp_path / name

    first, second = run("one", 1), run("many", count)
    assert essence_of(first) == essence_of(second)
    view = StudyView.load(first)
    failed = [n for n in searched(view) if isinstance(view.results["search", n].value, Failure)]
    assert failed
    assert all(view.results["search", n].rung == 5 for n in failed)
    assert any(view.results["search", n].rung is None for n in searched(view))


class FailsLate(ToyStudyFactory):
    """Its worker fails where it is asked for the second rung of a heavy merge."""

    def __call__(self) -> Any:
        worker = super().__call__()
        real = worker.run

        class Late:
            def run(self, job: Any) -> Evaluation:
                if job.recipe.table[0][1] > 0.55 and not job.items[0][0].startswith("v"):
                    seen.setdefault(job.recipe.digest, 0)
                    seen[job.recipe.digest] += 1
                    if seen[job.recipe.digest] > 1:
                        raise RuntimeError("too heavy for more items")
                return real(job)

            def describe(self) -> dict[str, str]:
                return {}

        seen: dict[str, int] = {}
        return Late()


def test_a_study_whose_trials_fail_late_resumes_after_any_record(tmp_path: Path) -> None:
    def late(directory: Path) -> Study:
        factory = FailsLate(tmp_path / f"{directory.name}.log")
        return halved(
            directory, make_pool=lambda: Shuffled(factory, 2), budget=12, finalists=1,
            racing=Halving((5, 10)),
        )  # fmt: skip

    whole = tmp_path / "whole"
    view = late(whole).run()
    results = [view.results["search", n] for n in searched(view)]
    failures = [one for one in results if isinstance(one.value, Failure)]
    assert {one.rung for one in failures} & {10}, "the test must see a trial that fails later"
    records = read(whole).records
    data = (whole / JOURNAL).read_bytes()
    told = {r["trial"]: (r["status"], r.get("rung")) for r in events_of(whole, "tell")}
    parts = [index for index, record in enumerate(records) if record["ev"] in ("tell", "part")]
    for count in parts[4::5]:
        directory = tmp_path / f"cut{count}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(data)
        cut(directory, count)
        # The worker that fails at the second request is a new one: what failed after the cut
        # fails at a later rung, or not; what was recorded stays.
        before = {r["trial"]: (r["status"], r.get("rung")) for r in events_of(directory, "tell")}
        late(directory).run()
        after = {r["trial"]: (r["status"], r.get("rung")) for r in events_of(directory, "tell")}
        assert before.items() <= after.items()
        assert before.items() <= told.items()


def test_two_trials_of_one_merge_are_scored_once(tmp_path: Path) -> None:
    view = halved(
        tmp_path / "s", decode=lambda x: toy_study(tmp_path / "x").decode((0.5,) * len(x)),
        log=tmp_path / "log", budget=12,
    ).run()  # fmt: skip
    assert view.spending.search == 0  # the uniform baseline is this merge
    assert all(view.results["search", n].reused == 1 for n in searched(view))
    assert all(view.results["search", n].rung is None for n in searched(view))


def test_halving_is_refused_with_results_in_order_of_arrival(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="halving compares the trials of a bracket"):
        halved(tmp_path / "s", order="completion")


def test_a_constraint_counts_at_every_rung(tmp_path: Path) -> None:
    bounded = (replace(OBJECTIVES[0], minimum=-0.1), OBJECTIVES[1])
    view = halved(tmp_path / "s", objectives=bounded, splits=toy_splits(2, 40)).run()
    for start in range(0, 24, GENERATION):
        numbers = searched(view)[start : start + GENERATION]
        behind = [n for n in numbers if view.results["search", n].rung == 5]
        ahead = [n for n in numbers if n not in behind]
        items = view.items_of("search", numbers[0])[0][:5]

        def excess(number: int, items: tuple[str, ...] = items) -> float:
            row = view.trials[number].recipe.table[0]
            return max(0.0, -0.1 - mean_of([item_score(row, 0, item) for item in items])[0])

        if behind and any(excess(n) == 0 for n in behind):
            assert all(excess(n) == 0 for n in ahead)
        else:
            assert max(map(excess, ahead)) <= min(map(excess, behind))
