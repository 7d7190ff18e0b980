"""Kills, freezes and tears a study again and again, and checks what every moment must hold.

What a study may not lose is an evaluation that is *complete*: its result is in the journal, or
whole in the spool. Whenever no driver is at work, the complete ones are noted, and how often each
was begun. One that is begun once more later was *redone*; one that is not in the journal in the
end was *lost*; two results of one trial are *duplicated*.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

import chaos_study
from chaos_study import Plan, Recording
from process_pool import context

from evomerge.driver_lock import LOCK, is_locked
from evomerge.journal import JOURNAL, read
from evomerge.replay import record_problems, verify
from evomerge.spool import SPOOL, job_key
from evomerge.study_record import History
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Job

#: ``driver``, ``worker``: SIGKILL. ``start``: SIGKILL while the next driver replays. ``tear``: the
#: driver, and the last bytes of its journal. ``freeze``: SIGSTOP, a second driver is refused, a
#: worker is killed meanwhile, SIGCONT. ``overtake``: SIGSTOP, the lock is lost as on a file server,
#: the next driver works, and the first one thaws.
Fault = Literal["driver", "worker", "start", "tear", "freeze", "overtake"]

#: A job whose workers die three times fails, as it should; so none is hit more often than this.
_MOST_HITS = 2
_FROZEN_SECONDS = 0.3

#: An overtaken driver ends with its next record.
_OVERTAKEN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class End:
    """What a study comes to; equal for two that ran the same search.

    Attributes:
        digest: over every ask and every result in the journal, in the order of trials.
        told: over every ask and tell of the searcher, in their order.
        tells: how many.
        front: trials.
        knee: recommended trial.
        evaluations: results that a worker was paid for.
        items: that workers scored.
    """

    digest: str
    told: str
    tells: int
    front: tuple[int, ...]
    knee: int | None
    evaluations: int
    items: int


@dataclass
class Tally:
    """What happened and what it cost.

    Attributes:
        kills: signals that hit, by fault.
        lost: complete evaluations that the journal does not have in the end.
        duplicated: results beyond the first of a trial on a split.
        redone: complete evaluations that were made again.
        torn: records that were torn on purpose; as many may be redone.
        repeated: evaluations that were cut short by a kill and so had to be begun again.
        identical: it ends like the search that nobody disturbed, or with ``order: completion`` its
            own replay repeats it.
        problems: everything else that was wrong.
        seconds: all together.
    """

    kills: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    duplicated: int = 0
    redone: int = 0
    torn: int = 0
    repeated: int = 0
    identical: bool = False
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        """Whether the study kept its promise."""
        return (
            self.identical and not self.problems and not self.lost and not self.duplicated
            and self.redone <= self.torn
        )  # fmt: skip


def undisturbed(plan: Plan, directory: Path) -> End:
    """Run a plan in this process from beginning to end."""
    searchers: list[Recording] = []
    chaos_study.chaos_study(plan, directory, searchers.append).run()
    return end_of(directory, searchers[0].digest, searchers[0].told)


def end_of(directory: Path, told: str, tells: int) -> End:
    """Sum up a finished study."""
    history = History.of(read(directory).records, str(directory))
    lines = [
        f"ask {number} {trial.kind} {trial.label} {trial.x!r} {history.digests[number]}"
        for number, trial in sorted(history.trials.items())
    ]
    for (split, number), result in sorted(history.results.items()):
        scores = result.value.scores if isinstance(result.value, Evaluation) else result.value
        lines.append(f"{split} {number} {scores!r} {result.fresh} {result.reused}")
    paid = [result for result in history.results.values() if result.reused is None]
    view = StudyView.load(directory)
    return End(
        sha256("\n".join(lines).encode()).hexdigest(), told, tells, tuple(view.front), view.knee,
        len(paid), sum(result.fresh for result in paid),
    )  # fmt: skip


class UnderFire:
    """One study, its driver, and the notes about it."""

    def __init__(self, plan: Plan, directory: Path, dice: random.Random) -> None:
        self._plan = plan
        self._directory = directory
        self._notes = chaos_study.notes(directory)
        self._dice = dice
        self._driver: BaseProcess | None = None
        self._complete: dict[str, int] = {}  # key: how often it had been begun
        self._hits: Counter[str] = Counter()
        self.tally = Tally()

    # -- the driver -------------------------------------------------------------------------

    def start(self) -> BaseProcess:
        """Start a driver; whatever is complete now must not be begun again."""
        self.note_complete()
        driver = context().Process(target=chaos_study.drive, args=(self._plan, self._directory))
        driver.start()
        self._driver = driver
        return driver

    def running(self) -> BaseProcess | None:
        """Return the driver, None when it has ended."""
        if self._driver is not None and self._driver.exitcode is not None:
            if self._driver.exitcode not in (0, -signal.SIGKILL):
                error = self._notes / "error.txt"
                text = error.read_text() if error.exists() else "a traceback, on stderr"
                self.tally.problems.append(f"a driver ended with {self._driver.exitcode}: {text}")
            self._driver = None
        return self._driver

    def finish(self, limit_seconds: float = 120.0) -> None:
        """Let the study come to its end."""
        driver = self.running() or self.start()
        driver.join(limit_seconds)
        if driver.exitcode is None:
            self.tally.problems.append(f"hung for {limit_seconds:g} s at {self._stack(driver)}")
            driver.kill()
            driver.join()
        self.running()

    def _kill(self, driver: BaseProcess) -> None:
        driver.kill()
        driver.join()
        self._driver = None

    # -- faults -----------------------------------------------------------------------------

    def strike(self, fault: Fault, at_bytes: int) -> bool:
        """Let one fault happen once the journal is so long; False when the study ended before."""
        driver = self.running() or self.start()
        if fault == "start":
            time.sleep(self._dice.random() * 0.1)
            self._kill(driver)
            self.tally.kills[fault] += 1
            return True
        while self._size() < at_bytes:
            if self.running() is None:
                return False
            time.sleep(0.0005)
        time.sleep(self._dice.random() * 0.006)  # anywhere between two records
        if (self._notes / "ended.json").exists():
            return False
        match fault:
            case "worker":
                return self._kill_worker()
            case "freeze":
                if not self._freeze(driver):
                    return False
            case "overtake":
                self._overtake(driver)
            case _:
                self._kill(driver)
                if fault == "tear":
                    self._tear()
        self.tally.kills[fault] += 1
        return True

    def _kill_worker(self, tries: int = 2000) -> bool:
        """Kill a worker that is at a job; the same job is not hit again and again."""
        for _ in range(tries):
            marks = self._marks()
            self._dice.shuffle(marks)
            for mark in marks:
                if self._hit(mark):
                    self.tally.kills["worker"] += 1
                    return True
            if self.running() is None:
                return False
            time.sleep(0.001)
        return False

    def _hit(self, mark: Path) -> bool:
        """Kill the process of a mark while it is known to be at a job that may be hit."""
        pid = int(mark.name)
        try:
            os.kill(pid, signal.SIGSTOP)  # so that it stays at what it is at
        except ProcessLookupError:
            return False
        try:
            key = mark.read_text()
        except FileNotFoundError:
            key = ""
        fair = bool(key) and self._hits[key] < _MOST_HITS
        if fair:
            self._hits[key] += 1
            os.kill(pid, signal.SIGKILL)
            mark.unlink()
        else:
            os.kill(pid, signal.SIGCONT)
        return fair

    def _tear(self) -> None:
        """Cut 1 to 200 bytes off the last record."""
        path = self._directory / JOURNAL
        data = path.read_bytes()
        last = len(data) - (data.rfind(b"\n", 0, len(data) - 1) + 1)
        if last:
            os.truncate(path, len(data) - self._dice.randint(1, min(200, last)))
            self.tally.torn += 1

    def _freeze(self, driver: BaseProcess) -> bool:
        assert driver.pid is not None
        os.kill(driver.pid, signal.SIGSTOP)
        if not is_locked(self._directory):  # it was about to end
            os.kill(driver.pid, signal.SIGCONT)
            return False
        began = time.monotonic()
        second = context().Process(target=chaos_study.drive, args=(self._plan, self._directory))
        second.start()
        second.join(10.0)
        took = time.monotonic() - began
        if second.exitcode != 5 or took > 2.0:
            self.tally.problems.append(f"a second driver: exit {second.exitcode} in {took:.1f} s")
            second.kill()
        (self._notes / "error.txt").unlink(missing_ok=True)
        for mark in self._marks()[:1]:
            self.tally.kills["worker"] += self._hit(mark)
        time.sleep(_FROZEN_SECONDS)
        os.kill(driver.pid, signal.SIGCONT)
        return True

    def _overtake(self, frozen: BaseProcess) -> None:
        """Let a frozen driver lose its lock, and wake up when the next one is at work."""
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        (self._directory / LOCK).unlink()
        size = self._size()
        self.start()
        while self._size() <= size and self.running() is not None:
            time.sleep(0.001)
        os.kill(frozen.pid, signal.SIGCONT)
        frozen.join(_OVERTAKEN_SECONDS)
        if frozen.exitcode not in (0, 5):
            where = self._stack(frozen) if frozen.exitcode is None else ""
            self.tally.problems.append(
                f"an overtaken driver ended with {frozen.exitcode} after {_OVERTAKEN_SECONDS:g} s "
                f"{where}"
            )
            frozen.kill()
        (self._notes / "error.txt").unlink(missing_ok=True)

    def _stack(self, driver: BaseProcess) -> str:
        """Return where a driver is that hangs."""
        assert driver.pid is not None
        os.kill(driver.pid, signal.SIGUSR1)
        time.sleep(0.3)
        lines = (self._notes / "stack.txt").read_text().splitlines()
        state = Path(f"/proc/{driver.pid}/stat").read_text().split()[2]
        return f"{state}: " + " < ".join(line.strip() for line in lines[1:8])

    # -- what must hold ---------------------------------------------------------------------

    def note_complete(self) -> None:
        """Look at what is complete, and whether any of it was begun again since the last look."""
        begun = self._begun()
        self.tally.redone += sum(begun[key] - count for key, count in self._complete.items())
        if not (self._directory / JOURNAL).exists():
            return
        complete = {path.stem for path in (self._directory / SPOOL).glob("*.json")}
        complete |= set(self._journaled())
        # What was complete once stays so, even where its record was torn off meanwhile.
        self._complete = {key: begun[key] for key in self._complete.keys() | complete}

    def _journaled(self) -> dict[str, str]:
        """Return the results in the journal by the job that gave them."""
        history = History.of(read(self._directory).records, str(self._directory))
        if history.opened is None:
            return {}
        return {
            job_key(Job(number, history.trials[number].recipe, history.items_of(split, number))):
            f"{split} {number}"
            for (split, number), result in history.results.items()
            if result.reused is None
        }  # fmt: skip

    def judge(self, reference: End | None) -> Tally:
        """Compare the study that has come to its end with one that nobody disturbed.

        Args:
            reference: None where the order of arrival is part of the search, so that no two are
                equal: then a fresh searcher must repeat every ask from the journal.
        """
        tally = self.tally
        begun = self._begun()
        tally.redone += sum(begun[key] - count for key, count in self._complete.items())
        found = self._journaled()
        tally.lost = len(self._complete.keys() - found.keys())
        tally.repeated = sum(begun.values()) - len(begun) - tally.redone
        scan = read(self._directory)
        tally.problems += [problem.text for problem in record_problems(scan.records)]
        results = [
            (record.get("split", "search"), record["trial"])
            for record in scan.records
            if record["ev"] in ("tell", "score")
        ]
        tally.duplicated = len(results) - len(set(results))
        ended = json.loads((self._notes / "ended.json").read_text())
        end = end_of(self._directory, ended["digest"], ended["told"])
        if reference is None:
            study = chaos_study.chaos_study(self._plan, self._directory)
            verified = verify(self._directory, study)
            tally.problems += verified.problems
            tally.identical = verified.finished and verified.compared == verified.trials
        else:
            tally.identical = end == reference
        if not tally.identical:
            tally.problems.append(f"{end} is not {reference}")
        left = [path.name for path in (self._directory / SPOOL).glob("*.json")]
        if left:
            tally.problems.append(f"{len(left)} evaluations are left in the spool")
        return tally

    def _begun(self) -> Counter[str]:
        path = self._notes / "starts.log"
        return Counter(path.read_text().split()) if path.exists() else Counter()

    def _marks(self) -> list[Path]:
        with suppress(FileNotFoundError):
            return sorted((self._notes / "running").iterdir())
        return []

    def _size(self) -> int:
        try:
            return (self._directory / JOURNAL).stat().st_size
        except FileNotFoundError:
            return 0


def survive(plan: Plan, faults: Sequence[Fault], directory: Path, seed: int) -> Tally:
    """Run a plan while faults hit it, spread over its length, and judge the end."""
    began = time.monotonic()
    calm = Plan(plan.searcher, plan.seed, plan.trials)
    reference = undisturbed(calm, directory / "calm")
    length = (directory / "calm" / JOURNAL).stat().st_size
    dice = random.Random(seed)
    study = UnderFire(plan, directory / "fire", dice)
    places = sorted(dice.uniform(0.0, 0.95) for _ in faults)
    for fault, place in zip(faults, places, strict=True):
        study.strike(fault, int(place * length))
    study.finish()
    tally = study.judge(reference if plan.order == "ask" else None)
    tally.seconds = time.monotonic() - began
    return tally
