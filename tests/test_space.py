"""The box and its map to recipes; the baselines in it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.layout import Partition
from evomerge.merge.methods import METHODS
from evomerge.recipe import ModelRef
from evomerge.search.baselines import Anchored, baselines
from evomerge.space import Range, Space

BLOCKS = ("embed", "layer.0", "final")


def space(columns: Mapping[str, float | Range] | None = None) -> Space:
    return Space(
        method="task_arithmetic",
        base=ModelRef("base", "b", "f0"),
        experts=[ModelRef("math", "m", "f1"), ModelRef("code", "c", "f2")],
        partition=Partition("layer", BLOCKS, ()),
        layout="l",
        columns=columns
        or {"weight.math": Range(0.0, 1.5), "weight.code": Range(-0.5, 1.5), "lambda": 1.0},
        options={"normalize": False},
        seed=0,
        dtype="F32",
    )


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_decode_is_affine_block_by_block(x: list[float]) -> None:
    made = space().decode(x)
    for row, block in enumerate(made.table):
        assert block[0] == pytest.approx(1.5 * x[2 * row])
        assert block[1] == pytest.approx(-0.5 + 2.0 * x[2 * row + 1])
        assert block[2] == 1.0


def test_only_decode_clips_and_counts() -> None:
    box = space()
    assert box.decode([-0.1, 2.0, 0.5, 0.5, 0.5, 0.5]).table[0][:2] == (0.0, 1.5)
    assert box.clipped == 2
    with pytest.raises(ValueError, match="expected 6 coordinates, got 5"):
        box.decode([0.5] * 5)


def test_names_and_dimension() -> None:
    box = space()
    assert box.dimension == 6
    assert box.names[:2] == ("embed/weight.math", "embed/weight.code")


def test_encode_inverts_decode_where_it_can() -> None:
    box = space()
    x = box.encode({"weight.math": 0.3, "weight.code": 0.7, "lambda": 1.0})
    assert x is not None
    for row in box.decode(x).table:
        assert row == pytest.approx((0.3, 0.7, 1.0))
    assert box.encode({"weight.math": 1.6, "weight.code": 0.7}) is None  # outside
    assert box.encode({"weight.math": 0.3, "weight.code": 0.7, "lambda": 2.0}) is None  # fixed
    assert box.encode({"weight.math": 0.3}) is None  # the other is searched


def test_digest_follows_the_map() -> None:
    box = space()
    assert box.digest == space().digest
    # Of version 0.1: studies that search real numbers only are continued by later ones.
    assert box.digest == "bb280335ff5bbc4be658ccba16cc0b28"
    assert box.decode([0.3] * 6).digest == "b03bdb7c92841bd0b513a6d514ba4c05"
    assert box.digest != space({"weight.math": Range(0.0, 1.0), "weight.code": 1.0}).digest


def test_baselines_are_points_of_the_space_where_the_method_allows() -> None:
    def anchor(weights: tuple[float, ...]) -> Anchored | None:
        values = METHODS["task_arithmetic"].anchor(weights, {})
        assert values is not None
        return dict(zip(("weight.math", "weight.code"), values["weight"], strict=True)), {}

    box = space()
    made = {b.label: b for b in baselines(box, ("math", "code"), anchor, (0.5, 1.7))}
    assert list(made) == [
        "base", "expert:math", "expert:code", "uniform",
        "task_arithmetic:0.5", "task_arithmetic:1.7",
    ]  # fmt: skip
    expected = {"base": (0.0, 0.0), "expert:math": (1.0, 0.0), "expert:code": (0.0, 1.0)}
    for label, weights in expected.items():
        assert made[label].x is not None
        for row in made[label].recipe.table:
            assert row[:2] == pytest.approx(weights, abs=1e-15)
    outside = made["task_arithmetic:1.7"]
    assert outside.x is None
    assert outside.recipe.partition == "model"
    assert outside.recipe.table == ((1.7, 1.7),)
