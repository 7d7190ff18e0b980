"""The journal of a study: append-only, checksummed JSON lines with one writer.

One record is one line: the JSON body, a TAB, 16 hexadecimal digits of BLAKE2b-64 over the body,
a newline. A body starts with ``seq`` (0, 1, 2, ...), ``ev`` (the event) and ``t`` (unix seconds,
for display only). Numbers that must survive exactly are written by ``hexes``.

The file is the only truth of a study: a record is on disk before anything acts on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evomerge.errors import LockedError, StorageError

JOURNAL = "journal.jsonl"
LOCK = ".lock"

#: How long a driver waits for the lock: readers hold it shared for an instant to see whether
#: somebody is at work, and must not make a starting driver give up.
LOCK_SECONDS = 1.0

Record = dict[str, Any]


def hexes(values: Iterable[float]) -> str:
    """Return numbers as text that restores them bit for bit: ``float.hex``, space between."""
    return " ".join(float(value).hex() for value in values)


def unhexes(text: str) -> tuple[float, ...]:
    """Return the numbers that ``hexes`` wrote."""
    return tuple(map(float.fromhex, text.split()))


def encode(record: Mapping[str, Any]) -> bytes:
    """Return the line of a record, newline included.

    Raises:
        ValueError: a float that is not finite (they go through ``hexes``).
    """
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return body + b"\t" + _checksum(body) + b"\n"


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=8).hexdigest().encode()


def _decode(line: bytes) -> Record | None:
    """Return the record of a line without its newline, None when the checksum is wrong."""
    body, _, checksum = line.rpartition(b"\t")
    if _checksum(body) != checksum:
        return None
    record: Record = json.loads(body)
    return record


@dataclass(frozen=True, slots=True)
class Scan:
    """What a journal file holds.

    Attributes:
        records: all intact records.
        good_bytes: length of the intact prefix.
        torn_bytes: length of what a killed writer left behind it.
    """

    records: tuple[Record, ...]
    good_bytes: int
    torn_bytes: int


def scan(data: bytes, source: str) -> Scan:
    """Split the bytes of a journal into records.

    A bad last line is a torn tail: the writer was killed in the middle of it, so nothing
    acted on it yet. A bad line before others cannot come from a kill.

    Raises:
        StorageError: a bad line elsewhere, or a gap in the numbering; names the byte offset.
    """
    records: list[Record] = []
    offset = 0
    while offset < len(data):
        end = data.find(b"\n", offset)
        record = _decode(data[offset:end]) if end >= 0 else None
        if record is None:
            if end < 0 or end + 1 == len(data):
                break
            raise StorageError(
                f"{source}: record {len(records)} at byte {offset} is damaged (its checksum does "
                "not match); restore the file from a backup, or start a new study"
            )
        if record.get("seq") != len(records):
            raise StorageError(
                f"{source}: expected record {len(records)} at byte {offset}, found "
                f"{record.get('seq')}; lines were removed or inserted: restore the file"
            )
        records.append(record)
        offset = end + 1
    return Scan(tuple(records), offset, len(data) - offset)


def read(directory: Path) -> Scan:
    """Read the journal of a study without its lock; a torn tail is left alone.

    Raises:
        StorageError: no journal, not readable, or damaged.
    """
    path = directory / JOURNAL
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StorageError(
            f"{directory}: no study here ({JOURNAL} is missing); give the directory of a study"
        ) from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    return scan(data, str(path))


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


class Journal:
    """The writing side; holds the lock of the study from construction to ``close``.

    Attributes:
        records: what the file held when it was opened, torn tail removed.
        torn_bytes: how much was removed.
    """

    def __init__(self, directory: Path) -> None:
        """Create or continue the journal in ``directory``.

        Raises:
            LockedError: another driver works on this study.
            StorageError: the directory or the file cannot be used, or the file is damaged.
        """
        self._path = directory / JOURNAL
        self._file = -1
        self._lock = -1
        try:
            _make_directory(directory)
            self._lock = _take_lock(directory)
            self._file = _open_file(directory)
            found = scan(_read_all(self._file), str(self._path))
            self.records = found.records
            self.torn_bytes = found.torn_bytes
            self._end = found.good_bytes
            if found.torn_bytes:
                os.ftruncate(self._file, self._end)
                os.fsync(self._file)
        except OSError as error:
            self.close()
            raise StorageError(f"{self._path}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise
        self._seq = len(self.records)
        if self.torn_bytes and self.records:
            self.append("note", text=f"removed {self.torn_bytes} bytes of a torn last record")

    def append(self, event: str, **fields: Any) -> Record:
        """Write one record and return it once it is on disk.

        Raises:
            StorageError: it could not be written whole; the file ends where it did before.
        """
        if self._file < 0:
            raise StorageError(f"{self._path}: the journal is closed")
        record = {"seq": self._seq, "ev": event, "t": round(time.time(), 3), **fields}
        line = encode(record)
        try:
            if os.fstat(self._file).st_size != self._end:
                # A second signal cut the last append short.
                os.ftruncate(self._file, self._end)
            _write_all(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            self._roll_back(error)
        self._end += len(line)
        self._seq += 1
        return record

    def _roll_back(self, error: OSError) -> None:
        # When even this fails, the next start sees a torn tail and removes it.
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        remedy = "the study stands at its last complete record; run it again to continue"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space, then run the same command again to continue"
        raise StorageError(
            f"{self._path}: could not write record {self._seq}: "
            f"{error.strerror or error} ({remedy})"
        ) from error

    def close(self) -> None:
        """Release the lock; idempotent."""
        for handle in (self._file, self._lock):
            if handle >= 0:
                os.close(handle)
        self._file = self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable; a file's own fsync does not."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _open_file(directory: Path) -> int:
    path = directory / JOURNAL
    fresh = not path.exists()
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    handle = os.open(path, flags, 0o600)
    if fresh:
        _sync_directory(directory)
    return handle


def _read_all(handle: int) -> bytes:
    size = os.fstat(handle).st_size
    parts = []
    offset = 0
    while offset < size:
        part = os.pread(handle, size - offset, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _write_all(handle: int, data: bytes) -> None:
    """Write every byte; a short write is continued, and the next one says why it was short."""
    left = memoryview(data)
    while left:
        written = os.write(handle, left)
        if written == 0:
            raise OSError(errno.EIO, "write returned 0 bytes")
        left = left[written:]


def _take_lock(directory: Path) -> int:
    path = directory / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            holder = _holder(handle)
            os.close(handle)
            raise LockedError(
                f"{directory}: another driver works on this study ({holder}); wait for it, stop "
                "it, or give another study directory"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        break
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    os.ftruncate(handle, 0)
    os.pwrite(handle, owner.encode(), 0)
    return handle


def _holder(handle: int) -> str:
    try:
        owner = json.loads(os.pread(handle, 4096, 0))
        return f"pid {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "its lock file does not name it"
