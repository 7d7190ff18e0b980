"""`evomerge replay`: a sound journal is called sound, and nothing else is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from study_journals import cut, essence_of, events_of
from toy_study import ToySearcher, rounded, toy_study

from evomerge.cli import cli
from evomerge.errors import InputError, LockedError
from evomerge.journal import JOURNAL, Journal, encode, hexes, read, scan
from evomerge.replay import repair, verify
from evomerge.search.protocol import Candidate, SearchProblem
from evomerge.study_view import StudyState, StudyView


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The journal of a study with equal recipes."""
    directory = tmp_path_factory.mktemp("whole") / "s"
    toy_study(directory, budget=8, decode=rounded).run()
    return (directory / JOURNAL).read_bytes()


@pytest.fixture
def study(tmp_path: Path, whole: bytes) -> Path:
    directory = tmp_path / "s"
    directory.mkdir()
    (directory / JOURNAL).write_bytes(whole)
    return directory


def _change(directory: Path, event: str, change: Callable[[dict[str, Any]], None]) -> int:
    """Change the last record of an event and give it a right checksum; return its number."""
    records = [dict(record) for record in read(directory).records]
    record = [one for one in records if one["ev"] == event][-1]
    change(record)
    (directory / JOURNAL).write_bytes(b"".join(map(encode, records)))
    number: int = record["seq"]
    return number


def test_a_finished_study_is_sound_and_untouched(study: Path, whole: bytes) -> None:
    found = verify(study, toy_study(study, budget=8, decode=rounded))
    assert (found.problems, found.trials, found.compared) == ((), 11, 11)
    assert found.finished
    assert found.results == len(events_of(study, "tell", "score"))
    assert (found.drivers, found.torn_bytes, found.late) == (1, 0, 0)
    assert (study / JOURNAL).read_bytes() == whole


def test_a_study_cut_after_any_record_is_sound(study: Path) -> None:
    for records in range(len(read(study).records) - 1, 0, -1):
        cut(study, records)
        found = verify(study, toy_study(study, budget=8, decode=rounded))
        assert found.problems == (), records
        assert found.compared == len(events_of(study, "ask"))
        assert not found.finished


def test_a_torn_tail_and_late_lines_are_harmless(study: Path) -> None:
    with (study / JOURNAL).open("ab") as file:
        file.write(encode({"seq": 3, "ev": "note", "t": 0.0, "epoch": 0}) + b'{"seq":')
    found = verify(study, None)
    assert (found.problems, found.late, found.torn_bytes) == ((), 1, 7)
    assert found.compared is None


class Other(ToySearcher):
    def ask(self, n: int) -> tuple[Candidate, ...]:
        return tuple(
            Candidate(one.id, (*one.x[:2], 0.125, *one.x[3:])) if one.id == 5 else one
            for one in super().ask(n)
        )


def test_a_searcher_that_asks_differently_is_seen(study: Path) -> None:
    def make(problem: SearchProblem) -> Other:
        return Other(problem)

    found = verify(study, toy_study(study, budget=8, decode=rounded, make_searcher=make))
    assert found.compared == 8
    assert "trial 8: dimension 2: the journal has" in found.problems[0]


def test_other_settings_are_seen(study: Path) -> None:
    with pytest.raises(InputError, match=r"^different settings: the \d+ records") as caught:
        verify(study, toy_study(study, budget=9, decode=rounded))
    assert "search.trials: 8 -> 9" in str(caught.value)
    assert "evomerge extend" in str(caught.value)


def _leave(record: dict[str, Any]) -> None:
    record["x"] = hexes((1.5, 0.0, 0.0, 0.0))


def _infinite(record: dict[str, Any]) -> None:
    record["values"] = hexes((float("inf"), 0.0))


def _fewer(record: dict[str, Any]) -> None:
    record["items"][0] = hexes((0.0,))


def _digest(record: dict[str, Any]) -> None:
    record["digest"] = "0" * 32


def _twice(record: dict[str, Any]) -> None:
    record["trial"] = 0


def _unasked(record: dict[str, Any]) -> None:
    record["trial"] = 99


def _other_front(record: dict[str, Any]) -> None:
    record["front"] = record["front"][:-1]


@pytest.mark.parametrize(
    ("event", "change", "text"),
    [
        ("ask", _leave, "x leaves the unit box"),
        ("ask", _digest, "its recipe has the digest"),
        ("ask", _unasked, "trial 99 follows trial 9"),
        ("tell", _infinite, "a score is not finite"),
        ("tell", _fewer, "1 item scores for 3 items"),
        ("tell", _twice, "trial 0 was not asked, or has a result already"),
        ("score", _unasked, "trial 99 was not asked"),
        ("done", _other_front, "the results now lead to another end: front"),
    ],
)
def test_records_that_contradict_each_other_are_seen(
    study: Path, event: str, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    number = _change(study, event, change)
    found = verify(study, toy_study(study, budget=8, decode=rounded))
    assert text in found.problems[0]
    assert f"record {number} ({event})" in found.problems[0] or event == "done"


def test_a_damaged_journal_is_cut_and_goes_on_to_the_same_end(
    study: Path, whole: bytes, tmp_path: Path
) -> None:
    essence, front = essence_of(study), StudyView.load(study).front
    offsets = scan(whole, "x").offsets
    damaged = bytearray(whole)
    damaged[offsets[12] + 10] ^= 1
    (study / JOURNAL).write_bytes(damaged)
    found = verify(study, None)
    assert found.records == 12
    assert f"record 12 at byte {offsets[12]} is damaged" in found.problems[0]

    repaired = repair(study)
    assert repaired is not None
    assert (repaired.kept, repaired.removed_bytes) == (12, len(whole) - offsets[12])
    assert repaired.original.read_bytes() == bytes(damaged)
    assert (study / JOURNAL).read_bytes().startswith(whole[: offsets[12]])
    assert verify(study, None).problems == ()
    assert repair(study) is None

    view = toy_study(study, budget=8, decode=rounded, log=tmp_path / "log").run()
    assert (essence_of(study), view.front) == (essence, front)


def test_a_contradiction_is_cut_too(study: Path) -> None:
    number = _change(study, "tell", _infinite)
    repaired = repair(study)
    assert repaired is not None
    assert repaired.kept == number
    assert toy_study(study, budget=8, decode=rounded).run().state is StudyState.FINISHED


def test_a_running_study_is_not_repaired(study: Path) -> None:
    with Journal(study), pytest.raises(LockedError):
        repair(study)


def test_the_command_reports_and_repairs(study: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(cli, ["replay", str(study), "--records", "--json"])
    assert good.exit_code == 0, good.output
    facts = json.loads(good.stdout)
    assert (facts["problems"], facts["compared"], facts["finished"]) == ([], None, True)
    os.truncate(study / JOURNAL, 4000)
    with (study / JOURNAL).open("ab") as file:
        file.write(b"\nrubbish\nmore\n")
    bad = runner.invoke(cli, ["replay", str(study), "--records"])
    assert type(bad.exception).__name__ == "StorageError"
    assert "--repair cuts off damaged records" in str(bad.exception)
    assert "verdict      damaged or changed" in bad.output
    mended = runner.invoke(cli, ["replay", str(study), "--records", "--repair"])
    assert mended.exit_code == 0, mended.output
    assert "verdict      sound" in mended.output
    assert "the whole file is" in mended.output


def test_only_a_study_file_says_what_the_searcher_is(study: Path) -> None:
    result = CliRunner().invoke(cli, ["replay", str(study)])
    assert "give the study file" in str(result.exception)
