"""The study: baselines, search, finalists; everything through the journal.

Order is fixed, so that neither the number of workers nor their speed changes a search: a window
of ``parallel`` candidates is filled by asking one at a time; the searcher is told about the
oldest one, always; then the window is filled again. Resuming is the same loop. It takes asks and
results from the journal as long as there are any, and compares every ask.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from evomerge.errors import InputError, NothingUsableError, ReplayError
from evomerge.evaluations import Evaluations, Items
from evomerge.interrupt import StopSignals
from evomerge.journal import Journal
from evomerge.pareto import nondominated, spread
from evomerge.pool import Pool
from evomerge.recipe import Recipe
from evomerge.search.baselines import Baseline
from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told, WarmPoint
from evomerge.study_listener import Phase, Progress, StudyListener
from evomerge.study_record import (
    SCHEMA,
    SPLITS,
    History,
    Split,
    ask_fields,
    compare,
    compared,
    differences,
    distinct,
    frame_fields,
    library_versions,
    objective_fields,
    settle,
)
from evomerge.study_view import StudyView, bounded, recommended, weighted_mean
from evomerge.trial import Evaluation, Failure, Objective, Trial

__all__ = [
    "Baseline",
    "ItemSplit",
    "Phase",
    "Progress",
    "Study",
    "StudyListener",
    "library_versions",
]

logger = logging.getLogger(__name__)

#: A study stops when so many trials in a row fail: the cause is the setup, not the candidates.
FAILURES_IN_A_ROW = 10

#: Loss of a failed trial when nothing has succeeded yet. Scores are fractions, nats or counts;
#: this is worse than all of them, and small enough that squares stay exact in a float.
PENALTY_WITHOUT_SCALE = 1e6


class ItemSplit(Protocol):
    """The item ids of one objective; the three are disjoint."""

    @property
    def search(self) -> tuple[str, ...]:
        """Items that every trial is scored on."""
        ...

    @property
    def validation(self) -> tuple[str, ...]:
        """Items that choose the reported front; may be empty."""
        ...

    @property
    def test(self) -> tuple[str, ...]:
        """Items that only the front and the baselines see; may be empty."""
        ...


class Study:
    """One search in one directory; ``run`` starts it or continues it.

    Args:
        directory: of the study; created if needed.
        identity: JSON-able facts that must not change when the study is continued: digests of
            configuration, fitness and space, searcher name and arguments. ``library_versions``
            is added under ``versions``.
        objectives: [m], m >= 1.
        splits: item ids, one per objective [m].
        dimension: d of the space.
        decode: space to recipe, pure.
        make_searcher: builds a fresh searcher.
        baselines: scored first; those with ``x`` warm-start the searcher.
        make_pool: builds the pool; called once, when the first job is ready.
        budget: trials of the search, baselines not counted.
        parallel: candidates outstanding at a time; does not follow the number of workers.
        seed: of the searcher.
        scalarise: the searcher sees the weighted mean of the losses instead of all of them.
        finalists: how many trials are scored again on the validation items, beside baselines.
        listeners: told what happens.
        on_open: called when the journal is open and holds a study of these settings; what it
            raises ends the run.
        grace_seconds: how long a stop by signal waits for running trials.

    Raises:
        InputError: arguments that do not fit each other.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: Mapping[str, Any],
        objectives: Sequence[Objective],
        splits: Sequence[ItemSplit],
        dimension: int,
        decode: Callable[[tuple[float, ...]], Recipe],
        make_searcher: Callable[[SearchProblem], Searcher],
        baselines: Sequence[Baseline],
        make_pool: Callable[[], Pool],
        budget: int,
        parallel: int,
        seed: int,
        scalarise: bool,
        finalists: int = 12,
        listeners: Sequence[StudyListener] = (),
        on_open: Callable[[], None] = lambda: None,
        grace_seconds: float = 60.0,
    ) -> None:
        if not objectives or len(splits) != len(objectives):
            raise InputError(
                f"study: expected one item split per objective, got {len(splits)} splits for "
                f"{len(objectives)} objectives"
            )
        for name, value in (("budget", budget), ("parallel", parallel), ("finalists", finalists)):
            if value < 1:
                raise InputError(f"study: {name} must be at least 1, got {value}")
        if scalarise and sum(objective.weight for objective in objectives) <= 0:
            raise InputError("objectives: at least one weight must be above 0")
        self.directory = directory
        self.objectives = tuple(objectives)
        self.items: dict[Split, Items] = {
            "search": tuple(split.search for split in splits),
            "validation": tuple(split.validation for split in splits),
            "test": tuple(split.test for split in splits),
        }
        self.dimension = dimension
        self.decode = decode
        self.make_searcher = make_searcher
        self.baselines = tuple(baselines)
        self.make_pool = make_pool
        self.budget = budget
        self.parallel = parallel
        self.seed = seed
        self.scalarise = scalarise
        self.finalists = finalists
        self.listeners = tuple(listeners)
        self.on_open = on_open
        self.grace_seconds = grace_seconds
        self._identity = {"versions": library_versions(), **identity}

    def run(self) -> StudyView:
        """Run to the end, from wherever the journal stands.

        Raises:
            InputError: the study was begun with other settings; names each difference.
            ReplayError: the searcher does not repeat its recorded asks.
            NothingUsableError: every trial failed, or ten in a row did.
            Interrupted: stopped by a signal.
            LockedError: another driver works on this study.
            StorageError: the journal cannot be written or is damaged.
        """
        with StopSignals() as signals, Journal(self.directory) as journal:
            history = History.of(journal.records, str(self.directory))
            self._open(journal, history)
            self.on_open()
            run = _Run(self, journal, history, signals)
            try:
                run.all_phases()
            finally:
                run.evaluations.close()
        view = StudyView.load(self.directory)
        run.notify("on_finish", view)
        return view

    def contract(self) -> dict[str, Any]:
        """Return everything that must be the same when the study is continued, as JSON data."""
        contract = {
            "identity": self._identity,
            "objectives": [objective_fields(objective) for objective in self.objectives],
            "items": {split: self.items[split] for split in SPLITS},
            "dimension": self.dimension,
            "budget": self.budget,
            "parallel": self.parallel,
            "seed": self.seed,
            "scalarise": self.scalarise,
            "finalists": self.finalists,
            "baselines": [baseline.label for baseline in self.baselines],
        }
        plain: dict[str, Any] = json.loads(json.dumps(contract, allow_nan=False))
        return plain

    def _open(self, journal: Journal, history: History) -> None:
        contract = self.contract()
        if history.opened is None:
            history.opened = journal.append("open", schema=SCHEMA, **contract)
            return
        recorded = {key: history.opened.get(key) for key in contract}
        changed = differences(compared(recorded), compared(contract))
        if changed:
            raise InputError(
                f"{self.directory}: this study was begun with other settings; restore them, or "
                "give the study file another `directory`:\n" + "\n".join(changed)
            )
        stop = history.stop
        if stop is not None and stop["reason"] == "failure":  # by now its cause was mended
            history.add(journal.append("retry", split=stop["split"], trials=stop["trials"]))


class _Run:
    """What one call of ``Study.run`` holds."""

    def __init__(
        self, study: Study, journal: Journal, history: History, signals: StopSignals
    ) -> None:
        self._study = study
        self._journal = journal
        self._history = history
        self._frames = {frame: number for number, frame in enumerate(history.frames)}
        self._muted: set[int] = set()
        self._progress = Progress("baselines", 0, 0, 0)
        self._failures = 0
        self._first_failure: int | None = None
        self._best: tuple[float, ...] | None = None
        self._worst: tuple[float, ...] | None = None
        self.evaluations = Evaluations(
            journal=journal,
            history=history,
            objectives=study.objectives,
            items=study.items,
            make_pool=self._make_pool,
            signals=signals,
            grace_seconds=study.grace_seconds,
            on_change=self._tell_progress,
        )

    def all_phases(self) -> None:
        """Baselines, search, finalists."""
        warm = self._score_baselines()
        self._search(warm)
        self._choose()

    def notify(self, method: str, *arguments: object) -> None:
        """Tell the listeners; one that raises is named once in the log."""
        for index, listener in enumerate(self._study.listeners):
            try:
                getattr(listener, method)(*arguments)
            except Exception:
                if index not in self._muted:
                    logger.warning(
                        "%s.%s failed; the search goes on, further failures are not shown",
                        type(listener).__name__, method, exc_info=True,
                    )  # fmt: skip
                self._muted.add(index)

    def _score_baselines(self) -> tuple[WarmPoint, ...]:
        baselines = self._study.baselines
        self._begin("baselines", len(baselines))
        trials = [
            self._ask(Trial(number, "baseline", baseline.label, baseline.x, baseline.recipe))
            for number, baseline in enumerate(baselines)
        ]
        for trial in trials:
            self.evaluations.request(trial, "search")
        warm = []
        for trial in trials:
            told, failed = self._settle(trial)
            if trial.x is not None and not failed:
                warm.append(WarmPoint(trial.x, told))
        return tuple(warm)

    def _search(self, warm: tuple[WarmPoint, ...]) -> None:
        study = self._study
        self._begin("search", study.budget)
        searcher = study.make_searcher(
            SearchProblem(
                dimension=study.dimension,
                objectives=1 if study.scalarise else len(study.objectives),
                budget=study.budget,
                parallel=study.parallel,
                seed=study.seed,
                warm=warm,
            )
        )
        first = len(study.baselines)
        asked = 0
        window: deque[tuple[Candidate, Trial]] = deque()
        while True:
            while len(window) < study.parallel and asked < study.budget:
                candidates = searcher.ask(1)
                if not candidates:
                    break
                x = tuple(map(float, candidates[0].x))
                trial = self._ask(Trial(first + asked, "search", "", x, study.decode(x)))
                self.evaluations.request(trial, "search")
                window.append((candidates[0], trial))
                asked += 1
            if not window:
                break
            candidate, trial = window.popleft()
            told, failed = self._settle(trial)
            searcher.tell([Told(candidate.id, told, failed, self._item_scores(trial))])
        if len(self._history.trials) > first + asked:
            raise ReplayError(
                f"trial {first + asked}: the journal has it, but the searcher asks for nothing "
                "more; the searcher or its libraries changed since the study began"
            )

    def _choose(self) -> None:
        """Score finalists and baselines again on held-out items; report front and choice."""
        done = self._done(range(len(self._history.trials)), "search")
        if not done:
            self._stop(f"none of the {len(self._history.trials)} trials succeeded", "search")
        chosen = self._finalists(done)
        split: Split = "search"
        if any(self._study.items["validation"]):
            chosen = self._score(chosen, "validation")
            split = "validation"
            if not chosen:
                self._stop("none of the finalists could be scored on the validation items", split)
        best_rows = nondominated(self._losses(chosen, split))
        front = distinct((chosen[row] for row in best_rows), self._history.digests)
        losses = self._losses(front, split)
        best = front[recommended(losses, self._study.objectives, self._study.scalarise)]
        if any(self._study.items["test"]):
            baselines = range(len(self._study.baselines))
            self._score(sorted({*front, *self._done(baselines, "search")}), "test")
        if self._history.done is None:
            fields = {"front": front, "knee": best, "split": split}
            self._history.done = self._journal.append("done", **fields)

    def _finalists(self, done: Sequence[int]) -> list[int]:
        """Return the trials to score again: the front on search scores, and all baselines.

        The front is thinned to ``finalists``. Where it has fewer members the next fronts behind
        it fill the rest: search scores are noisy, and with one objective the front is a single
        trial. Of several trials with the same recipe only the first competes.
        """
        baselines = [number for number in done if number < len(self._study.baselines)]
        rest = distinct(done, self._history.digests)
        chosen: list[int] = []
        while rest and len(chosen) < self._study.finalists:
            losses = self._losses(rest, "search")
            front = nondominated(losses)
            rows = spread([losses[row] for row in front], self._study.finalists - len(chosen))
            chosen += [rest[front[row]] for row in rows]
            behind = set(range(len(rest))) - set(front)
            rest = [rest[row] for row in sorted(behind)]
        return sorted({*chosen, *baselines})

    def _score(self, numbers: Sequence[int], split: Literal["validation", "test"]) -> list[int]:
        """Score trials on another split and return those that succeeded."""
        self._begin(split, len(numbers))
        trials = [self._history.trials[number] for number in numbers]
        for trial in trials:
            self.evaluations.request(trial, split)
        for trial in trials:
            result = self.evaluations.result(trial, split)
            self._advance()
            self.notify("on_score", self._history.settled(trial), split, result)
        return self._done(numbers, split)

    def _ask(self, trial: Trial) -> Trial:
        """Journal an ask, or compare it with the recorded one."""
        digest = trial.recipe.digest
        recorded = self._history.trials.get(trial.number)
        if recorded is not None:
            compare(recorded, self._history.digests[trial.number], trial)
        else:
            frame = self._frame(trial.recipe)
            self._journal.append("ask", **ask_fields(trial, frame))
        self._history.trials[trial.number] = trial
        self._history.digests[trial.number] = digest
        return trial

    def _frame(self, recipe: Recipe) -> int:
        fields = frame_fields(recipe)
        frame = Recipe.from_dict({**fields, "table": [], "seed": 0})
        if frame not in self._frames:
            self._journal.append("frame", recipe=fields)
            self._frames[frame] = len(self._frames)
        return self._frames[frame]

    def _settle(self, trial: Trial) -> tuple[tuple[float, ...], bool]:
        """Wait for a trial; return the losses to tell and whether they are a penalty.

        Raises:
            NothingUsableError: the tenth failure in a row of this run.
        """
        result = self.evaluations.result(trial, "search")
        self._advance()
        self.notify("on_trial", settle(trial, result), result.replayed)
        if isinstance(result.value, Failure):
            logger.info("trial %d failed (%s)", trial.number, result.value.message)
            if self._first_failure is None:
                self._first_failure = trial.number
            # Replayed failures do not count: who runs again has mended something.
            self._failures += 0 if result.replayed else 1
            if self._failures >= FAILURES_IN_A_ROW:
                reason = f"{FAILURES_IN_A_ROW} trials in a row failed"
                self._stop(reason, "search", self._first_failure)
            return self._penalty(), True
        if result.reused is None:  # else no worker was asked
            self._failures, self._first_failure = 0, None
        losses = self._told(result.value)
        self._best = tuple(map(min, self._best or losses, losses))
        self._worst = tuple(map(max, self._worst or losses, losses))
        return losses, False

    def _told(self, evaluation: Evaluation) -> tuple[float, ...]:
        losses = [
            objective.loss(value)
            for objective, value in zip(self._study.objectives, evaluation.values, strict=True)
        ]
        if self._study.scalarise:
            return (weighted_mean(losses, self._study.objectives),)
        return tuple(losses)

    def _penalty(self) -> tuple[float, ...]:
        """Return the losses of a failed trial: worst seen plus the spread seen, per objective.

        Where all seen losses are equal the spread counts as 1.
        """
        if self._best is None or self._worst is None:
            count = 1 if self._study.scalarise else len(self._study.objectives)
            return (PENALTY_WITHOUT_SCALE,) * count
        pairs = zip(self._best, self._worst, strict=True)
        return tuple(bounded(worst + ((worst - best) or 1.0)) for best, worst in pairs)

    def _item_scores(self, trial: Trial) -> tuple[tuple[float, ...], ...]:
        value = self._history.results["search", trial.number].value
        return () if isinstance(value, Failure) else tuple(score.items for score in value.scores)

    def _done(self, numbers: Sequence[int], split: Split) -> list[int]:
        results = self._history.results
        return [n for n in numbers if isinstance(results[split, n].value, Evaluation)]

    def _losses(self, numbers: Sequence[int], split: Split) -> list[tuple[float, ...]]:
        """Return the losses [n, m] of trials that succeeded on ``split``."""
        rows = []
        for number in numbers:
            value = self._history.results[split, number].value
            assert isinstance(value, Evaluation)
            pairs = zip(self._study.objectives, value.values, strict=True)
            rows.append(tuple(objective.loss(one) for objective, one in pairs))
        return rows

    def _make_pool(self) -> Pool:
        pool = self._study.make_pool()
        facts = dict(pool.describe())
        self._journal.append("pool", facts=facts)
        self.notify("on_workers", facts)
        return pool

    def _begin(self, phase: Phase, total: int) -> None:
        self._progress = Progress(phase, 0, 0, total)
        self.notify("on_phase", phase, total)

    def _advance(self) -> None:
        done = self._progress.done + 1
        self._progress = Progress(self._progress.phase, done, 0, self._progress.total)
        self._tell_progress()

    def _tell_progress(self) -> None:
        now = self._progress
        running = self.evaluations.running
        self.notify("on_progress", Progress(now.phase, now.done, running, now.total))

    def _stop(self, reason: str, split: Split, first: int = 0) -> None:
        """End the study; the failures from trial ``first`` on are run again next time."""
        failed = {
            number: result.value.message
            for (of, number), result in self._history.results.items()
            if of == split and number >= first and isinstance(result.value, Failure)
        }
        message = f"{reason}; the last one: {list(failed.values())[-1]}"
        fields = {"message": message, "split": split, "trials": sorted(failed)}
        self._journal.append("stop", reason="failure", **fields)
        raise NothingUsableError(
            f"{message} (mend the cause and run the same command again: these are repeated)"
        )
