"""A study from the first ask to the choice: scores, front, reuse, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from study_journals import Shuffled, cut, dominates, essence_of, events_of, losses_of
from toy_study import (
    DIMENSION,
    OBJECTIVES,
    ToySearcher,
    ToySplit,
    ToyStudyFactory,
    decode,
    item_score,
    rounded,
    toy_study,
)

from evomerge.errors import (
    InputError,
    LockedError,
    NothingUsableError,
)
from evomerge.evaluations import checked
from evomerge.journal import JOURNAL, Journal, Record, read, unhexes
from evomerge.pool import SerialPool
from evomerge.search.protocol import Candidate, SearchProblem
from evomerge.study import Baseline
from evomerge.study_view import StudyState, StudyView
from evomerge.trial import (
    Direction,
    Evaluation,
    Failure,
    Job,
    Objective,
    Outcome,
    Score,
    TrialState,
)

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
    losses = {number: losses_of(one) for number, one in view.validation.items()}
    assert {0, 1, 2} <= set(losses), "baselines are always scored again"
    front = [n for n in losses if not any(dominates(losses[other], losses[n]) for other in losses)]
    assert view.front == tuple(front)
    assert view.front_split == "validation"
    assert view.knee in view.front
    assert set(view.test) == {*view.front, 0, 1, 2}
    searched = {t.number: losses_of(t.evaluation) for t in view.trials}
    for number in set(losses) - {0, 1, 2}:
        better = [n for n in searched if dominates(searched[n], searched[number])]
        assert set(better) <= set(losses), "a finalist was preferred to a trial that is better"


def test_recipes_and_points_survive_the_journal_exactly(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s").run()
    for trial, record in zip(view.trials, events_of(tmp_path / "s", "ask"), strict=True):
        assert trial.recipe.digest == record["digest"]
        if trial.kind == "search":
            assert trial.x is not None
            assert trial.recipe == decode(trial.x)
    assert len(events_of(tmp_path / "s", "frame")) == 1, "what recipes share is written once"


def test_every_ask_is_on_disk_before_its_job_runs(tmp_path: Path) -> None:
    directory = tmp_path / "s"

    class Watching(SerialPool):
        def submit(self, job: Job) -> None:
            asked = [record["trial"] for record in events_of(directory, "ask")]
            assert job.number in asked
            super().submit(job)

    factory = ToyStudyFactory(tmp_path / "log")
    toy_study(directory, make_pool=lambda: Watching(factory)).run()


def test_every_result_is_on_disk_before_the_searcher_is_told(tmp_path: Path) -> None:
    directory = tmp_path / "s"

    class Watching(ToySearcher):
        def tell(self, results: Sequence[Any]) -> None:
            told = [record["trial"] for record in events_of(directory, "tell")]
            assert all(result.id + 3 in told for result in results)
            super().tell(results)

    toy_study(directory, make_searcher=Watching).run()


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
            make_pool=lambda f=factory, w=workers: Shuffled(f, w),
        ).run()
        essences.append(essence_of(directory))
    assert essences[0] == essences[1] == essences[2]
    orders = [[r["trial"] for r in events_of(tmp_path / str(w), "tell")] for w in (1, 4)]
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
    toy_study(tmp_path / "s", make_searcher=Watching, make_pool=lambda: Shuffled(factory, 3)).run()
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
        losses = losses_of(view.trials[index].evaluation)
        assert problems[0].warm[index].losses == losses
        mean = (2 * losses[0] + losses[1]) / 3
        assert problems[1].warm[index].losses == pytest.approx((mean,), rel=1e-12)


def test_a_scalarised_study_recommends_the_best_weighted_mean(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s", scalarise=True, searcher="cma").run()
    means = {}
    for number in view.front:
        losses = losses_of(view.validation[number])
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
        tmp_path / "s", decode=rounded, make_pool=lambda: Shuffled(factory, workers)
    ).run()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines)), "the same recipe was scored twice on the same items"
    reused = [r for r in events_of(tmp_path / "s", "tell") if "reused" in r]
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
    seen = [losses_of(view.trials[0].evaluation), losses_of(view.trials[1].evaluation)]
    assert view.trials[2].failure is not None
    assert view.trials[2].failure.message == "RuntimeError: weight 3.0 is too heavy"
    for told in searchers[0].told:
        if told.failed:
            columns = list(zip(*seen, strict=True))
            assert told.losses == tuple(max(c) + (max(c) - min(c)) for c in columns)
            assert told.items == ()
        else:
            seen.append(told.losses)
            assert told.losses == losses_of(view.trials[told.id + 3].evaluation)
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
    cut(tmp_path / "s", asked[9] + 1)
    with pytest.raises(NothingUsableError, match="10 trials in a row failed"):
        toy_study(tmp_path / "s", limit=-9.0, **study).run()
    (stop,) = events_of(tmp_path / "s", "stop")
    assert stop["trials"][0] >= 10
    assert StudyView.load(tmp_path / "s").counts.failed >= 10
    cut(tmp_path / "s", len(read(tmp_path / "s").records))  # killed right after the stop
    view = toy_study(tmp_path / "s", **study).run()
    assert [(t.x, t.evaluation) for t in view.trials] == [(t.x, t.evaluation) for t in calm.trials]
    (retry,) = events_of(tmp_path / "s", "retry")
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
    searched = len(events_of(tmp_path / "s", "tell"))
    view = toy_study(tmp_path / "s").run()
    assert view.state is StudyState.FINISHED
    assert view.front == toy_study(tmp_path / "calm").run().front
    assert len(events_of(tmp_path / "s", "tell")) == searched


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


def test_workers_were_left_behind_when_the_journal_could_not_take_their_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    class Closing(SerialPool):
        def close(self) -> None:
            closed.append(True)
            super().close()

    append = Journal.append

    def overtaken(journal: Journal, event: str, **fields: Any) -> Record:
        if event == "pool":
            raise LockedError("another driver has taken over")
        return append(journal, event, **fields)

    monkeypatch.setattr(Journal, "append", overtaken)
    factory = ToyStudyFactory(tmp_path / "log")
    with pytest.raises(LockedError):
        toy_study(tmp_path / "s", make_pool=lambda: Closing(factory)).run()
    assert closed == [True]
