"""Verify a journal: record by record, and against a fresh searcher; cut a damaged one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

from evomerge.driver_lock import DriverLock
from evomerge.errors import InputError, StorageError
from evomerge.journal import JOURNAL, DamagedError, Journal, Record, Scan, scan
from evomerge.rerun import rerun
from evomerge.restarting import explained
from evomerge.study import Study
from evomerge.study_record import History, Split
from evomerge.trial import Evaluation


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a record.

    Attributes:
        record: its number.
        text: what was expected and what is there.
    """

    record: int
    text: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What a journal was found to be.

    Attributes:
        records: intact ones.
        torn_bytes: of a last record that a kill cut short; harmless, the next run removes them.
        late: lines of drivers that had been overtaken; harmless, they are skipped.
        drivers: how many have worked on the study.
        trials: asked.
        results: on any split.
        compared: asks that a fresh searcher repeated bit for bit; None where it was not asked to.
        taken: asks before the last restart of the search, which no searcher can repeat.
        finished: the study has its front.
        damaged: records are unreadable or contradict each other; ``repair`` cuts them off.
        problems: one line each; empty where all is right.
    """

    records: int
    torn_bytes: int
    late: int
    drivers: int
    trials: int
    results: int
    compared: int | None
    taken: int
    finished: bool
    damaged: bool
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was done to a damaged journal.

    Attributes:
        kept: records.
        removed_bytes: behind them.
        original: where the whole file is kept.
        problem: why it was cut.
    """

    kept: int
    removed_bytes: int
    original: Path
    problem: str


def verify(directory: Path, study: Study | None) -> Verified:
    """Check the journal in ``directory``, without its lock and without workers.

    Args:
        directory: of the study.
        study: as it is run; None to leave the searcher out.

    Raises:
        InputError: the records are right, and ``study`` has other settings than they were made
            with; names each difference.
        StorageError: there is no journal, or it cannot be read.
    """
    found, damage = _scan(directory / JOURNAL)
    problems = [one.text for one in record_problems(found.records)]
    problems += [damage] if damage else []
    damaged = bool(problems)
    compared = None
    history = History()
    if not problems:
        history = History.of(found.records, str(directory))
        if study is not None:
            compared, problem = _replay(study, found.records)
            problems += [problem] if problem else []
    events = [record["ev"] for record in found.records]
    return Verified(
        records=len(found.records),
        torn_bytes=0 if damage else found.torn_bytes,
        late=found.late,
        drivers=len({record.get("epoch", 0) for record in found.records}),
        trials=events.count("ask"),
        results=sum(event in ("tell", "score", "part") for event in events),
        compared=compared,
        taken=_taken(history),
        finished=history.done is not None,
        damaged=damaged,
        problems=tuple(problems),
    )


def _taken(history: History) -> int:
    restart = history.provenance.last
    if restart is None:
        return 0
    trials = [history.trials[number] for number in range(restart.trial)]
    return sum(trial.kind == "search" and not trial.label for trial in trials)


def _scan(path: Path) -> tuple[Scan, str]:
    """Return what is intact, and what is wrong behind it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return scan(data, JOURNAL), ""
    except DamagedError as error:
        return error.before, str(error).partition(";")[0]


# -- records ------------------------------------------------------------------------------------


def record_problems(records: Sequence[Record]) -> list[Problem]:
    """Return what contradicts itself, up to the first record that cannot be understood.

    Every trial is asked once and in order, has at most one result on a split, and none before
    it was asked. Points are in the unit box, digests are those of the recipes, scores are finite
    and as many as items were asked for, and no more trials are outstanding than the study allows.
    """
    history = History()
    problems = []
    outstanding: set[int] = set()
    for number, record in enumerate(records):
        where = f"record {number} ({record.get('ev')})"
        if (number == 0) is not (record.get("ev") == "open"):
            problems.append(Problem(number, f"{where}: a journal begins with one `open` record"))
            break
        try:
            history.add(record)
            said = _wrong(history, record, outstanding)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            said = f"cannot be understood: {type(error).__name__}: {error}"
            problems.append(Problem(number, f"{where}: {said}"))
            break
        if said:
            problems.append(Problem(number, f"{where}: {said}"))
    return problems


def _wrong(history: History, record: Record, outstanding: set[int]) -> str:
    """Return what is wrong with the record that ``history`` took in last; empty for nothing."""
    assert history.opened is not None
    match record["ev"]:
        case "ask":
            number = record["trial"]
            trial = history.trials[number]
            if trial.kind == "search" and not trial.label:
                outstanding.add(number)
            if trial.recipe.digest != record["digest"]:
                return f"trial {number}: its recipe has the digest {trial.recipe.digest}"
            if not all(0.0 <= value <= 1.0 for value in trial.x or ()):
                return f"trial {number}: x leaves the unit box"
            # A bracket of a search that halves is asked as a whole.
            brackets = "bracket" in (history.opened.get("racing") or {})
            if len(outstanding) > history.opened["parallel"] and not brackets:
                return f"trial {number}: more than `parallel` trials are outstanding"
        case "tell":
            outstanding.discard(record["trial"])
            return _wrong_result(history, "search", record["trial"])
        case "score":
            return _wrong_result(history, record["split"], record["trial"])
        case "retry":
            outstanding.intersection_update(history.trials)
        case "done":
            missing = [
                number
                for number in (*record["front"], record["knee"])
                if (record["split"], number) not in history.results
            ]
            if missing:
                return f"trials {missing} of the front have no {record['split']} scores"
    return ""


def _wrong_result(history: History, split: Split, number: int) -> str:
    result = history.results[split, number]
    if not isinstance(result.value, Evaluation):
        return ""
    scores = result.value.scores
    assert history.opened is not None
    count = len(history.opened["objectives"])
    if len(scores) != count:
        return f"trial {number}: {len(scores)} values for {count} objectives"
    for score, ids in zip(scores, history.items_of(split, number), strict=True):
        if not all(map(isfinite, (score.value, score.standard_error, *score.items))):
            return f"trial {number}: a score is not finite"
        expected = len(ids) if result.rung is None else min(result.rung, len(ids))
        if len(score.items) not in (0, expected):
            return f"trial {number}: {len(score.items)} item scores for {expected} items"
    return ""


# -- the searcher -------------------------------------------------------------------------------


def _replay(study: Study, records: Sequence[Record]) -> tuple[int, str]:
    """Ask a fresh searcher everything again; return how many asks agreed, and what did not."""
    history = History.of(records, str(study.directory))
    try:
        study.require_same(history)
    except InputError as error:
        raise InputError(
            f"different settings: the {len(records)} records of the journal are right, but its "
            f"searcher cannot be asked again with these; {error}"
        ) from error
    asked, done = len(history.trials), history.done
    found = rerun(study, history)
    if found.error is not None:
        return found.compared, explained(found.error, history, study)
    if found.missing:
        return found.compared, (
            f"trial {asked - found.missing}: it was asked before the results that it depends on; "
            f"{found.missing} asks could not be compared"
        )
    if done is not None:
        return found.compared, _same_end(done, found.end)
    return found.compared, ""


def _same_end(recorded: Record, replayed: Record | None) -> str:
    if replayed is None:
        return "the study is finished by its journal, but results that its front needs are missing"
    keys = ("front", "knee", "split")
    changed = [
        f"{key} {recorded[key]} -> {replayed[key]}"
        for key in keys
        if recorded[key] != replayed[key]
    ]
    return f"the results now lead to another end: {', '.join(changed)}" if changed else ""


# -- repair -------------------------------------------------------------------------------------


def repair(directory: Path) -> Repaired | None:
    """Cut a damaged journal to its longest valid prefix and keep the original beside it.

    A kill at any moment leaves the old journal or the new one, never half of it. What only the
    searcher disagrees with is not cut: its libraries have changed, not the file.

    Returns:
        None where there is nothing to repair.

    Raises:
        LockedError: a driver is at work.
        StorageError: no journal, or the disk is full.
    """
    path = directory / JOURNAL
    lock = DriverLock(directory)
    try:
        found, problem = _scan(path)
        end, kept = found.good_bytes, len(found.records)
        wrong = record_problems(found.records)
        if wrong:
            kept, problem = wrong[0].record, wrong[0].text
            end = found.offsets[kept]
        if not problem:
            return None
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        original = path.with_name(f"journal.damaged-{stamp}.jsonl")
        again = 1
        while original.exists():  # repaired twice within a second
            again += 1
            original = path.with_name(f"journal.damaged-{stamp}-{again}.jsonl")
        size = path.stat().st_size
        _cut(path, end, original)
    except OSError as error:
        raise StorageError(f"{path}: cannot be repaired: {error.strerror or error}") from error
    finally:
        lock.close()
    if kept:
        with Journal(directory) as journal:
            journal.append("note", text=f"repaired: {problem}; the original is {original.name}")
    return Repaired(kept, size - end, original, problem)


def _cut(path: Path, end: int, original: Path) -> None:
    """Keep a copy, then replace the file by its first ``end`` bytes, each durably."""
    temporary = path.with_name(f".{path.name}.repair")
    with path.open("rb") as source:
        with original.open("xb") as copied:
            original.chmod(0o600)
            shutil.copyfileobj(source, copied)
            copied.flush()
            os.fsync(copied.fileno())
        source.seek(0)
        with temporary.open("wb") as prefix:
            temporary.chmod(0o600)
            prefix.write(source.read(end))
            prefix.flush()
            os.fsync(prefix.fileno())
    temporary.replace(path)
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
