"""Faults that are no kills: bad results, full disks, long journals, long searches, no tracker."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from chaos_study import MISCHIEF, Plan, Recording, chaos_study, drive, mischief, notes
from process_pool import context
from under_fire import End, end_of, undisturbed

from evomerge.journal import JOURNAL, Journal, read
from evomerge.replay import record_problems
from evomerge.study_listener import StudyListener
from evomerge.study_record import History
from evomerge.study_view import StudyView
from evomerge.trial import Failure, Trial


def in_process(work: Callable[..., None], *arguments: Any, limit_seconds: float = 300.0) -> int:
    """Run in a process of its own; return its exit status (negative: the signal)."""
    child = context().Process(target=work, args=arguments)
    child.start()
    child.join(limit_seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
        raise TimeoutError(f"{work.__name__} hung for {limit_seconds:g} s")
    return int(child.exitcode)


# -- results that are none ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bad:
    """A search among candidates that misbehave.

    Attributes:
        trials: of the search.
        failed: of them.
        kinds: of their failures.
        on_front: misbehaving trials in the front.
        exit_code: of the driver.
        problems: of the journal, and of what was told.
        seconds: all together.
    """

    trials: int
    failed: int
    kinds: dict[str, int]
    on_front: int
    exit_code: int
    problems: tuple[str, ...]
    seconds: float


def bad_results(plan: Plan, directory: Path) -> Bad:
    """Run a plan with mischief to its end and look at what became of it."""
    began = time.monotonic()
    code = in_process(drive, plan, directory)
    seconds = time.monotonic() - began
    records = read(directory).records
    history = History.of(records, str(directory))
    problems = [problem.text for problem in record_problems(records)]
    failed: Counter[str] = Counter()
    for (split, number), result in history.results.items():
        if split != "search" or history.trials[number].kind != "search":
            continue
        wrong = mischief(plan, history.digests[number])
        if isinstance(result.value, Failure):
            failed[result.value.kind] += 1
        if (wrong is not None) is not isinstance(result.value, Failure):
            problems.append(f"trial {number} with mischief {wrong} became {result.value!r:.80}")
    view = StudyView.load(directory)
    front = [number for number in view.front if mischief(plan, history.digests[number])]
    return Bad(
        sum(trial.kind == "search" for trial in history.trials.values()), sum(failed.values()),
        dict(failed), len([n for n in front if history.trials[n].kind == "search"]), code,
        tuple(problems), seconds,
    )  # fmt: skip


def kinds_of_mischief(plan: Plan, directory: Path) -> set[str]:
    """Return which kinds of mischief the trials of a study that ran were up to."""
    history = History.of(read(directory).records, str(directory))
    found = {mischief(plan, digest) for digest in history.digests.values()}
    return {kind for kind in found if kind in MISCHIEF}


# -- a full disk --------------------------------------------------------------------------------


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[bool]:
    """Mount a disk of this size; gives False where nobody may (it takes root)."""
    place.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "evomerge-chaos", str(place)]
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


@dataclass(frozen=True, slots=True)
class Full:
    """A study on a disk that filled up, again and again.

    Attributes:
        stops: times that it stopped with exit code 6.
        wrong: other exit codes.
        identical: it ended like an undisturbed one once there was space.
        short_writes: a real disk was full, so writes came up short first.
    """

    stops: int
    wrong: tuple[int, ...]
    identical: bool
    short_writes: bool


def full_disk(plan: Plan, place: Path, stops: int) -> Full:
    """Let the journal's disk fill up ``stops`` times at places spread over its length."""
    reference = undisturbed(plan, place / "calm")
    length = (place / "calm" / JOURNAL).stat().st_size
    codes = []
    with small_disk(place / "disk", kilobytes=4 * length // 1024 + 512) as real:
        directory = place / "study"  # its notes are beside it, its files are on the disk
        directory.symlink_to(place / "disk")
        for stop in range(stops):
            allowed = length * (stop + 1) // (stops + 1)
            ballast = place / "disk" / "ballast"
            if real:
                _fill(ballast, leave=max(allowed - _size(directory), 1))
                codes.append(in_process(drive, plan, directory))
                ballast.unlink()
            else:
                codes.append(in_process(_limited, plan, directory, allowed))
        last = in_process(drive, plan, directory)
        codes += [last] if last else []
        end = _ended(directory)
    return Full(
        codes.count(6), tuple(code for code in codes if code != 6), end == reference, real
    )  # fmt: skip


def _size(directory: Path) -> int:
    path = directory / JOURNAL
    return path.stat().st_size if path.exists() else 0


def _fill(ballast: Path, leave: int) -> None:
    """Leave about so many bytes of a disk; its pages are the smallest step."""
    free = os.statvfs(ballast.parent)
    page = free.f_frsize
    pages = max(0, free.f_bavail - max(1, leave // page))
    with ballast.open("wb") as file:
        file.write(b"x" * (pages * page))


def _limited(plan: Plan, directory: Path, allowed: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, resource.RLIM_INFINITY))
    drive(plan, directory)


def _ended(directory: Path) -> End:
    ended = json.loads((notes(directory) / "ended.json").read_text())
    return end_of(directory, ended["digest"], ended["told"])


# -- a long journal -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resumed:
    """What it takes to go on with a long journal.

    Attributes:
        trials: in the journal.
        megabytes: of the journal.
        seconds: until the last trial, which was missing, was asked again.
        processor_seconds: of the driver in that time.
        identical: it told its searcher what the first run had told.
    """

    trials: int
    megabytes: float
    seconds: float
    processor_seconds: float
    identical: bool


def resume(plan: Plan, directory: Path) -> Resumed:
    """Run a plan, cut its last trial off, and measure the next start."""
    reference = undisturbed(plan, directory)
    path = directory / JOURNAL
    size = path.stat().st_size
    with Journal(directory) as journal:
        records = journal.records
    last = max(number for number, record in enumerate(records) if record["ev"] == "ask")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:last]))
    report = directory / "resumed.json"
    in_process(_resume, plan, directory, report, limit_seconds=1200.0)
    measured = json.loads(report.read_text())
    end = end_of(directory, measured["digest"], measured["told"])
    return Resumed(
        plan.trials, size / 1e6, measured["seconds"], measured["processor"], end == reference
    )


class _First(StudyListener):
    """Notes when the first trial was scored that was not in the journal."""

    def __init__(self) -> None:
        self.began, self.processor = time.monotonic(), time.process_time()
        self.seconds = self.spent = 0.0

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        if not replayed and not self.seconds:
            self.seconds = time.monotonic() - self.began
            self.spent = time.process_time() - self.processor


def _resume(plan: Plan, directory: Path, report: Path) -> None:
    searchers: list[Recording] = []
    first = _First()
    chaos_study(plan, directory, searchers.append, (first,)).run()
    told = {"digest": searchers[0].digest, "told": searchers[0].told}
    report.write_text(json.dumps({**told, "seconds": first.seconds, "processor": first.spent}))


# -- a long search ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """How the memory of a driver grows.

    Attributes:
        trials: of the search.
        bytes_per_trial: slope of the resident set from the fourth part of the search on.
        megabytes: of the resident set in the end.
        handles: open files in the end, less those at the beginning.
    """

    trials: int
    bytes_per_trial: float
    megabytes: float
    handles: int


class _Sampled(StudyListener):
    def __init__(self, every: int) -> None:
        self._every = every
        self.samples: list[tuple[int, int]] = []
        self.handles: list[int] = []

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        if trial.number % self._every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append((trial.number, pages * resource.getpagesize()))
            self.handles.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208


def memory(plan: Plan, directory: Path) -> Memory:
    """Run a plan in one driver and watch its memory."""
    report = directory.with_name("memory.json")
    in_process(_watched, plan, directory, report, limit_seconds=1200.0)
    return Memory(**json.loads(report.read_text()))


def _watched(plan: Plan, directory: Path, report: Path) -> None:
    watch = _Sampled(every=max(1, plan.trials // 100))
    chaos_study(plan, directory, listeners=(watch,)).run()
    later = watch.samples[len(watch.samples) // 4 :]
    slope = linear_regression(*zip(*later, strict=True)).slope
    found = Memory(
        plan.trials, slope, watch.samples[-1][1] / 1e6, watch.handles[-1] - watch.handles[0]
    )
    report.write_text(json.dumps(asdict(found)))
