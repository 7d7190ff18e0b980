"""A directory that appears whole or not at all.

Everything is written into a temporary neighbour, made durable, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evomerge.errors import InputError, StorageError

_SPARE_BYTES = 64 << 20

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def require_free(out: Path) -> None:
    """Refuse a place that is taken, and make its parent.

    Raises:
        InputError: ``out`` is a file, a link, or not empty, or its parent cannot be made.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: is in the way and no directory (choose a new one)")
    try:
        if out.exists() and any(out.iterdir()):
            raise InputError(f"{out}: exists and is not empty (choose a new directory)")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from error


def require_space(out: Path, needed_bytes: int) -> None:
    """Refuse to begin what the disk cannot hold; some room is left for small files.

    Raises:
        StorageError: says what is needed and what is free.
    """
    needed = needed_bytes + _SPARE_BYTES
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise StorageError(
            f"{out}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free "
            "(free some space, or choose another disk)"
        )


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``out`` when the block ends without an error.

    One that was killed left its temporary directory behind; it is removed by the next.

    Args:
        out: absolute; free, see ``require_free``.

    Raises:
        StorageError: the disk is full, or takes no file as large.
        InputError: it cannot be written for another reason.
    """
    try:
        _sweep(out)
        temporary, lock = _temporary(out)
        try:
            yield temporary
            publish(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        raise _storage_error(out, error) from error


def _temporary(out: Path) -> tuple[Path, int]:
    """Make a directory and the handle that locks it; the kernel releases it with this process."""
    while True:
        temporary = out.parent / f".{out.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked: another one
            lock = os.open(temporary, _DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks; nobody sweeps there
                fcntl.flock(lock, fcntl.LOCK_EX)
            if temporary.is_dir():
                return temporary, lock
            os.close(lock)


def _sweep(out: Path) -> None:
    """Remove what killed processes began to write for ``out``; who is at work holds a lock."""
    name = re.compile(re.escape(f".{out.name}.") + "[0-9a-f]{8}[.]tmp")
    for path in sorted(out.parent.iterdir()):
        if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError):  # somebody else has swept it
            lock = os.open(path, _DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            else:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def publish(temporary: Path, out: Path) -> None:
    """Make everything durable, then let it appear under its name."""
    for path in (*sorted(temporary.iterdir()), temporary):
        make_durable(path)
    temporary.rename(out)
    make_durable(out.parent)


def make_durable(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _storage_error(out: Path, error: OSError) -> InputError | StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{out}: the disk is full; nothing was left behind (free some space)")
    if error.errno == errno.EFBIG:
        return StorageError(
            f"{out}: a file is larger than this disk or process may write; nothing was left "
            "behind (use a smaller --max-shard-size, or another disk)"
        )
    return InputError(f"{out}: cannot be written: {error.strerror or error}")
