"""What tracking costs a search: trials per second with MLflow and without it.

    python experiments/benchmarks/tracking_overhead.py --trials 10000 [--json]

A fake search writes a real journal: trials of a formula with five objectives, each of which takes
``--seconds`` on a worker that is another process (here: sleeping). The tracker writes to sqlite
beside it, as in a run. Then it sends what is still missing, and MLflow is asked for the pages that
its interface asks for first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.pool import SerialPool
from evomerge.presentation import project
from evomerge.recipe import ModelRef, Recipe
from evomerge.study import Baseline, Study
from evomerge.study_listener import StudyListener
from evomerge.study_view import StudyView
from evomerge.tracking import Tracker, find
from evomerge.tracking_target import tracking_target
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
    """Notes when the first and the last search trial came in, and wakes the tracker."""

    def __init__(self) -> None:
        self.tracker: Tracker | None = None
        self.first = self.last = 0.0

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        """Note the time."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        if self.tracker is not None:
            self.tracker.notify()


def searched(directory: Path, trials: int, seconds: float, tracked: bool) -> dict[str, float]:
    """Run one search; return its trials per second and what became of the tracking."""
    from evomerge.search.registry import make_searcher

    clock = Clock()
    middle = (0.5,) * (EXPERTS * BLOCKS)
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
    if tracked:
        target = tracking_target(None, "overhead", directory)
        clock.tracker = Tracker(lambda: project(StudyView.load(directory)), target)
    study.run()
    facts = {"trials per second": trials / (clock.last - clock.first)}
    if clock.tracker is not None:
        began = time.perf_counter()
        if not clock.tracker.close(3600.0):
            raise RuntimeError(f"the tracker did not finish: {clock.tracker.problem}")
        facts["seconds to send the rest"] = time.perf_counter() - began
    return facts


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
    parser.add_argument("--repeats", type=int, default=1, help="pairs of searches, alternating")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates: dict[bool, list[float]] = {False: [], True: []}
    facts: dict[str, Any] = {"trials": options.trials, "seconds of a trial": options.seconds}
    with tempfile.TemporaryDirectory(prefix="evomerge-tracking-") as folder:
        for repeat in range(options.repeats):
            for tracked in (False, True):
                directory = Path(folder) / f"{repeat}-{tracked}"
                got = searched(directory, options.trials, options.seconds, tracked)
                rates[tracked].append(got["trials per second"])
                sys.stderr.write(f"tracked {tracked}: {got}\n")
        facts["without"], facts["with"] = max(rates[False]), max(rates[True])
        facts["ratio"] = facts["with"] / facts["without"]
        facts["seconds to send the rest"] = got["seconds to send the rest"]
        facts |= pages(directory)
    lines = [f"{key}: {value:.4g}" for key, value in facts.items()]
    sys.stdout.write((json.dumps(facts, indent=1) if options.json else "\n".join(lines)) + "\n")


if __name__ == "__main__":
    main()
