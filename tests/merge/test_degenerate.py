"""Merges at the edges: no elements, one element, counts that round, zeros with a sign."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_conformance import save
from test_selection import merged, recipe_of

from evomerge.errors import RecipeError
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, OF_WEIGHTS
from evomerge.models import Models, open_models

Tensors = Mapping[str, np.ndarray[Any, Any]]


def opened(folder: Path, base: Tensors, *experts: Tensors) -> Models:
    named = [(name, save(folder / name, dict(made))) for name, made in zip("abc", experts)]  # noqa: B905 - as many as there are
    return open_models(save(folder / "base", dict(base)), named)


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
def test_a_tensor_without_elements_is_left_alone(tmp_path: Path, method: str) -> None:
    """DELLA, rank bands, SCE and arcee_fusion looked for its largest change and failed."""
    rng = np.random.default_rng(0)
    shapes = {"0.some": (4, 3), "0.rows": (0, 3), "1.columns": (3, 0), "1.vector": (0,)}
    base = {f"model.layers.{n}.weight": np.zeros(s, np.float32) for n, s in shapes.items()}
    experts = [
        {name: value + rng.standard_normal(value.shape).astype(np.float32)
         for name, value in base.items()}
        for _ in range(METHODS[method].experts[1] or 3)
    ]  # fmt: skip
    models = opened(tmp_path, base, *experts)
    declared = METHODS[method].parameters
    values = {one.name: 0.5 for one in declared if one.default is None}
    tool = Merger(models)
    recipe = recipe_of(models, method, values)
    outputs = [np.zeros(slot.size, np.float32) for slot in models.layout.slots]
    tool.merge(tool.plan(recipe), "model", outputs, "F32")
    assert all(np.isfinite(output).all() for output in outputs)
    if method == "ties":
        merged(models, recipe_of(models, method, values, trim="global"))


CRUMBS = {
    # mergekit 0.1.5's magnitude_outliers of 1, 2, 4, ..., 512.
    (0.1, 0.7): [2], (0.35, 0.35): [4, 5, 6], (0.5, 0.25): [3, 4, 5, 6, 7],
    (0.9, 0.3): range(9), (0.95, 0.3): range(9), (1.0, 0.3): range(10),
    (0.3, 0.6): [1, 2, 3], (0.55, 0.55): range(5), (0.05, 0.3): [],
}  # fmt: skip


@pytest.mark.parametrize("density, gamma", sorted(CRUMBS))
def test_breadcrumbs_counts_as_mergekit_where_density_and_gamma_are_too_much(
    tmp_path: Path, density: float, gamma: float
) -> None:
    """gamma was dropped in full, and 0.1 + 0.7 of ten elements were seven: none was left."""
    delta = np.float32(2.0) ** np.arange(10, dtype=np.float32)
    name = "model.layers.0.w.weight"
    models = opened(tmp_path, {name: np.zeros(10, np.float32)}, {name: delta})
    values = {"weight": 1.0, "density": density, "gamma": gamma}
    [ours] = merged(models, recipe_of(models, "breadcrumbs", values)).values()
    assert np.flatnonzero(ours).tolist() == list(CRUMBS[density, gamma])


@pytest.mark.parametrize("trim", ["tensor", "global"])
def test_ties_keeps_one_element_at_least(tmp_path: Path, trim: str) -> None:
    """As mergekit does and the paper's code; a tensor of one element was never merged."""
    name = "model.layers.0.w.weight"
    for size in (1, 3):
        delta = np.arange(1, size + 1, dtype=np.float32)
        models = opened(tmp_path / str(size), {name: np.zeros(size, np.float32)}, {name: delta})
        for density, kept in ((0.1, 1), (0.0, 0)):
            values = {"weight": 1.0, "density": density}
            [ours] = merged(models, recipe_of(models, "ties", values, trim=trim)).values()
            assert np.flatnonzero(ours).tolist() == list(range(size))[size - kept :]


def test_zero_lambda_leaves_negative_zeros_of_the_base(tmp_path: Path) -> None:
    """The twin added a sum of nothing, which makes a zero positive."""
    name = "model.layers.0.w.weight"
    base = np.asarray([-0.0, 0.0, 1.0, -0.0], np.float32)
    models = opened(tmp_path, {name: base}, {name: base + np.float32(1)})
    values = {"weight": 1.0, "density": 0.5, "lambda": 0.0, **{f"gain{n}": 1.0 for n in range(5)}}
    for method in ("breadcrumbs", "dare_linear", "della_linear", "rank_bands"):
        [ours] = merged(models, recipe_of(models, method, values)).values()
        np.testing.assert_array_equal(np.signbit(ours), np.signbit(base))


def test_a_scale_of_negative_zero_is_another_merge(tmp_path: Path) -> None:
    """It was skipped as unchanged, though the zeros that it gives have other signs."""
    name = "model.layers.0.w.weight"
    models = opened(tmp_path, {name: np.ones(3, np.float32)}, {name: np.full(3, 2, np.float32)})
    tool = Merger(models)
    plans = [tool.plan(recipe_of(models, "passthrough", {"scale": scale})) for scale in (0.0, -0.0)]
    outputs = [np.ones(3, np.float32)]
    for last, plan in ((None, plans[0]), (plans[0], plans[1])):
        tool.merge(plan, "model", outputs, "F32", plan.changed(last))
    recipe = recipe_of(models, "passthrough", {"scale": -0.0})
    whole = np.ones(3, np.float32)
    tool.merge(tool.plan(recipe), "model", [whole], "F32")
    np.testing.assert_array_equal(outputs[0].view(np.uint32), whole.view(np.uint32))
    assert not plans[1].changed(plans[1]).any()


def test_an_option_that_the_method_has_not_is_refused(tmp_path: Path) -> None:
    """It was ignored, so that a misspelt flavour merged in another one."""
    name = "model.layers.0.w.weight"
    models = opened(tmp_path, {name: np.ones(3, np.float32)}, {name: np.zeros(3, np.float32)})
    tool = Merger(models)
    recipe = recipe_of(models, "task_arithmetic", {"weight": 1.0}, normalise=True)
    with pytest.raises(RecipeError, match=r"task_arithmetic has no 'normalise' \(did you mean"):
        tool.plan(recipe)
    for value in (1, 1.0, 0):
        recipe = recipe_of(models, "task_arithmetic", {"weight": 1.0}, normalize=value)
        with pytest.raises(RecipeError, match=r"options\.normalize: .* is not one of"):
            tool.plan(recipe)


def test_one_element_of_very_many_has_a_share_of_its_bin() -> None:
    """Of more than 2^32 it was rounded to no share, which ``box`` took for keeping nothing."""
    from evomerge.merge.tails import cut_at

    assert cut_at(0, np.asarray([2**33, 5], np.int64), 6, whole_edge=False) == (0, 1)
