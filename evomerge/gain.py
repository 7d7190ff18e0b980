"""The reported merges in order, and what the recommended one gains over the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.comparison import Difference, aggregates_from, paired_difference
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Objective, Trial


def front_rows(
    view: StudyView, scores: Mapping[int, Evaluation | None] | None = None
) -> list[Trial]:
    """Return the front, best mean first, then base, experts, uniform and the best grid point.

    Args:
        view: the study.
        scores: evaluations whose means order the front; those that decided it where absent.
    """
    front = [view.trial(number) for number in view.front]
    shown = [t for t in view.baselines if not t.label.startswith("task_arithmetic:")]
    best = best_task_arithmetic(view)
    shown += [best] if best is not None else []
    deciding = {number: view.scores(number) for number in view.front}
    front.sort(key=lambda trial: -_mean(view, {**deciding, **(scores or {})}[trial.number]))
    return front + [trial for trial in shown if trial.number not in view.front]


def best_task_arithmetic(view: StudyView) -> Trial | None:
    """Return the best single-coefficient merge, chosen on validation items, never on test."""
    return _best_baseline(view, "task_arithmetic:")


def best_expert(view: StudyView) -> Trial | None:
    """Return the best single expert, chosen on validation items, never on test."""
    return _best_baseline(view, "expert:")


def _best_baseline(view: StudyView, prefix: str) -> Trial | None:
    found = [
        trial
        for trial in view.baselines
        if trial.label.startswith(prefix) and view.scores(trial.number) is not None
    ]
    return max(found, key=lambda trial: mean_score(view, trial.number), default=None)


def mean_score(view: StudyView, number: int) -> float:
    """Return the weighted mean over the objectives on the deciding split; larger is better."""
    return _mean(view, view.scores(number))


def _mean(view: StudyView, evaluation: Evaluation | None) -> float:
    if evaluation is None:
        return float("-inf")
    pairs = list(zip(view.objectives, evaluation.values, strict=True))
    return -sum(o.weight * o.loss(v) for o, v in pairs) / sum(o.weight for o, _ in pairs)


def trial_name(trial: Trial) -> str:
    """Return what a reader calls the trial."""
    return trial.label or f"trial {trial.number}"


@dataclass(frozen=True, slots=True)
class Gain:
    """What the recommended merge gains over a baseline.

    Attributes:
        against: name of the baseline.
        objective: name of the objective, empty for the mean of all.
        difference: positive where the recommended merge is better.
    """

    against: str
    objective: str
    difference: Difference


def one_unit(objectives: Sequence[Objective]) -> bool:
    """Return whether gains in the objectives can be averaged."""
    return len({objective.unit for objective in objectives}) == 1


def gains(view: StudyView) -> list[Gain]:
    """Return what the recommended merge gains over each baseline shown, paired, on test items.

    In the mean of the objectives where they have one unit and items, else in each of them.
    """
    if view.knee is None or view.knee not in view.test:
        return []
    ours = view.test[view.knee]
    rivals = [
        trial
        for trial in front_rows(view)
        if trial.kind == "baseline" and trial.number != view.knee and trial.number in view.test
    ]
    columns = range(len(view.objectives))
    items = view.items_of("test", view.knee)
    # Studies that were begun before it was written down are compared by plain means.
    aggregates = aggregates_from(view.contract.get("aggregates"))
    # A distance is no mean over items: added to a mean gain it would leave that without an error.
    together = one_unit(view.objectives) and all(len(score.items) > 1 for score in ours.scores)
    groups = [list(columns)] if together else [[column] for column in columns]
    return [
        Gain(
            trial_name(trial),
            view.objectives[group[0]].name if len(groups) > 1 else "",
            paired_difference(
                [view.objectives[column] for column in group],
                _columns(ours, group),
                _columns(view.test[trial.number], group),
                tuple(items[column] for column in group),
                [aggregates[column] for column in group] if aggregates else (),
            ),
        )
        for trial in rivals
        for group in groups
    ]


def _columns(evaluation: Evaluation, columns: Sequence[int]) -> Evaluation:
    return Evaluation(tuple(evaluation.scores[column] for column in columns), {})
