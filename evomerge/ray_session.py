"""Joining Ray, or starting it, and leaving it; the only module of workers that imports Ray."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from evomerge.errors import SetupError
from evomerge.pool import one_line

logger = logging.getLogger(__name__)

#: Ray puts sockets about 70 characters below its directory, and a socket's path has at most 107.
_TEMP_CHARACTERS = 35

#: Jobs and results are a few KB; Ray's default would reserve 30 % of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20

#: Seconds before the next tries to join a cluster. Ray looks for its processes on this machine
#: and gives up when one of them, or of another Ray, ends in that moment.
_JOIN_SECONDS = (2.0, 5.0, 15.0)


def import_ray() -> Any:
    """Return the module ``ray``, quiet.

    Raises:
        SetupError: it is not installed.
    """
    # Read when Ray is imported: no usage reports, no advice, no report of results that a killed
    # worker leaves behind.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        import ray
    except ImportError as error:
        raise SetupError(f"pool: Ray cannot be imported: {error} (pip install ray)") from error
    _silence(ray)
    return ray


def begin(ray: Any, address: str | None, cpus: int) -> None:
    """Join the cluster at ``address``, or start Ray on this machine.

    Args:
        ray: the module.
        address: of the cluster's head; None to start a Ray of our own.
        cpus: that a Ray of our own offers.

    Raises:
        SetupError: neither worked.
    """
    options: dict[str, Any] = {
        "namespace": "evomerge",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",  # else Ray joins whatever runs on this machine, or fails
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        if len(tempfile.gettempdir()) > _TEMP_CHARACTERS:
            options["_temp_dir"] = "/tmp/ray"  # noqa: S108 - Ray's own default
    if address and address.startswith("http"):
        raise SetupError(
            f"could not reach Ray at {address}: that is a door for jobs (use `evomerge submit`, "
            "or unset RAY_ADDRESS to work on this machine)"
        )
    for pause in (*(_JOIN_SECONDS if address else ()), None):
        try:
            with own_signals():
                ray.init(**options)
        except Exception as error:
            where = f"reach Ray at {address}" if address else "start Ray on this machine"
            cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
            text = f"could not {where}: {one_line(error)}{cause}"
            if pause is None:
                raise SetupError(text) from error
            logger.warning("%s; next try in %.0f s", text, pause)
            time.sleep(pause)
        else:
            return


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM, which Ray replaces when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _silence(ray: Any) -> None:
    """Send what Ray prints about dead workers to the log.

    A thread of its driver prints to stdout whatever ``log_to_driver`` says, into the middle of
    a live display or of JSON, and Ray offers no switch.
    """
    module = ray._private.worker
    if hasattr(module, "print_to_stdstream"):  # private: a Ray without it just prints
        module.print_to_stdstream = _log_lines


def _log_lines(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
    for line in data["lines"]:
        logger.debug("ray: %s", line)
