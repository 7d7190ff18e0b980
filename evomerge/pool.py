"""Pools run jobs somewhere and return each exactly once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from evomerge.errors import CallOrderError, EvomergeError, SetupError
from evomerge.trial import Evaluation, Failure, Job, Outcome, Worker, WorkerFactory

logger = logging.getLogger(__name__)

#: Longest error text that travels back and is recorded.
MESSAGE_CHARACTERS = 500


class Pool(Protocol):
    """Runs jobs on workers.

    A job that raises, or whose worker dies for good, comes back as an ``Outcome`` holding a
    ``Failure``; it never disappears and never comes back twice.
    """

    @property
    def workers(self) -> int:
        """How many jobs can run at the same time."""
        ...

    def submit(self, job: Job) -> None:
        """Accept a job; returns at once.

        Raises:
            CallOrderError: the number is already in flight, or the pool is closed.
        """
        ...

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Return what has finished, at least one outcome unless ``timeout`` seconds pass.

        Raises:
            CallOrderError: nothing is in flight.
        """
        ...

    def describe(self) -> Mapping[str, str]:
        """Return facts about the workers for the record."""
        ...

    def close(self) -> None:
        """Stop the workers; idempotent."""
        ...


class SerialPool:
    """One worker in this process; a job runs inside ``wait``.

    The worker is built at the first ``submit``. A running job cannot be cut short here, so
    ``wait`` may take longer than its timeout; ``wait(0)`` starts nothing and returns nothing.
    """

    def __init__(self, factory: WorkerFactory) -> None:
        self._factory = factory
        self._worker: Worker | None = None
        self._queue: deque[Job] = deque()
        self._closed = False

    @property
    def workers(self) -> int:
        """One."""
        return 1

    def submit(self, job: Job) -> None:
        """Queue a job; see ``Pool.submit``.

        Raises:
            CallOrderError: the number is in flight, or the pool is closed.
            EvomergeError: the worker cannot be built (``SetupError`` for foreign errors).
        """
        check_submit(
            job.number, self._closed, any(job.number == other.number for other in self._queue)
        )
        if self._worker is None:
            self._worker = build_worker(self._factory)
        self._queue.append(job)

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Run the oldest job; see ``Pool.wait``."""
        check_wait(self._closed, bool(self._queue))
        if timeout is not None and timeout <= 0:
            return ()
        assert self._worker is not None
        job = self._queue.popleft()
        return (Outcome(job.number, run_job(self._worker, job), 1, "serial"),)

    def describe(self) -> Mapping[str, str]:
        """Return what the worker says of itself, once it is built."""
        facts = {"pool": "serial", "workers": "1"}
        return facts if self._worker is None else {**facts, **self._worker.describe()}

    def close(self) -> None:
        """Drop the worker and what is queued; idempotent."""
        self._closed = True
        self._queue.clear()
        self._worker = None


def check_submit(number: int, closed: bool, in_flight: bool) -> None:
    """Raise ``CallOrderError`` where ``submit`` is not allowed."""
    if closed:
        raise CallOrderError(f"submit(job {number}): the pool is closed")
    if in_flight:
        raise CallOrderError(f"submit(job {number}): a job with this number is already in flight")


def check_wait(closed: bool, in_flight: bool) -> None:
    """Raise ``CallOrderError`` where ``wait`` is not allowed."""
    if closed:
        raise CallOrderError("wait(): the pool is closed")
    if not in_flight:
        raise CallOrderError("wait(): nothing is in flight; submit a job first")


def build_worker(factory: WorkerFactory) -> Worker:
    """Build a worker and turn foreign errors into one that says what could not start.

    Raises:
        EvomergeError: as the factory raised it.
        SetupError: anything else.
    """
    try:
        return factory()
    except EvomergeError:
        raise
    except Exception as error:
        logger.debug("worker construction failed", exc_info=True)
        raise SetupError(f"a worker could not start: {one_line(error)}") from error


def run_job(worker: Worker, job: Job) -> Evaluation | Failure:
    """Run a job; the boundary where any exception becomes a failed trial."""
    try:
        return worker.run(job)
    except Exception as error:
        logger.debug("job %d failed", job.number, exc_info=True)
        return Failure("oom" if out_of_memory(error) else "error", one_line(error))


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the machine or (by torch's name for it) of a device."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names


def one_line(error: BaseException) -> str:
    """Return type and text of an error as one line of bounded length."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= MESSAGE_CHARACTERS else line[: MESSAGE_CHARACTERS - 1] + "…"
