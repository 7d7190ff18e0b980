"""Gives every trial its result: from the journal, from an equal recipe, or from the pool."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from signal import Signals

from evomerge.errors import Interrupted
from evomerge.interrupt import StopSignals
from evomerge.journal import Journal
from evomerge.pool import Pool
from evomerge.study_record import History, Result, Split, result_fields
from evomerge.trial import Evaluation, Failure, Job, Objective, Outcome, Score, Trial

logger = logging.getLogger(__name__)

#: Item ids per objective [m][I].
Items = tuple[tuple[str, ...], ...]

#: How often a wait looks up to see whether a signal came.
POLL_SECONDS = 0.5


def checked(result: object, objectives: Sequence[Objective], items: Items) -> Evaluation | Failure:
    """Return a worker's result if it is sound, else a failure; the single gate for values.

    Sound is: one score per objective [m], as many item scores as items were asked for, and
    every number a finite float.
    """
    if isinstance(result, Failure):
        return result
    if not isinstance(result, Evaluation):
        return _bad(f"expected an Evaluation, got {type(result).__name__}")
    if len(result.scores) != len(objectives):
        return _bad(f"expected {len(objectives)} scores, got {len(result.scores)}")
    scores = []
    for objective, score, asked in zip(objectives, result.scores, items, strict=True):
        if len(score.items) != len(asked):
            return _bad(
                f"{objective.name}: expected {len(asked)} item scores, got {len(score.items)}"
            )
        try:
            plain = Score(
                float(score.value), float(score.standard_error), tuple(map(float, score.items))
            )
        except (TypeError, ValueError) as error:
            return _bad(f"{objective.name}: a score is not a number: {error}")
        if not math.isfinite(plain.value):
            return _bad(f"{objective.name}: value {plain.value} is not finite")
        if not (math.isfinite(plain.standard_error) and plain.standard_error >= 0):
            return _bad(f"{objective.name}: standard error {plain.standard_error} is not usable")
        wrong = [
            item for item, value in zip(asked, plain.items, strict=True) if not math.isfinite(value)
        ]
        if wrong:
            return _bad(f"{objective.name}: item {wrong[0]}: the score is not finite")
        scores.append(plain)
    # Durations are only for the record: one that makes no sense is dropped, not judged.
    seconds = {
        str(phase): float(value)
        for phase, value in result.seconds.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return Evaluation(tuple(scores), seconds)


def _bad(message: str) -> Failure:
    return Failure("bad_result", message)


class Evaluations:
    """Requests go in, in any order; ``result`` waits for one of them.

    No (recipe, items) pair that has a successful result is ever evaluated again. A request whose
    recipe is being evaluated for another trial waits for that one. Results are journaled when
    they arrive, before anybody learns them. At most ``pool.workers`` jobs are handed to the
    pool, so that a stop has no queue to drain.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        history: History,
        objectives: tuple[Objective, ...],
        items: Mapping[Split, Items],
        make_pool: Callable[[], Pool],
        signals: StopSignals,
        grace_seconds: float,
        on_change: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._results = history.results
        self._digests = history.digests
        self._objectives = objectives
        self._items = items
        self._make_pool = make_pool
        self._signals = signals
        self._grace_seconds = grace_seconds
        self._on_change = on_change
        self._pool: Pool | None = None
        self._queue: deque[tuple[Split, Trial]] = deque()
        self._in_flight: dict[int, tuple[Split, Trial]] = {}
        self._followers: dict[tuple[str, Items], list[tuple[Split, Trial]]] = {}
        self._known: dict[tuple[str, Items], tuple[int, Evaluation]] = {}
        for (split, number), result in self._results.items():
            self._remember(split, history.trials[number], result)

    @property
    def running(self) -> int:
        """How many jobs the pool holds."""
        return len(self._in_flight)

    def request(self, trial: Trial, split: Split) -> None:
        """Start whatever it takes to get the result of ``trial`` on ``split``."""
        if (split, trial.number) in self._results:
            return
        key = self._key(split, trial)
        if key in self._known:
            self._reuse(split, trial)
        elif key in self._followers:
            self._followers[key].append((split, trial))
        else:
            self._followers[key] = []
            self._queue.append((split, trial))
            self._feed()

    def result(self, trial: Trial, split: Split) -> Result:
        """Wait for a requested result.

        Raises:
            Interrupted: a signal came; what was running has been waited for and journaled.
            StorageError: the journal cannot be written.
            SetupError: no worker can be started.
        """
        key = (split, trial.number)
        self._check_signals()
        while key not in self._results:
            assert self._pool is not None
            self._collect(POLL_SECONDS)
            self._feed()
            self._check_signals()
        return self._results[key]

    def close(self) -> None:
        """Stop the workers; idempotent."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _key(self, split: Split, trial: Trial) -> tuple[str, Items]:
        return self._digests[trial.number], self._items[split]

    def _remember(self, split: Split, trial: Trial, result: Result) -> None:
        if isinstance(result.value, Evaluation):
            self._known.setdefault(self._key(split, trial), (trial.number, result.value))

    def _reuse(self, split: Split, trial: Trial) -> None:
        number, evaluation = self._known[self._key(split, trial)]
        reused = Evaluation(evaluation.scores, {})
        self._record(split, trial, Result(reused, 0, "", reused=number))

    def _feed(self) -> None:
        """Hand jobs to the pool while it has a free worker."""
        if not self._queue or self._signals.received is not None:
            return
        if self._pool is None:
            self._pool = self._make_pool()
        while self._queue and len(self._in_flight) < self._pool.workers:
            split, trial = self._queue.popleft()
            self._pool.submit(Job(trial.number, trial.recipe, self._items[split]))
            self._in_flight[trial.number] = (split, trial)

    def _collect(self, timeout: float) -> None:
        assert self._pool is not None
        for outcome in self._pool.wait(timeout):
            self._accept(outcome)

    def _accept(self, outcome: Outcome) -> None:
        split, trial = self._in_flight.pop(outcome.number)
        value = checked(outcome.result, self._objectives, self._items[split])
        result = Result(value, outcome.attempts, outcome.worker)
        self._record(split, trial, result)
        followers = self._followers.pop(self._key(split, trial))
        if isinstance(value, Evaluation):
            for other_split, other in followers:
                self._reuse(other_split, other)
        elif followers:
            # The same recipe gets one more chance under the next trial's name.
            self._followers[self._key(split, trial)] = followers[1:]
            self._queue.appendleft(followers[0])

    def _record(self, split: Split, trial: Trial, result: Result) -> None:
        fields = result_fields(trial.number, result)
        if split == "search":
            self._journal.append("tell", **fields)
        else:
            self._journal.append("score", split=split, **fields)
        self._results[split, trial.number] = result
        self._remember(split, trial, result)
        self._on_change()

    def _check_signals(self) -> None:
        if self._signals.received is None:
            return
        name = Signals(self._signals.received).name
        if self._in_flight:
            logger.warning(
                "%s: waiting up to %.0f s for %d running trials; a second signal stops at once",
                name, self._grace_seconds, len(self._in_flight),
            )  # fmt: skip
        deadline = time.monotonic() + self._grace_seconds
        while self._in_flight and time.monotonic() < deadline:
            self._collect(POLL_SECONDS)
        self._journal.append("stop", reason="signal", message=f"stopped by {name}")
        raise Interrupted(
            f"stopped by {name}; run the same command again to continue", self._signals.received
        )
