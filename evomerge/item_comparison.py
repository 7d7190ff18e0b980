"""Trials of a study item by item: paired differences, intervals, exact tests, items that flip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from evomerge.comparison import aggregates_from, paired_difference
from evomerge.errors import InputError
from evomerge.fitness.aggregate import Aggregate
from evomerge.gain import front_rows, one_unit, trial_name
from evomerge.paired_tests import (
    DRAWS,
    LEVEL,
    Resampling,
    bootstrap,
    holm,
    interval,
    mcnemar,
    t_test,
)
from evomerge.picking import pick_trial
from evomerge.study_record import Split
from evomerge.study_view import StudyView
from evomerge.trial import Direction, Evaluation, Objective, Score

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: The first of these on which both trials were scored is compared, see ``compare_trials``.
COMPARED: tuple[Split, ...] = ("test", "validation", "search")


@dataclass(frozen=True, slots=True)
class ItemChange:
    """One item that two trials answer differently.

    Attributes:
        item: its id.
        ours: score of the first trial.
        theirs: score of the other.
    """

    item: str
    ours: float
    theirs: float


@dataclass(frozen=True, slots=True)
class Pairing:
    """Two trials in one objective, or in the mean of all.

    Attributes:
        ours: number of the first trial.
        theirs: number of the other.
        objective: its name; empty for the mean of all.
        split: the items are of.
        items: how many both were scored on; of the mean, the fewest of an objective.
        values: of both trials on these items.
        difference: positive where the first trial is better.
        standard_error: of ``difference``, from paired items; None where there is nothing to draw.
        interval: percentile interval of the paired bootstrap; None as for ``standard_error``.
        better: items on which the first trial is better.
        worse: items on which it is worse.
        test: ``mcnemar`` (exact) where all scores are 0 or 1, else ``t`` (paired differences).
        p: its two-sided p-value; None where there is nothing to test.
        adjusted: ``p`` after Holm's correction for all tests of the comparison; None as ``p``.
        changes: items with another score, the largest differences first.
    """

    ours: int
    theirs: int
    objective: str
    split: Split
    items: int
    values: tuple[float, float]
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None
    better: int
    worse: int
    test: str
    p: float | None
    adjusted: float | None = None
    changes: tuple[ItemChange, ...] = ()

    @property
    def clear(self) -> bool:
        """Whether the corrected test says that the trials differ, at five percent."""
        return self.adjusted is not None and self.adjusted < 1 - LEVEL


@dataclass(frozen=True, slots=True)
class Comparison:
    """One trial against some others.

    Attributes:
        names: what a reader calls each trial, by number; the first one comes first.
        pairings: by the other trial, then by objective, the mean last.
    """

    names: dict[int, str]
    pairings: tuple[Pairing, ...]

    @property
    def first(self) -> int:
        """Number of the trial that the others are compared with."""
        return next(iter(self.names))


def find_trial(view: StudyView, word: str) -> int:
    """Return the number of the trial that ``word`` names.

    Args:
        view: the study.
        word: a trial number, the label of a baseline (``base``, ``expert:math``, ``uniform``,
            ``task_arithmetic:0.5``) or a choice of ``evomerge.picking``, such as ``knee``.

    Raises:
        InputError: it names none.
        NothingUsableError: a choice from a front that is empty.
    """
    if word.lstrip("-").isdigit():
        return view.trial(int(word)).number
    labels = {trial.label: trial.number for trial in view.baselines}
    if word in labels:
        return labels[word]
    if word in ("knee", "hv") or word.startswith(("best:", "asf:")):
        return pick_trial(view, word)
    ends = [label for label in labels if label.partition(":")[2] == word]
    near = ends or get_close_matches(word, [*labels, "knee"], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    scales = [label for label in labels if label.startswith("task_arithmetic:")]
    shown = [label for label in labels if label not in scales[1:]]
    raise InputError(
        f"{word!r} names no trial of {view.directory}{hint}; expected a number from 0 to "
        f"{len(view.trials) - 1}, knee, hv, best:OBJECTIVE, asf:W1,W2,..., or a baseline: "
        f"{', '.join(shown)}{', ...' * (len(scales) > 1)}"
    )


def rivals_of(view: StudyView, number: int) -> list[int]:
    """Return the baselines that a trial is compared with where nobody says which."""
    return [t.number for t in front_rows(view) if t.kind == "baseline" and t.number != number]


def compare_trials(
    view: StudyView, numbers: Sequence[int], split: Split | None = None, draws: int = DRAWS
) -> Comparison:
    """Compare the first of some trials with each other one, on the items that both were scored on.

    Standard errors carry the paired differences through what makes values of item scores
    (``paired_difference``). The interval is the percentile interval of a bootstrap that draws
    the items of each task again, in pairs. Scores of 0 and 1 are tested by McNemar's exact test:
    of the items that flip, as many go either way. Other scores are tested by Student's t of the
    difference over its standard error. p-values are corrected for all tests together (Holm 1979).

    Args:
        view: the study.
        numbers: of the trials, at least two, each once.
        split: which items; None for test items where both have scores on them, else validation
            items, else search items.
        draws: of the bootstrap.

    Raises:
        InputError: fewer than two trials, one twice, or one without scores on such items.
    """
    if len(numbers) < 2:
        raise InputError("compare: give at least two trials")
    if len(set(numbers)) < len(numbers):
        twice = next(n for n in numbers if list(numbers).count(n) > 1)
        raise InputError(f"compare: trial {twice} ({trial_name(view.trial(twice))}) is named twice")
    names = {number: _name(view, number) for number in numbers}
    resampling = Resampling(draws)
    pairings = [
        pairing
        for number in numbers[1:]
        for pairing in _compare(view, numbers[0], number, split, resampling)
    ]
    corrected = iter(holm([one.p for one in pairings if one.p is not None]))
    return Comparison(
        names,
        tuple(one if one.p is None else replace(one, adjusted=next(corrected)) for one in pairings),
    )


def _name(view: StudyView, number: int) -> str:
    name = trial_name(view.trial(number))
    return f"{name} (knee)" if number == view.knee else name


def _scored(view: StudyView, split: Split, number: int) -> Evaluation | None:
    if split == "search":
        return view.trials[number].evaluation
    return (view.test if split == "test" else view.validation).get(number)


def _common_split(view: StudyView, pair: Sequence[int], wanted: Split | None) -> Split:
    for split in COMPARED if wanted is None else (wanted,):
        if all(_scored(view, split, number) is not None for number in pair):
            return split
    for number in pair:
        if _scored(view, wanted or "search", number) is None:
            failure = view.trials[number].failure
            why = f": it failed ({failure.message})" if failure is not None else ""
            raise InputError(
                f"compare: trial {number} has no scores on {wanted or 'search'} items{why}"
            )
    raise AssertionError("some split was missing")


def _compare(
    view: StudyView, ours: int, theirs: int, wanted: Split | None, resampling: Resampling
) -> list[Pairing]:
    split = _common_split(view, (ours, theirs), wanted)
    aggregates = aggregates_from(view.contract.get("aggregates")) or (Aggregate(),) * len(
        view.objectives
    )
    columns = _common_items(view, split, ours, theirs)
    found, sampled = [], []
    for objective, aggregate, (ids, mine, other) in zip(
        view.objectives, aggregates, columns, strict=True
    ):
        if not ids:
            raise InputError(
                f"compare: trials {ours} and {theirs} were scored on different {split} items of "
                f"{objective.name}"
            )
        samples = bootstrap(objective, aggregate, ids, mine, other, resampling)
        sampled.append(samples)
        one = _pairing(objective, aggregate, ids, mine, other, samples)
        found.append(replace(one, ours=ours, theirs=theirs, split=split))
    if len(found) > 1 and one_unit(view.objectives) and all(one.items > 1 for one in found):
        pairs = [_evaluations(mine, other) for _, mine, other in columns]
        whole = paired_difference(
            view.objectives,
            Evaluation(tuple(one.scores[0] for one, _ in pairs), {}),
            Evaluation(tuple(other.scores[0] for _, other in pairs), {}),
            tuple(ids for ids, _, _ in columns),
            aggregates,
        )
        found.append(
            Pairing(
                ours, theirs, "", split, whole.items,
                (_mean([one.values[0] for one in found]), _mean([one.values[1] for one in found])),
                whole.value,
                whole.standard_error if whole.comparable else None,
                interval(_rows_mean(sampled)) if whole.comparable else None,
                sum(one.better for one in found), sum(one.worse for one in found),
                "t", t_test(whole.value, whole.standard_error, whole.items),
            )
        )  # fmt: skip
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _rows_mean(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    import numpy as np

    total: NDArray[np.float64] = np.sum(rows, axis=0, dtype=np.float64)
    return total / len(rows)


def _common_items(
    view: StudyView, split: Split, ours: int, theirs: int
) -> list[tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]]:
    """Return ids and both trials' scores of each objective [m], in the order of the first."""
    scores = []
    for number in (ours, theirs):
        evaluation = _scored(view, split, number)
        assert evaluation is not None
        # A race may have stopped before the end of the items: the scores are those of the first.
        scores.append(
            [
                dict(zip(ids, score.items, strict=False))
                for ids, score in zip(view.items_of(split, number), evaluation.scores, strict=True)
            ]
        )
    columns = []
    for mine, other in zip(*scores, strict=True):
        ids = tuple(item for item in mine if item in other)
        columns.append((ids, tuple(mine[i] for i in ids), tuple(other[i] for i in ids)))
    return columns


def _evaluations(mine: Sequence[float], other: Sequence[float]) -> tuple[Evaluation, Evaluation]:
    def one(scores: Sequence[float]) -> Evaluation:
        return Evaluation((Score(_mean(scores), 0.0, tuple(scores)),), {})

    return one(mine), one(other)


def _pairing(
    objective: Objective,
    aggregate: Aggregate,
    ids: tuple[str, ...],
    mine: tuple[float, ...],
    other: tuple[float, ...],
    samples: NDArray[np.float64],
) -> Pairing:
    """Return the comparison in one objective; trials and split are filled in by the caller."""
    sign = 1.0 if objective.direction is Direction.MAXIMIZE else -1.0
    found = paired_difference((objective,), *_evaluations(mine, other), (ids,), (aggregate,))
    triples = list(zip(ids, mine, other, strict=True))
    better = sum(sign * (a - b) > 0 for _, a, b in triples)
    worse = sum(sign * (a - b) < 0 for _, a, b in triples)
    # A task's own weights make more of one item than of another, and flips count all the same.
    solved = set(mine) | set(other) <= {0.0, 1.0} and aggregate == Aggregate()
    if len(ids) < 2:
        p = None
    elif solved:
        p = mcnemar(better, worse)
    else:
        p = t_test(found.value, found.standard_error, len(ids))
    changes = [ItemChange(item, a, b) for item, a, b in triples if a != b]
    changes.sort(key=lambda one: -abs(one.ours - one.theirs))  # stable: equal ones keep their order
    return Pairing(
        0, 0, objective.name, "search", len(ids),
        (aggregate.estimate(ids, mine)[0], aggregate.estimate(ids, other)[0]),
        found.value,
        found.standard_error if found.comparable else None,
        interval(samples) if found.comparable else None,
        better, worse, "mcnemar" if solved else "t", p, None, tuple(changes),
    )  # fmt: skip
