"""The cursor says of every growing journal what a fresh reading says."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_study import finished, small_study

from evomerge.errors import StorageError
from evomerge.journal import JOURNAL, Journal, encode, read
from evomerge.journal_cursor import JournalCursor
from evomerge.presentation import project
from evomerge.study_record import History
from evomerge.study_series import Series
from evomerge.study_view import StudyView


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return finished(tmp_path_factory.mktemp("study") / "strings")


def same(cursor: JournalCursor, directory: Path) -> bool:
    return cursor.history == History.of(read(directory).records, str(directory))


def test_every_growth_gives_what_a_fresh_reading_gives(view: StudyView, tmp_path: Path) -> None:
    data = (view.directory / JOURNAL).read_bytes()
    path = tmp_path / JOURNAL
    cursor = JournalCursor(tmp_path)
    assert not cursor.poll()
    path.touch()
    cursor.poll()
    first = cursor.history
    history = None
    for end in range(0, len(data) + 211, 211):  # cuts through the middle of records
        with path.open("ab") as file:
            file.write(data[max(0, end - 211) : end])
        cursor.poll()
        assert same(cursor, tmp_path)
        if cursor.history is not first:
            history = history or cursor.history
            assert cursor.history is history  # nothing was read twice
    assert not cursor.poll()
    assert cursor.history.done is not None


def test_series_that_grow_equal_those_that_are_computed_at_once(
    view: StudyView, tmp_path: Path
) -> None:
    lines = (view.directory / JOURNAL).read_bytes().splitlines(keepends=True)
    cursor, series = JournalCursor(tmp_path), Series()
    for line in lines:
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(line)
        cursor.poll()
        now = StudyView.of(cursor.history, tmp_path)
        assert project(now, series, pages=False).steps == project(now).steps
    assert len(series.steps(StudyView.of(cursor.history, tmp_path))) == len(view.trials)
    assert series.steps(view)[-1].metrics["hypervolume"] == pytest.approx(view.hypervolume)


def test_a_record_that_is_being_written_is_waited_for(view: StudyView, tmp_path: Path) -> None:
    lines = (view.directory / JOURNAL).read_bytes().splitlines(keepends=True)
    path = tmp_path / JOURNAL
    path.write_bytes(b"".join(lines[:6]) + lines[6][:-20])
    cursor = JournalCursor(tmp_path)
    assert cursor.poll()
    assert same(cursor, tmp_path)
    assert not cursor.poll()
    with path.open("ab") as file:
        file.write(lines[6][-20:])
    assert cursor.poll()
    assert same(cursor, tmp_path)


def test_a_tail_that_was_cut_and_a_new_driver_are_read_again(tmp_path: Path) -> None:
    small_study(tmp_path).run()
    cursor = JournalCursor(tmp_path)
    cursor.poll()
    old = cursor.history
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]))
    assert cursor.poll()
    assert cursor.history is not old
    assert same(cursor, tmp_path)
    small_study(tmp_path).run()  # ends it again, as another driver
    assert cursor.poll()
    assert same(cursor, tmp_path)
    assert cursor.history.done is not None


def test_failures_that_are_asked_for_again_are_forgotten(tmp_path: Path) -> None:
    small_study(tmp_path).run()
    cursor = JournalCursor(tmp_path)
    cursor.poll()
    before = cursor.history
    failed = [n for (split, n), _ in before.results.items() if split == "search"][-1:]
    with Journal(tmp_path) as journal:
        journal.append("retry", split="search", trials=failed)
    assert cursor.poll()
    assert cursor.history is not before
    assert same(cursor, tmp_path)
    assert ("search", failed[0]) not in cursor.history.results


def test_a_damaged_record_is_an_error_until_it_is_mended(view: StudyView, tmp_path: Path) -> None:
    data = (view.directory / JOURNAL).read_bytes()
    lines = data.splitlines(keepends=True)
    path = tmp_path / JOURNAL
    path.write_bytes(b"".join(lines[:5]))
    cursor = JournalCursor(tmp_path)
    cursor.poll()
    path.write_bytes(b"".join(lines[:5]) + b"garbage\n" + b"".join(lines[5:]))
    for _ in range(2):
        with pytest.raises(StorageError, match="is damaged"):
            cursor.poll()
    path.write_bytes(data)
    assert cursor.poll()
    assert same(cursor, tmp_path)


def test_a_record_that_contradicts_others_is_read_again(view: StudyView, tmp_path: Path) -> None:
    lines = (view.directory / JOURNAL).read_bytes().splitlines(keepends=True)
    path = tmp_path / JOURNAL
    path.write_bytes(b"".join(lines[:3]))
    cursor = JournalCursor(tmp_path)
    cursor.poll()
    epoch = cursor.history.opened["epoch"] if cursor.history.opened else 0
    strange = encode({"seq": 3, "ev": "new", "t": 1.0, "epoch": epoch})
    path.write_bytes(b"".join(lines[:3]) + strange)
    for _ in range(2):
        with pytest.raises(StorageError, match="cannot be understood"):
            cursor.poll()
    path.write_bytes(b"".join(lines))
    assert cursor.poll()
    assert same(cursor, tmp_path)
