"""What `--restart-search` refuses, and journals and libraries of another time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from economy_study import FEATURES
from economy_study import study as economy_study
from moved_study import BEFORE, Moved, begun, moved
from study_journals import Shuffled, cut, events_of
from toy_study import DIMENSION, ToyStudyFactory, ToyStudyWorker, decode, recipe, toy_study

from evomerge import launch, numerics
from evomerge.errors import InputError, NothingUsableError, ReplayError, SetupError
from evomerge.halving import Halving
from evomerge.journal import JOURNAL, encode, read
from evomerge.pool import Pool
from evomerge.replay import verify
from evomerge.search.protocol import SearchProblem, WarmPoint
from evomerge.search_facts import taking_over
from evomerge.study import Baseline
from evomerge.study_record import library_versions
from evomerge.study_view import StudyState, StudyView
from evomerge.trial import Evaluation, Job, Score, Worker

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"racing": Halving((1, 2), 4)}, "a bracket of a search that halves"),
    (
        {"identity": {"searcher": "m2n2", "arguments": {"experts_only": True}}},
        "search.arguments.experts_only: its archive takes the experts only",
    ),
    ({"identity": {"searcher": "nested_map"}}, "nested_map merges the experts pair by pair"),
    (
        {"identity": {"searcher": "nevergrad", "arguments": {"optimizer": "ScrHammersleySearch"}}},
        "nevergrad lays all its points out",
    ),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_what_would_not_survive_it_is_refused(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    begun(tmp_path / "s", **changes)
    before = (tmp_path / "s" / JOURNAL).read_bytes()
    with pytest.raises(InputError, match=f"^--restart-search cannot help here: .*{text}") as caught:
        moved(tmp_path / "s", **changes).run(restart=True)
    assert caught.value.exit_code == 2
    with pytest.raises(ReplayError, match=f"--restart-search cannot help here: .*{text}"):
        moved(tmp_path / "s", **changes).run()
    assert (tmp_path / "s" / JOURNAL).read_bytes() == before


def test_estimated_studies_are_refused_where_other_items_are_chosen(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    economy_study(directory, "refreshed").run()
    cut(directory, events_of(directory, "ask")[-3]["seq"] + 1)
    with pytest.raises(InputError, match=r"fitness\.estimator\.refresh: generation"):
        economy_study(directory, "refreshed", make_searcher=Moved).run(restart=True)

    other = tmp_path / "other"
    economy_study(other, "estimated").run()
    cut(other, events_of(other, "ask")[-2]["seq"] + 1)
    before = (other / JOURNAL).read_bytes()
    estimation = FEATURES["estimated"]["estimation"]
    elsewhere = replace(
        estimation, prepare=lambda endpoints, draw: estimation.prepare(endpoints, draw + 1)
    )
    with pytest.raises(InputError, match=r"trial 5: the estimator chose other items"):
        economy_study(other, "estimated", estimation=elsewhere).run(restart=True)
    refused = r"cannot help here: trial 5: the estimator chose other items"
    with pytest.raises(
        ReplayError, match=rf"^trial 5: the journal has other items(.|\n)*{refused}"
    ):
        economy_study(other, "estimated", estimation=elsewhere).run()
    assert (other / JOURNAL).read_bytes() == before

    economy_study(other, "estimated", make_searcher=Moved).run(restart=True)
    cut(other, events_of(other, "ask")[-2]["seq"] + 1)
    with pytest.raises(ReplayError, match=refused):  # after a restart too
        economy_study(other, "estimated", make_searcher=Moved, estimation=elsewhere).run()


def test_finished_studies_baselines_and_other_spaces_are_refused(tmp_path: Path) -> None:
    toy_study(tmp_path / "done").run()
    with pytest.raises(InputError, match=r"the study is finished, nothing is left to search"):
        moved(tmp_path / "done").run(restart=True)
    with pytest.raises(ReplayError, match=r"cannot help here: the study is finished"):
        moved(tmp_path / "done").run()
    begun(tmp_path / "s")
    before = (tmp_path / "s" / JOURNAL).read_bytes()
    x = (0.26,) * DIMENSION
    others = (
        Baseline("base", x, decode(x)),
        Baseline("uniform", (0.5,) * DIMENSION, decode((0.5,) * DIMENSION)),
        Baseline("expert:far", None, recipe([3.0, 0.0, 0.0, 0.0])),
    )
    with pytest.raises(InputError, match=r"trial 0 is a baseline or a calibration"):
        moved(tmp_path / "s", baselines=others).run(restart=True)
    other = {"decode": lambda x: recipe([3 * value for value in x]), "baselines": ()}
    directory = tmp_path / "unlike"
    begun(directory, baselines=())
    with pytest.raises(InputError, match=r"trial 0: the same point is another merge by now"):
        moved(directory, **other).run(restart=True)
    with pytest.raises(ReplayError, match=r"cannot help here: trial 0: the same point is another"):
        moved(directory, **other).run()
    assert (tmp_path / "s" / JOURNAL).read_bytes() == before


def test_other_versions_of_search_libraries_go_on_with_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge import study as study_module

    directory = tmp_path / "s"
    begun(directory)
    real, here = study_module.library_versions(), dict(numerics.numerics())
    before = (directory / JOURNAL).read_bytes()
    versions = {**here["versions"], "numpy": "9.9"}
    monkeypatch.setattr(study_module, "library_versions", lambda: {**real, "numpy": "9.9"})
    monkeypatch.setattr(numerics, "numerics", lambda: {**here, "versions": versions})
    with pytest.raises(InputError, match=r'installed\.numpy: .* -> "9\.9"') as caught:
        moved(directory).run()
    assert "go on with these: evomerge run STUDY.yaml --restart-search" in str(caught.value)
    assert (directory / JOURNAL).read_bytes() == before
    with pytest.raises(InputError, match="seed: 7 -> 8") as caught:
        moved(directory, seed=8).run(restart=True)
    assert "numpy" not in str(caught.value)

    moved(directory).run(restart=True)
    assert "numpy" in events_of(directory, "restart")[0]["reason"]
    cut(directory, events_of(directory, "ask")[16]["seq"] + 1)
    assert moved(directory).run().state is StudyState.FINISHED
    assert verify(directory, moved(directory)).problems == ()

    (directory / JOURNAL).write_bytes(before)  # and where the new version asks the same
    toy_study(directory).run(restart=True)
    assert not events_of(directory, "restart")
    assert toy_study(directory).run().state is StudyState.FINISHED
    assert verify(directory, toy_study(directory)).problems == ()

    (directory / JOURNAL).write_bytes(before)  # what decides scores must not change
    monkeypatch.setattr(study_module, "library_versions", lambda: {**real, "torch": "9.9"})
    with pytest.raises(InputError, match=r"installed\.torch"):
        moved(directory).run(restart=True)


def test_other_search_libraries_threw_finished_evaluations_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = {"scipy": "1.15"}
    identity = {"searcher": "gp", "libraries": libraries}
    prepared: Any = SimpleNamespace(
        directory=tmp_path / "s", identity=lambda: identity,
        file=SimpleNamespace(pool=SimpleNamespace(kind="local")),
    )  # fmt: skip
    directory = tmp_path / "s" / "spool"
    job = Job(1, recipe([1.0]), (("a",),))
    spool = launch._spool(prepared)
    assert spool is not None
    spool.open()
    spool.put(job, Evaluation((Score(1.0, 0.0, (1.0,)),), {}))
    real = library_versions()
    other = {**real, "numpy": "9.9", "cma": "9.9"}
    former = launch._digest([identity, other])  # as evomerge named it until now
    for name in (spool.owner, former):
        monkeypatch.setattr(launch, "library_versions", lambda: other)
        monkeypatch.setitem(libraries, "scipy", "1.15" if name == former else "9.9")
        (directory / "owner").write_text(name)
        found = launch._spool(prepared)
        assert found is not None
        found.open()
        assert found.get(job) is not None
        assert found.owner == spool.owner
        assert found.mine()
    monkeypatch.setattr(launch, "library_versions", lambda: {**real, "torch": "9.9"})
    found = launch._spool(prepared)
    assert found is not None
    found.open()
    assert found.get(job) is None


def test_journals_without_numerics_are_continued_and_say_so_when_they_are_not_repeated(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "s"
    begun(directory)
    records = [dict(record) for record in read(directory).records]
    assert records[0].pop("numerics")["versions"]["numpy"]
    (directory / JOURNAL).write_bytes(b"".join(map(encode, records)))
    data = (directory / JOURNAL).read_bytes()
    with pytest.raises(ReplayError, match=r"the journal does not say with which libraries and CPU"):
        moved(directory).run()
    assert toy_study(directory).run().state is StudyState.FINISHED
    [record] = events_of(directory, "numerics")
    assert record["trial"] == BEFORE
    assert record["numerics"] == json.loads(json.dumps(numerics.numerics()))
    assert verify(directory, toy_study(directory)).problems == ()
    (directory / JOURNAL).write_bytes(data)
    assert moved(directory).run(restart=True).counts.done == 23


@pytest.mark.parametrize(
    ("changed", "exact"),
    [
        ({"libc": "glibc 2.36"}, "with that C library"),
        (
            {"versions": {"python": "3.11.7"}, "blas": "Zen", "features": ["AVX2", "AVX512F"]},
            "with those versions and on a CPU like that of trial 8, or here with: "
            "OPENBLAS_CORETYPE=Haswell NPY_DISABLE_CPU_FEATURES=AVX512F",
        ),
        (
            {"libc": "glibc 2.36", "features": ["AVX2", "FMA3"]},
            "with that C library and on a CPU like that of trial 8, or here with: "
            "NPY_DISABLE_CPU_FEATURES=FMA3",
        ),
        ({"machine": "aarch64", "blas": ""}, "on a CPU like that of trial 8"),
        ({"blas": "", "features": []}, "on a CPU like that of trial 8"),
    ],
)
def test_the_remedy_left_out_some_of_what_differs(changed: dict[str, Any], exact: str) -> None:
    then = {
        "versions": {"python": "3.11.2"}, "blas": "Haswell", "features": ["AVX2"],
        "machine": "x86_64", "libc": "glibc 2.31",
    }  # fmt: skip
    found = numerics.remedies(then, {**then, **changed}, "on a CPU like that of trial 8")
    assert " and ".join(found) == exact


def test_the_journal_notes_another_cpu_only_where_it_asks_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path / "s")
    here = dict(numerics.numerics())
    monkeypatch.setattr(numerics, "numerics", lambda: {**here, "blas": "Elsewhere"})
    toy_study(tmp_path / "s").run()
    toy_study(tmp_path / "s").run()
    assert [(r["trial"], r["numerics"]["blas"]) for r in events_of(tmp_path / "s", "numerics")] == [
        (BEFORE, "Elsewhere")
    ]
    history = StudyView.load(tmp_path / "s").history
    assert history.provenance.of(BEFORE - 1) == here
    assert verify(tmp_path / "s", toy_study(tmp_path / "s")).problems == ()


class _DiskGone(ToyStudyWorker):
    """Fails on ten trials in a row; those that ran beside them are finished."""

    def run(self, job: Job) -> Evaluation:
        if 8 <= job.number <= 17:
            raise RuntimeError("disk gone")
        return super().run(job)


class _DiskGoneFactory(ToyStudyFactory):
    def __call__(self) -> Worker:
        return _DiskGone(self.log, self.limit, self.seconds)


MANY: dict[str, Any] = {"budget": 40, "parallel": 6}


def _stopped_by_failures(directory: Path, **changes: Any) -> dict[int, str]:
    """Leave a study behind that ten failures in a row ended; return what was finished."""
    factory = _DiskGoneFactory(directory.parent / "evaluated.log")
    with pytest.raises(NothingUsableError, match="10 trials in a row failed"):
        toy_study(directory, make_pool=lambda: Shuffled(factory, 6), **MANY, **changes).run()
    view = StudyView.load(directory)
    done = {t.number: view.history.digests[t.number] for t in view.trials if t.evaluation}
    assert max(done) > 8
    return done


def test_a_restart_lost_evaluations_of_a_study_that_failures_had_ended(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    done = _stopped_by_failures(directory)
    view = moved(directory, **MANY).run(restart=True)
    assert done.items() <= view.history.digests.items()
    assert (view.counts.done, view.counts.failed) == (43, 0)
    assert [r["ev"] for r in events_of(directory, "restart", "retry")] == ["restart", "retry"]
    assert verify(directory, moved(directory, **MANY)).problems == ()
    cut(directory, events_of(directory, "retry")[0]["seq"])  # killed between the two
    view = moved(directory, **MANY).run()
    assert (view.counts.done, view.counts.failed) == (43, 0)
    assert done.items() <= view.history.digests.items()


def test_where_a_search_is_not_repeated_nothing_is_taken_back(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    _stopped_by_failures(directory)
    before = (directory / JOURNAL).read_bytes()
    with pytest.raises(ReplayError, match=r"^trial 8: dimension 0(.|\n)*--restart-search"):
        moved(directory, **MANY).run()
    assert (directory / JOURNAL).read_bytes() == before
    toy_study(directory, **MANY).run()  # and where it is, the failures are asked for again
    assert StudyView.load(directory).counts.done == 43
    assert len(events_of(directory, "retry")) == 1

    nested = {"identity": {"searcher": "nested_map"}}
    _stopped_by_failures(tmp_path / "nested", **nested)
    before = (tmp_path / "nested" / JOURNAL).read_bytes()
    with pytest.raises(InputError, match="nested_map merges the experts pair by pair"):
        moved(tmp_path / "nested", **MANY, **nested).run(restart=True)
    assert (tmp_path / "nested" / JOURNAL).read_bytes() == before


def test_a_restart_that_cannot_begin_bound_every_other_machine(tmp_path: Path) -> None:
    """It is not written before its searcher can be built and workers are there."""

    class Choosy(Moved):
        def __init__(self, problem: SearchProblem) -> None:
            if problem.budget < 15:
                raise InputError(f"search.trials: needs 15, got {problem.budget}")
            super().__init__(problem)

    def no_pool() -> Pool:
        raise SetupError("no GPU here")

    directory = tmp_path / "s"
    begun(directory)
    before = (directory / JOURNAL).read_bytes()
    with pytest.raises(InputError, match=r"cannot help here: search\.trials: needs 15, got 11"):
        moved(directory, make_searcher=Choosy).run(restart=True)
    assert (directory / JOURNAL).read_bytes() == before
    with pytest.raises(SetupError, match="no GPU here"):
        moved(directory, make_pool=no_pool).run(restart=True)
    assert (directory / JOURNAL).read_bytes() == before
    toy_study(directory).run()
    assert not events_of(directory, "restart")

    _stopped_by_failures(tmp_path / "failed")
    with pytest.raises(SetupError, match="no GPU here"):
        moved(tmp_path / "failed", make_pool=no_pool, **MANY).run(restart=True)
    assert moved(tmp_path / "failed", **MANY).run(restart=True).counts.failed == 0


def test_the_flag_under_other_versions_shut_those_out_that_the_study_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge import study as study_module

    def no_pool() -> Pool:
        raise SetupError("no GPU here")

    real, here = library_versions(), dict(numerics.numerics())
    versions = {**here["versions"], "numpy": "9.9"}
    directory = tmp_path / "s"
    begun(directory)
    toy_study(tmp_path / "done").run()
    finished = (tmp_path / "done" / JOURNAL).read_bytes()
    with monkeypatch.context() as other:
        other.setattr(study_module, "library_versions", lambda: {**real, "numpy": "9.9"})
        other.setattr(numerics, "numerics", lambda: {**here, "versions": versions})
        toy_study(tmp_path / "done").run(restart=True)
        with pytest.raises(SetupError, match="no GPU here"):
            toy_study(directory, make_pool=no_pool).run(restart=True)
        with pytest.raises(SetupError, match="no GPU here"):  # and from now on without the flag
            toy_study(directory, make_pool=no_pool).run()
    assert (tmp_path / "done" / JOURNAL).read_bytes() == finished
    assert verify(directory, toy_study(directory)).problems == ()
    asks = len(events_of(directory, "ask"))
    assert toy_study(directory).run().state is StudyState.FINISHED
    assert StudyView.load(directory).history.provenance.of(asks) == here

    begun(directory)  # once a trial was asked with the others, those count
    with monkeypatch.context() as other:
        other.setattr(study_module, "library_versions", lambda: {**real, "numpy": "9.9"})
        other.setattr(numerics, "numerics", lambda: {**here, "versions": versions})
        toy_study(directory).run(restart=True)
    with pytest.raises(InputError, match=r'installed\.numpy: "9\.9" -> '):
        toy_study(directory).run()


def test_a_restarted_polish_left_its_merge_for_a_better_baseline() -> None:
    warm = (
        WarmPoint((0.9,), (0.1,), "expert:a"),
        WarmPoint((0.2,), (0.5,), "start"),
        WarmPoint((0.3,), (0.6,), "trial 3"),
        WarmPoint((0.4,), (0.4,), "trial 4"),
    )

    def start(searcher: str, count: int, start: tuple[float, ...] | None) -> Any:
        problem = SearchProblem(1, 1, 50, 2, 1, warm=warm[:count], start=start)
        return taking_over(problem, searcher, {}).start

    assert start("polish", 4, (0.2,)) == (0.4,)
    assert start("polish", 3, (0.2,)) == (0.2,)
    assert start("polish", 4, None) == (0.9,)
    assert start("cma", 4, (0.2,)) == (0.9,)
