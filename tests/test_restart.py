"""`evomerge run --restart-search`: a searcher that asks otherwise, and what goes on from there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from economy_study import FEATURES
from economy_study import study as economy_study
from moved_study import BEFORE, Moved, begun, moved
from study_journals import cut, essence_of, events_of
from tiny_project import tiny_project
from toy_study import ToyStudyFactory, decode, make, toy_study

from evomerge import numerics
from evomerge.cli import cli
from evomerge.config import load
from evomerge.errors import NothingUsableError, ReplayError
from evomerge.extension import extend
from evomerge.facts import status_facts, status_lines
from evomerge.journal import JOURNAL, encode, read
from evomerge.pool import SerialPool
from evomerge.prepare import prepare
from evomerge.presentation import project
from evomerge.recipe import Recipe
from evomerge.replay import verify
from evomerge.restart_record import Restart
from evomerge.search.protocol import SearchProblem
from evomerge.search_facts import taking_over
from evomerge.spool import Spool, SpoolingFactory
from evomerge.study import Study
from evomerge.study_view import StudyState, StudyView
from evomerge.trial import Failure, Job


@pytest.fixture(autouse=True)
def fresh_problems() -> None:
    Moved.problems.clear()


def evaluated(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def kept(directory: Path) -> list[dict[str, Any]]:
    return [{**record, "t": 0} for record in read(directory).records]


def test_without_the_flag_it_stops_names_what_differs_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = {
        "versions": {"python": "3.11.2", "numpy": "2.1.0"}, "blas": "Haswell",
        "features": ["AVX2"], "machine": "x86_64",
    }  # fmt: skip
    monkeypatch.setattr(numerics, "numerics", lambda: then)
    begun(tmp_path / "s")
    before = (tmp_path / "s" / JOURNAL).read_bytes()

    def error() -> list[str]:
        with pytest.raises(ReplayError) as caught:
            moved(tmp_path / "s").run()
        assert (tmp_path / "s" / JOURNAL).read_bytes() == before
        return str(caught.value).splitlines()

    first, differs, exact, restart = error()
    assert first.startswith("trial 8: dimension 0: the journal has ")
    assert differs.startswith("  nothing that the journal notes (versions of the libraries, CPU)")
    assert exact.startswith("  to go on exactly as it began: run it with the code of the searcher")
    assert "evomerge run STUDY.yaml --restart-search" in restart
    assert "no longer reproducible" in restart

    cpu = {**then, "blas": "SkylakeX", "features": ["AVX2", "AVX512F", "AVX512_SKX"]}
    monkeypatch.setattr(numerics, "numerics", lambda: cpu)
    _, differs, exact, restart = error()
    assert differs == (
        "  since trial 8 was asked: OpenBLAS kernels Haswell -> SkylakeX; a CPU now with AVX512F, "
        "AVX512_SKX for numpy"
    )
    assert exact == (
        "  to go on exactly as it began: run it on a CPU like that of trial 8, or here with: "
        "OPENBLAS_CORETYPE=Haswell NPY_DISABLE_CPU_FEATURES='AVX512F AVX512_SKX'"
    )
    weaker = {**then, "features": []}
    monkeypatch.setattr(numerics, "numerics", lambda: weaker)
    _, differs, exact, _ = error()
    assert differs.endswith("a CPU now without AVX2 for numpy")
    assert exact.endswith("run it on a CPU like that of trial 8")
    newer = {**then, "versions": {"python": "3.11.2", "numpy": "2.3.0", "cma": "4.4"}}
    monkeypatch.setattr(numerics, "numerics", lambda: newer)
    _, differs, exact, _ = error()
    assert differs.endswith("was asked: numpy 2.1.0 -> 2.3.0; cma absent -> 4.4")
    assert exact.endswith("run it with those versions")
    found = verify(tmp_path / "s", moved(tmp_path / "s"))
    assert found.compared == 8
    assert "numpy 2.1.0 -> 2.3.0" in found.problems[0]


def test_with_the_flag_it_goes_on_to_the_full_budget_and_scores_nothing_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun(tmp_path / "s")
    before = kept(tmp_path / "s")
    finished = {r["trial"] for r in before if r["ev"] == "tell"}
    assert len(finished) < BEFORE, "nothing was outstanding at the kill"
    log = tmp_path / "after.log"
    view = moved(tmp_path / "s", log=log).run(restart=True)
    assert kept(tmp_path / "s")[: len(before)] == before
    assert view.state is StudyState.FINISHED
    assert (view.counts.asked, view.counts.done) == (23, 23)
    results = events_of(tmp_path / "s", "tell", "score")[len(finished) :]
    assert len(evaluated(log)) == sum("reused" not in record for record in results)
    assert len(set(evaluated(log))) == len(evaluated(log)), "an evaluation was repeated"

    [record] = events_of(tmp_path / "s", "restart")
    assert (record["trial"], record["limits"]) == (BEFORE, 1)
    assert record["reason"] == "trial 8 was not repeated; no known cause"
    problem = Moved.problems[-1]
    assert (problem.budget, problem.seed) == (11, Restart(BEFORE, 1, "").seed(7))
    assert problem.seed != 7
    known = {trial.x for trial in view.trials[:BEFORE] if trial.x is not None}
    assert {point.x for point in problem.warm} == known
    assert [point.label for point in problem.warm][-1] == f"trial {BEFORE - 1}"
    assert problem.warm[:2] == Moved.problems[0].warm
    losses = {
        t.x: tuple(o.loss(v) for o, v in zip(view.objectives, t.evaluation.values, strict=True))
        for t in view.trials[:BEFORE]
        if t.evaluation is not None
    }
    assert all(point.losses == losses[point.x] for point in problem.warm)

    [line] = [r.getMessage() for r in caplog.records if "restart" in r.getMessage()]
    assert line == (
        "search restarted before trial 12 (trial 8 was not repeated; no known cause), with a fresh "
        "searcher that knew all results; no longer reproducible from the seed alone"
    )
    assert "restarted before trial 12" in "".join(project(view).words)
    assert "before trial 12" in status_lines(status_facts(view))["restarted"]


def test_after_a_restart_it_resumes_from_any_record_without_the_flag_and_replays(
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole"
    begun(whole, budget=14)
    moved(whole, budget=14).run(restart=True)
    essence, data = essence_of(whole), (whole / JOURNAL).read_bytes()
    done = StudyView.load(whole)
    found = verify(whole, moved(whole, budget=14))
    # Of the trials before the restart only the three baselines are made again.
    assert (found.problems, found.compared, found.finished) == ((), 3 + 17 - BEFORE, True)
    assert found.taken == BEFORE - 3
    [record] = events_of(whole, "restart")
    for records in range(record["seq"] + 1, len(read(whole).records)):
        directory = tmp_path / f"cut{records}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(data)
        cut(directory, records)
        finished = len(events_of(directory, "tell", "score"))
        found = verify(directory, moved(directory, budget=14))
        assert found.problems == (), records
        log = tmp_path / f"log{records}"
        view = moved(directory, budget=14, log=log).run()
        assert essence_of(directory) == essence
        assert (view.front, view.knee) == (done.front, done.knee)
        fresh = events_of(directory, "tell", "score")[finished:]
        assert len(evaluated(log)) == sum("reused" not in record for record in fresh)
    again = whole / JOURNAL
    moved(whole, budget=14).run(restart=True)
    assert again.read_bytes() == data, "the flag changed a study that replays"


def test_where_it_repeats_itself_the_flag_changes_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy_study(tmp_path / "whole").run()
    begun(tmp_path / "s")
    toy_study(tmp_path / "s").run(restart=True)
    assert essence_of(tmp_path / "s") == essence_of(tmp_path / "whole")
    assert not events_of(tmp_path / "s", "restart", "numerics")
    assert "--restart-search was not needed: the searcher repeats" in caplog.text
    toy_study(tmp_path / "new").run(restart=True)
    assert essence_of(tmp_path / "new") == essence_of(tmp_path / "whole")


def test_a_second_restart_follows_the_first(tmp_path: Path) -> None:
    begun(tmp_path / "s")
    moved(tmp_path / "s").run(restart=True)
    restart = events_of(tmp_path / "s", "restart")[0]["seq"]
    later = [r["seq"] for r in events_of(tmp_path / "s", "ask") if r["seq"] > restart]
    cut(tmp_path / "s", later[6] + 1)
    log = tmp_path / "log"
    view = toy_study(tmp_path / "s", log=log).run(restart=True)
    assert [r["trial"] for r in events_of(tmp_path / "s", "restart")] == [BEFORE, BEFORE + 7]
    assert view.counts.done == 23
    assert len(set(evaluated(log))) == len(evaluated(log))
    assert verify(tmp_path / "s", toy_study(tmp_path / "s")).problems == ()
    assert "before trial 12 (" in view.searcher["restarted"]
    assert ", before trial 19 (" in view.searcher["restarted"]


@pytest.mark.parametrize("when", ["before", "between", "after", "all asked"])
def test_a_restarted_search_is_extended_like_any_other(tmp_path: Path, when: str) -> None:
    directory = tmp_path / "s"
    begun(directory, 23 if when == "all asked" else BEFORE)
    if when == "before":
        extend(directory, trials=5)
    if when == "between":
        moved(directory).run(restart=True)
        cut(directory, events_of(directory, "ask")[16]["seq"] + 1)
        extend(directory, trials=5)
        moved(directory).run()
    else:
        moved(directory).run(restart=True)
    if when in ("after", "all asked"):
        assert StudyView.load(directory).counts.done == 23
        extend(directory, trials=3)
        extend(directory, trials=2)
        moved(directory).run()
    budget = {"before": 16, "between": 11, "after": 11, "all asked": 3}[when]
    assert Moved.problems[-1].budget == budget
    assert len(StudyView.load(directory).trials) == 3 + 25
    assert len(events_of(directory, "restart")) == 1
    assert verify(directory, moved(directory)).problems == ()
    for records in (-3, -8, -15):
        cut(directory, len(read(directory).records) + records)
        assert verify(directory, moved(directory)).problems == ()
        moved(directory).run()
        assert len(StudyView.load(directory).trials) == 3 + 25


@pytest.mark.parametrize("order", ["ask", "completion"])
@pytest.mark.parametrize(
    "feature",
    [
        "plain", "racing", "resampled", "every", "raced", "budget", "constrained", "estimated",
        "estimated race", "refreshed race",
    ],
)  # fmt: skip
def test_what_saves_items_goes_on_after_a_restart(tmp_path: Path, feature: str, order: str) -> None:
    directory = tmp_path / "s"

    def made(**changes: Any) -> Study:
        return economy_study(directory, feature, order=order, **changes)

    made().run()
    asks = events_of(directory, "ask")
    cut(directory, asks[BEFORE - 1]["seq"] + 1)
    before = kept(directory)
    log = tmp_path / "after.log"
    view = made(make_searcher=Moved, log=log).run(restart=True)
    assert kept(directory)[: len(before)] == before
    assert len(events_of(directory, "restart")) == 1
    if FEATURES[feature].get("item_budget"):
        assert view.spending.search <= FEATURES[feature]["item_budget"]
    else:
        assert view.counts.asked == len(asks)
    assert verify(directory, made(make_searcher=Moved)).problems == ()
    essence, data = essence_of(directory), (directory / JOURNAL).read_bytes()
    restart, total = events_of(directory, "restart")[0]["seq"], len(read(directory).records)
    for records in range(restart + 1, total, 5):
        (directory / JOURNAL).write_bytes(data)
        cut(directory, records)
        made(make_searcher=Moved).run()
        if order == "ask":
            assert essence_of(directory) == essence
        assert verify(directory, made(make_searcher=Moved)).problems == ()
    if feature == "resampled":  # a generation does not get the items of one before the restart
        sets = [view.history.set_of[number] for number in range(3, len(view.trials))]
        assert set(sets[: BEFORE - 3]).isdisjoint(sets[BEFORE - 3 :])


@pytest.mark.parametrize("feature", ["plain", "racing", "raced", "estimated race"])
def test_what_had_raced_was_not_found_in_the_spool(tmp_path: Path, feature: str) -> None:
    """Finished evaluations of outstanding trials are taken, each with the end of its race."""
    directory, spools = tmp_path / "s", tmp_path / "s" / "spool"

    class Kept(Spool):
        def drop(self, job: Job) -> None:
            """As if it had died before the journal had the results."""

        def clear(self, kept: int = 0) -> None:
            """Likewise."""

    def made(log: Path, spool: Spool, **changes: Any) -> Study:
        worker = ToyStudyFactory(log, graded=FEATURES[feature].get("graded", False))
        factory = SpoolingFactory(worker, spools, "o")
        # No recipe comes twice, or what is known of it would not need the spool.
        changes |= {"decode": decode, "make_pool": lambda: SerialPool(factory)}
        return economy_study(directory, feature, spool=spool, **changes)

    made(tmp_path / "a.log", Kept(spools, "o")).run()
    tells = {r["trial"]: r for r in events_of(directory, "tell")}
    cut(directory, events_of(directory, "ask")[BEFORE - 1]["seq"] + 1)
    told = {r["trial"] for r in events_of(directory, "tell")}
    outstanding = set(range(BEFORE)) - told
    assert outstanding
    log = tmp_path / "b.log"
    view = made(log, Spool(spools, "o"), make_searcher=Moved).run(restart=True)
    again = {line.split()[0] for line in evaluated(log)}
    assert again.isdisjoint(view.history.digests[number] for number in outstanding)
    for record in events_of(directory, "tell"):
        if record["trial"] in outstanding:
            then = tells[record["trial"]]
            assert record["worker"] == "spool"
            for key in ("values", "items", "fresh", "rung"):
                assert record.get(key) == then.get(key)
    if feature != "plain":
        assert any(tells[number].get("rung") for number in outstanding), "no race was stopped"
    assert verify(directory, made(log, Spool(spools, "o"), make_searcher=Moved)).problems == ()


def test_failures_before_and_after_a_restart_are_repeated_as_ever(tmp_path: Path) -> None:
    """Those that the old searcher asked keep their place; nobody could ask for them again."""
    directory = tmp_path / "s"
    begun(directory)
    finished = {r["trial"] for r in events_of(directory, "tell")}
    with pytest.raises(NothingUsableError):
        moved(directory, limit=-10.0).run(restart=True)
    assert len(StudyView.load(directory).trials) > BEFORE
    view = moved(directory).run()
    assert (view.counts.failed, view.counts.done) == (0, 23)
    assert finished <= set(view.times)
    assert [r["trial"] for r in events_of(directory, "restart")] == [BEFORE]
    assert verify(directory, moved(directory)).problems == ()


def test_failed_trials_are_no_warm_points(tmp_path: Path) -> None:
    begun(tmp_path / "s", limit=1.0)
    view = moved(tmp_path / "s", limit=1.0).run(restart=True)
    failed = {t.x for t in view.trials[:BEFORE] if isinstance(t.failure, Failure)}
    assert failed
    assert failed.isdisjoint(point.x for point in Moved.problems[-1].warm)
    assert verify(tmp_path / "s", moved(tmp_path / "s", limit=1.0)).problems == ()


def _altered(directory: Path, trial: int, decode: Callable[..., Recipe] = decode) -> None:
    """Let the journal hold another point for a trial, whole and with its own recipe."""
    records = [dict(record) for record in read(directory).records]
    [ask] = [r for r in records if r["ev"] == "ask" and r["trial"] == trial]
    x = [math.nextafter(float.fromhex(text), 0.5) for text in ask["x"].split()]
    made = decode(tuple(x))
    ask |= {"x": " ".join(map(float.hex, x)), "table": made.table, "digest": made.digest}
    (directory / JOURNAL).write_bytes(b"".join(map(encode, records)))


@pytest.mark.parametrize(
    ("searcher", "changes"),
    [
        ("cma", {"scalarise": True}),
        ("de", {"scalarise": True}),
        ("m2n2", {"scalarise": True}),
        ("nsga2", {}),
        ("gp_rounds", {}),
        ("auto", {}),
    ],
)
def test_searchers_of_ours_go_on(tmp_path: Path, searcher: str, changes: dict[str, Any]) -> None:
    directory = tmp_path / "s"

    def made() -> Study:
        def build(problem: SearchProblem) -> Any:
            return make(searcher, taking_over(problem, searcher, {}))

        return toy_study(directory, searcher=searcher, make_searcher=build, **changes)

    made().run()
    cut(directory, events_of(directory, "ask")[15]["seq"] + 1)
    _altered(directory, 9)
    with pytest.raises(ReplayError, match=r"^trial 9: dimension 0"):
        made().run()
    view = made().run(restart=True)
    assert view.counts.done == 23
    assert verify(directory, made()).problems == ()
    cut(directory, events_of(directory, "ask")[20]["seq"] + 1)
    made().run()
    assert verify(directory, made()).problems == ()
    for trial in view.trials:
        assert trial.origin is None or all(number < trial.number for number in trial.origin.parents)


def test_m2n2_gets_an_archive_of_the_best_and_one_loss_starts_at_the_best(tmp_path: Path) -> None:
    from evomerge.search.protocol import WarmPoint

    warm = tuple(
        WarmPoint((index / 40,), (abs(index - 25.0),), f"trial {index}" if index > 2 else "base")
        for index in range(40)
    )
    problem = SearchProblem(1, 1, budget=50, parallel=2, seed=1, warm=warm)
    found = taking_over(problem, "m2n2", {"archive": 6})
    assert [point.losses[0] for point in found.warm] == [3.0, 2.0, 1.0, 0.0, 1.0, 2.0]
    assert len(taking_over(problem, "m2n2", {}).warm) == 10
    assert taking_over(problem, "evo_merging", {}).start == (25 / 40,)
    fresh = SearchProblem(1, 1, budget=50, parallel=2, seed=1, warm=warm[:3])
    assert taking_over(fresh, "m2n2", {}) is fresh


def test_the_command_line_restarts_and_says_so(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    file = tiny_project(tmp_path, save_llama) / "study.yaml"
    directory = tmp_path / "studies" / "tiny"

    def call(*words: str) -> Result:
        return CliRunner().invoke(cli, list(words))

    chosen = ("--set", "search.searcher=ga")
    assert call("run", str(file), *chosen).exit_code == 0
    cut(directory, events_of(directory, "ask")[-2]["seq"] + 1)
    asked = events_of(directory, "ask")[-1]["trial"]
    _altered(directory, asked, prepare(load(file, chosen[1:]), file).space.decode)
    stopped = call("run", str(file), *chosen)
    assert isinstance(stopped.exception, ReplayError)
    assert "evomerge run STUDY.yaml --restart-search" in str(stopped.exception)
    done = call("run", str(file), *chosen, "--restart-search")
    assert done.exit_code == 0, done.output
    assert StudyView.load(directory).counts.done == StudyView.load(directory).counts.asked
    for command in ("status", "front", "replay"):
        shown = call(command, str(directory))
        assert shown.exit_code == 0, shown.output
        said = "before its restart" if command == "replay" else "no longer reproducible"
        assert said in " ".join(shown.output.split())
    assert call("report", str(directory), "--out", str(tmp_path / "r.html")).exit_code == 0
    assert "The search was restarted before trial" in (tmp_path / "r.html").read_text()
    help_text = " ".join(call("run", "--help").output.split())
    assert "With --restart-search it goes on without that" in help_text
