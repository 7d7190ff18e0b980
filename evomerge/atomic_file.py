"""A file that appears whole or not at all: one that was there before stays until then."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evomerge.atomic_directory import make_durable
from evomerge.errors import InputError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path, option: str) -> Iterator[Path]:
    """Yield a temporary neighbour that becomes ``path`` when the block ends without an error.

    It has the same suffix. Behind a link the file itself is replaced, with the permissions that
    it had and, as far as that is allowed, the owner; what is no file (a pipe, a terminal) is
    written as it is.

    Args:
        path: of the file.
        option: of the command line, for messages.

    Raises:
        InputError: its folder does not exist, or nothing can be written there.
        StorageError: the disk is full.
    """
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        out = path.resolve()
        temporary = out.with_name(f".{secrets.token_hex(4)}.{out.name[-40:]}")
        try:
            with temporary.open("xb"):
                yield temporary
            make_durable(temporary)
            if out.exists():
                _give_as(out.stat(), temporary)
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _in_words(path, option, error) from error


def write_text(path: Path, text: str, option: str) -> None:
    """Write a text file whole or not at all, see ``atomic_file``.

    Raises:
        InputError: its folder does not exist, or nothing can be written there.
        StorageError: the disk is full.
    """
    with atomic_file(path, option) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _give_as(before: os.stat_result, path: Path) -> None:
    """Give a file permissions and owner of another; root must not take a user's file over."""
    path.chmod(before.st_mode & 0o777)
    for owner, group in ((before.st_uid, before.st_gid), (-1, before.st_gid)):
        with suppress(OSError):
            os.chown(path, owner, group)
            return


def _in_words(path: Path, option: str, error: OSError) -> InputError | StorageError:
    before, reason = f"{option}: {path}: cannot be written", error.strerror or str(error)
    if error.errno in _FULL:
        return StorageError(
            f"{before}: {reason} (free some space, or choose another disk; a file that was there "
            "before is as it was)"
        )
    if error.errno == errno.ENOENT:
        # Of a link the folder that lacks is that of what it names.
        folder = path.resolve().parent if path.is_symlink() else path.parent
        return InputError(f"{before}: there is no folder {folder} (make it first)")
    return InputError(f"{before}: {reason} (choose another place)")
