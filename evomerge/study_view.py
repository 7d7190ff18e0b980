"""Reads a study from its journal: no lock, no searcher, no models."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import InputError, StorageError, suggest
from evomerge.feasibility import best_rows, violation
from evomerge.growing_front import GrowingFront, reference_point
from evomerge.item_cache import Items
from evomerge.journal import is_locked, read
from evomerge.pareto import knee
from evomerge.restart_record import restart_note
from evomerge.study_record import History, Reading, Result, Split, distinct, objective_from
from evomerge.trial import Evaluation, Objective, Trial, TrialState
from evomerge.valuation import ESTIMATE, SUBSET_MEAN


class StudyState(StrEnum):
    """Where a study stands."""

    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Counts:
    """How many trials there are of each sort; ``asked`` is all of them.

    Attributes:
        asked: done, failed and waiting ones.
        done: with an evaluation.
        failed: without.
        waiting: asked, no result yet.
        reused: done with the evaluation of an equal recipe.
        budget: search trials that were planned; baselines come on top.
    """

    asked: int
    done: int
    failed: int
    waiting: int
    reused: int
    budget: int


@dataclass(frozen=True, slots=True)
class Spending:
    """Item evaluations: what workers did, and what was not needed.

    Attributes:
        baselines: of baselines on the search items.
        calibration: of an estimator's merges by chance on the search items.
        search: of the search, finalists that were completed included.
        held_out: on validation and test items.
        saved: of the search, beside scoring each trial on all search items.
        stops: trials that a race stopped early.
    """

    baselines: int
    calibration: int
    search: int
    held_out: int
    saved: int
    stops: int

    @property
    def scored(self) -> int:
        """All that workers did."""
        return self.baselines + self.calibration + self.search + self.held_out


@dataclass(frozen=True, slots=True)
class Audit:
    """A trial that an estimated study scored in full.

    Attributes:
        number: of the trial.
        full: values over all search items [m].
        estimate: what the estimator says from the items of its design.
        mean: the plain mean of the same items.
    """

    number: int
    full: tuple[float, ...]
    estimate: Reading
    mean: Reading


@dataclass(frozen=True)
class StudyView:
    """A study as its journal tells it at one moment.

    Attributes:
        directory: of the study.
        contract: the ``open`` record: identity, items, budget, seed, ...
        objectives: [m].
        trials: by number, without gaps; ``evaluation`` is on the search items: what the searcher
            was told of, or of a finalist that a race had stopped, on all of them.
        results: by split and trial number.
        times: unix seconds at which each trial's result arrived, by number.
        front: trial numbers, ascending; final once the state is FINISHED, before that the
            nondominated trials by search scores. Trials that violate a constraint are on it only
            where nothing is feasible: then it is those that violate least.
        front_split: the split whose scores decided the front.
        knee: the recommended trial; None as long as nothing has succeeded.
        state: running, finished, interrupted, failed.
        message: why it stopped early, else empty.
        facts: about the workers.
        searcher: what the searcher said last of its work, by short names, and where it was replaced
            by a fresh one.
        history: what the journal says, sorted.
    """

    directory: Path
    contract: Mapping[str, Any]
    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    results: Mapping[tuple[Split, int], Result]
    times: Mapping[int, float]
    front: tuple[int, ...]
    front_split: Split
    knee: int | None
    state: StudyState
    message: str
    facts: Mapping[str, str]
    searcher: Mapping[str, str]
    history: History

    @staticmethod
    def load(directory: Path) -> StudyView:
        """Read the study in ``directory``; a record that is being written is not seen yet.

        Raises:
            StorageError: no study there, or its journal is damaged.
        """
        return StudyView.of(History.of(read(directory).records, str(directory)), directory)

    @staticmethod
    def of(history: History, directory: Path) -> StudyView:
        """Return the study that a history tells.

        Args:
            history: read from the journal; the view is of no use once more was added to it.
            directory: of the study.

        Raises:
            StorageError: the history is empty.
        """
        if history.opened is None:
            raise StorageError(f"{directory}: the journal is empty; run the study to begin it")
        contract = {
            key: value
            for key, value in history.opened.items()
            if key not in {"seq", "ev", "t", "schema"}
        }
        objectives = tuple(map(objective_from, contract["objectives"]))
        trials = tuple(_completed(history, trial) for trial in history.trials.values())
        front, split, best = _front(history, objectives, trials)
        return StudyView(
            directory=directory,
            contract=contract,
            objectives=objectives,
            trials=trials,
            results=history.results,
            times=history.times,
            front=front,
            front_split=split,
            knee=best,
            state=_state(history, directory),
            message="" if history.stop is None else history.stop["message"],
            facts=history.facts,
            searcher={**_restarts(history), **history.searcher},
            history=history,
        )

    @cached_property
    def validation(self) -> dict[int, Evaluation]:
        """Evaluations on the validation items by trial number: finalists and baselines."""
        return self._evaluations("validation")

    @cached_property
    def test(self) -> dict[int, Evaluation]:
        """Evaluations on the test items by trial number: front and baselines."""
        return self._evaluations("test")

    def items_of(self, split: Split, number: int) -> Items:
        """Return the items of a trial, in the order of its item scores [m][I]."""
        return self.history.items_of(split, number)

    def told(self, number: int) -> Evaluation:
        """Return the evaluation that the searcher was told of.

        Raises:
            InputError: the trial has none.
        """
        return self.evaluation("search", number)

    def evaluation(self, split: Split, number: int) -> Evaluation:
        """Return the evaluation of a trial on a split.

        Raises:
            InputError: there is none.
        """
        result = self.results.get((split, number))
        if result is None or not isinstance(result.value, Evaluation):
            raise InputError(f"trial {number}: {self.directory} has no scores on {split} items")
        return result.value

    @cached_property
    def spending(self) -> Spending:
        """Item evaluations by what they were for."""
        counts = dict.fromkeys(("baseline", "calibration", "search", "held out"), 0)
        saved = stops = 0
        full = sum(map(len, self.contract["items"]["search"]))
        for (split, number), result in self.results.items():
            trial = self.trials[number]
            kind = "baseline" if trial.kind == "baseline" else trial.label.partition(":")[0]
            if split in ("validation", "test"):
                kind = "held out"
            counts[kind or "search"] += result.fresh
            if kind == "" and isinstance(result.value, Evaluation):
                saved += (full if split == "search" else 0) - result.fresh
                stops += split == "search" and result.rung is not None
        return Spending(
            baselines=counts["baseline"],
            calibration=counts["calibration"],
            search=counts["search"],
            held_out=counts["held out"],
            saved=saved,
            stops=stops,
        )

    @cached_property
    def audits(self) -> tuple[Audit, ...]:
        """The trials of an estimated study that were scored in full, in ask order."""
        return tuple(
            Audit(
                trial.number, self.told(trial.number).values, beside[ESTIMATE], beside[SUBSET_MEAN]
            )
            for trial in self.trials
            if (result := self.results.get(("search", trial.number))) is not None
            and ESTIMATE in (beside := result.beside)
        )

    @property
    def subset_means(self) -> Mapping[int, tuple[float, ...]]:
        """The plain mean of each objective's scored items [m], by trial that was estimated."""
        return {
            number: result.beside[SUBSET_MEAN].values
            for (split, number), result in self.results.items()
            if split == "search" and SUBSET_MEAN in result.beside
        }

    @property
    def violation(self) -> float | None:
        """By how much the recommended trial violates constraints; None without a trial."""
        if self.knee is None:
            return None
        evaluation = self._evaluations(self.front_split)[self.knee]
        return violation(self.objectives, evaluation.values)

    @property
    def feasible(self) -> bool:
        """Whether the recommended trial keeps all constraints; False without a trial."""
        return self.violation == 0

    @property
    def baselines(self) -> tuple[Trial, ...]:
        """The trials that stand for no search."""
        return tuple(trial for trial in self.trials if trial.kind == "baseline")

    @property
    def counts(self) -> Counts:
        """How many trials there are of each sort."""
        states = [trial.state for trial in self.trials]
        return Counts(
            asked=len(states),
            done=states.count(TrialState.DONE),
            failed=states.count(TrialState.FAILED),
            waiting=states.count(TrialState.ASKED),
            reused=sum(
                split == "search" and result.reused is not None
                for (split, _), result in self.results.items()
            ),
            budget=self._planned,
        )

    @property
    def _planned(self) -> int:
        """Search trials up to the last limit; of a budget in items, what it surely buys."""
        planned: int = self.contract["budget"]
        if not self.history.extensions:
            return planned
        last = self.history.extensions[-1]
        if last.trials is not None:
            return last.trials
        assert last.items is not None
        return planned * last.items // int(self.contract["item_budget"])

    def trial(self, number: int) -> Trial:
        """Return one trial.

        Raises:
            InputError: no such trial.
        """
        if not 0 <= number < len(self.trials):
            raise InputError(
                f"trial {number}: {self.directory} has trials 0 to {len(self.trials) - 1}"
            )
        return self.trials[number]

    def scores(self, number: int) -> Evaluation | None:
        """Return the evaluation of a trial that decides: on validation items if it has one."""
        return self.validation.get(number) or self.trials[number].evaluation

    def best(self, objective: str) -> int:
        """Return the front member that is best in one objective (the first of equals).

        Raises:
            InputError: unknown objective, or the front is empty.
        """
        names = [one.name for one in self.objectives]
        if objective not in names:
            raise InputError(f"objective: unknown {objective!r}{suggest(objective, names)}")
        if not self.front:
            raise InputError(f"{self.directory}: no trial has succeeded yet")
        column = names.index(objective)
        evaluations = self._evaluations(self.front_split)
        return min(
            self.front, key=lambda n: _losses(self.objectives, evaluations[n].values)[column]
        )

    @cached_property
    def reference(self) -> tuple[float, ...] | None:
        """Reference point of the hypervolume [m], as losses; None while nothing succeeded.

        Fixed by the baselines, so that every value of a study can be compared: per objective
        the worst baseline plus a tenth of the baselines' spread (of 1 when they are all equal).
        A study without a successful baseline takes its first successful trial as the only one.
        """
        done = [trial for trial in self.trials if trial.evaluation is not None]
        fixed = [trial for trial in done if trial.kind == "baseline"] or done[:1]
        if not fixed:
            return None
        return reference_point([self._search_losses(trial) for trial in fixed])

    def hypervolumes(self) -> tuple[float, ...]:
        """Return the hypervolume of the feasible search scores after each trial [n].

        Trials with scores on a part of their items add nothing: they have been beaten, or left
        behind, and the best of many estimates from a few items is a lucky one.
        """
        front = GrowingFront(self.reference or ())
        values: list[float] = []
        for trial in self.trials:
            if (
                trial.evaluation is not None
                and self.history.rung_of(trial.number) is None
                and violation(self.objectives, trial.evaluation.values) == 0
            ):
                front.add(self._search_losses(trial))
            values.append(front.volume)
        return tuple(values)

    @property
    def hypervolume(self) -> float:
        """The hypervolume of all search scores; 0.0 while nothing succeeded."""
        values = self.hypervolumes()
        return values[-1] if values else 0.0

    def _evaluations(self, split: Split) -> dict[int, Evaluation]:
        if split == "search":
            return {t.number: t.evaluation for t in self.trials if t.evaluation is not None}
        return {
            number: result.value
            for (of, number), result in sorted(self.results.items())
            if of == split and isinstance(result.value, Evaluation)
        }

    def _search_losses(self, trial: Trial) -> tuple[float, ...]:
        assert trial.evaluation is not None
        return _losses(self.objectives, trial.evaluation.values)


def recommended(
    losses: Sequence[tuple[float, ...]], objectives: Sequence[Objective], scalarise: bool
) -> int:
    """Return the row to recommend: the knee, or the best weighted mean of a scalarised study.

    Args:
        losses: [n, m], n >= 1.
        objectives: [m], for their weights.
        scalarise: whether the study searched the weighted mean.
    """
    if not scalarise:
        return knee(losses)
    return min(range(len(losses)), key=lambda row: weighted_mean(losses[row], objectives))


def weighted_mean(losses: Sequence[float], objectives: Sequence[Objective]) -> float:
    """Return the mean of losses [m] by the weights of their objectives; always finite."""
    total = sum(objective.weight for objective in objectives)
    pairs = zip(losses, objectives, strict=True)
    return bounded(sum(loss * (objective.weight / total) for loss, objective in pairs))


def bounded(loss: float) -> float:
    """Return ``loss`` kept finite; sums of finite scores near 1e308 can overflow."""
    return max(-sys.float_info.max, min(sys.float_info.max, loss))


def _losses(objectives: Sequence[Objective], values: Sequence[float]) -> tuple[float, ...]:
    pairs = zip(objectives, values, strict=True)
    return tuple(objective.loss(value) for objective, value in pairs)


def _front(
    history: History, objectives: Sequence[Objective], trials: Sequence[Trial]
) -> tuple[tuple[int, ...], Split, int | None]:
    """Return the recorded front, split and choice, or provisional ones by search scores."""
    assert history.opened is not None
    if history.done is not None:
        return tuple(history.done["front"]), history.done["split"], history.done["knee"]
    done = [trial for trial in trials if trial.evaluation is not None]
    done = [trial for trial in done if history.rung_of(trial.number) is None] or done
    if not done:
        return (), "search", None
    values = [t.evaluation.values for t in done if t.evaluation is not None]
    losses = [_losses(objectives, row) for row in values]
    rows = best_rows(losses, [violation(objectives, row) for row in values])
    front = distinct((done[row].number for row in rows), history.digests)
    best = rows[recommended([losses[row] for row in rows], objectives, history.opened["scalarise"])]
    return tuple(front), "search", done[best].number


def _restarts(history: History) -> dict[str, str]:
    note = restart_note(history.provenance.restarts)
    return {"restarted": note} if note else {}


def _completed(history: History, trial: Trial) -> Trial:
    """Return a trial with its result, on all its items where it has one."""
    settled = history.settled(trial)
    result = history.results.get(("complete", trial.number))
    if result is None or not isinstance(result.value, Evaluation):
        return settled
    return replace(settled, evaluation=result.value)


def _state(history: History, directory: Path) -> StudyState:
    if history.done is not None:
        return StudyState.FINISHED
    if is_locked(directory):
        return StudyState.RUNNING
    if history.stop is not None and history.stop["reason"] in ("failure", "error"):
        return StudyState.FAILED
    return StudyState.INTERRUPTED
