"""A pool of real processes that start in milliseconds, so that hundreds of them can be killed.

It keeps the contract of ``evomerge.pool.Pool`` and counts attempts as ``RayPool`` does. Ray takes
a second to replace a worker; the same faults run on it in a smaller form.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from evomerge.errors import EvomergeError, SetupError
from evomerge.patience import Patience, Timeout
from evomerge.pool import build_worker, check_submit, check_wait, run_job
from evomerge.trial import Evaluation, Failure, Job, Outcome, WorkerFactory

MAX_ATTEMPTS = 3


def context() -> ForkServerContext | ForkContext:
    """Return the context in which drivers and workers start, within milliseconds.

    Drivers are forked from one clean process that has loaded the searchers already, and workers
    from their driver; each closes what it inherited, as a process that was started anew would.
    """
    if multiprocessing.parent_process() is not None:
        return multiprocessing.get_context("fork")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["__main__", "preloaded"])
    here = Path(__file__).parent
    before = os.environ.get("PYTHONPATH")
    folders = [str(here), str(here.parent), str(here.parents[1])]
    # Python 3.11 does not tell that process where the modules are that it is to load.
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return made


@dataclass
class _Entry:
    job: Job
    attempts: int = 0


@dataclass
class _Slot:
    name: str
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    entry: _Entry | None = None
    since: float = 0.0


@dataclass
class ProcessPool:
    """Workers as processes of their own.

    Attributes:
        factory: builds the worker in each of them.
        workers: how many.
        timeout: see ``Patience``; the worker of a job that takes longer is killed.
    """

    factory: WorkerFactory
    workers: int
    timeout: Timeout = None
    _queue: deque[_Entry] = field(default_factory=deque)
    _numbers: set[int] = field(default_factory=set)
    _finished: list[Outcome] = field(default_factory=list)
    _slots: list[_Slot] = field(default_factory=list)
    _facts: dict[str, str] = field(default_factory=dict)
    _failed_starts: int = 0
    _closed: bool = False

    def __post_init__(self) -> None:
        """Start the workers and wait for the first.

        Raises:
            EvomergeError: as the factory raised it.
            SetupError: three workers in a row died while starting.
        """
        self._patience = Patience(self.timeout)
        self._slots = [self._start(f"process-{index}.0") for index in range(self.workers)]
        try:
            while not any(slot.ready for slot in self._slots):
                self._step(10.0)
        except BaseException:
            self.close()
            raise

    def _start(self, name: str) -> _Slot:
        ours, theirs = multiprocessing.Pipe()
        process = context().Process(target=_serve, args=(theirs, self.factory), daemon=True)
        process.start()
        theirs.close()
        return _Slot(name, process, ours)

    def submit(self, job: Job) -> None:
        """Queue a job; see ``Pool.submit``."""
        check_submit(job.number, self._closed, job.number in self._numbers)
        self._numbers.add(job.number)
        self._queue.append(_Entry(job))
        self._dispatch()

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Return what has finished; see ``Pool.wait``."""
        check_wait(self._closed, bool(self._numbers))
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not self._finished and (left := end - time.monotonic()) > 0:
            self._step(min(left, 0.5))
        finished, self._finished = self._finished, []
        self._numbers.difference_update(outcome.number for outcome in finished)
        return tuple(finished)

    def describe(self) -> Mapping[str, str]:
        """Return what a worker says of itself."""
        return {"pool": "processes", "workers": str(self.workers), **self._facts}

    def close(self) -> None:
        """Kill the workers; idempotent."""
        self._closed = True
        for slot in self._slots:
            self._end(slot)
        self._slots = []

    def _end(self, slot: _Slot) -> None:
        slot.process.kill()
        slot.process.join()
        slot.process.close()
        slot.pipe.close()

    def _dispatch(self) -> None:
        for slot in self._slots:
            if self._queue and slot.ready and slot.entry is None:
                slot.entry = self._queue.popleft()
                slot.entry.attempts += 1
                slot.since = time.monotonic()
                with contextlib.suppress(BrokenPipeError):  # it is dead: the next step sees that
                    slot.pipe.send(slot.entry.job)

    def _step(self, seconds: float) -> None:
        now = time.monotonic()
        limits = [
            slot.since + self._patience.limit(slot.entry.job) - now
            for slot in self._slots
            if slot.entry is not None
        ]
        readable = wait([slot.pipe for slot in self._slots], max(0.0, min([seconds, *limits])))
        for index, slot in enumerate(self._slots):
            if slot.pipe in readable:
                self._receive(index, slot)
            elif slot.entry is not None:
                spent = time.monotonic() - slot.since
                if spent >= self._patience.limit(slot.entry.job):
                    self._finish(slot, Failure("timeout", f"took longer than {spent:.1f} s"))
                    self._replace(index, slot)
        self._dispatch()

    def _receive(self, index: int, slot: _Slot) -> None:
        try:
            value = slot.pipe.recv()
        except (EOFError, ConnectionResetError):
            self._on_death(index, slot)
            return
        if isinstance(value, EvomergeError):
            raise value
        if not slot.ready:
            slot.ready, self._facts, self._failed_starts = True, value, 0
            return
        if isinstance(value, Evaluation):
            self._patience.observe(value, time.monotonic() - slot.since)
        self._finish(slot, value)

    def _on_death(self, index: int, slot: _Slot) -> None:
        if slot.entry is None:
            self._failed_starts += not slot.ready
            if self._failed_starts >= MAX_ATTEMPTS:
                raise SetupError(f"pool: {MAX_ATTEMPTS} workers in a row died while starting")
        elif slot.entry.attempts >= MAX_ATTEMPTS:
            self._finish(slot, Failure("crash", f"killed its worker {MAX_ATTEMPTS} times"))
        else:
            self._queue.appendleft(slot.entry)
        self._replace(index, slot)

    def _replace(self, index: int, slot: _Slot) -> None:
        self._end(slot)
        place, _, generation = slot.name.partition(".")
        self._slots[index] = self._start(f"{place}.{int(generation) + 1}")

    def _finish(self, slot: _Slot, result: Evaluation | Failure) -> None:
        assert slot.entry is not None
        entry, slot.entry = slot.entry, None
        self._finished.append(Outcome(entry.job.number, result, entry.attempts, slot.name))


def _serve(pipe: Connection, factory: WorkerFactory) -> None:
    """Be a worker until the driver is gone, however it went."""
    # The lock of the study, or the pipe of another worker, must not outlive the driver here.
    os.closerange(3, pipe.fileno())
    os.closerange(pipe.fileno() + 1, 4096)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        worker = build_worker(factory)
    except EvomergeError as error:
        pipe.send(error)
        return
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(dict(worker.describe()))
        while True:
            pipe.send(run_job(worker, pipe.recv()))
