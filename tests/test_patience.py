"""The limit of a job follows what others took."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from evomerge.patience import FACTOR, FLOOR_SECONDS, LEAST, Patience
from evomerge.testing_pool import toy_recipe
from evomerge.trial import Evaluation, Job, Score


def _job(items: int) -> Job:
    return Job(0, toy_recipe(0.0), (tuple(map(str, range(items))),))


def _done(items: int) -> Evaluation:
    return Evaluation((Score(0.0, 0.0, (0.0,) * items),), {})


def test_nothing_is_known_before_a_few_jobs_are_done() -> None:
    patience = Patience("auto")
    for _ in range(LEAST - 1):
        patience.observe(_done(10), 5.0)
        assert patience.limit(_job(10)) == math.inf
    patience.observe(_done(10), 5.0)
    assert patience.limit(_job(10)) == FLOOR_SECONDS


def test_the_limit_is_a_multiple_of_the_median() -> None:
    patience = Patience("auto")
    for seconds in (100.0, 100.0, 110.0, 120.0, 9000.0):  # one straggler changes nothing
        patience.observe(_done(10), seconds)
    assert patience.limit(_job(10)) == pytest.approx(FACTOR * 110.0)
    assert patience.limit(_job(50)) == pytest.approx(FACTOR * 110.0 * 5), "five times the items"
    assert patience.limit(_job(1)) == pytest.approx(FACTOR * 110.0), "the merge takes its time"


def test_a_race_that_ended_early_does_not_shorten_the_limit() -> None:
    patience = Patience("auto")
    for _ in range(LEAST):
        patience.observe(_done(10), 60.0)
    assert patience.limit(_job(100)) == pytest.approx(FACTOR * 600.0)


def test_what_lay_in_a_spool_does_not_shorten_the_limit() -> None:
    patience = Patience("auto")
    measured = replace(_done(10), seconds={"merge": 100.0, "score": 500.0})
    for _ in range(LEAST):
        patience.observe(measured, 0.01)  # it came back at once
    assert patience.limit(_job(10)) == pytest.approx(FACTOR * 600.0)


def test_finalists_with_more_of_the_slow_items_have_the_time_for_them() -> None:
    patience = Patience("auto")
    both = Evaluation(tuple(Score(0.0, 0.0, (0.0,) * count) for count in (1000, 10)), {})
    for _ in range(LEAST):
        patience.observe(both, 1000 * 0.01 + 10 * 30.0)
    job = replace(_job(200), items=_job(200).items * 2)
    assert patience.limit(job) > 200 * 0.01 + 200 * 30.0
    assert patience.limit(replace(job, items=(job.items[0], ()))) == FACTOR * 310.0


def test_an_objective_that_was_never_scored_has_no_limit() -> None:
    patience = Patience("auto")
    for _ in range(LEAST):
        patience.observe(Evaluation((Score(0.0, 0.0, (0.0,)), Score(0.0, 0.0, ())), {}), 1.0)
    assert patience.limit(replace(_job(1), items=(("a",), ()))) == FLOOR_SECONDS
    assert patience.limit(replace(_job(1), items=(("a",), ("b",)))) == math.inf


def test_the_median_runs() -> None:
    patience = Patience("auto")
    for seconds in (*[1000.0] * 100, *[100.0] * 80):
        patience.observe(_done(10), seconds)
    assert patience.limit(_job(10)) == pytest.approx(FACTOR * 100.0)


@pytest.mark.parametrize(("timeout", "limit"), [(7.5, 7.5), (None, math.inf)])
def test_a_given_limit_stays(timeout: float | None, limit: float) -> None:
    patience = Patience(timeout)
    for _ in range(2 * LEAST):
        patience.observe(_done(10), 500.0)
    assert patience.limit(_job(10)) == limit
