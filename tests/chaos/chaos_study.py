"""The study that is killed: a formula instead of models, everything else as in a real one.

What a driver leaves behind in ``notes``: ``starts.log``, a line for every evaluation that a
worker began; ``running/PID``, the job that a worker is at; ``ended.json``, what the searcher was
told, when a driver came to its end; ``driver.log``.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal

from toy_study import ToyStudyWorker, note, toy_splits, toy_study

from evomerge.errors import EvomergeError, Interrupted
from evomerge.journal import hexes
from evomerge.pool import Pool, SerialPool
from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told
from evomerge.search.registry import make_searcher
from evomerge.spool import SPOOL, Spool, SpoolingFactory, job_key
from evomerge.study import Order, Study
from evomerge.study_listener import StudyListener
from evomerge.trial import Direction, Evaluation, Job, Objective, Score, Worker

SEARCHERS = ("de", "cma", "nsga2")
OBJECTIVES = (
    Objective("near_one", Direction.MAXIMIZE, weight=2.0),
    Objective("from_zero", Direction.MINIMIZE, "nats"),
)

#: What one in five candidates does where a plan says so, by the digest of its recipe.
MISCHIEF = (
    "nan", "inf", "-inf", "huge", "none", "short", "long", "raises", "memory", "hang", "deaf"
)  # fmt: skip

#: So long a job of a plan with mischief may take.
HANG_LIMIT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """One search.

    Attributes:
        searcher: by its name in the registry.
        seed: of the searcher.
        trials: budget.
        pool: where the trials run.
        workers: of the pool.
        seconds: that a trial takes, from a half to three halves of it.
        order: of telling.
        bad: share of trials with mischief.
        always_fails: every trial raises.
    """

    searcher: str = "de"
    seed: int = 1
    trials: int = 300
    pool: Literal["serial", "processes", "ray"] = "serial"
    workers: int = 1
    seconds: float = 0.0
    order: Order = "ask"
    bad: float = 0.0
    always_fails: bool = False


def share(text: str) -> float:
    """Return a number in [0, 1) that depends on a text only."""
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest()) / 2**48


def notes(directory: Path) -> Path:
    """Return where the suite notes what happens to a study; not on the study's disk."""
    return directory.with_name(f"{directory.name}.notes")


class ChaosWorker(ToyStudyWorker):
    """Notes what it begins and what it is at; some recipes make it misbehave."""

    def __init__(self, place: Path, plan: Plan) -> None:
        super().__init__(place / "scored.log", 10.0, 0.0)
        self._place = place
        self._plan = plan

    def run(self, job: Job) -> Evaluation:
        key = job_key(job)
        mark = self._place / "running" / str(os.getpid())
        note(self._place / "starts.log", key)
        mark.write_text(key)
        try:
            time.sleep(self._plan.seconds * (0.5 + share(key)))
            kind = mischief(self._plan, job.recipe.digest)
            if kind is not None and job.recipe.table[0] != (3.0, 0.0, 0.0, 0.0):
                return _misbehave(kind, super().run(job))
            return super().run(job)
        finally:
            mark.unlink()


def mischief(plan: Plan, digest: str) -> str | None:
    """Return what the worker does for a recipe, None for what it should."""
    if plan.always_fails:
        return "raises"
    if share(f"bad {digest}") >= plan.bad:
        return None
    return MISCHIEF[int(share(f"kind {digest}") * len(MISCHIEF))]


def _misbehave(kind: str, right: Evaluation) -> Evaluation:
    first, *rest = right.scores
    bad = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "huge": 1e300}
    if kind in bad:
        value = bad[kind]
        wrong = Score(value, 0.0, (value,) * len(first.items))
        return Evaluation((wrong, *rest), right.seconds)
    match kind:
        case "none":
            return None  # type: ignore[return-value]
        case "short":
            return Evaluation((Score(first.value, 0.0, first.items[1:]), *rest), right.seconds)
        case "long":
            return Evaluation((first, *rest, first), right.seconds)
        case "memory":
            raise MemoryError("out of memory on purpose")
        case "hang":
            time.sleep(3600.0)
        case "deaf":  # to polite signals, and never lets go of the interpreter for long
            while True:
                sum(range(10**6))
    raise RuntimeError("failed on purpose")


@dataclass(frozen=True, slots=True)
class ChaosFactory:
    """Builds a ``ChaosWorker``."""

    place: Path
    plan: Plan

    def __call__(self) -> Worker:
        """Build it."""
        return ChaosWorker(self.place, self.plan)


class Recording:
    """A searcher whose asks and tells are summed up bit for bit."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher = searcher
        self._sum = sha256()
        self.told = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._searcher, name)

    def ask(self, n: int) -> Sequence[Candidate]:
        given = self._searcher.ask(n)
        for candidate in given:
            self._sum.update(f"ask {hexes(candidate.x)}\n".encode())
        return given

    def tell(self, results: Sequence[Told]) -> None:
        for one in results:
            self._sum.update(f"tell {one.failed} {hexes(one.losses)}\n".encode())
        self.told += len(results)
        self._searcher.tell(results)

    @property
    def digest(self) -> str:
        return self._sum.hexdigest()


def chaos_study(
    plan: Plan,
    directory: Path,
    on_searcher: Callable[[Recording], None] = lambda searcher: None,
    listeners: Sequence[StudyListener] = (),
) -> Study:
    """Return the study of a plan in ``directory``."""
    (notes(directory) / "running").mkdir(parents=True, exist_ok=True)
    spool = Spool(directory / SPOOL, "chaos")
    factory = SpoolingFactory(ChaosFactory(notes(directory), plan), spool.directory, spool.owner)

    def searcher(problem: SearchProblem) -> Searcher:
        made = Recording(make_searcher(plan.searcher, {}, problem))
        on_searcher(made)
        return made

    return toy_study(
        directory,
        identity={"searcher": plan.searcher, "chaos": True},
        objectives=OBJECTIVES,
        splits=toy_splits(len(OBJECTIVES)),
        make_searcher=searcher,
        make_pool=lambda: _pool(plan, factory),
        budget=plan.trials,
        parallel=8,
        seed=plan.seed,
        scalarise=plan.searcher != "nsga2",
        finalists=6,
        order=plan.order,
        spool=spool,
        listeners=listeners,
    )


def _pool(plan: Plan, factory: SpoolingFactory) -> Pool:
    timeout = HANG_LIMIT_SECONDS if plan.bad else None
    if plan.pool == "serial":
        return SerialPool(factory)
    if plan.pool == "processes":
        from process_pool import ProcessPool

        return ProcessPool(factory, plan.workers, timeout)
    from evomerge.ray_pool import RayPool

    return RayPool(factory, plan.workers, timeout=timeout)


def drive(plan: Plan, directory: Path) -> None:
    """Be a driver: what `evomerge run` does with a study, in a process of its own."""
    place = notes(directory)
    place.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=place / "driver.log", force=True)
    # Whoever finds a driver that hangs asks where: SIGUSR1.
    faulthandler.register(signal.SIGUSR1, (place / "stack.txt").open("w"), all_threads=True)
    searchers: list[Recording] = []
    try:
        view = chaos_study(plan, directory, searchers.append).run()
    except (EvomergeError, Interrupted) as error:
        (place / "error.txt").write_text(str(error))
        sys.exit(error.exit_code)
    ended: Mapping[str, Any] = {
        "told": searchers[0].told, "digest": searchers[0].digest,
        "front": view.front, "knee": view.knee,
    }  # fmt: skip
    (place / "ended.json").write_text(json.dumps(ended))
