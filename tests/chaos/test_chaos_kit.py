"""The suite itself: its pool is a pool, and its judge sees what it must see."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from chaos_study import Plan, notes
from crash_points import Points
from process_pool import ProcessPool
from study_journals import cut
from under_fire import UnderFire, undisturbed

from evomerge.journal import JOURNAL, encode, read
from evomerge.pool import Pool
from evomerge.testing_pool import ProcessPoolConformance
from evomerge.trial import WorkerFactory


class TestProcessPool(ProcessPoolConformance):
    def make_pool(self, factory: WorkerFactory) -> Pool:
        return ProcessPool(factory, 2)


@pytest.fixture
def study(tmp_path: Path) -> UnderFire:
    """A study of 12 trials that a driver of its own has run."""
    made = UnderFire(Plan(trials=12), tmp_path / "fire", random.Random(0))
    made.start()
    made.finish()
    return made


def test_the_judge_finds_nothing_where_nothing_is(study: UnderFire, tmp_path: Path) -> None:
    assert study.judge(undisturbed(Plan(trials=12), tmp_path / "calm")).clean


def test_the_judge_sees_another_end(study: UnderFire, tmp_path: Path) -> None:
    tally = study.judge(undisturbed(Plan(trials=12, seed=2), tmp_path / "calm"))
    assert not tally.identical
    assert not tally.clean


def test_the_judge_sees_what_was_redone(study: UnderFire, tmp_path: Path) -> None:
    study.note_complete()
    cut(tmp_path / "fire", 20)  # as if the disk had forgotten what it had promised
    study.start()
    study.finish()
    tally = study.judge(undisturbed(Plan(trials=12), tmp_path / "calm"))
    assert tally.identical
    assert tally.redone > 5
    assert not tally.clean


def test_the_judge_sees_what_was_lost_and_doubled(study: UnderFire, tmp_path: Path) -> None:
    reference = undisturbed(Plan(trials=12), tmp_path / "calm")
    study.note_complete()
    other = tmp_path / "other"
    undisturbed(Plan(trials=12, seed=2), other)
    shutil.copy(other / JOURNAL, tmp_path / "fire" / JOURNAL)
    assert study.judge(reference).lost > 5


def test_a_doubled_result_is_refused_by_the_journal(study: UnderFire, tmp_path: Path) -> None:
    records = read(tmp_path / "fire").records
    tell = next(record for record in records if record["ev"] == "tell")
    with (tmp_path / "fire" / JOURNAL).open("ab") as file:
        file.write(encode({**tell, "seq": len(records), "epoch": records[-1]["epoch"]}))
    with pytest.raises(Exception, match="has a result already"):
        study.judge(undisturbed(Plan(trials=12), tmp_path / "calm"))


def test_points_are_counted_where_they_are_watched(tmp_path: Path) -> None:
    import multiprocessing

    from process_pool import context

    ours, theirs = multiprocessing.Pipe()
    child = context().Process(target=_some_steps, args=(tmp_path, theirs))
    child.start()
    names = ours.recv()
    child.join()
    assert names == [
        "before open one", "before rename two", "after rename two", "before unlink two",
        "after unlink two",
    ]  # fmt: skip
    assert not notes(tmp_path).exists()


def _some_steps(place: Path, pipe: object) -> None:
    points = Points(place, None)
    points.install()
    (place / "one").write_text("text")
    (place / "one").rename(place / "two")
    (place / "two").unlink()
    pipe.send(points.names)  # type: ignore[attr-defined]
