from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from toy_study import (
    DIMENSION,
    OBJECTIVES,
    ToySearcher,
    ToySplit,
    ToyStudyFactory,
    ToyStudyWorker,
    decode,
    item_score,
    recipe,
    rounded,
    toy_study,
)

from evomerge.errors import (
    InputError,
    Interrupted,
    NothingUsableError,
    ReplayError,
    StorageError,
)
from evomerge.evaluations import checked
from evomerge.journal import JOURNAL, Journal, encode, hexes, read, unhexes
from evomerge.pool import SerialPool
from evomerge.search.protocol import Candidate, SearchProblem
from evomerge.study import Baseline, Progress, StudyListener
from evomerge.study_record import Result, Split
from evomerge.study_view import StudyState, StudyView
from evomerge.trial import (
    Direction,
    Evaluation,
    Failure,
    Job,
    Objective,
    Outcome,
    Score,
    Trial,
    TrialState,
)


def _losses(evaluation: Evaluation | None) -> tuple[float, ...]:
    assert evaluation is not None
    pairs = zip(OBJECTIVES, evaluation.values, strict=True)
    return tuple(objective.loss(value) for objective, value in pairs)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def _events(directory: Path, *events: str) -> list[dict[str, Any]]:
    return [record for record in read(directory).records if record["ev"] in events]


def _essence(directory: Path) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """Asks and results as the journal has them, without times, workers and their order."""
    essence: dict[tuple[str, ...], tuple[Any, ...]] = {}
    for record in _events(directory, "ask", "tell", "score"):
        key = (record["ev"], record.get("split", ""), str(record["trial"]))
        assert key not in essence
        fields = ("x", "table", "digest", "status", "values", "items", "message", "reused")
        essence[key] = tuple(json.dumps(record.get(field)) for field in fields)
    return essence


# -- a whole study --------------------------------------------------------------------------


def test_scores_front_and_choice_are_what_the_formula_gives(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s").run()
    assert view.state is StudyState.FINISHED
    assert [trial.label for trial in view.baselines] == ["base", "uniform", "expert:far"]
    assert [trial.number for trial in view.trials] == list(range(23))
    for trial in view.trials:
        assert trial.state is TrialState.DONE
        assert trial.evaluation is not None
        for k, score in enumerate(trial.evaluation.scores):
            expected = tuple(
                item_score(trial.recipe.table[0], k, f"s{k}.{index}") for index in range(3)
            )
            assert score.items == expected
            assert score.value == fmean(expected)
    losses = {number: _losses(one) for number, one in view.validation.items()}
    assert {0, 1, 2} <= set(losses), "baselines are always scored again"
    front = [n for n in losses if not any(_dominates(losses[other], losses[n]) for other in losses)]
    assert view.front == tuple(front)
    assert view.front_split == "validation"
    assert view.knee in view.front
    assert set(view.test) == {*view.front, 0, 1, 2}
    searched = {t.number: _losses(t.evaluation) for t in view.trials}
    for number in set(losses) - {0, 1, 2}:
        better = [n for n in searched if _dominates(searched[n], searched[number])]
        assert set(better) <= set(losses), "a finalist was preferred to a trial that is better"


def test_recipes_and_points_survive_the_journal_exactly(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s").run()
    for trial, record in zip(view.trials, _events(tmp_path / "s", "ask"), strict=True):
        assert trial.recipe.digest == record["digest"]
        if trial.kind == "search":
            assert trial.x is not None
            assert trial.recipe == decode(trial.x)
    assert len(_events(tmp_path / "s", "frame")) == 1, "what recipes share is written once"


def test_every_ask_is_on_disk_before_its_job_runs(tmp_path: Path) -> None:
    directory = tmp_path / "s"

    class Watching(SerialPool):
        def submit(self, job: Job) -> None:
            asked = [record["trial"] for record in _events(directory, "ask")]
            assert job.number in asked
            super().submit(job)

    factory = ToyStudyFactory(tmp_path / "log")
    toy_study(directory, make_pool=lambda: Watching(factory)).run()


def test_every_result_is_on_disk_before_the_searcher_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "s"

    class Watching(ToySearcher):
        def tell(self, results: Sequence[Any]) -> None:
            told = [record["trial"] for record in _events(directory, "tell")]
            assert all(result.id + 3 in told for result in results)
            super().tell(results)

    toy_study(directory, make_searcher=Watching).run()


class _Shuffled(SerialPool):
    """Four workers that finish in an order of their own."""

    def __init__(self, factory: ToyStudyFactory, workers: int) -> None:
        super().__init__(factory)
        self._count = workers

    @property
    def workers(self) -> int:
        return self._count

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        self._queue.reverse()
        return super().wait(timeout)


@pytest.mark.parametrize("searcher", ["toy", "cma", "de", "nsga2", "random"])
def test_workers_and_their_speed_do_not_change_a_search(tmp_path: Path, searcher: str) -> None:
    scalarise = searcher in {"cma", "de", "random"}
    essences = []
    for workers in (1, 2, 4):
        directory = tmp_path / str(workers)
        factory = ToyStudyFactory(tmp_path / "log")
        toy_study(
            directory,
            searcher=searcher,
            scalarise=scalarise,
            parallel=4,
            make_pool=lambda f=factory, w=workers: _Shuffled(f, w),
        ).run()
        essences.append(_essence(directory))
    assert essences[0] == essences[1] == essences[2]
    orders = [[r["trial"] for r in _events(tmp_path / str(w), "tell")] for w in (1, 4)]
    assert orders[0] != orders[1], "the test must see another order of completion"


def test_searcher_is_told_in_ask_order_and_the_window_is_kept(tmp_path: Path) -> None:
    outstanding: list[int] = []
    order: list[int] = []

    class Watching(ToySearcher):
        def ask(self, n: int) -> Sequence[Candidate]:
            assert n == 1
            given = super().ask(n)
            outstanding.append(self.asked - len(self.told))
            return given

        def tell(self, results: Sequence[Any]) -> None:
            order.extend(result.id for result in results)
            super().tell(results)

    factory = ToyStudyFactory(tmp_path / "log")
    toy_study(tmp_path / "s", make_searcher=Watching, make_pool=lambda: _Shuffled(factory, 3)).run()
    assert order == list(range(20))
    assert max(outstanding) == 3


def test_baselines_in_the_space_warm_the_searcher(tmp_path: Path) -> None:
    problems: list[SearchProblem] = []

    def remember(problem: SearchProblem) -> ToySearcher:
        problems.append(problem)
        return ToySearcher(problem)

    view = toy_study(tmp_path / "m", make_searcher=remember).run()
    toy_study(tmp_path / "s", make_searcher=remember, scalarise=True).run()
    assert [point.x for point in problems[0].warm] == [(0.25,) * 4, (0.5,) * 4]
    assert problems[0].objectives == 2
    assert problems[1].objectives == 1
    for index in (0, 1):
        losses = _losses(view.trials[index].evaluation)
        assert problems[0].warm[index].losses == losses
        mean = (2 * losses[0] + losses[1]) / 3
        assert problems[1].warm[index].losses == pytest.approx((mean,), rel=1e-12)


def test_a_scalarised_study_recommends_the_best_weighted_mean(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s", scalarise=True, searcher="cma").run()
    means = {}
    for number in view.front:
        losses = _losses(view.validation[number])
        means[number] = (2 * losses[0] + losses[1]) / 3
    assert view.knee == min(means, key=means.__getitem__)


def test_with_one_objective_the_runners_up_are_scored_again_too(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s", objectives=OBJECTIVES[:1], finalists=5).run()
    values = {t.number: t.evaluation.values[0] for t in view.trials if t.evaluation}
    ranked = sorted(values, key=lambda number: -values[number])
    assert set(view.validation) == {0, 1, 2, *ranked[:5]}
    best = max(view.validation, key=lambda number: view.validation[number].values[0])
    assert view.knee == best


def test_without_validation_items_the_front_is_by_search_scores(tmp_path: Path) -> None:
    splits = tuple(ToySplit((f"s{k}",), (), ()) for k in range(2))
    view = toy_study(tmp_path / "s", splits=splits).run()
    assert view.front_split == "search"
    assert not view.validation
    assert not view.test
    assert view.front


def test_one_merge_stood_twice_on_the_front(tmp_path: Path) -> None:
    x = (0.6,) * DIMENSION
    twins = (Baseline("uniform", x, decode(x)), Baseline("task_arithmetic:0.5", x, decode(x)))
    _, second = twins
    view = toy_study(tmp_path / "s", baselines=twins, budget=1, finalists=1).run()
    assert set(view.validation) >= {0, 1}
    assert 1 not in view.front
    lines = (tmp_path / "s" / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / "s" / JOURNAL).write_bytes(b"".join(lines[:-1]))  # without the last word
    assert 1 not in StudyView.load(tmp_path / "s").front
    assert second.recipe.digest == view.trials[0].recipe.digest


# -- reuse and failure ----------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_equal_recipes_are_evaluated_once(tmp_path: Path, workers: int) -> None:
    factory = ToyStudyFactory(tmp_path / "log")
    view = toy_study(
        tmp_path / "s", decode=rounded, make_pool=lambda: _Shuffled(factory, workers)
    ).run()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)), "the same recipe was scored twice on the same items"
    reused = [r for r in _events(tmp_path / "s", "tell") if "reused" in r]
    assert reused, "the test must see a repeated recipe"
    assert view.counts.reused == len(reused)
    for record in reused:
        original = view.trials[record["reused"]]
        assert original.recipe == view.trials[record["trial"]].recipe
        assert original.evaluation is not None
        assert unhexes(record["values"]) == original.evaluation.values
    digests = [view.trials[number].recipe.digest for number in view.validation if number > 2]
    assert len(digests) == len(set(digests)), "one merge stands twice among the finalists"


def test_failed_trials_get_a_penalty_and_never_lead(tmp_path: Path) -> None:
    searchers: list[ToySearcher] = []

    def remember(problem: SearchProblem) -> ToySearcher:
        searchers.append(ToySearcher(problem))
        return searchers[-1]

    view = toy_study(tmp_path / "s", limit=0.6, make_searcher=remember).run()
    failed = [told for told in searchers[0].told if told.failed]
    assert 0 < len(failed) < 20
    seen = [_losses(view.trials[0].evaluation), _losses(view.trials[1].evaluation)]
    assert view.trials[2].failure is not None
    assert view.trials[2].failure.message == "RuntimeError: weight 3.0 is too heavy"
    for told in searchers[0].told:
        if told.failed:
            columns = list(zip(*seen, strict=True))
            assert told.losses == tuple(max(c) + (max(c) - min(c)) for c in columns)
            assert told.items == ()
        else:
            seen.append(told.losses)
            assert told.losses == _losses(view.trials[told.id + 3].evaluation)
    assert not {told.id + 3 for told in failed} & {*view.front, *view.validation}
    assert view.counts.failed == len(failed) + 1


def test_the_first_penalty_without_any_success_is_fixed(tmp_path: Path) -> None:
    searchers: list[ToySearcher] = []

    def remember(problem: SearchProblem) -> ToySearcher:
        searchers.append(ToySearcher(problem))
        return searchers[-1]

    with pytest.raises(NothingUsableError):
        toy_study(tmp_path / "s", limit=-9.0, make_searcher=remember).run()
    assert searchers[0].told[0].losses == (1e6, 1e6)


def test_ten_failures_in_a_row_stop_the_study_and_a_rerun_goes_on(tmp_path: Path) -> None:
    text = r"^10 trials in a row failed; the last one: RuntimeError: weight .* is too heavy \(mend"
    with pytest.raises(NothingUsableError, match=text):
        toy_study(tmp_path / "s", limit=-9.0).run()
    view = StudyView.load(tmp_path / "s")
    assert view.state is StudyState.FAILED
    assert view.counts.failed == 10
    assert "too heavy" in view.message
    assert view.front == ()
    assert view.knee is None
    # The user mends what was broken and gives the same command again: nothing of the breakage is
    # left, neither the failures nor what the searcher made of them.
    view = toy_study(tmp_path / "s").run()
    assert view.state is StudyState.FINISHED
    assert view.counts.failed == 0
    assert view.counts.done == 23
    calm = toy_study(tmp_path / "calm").run()
    assert [(t.x, t.evaluation) for t in view.trials] == [(t.x, t.evaluation) for t in calm.trials]
    assert (view.front, view.knee) == (calm.front, calm.knee)
    assert set(view.times) == set(calm.times)


@pytest.mark.parametrize("searcher", ["toy", "de", "nsga2"])
def test_failures_of_the_setup_stayed_for_ever(tmp_path: Path, searcher: str) -> None:
    """A row of failures in the middle is asked for again; what came before it stays."""
    study = {"budget": 30, "searcher": searcher, "scalarise": searcher == "de"}
    toy_study(tmp_path / "s", **study).run()
    calm = StudyView.load(tmp_path / "s")
    asked = [i for i, r in enumerate(read(tmp_path / "s").records) if r["ev"] == "tell"]
    _cut(tmp_path / "s", asked[9] + 1)
    with pytest.raises(NothingUsableError, match="10 trials in a row failed"):
        toy_study(tmp_path / "s", limit=-9.0, **study).run()
    (stop,) = _events(tmp_path / "s", "stop")
    assert stop["trials"][0] >= 10
    assert StudyView.load(tmp_path / "s").counts.failed >= 10
    _cut(tmp_path / "s", len(read(tmp_path / "s").records))  # killed right after the stop
    view = toy_study(tmp_path / "s", **study).run()
    assert [(t.x, t.evaluation) for t in view.trials] == [(t.x, t.evaluation) for t in calm.trials]
    (retry,) = _events(tmp_path / "s", "retry")
    assert retry["trials"] == stop["trials"]
    before = (tmp_path / "s" / JOURNAL).read_bytes()
    assert toy_study(tmp_path / "s", **study).run().front == calm.front
    assert (tmp_path / "s" / JOURNAL).read_bytes() == before


def test_finalists_that_all_failed_on_validation_are_scored_again(tmp_path: Path) -> None:
    class Blind(SerialPool):
        def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
            return [
                replace(outcome, result=Failure("error", "no data"))
                if len(self.asked[outcome.number][0]) == 5 else outcome
                for outcome in super().wait(timeout)
            ]  # fmt: skip

        def submit(self, job: Job) -> None:
            self.asked = {**getattr(self, "asked", {}), job.number: job.items}
            super().submit(job)

    factory = ToyStudyFactory(tmp_path / "log")
    with pytest.raises(NothingUsableError, match="validation items; the last one: no data"):
        toy_study(tmp_path / "s", make_pool=lambda: Blind(factory)).run()
    searched = len(_events(tmp_path / "s", "tell"))
    view = toy_study(tmp_path / "s").run()
    assert view.state is StudyState.FINISHED
    assert view.front == toy_study(tmp_path / "calm").run().front
    assert len(_events(tmp_path / "s", "tell")) == searched


def test_a_study_in_which_nothing_succeeded_says_so(tmp_path: Path) -> None:
    with pytest.raises(NothingUsableError, match="none of the 7 trials succeeded; the last one"):
        toy_study(tmp_path / "s", limit=-9.0, budget=4).run()
    assert NothingUsableError.exit_code == 3


GOOD = Score(1.0, 0.1, (1.0, 0.0))
ONE = (Objective("acc"),)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, "expected an Evaluation, got NoneType"),
        (Evaluation((GOOD, GOOD), {}), "expected 1 scores, got 2"),
        (Evaluation((), {}), "expected 1 scores, got 0"),
        (Evaluation((replace(GOOD, items=(1.0,)),), {}), "acc: expected 2 item scores, got 1"),
        (Evaluation((replace(GOOD, value=float("nan")),), {}), "acc: value nan is not finite"),
        (Evaluation((replace(GOOD, value=float("-inf")),), {}), "acc: value -inf is not finite"),
        (Evaluation((replace(GOOD, standard_error=-1.0),), {}), "acc: standard error -1.0"),
        (Evaluation((replace(GOOD, standard_error=float("nan")),), {}), "standard error nan"),
        (Evaluation((replace(GOOD, items=(1.0, float("inf"))),), {}), "acc: item b: "),
        (Evaluation((replace(GOOD, value="high"),), {}), "acc: a score is not a number"),  # type: ignore[arg-type]
    ],
)
def test_the_gate_refuses_unsound_results(result: object, text: str) -> None:
    failure = checked(result, ONE, (("a", "b"),))
    assert isinstance(failure, Failure)
    assert failure.kind == "bad_result"
    assert text in failure.message


def test_the_gate_lets_sound_results_pass_as_plain_floats() -> None:
    import numpy as np

    score = Score(np.float64(0.5), np.float32(0.0), (np.int64(1), 0.0))  # type: ignore[arg-type]
    passed = checked(Evaluation((score,), {"a": 1.0, "b": float("nan")}), ONE, (("a", "b"),))
    assert passed == Evaluation((Score(0.5, 0.0, (1.0, 0.0)),), {"a": 1.0})
    assert isinstance(passed, Evaluation)
    assert {type(value) for value in (passed.scores[0].value, *passed.scores[0].items)} == {float}


# -- resume ---------------------------------------------------------------------------------


def _cut(directory: Path, records: int) -> None:
    lines = (directory / JOURNAL).read_bytes().splitlines(keepends=True)
    (directory / JOURNAL).write_bytes(b"".join(lines[:records]))


def test_a_study_cut_after_any_record_ends_the_same(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    toy_study(whole, budget=8, decode=rounded).run()
    essence = _essence(whole)
    total = len(read(whole).records)
    data = (whole / JOURNAL).read_bytes()
    done = StudyView.load(whole)
    for records in range(total):
        directory = tmp_path / f"cut{records}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(data)
        _cut(directory, records)
        finished = {
            (r["trial"], r.get("split")) for r in _events(directory, "tell", "score")
        }  # fmt: skip
        log = tmp_path / f"log{records}"
        view = toy_study(directory, budget=8, decode=rounded, log=log).run()
        assert _essence(directory) == essence
        assert (view.front, view.knee) == (done.front, done.knee)
        fresh = [
            r
            for r in _events(directory, "tell", "score")
            if (r["trial"], r.get("split")) not in finished and "reused" not in r
        ]
        lines = log.read_text().splitlines() if log.exists() else []
        assert len(lines) == len(fresh), "a finished evaluation was repeated"


def test_a_finished_study_does_nothing_more(tmp_path: Path) -> None:
    toy_study(tmp_path / "s").run()
    before = (tmp_path / "s" / JOURNAL).read_bytes()

    def no_pool() -> SerialPool:
        raise AssertionError("a pool was built for a finished study")

    assert toy_study(tmp_path / "s", make_pool=no_pool).run().state is StudyState.FINISHED
    assert (tmp_path / "s" / JOURNAL).read_bytes() == before


def test_other_settings_are_refused_with_each_difference(tmp_path: Path) -> None:
    toy_study(tmp_path / "s").run()
    before = (tmp_path / "s" / JOURNAL).read_bytes()
    identity = {"searcher": "toy", "config": "xyz", "versions": {"numpy": "1.0"}}
    with pytest.raises(InputError) as caught:
        toy_study(tmp_path / "s", seed=8, identity=identity).run()
    lines = str(caught.value).splitlines()
    assert "begun with other settings" in lines[0]
    assert '  identity.config: "abc" -> "xyz"' in lines
    assert "  seed: 7 -> 8" in lines
    assert any(line.startswith("  installed.numpy: ") for line in lines)
    assert (tmp_path / "s" / JOURNAL).read_bytes() == before


def test_a_new_name_or_an_unused_weight_was_refused(tmp_path: Path) -> None:
    identity = {"searcher": "toy", "name": "old"}
    toy_study(tmp_path / "s", identity=identity).run()
    heavier = tuple(replace(objective, weight=9.0) for objective in OBJECTIVES)
    again = toy_study(tmp_path / "s", identity={**identity, "name": "new"}, objectives=heavier)
    assert again.run().state is StudyState.FINISHED
    single = {"searcher": "cma", "scalarise": True}
    toy_study(tmp_path / "one", **single).run()
    with pytest.raises(InputError, match=r"fitness\.tasks\[0\]\.weight: 2\.0 -> 9\.0"):
        toy_study(tmp_path / "one", **single, objectives=heavier).run()


def test_what_is_called_on_open_comes_after_the_check_and_may_refuse(tmp_path: Path) -> None:
    def full() -> None:
        assert _events(tmp_path / "s", "open")
        assert not _events(tmp_path / "s", "ask")
        raise StorageError("no space")

    with pytest.raises(StorageError, match="no space"):
        toy_study(tmp_path / "s", on_open=full).run()
    called: list[int] = []
    with pytest.raises(InputError, match="begun with other settings"):
        toy_study(tmp_path / "s", seed=8, on_open=lambda: called.append(1)).run()
    assert called == []


def test_a_searcher_that_asks_differently_is_refused_with_trial_and_dimension(
    tmp_path: Path,
) -> None:
    toy_study(tmp_path / "s").run()
    _cut(tmp_path / "s", 40)

    class Changed(ToySearcher):
        def ask(self, n: int) -> Sequence[Candidate]:
            given = super().ask(n)
            if given and given[0].id == 9:
                x = given[0].x
                return (Candidate(9, (*x[:2], x[2] + 2**-50, *x[3:])),)
            return given

    with pytest.raises(ReplayError, match=r"^trial 12: dimension 2: the journal has 0\.\d+, the"):
        toy_study(tmp_path / "s", make_searcher=Changed).run()


def test_a_space_that_decodes_differently_is_refused(tmp_path: Path) -> None:
    toy_study(tmp_path / "s").run()
    _cut(tmp_path / "s", 30)
    with pytest.raises(ReplayError, match="trial 3: the same x decodes to another recipe"):
        toy_study(tmp_path / "s", decode=rounded).run()


def test_changed_baselines_are_refused(tmp_path: Path) -> None:
    toy_study(tmp_path / "s").run()
    baselines = (
        Baseline("base", (0.25,) * 4, recipe([0.1] * DIMENSION)),
        Baseline("uniform", (0.5,) * 4, decode((0.5,) * 4)),
        Baseline("expert:far", None, recipe([3.0, 0.0, 0.0, 0.0])),
    )
    with pytest.raises(ReplayError, match="trial 0: the same x decodes"):
        toy_study(tmp_path / "s", baselines=baselines).run()


def test_a_searcher_that_asks_for_less_than_recorded_is_refused(tmp_path: Path) -> None:
    toy_study(tmp_path / "s").run()

    class Shorter(ToySearcher):
        def ask(self, n: int) -> Sequence[Candidate]:
            return super().ask(n) if self.asked < 5 else ()

    with pytest.raises(ReplayError, match="trial 8: the journal has it, but the searcher"):
        toy_study(tmp_path / "s", make_searcher=Shorter).run()


# -- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_drains_and_stops_and_a_rerun_continues(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    class Stopping(SerialPool):
        runs = 0

        def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
            Stopping.runs += 1
            if Stopping.runs == 8:
                os.kill(os.getpid(), number)
            return super().wait(timeout)

    factory = ToyStudyFactory(tmp_path / "log")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="run the same command again") as caught:
        toy_study(tmp_path / "s", make_pool=lambda: Stopping(factory)).run()
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    view = StudyView.load(tmp_path / "s")
    assert view.state is StudyState.INTERRUPTED
    assert view.message == f"stopped by {number.name}"
    assert view.counts.done == 8, "what ran was waited for, and nothing new was begun"
    toy_study(tmp_path / "s").run()
    toy_study(tmp_path / "other").run()
    assert _essence(tmp_path / "s") == _essence(tmp_path / "other")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    class Hanging(SerialPool):
        def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return ()

    factory = ToyStudyFactory(tmp_path / "log")
    started = time.monotonic()
    with pytest.raises(Interrupted, match="at once by a second signal"):
        toy_study(tmp_path / "s", make_pool=lambda: Hanging(factory)).run()
    assert time.monotonic() - started < 30


def test_a_second_signal_inside_a_serial_trial_became_a_failed_trial(tmp_path: Path) -> None:
    class Slow(ToyStudyWorker):
        runs = 0

        def run(self, job: Job) -> Evaluation:
            Slow.runs += 1
            if Slow.runs == 5:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
            return super().run(job)

    make_pool = lambda: SerialPool(lambda: Slow(tmp_path / "log", 10.0, 0.0))  # noqa: E731
    with pytest.raises(Interrupted, match="at once by a second signal") as caught:
        toy_study(tmp_path / "s", make_pool=make_pool).run()
    assert caught.value.exit_code == 130
    assert not isinstance(caught.value, Exception), "a worker boundary would record it"
    assert StudyView.load(tmp_path / "s").counts.failed == 0
    toy_study(tmp_path / "s").run()
    toy_study(tmp_path / "other").run()
    assert _essence(tmp_path / "s") == _essence(tmp_path / "other")


def test_a_signal_inside_a_listener_is_no_failure_of_the_listener(tmp_path: Path) -> None:
    class Stopping(StudyListener):
        def on_trial(self, trial: Trial, replayed: bool) -> None:
            raise Interrupted("now", signal.SIGINT)

    with pytest.raises(Interrupted):
        toy_study(tmp_path / "s", listeners=(Stopping(),)).run()


def test_running_trials_are_waited_for_only_so_long(tmp_path: Path) -> None:
    class Slow(SerialPool):
        def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
            if not hasattr(self, "sent"):
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return ()

    factory = ToyStudyFactory(tmp_path / "log")
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        toy_study(tmp_path / "s", make_pool=lambda: Slow(factory), grace_seconds=0.1).run()


# -- listeners ------------------------------------------------------------------------------


class _Recorder(StudyListener):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.replayed = 0
        self.last: Progress | None = None

    def on_phase(self, phase: str, total: int) -> None:
        self.lines.append(f"{phase} {total}")

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        assert trial.state is not TrialState.ASKED
        self.lines.append(f"trial {trial.number}")
        self.replayed += replayed

    def on_score(self, trial: Trial, split: Split, result: Result) -> None:
        assert trial.evaluation is not None
        self.lines.append(f"{split} {trial.number}")

    def on_progress(self, progress: Progress) -> None:
        self.last = progress

    def on_workers(self, facts: Mapping[str, str]) -> None:
        self.lines.append(f"workers {facts['device']}")

    def on_finish(self, view: StudyView) -> None:
        self.lines.append(f"finish {view.state}")


def test_listeners_hear_everything_in_order_and_again_on_resume(tmp_path: Path) -> None:
    first, second = _Recorder(), _Recorder()
    view = toy_study(tmp_path / "s", budget=5, listeners=(first,)).run()
    validated = [f"validation {number}" for number in sorted(view.validation)]
    tested = [f"test {number}" for number in sorted(view.test)]
    expected = [
        "baselines 3",
        *(f"trial {number}" for number in range(3)),
        "search 5",
        *(f"trial {number}" for number in range(3, 8)),
        f"validation {len(validated)}",
        *validated,
        f"test {len(tested)}",
        *tested,
        "finish finished",
    ]
    assert [line for line in first.lines if line != "workers toy"] == expected
    assert first.replayed == 0
    assert first.last == Progress("test", len(tested), 0, len(tested))
    toy_study(tmp_path / "s", budget=5, listeners=(second,)).run()
    assert second.lines == expected
    assert second.replayed == 8


def test_a_broken_listener_is_named_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(StudyListener):
        def on_trial(self, trial: Trial, replayed: bool) -> None:
            raise RuntimeError("no display")

    healthy = _Recorder()
    with caplog.at_level(logging.WARNING):
        toy_study(tmp_path / "s", listeners=(Broken(), healthy)).run()
    assert len([r for r in caplog.records if "Broken.on_trial failed" in r.message]) == 1
    assert healthy.lines[-1] == "finish finished"


# -- the view -------------------------------------------------------------------------------


def test_a_view_of_a_running_study(tmp_path: Path) -> None:
    toy_study(tmp_path / "s").run()
    _cut(tmp_path / "s", 20)
    with (tmp_path / "s" / JOURNAL).open("ab") as file:
        file.write(b'{"seq":20,"ev":"te')
    view = StudyView.load(tmp_path / "s")
    assert view.state is StudyState.INTERRUPTED
    with Journal(tmp_path / "s"):
        assert StudyView.load(tmp_path / "s").state is StudyState.RUNNING
    counts = view.counts
    assert counts.asked == counts.done + counts.waiting
    assert counts.waiting > 0
    assert counts.budget == 20
    done = {t.number: _losses(t.evaluation) for t in view.trials if t.evaluation}
    front = [n for n in done if not any(_dominates(done[o], done[n]) for o in done)]
    assert view.front == tuple(front)
    assert view.front_split == "search"
    assert sorted(view.times) == sorted(done)


def test_hypervolume_grows_and_matches_an_independent_sweep(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s").run()
    rows = [_losses(trial.evaluation) for trial in view.trials]
    fixed = list(zip(*rows[:3], strict=True))
    reference = tuple(max(c) + 0.1 * (max(c) - min(c)) for c in fixed)
    assert view.reference == reference
    volumes = view.hypervolumes()
    assert len(volumes) == len(rows)
    assert list(volumes) == sorted(volumes)
    for count in range(1, len(rows) + 1):
        area, height = 0.0, reference[1]
        for a, b in sorted(rows[:count]):
            if a < reference[0] and b < height:
                area += (reference[0] - a) * (height - b)
                height = b
        assert volumes[count - 1] == pytest.approx(area, rel=1e-12)
    assert view.hypervolume == volumes[-1]


def test_best_of_an_objective_honours_its_direction(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s").run()
    assert view.best("near_one") == max(view.front, key=lambda n: view.validation[n].values[0])
    assert view.best("from_zero") == min(view.front, key=lambda n: view.validation[n].values[1])
    with pytest.raises(InputError, match=r"unknown 'near_on' \(did you mean 'near_one'\?\)"):
        view.best("near_on")
    with pytest.raises(InputError, match=r"trial 99: .* has trials 0 to 22"):
        view.trial(99)


def test_a_record_from_the_future_is_refused_by_name(tmp_path: Path) -> None:
    toy_study(tmp_path / "s", budget=2).run()
    count = len(read(tmp_path / "s").records)
    with (tmp_path / "s" / JOURNAL).open("ab") as file:
        file.write(encode({"seq": count, "ev": "teleport"}))
    with pytest.raises(StorageError, match=rf"record {count} \(teleport\) cannot be understood"):
        StudyView.load(tmp_path / "s")


def test_a_journal_of_ten_thousand_trials_loads(tmp_path: Path) -> None:
    """The figure is for people (``pytest -s``); a test asserts no time."""
    directory = tmp_path / "s"
    toy_study(directory, budget=1).run()
    records = list(read(directory).records)
    start = next(i for i, r in enumerate(records) if r["ev"] == "tell" and r["trial"] == 3)
    ask = next(r for r in records if r["ev"] == "ask" and r["trial"] == 3)
    lines = [encode(record) for record in records[: start + 1]]
    width = 64
    for number in range(4, 10_000):
        row = [number / 7 + i / 3 for i in range(width)]
        items = [hexes(float(i % 3 == 0) for i in range(100))] * 2
        asked = {**ask, "trial": number, "x": hexes(row), "table": [row[:4]], "digest": "0"}
        told = {**records[start], "trial": number, "items": items}
        for record in (asked, told):
            lines.append(encode({**record, "seq": len(lines)}))
    (directory / JOURNAL).write_bytes(b"".join(lines))
    began = time.perf_counter()
    view = StudyView.load(directory)
    print(f"10,000 trials in {time.perf_counter() - began:.2f} s")
    assert len(view.trials) == 10_000


# -- arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"parallel": 0}, "parallel must be at least 1, got 0"),
        ({"finalists": 0}, "finalists must be at least 1, got 0"),
        ({"splits": ()}, "expected one item split per objective, got 0 splits for 2"),
        (
            {"scalarise": True, "objectives": (Objective("a", Direction.MINIMIZE, weight=0.0),)},
            "at least one weight must be above 0",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        toy_study(tmp_path / "s", **changes)
    assert not (tmp_path / "s").exists()
