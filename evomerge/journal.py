"""The journal of a study: append-only, checksummed JSON lines with one writer.

One record is one line: the JSON body, a TAB, 16 hexadecimal digits of BLAKE2b-64 over the body,
a newline. A body starts with ``seq`` (0, 1, 2, ...), ``ev`` (the event), ``t`` (unix seconds, for
display only) and ``epoch`` (which driver wrote it, see ``evomerge.driver_lock``). Numbers that must
survive exactly are written by ``hexes``.

The file is the only truth of a study: a record is on disk before anything acts on it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

from evomerge.driver_lock import LOCK, DriverLock, is_locked
from evomerge.errors import StorageError

__all__ = [
    "JOURNAL", "LOCK", "DamagedError", "Journal", "Record", "Recorder", "Scan", "decode", "encode",
    "hexes", "is_locked", "read", "scan", "unhexes",
]  # fmt: skip

JOURNAL = "journal.jsonl"

Record = dict[str, Any]


def hexes(values: Iterable[float]) -> str:
    """Return numbers as text that restores them bit for bit: ``float.hex``, space between."""
    return " ".join(map(float.hex, map(float, values)))


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


def decode(line: bytes) -> Record | None:
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
        offsets: where each record begins.
        late: whole lines of drivers that had been overtaken; they are no records.
    """

    records: tuple[Record, ...]
    good_bytes: int
    torn_bytes: int
    offsets: tuple[int, ...]
    late: int = 0

    @property
    def epoch(self) -> int:
        """The epoch of the last driver that wrote; 0 before the first."""
        return int(self.records[-1].get("epoch", 0)) if self.records else 0


class DamagedError(StorageError):
    """A journal holds what no kill can leave.

    Attributes:
        before: what is intact before the damage; what follows it counts as torn.
    """

    def __init__(self, message: str, before: Scan) -> None:
        super().__init__(message)
        self.before = before

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.before)


#: What to do about a damaged journal.
REMEDY = (
    "restore the file from a backup, or keep the records before it: evomerge replay STUDY --repair"
)


def scan(data: bytes, source: str) -> Scan:
    """Split the bytes of a journal into records.

    A bad last line is a torn tail: the writer was killed in the middle of it, so nothing
    acted on it yet. A bad line before others cannot come from a kill.

    Raises:
        DamagedError: a bad line elsewhere, or a gap in the numbering; names the byte offset.
    """
    records: list[Record] = []
    offsets: list[int] = []
    offset = late = epoch = 0

    def found() -> Scan:
        return Scan(tuple(records), offset, len(data) - offset, tuple(offsets), late)

    while offset < len(data):
        end = data.find(b"\n", offset)
        record = decode(data[offset:end]) if end >= 0 else None
        if record is None:
            if end < 0 or end + 1 == len(data):
                break
            text = (
                f"{source}: record {len(records)} at byte {offset} is damaged (its checksum does "
                f"not match); {REMEDY}"
            )
            raise DamagedError(text, found())
        written = record.get("epoch", epoch)  # older journals have none
        if written > epoch:
            # A new driver numbers on from what it found; what came in between was late.
            kept = min(int(record.get("seq", 0)), len(records))
            late += len(records) - kept
            del records[kept:], offsets[kept:]
        if written < epoch:
            late += 1
        elif record.get("seq") != len(records):
            text = (
                f"{source}: expected record {len(records)} at byte {offset}, found "
                f"{record.get('seq')}; lines were removed or inserted: {REMEDY}"
            )
            raise DamagedError(text, found())
        else:
            records.append(record)
            offsets.append(offset)
            epoch = written
        offset = end + 1
    return found()


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


class Recorder(Protocol):
    """Where a study writes its records: a journal, or what stands for one."""

    def append(self, event: str, **fields: Any) -> Record:
        """Write one record and return it once it is on disk."""
        ...


class Journal:
    """The writing side; holds the lock of the study from construction to ``close``.

    Attributes:
        records: what the file held when it was opened, torn tail removed.
        torn_bytes: how much was removed.
        epoch: of this driver; larger than that of every record in the file.
    """

    def __init__(self, directory: Path) -> None:
        """Create or continue the journal in ``directory``.

        Raises:
            LockedError: another driver works on this study.
            StorageError: the directory or the file cannot be used, or the file is damaged.
        """
        self._path = directory / JOURNAL
        self._file = -1
        self._lock: DriverLock | None = None
        try:
            _make_directory(directory)
            self._lock = DriverLock(directory)
            self._file = _open_file(directory)
            found = scan(_read_from(self._file, 0), str(self._path))
            self._lock.outrank(found.epoch)
            self.epoch = self._lock.epoch
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
            LockedError: another driver has taken over; nothing was written.
            StorageError: it could not be written whole; the file ends where it did before. Or the
                file is not the one that was opened.
        """
        if self._file < 0 or self._lock is None:
            raise StorageError(f"{self._path}: the journal is closed")
        record = {
            "seq": self._seq, "ev": event, "t": round(time.time(), 3), "epoch": self.epoch, **fields
        }  # fmt: skip
        line = encode(record)
        try:
            self._lock.require()
            self._mend()
            _write_all(self._file, line)
            os.fsync(self._file)
            # Not the old end plus the line: an overtaken driver may have written in between.
            end = os.lseek(self._file, 0, os.SEEK_CUR)
        except OSError as error:
            self._roll_back(error)
        self._end = end
        self._seq += 1
        return record

    def _mend(self) -> None:
        """Bring the end of the file to where the next record belongs.

        A second signal may have cut the last append short, and a driver that was overtaken in
        the middle of an append may have ended it.
        """
        there = os.fstat(self._file)
        same = os.path.samestat(self._path.lstat(), there)
        if not same or there.st_size < self._end:
            raise StorageError(
                f"{self._path}: the file was replaced or shortened while the study was running; "
                "run it again to continue from what it holds now"
            )
        if there.st_size == self._end:
            return
        # A driver that froze after its first look must not cut off what the next one wrote.
        self._require_lock()
        tail = _read_from(self._file, self._end)
        whole = 0
        while (end := tail.find(b"\n", whole)) >= 0:
            record = decode(tail[whole:end])
            if record is None or record.get("epoch", 0) >= self.epoch:
                break
            whole = end + 1
        self._end += whole
        if whole < len(tail):
            os.ftruncate(self._file, self._end)

    def _require_lock(self) -> None:
        assert self._lock is not None
        self._lock.require()

    def _roll_back(self, error: OSError) -> NoReturn:
        # When even this fails, the next start sees a torn tail and removes it.
        with contextlib.suppress(OSError):
            self._require_lock()
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
        if self._file >= 0:
            os.close(self._file)
        if self._lock is not None:
            self._lock.close()
        self._file, self._lock = -1, None

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


def _read_from(handle: int, offset: int) -> bytes:
    """Return everything from ``offset`` to the end of the file."""
    size = os.fstat(handle).st_size
    parts = []
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
