"""A driver that was overtaken never writes, whatever it was doing when it froze."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evomerge.driver_lock import LOCK, DriverLock
from evomerge.errors import LockedError, StorageError
from evomerge.journal import JOURNAL, Journal, encode, read, scan

WRITER = """
import sys
from pathlib import Path
from evomerge.errors import EvomergeError
from evomerge.journal import Journal
with Journal(Path(sys.argv[1])) as journal:
    for line in sys.stdin:
        try:
            journal.append("note", text=line.strip())
        except EvomergeError as error:
            print(error, flush=True)
            sys.exit(error.exit_code)
        print("ok", flush=True)
"""


def _append(directory: Path, *texts: str) -> None:
    with Journal(directory) as journal:
        for text in texts:
            journal.append("note", text=text)


def _texts(directory: Path) -> list[str]:
    return [record["text"] for record in read(directory).records]


def test_a_frozen_driver_that_thaws_after_a_takeover_writes_nothing(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    with writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdin.write("first\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "ok\n"
        writer.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(LockedError, match=f"pid {writer.pid} "):
            Journal(tmp_path)  # the kernel still holds the lock for it
        assert time.monotonic() - started < 2
        (tmp_path / LOCK).unlink()  # what a file server does to a client that it lost
        with Journal(tmp_path) as journal:
            journal.append("note", text="second")
            writer.stdin.write("from the grave\n")
            writer.stdin.flush()
            writer.send_signal(signal.SIGCONT)
            said = writer.stdout.readline()
            assert f"another driver has taken over this study (pid {os.getpid()} on" in said
            assert writer.wait(10) == 5
            journal.append("note", text="third")
    assert _texts(tmp_path) == ["first", "second", "third"]
    assert read(tmp_path).late == 0


def test_every_driver_has_a_larger_epoch_even_without_its_lock_file(tmp_path: Path) -> None:
    for text in "abc":
        _append(tmp_path, text)
        (tmp_path / LOCK).unlink()
    assert [record["epoch"] for record in read(tmp_path).records] == [1, 2, 3]
    (tmp_path / LOCK).write_text("{ half a li")
    _append(tmp_path, "d")
    assert read(tmp_path).epoch == 4
    assert json.loads((tmp_path / LOCK).read_text())["epoch"] == 4


@pytest.mark.parametrize("gone_on", [False, True])
def test_a_line_that_an_overtaken_driver_had_begun_is_skipped(
    tmp_path: Path, gone_on: bool
) -> None:
    _append(tmp_path, "first")
    late = encode({"seq": 1, "ev": "note", "t": 0.0, "epoch": 1, "text": "late"})
    with Journal(tmp_path) as journal:
        journal.append("note", text="second")
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(late)
        if gone_on:
            journal.append("note", text="third")
    expected = ["first", "second", "third"] if gone_on else ["first", "second"]
    found = read(tmp_path)
    assert (_texts(tmp_path), found.late, found.torn_bytes) == (expected, 1, 0)
    _append(tmp_path, "more")
    assert _texts(tmp_path) == [*expected, "more"]


def test_a_line_between_the_look_and_the_write_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _append(tmp_path, "first")
    late = encode({"seq": 1, "ev": "note", "t": 0.0, "epoch": 1, "text": "late" * 50})
    real = os.write

    def write(handle: int, data: memoryview) -> int:
        monkeypatch.undo()
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(late)
        return real(handle, data)

    with Journal(tmp_path) as journal:
        monkeypatch.setattr("evomerge.journal.os.write", write)
        journal.append("note", text="second")
        journal.append("note", text="third")
    assert _texts(tmp_path) == ["first", "second", "third"]
    assert read(tmp_path).late == 1


@pytest.mark.parametrize("disk_full", [False, True])
def test_a_driver_that_froze_after_its_look_cuts_nothing_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk_full: bool
) -> None:
    def frozen() -> None:
        monkeypatch.undo()
        (tmp_path / LOCK).unlink()
        _append(tmp_path, "second", "third")

    def full(handle: int, data: memoryview) -> int:
        frozen()
        raise OSError(errno.ENOSPC, "no space left on device")

    with Journal(tmp_path) as journal:
        journal.append("note", text="first")
        if disk_full:  # frozen even later
            monkeypatch.setattr("evomerge.journal.os.write", full)
        else:
            monkeypatch.setattr(journal._lock, "require", frozen)
        with pytest.raises(LockedError, match="another driver has taken over"):
            journal.append("note", text="late")
    assert _texts(tmp_path) == ["first", "second", "third"]


def test_a_half_line_of_an_overtaken_driver_is_removed(tmp_path: Path) -> None:
    _append(tmp_path, "first")
    with Journal(tmp_path) as journal:
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(b'{"seq":1,"ev":')
        journal.append("note", text="second")
    assert _texts(tmp_path) == ["first", "second"]


@pytest.mark.parametrize("change", ["replaced", "shortened"])
def test_a_journal_that_changes_under_its_driver_is_an_error(tmp_path: Path, change: str) -> None:
    path = tmp_path / JOURNAL
    with Journal(tmp_path) as journal:
        journal.append("note", text="first")
        journal.append("note", text="second")
        if change == "replaced":
            copy = path.read_bytes()
            path.unlink()
            path.write_bytes(copy)
        else:
            os.truncate(path, 40)
        before = path.read_bytes()
        with pytest.raises(StorageError, match="was replaced or shortened while the study was run"):
            journal.append("note", text="third")
    assert path.read_bytes() == before


def test_journals_without_epochs_are_readable() -> None:
    old = [encode({"seq": n, "ev": "note", "t": 0.0}) for n in range(2)]
    found = scan(b"".join(old), "x")
    assert (len(found.records), found.epoch, found.late) == (2, 0, 0)


def test_a_lock_is_given_up_once(tmp_path: Path) -> None:
    lock = DriverLock(tmp_path)
    lock.require()
    lock.close()
    lock.close()
    DriverLock(tmp_path).close()
