from __future__ import annotations

from pathlib import Path

import pytest
from small_study import finished

from evomerge.comparison import paired_difference
from evomerge.facts import front_facts, gains
from evomerge.terminal import front_table, gains_table
from evomerge.trial import Direction, Evaluation, Objective, Score


def evaluation(*columns: tuple[float, ...]) -> Evaluation:
    return Evaluation(tuple(Score(sum(c) / len(c), 0.0, c) for c in columns), {})


ONE = (Objective("a"),)
TWO = (Objective("a"), Objective("b", Direction.MINIMIZE))


def test_the_mean_and_its_error_are_those_of_the_paired_differences() -> None:
    ours = evaluation((1.0, 0.0, 1.0), (0.0, 2.0, 1.0))
    theirs = evaluation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    found = paired_difference(TWO, ours, theirs)
    assert found.value == pytest.approx((2 / 3 + 0.0) / 2)
    assert found.standard_error == pytest.approx(((1 / 3 / 3) + (1.0 / 3)) ** 0.5 / 2)
    assert found.items == 3
    assert not found.clear


def test_one_item_was_a_clear_difference() -> None:
    assert not paired_difference(ONE, evaluation((1.0,)), evaluation((0.0,))).clear
    few = paired_difference(TWO, evaluation((1.0, 1.0), (0.0,)), evaluation((0.0, 0.0), (1.0,)))
    assert not few.clear
    assert paired_difference(ONE, evaluation((1.0, 1.0)), evaluation((0.0, 0.0))).clear


def test_values_of_different_units_were_averaged(tmp_path: Path) -> None:
    view = finished(tmp_path / "three", objectives=3)  # two fractions and nats, which are minimised
    assert "mean" not in [column.header for column in front_table(view).columns]
    rows = gains(view)
    assert {gain.objective for gain in rows} == {"reverse", "sort", "nll"}
    assert view.knee is not None
    for gain in rows:
        column = [objective.name for objective in view.objectives].index(gain.objective)
        rival = next(t.number for t in view.baselines if t.label == gain.against)
        ours, theirs = (view.test[n].values[column] for n in (view.knee, rival))
        sign = -1 if gain.objective == "nll" else 1
        assert gain.difference.value == pytest.approx(sign * (ours - theirs))
    facts = front_facts(view)["gains"]
    assert {fact["objective"] for fact in facts} == {"reverse", "sort", "nll"}
    table = gains_table(view)
    assert table is not None
    assert [column.header for column in table.columns][1] == "gain"


def test_values_of_one_unit_have_a_mean(tmp_path: Path) -> None:
    view = finished(tmp_path / "two", objectives=2)
    assert "mean" in [column.header for column in front_table(view).columns]
    assert {gain.objective for gain in gains(view)} == {""}
    assert all("objective" not in fact for fact in front_facts(view)["gains"])
