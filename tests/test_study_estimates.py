"""Studies whose trials are estimated, and those with bounds: laws at every record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from economy_study import Shrunk, prepare, study, toy_decode
from study_journals import Shuffled, cut, essence_of, events_of
from toy_study import (
    ToySearcher,
    ToyStudyFactory,
    item_score,
)

from evomerge.errors import InputError, ReplayError
from evomerge.estimate import Endpoint, Estimation
from evomerge.extension import extend
from evomerge.feasibility import best_rows, violation
from evomerge.item_cache import Items
from evomerge.journal import JOURNAL, read
from evomerge.replay import verify
from evomerge.search.protocol import SearchProblem
from evomerge.study import Study
from evomerge.trial import Direction, Objective

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
