"""Recipes: identity, JSON, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import ModelRef, Recipe, listed

BASE = ModelRef("base", "models/base", "f0")
EXPERTS = (ModelRef("math", "models/math", "f1"), ModelRef("code", "org/code", "f2"))


def recipe(**changes: object) -> Recipe:
    made = Recipe(
        method="ties", base=BASE, experts=EXPERTS, partition="layer", layout="l",
        columns=("weight.math", "weight.code"), table=((0.1, 0.2), (1 / 3, 1e-17)),
        options=(("elect", "count"), ("normalize", True)), seed=3, dtype="BF16",
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.floats(-16, 16), st.floats(-16, 16)), min_size=1, max_size=5))
def test_json_round_trip_is_exact(rows: list[tuple[float, float]]) -> None:
    made = recipe(table=tuple(rows))
    again = Recipe.from_json(made.to_json())
    assert again == made
    assert again.digest == made.digest


def test_digest_sees_numbers_and_weights_but_not_paths() -> None:
    made = recipe()
    moved = recipe(base=ModelRef("base", "elsewhere", "f0"))
    assert moved.digest == made.digest
    for other in (
        recipe(base=ModelRef("base", "models/base", "f9")),
        recipe(table=((0.1, 0.2), (1 / 3, 1.1e-17))),
        recipe(experts=EXPERTS[::-1]),
        recipe(seed=4),
        recipe(dtype="F32"),
        recipe(options=(("elect", "weighted"), ("normalize", True))),
    ):
        assert other.digest != made.digest


def test_refusals() -> None:
    with pytest.raises(RecipeError, match=r"table\[1\]: 1 values for 2 columns"):
        recipe(table=((0.1, 0.2), (0.3,)))
    with pytest.raises(RecipeError, match=r"table\[0\].weight.code: nan is not finite"):
        recipe(table=((0.1, float("nan")),))
    data = recipe().to_dict()
    with pytest.raises(RecipeError, match="schema 2 is not 1"):
        Recipe.from_dict(data | {"schema": 2})
    with pytest.raises(RecipeError, match="missing or unknown keys: extra"):
        Recipe.from_dict(data | {"extra": 2})
    with pytest.raises(RecipeError, match="missing or unknown keys: seed"):
        Recipe.from_dict({key: value for key, value in data.items() if key != "seed"})
    with pytest.raises(RecipeError, match=r"r.json:1:2"):
        Recipe.from_json("{", "r.json")
    with pytest.raises(RecipeError, match="expected a mapping, got list"):
        Recipe.from_json("[]")
    with pytest.raises(RecipeError, match="could not convert"):
        Recipe.from_json(json.dumps(data | {"table": [["x", 1]]}))
    with pytest.raises(RecipeError, match="no column 't' "):
        recipe().column("t")


def test_of_many_names_the_first_are_listed() -> None:
    names = [f"n{number}" for number in range(13)]
    assert listed(names[:12]).endswith("n10, n11")
    assert listed(names) == "n0, n1, n2, n3, n4, n5 and 7 more"
