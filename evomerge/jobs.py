"""Jobs on a Ray cluster: submit, attach, follow, stop; the only module that speaks Ray Jobs.

A submission id is the study's key and the number of the attempt. Ray refuses an id that it has
seen, so of two submitters at the same moment one starts the driver and the other finds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from evomerge.errors import InputError, LockedError, SetupError
from evomerge.submission import STUDY, Package, StudyKey, bare_address

#: Until a cluster that does not answer is given up; Ray itself would wait for minutes.
_CONNECT_SECONDS = 10.0
#: Between two looks at a job.
_POLL_SECONDS = 1.0
#: Ray ends a job so many seconds after it asked it to stop, when it has not ended itself.
GRACE_SECONDS = 600

#: Name a cluster, the first that is set wins.
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
#: Where `ray dashboard` brings a cluster's port to.
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_NOT_INSTALLED = re.compile(r"No module named '?evomerge\b")
#: They report each step at level INFO, on the user's terminal.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)  # fmt: skip
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_REMEDY = (
    "start the cluster (`ray up ray_cluster.yaml`), bring its port here (`ray dashboard "
    "ray_cluster.yaml`), and say where it is: --address http://127.0.0.1:8265, or the variables "
    "RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
)
_ACCESS_REMEDY = (
    "set RAY_AUTH_MODE=token, and the token in the file ~/.ray/auth_token, in RAY_AUTH_TOKEN_PATH "
    "or in RAY_AUTH_TOKEN; it must be the cluster's own"
)


#: What a head says whose job agent is not up yet, and seconds to wait for it.
_STARTING, _STARTING_SECONDS = "No available agent", 30.0


class Client(Protocol):
    """What is used of ``ray.job_submission.JobSubmissionClient``."""

    def list_jobs(self) -> Sequence[Any]: ...  # noqa: D102 - Ray's own

    def submit_job(self, **arguments: Any) -> str: ...  # noqa: D102

    def get_job_logs(self, job_id: str) -> str: ...  # noqa: D102

    def tail_job_logs(self, job_id: str) -> Any: ...  # noqa: D102

    def stop_job(self, job_id: str) -> bool: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Job:
    """One attempt at a study on a cluster.

    Attributes:
        id: Ray's submission id.
        attempt: its number, from 1.
        status: Ray's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: what Ray says about the status.
        exit_code: of the driver; None while it runs, or where it was lost.
        digest: of what it was submitted with.
        started, ended: unix seconds; None where not.
    """

    id: str
    attempt: int
    status: str
    message: str
    exit_code: int | None
    digest: str
    started: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        """Whether it has ended, however."""
        return self.status in _OVER

    @property
    def lost(self) -> bool:
        """Whether its driver did not end by itself: killed, or gone with its machine."""
        return self.status == "FAILED" and (self.exit_code is None or self.exit_code < 0)


@dataclass(frozen=True, slots=True)
class Submission:
    """What came of submitting.

    Attributes:
        job: submission id.
        attempt: its number, from 1.
        attached: whether it ran already.
        before: the attempt before this one, None for the first.
    """

    job: str
    attempt: int
    attached: bool
    before: Job | None


class Jobs:
    """The jobs of one cluster.

    Args:
        client: of Ray Jobs; see ``connect``.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def attempts(self, key: StudyKey) -> tuple[Job, ...]:
        """Return all attempts at a study that the cluster remembers, oldest first.

        Raises:
            SetupError: the cluster does not answer.
        """
        with _errors():
            found = self._client.list_jobs()
        jobs = [_job(one) for one in found if _attempt(one.submission_id, key)]
        return tuple(sorted(jobs, key=lambda job: job.attempt))

    def last(self, key: StudyKey) -> Job:
        """Return the newest attempt at a study.

        Raises:
            InputError: there is none.
            SetupError: the cluster does not answer.
        """
        attempts = self.attempts(key)
        if not attempts:
            raise InputError(
                f"{key.name}: no job of this study on the cluster (it knows none whose id begins "
                f"with {key.job}; a cluster that was restarted has forgotten its jobs, so submit "
                "the study again: it continues)"
            )
        return attempts[-1]

    def submit(
        self, package: Package, grace: int = GRACE_SECONDS, options: Sequence[str] = ()
    ) -> Submission:
        """Start a driver for a study, unless one is at work on it.

        Args:
            package: what it takes along.
            grace: seconds that running trials have when the job is stopped.
            options: of ``evomerge run``.

        Raises:
            LockedError: a driver is at work on it with other settings.
            SetupError: the cluster does not answer, or refuses.
        """
        patience = time.monotonic() + _STARTING_SECONDS
        while True:
            attempts = self.attempts(package.key)
            last = attempts[-1] if attempts else None
            if last is not None and not last.over:
                return _attached(last, package)
            attempt = 1 if last is None else last.attempt + 1
            name = f"{package.key.job}-{attempt}"
            try:
                with _errors():
                    self._client.submit_job(**_request(package, name, grace, options))
            except SetupError as error:
                # Somebody else was faster, or Ray had it before the answer was lost.
                if any(job.id == name for job in self.attempts(package.key)):
                    continue
                if _STARTING not in str(error) or time.monotonic() > patience:
                    raise
                time.sleep(0.5)
                continue
            return Submission(name, attempt, False, last)

    def logs(self, job: Job) -> str:
        """Return what the driver has printed so far.

        Raises:
            SetupError: the cluster does not answer.
        """
        with _errors():
            return self._client.get_job_logs(job.id)

    def follow(self, key: StudyKey, write: Callable[[str], None]) -> Job:
        """Pass on what the newest driver prints until it ends; return how it ended.

        A connection that breaks is taken up again where it broke.

        Raises:
            SetupError: the cluster does not answer.
        """
        name = self.last(key).id
        shown = 0
        while True:
            shown = asyncio.run(self._tail(name, shown, write))
            job = self._found(name)
            if job.over:
                text = self.logs(job)
                write(text[shown:])
                return job
            time.sleep(_POLL_SECONDS)

    async def _tail(self, name: str, shown: int, write: Callable[[str], None]) -> int:
        """Write what comes after the first ``shown`` characters; return how many were seen."""
        seen = 0
        with contextlib.suppress(RuntimeError, OSError):  # the connection broke; see ``follow``
            async for text in self._client.tail_job_logs(name):
                new = text[max(0, shown - seen) :]
                seen += len(text)
                if new:
                    write(new)
        return max(seen, shown)

    def _found(self, name: str) -> Job:
        with _errors():
            jobs = self._client.list_jobs()
        found = next((one for one in jobs if one.submission_id == name), None)
        if found is None:
            raise SetupError(
                f"ray: the cluster has forgotten the job {name} (it was restarted; submit the "
                "study again: it continues)"
            )
        return _job(found)

    def stop(self, job: Job, seconds: float | None) -> Job:
        """Ask a job to stop: its driver finishes the running trials and leaves.

        Args:
            job: one that is not over.
            seconds: to wait for its end; None for as long as it takes.

        Returns:
            the job as it is then.

        Raises:
            SetupError: the cluster does not answer.
        """
        with _errors():
            self._client.stop_job(job.id)
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            now = self._found(job.id)
            if now.over or (end is not None and time.monotonic() >= end):
                return now
            time.sleep(_POLL_SECONDS)


def _attempt(submission_id: str | None, key: StudyKey) -> int:
    """Return the number of an attempt at a study, 0 for another job."""
    start, _, number = (submission_id or "").rpartition("-")
    return int(number) if start == key.job and number.isdigit() else 0


def _job(found: Any) -> Job:
    def seconds(milliseconds: int | None) -> float | None:
        return None if not milliseconds else milliseconds / 1000

    status = found.status
    return Job(
        id=found.submission_id,
        attempt=int(found.submission_id.rpartition("-")[2]),
        status=getattr(status, "value", str(status)),
        message=(found.message or "").strip(),
        exit_code=found.driver_exit_code,
        digest=(found.metadata or {}).get("digest", ""),
        started=seconds(found.start_time),
        ended=seconds(found.end_time),
    )


def _attached(job: Job, package: Package) -> Submission:
    if job.digest != package.digest:
        raise LockedError(
            f"{package.key.name}: {job.id} is at work on this study with other settings or files "
            "(stop it first with `evomerge stop`, or give this study another name and directory)"
        )
    return Submission(job.id, job.attempt, True, None)


def _request(package: Package, name: str, grace: int, options: Sequence[str]) -> dict[str, Any]:
    """Return what is sent; all of it can be read by whoever may list jobs."""
    command = ["python", "-m", "evomerge", "run", STUDY, *options]
    return {
        # ``exec``: the driver itself gets the signal of a stop, and no shell outlives it.
        "entrypoint": f"exec {shlex.join(command)}",
        "submission_id": name,
        "runtime_env": {
            "working_dir": str(package.folder),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(grace)},
        },
        "metadata": {
            "study": package.key.name,
            "directory": package.key.directory,
            "digest": package.digest,
        },
    }


def failure_hint(job: Job, log: str) -> str:
    """Return what the end of a failed driver's log asks for, empty where nothing is known."""
    end = "\n".join(log.splitlines()[-20:])
    if job.status != "FAILED" or not _NOT_INSTALLED.search(end):
        return ""
    return (
        "evomerge must be installed on every machine of the cluster, for the Python that Ray runs "
        "there (see setup_commands in ray_cluster.yaml)"
    )


def cluster_address(given: str | None, recorded: str | None = None) -> str:
    """Return which cluster is meant: never one that merely happens to run here.

    Args:
        given: on the command line.
        recorded: where the study was submitted to.

    Returns:
        the first there is of ``given``, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, ``recorded``,
        ``DEFAULT_ADDRESS``; Ray's word ``auto`` in a variable names no cluster.

    Raises:
        InputError: ``given`` is ``auto``.
    """
    if given == "auto":
        raise InputError(
            "--address: expected the address of one cluster, got 'auto', with which Ray would "
            f"take any that runs here (say which one, such as {DEFAULT_ADDRESS})"
        )
    named = (given, *(os.environ.get(name) for name in VARIABLES), recorded)
    return next((one for one in named if one and one != "auto"), DEFAULT_ADDRESS)


def connect(address: str) -> Jobs:
    """Return the jobs of a cluster.

    Args:
        address: of its dashboard (``http://...``), of its head (``host:6379``) or of its client
            port (``ray://...``); see ``cluster_address``.

    Raises:
        SetupError: nothing answers there, or not to us.
        InputError: RAY_JOB_HEADERS is not valid.
    """
    _require_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise SetupError(f"ray cannot be imported: {error} (pip install 'ray[default]')") from error
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _errors(address), _only_address():
        return Jobs(JobSubmissionClient(address, headers=_headers()))


def _require_answer(address: str) -> None:
    """Knock at the port before Ray does, which would wait for minutes."""
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("", "http", "https", "ray"):
        return  # another launcher's own address, which a plug-in of Ray resolves
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SetupError(f"ray: {bare_address(address)!r} is no address: {error}") from error
    ports = {"https": 443, "ray": 10001, "http": 80, "": 8265}
    try:
        socket.create_connection((host or "", port or ports[scheme]), _CONNECT_SECONDS).close()
    except OSError as error:
        raise SetupError(
            f"ray: cannot reach {bare_address(address)} within {_CONNECT_SECONDS:g} s: "
            f"{error.strerror or error} ({_REMEDY})"
        ) from error


@contextlib.contextmanager
def _only_address() -> Iterator[None]:
    """Make Ray take the address it is given; by itself it would let its variables win."""
    before = {name: os.environ.pop(name, None) for name in VARIABLES}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _headers() -> dict[str, str] | None:
    """Return the headers that a proxy in front of the cluster wants, as Ray's own tool does."""
    text = os.environ.get("RAY_JOB_HEADERS")
    if not text:
        return None
    try:
        headers = json.loads(text)
    except ValueError as error:
        raise InputError("RAY_JOB_HEADERS: expected a JSON mapping of header to value") from error
    return {str(name): str(value) for name, value in headers.items()}


@contextlib.contextmanager
def _errors(address: str | None = None) -> Iterator[None]:
    """Turn what Ray raises about an unreachable or unwilling cluster into our own errors."""
    from ray.exceptions import AuthenticationError

    where = bare_address(address) or "a Ray cluster"
    try:
        yield
    except AuthenticationError as error:
        raise SetupError(
            f"ray: {where} wants a token, or another one ({_ACCESS_REMEDY})"
        ) from error
    except (OSError, ValueError) as error:  # requests' own errors are OSErrors
        raise SetupError(f"ray: cannot reach {where}: {_first_line(error)} ({_REMEDY})") from error
    except RuntimeError as error:
        raise SetupError(f"ray: {where} refused: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
