"""Studies that save item evaluations: racing, fresh items, budgets, estimates, constraints.

Whatever a study does to score less, it resumes from any record, it does not depend on the number
or the speed of workers, and no item is scored twice for one merge.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from economy_study import FEATURES, pooled, scored, study, toy_decode
from study_journals import cut, essence_of, events_of
from toy_study import (
    OBJECTIVES,
    ToySearcher,
    ToySplit,
    ToyStudyFactory,
    item_score,
    toy_splits,
    toy_study,
)

from evomerge.errors import InputError
from evomerge.estimate import mean_of
from evomerge.items import Resampled, TrialItems, drawn
from evomerge.journal import JOURNAL, read
from evomerge.racing import Racing
from evomerge.search.protocol import SearchProblem
from evomerge.study_record import History
from evomerge.study_view import StudyState, StudyView

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
