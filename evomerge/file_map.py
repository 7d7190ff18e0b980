"""Files in memory: one map per file, however many tensors of it are read.

A memory map holds an open file in Python, and a process may often have only 1,024 of them:
fewer than the tensors of four models.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from evomerge.errors import SetupError

#: Maps that somebody has views of, by the file's identity and state: a file that was replaced or
#: has grown gets a map of its own.
_MAPS: WeakValueDictionary[tuple[int, int, int, int], np.memmap[Any, Any]] = WeakValueDictionary()


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """Return the bytes of a file, read-only; it stays open while there are views of them.

    Raises:
        SetupError: this process may open no more files.
        OSError: it cannot be read.
    """
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    found = _MAPS.get(key)
    if found is None:
        try:
            found = np.memmap(path, np.uint8, "r")
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            raise SetupError(
                f"{path}: cannot be opened: {error.strerror} (raise the limit: ulimit -n 65536)"
            ) from error
        _MAPS[key] = found
    return found
