"""What a worker has measured is not measured again, whatever happens to the driver."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from study_journals import cut, essence_of, events_of
from toy_study import ToyStudyFactory, toy_study

from evomerge.errors import StorageError
from evomerge.journal import read
from evomerge.pool import SerialPool
from evomerge.spool import SPOOL, Spool, SpoolingFactory, job_key
from evomerge.study import Study
from evomerge.study_view import StudyState
from evomerge.testing_pool import toy_recipe
from evomerge.trial import Evaluation, Job, Outcome, Race, Score

JOB = Job(3, toy_recipe(0.1, 0.2), (("a", "b"), ("c",)))
FOUND = Evaluation((Score(0.1, 1 / 3, (0.1, -0.0), (2.5, 1e-300)), Score(2.0, 0.0, (2.0,))), {})


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    made = Spool(tmp_path / SPOOL, "owner")
    made.open()
    return made


def test_an_evaluation_comes_back_bit_for_bit(spool: Spool) -> None:
    assert spool.get(JOB) is None
    spool.put(JOB, FOUND)
    found = spool.get(replace(JOB, number=9))  # the number is the pool's affair
    assert repr(found) == repr(FOUND)
    spool.drop(JOB)
    spool.drop(JOB)
    assert spool.get(JOB) is None


def test_every_part_of_a_job_has_its_own_entry() -> None:
    race = Race((("a",),), ((None,),), (1,), (((0.5,),),), (1.0,), 2.0, 1)
    jobs = [
        JOB,
        replace(JOB, recipe=toy_recipe(0.1, 0.25)),
        replace(JOB, items=(("a", "b"), ("d",))),
        replace(JOB, race=race),
        replace(JOB, race=replace(race, z=3.0)),
    ]
    assert len(set(map(job_key, jobs))) == len(jobs)


def test_an_entry_that_was_damaged_is_measured_again(spool: Spool) -> None:
    spool.put(JOB, FOUND)
    path = spool.entries()[0]
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:30], b"", whole.replace(b"0x1", b"0x2")):
        path.write_bytes(data)
        assert spool.get(JOB) is None


def test_what_is_not_finite_is_not_kept(spool: Spool) -> None:
    spool.put(JOB, Evaluation((Score(math.nan, 0.0, (0.0,)),), {}))
    assert spool.entries() == []


def test_a_disk_that_takes_nothing_costs_no_result(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    spool.directory.chmod(0o500)
    if os.access(spool.directory, os.W_OK):  # root writes anywhere
        for path in spool.directory.iterdir():
            path.unlink()
        spool.directory.rmdir()
    spool.put(JOB, FOUND)
    assert "job 3 is not spooled" in caplog.text


def test_a_worker_leaves_alone_what_another_one_is_writing(spool: Spool) -> None:
    theirs, abandoned = (spool.directory / f".{name}.json.part" for name in "ab")
    for path in (theirs, abandoned):
        path.write_bytes(b"half")
    os.utime(abandoned, (1.0, 1.0))
    spool.clear(kept=1)
    assert (theirs.exists(), abandoned.exists()) == (True, False)
    spool.clear()
    assert not theirs.exists()


def test_the_youngest_is_kept_though_another_entry_has_just_gone(spool: Spool) -> None:
    old, young = (spool.directory / f"{name}.json" for name in "ba")
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (1.0, 1.0))
    (spool.directory / "c.json").symlink_to("gone")
    spool.clear(kept=1)
    assert spool.entries() == [young]


def test_another_owner_finds_nothing(spool: Spool) -> None:
    spool.put(JOB, FOUND)
    other = Spool(spool.directory, "other fitness")
    assert not other.mine()
    other.open()
    assert (other.entries(), other.mine(), spool.mine()) == ([], True, False)


def test_a_worker_elsewhere_uses_its_own_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    log = tmp_path / "log"
    factory = SpoolingFactory(ToyStudyFactory(log), tmp_path / "not mounted here", "owner")
    jobs = [Job(n, toy_recipe(n / 100), (("a",),)) for n in range(70)]
    first = [factory().run(job) for job in jobs[:2]]
    assert [factory().run(job) for job in jobs[:2]] == first
    assert len(log.read_text().splitlines()) == 2
    worker = factory()
    for job in jobs:
        worker.run(job)
    kept = list((tmp_path / "cache" / "evomerge" / SPOOL / "owner").glob("*.json"))
    assert len(kept) == 64, "the disk of a worker would fill up"


def spooled_study(directory: Path, log: Path) -> Study:
    """Return a study whose one worker spools."""
    spool = Spool(directory / SPOOL, "owner")
    factory = SpoolingFactory(ToyStudyFactory(log), spool.directory, spool.owner)
    return toy_study(directory, spool=spool, budget=12, make_pool=partial(Dying, factory))


class Dying(SerialPool):
    """Its process is killed when a worker has returned and the journal has nothing of it yet."""

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        outcomes = super().wait(timeout)
        if any(outcome.number == int(os.environ.get("DIE_AT", "-1")) for outcome in outcomes):
            os.kill(os.getpid(), signal.SIGKILL)
        return outcomes


DRIVER = (
    "import sys; from pathlib import Path; from test_spool import spooled_study;"
    "spooled_study(Path(sys.argv[1]), Path(sys.argv[2])).run()"
)


def test_what_was_finished_while_the_driver_died_is_told_once(tmp_path: Path) -> None:
    toy_study(tmp_path / "calm", budget=12, log=tmp_path / "calm.log").run()
    directory, log = tmp_path / "s", tmp_path / "log"
    path = os.pathsep.join([str(Path.cwd()), str(Path(__file__).parent)])
    for trial in (0, 4, 9):
        driver = subprocess.run(
            [sys.executable, "-c", DRIVER, str(directory), str(log)],
            env={**os.environ, "PYTHONPATH": path, "DIE_AT": str(trial)},
            check=False,
        )
        assert driver.returncode == -signal.SIGKILL
    view = spooled_study(directory, log).run()
    assert view.state is StudyState.FINISHED
    assert essence_of(directory) == essence_of(tmp_path / "calm")
    assert sorted(log.read_text().splitlines()) == sorted(
        (tmp_path / "calm.log").read_text().splitlines()
    ), "an evaluation was lost and made again"
    spooled = [r["trial"] for r in events_of(directory, "tell") if r["worker"] == SPOOL]
    assert spooled == [0, 4, 9]
    assert Spool(directory / SPOOL, "owner").entries() == []


def test_no_worker_starts_for_what_the_spool_holds(tmp_path: Path) -> None:
    directory, log = tmp_path / "s", tmp_path / "log"
    spool = Spool(directory / SPOOL, "owner")
    first = toy_study(directory, budget=6, log=log)
    first.run()
    records = read(directory).records
    jobs = []
    for number in range(3):
        result = next(r for r in records if r["ev"] == "tell" and r["trial"] == number)
        jobs.append(result["seq"])
    cut(directory, min(jobs))
    spool.open()
    worker = SpoolingFactory(ToyStudyFactory(log), spool.directory, "owner")()
    for one in first.baselines:
        worker.run(Job(0, one.recipe, first.items["search"]))

    def no_pool() -> SerialPool:
        raise StorageError("the spool has them all")

    with pytest.raises(StorageError, match="the spool has them all"):
        toy_study(directory, budget=6, log=log, spool=spool, make_pool=no_pool).run()
    assert {r["trial"] for r in events_of(directory, "tell")} == {0, 1, 2}
