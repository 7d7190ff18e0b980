"""Where a search starts: recipes of one partition as points of another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.errors import InputError
from evomerge.fitness.splits import ItemSplit
from evomerge.layout import Layout, Slot, SlotKind, canonical, partition
from evomerge.recipe import ModelRef, Recipe
from evomerge.search.protocol import SearchProblem, WarmPoint
from evomerge.search_facts import expected_noise, informed
from evomerge.space import Range, Space
from evomerge.starting import start_baseline, start_point, start_recipe
from evomerge.trial import Direction, Objective


def layout() -> Layout:
    """Two layers of 4 x 2, one of them twice as tall."""
    names = {"model.layers.0.mlp.w.weight": (4, 2), "model.layers.1.mlp.w.weight": (8, 2)}
    return canonical(
        Slot(name, shape, "F32", SlotKind.LINEAR, int(name[13])) for name, shape in names.items()
    )


def space(spec: str, low: float = 0.0, high: float = 1.5) -> Space:
    return Space(
        method="task_arithmetic",
        base=ModelRef("base", "b", "0"),
        experts=[ModelRef("a", "a", "1"), ModelRef("c", "c", "2")],
        partition=partition(layout(), spec),
        layout=layout().digest,
        columns={"weight.a": Range(low, high), "weight.c": Range(low, high), "lambda": 1.0},
        options={},
        seed=0,
        dtype="F32",
    )


def recipe(spec: str, *rows: tuple[float, float]) -> Recipe:
    own = space(spec)
    table = tuple((*row, 1.0) for row in rows)
    return replace(own.decode((0.0,) * own.dimension), table=table)


def decoded(spec: str, given: Recipe) -> list[tuple[float, ...]]:
    own = space(spec)
    found = start_point(given, own, layout(), partition(layout(), spec))
    assert found.averaged == 0.0
    return [tuple(round(value, 12) for value in row[:2]) for row in own.decode(found.x).table]


def test_a_recipe_of_the_same_blocks_is_that_point() -> None:
    assert decoded("layer", recipe("layer", (0.2, 0.4), (0.6, 1.5))) == [(0.2, 0.4), (0.6, 1.5)]


def test_finer_blocks_take_what_they_lie_in() -> None:
    assert decoded("layer", recipe("model", (0.2, 0.4))) == [(0.2, 0.4)] * 2
    assert decoded("chunk(2)", recipe("layer", (0.2, 0.4), (0.6, 1.5))) == [
        (0.2, 0.4), (0.2, 0.4), (0.6, 1.5), (0.6, 1.5),
    ]  # fmt: skip


def test_coarser_blocks_average_by_elements_and_say_how_far_that_is() -> None:
    given = recipe("layer", (0.3, 0.0), (0.6, 0.0))
    own = space("model")
    found = start_point(given, own, layout(), partition(layout(), "model"))
    # The second layer has twice the elements of the first.
    assert own.decode(found.x).table[0][0] == pytest.approx(0.5)
    assert found.averaged == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (replace(recipe("model", (0.2, 0.4)), method="linear"), "its method is linear, the study"),
        (replace(recipe("model", (0.2, 0.4)), layout="other"), "it has another base"),
        (
            replace(recipe("model", (0.2, 0.4)), experts=(ModelRef("a", "a", "9"),)),
            "it has other experts",
        ),
        (recipe("model", (0.2, 1.6)), "weight.c is 1.6 in layer.0, the study searches [0, 1.5]"),
        (
            replace(recipe("model", (0.2, 0.4)), table=((0.2, 0.4, 2.0),)),
            "lambda is 2 in layer.0, the study fixes 1",
        ),
    ],
)
def test_what_is_no_point_of_the_space_is_refused(given: Recipe, message: str) -> None:
    with pytest.raises(InputError) as caught:
        start_point(given, space("layer"), layout(), partition(layout(), "layer"))
    assert message in str(caught.value)


def test_a_start_becomes_a_baseline_that_the_searcher_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text(recipe("model", (0.3, 0.9)).to_json())
    own = space("layer")
    baselines, warnings = start_baseline({"start": "best.json"}, tmp_path, own, layout())
    assert [one.label for one in baselines] == ["start"]
    assert warnings == ()
    assert start_baseline({"sigma": 0.1}, tmp_path, own, layout()) == ((), ())
    x = baselines[0].x
    assert x is not None
    problem = SearchProblem(4, 1, 10, 1, 0, warm=(WarmPoint(x, (0.5,)),))
    told = informed(problem, own, baselines, noise=0.1)
    assert told.start == x
    assert told.warm[0].label == "start"
    assert told.noise == 0.1
    assert told.groups == (
        ("weight.a", "layer.0"), ("weight.c", "layer.0"),
        ("weight.a", "layer.1"), ("weight.c", "layer.1"),
    )  # fmt: skip


def test_a_start_that_is_averaged_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "fine.json").write_text(recipe("layer", (0.3, 0.0), (0.6, 0.0)).to_json())
    _, warnings = start_baseline({"start": "fine.json"}, tmp_path, space("model"), layout())
    assert "averaged (they moved by up to 0.2)" in warnings[0]


@pytest.mark.parametrize("text", ["missing.json", "nowhere:3", "broken.json"])
def test_a_start_that_is_not_there_is_refused_with_the_two_forms(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match=r"give a recipe file, or <study directory>:<trial"):
        start_recipe(text, tmp_path)


def test_an_objective_that_draws_no_items_is_no_noise() -> None:
    score = Objective("score", Direction.MAXIMIZE)
    l2, l1 = (Objective("far", Direction.MINIMIZE, unit) for unit in ("fraction", "coefficients"))
    hundred = ItemSplit(tuple(str(one) for one in range(100)), (), ())
    itself = ItemSplit(("0",), ("0",), ("0",))
    for exact in (l2, l1):
        noise = expected_noise((score, exact), (hundred, itself), ("task", None), None)
        assert noise == pytest.approx(0.05)
    assert expected_noise((score, l2), (hundred, itself), ("task", None), 25) == pytest.approx(0.1)
    assert expected_noise((l2,), (itself,), (None,), None) == 0.0
    assert expected_noise((replace(score, unit="nats"),), (hundred,), ("text",), None) is None
