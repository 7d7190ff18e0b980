"""What tracking costs a search: trials per second with MLflow and without it.

    python experiments/benchmarks/tracking_overhead.py --trials 10000 [--json]

A fake search writes a real journal: trials of a formula with five objectives, each of which takes
``--seconds`` on a worker that is another process (here: sleeping). The tracker writes to sqlite
beside it, as in a run, but it is stopped and continued every ``--block`` trials: what a search
gains while it is stopped is what tracking costs. Neighbouring blocks meet the same other programs,
so this sees a percent where two searches one after the other do not. Then the tracker sends what
is still missing, and MLflow is asked for the pages that its interface asks for first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, stdev
from typing import Any

from evomerge.pool import SerialPool
from evomerge.presentation import project
from evomerge.recipe import ModelRef, Recipe
from evomerge.study import Baseline, Study
from evomerge.study_listener import StudyListener
from evomerge.study_view import StudyView
from evomerge.tracking import Tracker, find
from evomerge.tracking_target import Synced, Target, tracking_target
from evomerge.trial import Evaluation, Job, Objective, Score, Trial

EXPERTS, BLOCKS, OBJECTIVES = 3, 16, 5


@dataclass(frozen=True)
class Split:
    """Items of an objective."""

    search: tuple[str, ...] = ("0", "1", "2", "3")
    validation: tuple[str, ...] = ("4", "5", "6", "7")
    test: tuple[str, ...] = ("8", "9")


def recipe(x: tuple[float, ...]) -> Recipe:
    """Return a recipe of 16 blocks and three experts."""
    refs = [ModelRef(name, f"models/{name}", name) for name in ("base", "a", "b", "c")]
    return Recipe(
        method="task_arithmetic",
        base=refs[0],
        experts=tuple(refs[1:]),
        partition="layer",
        layout="layout",
        dtype="F32",
        columns=("weight.a", "weight.b", "weight.c"),
        table=tuple(tuple(x[EXPERTS * row : EXPERTS * (row + 1)]) for row in range(BLOCKS)),
    )


class Formula:
    """Scores means of columns after a pause in which nothing is computed here."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, job: Job) -> Evaluation:
        """Return five objectives."""
        time.sleep(self._seconds)
        means = [sum(column) / BLOCKS for column in zip(*job.recipe.table, strict=True)]
        drawn = random.Random(job.recipe.digest)
        scores = []
        for number, items in enumerate(job.items):
            value = means[number % EXPERTS] * (1 - 0.2 * sum(means)) + 0.05 * drawn.random()
            scores.append(Score(value, 0.02, (value,) * len(items)))
        return Evaluation(tuple(scores), {"merge": 0.001, "score": self._seconds})

    def describe(self) -> Mapping[str, str]:
        """Return nothing to say."""
        return {}


class Clock(StudyListener):
    """Stops and continues the tracker every few trials and notes the time of each trial.

    Args:
        tracker: of the search.
        block: trials.
    """

    def __init__(self, tracker: Tracker, block: int) -> None:
        self._tracker = tracker
        self._block = block
        self._running: list[bool] = []  # [n]
        self._times: list[float] = []  # [n]

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        """Note the time."""
        number = len(self._times)
        # On, off, off, on: a machine that grows slower favours neither.
        running = (number // self._block) % 4 in (0, 3)
        self._times.append(time.perf_counter())
        self._running.append(running)
        if self._tracker.process is not None and number % self._block == 0:
            os.kill(self._tracker.process, signal.SIGCONT if running else signal.SIGSTOP)

    def continue_it(self) -> None:
        """Let the tracker run on."""
        if self._tracker.process is not None:
            os.kill(self._tracker.process, signal.SIGCONT)

    def facts(self) -> dict[str, float]:
        """Return the rates and what tracking costs, with its standard error over groups."""
        gaps = [b - a for a, b in pairwise(self._times)]
        groups = [
            (gaps[start : start + 4 * self._block], self._running[start : start + 4 * self._block])
            for start in range(0, len(gaps) - 4 * self._block + 1, 4 * self._block)
        ][1:]  # in the first one the tracker imports MLflow
        losses = []
        sums = {True: 0.0, False: 0.0}
        for rows, running in groups:
            took = {
                on: sum(gap for gap, one in zip(rows, running, strict=True) if one is on)
                for on in (True, False)
            }
            losses.append(took[True] / took[False] - 1)
            sums = {on: sums[on] + took[on] for on in sums}
        trials = 2 * self._block * len(groups)
        error = stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
        return {
            "trials per second, tracker running": trials / sums[True],
            "trials per second, tracker stopped": trials / sums[False],
            "loss of throughput, percent": 100 * (1 - sums[False] / sums[True]),
            "median loss of groups, percent": 100 * median(losses),
            "standard error over groups, percent": 100 * error,
        }


def searched(directory: Path, trials: int, seconds: float, block: int) -> dict[str, float]:
    """Run one search; return its trials per second and what became of the tracking."""
    from evomerge.search.registry import make_searcher

    middle = (0.5,) * (EXPERTS * BLOCKS)
    directory.mkdir(parents=True)
    target = tracking_target(None, "overhead", directory)
    tracker = Tracker(directory, target)
    clock = Clock(tracker, block)
    study = Study(
        directory,
        identity={"name": f"{trials} trials", "searcher": "random"},
        objectives=tuple(Objective(f"task{number}") for number in range(OBJECTIVES)),
        splits=[Split()] * OBJECTIVES,
        dimension=len(middle),
        decode=recipe,
        make_searcher=lambda problem: make_searcher("random", {}, problem),
        baselines=(Baseline("uniform", middle, recipe(middle)),),
        make_pool=lambda: SerialPool(lambda: Formula(seconds)),
        budget=trials,
        parallel=8,
        seed=1,
        scalarise=True,
        finalists=8,
        listeners=[clock],
    )
    study.run()
    clock.continue_it()
    found = clock.facts()
    synced = find(project(StudyView.load(directory)).study, target)
    found["trials that were there at the end"] = float(len(children(target, synced)))
    began = time.perf_counter()
    if not tracker.close(3600.0):
        raise RuntimeError(f"the tracker did not finish: {tracker.problem}")
    return found | {"seconds to send the rest": time.perf_counter() - began}


def children(target: Target, synced: Synced | None) -> list[str]:
    """Return the ids of the runs of trials."""
    import sqlite3

    if synced is None or target.database is None:
        return []
    with closing(sqlite3.connect(target.database)) as database:
        rows = database.execute(
            "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ?",
            (synced.run_id,),
        )
        return [run for (run,) in rows]


def pages(directory: Path) -> dict[str, float]:
    """Return the seconds of the interface's first questions, and the size of the store."""
    from mlflow.tracking import MlflowClient

    target = tracking_target(None, "overhead", directory)
    synced = find(project(StudyView.load(directory)).study, target)
    assert synced is not None
    facts: dict[str, float] = {}
    client = MlflowClient(tracking_uri=target.uri)
    for name, query, order in (
        ("runs page", "", []),
        ("front page", f"tags.`mlflow.parentRunId` = '{synced.run_id}'", ["metrics.`front` DESC"]),
    ):
        began = time.perf_counter()
        client.search_runs([synced.experiment_id], query, max_results=100, order_by=order)
        facts[f"seconds of the {name}"] = time.perf_counter() - began
    size = (directory / "mlflow.db").stat().st_size
    return {**facts, "megabytes of the store": size / 1e6}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=0.1, help="a trial takes on its worker")
    parser.add_argument("--block", type=int, default=20, help="trials between two switches")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    facts: dict[str, Any] = {"trials": options.trials, "seconds of a trial": options.seconds}
    with tempfile.TemporaryDirectory(prefix="evomerge-tracking-") as folder:
        directory = Path(folder) / "study"
        facts |= searched(directory, options.trials, options.seconds, options.block)
        facts |= pages(directory)
    lines = [f"{key}: {value:.4g}" for key, value in facts.items()]
    sys.stdout.write((json.dumps(facts, indent=1) if options.json else "\n".join(lines)) + "\n")


if __name__ == "__main__":
    main()
