from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import LockedError, StorageError
from evomerge.journal import JOURNAL, LOCK, Journal, encode, hexes, is_locked, read, scan, unhexes


def _write(directory: Path, count: int) -> None:
    with Journal(directory) as journal:
        for number in range(count):
            journal.append("note", text=f"line\t{number}\n")


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True)))
def test_hexes_restore_every_float_bit_for_bit(values: list[float]) -> None:
    restored = unhexes(hexes(values))
    assert len(restored) == len(values)
    for before, after in zip(values, restored, strict=True):
        same = before == after and math.copysign(1, before) == math.copysign(1, after)
        assert same or (math.isnan(before) and math.isnan(after))


def test_a_line_is_json_a_tab_and_its_checksum(tmp_path: Path) -> None:
    _write(tmp_path, 2)
    for number, line in enumerate((tmp_path / JOURNAL).read_bytes().splitlines()):
        body, checksum = line.split(b"\t")
        assert checksum.decode() == blake2b(body, digest_size=8).hexdigest()
        record = json.loads(body)
        assert list(record)[:2] == ["seq", "ev"]
        assert (record["seq"], record["text"]) == (number, f"line\t{number}\n")


def test_directory_and_files_are_private(tmp_path: Path) -> None:
    study = tmp_path / "a" / "study"
    _write(study, 1)
    assert stat.S_IMODE(study.stat().st_mode) == 0o700
    assert stat.S_IMODE((study / JOURNAL).stat().st_mode) == 0o600
    assert stat.S_IMODE((study / LOCK).stat().st_mode) == 0o600


def test_a_reopened_journal_goes_on_where_it_stood(tmp_path: Path) -> None:
    _write(tmp_path, 3)
    with Journal(tmp_path) as journal:
        assert [record["seq"] for record in journal.records] == [0, 1, 2]
        journal.append("note", text="more")
    assert [record["seq"] for record in read(tmp_path).records] == [0, 1, 2, 3]


def test_a_tail_torn_at_any_byte_costs_only_the_last_record(tmp_path: Path) -> None:
    _write(tmp_path, 3)
    data = (tmp_path / JOURNAL).read_bytes()
    start = data.rindex(b"\n", 0, len(data) - 1) + 1
    for cut in range(start, len(data)):
        found = scan(data[:cut], "x")
        assert (len(found.records), found.good_bytes, found.torn_bytes) == (2, start, cut - start)


def test_a_torn_tail_is_removed_and_noted(tmp_path: Path) -> None:
    _write(tmp_path, 3)
    path = tmp_path / JOURNAL
    os.truncate(path, path.stat().st_size - 5)
    torn = path.read_bytes()
    assert len(read(tmp_path).records) == 2
    assert path.read_bytes() == torn, "a reader changed the file"
    with Journal(tmp_path) as journal:
        assert len(journal.records) == 2
        assert journal.torn_bytes > 0
    records = read(tmp_path).records
    assert [record["seq"] for record in records] == [0, 1, 2]
    assert "torn last record" in records[2]["text"]


def test_any_flipped_bit_before_the_last_line_is_refused_with_its_offset(tmp_path: Path) -> None:
    _write(tmp_path, 3)
    data = (tmp_path / JOURNAL).read_bytes()
    second = data.index(b"\n") + 1
    third = data.index(b"\n", second) + 1
    for position in range(second, third - 1):
        damaged = bytearray(data)
        damaged[position] ^= 4
        with pytest.raises(StorageError, match=f"record 1 at byte {second} is damaged"):
            scan(bytes(damaged), "x")


def test_a_removed_line_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, 3)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    with pytest.raises(StorageError, match="expected record 1 at byte"):
        scan(lines[0] + lines[2], "x")


def test_a_float_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode({"seq": 0, "ev": "note", "value": math.nan})


def test_a_directory_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no study here \(journal.jsonl is missing\)"):
        read(tmp_path)


def test_a_second_driver_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(LockedError, match=rf"pid {os.getpid()} on .+ since 20"):
        Journal(tmp_path)
    Journal(tmp_path).close()
    assert LockedError.exit_code == 5


HOLDER = """
import sys, time
from pathlib import Path
from evomerge.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert is_locked(tmp_path)
        with pytest.raises(LockedError, match=f"pid {holder.pid} "):
            Journal(tmp_path)
        holder.kill()
    assert not is_locked(tmp_path)
    Journal(tmp_path).close()


@pytest.mark.parametrize("name", [JOURNAL, LOCK])
def test_a_symbolic_link_is_not_followed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    study = tmp_path / "study"
    study.mkdir()
    (study / name).symlink_to(target)
    with pytest.raises(StorageError):
        Journal(study)
    assert target.read_text() == "precious"


def test_a_full_disk_leaves_whole_records_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 2)
    before = (tmp_path / JOURNAL).read_bytes()
    real = os.write
    calls = []

    def write(handle: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return real(handle, data[:7])  # a short write comes before the error
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(tmp_path) as journal:
        monkeypatch.setattr("evomerge.journal.os.write", write)
        with pytest.raises(StorageError, match=r"could not write record 2: No space left.*free"):
            journal.append("note", text="third")
        monkeypatch.undo()
        assert len(calls) == 2
        assert (tmp_path / JOURNAL).read_bytes() == before
        journal.append("note", text="third")
    assert [record["seq"] for record in read(tmp_path).records] == [0, 1, 2]


def test_a_failed_fsync_is_an_error_and_the_record_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path) as journal:
        journal.append("note", text="first")

        def fsync(handle: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr("evomerge.journal.os.fsync", fsync)
        with pytest.raises(StorageError, match="could not write record 1"):
            journal.append("note", text="second")
        monkeypatch.undo()
    assert len(read(tmp_path).records) == 1


def test_an_append_cut_short_by_a_signal_is_mended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def write(handle: int, data: memoryview) -> int:
        real(handle, data[:9])
        raise KeyboardInterrupt

    with Journal(tmp_path) as journal:
        journal.append("note", text="first")
        monkeypatch.setattr("evomerge.journal.os.write", write)
        with pytest.raises(KeyboardInterrupt):
            journal.append("note", text="second")
        monkeypatch.undo()
        journal.append("note", text="second")
    assert [record["text"] for record in read(tmp_path).records] == ["first", "second"]


def test_a_closed_journal_refuses(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    journal.close()
    with pytest.raises(StorageError, match="closed"):
        journal.append("note", text="late")
