"""What a study's run shows over the trials: best values, hypervolume, rates, audit errors."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from evomerge.feasibility import violation
from evomerge.growing_front import GrowingFront
from evomerge.metric_names import objective_metrics
from evomerge.projection import Step
from evomerge.study_record import History, Split
from evomerge.study_view import StudyView
from evomerge.trial import Trial, TrialState

#: The rate of trials is that of so many last ones.
_RATE_TRIALS = 20


class Series:
    """Steps of one study, one per trial in the order of asking, each computed once."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._history: History | None = None
        self._completed = 0
        self._steps: list[Step] = []
        self._front: GrowingFront | None = None
        self._best: dict[str, float] = {}
        self._audits: dict[str, float] = {}
        self._failed = self._items = self._milliseconds = 0
        self._arrivals: deque[int] = deque(maxlen=_RATE_TRIALS + 1)

    def steps(self, view: StudyView) -> tuple[Step, ...]:
        """Return the steps up to the first trial without a result.

        None before all baselines have one: they fix the hypervolume's reference point. Where the
        journal was read again, or stopped trials were completed, all of it is computed anew.
        """
        completed = sum(split == "complete" for split, _ in view.results)
        if view.history is not self._history or completed != self._completed:
            self._begin()
            self._history, self._completed = view.history, completed
        states = [trial.state for trial in view.trials]
        settled = states.index(TrialState.ASKED) if TrialState.ASKED in states else len(states)
        if settled < max(1, len(view.contract["baselines"])):
            return ()
        self._steps += self._further(view, settled)
        return tuple(self._steps)

    def _further(self, view: StudyView, settled: int) -> Iterator[Step]:
        audited = audit_errors(view)
        for trial in view.trials[len(self._steps) : settled]:
            self._failed += trial.evaluation is None
            self._items += sum(view.results[key].fresh for key in _searched(view, trial.number))
            self._audits = audited.get(trial.number, self._audits)
            # Of many estimates from a few items the best is a lucky one.
            if trial.evaluation is not None and view.history.rung_of(trial.number) is None:
                self._take(view, trial)
            # Results arrive in any order; MLflow draws series over time, so it never runs back.
            arrived = int(view.times[trial.number] * 1000)
            self._milliseconds = max(self._milliseconds, arrived)
            metrics = {
                **self._best, **self._audits,
                "hypervolume": 0.0 if self._front is None else self._front.volume,
                "trials/failed": float(self._failed), "items/scored": float(self._items),
            }  # fmt: skip
            self._arrivals.append(self._milliseconds)
            if self._arrivals[-1] > self._arrivals[0]:
                hours = (self._arrivals[-1] - self._arrivals[0]) / 3.6e6
                metrics["trials/per hour"] = (len(self._arrivals) - 1) / hours
            yield Step(self._milliseconds, metrics)

    def _take(self, view: StudyView, trial: Trial) -> None:
        """Let the values of a trial count for the best values and the hypervolume."""
        assert trial.evaluation is not None
        values = trial.evaluation.values
        names = objective_metrics(view.objectives)
        for objective, metric, value in zip(view.objectives, names, values, strict=True):
            name = f"best/{metric}"
            old = self._best.get(name)
            if old is None or objective.loss(value) < objective.loss(old):
                self._best[name] = value
        self._front = self._front or GrowingFront(view.reference or ())
        if violation(view.objectives, values) == 0:
            pairs = zip(view.objectives, values, strict=True)
            self._front.add(tuple(objective.loss(value) for objective, value in pairs))


def _searched(view: StudyView, number: int) -> list[tuple[Split, int]]:
    """Return under which keys the search's results of a trial are."""
    keys: tuple[Split, ...] = ("search", "part")
    return [(split, number) for split in keys if (split, number) in view.results]


def audit_errors(view: StudyView) -> dict[int, dict[str, float]]:
    """Return how far off the estimates were up to each trial that was scored in full, by trial.

    For each objective the mean absolute error of the estimates, in its unit, and beside it that
    of the plain mean of the same items.
    """
    found: dict[int, dict[str, float]] = {}
    sums: dict[str, float] = {}
    for count, audit in enumerate(view.audits, start=1):
        for column, metric in enumerate(objective_metrics(view.objectives)):
            full = audit.full[column]
            for kind, reading in (("estimate", audit.estimate), ("subset mean", audit.mean)):
                name = f"audit/{kind} error/{metric}"
                sums[name] = sums.get(name, 0.0) + abs(reading.values[column] - full)
        found[audit.number] = {name: total / count for name, total in sums.items()}
    return found
