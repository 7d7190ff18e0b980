"""Gives every trial its result: from the journal, from known item scores, or from the pool."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from signal import Signals

from evomerge.errors import Interrupted
from evomerge.estimate import Answers, Estimator, PlainMean
from evomerge.interrupt import StopSignals
from evomerge.item_cache import ItemCache, Items
from evomerge.journal import Recorder
from evomerge.pool import Pool
from evomerge.racing import Racing, fresh_counts, stopped_at
from evomerge.spool import SPOOL, Spool
from evomerge.study_record import History, Result, Split, result_fields
from evomerge.trial import Evaluation, Failure, Job, Objective, Outcome, Race, Trial
from evomerge.valuation import Mode, Valuation, Valued, checked

__all__ = ["Evaluations", "Items", "Request", "checked"]

logger = logging.getLogger(__name__)

#: How often a wait looks up to see whether a signal came.
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Request:
    """A trial that is to be scored.

    Attributes:
        trial: which one.
        split: the items belong to; its result is recorded under it.
        items: ids in the order of scoring [m][I].
        mode: what is made of the scores.
        rivals: scores of the references of its race on these items [R][m][<= I]; empty for no
            race.
        rung: with the split ``part``, score the first so many of each objective only; the trial
            is not finished then, unless it fails.
        design: items of the estimator that are looked at in the mode ``check`` [m][n].
        earlier: a searcher asked for it that was replaced since. It races no more, but what was
            measured of it in its race is taken.
    """

    trial: Trial
    split: Split
    items: Items
    mode: Mode = "mean"
    rivals: tuple[tuple[tuple[float, ...], ...], ...] = ()
    rung: int | None = None
    design: Items = ()
    earlier: bool = False

    @property
    def wanted(self) -> Items:
        """The items to score now [m][<= I]."""
        return tuple(ids[: self.rung] for ids in self.items)


class Evaluations:
    """Requests go in, in any order; ``result`` waits for one of them.

    No item is ever scored again for a recipe that has a score on it. Requests for one recipe are
    dealt with one after the other, in the order in which they came: what is known when a request
    begins is then the same whatever the number and the speed of the workers. Results are
    journaled when they arrive, before anybody learns them. At most ``pool.workers`` jobs are
    handed to the pool, so that a stop has no queue to drain.

    Args:
        journal: of the study.
        history: what it holds; new results are added.
        objectives: [m].
        estimator: makes values of item scores; None to take the worker's value of what it scored
            in one go, and the plain mean of what was put together.
        racing: how to race; None for never.
        make_pool: builds the pool when the first job is ready.
        signals: that stop the study.
        grace_seconds: how long a stop waits for running trials.
        on_change: called after every result.
        spool: where workers leave what they have measured; None where they leave nothing. What
            lies there when the study goes on is taken instead of being measured again.
    """

    def __init__(
        self,
        *,
        journal: Recorder,
        history: History,
        objectives: tuple[Objective, ...],
        estimator: Estimator | None,
        racing: Racing | None,
        make_pool: Callable[[], Pool],
        signals: StopSignals,
        grace_seconds: float,
        on_change: Callable[[], None],
        spool: Spool | None = None,
    ) -> None:
        self._journal = journal
        self._history = history
        self._results = history.results
        self._digests = history.digests
        self._objectives = objectives
        self._take_worker_value = estimator is None
        self._valuation = Valuation(objectives, estimator or PlainMean())
        self._racing = racing
        self._make_pool = make_pool
        self._signals = signals
        self._grace_seconds = grace_seconds
        self._on_change = on_change
        self._spool = spool
        self._spooled = spool is not None and bool(spool.entries())
        self._pool: Pool | None = None
        self._queue: deque[Request] = deque()
        self._in_flight: dict[int, tuple[Request, Job]] = {}
        self._waiting: dict[str, deque[Request]] = {}  # behind the one that is being scored
        self._cache = ItemCache()
        self._first: dict[tuple[str, Split], int] = {}  # who has a result on a split first
        self._whole: dict[tuple[str, Items], Evaluation] = {}
        self._arrivals: dict[int, int] = {}  # by trial, on the search items
        self.scored = 0  # items, by workers, since the study began
        self.stops = 0  # races that ended early
        for (split, number), result in self._results.items():
            self._remember(split, number, history.items_of(split, number), result)

    @property
    def running(self) -> int:
        """How many jobs the pool holds."""
        return len(self._in_flight)

    def estimate_by(self, estimator: Estimator, design: Items) -> None:
        """Make values of what is scored on the items of a design, from now on."""
        estimators = {**self._valuation.estimators, design: estimator}
        self._valuation = replace(self._valuation, estimators=estimators)

    def answers(self, trial: Trial, items: Items) -> tuple[Answers, ...]:
        """Return the known answers of a trial to items, all of which must be known [m]."""
        digest = self._digests[trial.number]
        return tuple(self._cache.answers(digest, j, ids) for j, ids in enumerate(items))

    def request(self, request: Request) -> None:
        """Start whatever it takes to get a result."""
        if self._settled(request):
            return
        digest = self._digests[request.trial.number]
        if digest in self._waiting:
            self._waiting[digest].append(request)
            return
        self._waiting[digest] = deque((request,))
        needy = self._next(digest)
        if needy is not None:
            self._queue.append(needy)
            self._feed()

    def result(self, trial: Trial, split: Split) -> Result:
        """Wait for a requested result.

        Raises:
            Interrupted: a signal came; what was running has been waited for and journaled.
            StorageError: the journal cannot be written.
            SetupError: no worker can be started.
        """
        self._wait(lambda: (split, trial.number) in self._results)
        return self._results[split, trial.number]

    def first(self, numbers: Sequence[int]) -> int:
        """Wait until one of these trials has its result on the search items; return which.

        Where several have, it is the one whose result is first in the journal.

        Raises:
            Interrupted, StorageError, SetupError: see ``result``.
        """
        self._wait(lambda: any(number in self._arrivals for number in numbers))
        arrived = [number for number in numbers if number in self._arrivals]
        return min(arrived, key=self._arrivals.__getitem__)

    def reading(self, request: Request) -> Evaluation | None:
        """Wait for the part of a trial up to a rung and return what it is worth.

        Args:
            request: of the split ``part``; was given to ``request`` before.

        Returns:
            None where the trial failed at this rung or an earlier one.

        Raises:
            Interrupted, StorageError, SetupError: see ``result``.
        """
        self._wait(lambda: self._settled(request))
        number = request.trial.number
        if self._failed_by(number, request.rung):
            return None
        valued = self._valued(request, self._digests[number], request.rung, {})
        if isinstance(valued, Failure):
            self._record(request, Result(valued, 0, "", rung=request.rung))
            return None
        return valued.evaluation

    def leave(self, request: Request, stages: Sequence[int]) -> None:
        """Finish a trial with what is known of it; some of its items never get a score.

        Args:
            request: of the split ``search``.
            stages: rungs [R], ascending; the longest whose items are all known counts.
        """
        number = request.trial.number
        if ("search", number) in self._results:
            return
        digest = self._digests[number]
        known = self._cache.known(digest, request.items)
        reached = [
            rung for rung in stages if all(None not in row[:rung] for row in known)
        ]  # fmt: skip
        rung = None if all(None not in row for row in known) else max(reached)
        part = self._results.get(("part", number))
        first = self._first.get((digest, "search"), self._first.get((digest, "part")))
        reused = first if part is None else None
        valued = self._valued(request, digest, rung, self._seconds_before(number))
        value = valued if isinstance(valued, Failure) else valued.evaluation
        beside = {} if isinstance(valued, Failure) else valued.beside
        attempts, worker = (0, "") if part is None else (part.attempts, part.worker)
        result = Result(value, attempts, worker, reused=reused, rung=rung, beside=beside)
        self._record(request, result)

    def _wait(self, ready: Callable[[], bool]) -> None:
        self._check_signals()
        while not ready():
            assert self._pool is not None
            self._collect(POLL_SECONDS)
            self._feed()
            self._check_signals()

    def _settled(self, request: Request) -> bool:
        """Return whether there is nothing more to do for a request."""
        number = request.trial.number
        if request.split != "part":
            return (request.split, number) in self._results
        if self._failed_by(number, request.rung):
            return True
        known = self._cache.known(self._digests[number], request.wanted)
        return all(score is not None for row in known for score in row)

    def _failed_by(self, number: int, rung: int | None) -> bool:
        """Return whether a trial had failed when its bracket looked at a rung."""
        result = self._results.get(("search", number))
        if result is None or not isinstance(result.value, Failure):
            return False
        return rung is None or (result.rung is not None and result.rung <= rung)

    def close(self) -> None:
        """Stop the workers; idempotent."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _next(self, digest: str) -> Request | None:
        """Deal with the requests for a recipe up to one that needs a worker, which is returned."""
        waiting = self._waiting[digest]
        while waiting:
            request = waiting.popleft()
            if not self._from_cache(request, digest):
                return request
        del self._waiting[digest]
        return None

    def _from_cache(self, request: Request, digest: str) -> bool:
        """Record the result of a request without a worker, if what is known is enough."""
        if request.split == "part":  # what is known needs no record
            return self._settled(request)
        enough, rung = self._standing(request, digest, self._race(request, digest))
        if not enough:
            return False
        first = self._first.get((digest, request.split), self._first.get((digest, "search")))
        whole = self._whole.get((digest, request.items)) if request.mode == "mean" else None
        if self._take_worker_value and whole is not None and rung is None:
            self._record(request, Result(Evaluation(whole.scores, {}), 0, "", reused=first))
            return True
        valued = self._valued(request, digest, rung, {})
        if isinstance(valued, Failure):
            self._record(request, Result(valued, 0, "", reused=first))
        else:
            result = Result(valued.evaluation, 0, "", reused=first, rung=rung, beside=valued.beside)
            self._record(request, result)
        return True

    def _standing(
        self, request: Request, digest: str, race: Race | None
    ) -> tuple[bool, int | None]:
        """Return whether what is known is enough for a result, and the rung where it ends."""
        known = self._cache.known(digest, request.items)
        if all(score is not None for row in known for score in row):
            return True, None
        rung = None if race is None else stopped_at(race, known)
        return rung is not None, rung

    def _race(self, request: Request, digest: str) -> Race | None:
        if self._racing is None or not request.rivals:
            return None
        known = self._cache.known(digest, request.items)
        return self._racing.race(self._objectives, request.items, known, request.rivals)

    def _valued(
        self, request: Request, digest: str, rung: int | None, seconds: dict[str, float]
    ) -> Valued | Failure:
        """Return what the known scores of a request's items are worth, up to a rung."""
        answers: Sequence[Answers] = [
            self._cache.answers(digest, objective, ids[:rung])
            for objective, ids in enumerate(request.items)
        ]
        design = request.design or request.items
        return self._valuation.value(request.mode, answers, seconds, design)

    def _feed(self) -> None:
        """Hand jobs to the pool while it has a free worker."""
        if not self._queue or self._signals.received is not None:
            return
        while self._queue:
            request = self._queue[0]
            job = self._job(request)
            found = self._found(request, job)
            if found is None:
                if self._pool is None:
                    self._pool = self._make_pool()
                if len(self._in_flight) >= self._pool.workers:
                    return
                self._pool.submit(job)
            self._queue.popleft()
            self._in_flight[job.number] = (request, job if found is None else found[0])
            if found is not None:
                self._accept(Outcome(job.number, found[1], 1, SPOOL))

    def _found(self, request: Request, job: Job) -> tuple[Job, Evaluation] | None:
        """Return what the spool has for a job, and the job that it was measured for."""
        if self._spool is None or not self._spooled:
            return None
        found = self._spool.get(job)
        if found is not None:
            return job, found
        return self._spool.raced(job) if request.earlier else None

    def _job(self, request: Request) -> Job:
        trial = request.trial
        digest = self._digests[trial.number]
        missing = self._cache.missing(digest, request.wanted)
        return Job(trial.number, trial.recipe, missing, self._race(request, digest))

    def _collect(self, timeout: float) -> None:
        assert self._pool is not None
        for outcome in self._pool.wait(timeout):
            self._accept(outcome)

    def _accept(self, outcome: Outcome) -> None:
        request, job = self._in_flight.pop(outcome.number)
        digest = self._digests[request.trial.number]
        rungs = () if job.race is None else fresh_counts(job.race)
        scored = checked(outcome.result, self._objectives, job.items, rungs)
        result = Result(scored, outcome.attempts, outcome.worker, rung=request.rung)
        if isinstance(scored, Evaluation):
            result = self._put_together(request, digest, job, scored, result)
        self._record(request, result)
        if self._spool is not None:
            self._spool.drop(job)
        # Where it failed, the same recipe gets one more chance under the next trial's name.
        needy = self._next(digest)
        if needy is not None:
            self._queue.appendleft(needy)

    def _put_together(
        self, request: Request, digest: str, job: Job, scored: Evaluation, result: Result
    ) -> Result:
        """Return the result on all items of a request from those of its job."""
        self._cache.add(digest, job.items, scored.scores)
        fresh = sum(len(score.items) for score in scored.scores)
        if request.split == "part":
            part = self._valued(request, digest, request.rung, dict(scored.seconds))
            value = part if isinstance(part, Failure) else part.evaluation
            return replace(result, value=value, fresh=fresh)
        whole = job.items == request.items and job.race is None
        if self._take_worker_value and request.mode == "mean" and whole:
            return replace(result, fresh=fresh)
        enough, rung = self._standing(request, digest, job.race)
        if not enough:
            counts = " + ".join(str(len(score.items)) for score in scored.scores)
            problem = f"the worker stopped its race after {counts} items, without a reason"
            return replace(result, value=Failure("bad_result", problem), fresh=fresh)
        # What its parts took belongs to the trial, not to its scores on other items.
        before = request.split == "search"
        seconds = self._seconds_before(request.trial.number) if before else {}
        for phase, spent in scored.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        valued = self._valued(request, digest, rung, seconds)
        if isinstance(valued, Failure):
            return replace(result, value=valued, fresh=fresh)
        return replace(
            result, value=valued.evaluation, fresh=fresh, rung=rung, beside=valued.beside
        )

    def _seconds_before(self, number: int) -> dict[str, float]:
        """Return what the parts of a trial took, by phase."""
        part = self._results.get(("part", number))
        if part is None:
            return {}
        assert isinstance(part.value, Evaluation)
        return dict(part.value.seconds)

    def _record(self, request: Request, result: Result) -> None:
        split, number = request.split, request.trial.number
        if split == "part" and isinstance(result.value, Failure):
            split = "search"  # nothing comes after it
        fields = result_fields(number, result)
        if split == "part":
            self._journal.append("part", **fields)
            self._history.add_part(number, result)
        elif split == "search":
            self._journal.append("tell", **fields)
            self._results[split, number] = result
        else:
            self._journal.append("score", split=split, **fields)
            self._results[split, number] = result
        self._remember(split, number, request.items, result)
        self._on_change()

    def _remember(self, split: Split, number: int, items: Items, result: Result) -> None:
        if split == "search":
            self._arrivals[number] = len(self._arrivals)
        self.scored += result.fresh
        if not isinstance(result.value, Evaluation):
            return
        self.stops += split == "search" and result.rung is not None
        digest = self._digests[number]
        self._cache.add(digest, items, result.value.scores)
        self._first.setdefault((digest, split), number)
        if result.rung is None:
            self._whole.setdefault((digest, items), result.value)

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
