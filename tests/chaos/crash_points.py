"""Dies at a chosen step: before, in the middle of, or after a call that changes the disk.

The calls are ``write``, ``pwrite``, ``fsync``, ``ftruncate``, ``rename``, ``replace``, ``unlink``,
``rmdir`` and ``mkdir`` of ``os``, and the opening of a file to write it, as far as they touch the
place that is watched. A process that dies at point n has done everything before it and nothing
after it: what a SIGKILL in that moment leaves.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_BY_HANDLE = ("write", "pwrite", "fsync", "ftruncate")
_BY_NAME = ("rename", "replace", "unlink", "rmdir", "mkdir")


class Points:
    """Counts the points that a process passes, and ends it at one of them.

    Args:
        place: only what happens in here counts.
        fatal: number of the point to die at; None to count only.
    """

    def __init__(self, place: Path, fatal: int | None) -> None:
        self._place = str(place)
        self._fatal = fatal
        self.names: list[str] = []

    def install(self) -> None:
        """Watch this process from now on; it is not meant to live long."""
        for name in _BY_HANDLE:
            setattr(os, name, self._by_handle(name, getattr(os, name)))
        for name in _BY_NAME:
            setattr(os, name, self._by_name(name, getattr(os, name)))
        sys.addaudithook(self._opened)

    def _pass(self, name: str) -> None:
        self.names.append(name)
        if self._fatal is not None and len(self.names) > self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def _watched(self, path: str) -> bool:
        return path == self._place or path.startswith(f"{self._place}/")

    def _by_handle(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(handle: int, *arguments: Any) -> Any:
            path = _path_of(handle)
            if not self._watched(path):
                return real(handle, *arguments)
            label = f"{name} {_kind(path)}"
            self._pass(f"before {label}")
            if name in ("write", "pwrite") and self._fatal == len(self.names):
                data = bytes(arguments[0])
                real(handle, data[: len(data) // 2], *arguments[1:])
            if name in ("write", "pwrite"):
                self._pass(f"amid {label}")
            result = real(handle, *arguments)
            self._pass(f"after {label}")
            return result

        return call

    def _by_name(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            target = os.fspath(arguments[0] if name in ("rename", "replace") else path)
            folder = options.get("dir_fd")
            if folder is not None:
                target = f"{_path_of(folder)}/{target}"
            if not self._watched(str(target)):
                return real(path, *arguments, **options)
            label = f"{name} {_kind(str(target))}"
            self._pass(f"before {label}")
            result = real(path, *arguments, **options)
            self._pass(f"after {label}")
            return result

        return call

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | os.PathLike):
            return
        flags = arguments[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR) and self._watched(os.fspath(arguments[0])):
            self._pass(f"before open {_kind(os.fspath(arguments[0]))}")


def _path_of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink())


def _kind(path: str) -> str:
    """Return which file it is, without what chance has named."""
    name = Path(path).name
    if name.endswith((".part", ".tmp")) or (name.endswith(".json") and len(name) > 32):
        return f"{Path(path).parent.name}/*{Path(path).suffix}"
    return name


def forked(action: Callable[[], object], place: Path, fatal: int | None) -> tuple[int, list[str]]:
    """Run an action in a fork of this process, which must have one thread, and wait for it.

    Returns:
        Its exit status (negative: the signal), and the points that it passed; without ``fatal``.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        points = Points(place, fatal)
        try:
            points.install()
            action()
            sys.stderr.flush()
            with os.fdopen(writing, "w") as report:
                report.write("\n".join(points.names))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as report:
        names = report.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, names


def chosen(names: Sequence[str], every: int) -> list[int]:
    """Return each ``every``-th point; all where it is 1."""
    return list(range(every // 2, len(names), every))
