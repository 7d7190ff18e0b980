"""MLflow shows a study; the journal is the truth.

What MLflow holds is a projection: ``sync`` compares it with a snapshot of the study and sends
what is missing, so it can be repeated, interrupted and done later. ``Tracker`` does the same
beside a running search, in a process of its own (``evomerge.tracking_process``) that reads the
journal as it grows, and never blocks or fails the search.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

import evomerge
from evomerge.errors import LockedError
from evomerge.projection import Projection
from evomerge.tracking_client import open_client, setup_errors
from evomerge.tracking_store import Store, study_query
from evomerge.tracking_target import Synced, Target, is_absent

logger = logging.getLogger(__name__)

SENDER_LOCK = ".tracking.lock"
#: Seconds until a tracker that ended is started again; doubled up to the last.
_RESTART_SECONDS = (5.0, 60.0)
_MOMENT_SECONDS = 1.0
#: Only the package's own folder is added to where the interpreter looks, and nothing before it.
_CODE = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from evomerge.tracking_process import main; sys.exit(main(sys.argv[2]))"
)


def sync(projection: Projection, target: Target) -> Synced:
    """Send to MLflow whatever it lacks of a study; repeating it changes nothing.

    Raises:
        SetupError: the server refused or cannot be reached, the store cannot be written.
        InputError: the experiment was deleted.
    """
    with setup_errors(
        f"MLflow at {target.uri} cannot be updated",
        "start the server or mend the URI; nothing is lost, what is missing is sent next time",
    ):
        return Store(target).send(projection)


def find(study: str, target: Target) -> Synced | None:
    """Return where MLflow shows a study, None where it does not; writes nothing.

    Args:
        study: identity of the study, as in its projection.
        target: where it is tracked.

    Raises:
        SetupError: MLflow cannot be reached.
    """
    if is_absent(target):
        return None
    with setup_errors(f"MLflow at {target.uri} cannot be read", "start the server or mend the URI"):
        client = open_client(target)
        found = client.get_experiment_by_name(target.experiment)
        if found is None:
            return None
        runs = client.search_runs([found.experiment_id], study_query(study), max_results=1)
    return Synced(str(found.experiment_id), runs[0].info.run_id, 0) if runs else None


@contextmanager
def only_sender(directory: Path, seconds: float) -> Iterator[None]:
    """Send alone while the context is open: two senders would make every run twice.

    Args:
        directory: of the study.
        seconds: how long to wait for another sender of this study.

    Raises:
        LockedError: there is another one.
    """
    handle = os.open(directory / SENDER_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                if time.monotonic() >= deadline:
                    raise LockedError(
                        f"{directory}: another process is sending this study to MLflow (its own "
                        "run does so by itself; if that has ended, try again in a minute)"
                    ) from error
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


class Tracker:
    """Keeps MLflow up to date beside a running search, from a process of low priority.

    That process follows the journal and ends when it is told to, or when this one ends. One that
    was killed is started again. All that happens here is waiting for what it says.

    Args:
        directory: of the study.
        target: where to track.
    """

    def __init__(self, directory: Path, target: Target) -> None:
        self._target = target
        self._order = json.dumps(
            {"directory": str(directory.absolute()), "target": asdict(target), "of": os.getpid()}
        )
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._synced: Synced | None = None
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="evomerge-mlflow", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why the last attempt failed; empty when MLflow is up to date or being updated."""
        with self._lock:
            return self._problem

    @property
    def synced(self) -> Synced | None:
        """Where the study is shown; None until MLflow was reached."""
        with self._lock:
            return self._synced

    @property
    def process(self) -> int | None:
        """Id of the process that sends; None while there is none."""
        with self._lock:
            return None if self._process is None else self._process.pid

    def close(self, seconds: float = 30.0, waiting: Callable[[], None] = lambda: None) -> bool:
        """Have what is left sent, and stop.

        Args:
            seconds: how long to wait; what is not sent by then is left.
            waiting: is called when that takes longer than a moment.

        Returns:
            whether MLflow holds everything; if not, ``evomerge sync`` sends the rest later.
        """
        with self._lock:
            self._closing.set()
            process = self._process
        if process is not None:
            _tell(process, "close")
        self._thread.join(min(_MOMENT_SECONDS, seconds))
        if self._thread.is_alive() and seconds > _MOMENT_SECONDS:
            waiting()
            self._thread.join(seconds - _MOMENT_SECONDS)
        if self._thread.is_alive():
            with self._lock:
                self._problem = self._problem or f"not all was sent within {seconds:.0f} s"
                if self._process is not None:
                    self._process.kill()  # harmless at any moment, see ``tracking_store``
            self._thread.join(5.0)
            return False
        return not self.problem

    def _run(self) -> None:
        try:
            self._keep_sending()
        except (OSError, ValueError) as error:  # no process, no disk, or half a line from it
            self._failed(f"nothing is sent any more: {error}")

    def _keep_sending(self) -> None:
        pause = _RESTART_SECONDS[0]
        while True:
            with tempfile.TemporaryFile("w+") as said:
                process = self._start(said)
                if process is None:
                    if not self.problem:
                        self._failed("it was stopped before anything was sent")
                    return
                assert process.stdout is not None
                for line in process.stdout:
                    self._take(json.loads(line))
                code = process.wait()
                with self._lock:
                    self._process = None
                if code == 0:
                    return
                if not self._closing.is_set() or not self.problem:
                    said.seek(0)
                    last = said.read().strip().splitlines()[-1:] or ["it said nothing"]
                    self._failed(f"its process ended with exit code {code}: {last[0][:300]}")
            if self._closing.wait(pause):
                return
            pause = min(2 * pause, _RESTART_SECONDS[1])

    def _start(self, said: IO[str]) -> subprocess.Popen[str] | None:
        """Start the process, unless the tracker was closed."""
        root = str(Path(evomerge.__file__).resolve().parent.parent)
        with self._lock:
            if self._closing.is_set():
                return None
            # A process group of its own: Ctrl-C stops the search first, which then says when.
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and words
                [sys.executable, "-P", "-c", _CODE, root, self._order],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                process_group=0, env={"OMP_NUM_THREADS": "1", **os.environ},
            )  # fmt: skip
            return self._process

    def _take(self, said: dict[str, str]) -> None:
        """Note what the process says after every attempt."""
        if said["problem"]:
            self._failed(said["problem"])
            return
        with self._lock:
            self._synced, self._problem = Synced(said["experiment"], said["run"], 0), ""

    def _failed(self, problem: str) -> None:
        with self._lock:
            first, self._problem = not self._problem, problem
        if first:
            logger.warning(
                "MLflow at %s cannot be updated (%s). The search goes on and its results are "
                "kept; `evomerge sync` sends them later.",
                self._target.uri,
                problem,
            )


def _tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(word + "\n")
        process.stdin.flush()
    except OSError:  # it has ended: ``_run`` says why
        logger.debug("the tracker's process takes no orders any more")
