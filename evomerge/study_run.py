"""One run of a study: baselines, search, finalists; everything through the journal.

Order is fixed, so that neither the number of workers nor their speed changes a search: a window
of ``parallel`` candidates is filled by asking one at a time; the searcher is told about the
oldest one, always; then the window is filled again. With ``order: completion`` it is told about
the one whose result came first: workers never wait, and the journal is the only record of what
the search depended on. What a trial is scored on, whom it races against and whether the budget
allows it follow from what the searcher was told before. Resuming is the same loop. It takes asks
and results from the journal as long as there are any, and compares every ask. Where a fresh
searcher took over (``evomerge.restart_record``), the trials before it are only finished.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from evomerge.asks import Asks
from evomerge.brackets import Brackets, Member
from evomerge.choosing import finalists
from evomerge.designs import Designs
from evomerge.errors import NothingUsableError, ReplayError
from evomerge.estimate import Endpoint
from evomerge.evaluations import Evaluations, Request
from evomerge.feasibility import best_rows, violation
from evomerge.halving import Halving
from evomerge.interrupt import StopSignals
from evomerge.items import Chosen, TrialItems
from evomerge.journal import Recorder
from evomerge.pool import Pool
from evomerge.racing import Racing
from evomerge.references import References, Rivals
from evomerge.restart_record import Restart
from evomerge.restarted import (
    Asker,
    NoSearcher,
    chosen_earlier,
    draws_before,
    earlier,
    left,
    warm_points,
)
from evomerge.search.protocol import Searcher, SearchProblem, Told, WarmPoint
from evomerge.study_listener import Phase, Progress
from evomerge.study_record import History, Limit, Split, distinct, settle
from evomerge.study_view import recommended
from evomerge.telling import Teller, facts_of, losses_of, origin_of
from evomerge.trial import Evaluation, Failure, Trial
from evomerge.window import Outstanding, Window

if TYPE_CHECKING:
    from evomerge.study import Study

logger = logging.getLogger(__name__)

#: A study stops when so many trials in a row fail: the cause is the setup, not the candidates.
FAILURES_IN_A_ROW = 10

#: After so many asks the study writes down what the searcher says of its work, and at the end.
NOTE_EVERY = 20


class StudyRun:
    """What one call of ``Study.run`` holds.

    Attributes:
        evaluations: gives every trial its result.
        asks: takes every ask.
    """

    def __init__(
        self, study: Study, journal: Recorder, history: History, signals: StopSignals
    ) -> None:
        self._study = study
        self._journal = journal
        self._history = history
        self.asks = Asks(journal, history, study.items["search"])
        self._muted: set[int] = set()
        self._progress = Progress("baselines", 0, 0, 0)
        self._failures = 0
        self._first_failure: int | None = None
        self._teller = Teller(study.objectives, study.scalarise)
        self._references: References | None = None
        race = study.racing if isinstance(study.racing, Racing) else None
        if race is not None:
            self._references = References(study.objectives, race.references, race.rungs[0])
        self._items = TrialItems(
            study.items["search"], study.seed, study.resampled, study.racing is not None
        )
        self.evaluations = Evaluations(
            journal=journal,
            history=history,
            objectives=study.objectives,
            estimator=study.estimator,
            racing=race,
            make_pool=self._make_pool,
            signals=signals,
            grace_seconds=study.grace_seconds,
            on_change=self._tell_progress,
            spool=study.spool,
        )
        self._brackets: Brackets | None = None
        self._size: int | None = study.parallel  # asks before the first of them is told
        if isinstance(study.racing, Halving):
            self._size = study.racing.bracket
            self._brackets = Brackets(
                study.objectives, study.scalarise, study.racing, self.evaluations
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
        """Score baselines, and merges by chance where an estimator wants some, on all items."""
        study = self._study
        estimation = study.estimation
        calibration = 0 if estimation is None else estimation.calibration
        self._begin("baselines", len(study.baselines) + calibration)
        full = Chosen(study.items["search"])
        trials = [
            self.asks.take(Trial(number, "baseline", one.label, one.x, one.recipe), full.items)
            for number, one in enumerate(study.baselines)
        ]
        for index in range(calibration):
            # Text seeds are hashed by random itself, the same way in every process.
            draw = random.Random(f"{study.seed} calibration {index}")  # noqa: S311  no secret
            x = tuple(draw.random() for _ in range(study.dimension))
            label = f"calibration:{index}"
            trial = Trial(len(trials), "search", label, x, study.decode(x))
            trials.append(self.asks.take(trial, full.items))
        for trial in trials:
            self.evaluations.request(Request(trial, "search", full.items))
        done = [trial for trial in trials if self._settle(trial)]
        if estimation is not None:
            self._prepare_estimator(done)
        warm = []
        for trial in done:
            evaluation = self._evaluation(trial.number)
            self._refer(trial.number)
            if trial.x is not None:
                warm.append(WarmPoint(trial.x, self._teller.told(evaluation)))
        return tuple(warm)

    def _prepare_estimator(self, trials: Sequence[Trial]) -> None:
        """Let the estimator learn from the endpoints and choose the items of the search.

        Raises:
            InputError: from the estimator, or it chose what are no search items.
        """
        study = self._study
        assert study.estimation is not None
        pool = study.items["search"]
        endpoints = [
            Endpoint(trial.label, self.evaluations.answers(trial, pool))
            for trial in trials
            if trial.label.partition(":")[0] in ("base", "expert", "calibration")
        ]
        designs = Designs(
            study.estimation, endpoints, study.objectives, pool, self.evaluations.estimate_by
        )
        self._items = TrialItems(
            pool, study.seed, design=designs, full_every=study.estimation.full_every,
            refresh=study.estimation.refresh,
        )  # fmt: skip

    def _search(self, warm: tuple[WarmPoint, ...]) -> None:
        study = self._study
        limits = self._history.limits(study.budget, study.item_budget)
        self._begin("search", limits[-1].trials or study.planned)
        first = study.first
        recorded = len(self._history.trials)
        window = Window(self._size, self._items.cost, self._bracket_cost())
        restart = self._history.provenance.last
        if restart is None:
            searcher = self._make_searcher(study.planned, study.seed, warm)
        else:
            searcher = self._take_over(restart, first, window, limits)
        asker = Asker(
            searcher, first, first if restart is None else restart.trial,
            0 if restart is None else draws_before(self._history, restart, first),
        )  # fmt: skip
        arrived = self.evaluations.first if study.order == "completion" else None
        for limit in limits:
            window.until(limit)
            while True:
                while window.has_room():
                    one = self._ask_searcher(asker, window)
                    if one is None:
                        break
                    window.add(one)
                    if window.asked % NOTE_EVERY == 0 and first + window.asked > recorded:
                        self._note_facts(facts_of(searcher, first))
                if not window:
                    break
                told = 1
                if self._brackets is not None:
                    self._brackets.run([Member(o.trial, o.chosen) for o in window.outstanding])
                    told = len(window)
                for _ in range(told):
                    window.spend(self._tell_searcher(searcher, window.take(arrived)))
        self._note_facts(facts_of(searcher, first))
        if len(self._history.trials) > first + window.asked:
            raise ReplayError(
                f"trial {first + window.asked}: the journal has it, but the searcher asks for "
                "nothing more; the searcher or its libraries changed since the study began",
                first + window.asked,
            )

    def _make_searcher(self, budget: int, seed: int, warm: tuple[WarmPoint, ...]) -> Searcher:
        study = self._study
        return study.make_searcher(
            SearchProblem(
                dimension=study.dimension,
                objectives=1 if study.scalarise else len(study.objectives),
                budget=budget,
                parallel=self._size or study.parallel,
                seed=seed,
                warm=warm,
            )
        )

    def _take_over(
        self, restart: Restart, first: int, window: Window, limits: Sequence[Limit]
    ) -> Searcher:
        """Finish what was asked before a restart; return the searcher that goes on from there."""
        trials = list(earlier(self._history, restart, first))
        for trial in trials:
            chosen = chosen_earlier(self._items, self._history, trial.number, first)
            self.evaluations.request(
                Request(
                    trial, "search", chosen.items, chosen.mode, design=chosen.design, earlier=True
                )
            )
        for trial in trials:
            if self._settle(trial):
                self._refer(trial.number)
            window.skip(self._cost(trial.number))
        return self._fresh_searcher(restart, window, limits)

    def build_fresh(self) -> None:
        """Build the searcher of a restart from what is known so far, to see that it can be."""
        history, restart = self._history, self._history.provenance.last
        assert restart is not None
        window = Window(self._size, self._items.cost)
        for number in range(self._study.first, restart.trial):
            known = ("search", number) in history.results
            window.skip(self._cost(number) if known else 0)
        limits = history.limits(self._study.budget, self._study.item_budget)
        self._fresh_searcher(restart, window, limits)

    def _fresh_searcher(
        self, restart: Restart, window: Window, limits: Sequence[Limit]
    ) -> Searcher:
        budget = left(window, limits, restart)
        if budget == 0:
            return NoSearcher()
        warm = warm_points(self._history, restart, self._teller.told)
        return self._make_searcher(budget, restart.seed(self._study.seed), warm)

    def _bracket_cost(self) -> Callable[[Sequence[Chosen], int], int] | None:
        """Return what the trials of a bracket and the next one may cost, where there are any."""
        brackets, items = self._brackets, self._items
        if brackets is None:
            return None
        return lambda chosen, asked: brackets.cost([*chosen, items.of(asked, None, 0)])

    def _ask_searcher(self, asker: Asker, window: Window) -> Outstanding | None:
        """Ask for one candidate and have it scored; None where there is none now."""
        candidates = asker.searcher.ask(1)
        if not candidates:
            return None
        x = tuple(map(float, candidates[0].x))
        asked, before = window.asked, window.outstanding
        # All of a bracket are scored on the same items.
        draw = before[0].chosen.draw if self._brackets is not None and before else None
        chosen = self._items.of(asked, asker.generation, draw)
        origin = origin_of(asker.searcher, candidates[0].id, asker.began)
        trial = Trial(asker.first + asked, "search", "", x, self._study.decode(x), origin=origin)
        self.asks.take(trial, chosen.items)
        if self._brackets is not None:
            self._brackets.enter(Member(trial, chosen))
            return Outstanding(candidates[0], trial, chosen)
        rivals: Rivals = ()
        if self._references is not None and chosen.mode != "check":
            rivals = self._references.rivals(chosen.items)
        self.evaluations.request(
            Request(trial, "search", chosen.items, chosen.mode, rivals, design=chosen.design)
        )
        return Outstanding(candidates[0], trial, chosen)

    def _note_facts(self, facts: dict[str, str]) -> None:
        """Write down what the searcher says of its work, where it says anything new."""
        if facts and facts != self._history.searcher:
            self._history.add(self._journal.append("note", searcher=facts))

    def _tell_searcher(self, searcher: Searcher, one: Outstanding) -> int:
        """Tell the searcher what became of a trial; return how many items it cost."""
        number = one.trial.number
        if not self._settle(one.trial):
            searcher.tell([Told(one.candidate.id, self._teller.penalty(), failed=True)])
            return self._cost(number)
        evaluation = self._evaluation(number)
        items = tuple(score.items for score in evaluation.scores)
        if self._history.results["search", number].rung is not None or one.chosen.mode == "check":
            items = ()  # not the items of the other trials
        told = self._teller.told(evaluation)
        searcher.tell([Told(one.candidate.id, told, failed=False, items=items)])
        self._refer(number)
        return self._cost(number)

    def _cost(self, number: int) -> int:
        """Return how many items a trial with a result has cost; a failed one all of its items."""
        result, part = (self._history.results.get((of, number)) for of in ("search", "part"))
        assert result is not None
        if isinstance(result.value, Failure):
            items = self._history.items_of("search", number)
            return sum(len(ids[: result.rung]) for ids in items)
        return result.fresh + (part.fresh if part else 0)

    def _choose(self) -> None:
        """Score finalists and baselines again on held-out items; report front and choice."""
        study = self._study
        done = self._done(range(len(self._history.trials)), "search")
        if not done:
            self._stop(f"none of the {len(self._history.trials)} trials succeeded", "search")
        chosen = self._finalists(done)
        split: Split = "search"
        if any(study.items["validation"]):
            chosen = self._score(chosen, "validation")
            split = "validation"
            if not chosen:
                self._stop("none of the finalists could be scored on the validation items", split)
        losses, violations = self._standing(chosen, split)
        best = best_rows(losses, violations)
        front = distinct((chosen[row] for row in best), self._history.digests)
        losses, _ = self._standing(front, split)
        knee = front[recommended(losses, study.objectives, study.scalarise)]
        if any(study.items["test"]):
            baselines = range(len(study.baselines))
            self._score(sorted({*front, *self._done(baselines, "search")}), "test")
        if self._history.done is None:
            fields = {"front": front, "knee": knee, "split": split}
            self._history.done = self._journal.append("done", **fields)

    def _finalists(self, done: Sequence[int]) -> list[int]:
        """Return the trials to score again; none of them was stopped by a race.

        A trial that a race stopped is scored on the rest of its items before it is chosen, which
        may show that another one belongs in its place.
        """
        while True:
            baselines = [number for number in done if number < len(self._study.baselines)]
            rest = distinct(done, self._history.digests)
            losses, violations = self._standing(rest, "search")
            rungs = [self._history.rung_of(number) for number in rest]
            tiers = rungs if self._brackets is not None else [None] * len(rest)
            rows = finalists(losses, violations, self._study.finalists, tiers)
            chosen = sorted({*(rest[row] for row in rows), *baselines})
            stopped = [n for n in chosen if self._history.rung_of(n) is not None]
            if not stopped:
                return chosen
            completed = self._score(stopped, "complete")
            done = [number for number in done if number not in stopped or number in completed]

    def _score(
        self, numbers: Sequence[int], split: Literal["complete", "validation", "test"]
    ) -> list[int]:
        """Score trials on another split and return those that succeeded."""
        self._begin(split, len(numbers))
        trials = [self._history.trials[number] for number in numbers]
        for trial in trials:
            items = self._history.items_of(split, trial.number)
            estimated = split == "complete" and self._study.estimation is not None
            self.evaluations.request(
                Request(trial, split, items, "estimate" if estimated else "mean")
            )
        for trial in trials:
            result = self.evaluations.result(trial, split)
            self._advance()
            self.notify("on_score", self._history.settled(trial), split, result)
        return self._done(numbers, split)

    def _settle(self, trial: Trial) -> bool:
        """Wait for a trial; return whether it succeeded.

        Raises:
            NothingUsableError: the tenth failure in a row of this run.
        """
        result = self.evaluations.result(trial, "search")
        self._advance()
        self.notify("on_trial", settle(trial, result), result.replayed)
        self.notify("on_result", settle(trial, result), result)
        if isinstance(result.value, Failure):
            logger.info("trial %d failed (%s)", trial.number, result.value.message)
            if self._first_failure is None:
                self._first_failure = trial.number
            # Replayed failures do not count: who runs again has mended something.
            self._failures += 0 if result.replayed else 1
            if self._failures >= FAILURES_IN_A_ROW:
                reason = f"{FAILURES_IN_A_ROW} trials in a row failed"
                self._stop(reason, "search", self._first_failure)
            return False
        if result.reused is None:  # else no worker was asked
            self._failures, self._first_failure = 0, None
        self._teller.measure(result.value)
        return True

    def _refer(self, number: int) -> None:
        """Let later trials race against this one, if it was scored on all its items."""
        if self._references is not None and self._history.results["search", number].rung is None:
            items = self._history.items_of("search", number)
            self._references.add(items, self._evaluation(number))

    def _evaluation(self, number: int) -> Evaluation:
        value = self._history.results["search", number].value
        assert isinstance(value, Evaluation)
        return value

    def _done(self, numbers: Sequence[int], split: Split) -> list[int]:
        results = self._history.results
        return [n for n in numbers if isinstance(results[split, n].value, Evaluation)]

    def _standing(
        self, numbers: Sequence[int], split: Split
    ) -> tuple[list[tuple[float, ...]], list[float]]:
        """Return the losses [n, m] and violations [n] of trials that succeeded on ``split``."""
        objectives = self._study.objectives
        losses, violations = [], []
        for number in numbers:
            result = self._history.results[split, number]
            if split == "search":
                result = self._history.results.get(("complete", number), result)
            assert isinstance(result.value, Evaluation)
            losses.append(losses_of(objectives, result.value.values))
            violations.append(violation(objectives, result.value.values))
        return losses, violations

    def _make_pool(self) -> Pool:
        pool = self._study.make_pool()
        try:
            facts = dict(pool.describe())
            self._journal.append("pool", facts=facts)
            self.notify("on_workers", facts)
        except BaseException:
            pool.close()  # nobody else knows of it yet
            raise
        return pool

    def _begin(self, phase: Phase, total: int) -> None:
        self._progress = Progress(phase, 0, 0, total)
        self.notify("on_phase", phase, total)

    def _advance(self) -> None:
        done = self._progress.done + 1
        total = max(done, self._progress.total)  # a budget of items may buy more trials
        self._progress = Progress(self._progress.phase, done, 0, total)
        self._tell_progress()

    def _tell_progress(self) -> None:
        now = self._progress
        work = self.evaluations
        self.notify(
            "on_progress",
            Progress(now.phase, now.done, work.running, now.total, work.scored, work.stops),
        )

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
