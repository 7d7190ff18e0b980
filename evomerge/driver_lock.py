"""One driver per study: a lock that the kernel releases, and an epoch that outlives it.

``flock`` refuses a second driver and is released when its holder dies, by whatever signal. It
does not help where it was lost: the lock file was removed, or a file server took the lock from a
driver that was frozen and gave it to the next. So every driver raises the study's epoch when it
takes the lock, writes it into each record, and looks whether it is still its own before each
write. One that was overtaken never writes again, and a line that it had already begun is known by
its epoch and is skipped by readers.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evomerge.errors import LockedError

LOCK = ".lock"

#: How long a driver waits for the lock: readers hold it shared for an instant to see whether
#: somebody is at work, and must not make a starting driver give up.
LOCK_SECONDS = 1.0

_LONGEST_OWNER = 4096


def is_locked(directory: Path) -> bool:
    """Return whether a driver is at work on this study now (on this machine)."""
    try:
        handle = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


class DriverLock:
    """Held from construction to ``close``.

    Attributes:
        epoch: 1, 2, ...; larger than that of every driver before.
    """

    def __init__(self, directory: Path) -> None:
        """Take the lock of the study in ``directory``.

        Raises:
            LockedError: another driver holds it; names it.
            OSError: the file cannot be used.
        """
        self._directory = directory
        self._path = directory / LOCK
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._handle = os.open(self._path, flags, 0o600)
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._wait()
            self._claim(_epoch(_read(self._handle)) + 1)
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                raise LockedError(
                    f"{self._directory}: another driver works on this study "
                    f"({_name(_read(self._handle))}); wait for it, stop it, or give another study "
                    "directory"
                ) from None
            return

    def outrank(self, epoch: int) -> None:
        """Raise the own epoch above one that a record carries."""
        if epoch >= self.epoch:
            self._claim(epoch + 1)

    def _claim(self, epoch: int) -> None:
        self.epoch = epoch
        facts = {
            "pid": os.getpid(), "host": socket.gethostname(), "since": self._since, "epoch": epoch,
        }  # fmt: skip
        self._owner = json.dumps(facts).encode()
        os.pwrite(self._handle, self._owner, 0)
        os.ftruncate(self._handle, len(self._owner))

    def require(self) -> None:
        """Do nothing while the study is this driver's.

        Raises:
            LockedError: another driver has taken over.
        """
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return  # Removed by somebody; the next driver to come will make a new one.
        try:
            owner = _read(handle)
        finally:
            os.close(handle)
        if owner != self._owner:
            raise LockedError(
                f"{self._directory}: another driver has taken over this study ({_name(owner)}); "
                f"this one (pid {os.getpid()}, epoch {self.epoch}) was frozen or lost its lock, "
                "and writes nothing more"
            )

    def close(self) -> None:
        """Release the lock; idempotent."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def _read(handle: int) -> bytes:
    return os.pread(handle, _LONGEST_OWNER, 0)


def _facts(owner: bytes) -> dict[str, Any]:
    """Return what a lock file says, {} when a kill left it half written."""
    try:
        facts = json.loads(owner)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _epoch(owner: bytes) -> int:
    epoch = _facts(owner).get("epoch", 0)
    return epoch if isinstance(epoch, int) else 0


def _name(owner: bytes) -> str:
    facts = _facts(owner)
    if not {"pid", "host", "since"} <= facts.keys():
        return "its lock file does not name it"
    return f"pid {facts['pid']} on {facts['host']} since {facts['since']}"
