"""Workers on one machine load their weights in turn.

The first reads the checkpoints from disk, the others find them in the page cache, and the memory
that loading takes beside the weights is needed once. Hub files need no turn: the hub's client
locks each file, so of several workers one fetches it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def loading_turn() -> Iterator[None]:
    """Wait until no other worker of this user on this machine loads, then hold the turn.

    The kernel ends the turn of a process that dies. Where no lock can be had, all load at once.
    """
    try:
        handle = _open_lock()
    except OSError as error:
        logger.warning("workers load their weights all at once: %s", error)
        yield
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open_lock() -> int:
    """Open the lock file in a folder that nobody else may write to.

    Raises:
        OSError: there is no such folder, and none can be made.
    """
    folder = Path(tempfile.gettempdir()) / f"evomerge-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not ours or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder of this user alone (remove it)")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(folder / "loading.lock", flags, 0o600)
