from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evomerge import ray_pool
from evomerge.errors import SetupError
from evomerge.patience import LEAST
from evomerge.pool import Pool, SerialPool
from evomerge.ray_pool import RayPool
from evomerge.testing_pool import (
    PoolConformance,
    ProcessPoolConformance,
    ToyFactory,
    ToyWorker,
    toy_recipe,
)
from evomerge.trial import (
    Evaluation,
    Failure,
    Job,
    Outcome,
    Worker,
    WorkerFactory,
)


def _job(number: int, **options: str | float | bool) -> Job:
    return Job(number, toy_recipe(float(number), **options), (("a", "b"),))


def limited(folder: Path, first: int, last: int, seconds: float = 0.0) -> WorkerFactory:
    """Note each start in ``folder``; those after ``first`` fail, until there were ``last``."""

    def factory() -> Worker:  # a closure travels by value: the actors cannot import this module
        number = len(list(folder.glob("start*")))
        (folder / f"start{os.getpid()}").touch()
        if first <= number < last:
            time.sleep(seconds)
            raise RuntimeError("the memory is not free yet")
        return ToyWorker()

    return factory


class TestSerialPool(PoolConformance):
    def make_pool(self, factory: WorkerFactory) -> Pool:
        return SerialPool(factory)


@pytest.fixture(scope="module")
def ray_started() -> Iterator[None]:
    """One Ray for many tests: starting it takes seconds, and a pool uses what is there."""
    import ray

    ray.init(
        address="local",  # never one that happens to run on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=2**27,
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_started")
class TestRayPool(ProcessPoolConformance):
    def make_pool(self, factory: WorkerFactory) -> Pool:
        return RayPool(factory, workers=2, start_timeout=120.0)

    def test_a_running_job_does_not_block_a_short_wait(self) -> None:
        pool = self.make_pool(ToyFactory())
        pool.submit(_job(0, sleep=3.0))
        started = time.monotonic()
        assert tuple(pool.wait(0.2)) == ()
        assert time.monotonic() - started < 3.0
        assert [outcome.number for outcome in pool.wait(60.0)] == [0]
        pool.close()

    def test_a_job_over_its_time_fails_and_its_worker_is_replaced(self) -> None:
        pool = RayPool(ToyFactory(), workers=1, timeout=1.0, start_timeout=120.0)
        pool.submit(_job(0, sleep=600.0))
        pool.submit(_job(1))
        outcomes = {outcome.number: outcome for _ in range(2) for outcome in pool.wait(60.0)}
        assert outcomes[0].result == Failure(
            "timeout", "took longer than 1 s; its worker was killed"
        )
        assert isinstance(outcomes[1].result, Evaluation)
        pool.close()

    def test_the_limit_follows_what_jobs_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("evomerge.patience.FLOOR_SECONDS", 1.0)
        pool = RayPool(ToyFactory(), workers=1, timeout="auto", start_timeout=120.0)
        for number in range(LEAST):
            pool.submit(_job(number, sleep=0.1))
            pool.wait(60.0)
        pool.submit(_job(90, sleep=600.0))
        (outcome,) = pool.wait(60.0)
        assert isinstance(outcome.result, Failure)
        assert outcome.result.kind == "timeout"
        assert outcome.result.message.startswith("took longer than 1 s")
        pool.close()

    def test_no_time_passes_while_nobody_looks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A driver that was frozen finds its workers late by no fault of theirs."""
        monkeypatch.setattr(ray_pool, "_UNSEEN_SECONDS", 1.0)
        pool = RayPool(ToyFactory(), workers=1, timeout=1.5, start_timeout=120.0)
        pool.submit(_job(0, sleep=2.5))
        assert tuple(pool.wait(0.0)) == ()
        time.sleep(2.0)  # as long as a frozen driver does not look
        (outcome,) = pool.wait(60.0)
        assert isinstance(outcome.result, Evaluation), outcome
        pool.close()

    def test_a_replacement_that_could_not_start_ended_everything(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_pool, "_RETRY_SECONDS", (0.2, 1.0))
        factory = limited(tmp_path, 2, 4)  # the third and fourth start fail
        pool = RayPool(factory, workers=2, start_timeout=120.0)
        while len(list(tmp_path.glob("start*"))) < 2:
            pool._step(0.1)
        pool.submit(_job(0, kill=str(tmp_path / "killed")))
        pool.submit(_job(1, sleep=2.0))
        outcomes: dict[int, Outcome] = {}
        while len(outcomes) < 2:
            outcomes |= {outcome.number: outcome for outcome in pool.wait(60.0)}
        assert all(isinstance(outcome.result, Evaluation) for outcome in outcomes.values())
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("start*"))) < 5 or not all(s.ready for s in pool._slots):
            pool._step(0.1)
            assert time.monotonic() < deadline, "the dead worker was never replaced"
        pool.close()

    def test_what_finished_comes_before_the_error_that_no_worker_is_left(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_pool, "_RETRY_SECONDS", (0.1, 0.1))
        pool = RayPool(limited(tmp_path, 1, 99), workers=1, start_timeout=120.0)
        pool.submit(_job(0))
        pool.submit(_job(1, kill="always"))
        outcomes: list[Outcome] = []
        with pytest.raises(SetupError, match="the memory is not free yet"):
            while True:
                outcomes += pool.wait(60.0)
        assert [outcome.number for outcome in outcomes] == [0]
        assert len(list(tmp_path.glob("start*"))) == 1 + 3, "3 starts in a row are tried"
        pool.close()

    def test_a_replacement_that_never_comes_up_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray_pool, "_RETRY_SECONDS", (0.1, 0.1))
        factory = limited(tmp_path, 1, 99, seconds=600.0)
        pool = RayPool(factory, workers=1, start_timeout=120.0, max_attempts=2)
        pool._start_timeout = 3.0
        pool.submit(_job(0, kill="always"))
        with pytest.raises(SetupError, match="no worker came up within 3 s"):
            pool.wait(100.0)
        pool.close()

    def test_threads_follow_cpus_per_worker(self) -> None:
        pool = RayPool(ToyFactory(), workers=1, cpus_per_worker=2, start_timeout=120.0)
        assert pool.describe()["threads"] == "2"
        pool.close()

    def test_a_pool_that_found_ray_running_leaves_it_running(self) -> None:
        import ray

        self.make_pool(ToyFactory()).close()
        assert ray.is_initialized()

    def test_a_factory_that_cannot_be_pickled_is_refused(self) -> None:
        lock = threading.Lock()

        def factory() -> Worker:
            with lock:
                return ToyWorker()

        with pytest.raises(SetupError, match="the worker cannot be sent to Ray"):
            self.make_pool(factory)


OWN_RAY = """
import signal
import ray
from evomerge.ray_pool import RayPool
from evomerge.testing_pool import ToyFactory, toy_recipe
from evomerge.trial import Job

handler = lambda number, frame: None
signal.signal(signal.SIGTERM, handler)
pool = RayPool(ToyFactory(), workers=1, start_timeout=120.0)
assert signal.getsignal(signal.SIGTERM) is handler, "Ray's handler stayed"
pool.submit(Job(0, toy_recipe(2.0), (("a",),)))
(outcome,) = pool.wait(60.0)
assert outcome.result.scores[0].value == 2.0
pool.submit(Job(1, toy_recipe(2.0, kill="always"), (("a",),)))
(outcome,) = pool.wait(60.0)
assert outcome.result.kind == "crash", outcome
pool.close()
assert not ray.is_initialized()
print("fine")
"""


def test_a_pool_starts_and_stops_its_own_ray_without_a_word(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 20)  # Ray's sockets would not fit below it
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", OWN_RAY],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), "TMPDIR": str(long)},
        timeout=200,
    )
    # The pool itself says through logging that a worker died; Ray says nothing.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("worker ray-")]
    assert (done.returncode, done.stdout, lines) == (0, "fine\n", [])


def test_more_gpus_than_there_are_is_an_error(ray_started: None) -> None:
    with pytest.raises(SetupError, match=r"GPU|no worker came up"):
        RayPool(ToyFactory(), workers=1, gpus_per_worker=64, start_timeout=2.0)
