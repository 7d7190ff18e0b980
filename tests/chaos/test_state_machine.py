"""Any order of deaths, tears, flips, extensions and late lines, by hypothesis.

A death here is an exception that nothing catches, before, amid or after the write of a record: the
file is what SIGKILL would leave, within microseconds instead of milliseconds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings, strategies
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from study_journals import essence_of
from toy_study import toy_study

from evomerge import driver_lock, study
from evomerge.errors import LockedError
from evomerge.extension import extend
from evomerge.journal import JOURNAL, DamagedError, Journal, Record, encode, read
from evomerge.replay import record_problems, repair, verify
from evomerge.study import Study
from evomerge.study_record import History
from evomerge.study_view import StudyView

BUDGET = 8
When = Literal["before", "amid", "after"]


class _KilledError(BaseException):
    """Passes every handler, as SIGKILL does."""


class _Mortal(Journal):
    """Dies at one of its records."""

    fatal = 0
    when: When = "before"

    def append(self, event: str, **fields: Any) -> Record:
        _Mortal.fatal -= 1
        if _Mortal.fatal:
            return super().append(event, **fields)
        if self.when == "after":
            super().append(event, **fields)
        if self.when == "amid":
            line = encode({"seq": self._seq, "ev": event, "epoch": self.epoch, **fields})
            os.write(self._file, line[: len(line) // 2])
        raise _KilledError


def make(directory: Path) -> Study:
    return toy_study(directory, budget=BUDGET, log=directory.parent / "log")


@cache
def undisturbed(extensions: tuple[int | None, ...]) -> tuple[dict[tuple[str, ...], Any], Any]:
    """Return what a study comes to that was extended to these trials, each time at its end."""
    place = Path(tempfile.mkdtemp())
    try:
        directory = place / "study"
        make(directory).run()
        before = BUDGET
        for trials in extensions:
            assert trials is not None
            extend(directory, trials - before)
            before = trials
            make(directory).run()
        view = StudyView.load(directory)
        return _results(directory), (view.front, view.knee)
    finally:
        shutil.rmtree(place)


def _results(directory: Path) -> dict[tuple[str, ...], Any]:
    """Return asks and results on the search items; finalists change with every extension."""
    return {key: found for key, found in essence_of(directory).items() if key[0] != "score"}


class StudyMachine(RuleBasedStateMachine):
    """One study, whatever happens to it."""

    def __init__(self) -> None:
        super().__init__()
        self._place = Path(tempfile.mkdtemp())
        self._directory = self._place / "study"
        self._patches: list[Any] = [
            mock.patch.object(os, "fsync", lambda handle: None),  # nothing cuts the power here
            mock.patch.object(driver_lock, "LOCK_SECONDS", 0.0),
            mock.patch.object(study, "Journal", _Mortal),
        ]
        for patch in self._patches:
            patch.start()
        self._known: dict[tuple[str, ...], Any] = {}

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            for patch in self._patches:
                patch.stop()
            shutil.rmtree(self._place)

    # -- what happens -----------------------------------------------------------------------

    @rule(
        record=strategies.integers(1, 40), when=strategies.sampled_from(["before", "amid", "after"])
    )
    def die(self, record: int, when: When) -> None:
        self._run(record, when)

    @rule()
    def finish(self) -> None:
        self._run(0, "before")
        history = self._history()
        results, end = undisturbed(tuple(limit.trials for limit in history.extensions))
        assert _results(self._directory) == results
        view = StudyView.load(self._directory)
        assert (view.front, view.knee) == end
        found = verify(self._directory, make(self._directory))
        assert (found.problems, found.compared) == ((), found.trials)
        assert found.finished

    @precondition(lambda self: self._lines())
    @rule(share=strategies.floats(0.0, 1.0))
    def tear(self, share: float) -> None:
        path = self._directory / JOURNAL
        last = len(self._lines()[-1])
        os.truncate(path, path.stat().st_size - max(1, round(share * last)))
        self._known = self._journaled()

    @precondition(lambda self: self._lines())
    @rule(share=strategies.floats(0.0, 1.0, exclude_max=True), bit=strategies.integers(0, 7))
    def flip(self, share: float, bit: int) -> None:
        path = self._directory / JOURNAL
        data = bytearray(path.read_bytes())
        data[int(share * len(data))] ^= 1 << bit
        path.write_bytes(data)
        try:
            read(self._directory)
        except DamagedError:
            assert repair(self._directory) is not None
        assert repair(self._directory) is None
        self._known = self._journaled()

    @precondition(lambda self: self._lines() and len(self._history().extensions) < 2)
    @rule(trials=strategies.integers(1, 5))
    def extend(self, trials: int) -> None:
        if self._history().opened is not None:
            extend(self._directory, trials)

    @precondition(lambda self: self._lines())
    @rule()
    def end_a_line_late(self) -> None:
        """A driver that was overtaken in the middle of a write ends it."""
        scan = read(self._directory)
        if scan.torn_bytes or scan.epoch < 2:
            return
        late = encode({"seq": len(scan.records), "ev": "note", "epoch": scan.epoch - 1})
        with (self._directory / JOURNAL).open("ab") as file:
            file.write(late)
        assert read(self._directory).records == scan.records

    @rule()
    def second_driver(self) -> None:
        with Journal(self._directory), pytest.raises(LockedError):
            Journal(self._directory)

    # -- what holds -------------------------------------------------------------------------

    @invariant()
    def the_journal_is_sound(self) -> None:
        if not self._lines():
            return
        records = read(self._directory).records
        assert [record["seq"] for record in records] == list(range(len(records)))
        assert not [p for p in record_problems(records) if records[0]["ev"] == "open"]

    def _run(self, fatal: int, when: When) -> None:
        """Run the study; what was in the journal stays there and is not scored again."""
        log = self._place / "log"
        before = self._known = self._journaled()
        begun = len(log.read_text().splitlines()) if log.exists() else 0
        _Mortal.fatal, _Mortal.when = fatal, when
        try:
            make(self._directory).run()
        except _KilledError:
            assert fatal
        self._known = self._journaled()
        assert before.items() <= self._known.items(), "a result was lost"
        lines = log.read_text().splitlines()[begun:] if log.exists() else []
        again = {(line.split()[0], line.split()[1][0]) for line in lines}
        scored = {(json_digest, split) for _, split, _, json_digest in before}
        assert not again & scored, "a result that was in the journal was measured again"

    def _journaled(self) -> dict[tuple[str, ...], Any]:
        """Return the results by event, first letter of the items, trial and digest."""
        if not self._lines():
            return {}
        history = self._history()
        return {
            (split, split[0], str(number), history.digests[number]): result.value
            for (split, number), result in history.results.items()
        }

    def _history(self) -> History:
        return History.of(read(self._directory).records, "")

    def _lines(self) -> list[bytes]:
        path = self._directory / JOURNAL
        return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def test_any_order_of_faults() -> None:
    run_state_machine_as_test(
        StudyMachine,
        settings=settings(
            max_examples=5, stateful_step_count=8, deadline=None, derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_any_order_of_faults_for_long() -> None:
    run_state_machine_as_test(
        StudyMachine,
        settings=settings(
            max_examples=400, stateful_step_count=30, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
