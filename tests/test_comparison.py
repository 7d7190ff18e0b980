from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_study import finished, small_study

from evomerge.comparison import aggregates_from, paired_difference
from evomerge.facts import front_facts
from evomerge.fitness.aggregate import Aggregate
from evomerge.gain import gains
from evomerge.terminal import front_table, gains_table
from evomerge.trial import Direction, Evaluation, Objective, Score

Floats = NDArray[np.float64]


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


def bootstrap(
    aggregate: Aggregate, ids: Sequence[str], ours: Floats, theirs: Floats, draws: int = 1500
) -> float:
    """Return the standard error by drawing the items of each stratum again, in pairs."""
    draw = np.random.default_rng(1)
    strata: dict[str, list[int]] = {}
    for place, item in enumerate(ids):
        strata.setdefault(aggregate.strata.get(item, ""), []).append(place)
    values = []
    for _ in range(draws):
        picked = np.concatenate([draw.choice(rows, len(rows)) for rows in strata.values()])
        names = [ids[place] for place in picked]
        pair = [aggregate.estimate(names, list(row[picked]))[0] for row in (ours, theirs)]
        values.append(pair[0] - pair[1])
    return float(np.std(values))


def kinds(count: int) -> dict[str, Aggregate]:
    draw = np.random.default_rng(0)
    names = [f"i{place}" for place in range(count)]
    words = {name: float(draw.integers(1, 40)) for name in names}
    tasks = {name: "large" if place % 4 else "small" for place, name in enumerate(names)}
    return {
        "mean": Aggregate(),
        "weighted": Aggregate(weights=words),
        "perplexity": Aggregate("exp", words),
        "bits": Aggregate("bits", words),
        "group": Aggregate(strata=tasks),
        "group of perplexities": Aggregate("exp", words, tasks),
    }


@pytest.mark.parametrize("kind", kinds(4))
def test_the_error_is_that_of_a_paired_bootstrap(kind: str) -> None:
    count = 160
    aggregate = kinds(count)[kind]
    ids = tuple(f"i{place}" for place in range(count))
    draw = np.random.default_rng(2)
    theirs = draw.gamma(4.0, 0.5, count)
    ours = theirs - 0.1 + draw.normal(0, 0.3, count)  # most of the spread is common to both
    mine, other = (evaluation(tuple(map(float, row))) for row in (ours, theirs))
    found = paired_difference(ONE, mine, other, (ids,), (aggregate,))
    values = [aggregate.estimate(ids, list(row))[0] for row in (ours, theirs)]
    assert found.value == pytest.approx(values[0] - values[1])
    wanted = bootstrap(aggregate, ids, ours, theirs)
    assert found.standard_error == pytest.approx(wanted, rel=0.1)
    alone = aggregate.estimate(ids, list(ours))[1]
    assert found.standard_error < 0.7 * alone, "a difference of pairs is surer than either value"


@pytest.mark.parametrize("kind", kinds(4))
def test_effects_square_to_the_error_of_the_value(kind: str) -> None:
    aggregate, ids = kinds(24)[kind], [f"i{place}" for place in range(24)]
    scores = list(np.random.default_rng(3).random(24))
    effects = aggregate.effects(ids, scores)
    assert sum(e**2 for e in effects) == pytest.approx(aggregate.estimate(ids, scores)[1] ** 2)
    assert aggregate.of_single_items(ids, effects) == 0


def test_strata_of_single_items_spread_as_the_others_do() -> None:
    ids = ["a", "b", "c", "d", "e"]
    scores = [0.0, 1.0, 3.0, 0.5, 2.5]
    mixed = Aggregate(strata=dict(zip(ids, "xxyzz", strict=True)))
    alone = Aggregate(strata={item: item for item in ids})
    for one in (mixed, alone):
        effects = one.effects(ids, scores)
        variance = sum(e**2 for e in effects) + one.of_single_items(ids, effects)
        assert variance == pytest.approx(one.estimate(ids, scores)[1] ** 2)


def test_two_metrics_of_the_same_items_counted_as_independent() -> None:
    two = (Objective("acc"), Objective("acc_norm"))
    ours = evaluation((1.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 1.0))
    theirs = evaluation((0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 0.0))
    shared = paired_difference(two, ours, theirs, (("a", "b", "c", "d"),) * 2)
    alone = [evaluation(one.scores[0].items) for one in (ours, theirs)]
    single = paired_difference(two[:1], alone[0], alone[1])
    assert shared.standard_error == pytest.approx(single.standard_error)
    apart = paired_difference(two, ours, theirs)
    assert apart.standard_error == pytest.approx(single.standard_error / 2**0.5)


def test_items_of_two_tasks_with_the_same_ids_counted_as_one() -> None:
    two = (Objective("maths"), Objective("code"))
    ours = evaluation((1.0, 0.0, 1.0, 1.0), (1.0, 0.0, 1.0, 1.0))
    theirs = evaluation((0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 0.0))
    # Ids are places in a task: "2" and "3" are other questions there.
    drawn = paired_difference(two, ours, theirs, (("0", "1", "2", "3"), ("2", "3", "5", "8")))
    assert drawn == paired_difference(two, ours, theirs)


def test_gains_are_compared_as_the_journal_says(tmp_path: Path) -> None:
    plain = finished(tmp_path / "plain", objectives=3)
    assert "aggregates" not in plain.contract
    aggregates = (Aggregate(), Aggregate(), Aggregate("exp"))
    study = small_study(tmp_path / "odd", objectives=3)
    study.aggregates = aggregates
    odd = study.run()
    assert aggregates_from(odd.contract["aggregates"]) == aggregates
    pairs = list(zip(gains(plain), gains(odd), strict=True))
    assert all(before.objective == after.objective for before, after in pairs)
    for before, after in pairs:
        if before.objective != "nll" or before.difference.value == 0:
            assert after.difference == before.difference
    changed = [pair for pair in pairs if pair[0].objective == "nll" and pair[0].difference.value]
    assert changed, "the test must see a difference"
    for before, after in changed:
        assert after.difference.value != pytest.approx(before.difference.value)


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
