"""Follow a journal that another process writes: only what is new is read and parsed.

``journal.scan`` decides what a journal says. The cursor reads on where it stopped as long as that
gives the same: the next records of the same driver, whole. At anything else (a driver took over,
failures were forgotten, the file was cut or replaced) it reads the file again from its beginning.
"""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.errors import StorageError
from evomerge.journal import JOURNAL, Record, decode, scan
from evomerge.study_record import History


class JournalCursor:
    """The history of a study as far as it has been read.

    Attributes:
        history: what was read; another object after the file was read again.

    Args:
        directory: of the study; its journal may not be there yet.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / JOURNAL
        self.history = History()
        self._file: tuple[int, int] | None = None  # device and inode
        self._offset = self._records = self._epoch = 0

    def poll(self) -> bool:
        """Read what is new; return whether there was anything.

        A record that is being written is left for the next call.

        Raises:
            StorageError: the journal cannot be read, is damaged, or cannot be understood.
        """
        try:
            with self._path.open("rb") as file:
                there = os.fstat(file.fileno())
                same = (there.st_dev, there.st_ino) == self._file
                if same and there.st_size == self._offset:
                    return False
                if same and there.st_size > self._offset:
                    file.seek(self._offset)
                    records, end = self._continued(file.read())
                    if records is not None:
                        self._take(records, end)
                        return bool(records)
                file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be read: {error.strerror}") from error
        found = scan(data, str(self._path))
        self.history = History()
        self._file = (there.st_dev, there.st_ino)
        self._epoch, self._records = found.epoch, 0
        self._take(list(found.records), found.good_bytes)
        return True

    def _continued(self, data: bytes) -> tuple[list[Record] | None, int]:
        """Return the next records and where they end; None where the file must be read again."""
        records: list[Record] = []
        start = 0
        while (end := data.find(b"\n", start)) >= 0:
            record = decode(data[start:end])
            if record is None and end + 1 == len(data):
                break  # a torn tail, as far as anybody can tell yet
            if record is None or not self._follows(record, len(records)):
                return None, 0
            records.append(record)
            start = end + 1
        return records, self._offset + start

    def _follows(self, record: Record, ahead: int) -> bool:
        return (
            record.get("epoch", 0) == self._epoch
            and record.get("seq") == self._records + ahead
            and record["ev"] != "retry"
        )

    def _take(self, records: list[Record], end: int) -> None:
        if records:
            there, self._file = self._file, None  # read again where it cannot be understood
            self.history.extend(records, str(self._path))
            self._file = there
        self._records += len(records)
        self._offset = end
