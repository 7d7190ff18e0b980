"""From a worker's answer to the evaluation that is recorded: the gate, and the estimates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from evomerge.errors import EvaluationError, InputError
from evomerge.estimate import Answers, Estimator
from evomerge.item_cache import Items
from evomerge.study_record import Reading
from evomerge.trial import Evaluation, Failure, Objective, Score

#: What is made of a trial's item scores: their mean; an estimate from a few items; or the mean
#: of all of them, with the estimate from the few beside it.
Mode = Literal["mean", "estimate", "check"]

#: Names of the readings beside a value.
SUBSET_MEAN, ESTIMATE = "subset mean", "estimate"


#: Whatever is larger is an overflow somewhere. Searchers take all such losses for equal, but the
#: front would not.
LARGEST_VALUE = 1e20


def checked(
    result: object,
    objectives: Sequence[Objective],
    items: Items,
    rungs: Sequence[tuple[int, ...]] = (),
) -> Evaluation | Failure:
    """Return a worker's result if it is sound, else a failure; the single gate for values.

    Sound is: one score per objective [m], as many item scores as items were asked for, or as a
    rung of the job's race has, and every number a finite float. Margins, which nobody must
    have, are left out where they are not.

    Args:
        result: what the pool returned.
        objectives: [m].
        items: that were asked for [m][I].
        rungs: numbers of items [m] after which the worker was allowed to stop.
    """
    if isinstance(result, Failure):
        return result
    if not isinstance(result, Evaluation):
        return _bad(f"expected an Evaluation, got {type(result).__name__}")
    if len(result.scores) != len(objectives):
        return _bad(f"expected {len(objectives)} scores, got {len(result.scores)}")
    counts = tuple(len(score.items) for score in result.scores)
    if counts not in (tuple(map(len, items)), *rungs):
        return _bad(_count_problem(objectives, items, counts, rungs))
    scores = []
    for objective, score, asked in zip(objectives, result.scores, items, strict=True):
        try:
            plain = Score(
                float(score.value),
                float(score.standard_error),
                tuple(map(float, score.items)),
                tuple(map(float, score.margins)),
            )
        except (TypeError, ValueError) as error:
            return _bad(f"{objective.name}: a score is not a number: {error}")
        problem = value_problem(objective, plain.value, plain.standard_error)
        if problem:
            return _bad(problem)
        wrong = [
            item
            for item, value in zip(asked, plain.items, strict=False)
            if not math.isfinite(value)
        ]
        if wrong:
            return _bad(f"{objective.name}: item {wrong[0]}: the score is not finite")
        graded = len(plain.margins) == len(plain.items) and all(map(math.isfinite, plain.margins))
        scores.append(
            plain if graded else Score(plain.value, plain.standard_error, plain.items)
        )  # fmt: skip
    # Durations are only for the record: one that makes no sense is dropped, not judged.
    seconds = {
        str(phase): float(value)
        for phase, value in result.seconds.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return Evaluation(tuple(scores), seconds)


def value_problem(objective: Objective, value: float, error: float) -> str:
    """Return what is wrong with the value of an objective, empty where nothing is."""
    if not math.isfinite(value):
        return f"{objective.name}: value {value} is not finite"
    if abs(value) > LARGEST_VALUE:
        return f"{objective.name}: value {value} is beyond {LARGEST_VALUE:g}; no score is so large"
    if not (math.isfinite(error) and error >= 0):
        return f"{objective.name}: standard error {error} is not usable"
    return ""


def _count_problem(
    objectives: Sequence[Objective],
    items: Items,
    counts: Sequence[int],
    rungs: Sequence[tuple[int, ...]],
) -> str:
    if rungs:
        return (
            f"expected item scores up to a rung {[list(rung) for rung in rungs]} [m] of the race, "
            f"got {list(counts)}"
        )
    rows = zip(objectives, items, counts, strict=True)
    wrong = next((one, asked, count) for one, asked, count in rows if len(asked) != count)
    return f"{wrong[0].name}: expected {len(wrong[1])} item scores, got {wrong[2]}"


def _bad(message: str) -> Failure:
    return Failure("bad_result", message)


@dataclass(frozen=True, slots=True)
class Valued:
    """An evaluation with what else was made of its item scores."""

    evaluation: Evaluation
    beside: Mapping[str, Reading]


@dataclass(frozen=True, slots=True)
class Valuation:
    """Turns item scores into values.

    Attributes:
        objectives: [m].
        mean: makes values of scores of all items, or of a sample without a model of the rest.
        estimators: make values of the scores of a design, by its items [m][n].
    """

    objectives: tuple[Objective, ...]
    mean: Estimator
    estimators: Mapping[Items, Estimator] = field(default_factory=dict)

    def value(
        self,
        mode: Mode,
        answers: Sequence[Answers],
        seconds: Mapping[str, float],
        design: Items = (),
    ) -> Valued | Failure:
        """Return the evaluation of item scores.

        Args:
            mode: see ``Mode``; all but ``mean`` need an estimator.
            answers: of each objective [m], in the order of the trial's items.
            seconds: for the record.
            design: the items that an estimator chose for the trial [m][n].

        Returns:
            a failure where a value is no finite number, or the estimator cannot use the answers.
        """
        model = None if mode == "mean" else self.estimators[design]
        estimator = model if mode == "estimate" and model is not None else self.mean
        beside: dict[str, Reading] = {}
        try:
            values = _reading(estimator, answers)
            if mode == "estimate":
                beside[SUBSET_MEAN] = _reading(self.mean, answers)
            elif model is not None:
                few = [_among(one, ids) for one, ids in zip(answers, design, strict=True)]
                beside[SUBSET_MEAN] = _reading(self.mean, few)
                beside[ESTIMATE] = _reading(model, few)
        except (EvaluationError, InputError) as error:
            # Answers that no estimator can use: margins that are not finite, scores out of range.
            return _bad(str(error))
        for reading in (values, *beside.values()):
            rows = zip(self.objectives, reading.values, reading.errors, strict=True)
            for problem in (value_problem(*row) for row in rows):
                if problem:
                    return _bad(problem)
        scores = tuple(
            Score(value, error, one.scores, one.margins)
            for value, error, one in zip(values.values, values.errors, answers, strict=True)
        )
        return Valued(Evaluation(scores, seconds), beside)


def _reading(estimator: Estimator, answers: Sequence[Answers]) -> Reading:
    estimates = [estimator.estimate(objective, one) for objective, one in enumerate(answers)]
    return Reading(
        tuple(float(one.value) for one in estimates),
        tuple(float(one.standard_error) for one in estimates),
    )


def _among(answers: Answers, ids: Sequence[str]) -> Answers:
    """Return the answers to some of the items, in the order of ``ids``."""
    place = {item: index for index, item in enumerate(answers.ids)}
    rows = [place[item] for item in ids]
    return Answers(
        tuple(ids),
        tuple(answers.scores[row] for row in rows),
        tuple(answers.margins[row] for row in rows) if answers.margins else (),
    )
