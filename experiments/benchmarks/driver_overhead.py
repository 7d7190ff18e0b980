"""What the driver costs per trial, and how busy it keeps many workers.

    python experiments/benchmarks/driver_overhead.py --dimensions 1000 --workers 64

A whole study runs, with its journal on a real disk and a real searcher. Only the workers are
simulated: a job comes back after a fixed time, or after a log-normal one with the same median.
The clock is real, so what the driver needs is time in which a worker waits.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evomerge.pool import check_submit, check_wait
from evomerge.recipe import ModelRef, Recipe
from evomerge.search.protocol import SearchProblem
from evomerge.search.registry import find_searcher, make_searcher
from evomerge.study import Baseline, Order, Study
from evomerge.trial import Evaluation, Job, Objective, Outcome, Score

LIMIT_MILLISECONDS = 5.0
GOAL_BUSY = 0.95
ITEMS = 100


@dataclass(frozen=True, slots=True)
class Split:
    """Items of one objective; no finalists are scored again."""

    search: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


class SimulatedPool:
    """Workers that do nothing for a given time; jobs wait in a queue where all are busy.

    Args:
        workers: how many.
        seconds: of a job, or their median.
        spread: of the logarithm of the seconds; 0 for a fixed time.

    Attributes:
        slept: seconds in which the driver had nothing to do.
        first: when the pool was made ready, in seconds of ``time.monotonic``.
        processor: the same in seconds of processor time of this process.
    """

    def __init__(self, workers: int, seconds: float, spread: float) -> None:
        self.workers = workers
        self._seconds = seconds
        self._spread = spread
        self._running: list[tuple[float, int, Job]] = []
        self._numbers: set[int] = set()
        self._random = random.Random(0)
        self.reset()

    def reset(self) -> None:
        """Begin to count."""
        self.slept = self._worked = 0.0
        self.first = time.monotonic()
        self.processor = time.process_time()

    def share(self) -> float:
        """Return which share of their time the workers have worked so far."""
        now = time.monotonic()
        ahead = sum(max(0.0, end - now) for end, _, _ in self._running)
        return (self._worked - ahead) / (self.workers * (now - self.first))

    def submit(self, job: Job) -> None:
        """Begin a job; the study never hands out more than there are workers."""
        check_submit(job.number, False, job.number in self._numbers)
        seconds = self._seconds * self._random.lognormvariate(0.0, self._spread)
        self._worked += seconds
        self._numbers.add(job.number)
        heapq.heappush(self._running, (time.monotonic() + seconds, job.number, job))

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Sleep until the next job ends."""
        check_wait(False, bool(self._numbers))
        pause = self._running[0][0] - time.monotonic()
        if timeout is not None:
            pause = min(pause, timeout)
        if pause > 0:
            time.sleep(pause)
            self.slept += pause
        now = time.monotonic()
        ready = []
        while self._running and self._running[0][0] <= now:
            _, number, job = heapq.heappop(self._running)
            self._numbers.remove(number)
            ready.append(Outcome(number, _evaluation(job), 1, "simulated"))
        return tuple(ready)

    def describe(self) -> Mapping[str, str]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""


def _evaluation(job: Job) -> Evaluation:
    row = job.recipe.table[0]
    scores = []
    for objective, items in enumerate(job.items):
        level = sum((value - 0.3 - 0.4 * objective) ** 2 for value in row) / len(row)
        scores.append(Score(level, 0.01, (level,) * len(items)))
    return Evaluation(tuple(scores), {"score": 0.0})


@dataclass(frozen=True, slots=True)
class Overhead:
    """One study.

    Attributes:
        searcher: its name.
        order: of telling.
        spread: of the logarithm of the seconds of a job.
        trials: of the search.
        milliseconds: that the driver was at work per trial, searcher and journal included.
        searching: of these, in ``ask`` and ``tell`` of the searcher.
        busy: share of the workers' time in which they worked, while there was work to hand out.
    """

    searcher: str
    order: Order
    spread: float
    trials: int
    milliseconds: float
    processor: float
    searching: float
    busy: float


class _Timed:
    """A searcher whose time is taken; the pool's books are closed at its last ask."""

    def __init__(self, searcher: Any, budget: int, pool: SimulatedPool) -> None:
        self._searcher = searcher
        self._left = budget
        self._pool = pool
        self.seconds = 0.0
        self.share = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._searcher, name)

    def ask(self, n: int) -> Any:
        began = time.process_time()
        given = self._searcher.ask(n)
        self.seconds += time.process_time() - began
        self._left -= len(given)
        if self._left == self._pool.workers:  # the end, when workers run out of trials, is no loss
            self.share = self._pool.share()
        return given

    def tell(self, results: Any) -> None:
        began = time.process_time()
        self._searcher.tell(results)
        self.seconds += time.process_time() - began


def measure(
    name: str, order: Order, spread: float, options: argparse.Namespace, directory: Path
) -> Overhead:
    """Run one study and take its time."""
    pool = SimulatedPool(options.workers, options.seconds, spread)
    columns = tuple(f"weight.{index}" for index in range(options.dimensions))
    base = ModelRef("base", "toy", "0" * 8)
    timed: list[_Timed] = []

    def searcher(problem: SearchProblem) -> Any:
        timed.append(_Timed(make_searcher(name, {}, problem), options.trials, pool))
        pool.reset()
        return timed[0]

    several = find_searcher(name).multi_objective
    objectives = (Objective("one"), Objective("two"))[: 2 if several else 1]

    def decode(x: tuple[float, ...]) -> Recipe:
        return Recipe("linear", base, (), "model", "toy", columns, (x,))

    middle = (0.5,) * options.dimensions
    study = Study(
        directory,
        identity={"searcher": name},
        objectives=objectives,
        splits=[Split(tuple(str(item) for item in range(ITEMS)))] * len(objectives),
        dimension=options.dimensions,
        decode=decode,
        make_searcher=searcher,
        baselines=[Baseline("uniform", middle, decode(middle))],
        make_pool=lambda: pool,
        budget=options.trials,
        parallel=2 * options.workers,
        seed=0,
        scalarise=not several,
        order=order,
    )
    study.run()
    seconds = time.monotonic() - pool.first - pool.slept
    processor = time.process_time() - pool.processor
    per_trial = 1e3 / options.trials
    return Overhead(
        name, order, spread, options.trials, round(seconds * per_trial, 2),
        round(processor * per_trial, 2), round(timed[0].seconds * per_trial, 2),
        round(timed[0].share, 4),
    )  # fmt: skip


def table(rows: list[Overhead]) -> str:
    """Return a Markdown table."""
    lines = [
        "| searcher | order | spread | trials | ms passed per trial | ms of processor | of it the "
        "searcher | the driver | workers busy |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rest = row.processor - row.searching
        over = " (over the limit)" if rest > LIMIT_MILLISECONDS else ""
        under = " (under the goal)" if row.order == "completion" and row.busy < GOAL_BUSY else ""
        lines.append(
            f"| {row.searcher} | {row.order} | {row.spread} | {row.trials} | "
            f"{row.milliseconds:.1f} | {row.processor:.2f} | {row.searching:.2f} | "
            f"{rest:.2f}{over} | {100 * row.busy:.1f} %{under} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--searchers", nargs="+", default=["random", "de", "nsga2"])
    parser.add_argument("--orders", nargs="+", default=["completion", "ask"])
    parser.add_argument("--spreads", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--dimensions", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a trial, or their median")
    parser.add_argument("--trials", type=int, default=640)
    parser.add_argument("--folder", type=Path, help="whose disk takes the journals")
    parser.add_argument("--json", action="store_true", help="figures instead of a table")
    options = parser.parse_args()
    rows = []
    for name in options.searchers:
        for order in options.orders:
            for spread in options.spreads:
                with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                    rows.append(measure(name, order, spread, options, Path(folder) / "study"))
                sys.stderr.write(f"{rows[-1]}\n")
    if options.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    else:
        sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
