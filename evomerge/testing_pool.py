"""The behaviour of every pool, as test classes; for our own pools and for outsiders'.

Subclass, implement ``make_pool``, and let pytest collect the subclass.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from evomerge.errors import CallOrderError, EvomergeError, ModelError, SetupError
from evomerge.pool import Pool
from evomerge.recipe import ModelRef, Recipe
from evomerge.trial import Evaluation, Failure, Job, Outcome, Score, Worker, WorkerFactory


def toy_recipe(*row: float, **options: str | float | bool) -> Recipe:
    """Return a recipe with one block; ``options`` say what ``ToyWorker`` does with it.

    ``raises``: text of an error; ``sleep``: seconds; ``kill``: path of a marker file. The worker
    kills itself if the marker does not exist (and creates it first), always if it is ``always``.
    """
    base = ModelRef("base", "toy", "0" * 8)
    columns = tuple(f"weight.{index}" for index in range(len(row)))
    return Recipe(
        "linear", base, (), "model", "toy", columns, (row,), tuple(sorted(options.items()))
    )


class ToyWorker:
    """Scores a recipe by its table alone: item i of objective k is ``table[0][k] + i``."""

    def run(self, job: Job) -> Evaluation:
        """Do what the recipe's options say, then score it."""
        recipe = job.recipe
        time.sleep(float(recipe.option("sleep", 0.0)))
        _maybe_die(str(recipe.option("kill", "")))
        if text := recipe.option("raises", ""):
            raise RuntimeError(text)
        rows = zip(recipe.table[0], job.items, strict=False)
        scores = tuple(
            Score(value, 0.0, tuple(value + index for index in range(len(items))))
            for value, items in rows
        )
        return Evaluation(scores, {"score": 0.0})

    def describe(self) -> Mapping[str, str]:
        """Name the device and the threads that the pool allows."""
        return {"device": "toy", "threads": os.environ.get("OMP_NUM_THREADS", "unset")}


def _maybe_die(marker: str) -> None:
    if not marker:
        return
    if marker != "always":
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class ToyFactory:
    """Builds a ``ToyWorker``, or fails as ``fails`` says: ``model``, ``foreign``, ``dies``."""

    fails: str = ""

    def __call__(self) -> Worker:
        """Build the worker."""
        if self.fails == "model":
            raise ModelError("models[0]: no such directory")
        if self.fails == "foreign":
            raise ValueError("no luck")
        if self.fails == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return ToyWorker()


def _job(number: int, **options: str | float | bool) -> Job:
    return Job(number, toy_recipe(float(number), **options), (("a", "b"),))


def _collect(pool: Pool, count: int) -> dict[int, Outcome]:
    """Return ``count`` outcomes by number; fails when one comes twice."""
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < count:
        for outcome in pool.wait(60.0):
            assert outcome.number not in outcomes, f"job {outcome.number} came back twice"
            outcomes[outcome.number] = outcome
    with pytest.raises(CallOrderError):
        pool.wait(0.0)
    return outcomes


class PoolConformance:
    """What every pool does. ``pool`` has two workers where the pool can."""

    def make_pool(self, factory: WorkerFactory) -> Pool:
        """Return a new pool over workers that ``factory`` builds."""
        raise NotImplementedError

    @pytest.fixture
    def pool(self) -> Pool:
        """A pool of toy workers."""
        return self.make_pool(ToyFactory())

    def test_every_job_comes_back_once_with_its_own_result(self, pool: Pool) -> None:
        for number in range(7):
            pool.submit(_job(number))
        outcomes = _collect(pool, 7)
        assert sorted(outcomes) == list(range(7))
        for number, outcome in outcomes.items():
            assert isinstance(outcome.result, Evaluation)
            assert outcome.result.scores == (Score(number, 0.0, (number, number + 1.0)),)
            assert outcome.attempts == 1
            assert outcome.worker
        pool.close()

    def test_an_exception_becomes_a_failure_and_the_worker_lives_on(self, pool: Pool) -> None:
        pool.submit(_job(0, raises="bad\nweather"))
        pool.submit(_job(1))
        outcomes = _collect(pool, 2)
        assert outcomes[0].result == Failure("error", "RuntimeError: bad weather")
        assert isinstance(outcomes[1].result, Evaluation)
        pool.close()

    def test_a_number_in_flight_is_refused_and_free_again_afterwards(self, pool: Pool) -> None:
        pool.submit(_job(3))
        with pytest.raises(CallOrderError, match="job 3"):
            pool.submit(_job(3))
        _collect(pool, 1)
        pool.submit(_job(3))
        _collect(pool, 1)
        pool.close()

    def test_waiting_for_nothing_is_refused(self, pool: Pool) -> None:
        with pytest.raises(CallOrderError, match="nothing is in flight"):
            pool.wait()
        pool.close()

    def test_a_wait_that_times_out_returns_nothing_and_loses_nothing(self, pool: Pool) -> None:
        pool.submit(_job(0, sleep=0.3))
        assert tuple(pool.wait(0.0)) == ()
        assert set(_collect(pool, 1)) == {0}
        pool.close()

    def test_close_is_idempotent_and_final(self, pool: Pool) -> None:
        pool.submit(_job(0))
        pool.close()
        pool.close()
        with pytest.raises(CallOrderError, match="closed"):
            pool.submit(_job(1))
        with pytest.raises(CallOrderError, match="closed"):
            pool.wait()

    def test_describe_carries_the_workers_facts(self, pool: Pool) -> None:
        pool.submit(_job(0))
        _collect(pool, 1)
        facts = pool.describe()
        assert facts["device"] == "toy"
        assert facts["workers"] == str(pool.workers)
        pool.close()

    @pytest.mark.parametrize(
        ("fails", "error", "text"),
        [
            ("model", ModelError, r"^models\[0\]: no such directory$"),
            ("foreign", SetupError, "a worker could not start: ValueError: no luck"),
        ],
    )
    def test_a_worker_that_cannot_be_built_is_an_error_at_start(
        self, fails: str, error: type[EvomergeError], text: str
    ) -> None:
        with pytest.raises(error, match=text):
            self.make_pool(ToyFactory(fails)).submit(_job(0))


class ProcessPoolConformance(PoolConformance):
    """What pools do besides whose workers are processes of their own and can die."""

    def test_a_killed_workers_job_runs_again(self, pool: Pool, tmp_path: Path) -> None:
        pool.submit(_job(0, kill=str(tmp_path / "once")))
        pool.submit(_job(1))
        outcomes = _collect(pool, 2)
        assert isinstance(outcomes[0].result, Evaluation)
        assert outcomes[0].attempts == 2
        assert outcomes[1].attempts == 1
        pool.close()

    def test_a_job_that_kills_every_worker_fails_and_others_finish(self, pool: Pool) -> None:
        pool.submit(_job(0, kill="always"))
        for number in range(1, 4):
            pool.submit(_job(number))
        outcomes = _collect(pool, 4)
        failure = outcomes[0].result
        assert isinstance(failure, Failure)
        assert failure.kind == "crash"
        assert outcomes[0].attempts == 3
        assert all(isinstance(outcomes[n].result, Evaluation) for n in range(1, 4))
        pool.close()

    def test_no_job_is_lost_among_kills(self, pool: Pool, tmp_path: Path) -> None:
        for number in range(20):
            fatal = {"kill": str(tmp_path / str(number))} if number % 7 == 3 else {}
            pool.submit(_job(number, **fatal))
        outcomes = _collect(pool, 20)
        assert all(isinstance(outcome.result, Evaluation) for outcome in outcomes.values())
        assert {n for n, outcome in outcomes.items() if outcome.attempts == 2} == {3, 10, 17}
        pool.close()

    def test_workers_that_die_while_starting_are_an_error(self) -> None:
        with pytest.raises(SetupError, match="workers in a row died while starting"):
            self.make_pool(ToyFactory("dies"))
