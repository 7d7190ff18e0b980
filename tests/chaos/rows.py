"""The rows of the table of faults: each runs for real and says what it measured."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import faults
from chaos_study import MISCHIEF, SEARCHERS, Plan, drive, notes
from crash_matrix import Matrix, crash_export, crash_study
from under_fire import Fault, Tally, survive


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        fault: what was done.
        load: to what, in the sizes that were really run.
        found: what came of it, measured.
        holds: what was promised.
        seconds: that the row took.
    """

    fault: str
    load: str
    found: str
    holds: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Size:
    """How large the rows are.

    Attributes:
        trials: of the searches that are killed.
        driver_kills: per search.
        worker_kills: per search.
        rounds: of both at once, with torn records and frozen drivers.
        seeds: of the searcher.
        searchers: that are killed.
        seconds: that a trial takes on a worker, on average.
        every: point of the crash matrix.
        journal: trials of the long journal.
        long_search: trials of the search whose memory is watched.
        stops: by a full disk.
        bad_trials: of the search among bad results.
    """

    trials: int
    driver_kills: int
    worker_kills: int
    rounds: int
    seeds: tuple[int, ...]
    searchers: tuple[str, ...]
    seconds: float
    every: int
    journal: int
    long_search: int
    stops: int
    bad_trials: int


#: What the default tests run.
SHORT = Size(60, 5, 8, 6, (1,), SEARCHERS, 0.005, 30, 500, 400, 3, 60)
#: What the issue asks for.
LONG = Size(300, 25, 100, 50, (1, 2, 3), SEARCHERS, 0.04, 1, 10_000, 5_000, 8, 300)

#: In the order in which they take turns in the row of everything at once.
_TURNS: tuple[Fault, ...] = ("tear", "worker", "freeze", "driver", "start", "overtake")

Case = Callable[[Path], Row]


def cases(size: Size, base: str = "", experts: tuple[str, ...] = ()) -> Mapping[str, Case]:
    """Return the rows of a size by name.

    Args:
        size: of each.
        base: checkpoint for the rows of export; without it they are left out.
        experts: three of its fine-tunes.
    """
    found: dict[str, Case] = {}
    for searcher in size.searchers:
        for seed in size.seeds:
            found[f"driver {searcher} {seed}"] = partial(_driver, size, searcher, seed)
    for searcher in size.searchers:
        found[f"workers {searcher}"] = partial(_workers, size, searcher)
    for searcher in size.searchers:
        found[f"both {searcher}"] = partial(_both, size, searcher)
    found["completion"] = partial(_completion, size)
    found["points study"] = partial(_points_study, size)
    if base:
        found["points export"] = partial(_points_export, size, base, list(experts))
    for searcher in size.searchers:
        found[f"resume {searcher}"] = partial(_resume, size, searcher)
    found["full disk"] = partial(_full_disk, size)
    found["bad results"] = partial(_bad, size)
    found["all fail"] = _all_fail
    for searcher in size.searchers:
        found[f"memory {searcher}"] = partial(_memory, size, searcher)
    return found


def tally_row(fault: str, load: str, tally: Tally, planned: int) -> Row:
    """Return the row of a study under fire; too few hits would show nothing."""
    hits = ", ".join(f"{count} {name}" for name, count in sorted(tally.kills.items()))
    found = (
        f"{hits}: {tally.lost} lost, {tally.duplicated} duplicated, {tally.redone} redone"
        f"{f' of {tally.torn} torn' if tally.torn else ''}, "
        f"{'identical' if tally.identical else 'ANOTHER END'}; "
        f"{tally.repeated} cut short and begun again"
    )
    problems = "".join(f"; {problem:.200}" for problem in tally.problems[:3])
    enough = sum(tally.kills.values()) >= 0.7 * planned
    few = "" if enough else f"; TOO FEW, {planned} were planned"
    return Row(fault, load, found + few + problems, tally.clean and enough, tally.seconds)


def _driver(size: Size, searcher: str, seed: int, folder: Path) -> Row:
    plan = Plan(searcher, seed, size.trials, "processes", 4, size.seconds / 4)
    tally = survive(plan, ["driver"] * size.driver_kills, folder, seed)
    load = f"{searcher}, seed {seed}, {size.trials} trials, 4 workers"
    return tally_row("driver SIGKILL", load, tally, size.driver_kills)


def _workers(size: Size, searcher: str, folder: Path) -> Row:
    plan = Plan(searcher, 1, size.trials, "processes", 4, size.seconds)
    tally = survive(plan, ["worker"] * size.worker_kills, folder, 1)
    load = f"{searcher}, {size.trials} trials, 4 workers"
    return tally_row("worker SIGKILL", load, tally, size.worker_kills)


def _both(size: Size, searcher: str, folder: Path) -> Row:
    plan = Plan(searcher, 1, size.trials, "processes", 4, size.seconds * 5)
    turns = [_TURNS[number % len(_TURNS)] for number in range(size.rounds)]
    random.Random(1).shuffle(turns)
    tally = survive(plan, turns, folder, 2)
    load = f"{searcher}, {size.trials} trials, {size.rounds} rounds"
    fault = "driver, workers, torn tail, frozen and overtaken driver"
    return tally_row(fault, load, tally, size.rounds)


def _completion(size: Size, folder: Path) -> Row:
    plan = Plan("de", 1, size.trials, "processes", 4, size.seconds, order="completion")
    turns: list[Fault] = ["driver", "worker", "tear"]
    turns *= max(1, size.rounds // 3)
    tally = survive(plan, turns, folder, 3)
    load = f"order: completion, de, {size.trials} trials"
    return tally_row("driver, workers, torn tail; against its own replay", load, tally, len(turns))


def _matrix(fault: str, load: str, matrix: Matrix, began: float) -> Row:
    found = (
        f"{matrix.died} of {matrix.points} points, {matrix.deaths} deaths with those of the "
        f"resumes: {len(matrix.problems)} wrong"
    )
    problems = "".join(f"; {problem:.200}" for problem in matrix.problems[:3])
    holds = not matrix.problems and matrix.died > 0 and matrix.deaths >= matrix.died
    return Row(fault, load, found + problems, holds, time.monotonic() - began)


def _points_study(size: Size, folder: Path) -> Row:
    began = time.monotonic()
    matrix = crash_study(folder / "points", size.every)
    load = "de, 4 trials; two resumes die too"
    return _matrix("death before, amid and after each step of a study", load, matrix, began)


def _points_export(size: Size, base: str, experts: list[str], folder: Path) -> Row:
    began = time.monotonic()
    matrix = crash_export(folder / "points", max(1, size.every // 8), base, experts)
    load = "checkpoint with tokenizer and card"
    return _matrix("death before and after each step of an export", load, matrix, began)


def _resume(size: Size, searcher: str, folder: Path) -> Row:
    began = time.monotonic()
    got = faults.resume(Plan(searcher, 1, size.journal), folder / "study")
    found = (
        f"{got.seconds:.1f} s, {got.processor_seconds:.1f} s of processor; "
        f"{'identical' if got.identical else 'ANOTHER END'}"
    )
    load = f"{searcher}, {got.trials:,} trials, {got.megabytes:.1f} MB"
    # What other programs take from a shared machine is not the driver's.
    holds = got.identical and got.processor_seconds <= 20.0
    return Row("resume of a long journal", load, found, holds, time.monotonic() - began)


def _full_disk(size: Size, folder: Path) -> Row:
    began = time.monotonic()
    got = faults.full_disk(Plan("de", 1, 40), folder, size.stops)
    found = (
        f"{got.stops} stops with exit 6, others {list(got.wrong)}; "
        f"{'identical' if got.identical else 'ANOTHER END'} once there was space"
    )
    load = "de, 40 trials, " + ("a disk" if got.short_writes else "files limited in size")
    holds = got.identical and not got.wrong and got.stops == size.stops
    return Row("disk full under the journal", load, found, holds, time.monotonic() - began)


def _bad(size: Size, folder: Path) -> Row:
    plan = Plan("de", 1, size.bad_trials, "processes", 4, 0.0, bad=0.2)
    got = faults.bad_results(plan, folder / "study")
    seen = faults.kinds_of_mischief(plan, folder / "study")
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(got.kinds.items()))
    found = (
        f"finished; {got.failed} failed ({kinds}), {got.on_front} of them in the front, "
        f"{len(got.problems)} wrong"
    )
    load = f"{got.trials} trials; {len(seen)} of {len(MISCHIEF)} kinds: {', '.join(sorted(seen))}"
    holds = got.exit_code == 0 and got.failed > 0 and not got.on_front and not got.problems
    return Row("bad results, hangs and errors in 20 % of trials", load, found, holds, got.seconds)


def _all_fail(folder: Path) -> Row:
    began = time.monotonic()
    plan = Plan("de", 1, 60, "processes", 4, always_fails=True)
    codes = [faults.in_process(drive, plan, folder / "study") for _ in range(2)]
    text = (notes(folder / "study") / "error.txt").read_text()
    found = f"exit {codes[0]}, again exit {codes[1]}; says `{text:.60}…`"
    holds = codes == [3, 3] and "10 trials in a row failed" in text
    return Row("every trial fails", "60 trials", found, holds, time.monotonic() - began)


#: What a trial may add to the driver's memory: its recipe, its item scores, and what the searcher
#: keeps of it. nevergrad keeps several copies of each point; see docs/durability.md.
_MOST_BYTES = 8_000.0


def _memory(size: Size, searcher: str, folder: Path) -> Row:
    began = time.monotonic()
    got = faults.memory(Plan(searcher, 1, size.long_search), folder / "study")
    found = (
        f"{got.bytes_per_trial / 1e3:.1f} kB per trial, {got.megabytes:.0f} MB in the end, "
        f"{got.handles} more open files"
    )
    holds = got.bytes_per_trial <= _MOST_BYTES and got.handles <= 0
    load = f"{searcher}, {got.trials:,} trials"
    return Row("memory of a long search", load, found, holds, time.monotonic() - began)


assert set(_TURNS) == set(get_args(Fault))
