"""MLflow's user interface as a child process on the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from evomerge.errors import SetupError

_HOST = "127.0.0.1"
#: Importing MLflow and migrating a database take 10 s on a quiet machine.
_START_SECONDS = 180.0
_STOP_SECONDS = 10.0
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # A port whose last connections are still closing can be taken over.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError:
            return False
        return True


@contextmanager
def ui_server(uri: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the interface on a database while the context is open; it answers when that begins.

    Args:
        uri: of the database.
        port: to listen on.

    Raises:
        SetupError: the port is taken, it ended at once, or never answered.
    """
    if not _is_free(port):
        raise SetupError(f"port {port} is taken (try another --port)")
    command = [
        sys.executable, "-m", "mlflow", "ui", "--host", _HOST, "--port", str(port),
        "--workers", "1", "--backend-store-uri", uri,
    ]  # fmt: skip
    with tempfile.TemporaryFile() as said:
        # A session of its own: Ctrl-C reaches us alone, and we stop it with all its workers.
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and words
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            env={**_QUIET, **os.environ}, start_new_session=True,
        )  # fmt: skip
        try:
            if not _answers(process, port):
                said.seek(0)
                last = said.read().decode(errors="replace").strip().splitlines()[-3:]
                raise SetupError(
                    f"MLflow's user interface does not start on port {port}: "
                    f"{' / '.join(last) or 'it says nothing'} (try another --port)"
                )
            yield process
        finally:
            _stop(process)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{_HOST}:{port}/health", timeout=5):
                # Another program may be answering while ours still finds out that it cannot.
                time.sleep(0.5)
                return process.poll() is None
        except OSError:
            time.sleep(0.3)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        break
