"""Which items an estimator's trials are scored on, where objectives share them or trials race."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from toy_study import OBJECTIVES, ToyStudyWorker, toy_splits, toy_study

from evomerge.errors import InputError
from evomerge.estimate import Answers, Endpoint, Estimation, mean_of
from evomerge.estimation import Preparation
from evomerge.fitness.aggregate import Aggregate, MeanEstimator
from evomerge.item_cache import Items
from evomerge.pool import SerialPool
from evomerge.study_view import StudyState
from evomerge.trial import Failure, Score

IDS = tuple(f"i{number}" for number in range(60))
TASKS = {item: f"task{number % 60 // 20}" for number, item in enumerate(IDS)}
NAMES = ("right", "length")


def endpoints(order: tuple[str, ...]) -> list[Endpoint]:
    """Three models: shares of right answers with margins, and lengths without."""
    draw = random.Random(0)
    found = []
    for label in ("base", "expert:a", "expert:b"):
        margins = tuple(draw.gauss(0, 1) for _ in IDS)
        answers = {
            "right": Answers(IDS, tuple(float(margin > 0) for margin in margins), margins),
            "length": Answers(IDS, tuple(float(draw.randrange(5, 90)) for _ in IDS)),
        }
        found.append(Endpoint(label, tuple(answers[name] for name in order)))
    return found


def preparation(design: str, order: tuple[str, ...] = NAMES, strata: bool = False) -> Preparation:
    return Preparation(
        "soft_reg", design, 24, 7, order, (Aggregate(strata=TASKS if strata else {}),) * len(order),
        ("task",) * len(order), {}, tuple(name == "right" for name in order),
    )  # fmt: skip


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_a_mean_is_not_taken_of_items_that_were_picked_for_another_objective(
    order: tuple[str, ...],
) -> None:
    items, _ = preparation("value_optimal_margins", order)(endpoints(order))
    by_chance, _ = preparation("random", order)(endpoints(order))
    assert items[0] == items[1], "they share their items"
    assert items == by_chance
    alone, _ = preparation("value_optimal_margins", ("right",))(endpoints(("right",)))
    assert set(alone[0]) != set(by_chance[0]), "alone it has the items that tell most"


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
def test_items_by_task_stand_for_the_rest_whoever_comes_first(order: tuple[str, ...]) -> None:
    items, estimator = preparation("stratified", order, strata=True)(endpoints(order))
    assert items[0] == items[1]
    tasks = [TASKS[item] for item in items[0]]
    assert [tasks.count(f"task{number}") for number in range(3)] == [8, 8, 8]
    length = order.index("length")
    answers = Answers(items[length], tuple(float(number) for number in range(24)))
    assert estimator.estimate(length, answers).value == pytest.approx(11.5)


def test_what_is_left_to_the_mean_has_the_error_of_its_draw() -> None:
    """Without the correction it was that of items from nowhere, as if nothing had been seen."""
    items, estimator = preparation("random", ("length",))(endpoints(("length",)))
    scores = tuple(float(number) for number in range(24))
    found = estimator.estimate(0, Answers(items[0], scores))
    assert found.standard_error == pytest.approx(mean_of(scores, 60)[1])
    assert found.standard_error == pytest.approx(mean_of(scores)[1] * math.sqrt(36 / 60))
    every = estimator.estimate(0, Answers(IDS, tuple(float(number) for number in range(60))))
    assert every.standard_error == 0.0


@pytest.mark.parametrize("design", ["random", "stratified", "value_optimal_margins"])
def test_later_draws_are_others_of_the_same_size(design: str) -> None:
    prepare = preparation(design, ("right",), strata=True)
    draws = [prepare(endpoints(("right",)), draw)[0] for draw in range(4)]
    assert draws[0] == prepare(endpoints(("right",)))[0]
    assert draws == [prepare(endpoints(("right",)), draw)[0] for draw in range(4)]
    assert len({frozenset(ids) for (ids,) in draws}) == 4
    assert {len(ids) for (ids,) in draws} == {24}
    raced = replace(prepare, raced=True)
    assert sorted(raced(endpoints(("right",)), 2)[0][0]) == sorted(draws[2][0])


def test_a_draw_is_estimated_with_its_own_weights() -> None:
    """Unequal chances: an item's weight belongs to the draw, and no other draw knows it."""
    prepare = replace(preparation("disagreement", ("right",)), name="anchor")
    made = [prepare(endpoints(("right",)), draw) for draw in (0, 1)]
    for (ids,), estimator in made:
        scores = tuple(float(number % 2) for number in range(24))
        assert 0.0 < estimator.estimate(0, Answers(ids, scores)).value < 1.0
    other = next(item for item in made[1][0][0] if item not in made[0][0][0])
    with pytest.raises(InputError, match=f"item '{other}' has no weight"):
        made[0][1].estimate(0, Answers((other,), (1.0,)))


def test_the_first_items_of_a_race_are_of_several_tasks() -> None:
    whole = preparation("stratified", ("right",), strata=True)
    ((plain,), _), ((raced,), _) = (
        one(endpoints(("right",))) for one in (whole, replace(whole, raced=True))
    )
    assert sorted(raced) == sorted(plain)
    assert {TASKS[item] for item in plain[:8]} == {"task0"}
    assert {TASKS[item] for item in raced[:8]} == {"task0", "task1", "task2"}
    best = preparation("value_optimal_margins", ("right",))
    assert replace(best, raced=True)(endpoints(("right",)))[0] == best(endpoints(("right",)))[0]


def test_a_study_goes_on_where_scores_do_not_go_with_margins(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Which only the scored endpoints can show, after they were paid for."""
    against = [
        replace(one, answers=(replace(a, scores=tuple(1.0 - score for score in a.scores)),))
        for one in endpoints(("right",))
        for a in one.answers
    ]
    with caplog.at_level(logging.WARNING):
        items, estimator = preparation("value_optimal_margins", ("right",))(against)
    assert "right: soft_reg cannot be used" in caplog.text
    assert "do not go up with their margins" in caplog.text
    assert items == preparation("random", ("right",))(endpoints(("right",)))[0]
    scores = tuple(float(number % 3 == 0) for number in range(24))
    found = estimator.estimate(0, Answers(items[0], scores, tuple(score - 2 for score in scores)))
    assert found.value == pytest.approx(8 / 24)
    assert found.standard_error > 0


class EndlessMargins(ToyStudyWorker):
    """Its margins are no numbers where a merge is heavy; its scores are."""

    def _score(self, row: Sequence[float], items: Items) -> list[Score]:
        (asked,) = items
        heavy = row[0] > 0.75 and row[1] != 0
        drawn = [random.Random(f"{row} {item}").gauss(row[0], 1) for item in asked]
        scores = tuple(float(margin > 0) for margin in drawn)
        margins = (float("inf"),) * len(asked) if heavy else tuple(drawn)
        return [Score(fmean(scores) if scores else 0.0, 0.0, scores, margins)]


def test_a_merge_without_finite_margins_ended_the_study(tmp_path: Path) -> None:
    view = toy_study(
        tmp_path / "s",
        objectives=OBJECTIVES[:1],
        splits=toy_splits(1, 60),
        estimator=MeanEstimator([Aggregate()]),
        estimation=Estimation(
            "soft_reg", preparation("value_optimal_margins", ("right",)), full_every=5
        ),
        make_pool=lambda: SerialPool(lambda: EndlessMargins(tmp_path / "log", 10.0, 0.0)),
    ).run()
    assert view.state is StudyState.FINISHED
    failures = [trial.failure for trial in view.trials if trial.failure is not None]
    assert failures
    assert all(isinstance(one, Failure) and "no margins" in one.message for one in failures)
    assert all(
        trial.recipe.table[0][0] <= 0.75
        for trial in view.trials
        if trial.kind == "search" and trial.failure is None
    )
