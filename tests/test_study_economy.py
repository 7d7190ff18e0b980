"""Studies that save item evaluations: racing, fresh items, budgets, estimates, constraints.

Whatever a study does to score less, it resumes from any record, it does not depend on the number
or the speed of workers, and no item is scored twice for one merge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from study_journals import Shuffled, cut, essence_of, events_of
from toy_study import (
    OBJECTIVES,
    ToySearcher,
    ToySplit,
    ToyStudyFactory,
    item_score,
    rounded,
    toy_splits,
    toy_study,
)

from evomerge.errors import InputError, ReplayError
from evomerge.estimate import Answers, Endpoint, Estimate, Estimation, mean_of
from evomerge.extension import extend
from evomerge.feasibility import best_rows, violation
from evomerge.halving import Halving
from evomerge.item_cache import Items
from evomerge.items import Resampled, TrialItems, drawn
from evomerge.journal import JOURNAL, read
from evomerge.racing import Racing
from evomerge.replay import verify
from evomerge.search.protocol import SearchProblem
from evomerge.study import Study
from evomerge.study_record import History
from evomerge.study_view import StudyState, StudyView
from evomerge.trial import Direction, Objective


class Shrunk:
    """An estimator for tests: the mean of the margins, which are ten times the scores.

    The plain mean of the same items is what it should be compared with.
    """

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        assert len(answers.margins) == len(answers.ids)
        return Estimate(fmean(answers.margins) / 10 + 0.001, 0.5, {})


class Own(Shrunk):
    """An estimator that knows the items of its own draw only, as weights of a design do."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        assert answers.ids == self._items[objective][: len(answers.ids)]
        return super().estimate(objective, answers)


def prepare(endpoints: Sequence[Endpoint], draw: int, n: int = 4) -> tuple[Items, Shrunk]:
    """Choose the items on which the endpoints differ most; later draws begin farther down."""
    design = []
    for objective in range(len(endpoints[0].answers)):
        rows = [one.answers[objective] for one in endpoints]
        spread = {
            item: max(row.scores[i] for row in rows) - min(row.scores[i] for row in rows)
            for i, item in enumerate(rows[0].ids)
        }
        best = sorted(spread, key=lambda item: (-spread[item], item))
        design.append(tuple(best[3 * draw :] + best[: 3 * draw])[:n])
    return tuple(design), Own(tuple(design))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "racing": {"racing": Racing((10, 20))},
    "resampled": {"resampled": Resampled(7)},
    "every": {"resampled": Resampled(7, every=4)},
    "raced": {"resampled": Resampled(25), "racing": Racing((10,))},
    "budget": {"budget": None, "item_budget": 300, "racing": Racing((10, 20))},
    "estimated": {
        "estimation": Estimation("shrunk", prepare, full_every=3, calibration=2), "graded": True,
    },
    "estimated race": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4),
        "racing": Racing((10, 15)),
        "graded": True,
    },
    "constrained": {
        "objectives": (replace(OBJECTIVES[0], minimum=-0.2), OBJECTIVES[1]),
        "racing": Racing((10, 20)),
    },
    "halving": {"racing": Halving((10, 20))},
    "halved brackets": {"racing": Halving((5, 10), 3, bracket=4), "resampled": Resampled(15)},
    "halved budget": {"budget": None, "item_budget": 600, "racing": Halving((5, 10))},
    "estimated halving": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4),
        "racing": Halving((10, 15)),
        "graded": True,
    },
    "refreshed": {
        "estimation": Estimation("shrunk", prepare, full_every=5, refresh="generation"),
        "graded": True,
    },
    "refreshed race": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4, refresh=3),
        "racing": Racing((10, 15)),
        "graded": True,
    },
    "refreshed halving": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4, refresh=5),
        "racing": Halving((10, 15), bracket=6),
        "graded": True,
    },
    "infeasible": {"objectives": (OBJECTIVES[0], replace(OBJECTIVES[1], maximum=-1.0))},
}  # fmt: skip


def study(directory: Path, feature: str, **changes: Any) -> Study:
    """Return a study of 30 search items; its candidates repeat, so that there is much to reuse."""
    arguments = {
        "splits": toy_splits(2, 30), "budget": 12, "decode": rounded, **FEATURES[feature], **changes
    }  # fmt: skip
    return toy_study(directory, **arguments)


def pooled(directory: Path, feature: str, workers: int) -> Study:
    graded = FEATURES[feature].get("graded", False)
    factory = ToyStudyFactory(directory.parent / f"{directory.name}.log", graded=graded)
    return study(directory, feature, make_pool=lambda: Shuffled(factory, workers))


def scored(log: Path) -> Counter[tuple[str, str]]:
    """Return how often each (recipe, item) was scored."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines() if log.exists() else ():
        digest, *items = line.split()
        counts.update((digest, item) for item in items)
    return counts


# -- laws that hold for every feature -------------------------------------------------------


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_study_cut_after_any_record_ends_the_same_and_scores_nothing_twice(
    tmp_path: Path, feature: str, every: int
) -> None:
    whole = tmp_path / "whole"
    pooled(whole, feature, 2).run()
    essence, done = essence_of(whole), StudyView.load(whole)
    records = read(whole).records
    data = (whole / JOURNAL).read_bytes()
    # The default run takes a sample of the records; another one for each feature.
    for count in range(list(FEATURES).index(feature) % every, len(records), every):
        directory = tmp_path / f"cut{count}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(data)
        cut(directory, count)
        before = History.of(read(directory).records, "")
        view = pooled(directory, feature, 2).run()
        assert essence_of(directory) == essence, count
        assert (view.front, view.knee) == (done.front, done.knee)
        known = {
            (before.digests[number], item)
            for split, number in before.results
            for ids, score in zip(
                before.items_of(split, number),
                before.results[split, number].value.scores,  # type: ignore[union-attr]
                strict=True,
            )
            for item in ids[: len(score.items)]
        }
        again = scored(tmp_path / f"cut{count}.log")
        assert not known & set(again), "an item was scored again after a restart"
        assert set(again.values()) <= {1}


@pytest.mark.parametrize("feature", FEATURES)
def test_workers_and_their_speed_change_nothing(tmp_path: Path, feature: str) -> None:
    essences = []
    for workers in (1, 2, 3):
        directory = tmp_path / str(workers)
        pooled(directory, feature, workers).run()
        essences.append(essence_of(directory))
        counts = scored(tmp_path / f"{workers}.log")
        assert set(counts.values()) == {1}, "an item was scored twice"
        results = StudyView.load(directory).results.values()
        assert sum(result.fresh for result in results) == counts.total()
    assert essences[0] == essences[1] == essences[2]


@pytest.mark.parametrize("feature", FEATURES)
def test_a_finished_study_is_read_back_as_it_was_told(tmp_path: Path, feature: str) -> None:
    told: list[ToySearcher] = []

    def remember(problem: SearchProblem) -> ToySearcher:
        told.append(ToySearcher(problem))
        return told[-1]

    study(tmp_path / "s", feature, make_searcher=remember).run()
    study(tmp_path / "s", feature, make_searcher=remember).run()
    assert told[0].told == told[1].told
    assert told[0].problem == told[1].problem


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "plain"])
def test_a_feature_that_comes_or_goes_is_refused(tmp_path: Path, feature: str) -> None:
    study(tmp_path / "with", feature).run()
    with pytest.raises(InputError, match="begun with other settings"):
        study(tmp_path / "with", "plain").run()
    study(tmp_path / "without", "plain").run()
    with pytest.raises(InputError, match="begun with other settings"):
        study(tmp_path / "without", feature).run()


# -- item cache -----------------------------------------------------------------------------


def test_only_unknown_items_are_asked_for(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "resampled", log=tmp_path / "log", budget=24).run()
    partly = [
        result
        for (split, number), result in view.results.items()
        if split == "search" and 0 < result.fresh < 14
    ]
    assert partly, "the test must see a merge that returns with other items"
    for split, number in view.results:
        items = view.items_of(split, number)
        row = view.trials[number].recipe.table[0]
        for k, score in enumerate(view.evaluation(split, number).scores):
            assert score.items == tuple(item_score(row, k, item) for item in items[k])
            assert (score.value, score.standard_error) in (
                mean_of(score.items),
                (score.value, 0.01),
            )


def test_an_item_that_all_splits_share_is_scored_once(tmp_path: Path) -> None:
    splits = (toy_splits(1)[0], ToySplit(("only",), ("only",), ("only",)))
    view = toy_study(tmp_path / "s", splits=splits, log=tmp_path / "log", budget=4).run()
    counts = scored(tmp_path / "log")
    assert counts.total() == len(counts)
    assert sum(item == "only" for _, item in counts) == len(view.trials)
    for number, evaluation in view.test.items():
        search = view.trials[number].evaluation
        assert search is not None
        assert evaluation.scores[1].items == search.scores[1].items


# -- racing ---------------------------------------------------------------------------------


def test_stopped_trials_are_worse_than_a_reference_everywhere(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "racing", budget=30).run()
    stopped = {n: r for (s, n), r in view.results.items() if s == "search" and r.rung is not None}
    assert stopped, "the test must see a race that ends early"
    for number, result in stopped.items():
        table = view.trials[number].recipe.table[0]
        evaluation = view.told(number)
        assert all(len(score.items) == result.rung for score in evaluation.scores)
        earlier = [t for t in view.trials if t.number < number and t.number not in stopped]
        assert any(
            all(
                objective.loss(fmean(item_score(t.recipe.table[0], k, item) for item in ids))
                < objective.loss(fmean(item_score(table, k, item) for item in ids))
                for k, (objective, ids) in enumerate(
                    zip(OBJECTIVES, view.items_of("search", number), strict=True)
                )
            )
            for t in earlier
        )
    spending = view.spending
    assert spending.stops == len(stopped)
    assert spending.saved >= sum(2 * (30 - (r.rung or 0)) for r in stopped.values())


def test_finalists_are_completed_first(tmp_path: Path) -> None:
    # With as many finalists as trials every stopped one is chosen, so every one is completed.
    view = study(tmp_path / "s", "racing", budget=30, finalists=60).run()
    stopped = [n for (s, n), r in view.results.items() if s == "search" and r.rung is not None]
    assert stopped
    completed = [n for (s, n) in view.results if s == "complete"]
    assert sorted(completed) == sorted(set(completed) & set(stopped))
    assert completed
    for number in view.validation:
        evaluation = view.trials[number].evaluation
        assert evaluation is not None
        assert all(len(score.items) == 30 for score in evaluation.scores)
    for number in completed:
        assert view.results["complete", number].fresh < 60, "the first items were scored again"


def test_the_order_of_a_race_is_by_chance_and_the_same_for_all(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "racing").run()
    orders = {view.items_of("search", t.number) for t in view.trials if t.kind == "search"}
    (order,) = orders
    assert order != view.items_of("search", 0)
    assert [sorted(ids) for ids in order] == [sorted(ids) for ids in view.items_of("search", 0)]


def test_a_worker_that_stops_without_a_reason_gives_no_result(tmp_path: Path) -> None:
    class Lazy(ToyStudyFactory):
        def __call__(self) -> Any:
            worker = super().__call__()
            real = worker.run

            class Stopping:
                def run(self, job: Any) -> Any:
                    done = real(replace(job, race=None))
                    if job.race is None:
                        return done
                    few = [replace(score, items=score.items[:10]) for score in done.scores]
                    return replace(done, scores=tuple(few))

                def describe(self) -> dict[str, str]:
                    return {}

            return Stopping()

    from evomerge.errors import NothingUsableError
    from evomerge.pool import SerialPool

    with pytest.raises(NothingUsableError, match=r"stopped its race after 10 \+ 10 items, without"):
        study(
            tmp_path / "s", "racing", make_pool=lambda: SerialPool(Lazy(tmp_path / "log")),
            decode=lambda x: toy_study(tmp_path / "x").decode(tuple(0.5 + v / 1000 for v in x)),
        ).run()  # fmt: skip


# -- budget in items ------------------------------------------------------------------------


@pytest.mark.parametrize("racing", [None, Racing((10, 20))])
@pytest.mark.parametrize("budget", [None, 9])
def test_a_budget_of_items_is_never_exceeded_and_reuse_is_free(
    tmp_path: Path, racing: Racing | None, budget: int | None
) -> None:
    view = study(
        tmp_path / "s", "plain", budget=budget, item_budget=500, racing=racing
    ).run()  # fmt: skip
    trials = [t.number for t in view.trials if t.kind == "search"]
    spent = sum(view.results["search", n].fresh for n in trials)
    assert spent <= 500
    if budget is None:
        assert spent > 500 - 60, "another trial could be afforded"
        assert len(trials) > 500 // 60, "what was known or not scored was charged"
    else:
        assert len(trials) == 9


def test_a_search_that_only_repeats_itself_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.window.FREE_IN_A_ROW", 12)
    one = lambda x: toy_study(tmp_path / "x").decode((0.5,) * 4)  # noqa: E731
    view = study(tmp_path / "s", "budget", decode=one).run()
    assert view.state is StudyState.FINISHED
    # Three baselines, one of which is that merge, and the window behind the twelfth.
    assert 3 + 12 <= len(view.trials) <= 3 + 12 + 3


def test_failed_trials_cost_what_they_were_asked(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "budget", racing=None, limit=0.4, decode=toy_decode).run()
    failed = [t for t in view.trials if t.failure is not None and t.kind == "search"]
    fresh = sum(view.results["search", t.number].fresh for t in view.trials if t.kind == "search")
    assert failed
    assert 300 - 60 < fresh + 60 * len(failed) <= 300


def toy_decode(x: tuple[float, ...]) -> Any:
    from toy_study import decode

    return decode(x)


# -- fresh items ----------------------------------------------------------------------------


def test_generations_share_items_and_baselines_are_scored_on_all(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "resampled", budget=24, decode=toy_decode).run()
    sets = [view.items_of("search", t.number) for t in view.trials if t.kind == "search"]
    generations = [sets[start : start + 6] for start in range(0, 24, 6)]
    assert all(len(set(generation)) == 1 for generation in generations)
    assert len({generation[0] for generation in generations}) == 4
    assert all(len(ids) == 7 for one in sets for ids in one)
    for trial in view.baselines:
        assert [len(ids) for ids in view.items_of("search", trial.number)] == [30, 30]
    assert len(events_of(tmp_path / "s", "items")) == 4


def test_draws_are_uniform_stable_and_shared_by_objectives_with_the_same_items() -> None:
    pool = (tuple(map(str, range(100))),) * 2
    first, second = drawn(pool, 3, 0, 20)
    assert first == second
    assert first != drawn(pool, 3, 1, 20)[0]
    assert first != drawn(pool, 4, 0, 20)[0]
    assert first == drawn(pool, 3, 0, None)[0][:20]
    counts: Counter[str] = Counter()
    for draw in range(400):
        counts.update(drawn(pool, 0, draw, 20)[0])
    # 400 draws of 20 in 100: 80 each, standard deviation 8.
    assert all(abs(count - 80) < 5 * 8 for count in counts.values())
    small = TrialItems((("a", "b"), ("c",)), 0, Resampled(9))
    assert small.cost(0) == 3
    assert sorted(small.of(0, 0).items[0]) == ["a", "b"]


# -- estimates ------------------------------------------------------------------------------


def test_values_are_estimates_with_the_subset_mean_beside_them(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "estimated", decode=toy_decode).run()
    assert [t.label for t in view.trials[3:5]] == ["calibration:0", "calibration:1"]
    searched = view.trials[5:]
    for index, trial in enumerate(searched):
        result = view.results["search", trial.number]
        evaluation = view.told(trial.number)
        items = view.items_of("search", trial.number)
        if (index + 1) % 3 == 0:
            assert [len(ids) for ids in items] == [30, 30]
            assert evaluation.values == pytest.approx(
                [fmean(score.items) for score in evaluation.scores]
            )
            few = [
                tuple(
                    item_score(trial.recipe.table[0], k, item)
                    for item in view.items_of("search", 5)[k]
                )
                for k in range(2)
            ]
            assert result.beside["subset mean"].values == pytest.approx([fmean(v) for v in few])
            assert result.beside["estimate"].values == pytest.approx(
                [fmean(v) + 0.001 for v in few]
            )
        else:
            assert [len(ids) for ids in items] == [4, 4]
            means = result.beside["subset mean"].values
            assert evaluation.values == pytest.approx([value + 0.001 for value in means])
            assert [score.standard_error for score in evaluation.scores] == [0.5, 0.5]
    audits = view.audits
    assert [audit.number for audit in audits] == [t.number for t in searched[2::3]]
    for audit in audits:
        beside = view.results["search", audit.number].beside
        assert audit.full == view.told(audit.number).values
        assert audit.estimate == beside["estimate"]
        assert audit.mean == beside["subset mean"]


def test_endpoints_are_base_experts_and_calibration(tmp_path: Path) -> None:
    seen: list[Sequence[Endpoint]] = []

    def remember(endpoints: Sequence[Endpoint], draw: int) -> tuple[Items, Shrunk]:
        seen.append(endpoints)
        return prepare(endpoints, draw)

    estimation = Estimation("shrunk", remember, calibration=2)
    view = study(tmp_path / "s", "estimated", estimation=estimation).run()
    labels = [endpoint.label for endpoint in seen[0]]
    assert labels == ["base", "expert:far", "calibration:0", "calibration:1"]
    for endpoint, number in zip(seen[0], (0, 2, 3, 4), strict=True):
        for k, answers in enumerate(endpoint.answers):
            assert answers.ids == view.items_of("search", 0)[k]
            assert answers.scores == view.told(number).scores[k].items
            assert answers.margins == tuple(10 * score for score in answers.scores)
    study(tmp_path / "s", "estimated", estimation=estimation).run()
    assert seen[1] == seen[0], "after a restart the estimator learns from the same answers"


def test_an_estimator_that_chooses_differently_after_a_restart_is_refused(tmp_path: Path) -> None:
    study(tmp_path / "s", "estimated").run()
    other = Estimation("shrunk", partial(prepare, n=5), full_every=3, calibration=2)
    with pytest.raises(ReplayError, match="the journal has other items for it; what chooses them"):
        study(tmp_path / "s", "estimated", estimation=other).run()


def test_an_estimator_that_chooses_unknown_items_is_refused(tmp_path: Path) -> None:
    wrong = Estimation("wild", lambda endpoints, draw: ((("s0.0",), ("s0.0",)), Shrunk()))
    with pytest.raises(InputError, match="wild chose 1 items for from_zero: expected at least 1"):
        study(tmp_path / "s", "estimated", estimation=wrong).run()


@pytest.mark.parametrize(("refresh", "shared"), [("generation", 6), (4, 4)])
def test_an_estimators_items_are_common_to_a_generation_and_then_others(
    tmp_path: Path, refresh: Any, shared: int
) -> None:
    estimation = Estimation("shrunk", prepare, full_every=5, refresh=refresh)
    view = study(
        tmp_path / "s", "refreshed", estimation=estimation, budget=24, decode=toy_decode
    ).run()
    searched = [trial for trial in view.trials if trial.kind == "search"]
    draws: list[set[Items]] = [set() for _ in range(24 // shared)]
    for index, trial in enumerate(searched):
        result = view.results["search", trial.number]
        items = view.items_of("search", trial.number)
        if (index + 1) % 5:
            draws[index // shared].add(items)
            assert [len(ids) for ids in items] == [4, 4]
            means = result.beside["subset mean"].values
            assert view.told(trial.number).values == pytest.approx([m + 0.001 for m in means])
        else:
            assert [len(ids) for ids in items] == [30, 30]
    assert all(len(draw) == 1 for draw in draws)
    assert len(set.union(*draws)) == len(draws)
    # A check is looked at through the items of its own generation.
    for index in (4, 9, 14, 19):
        (few,) = draws[index // shared]
        row = searched[index].recipe.table[0]
        expected = [fmean(item_score(row, k, item) for item in few[k]) for k in range(2)]
        beside = view.results["search", searched[index].number].beside
        assert beside["subset mean"].values == pytest.approx(expected)
        assert beside["estimate"].values == pytest.approx([mean + 0.001 for mean in expected])
    assert len(events_of(tmp_path / "s", "items")) == len(draws)


def test_a_refreshed_study_that_is_cut_in_a_generation_goes_on_with_its_items(
    tmp_path: Path,
) -> None:
    whole = study(tmp_path / "s", "refreshed", budget=18).run()
    middle = next(
        n for n, record in enumerate(read(tmp_path / "s").records)
        if record["ev"] == "tell" and record["trial"] == len(whole.baselines) + 8
    )  # fmt: skip
    cut(tmp_path / "s", middle)
    again = study(tmp_path / "s", "refreshed", budget=18).run()
    assert again.front == whole.front
    for trial in whole.trials:
        assert again.items_of("search", trial.number) == whole.items_of("search", trial.number)
        assert again.told(trial.number).values == whole.told(trial.number).values


@pytest.mark.parametrize("feature", ["refreshed", "refreshed race", "refreshed halving"])
def test_when_a_refreshed_study_is_extended_does_not_matter(tmp_path: Path, feature: str) -> None:
    late = tmp_path / "late"
    study(late, feature).run()
    data = (late / JOURNAL).read_bytes()
    extend(late, trials=9)
    end = study(late, feature).run()
    assert verify(late, study(late, feature)).problems == ()
    for records in (12, 20):
        early = tmp_path / f"early{records}"
        early.mkdir()
        (early / JOURNAL).write_bytes(data)
        cut(early, records)
        extend(early, trials=9)
        view = study(early, feature).run()
        assert (view.front, view.knee) == (end.front, end.knee)
        for trial in end.trials:
            assert view.items_of("search", trial.number) == end.items_of("search", trial.number)
            assert view.told(trial.number) == end.told(trial.number)


@pytest.mark.parametrize("refresh", ["generation", 3])
def test_a_refreshed_study_that_is_told_as_results_come_is_continued_exactly(
    tmp_path: Path, refresh: Any
) -> None:
    estimation = Estimation("shrunk", prepare, full_every=5, refresh=refresh)

    def make(directory: Path) -> Study:
        factory = ToyStudyFactory(tmp_path / "log", graded=True)
        return study(
            directory, "refreshed", estimation=estimation, order="completion", parallel=4,
            make_pool=lambda: Shuffled(factory, 4),
        )  # fmt: skip

    whole = tmp_path / "whole"
    make(whole).run()
    assert verify(whole, make(whole)).problems == ()
    data, total = (whole / JOURNAL).read_bytes(), len(read(whole).records)
    for records in range(4, total, 7):
        directory = tmp_path / f"cut{records}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(data)
        cut(directory, records)
        known = essence_of(directory)
        make(directory).run()
        assert known.items() <= essence_of(directory).items()
        assert verify(directory, make(directory)).problems == ()


def test_another_draw_after_a_restart_is_refused(tmp_path: Path) -> None:
    study(tmp_path / "s", "refreshed").run()
    other = Estimation("shrunk", lambda e, d: prepare(e, 2 * d), full_every=5, refresh="generation")
    with pytest.raises(ReplayError, match="the journal has other items for it; what chooses them"):
        study(tmp_path / "s", "refreshed", estimation=other).run()


def test_draws_of_different_sizes_are_refused(tmp_path: Path) -> None:
    growing = Estimation("shrunk", lambda e, d: prepare(e, d, 4 + d), refresh="generation")
    with pytest.raises(InputError, match="chose 5 items for near_one: expected 4, as in its first"):
        study(tmp_path / "s", "refreshed", estimation=growing).run()


# -- constraints ----------------------------------------------------------------------------

BOUNDED = (
    Objective("acc", minimum=0.5),
    Objective("tokens", Direction.MINIMIZE, "tokens", maximum=200.0),
)


def test_violations_add_up_in_units_of_the_bound() -> None:
    assert violation(BOUNDED, (0.5, 200.0)) == 0
    assert violation(BOUNDED, (0.4, 200.0)) == pytest.approx(0.2)
    assert violation(BOUNDED, (0.4, 300.0)) == pytest.approx(0.7)
    assert violation((Objective("zero", minimum=0.0),), (-3.0,)) == 3.0
    assert math.isfinite(violation(BOUNDED, (-1.7e308, 1.7e308)))


def test_the_front_is_feasible_first() -> None:
    losses = [(0.0, 0.0), (1.0, 2.0), (2.0, 1.0), (3.0, 3.0)]
    assert best_rows(losses, [0.1, 0.0, 0.0, 0.0]) == (1, 2)
    assert best_rows(losses, [0.3, 0.2, 0.1, 0.2]) == (2,)
    assert best_rows(losses, [0.2, 0.2, 0.3, 0.2]) == (0,)
    assert best_rows([], []) == ()


def test_a_violation_is_told_behind_everything_measured_and_ahead_of_failures(
    tmp_path: Path,
) -> None:
    searchers: list[ToySearcher] = []

    def remember(problem: SearchProblem) -> ToySearcher:
        searchers.append(ToySearcher(problem))
        return searchers[-1]

    view = study(
        tmp_path / "s", "constrained", make_searcher=remember, decode=toy_decode, budget=40,
        racing=None, limit=1.3,
    ).run()  # fmt: skip
    objectives = view.objectives
    assert objectives[0].minimum == -0.2, "the bound did not survive the journal"
    seen: list[tuple[float, ...]] = []
    kinds = Counter[str]()
    for number, told in [(n, None) for n in range(3)] + [
        (one.id + 3, one) for one in searchers[0].told
    ]:
        evaluation = view.trials[number].evaluation
        raw = None
        if evaluation is not None:
            pairs = zip(objectives, evaluation.values, strict=True)
            raw = tuple(objective.loss(value) for objective, value in pairs)
            seen.append(raw)
        if told is None:
            continue
        worst = [max(column) for column in zip(*seen, strict=True)]
        full = [w + (w - min(c)) for w, c in zip(worst, zip(*seen, strict=True), strict=True)]
        if evaluation is None:
            assert told.losses == tuple(full)
            kinds["failed"] += 1
        elif evaluation.values[0] < -0.2:
            assert not told.failed
            assert all(w < one < f for w, one, f in zip(worst, told.losses, full, strict=True))
            kinds["violates"] += 1
        else:
            assert told.losses == raw
            kinds["fine"] += 1
    assert min(kinds["failed"], kinds["violates"], kinds["fine"]) > 0, kinds
    assert view.feasible
    for number in view.front:
        assert view.validation[number].values[0] >= -0.2


def test_where_nothing_is_feasible_the_least_violation_is_reported(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "infeasible").run()
    assert not view.feasible
    least = min(view.validation, key=lambda n: view.validation[n].values[1])
    assert view.front == (least,)
    assert view.knee == least
    value = view.validation[least].values[1]
    assert view.violation == pytest.approx(value + 1.0)


def test_the_larger_the_violation_the_larger_the_penalty() -> None:
    from evomerge.telling import Teller
    from evomerge.trial import Evaluation, Score

    def evaluation(*values: float) -> Evaluation:
        return Evaluation(tuple(Score(value, 0.0, (value,)) for value in values), {})

    teller = Teller(BOUNDED, scalarise=False)
    for values in ((0.9, 100.0), (0.6, 150.0)):
        teller.measure(evaluation(*values))
    told = [teller.told(evaluation(acc, 1e300)) for acc in (0.4, 0.2, -1e300)]
    told.insert(0, teller.told(evaluation(0.4999, 100.0)))
    for column in zip(*told, strict=True):
        assert list(column) == sorted(column)
        assert all(map(math.isfinite, column))
    assert told[0][0] < told[1][0]
    assert all(loss <= limit for loss, limit in zip(told[-1], teller.penalty(), strict=True))
