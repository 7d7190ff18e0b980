"""Long-lived Ray actors as workers.

Ray itself restarts nothing here (``max_restarts=0``, ``max_task_retries=0``): it may report an
error for a task that did finish, and it cannot count attempts per job. The pool replaces a dead
actor, gives its job to whoever is free, and counts.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import EvomergeError, SetupError
from evomerge.patience import Patience, Timeout
from evomerge.pool import build_worker, check_submit, check_wait, one_line, run_job
from evomerge.ray_session import begin, import_ray, own_signals
from evomerge.trial import Evaluation, Failure, Job, Outcome, Worker, WorkerFactory

logger = logging.getLogger(__name__)

#: Longest sleep inside Ray, so that a signal is noticed.
_SLICE_SECONDS = 0.5

#: When nobody has looked for so long, no deadline passes in that time.
_UNSEEN_SECONDS = 5.0

#: Seconds until the next try after a replacement could not start, doubled up to the last: the
#: memory of a dead worker may not be free yet, its node may be coming back.
_RETRY_SECONDS = (2.0, 60.0)


class _Host:
    """Lives in the actor; holds the worker. Never raises, so that an error means a death."""

    def __init__(self, threads: int, shared: bool) -> None:
        # On a cluster the driver saw its own machine in order; this one lacks something.
        self._where = f"on node {socket.gethostname()}" if shared else ""
        # Libraries read these when they are imported, so this comes before the factory, and
        # the factory comes as bytes. (A Ray runtime_env would do the same 3 s later.)
        for name in ("OMP", "MKL", "OPENBLAS", "NUMBA"):
            os.environ[f"{name}_NUM_THREADS"] = str(threads)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._worker: Worker | None = None

    def start(self, factory: bytes) -> dict[str, str] | EvomergeError:
        def build() -> Worker:
            made: Worker = pickle.loads(factory)()  # noqa: S301 - from the driver that owns us
            return made

        try:
            self._worker = build_worker(build)
            return dict(self._worker.describe())
        except EvomergeError as error:
            return _portable(SetupError(f"{error} ({self._where})") if self._where else error)

    def run(self, job: Job) -> Evaluation | Failure:
        assert self._worker is not None
        result = run_job(self._worker, job)
        try:
            pickle.dumps(result)
        except Exception as error:
            return Failure("bad_result", f"the result cannot be sent: {one_line(error)}")
        return result


def _portable(error: EvomergeError) -> EvomergeError:
    """Return ``error`` if it survives pickling, else a ``SetupError`` with its text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes, made in this line
    except Exception:
        return SetupError(one_line(error))
    return error


@dataclass
class _Entry:
    """A job in the pool and how often it was handed out."""

    job: Job
    attempts: int = 0


@dataclass
class _Slot:
    """One place for an actor; ``ref`` is what it is busy with (starting, or a job).

    ``deadline`` is that of the start or the job, or of the next try where there is no actor.
    """

    index: int
    generation: int = 0
    actor: Any = None
    ref: Any = None
    entry: _Entry | None = None
    ready: bool = False
    deadline: float = math.inf
    started: float = 0.0  # the job

    @property
    def name(self) -> str:
        return f"ray-{self.index}.{self.generation}"


class RayPool:
    """Workers as Ray actors, on this machine or on a cluster.

    Args:
        factory: builds the worker inside each actor; pickled.
        workers: actors.
        cpus_per_worker: reserved in Ray, and the number of threads that libraries use.
        gpus_per_worker: reserved in Ray; fractions share a GPU.
        address: of a running cluster; default is ``RAY_ADDRESS``, else a local Ray is started.
        max_attempts: a job whose worker died so often fails; when no worker is left, so many
            failed starts in a row end the pool.
        timeout: seconds for one job; its worker is killed and the job fails. ``auto`` follows
            what jobs take, see ``Patience``.
        start_timeout: seconds until the first worker, and every replacement, must be up.

    Raises:
        SetupError: Ray or the workers cannot start, or do not fit on the machine.
        EvomergeError: as the factory raised it.
    """

    def __init__(
        self,
        factory: WorkerFactory,
        workers: int,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
        address: str | None = None,
        max_attempts: int = 3,
        timeout: Timeout = None,
        start_timeout: float = 1800.0,
    ) -> None:
        self._ray = import_ray()
        self._factory = self._packed(factory)
        self._cpus = cpus_per_worker
        self._gpus = gpus_per_worker
        self._max_attempts = max_attempts
        self._patience = Patience(timeout)
        self._looked = time.monotonic()
        self._start_timeout = start_timeout
        self._queue: deque[_Entry] = deque()
        self._numbers: set[int] = set()
        self._finished: list[Outcome] = []
        self._slots = [_Slot(index) for index in range(workers)]
        self._up = False  # whether a worker ever was
        self._failed_starts = 0
        self._broken: EvomergeError | None = None
        self._facts: dict[str, str] = {}
        self._closed = False
        self._owned = not self._ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS")
        self._local = self._owned and not address
        self._joined = self._owned and bool(address)
        try:
            if self._owned:
                begin(self._ray, address, math.ceil(workers * self._cpus))
            self._check_resources()
            self._actor_class = self._make_actor_class()
            for slot in self._slots:
                self._launch(slot)
            self._await_first()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """Number of actors."""
        return len(self._slots)

    def submit(self, job: Job) -> None:
        """Queue a job; see ``Pool.submit``."""
        check_submit(job.number, self._closed, job.number in self._numbers)
        self._numbers.add(job.number)
        self._queue.append(_Entry(job))
        self._dispatch()

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Return what has finished; see ``Pool.wait``.

        Raises:
            CallOrderError: nothing is in flight, or the pool is closed.
            EvomergeError: no worker is left, and none can be started; first comes what finished.
        """
        check_wait(self._closed, bool(self._numbers))
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = 0.0 if self._finished else max(0.0, end - time.monotonic())
            if self._broken is None:
                self._step(left)
            if self._broken is not None and not self._finished:
                raise self._broken
            if self._finished or time.monotonic() >= end:
                break
        finished, self._finished = self._finished, []
        self._numbers.difference_update(outcome.number for outcome in finished)
        return tuple(finished)

    def describe(self) -> Mapping[str, str]:
        """Return what the first worker says of itself, and where the workers are."""
        return {
            "pool": "ray",
            "workers": str(self.workers),
            "ray": self._ray.__version__,
            **self._facts,
        }

    def close(self) -> None:
        """Kill the actors; shut Ray down if this pool started it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.clear()
        self._numbers.clear()
        for slot in self._slots:
            self._kill(slot)
        if self._owned:
            with own_signals():
                self._ray.shutdown()

    def _packed(self, factory: WorkerFactory) -> bytes:
        try:
            packed: bytes = self._ray.cloudpickle.dumps(factory)
        except Exception as error:
            raise SetupError(f"the worker cannot be sent to Ray: {one_line(error)}") from error
        return packed

    # -- starting ---------------------------------------------------------------------------

    def _check_resources(self) -> None:
        """Refuse what can never be scheduled; a connected cluster may still grow."""
        have = self._ray.cluster_resources()
        for name, each in (("CPU", self._cpus), ("GPU", self._gpus)):
            need, there = each * len(self._slots), float(have.get(name, 0.0))
            if need <= there + 1e-9:  # fractions of a GPU are sums of floats
                continue
            text = (
                f"pool: {len(self._slots)} workers with {each:g} {name} each need {need:g}, Ray "
                f"has {there:g}"
            )
            if self._local and name == "GPU":
                raise SetupError(f"{text}; use fewer workers or less per worker")
            logger.warning("%s; waiting for more to join", text)

    def _make_actor_class(self) -> Any:
        return self._ray.remote(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_task_retries=0
        )(_Host)

    def _launch(self, slot: _Slot) -> None:
        slot.generation += 1
        slot.ready = False
        slot.entry = None
        # A first worker may have to wait until its node joins.
        slot.deadline = time.monotonic() + self._start_timeout if self._up else math.inf
        slot.actor = self._actor_class.remote(max(1, int(self._cpus)), self._joined)
        slot.ref = slot.actor.start.remote(self._factory)

    def _await_first(self) -> None:
        end = time.monotonic() + self._start_timeout
        while not self._up:
            self._step(_SLICE_SECONDS)
            if self._broken is not None:
                raise self._broken
            if time.monotonic() >= end:
                raise self._too_slow()

    def _too_slow(self) -> SetupError:
        return SetupError(
            f"pool: no worker came up within {self._start_timeout:g} s; the cluster may lack free "
            f"resources ({self._cpus:g} CPU, {self._gpus:g} GPU per worker)"
        )

    # -- running ----------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for slot in self._slots:
            if not self._queue:
                return
            if slot.ready and slot.ref is None:
                slot.entry = self._queue.popleft()
                slot.entry.attempts += 1
                slot.started = time.monotonic()
                slot.deadline = slot.started + self._patience.limit(slot.entry.job)
                slot.ref = slot.actor.run.remote(slot.entry.job)

    def _step(self, seconds: float) -> None:
        """Wait for something to happen, at most ``seconds``, and deal with all that did."""
        unseen = time.monotonic() - self._looked
        if unseen > _UNSEEN_SECONDS:  # stopped, or busy elsewhere: what finished is yet to arrive
            for slot in self._slots:
                slot.deadline += unseen
                slot.started += unseen
        busy = {slot.ref: slot for slot in self._slots if slot.ref is not None}
        due = min(slot.deadline for slot in self._slots) - time.monotonic()
        timeout = max(0.0, min(seconds, due, _SLICE_SECONDS))
        refs, ready = list(busy), []
        if refs:
            ready = self._ready(refs, 1, timeout)
        else:  # every worker is dead and waits for its next try
            time.sleep(timeout)
        if ready:
            ready = self._ready(refs, len(refs), 0)
        for ref in ready:
            self._on_ready(busy[ref])
        for slot in self._slots:
            if time.monotonic() >= slot.deadline:
                self._on_timeout(slot)
        self._dispatch()
        self._looked = time.monotonic()

    def _ready(self, refs: list[Any], count: int, timeout: float) -> list[Any]:
        try:
            ready: list[Any] = self._ray.wait(refs, num_returns=count, timeout=timeout)[0]
        except SystemError as error:
            # What the handler of a signal raises inside of Ray comes out as the cause of this.
            signalled = error.__cause__ or error.__context__
            if signalled is None or isinstance(signalled, Exception):
                raise
            raise signalled from None
        return ready

    def _on_ready(self, slot: _Slot) -> None:
        ref, slot.ref = slot.ref, None
        try:
            value = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            # ``_Host`` raises nothing: what comes here failed in Ray's own code around it.
            value = Failure("error", one_line(error))
            if slot.entry is None:
                value = SetupError(f"a worker could not start: {one_line(error)}")
        except self._ray.exceptions.RayError as error:
            self._on_death(slot, error)
            return
        if slot.entry is None:
            self._on_started(slot, value)
            return
        if isinstance(value, Evaluation):
            self._patience.observe(value, time.monotonic() - slot.started)
        self._finish(slot, value)

    def _on_started(self, slot: _Slot, value: dict[str, str] | EvomergeError) -> None:
        if isinstance(value, EvomergeError):
            self._on_failed_start(slot, value, 1 if not self._up else self._max_attempts)
            return
        slot.ready = True
        slot.deadline = math.inf
        self._up, self._failed_starts = True, 0
        self._facts = self._facts or value

    def _on_failed_start(self, slot: _Slot, error: EvomergeError, enough: int) -> None:
        """Try again later, unless ``enough`` starts in a row failed and no worker is left."""
        self._kill(slot)
        self._failed_starts += 1
        if self._failed_starts >= enough and not any(other.ready for other in self._slots):
            self._broken = self._broken or error
            slot.deadline = math.inf
            return
        if not self._up:
            self._launch(slot)
            return
        first, last = _RETRY_SECONDS
        pause = min(first * 2.0 ** (self._failed_starts - 1), last)
        slot.deadline = time.monotonic() + pause
        logger.warning(
            "worker %s could not start, next try in %.0f s: %s", slot.name, pause, one_line(error)
        )

    def _on_death(self, slot: _Slot, error: Exception) -> None:
        entry = slot.entry
        logger.warning("worker %s died: %s", slot.name, one_line(error))
        self._kill(slot)
        if entry is None:
            dead = SetupError(
                f"pool: {self._failed_starts + 1} workers in a row died while starting: "
                f"{one_line(error)} (out of memory is the usual cause)"
            )
            self._on_failed_start(slot, dead, self._max_attempts)
            return
        if entry.attempts >= self._max_attempts:
            message = f"killed its worker {entry.attempts} times: {one_line(error)}"
            self._finish(slot, Failure("crash", message))
        else:
            self._queue.appendleft(entry)
        self._launch(slot)

    def _on_timeout(self, slot: _Slot) -> None:
        """End a job that took too long, or a start; or start a worker whose time has come."""
        if slot.actor is None:
            self._launch(slot)
            return
        if slot.entry is None:
            self._on_failed_start(slot, self._too_slow(), self._max_attempts)
            return
        self._kill(slot)
        message = f"took longer than {slot.deadline - slot.started:.4g} s; its worker was killed"
        self._finish(slot, Failure("timeout", message))
        self._launch(slot)

    def _finish(self, slot: _Slot, result: Evaluation | Failure) -> None:
        assert slot.entry is not None
        entry, slot.entry = slot.entry, None
        slot.deadline = math.inf
        self._finished.append(Outcome(entry.job.number, result, entry.attempts, slot.name))

    def _kill(self, slot: _Slot) -> None:
        """Kill an actor, whether or not it still lives."""
        actor, slot.actor, slot.ref, slot.ready = slot.actor, None, None, False
        if actor is not None:
            self._ray.kill(actor, no_restart=True)
