"""What every registered merge method must do, whatever its definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from evomerge.checkpoint import MERGEABLE
from evomerge.layout import partition
from evomerge.merge import merger as merger_module
from evomerge.merge import reference
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, OF_WEIGHTS, Scope
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe

#: Masks come from a hash of the expert's position, so these depend on the order by declaration.
ORDERED = {"ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della",
           "della_linear"}  # fmt: skip
Tensors = dict[str, np.ndarray[Any, Any]]


def save(directory: Path, tensors: Tensors) -> str:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "made"}))
    return str(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Three experts of a hand-made base with everything awkward in it.

    A tensor of one element, a vector, a matrix, a tensor that no expert changed, one that a
    single expert changed, and one in which all deltas have the same magnitude.
    """
    rng = np.random.default_rng(0)
    base: Tensors = {
        "model.layers.0.one.weight": rng.standard_normal((1,)).astype(np.float32),
        "model.layers.0.vector.weight": rng.standard_normal((37,)).astype(np.float32),
        "model.layers.0.matrix.weight": rng.standard_normal((65, 129)).astype(np.float32),
        "model.layers.1.same.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "model.layers.1.single.weight": rng.standard_normal((8, 8)).astype(np.float32),
        "model.layers.1.flat.weight": np.zeros((16, 16), np.float32),
    }
    folder = tmp_path_factory.mktemp("made")
    named = []
    for k, name in enumerate(("a", "b", "c")):
        made = {key: value.copy() for key, value in base.items()}
        for key in ("one", "vector", "matrix"):
            full = f"model.layers.0.{key}.weight"
            made[full] += 0.05 * rng.standard_normal(made[full].shape, dtype=np.float32)
        if k == 1:
            made["model.layers.1.single.weight"] += np.float32(0.25)
        signs = rng.choice(np.asarray([-0.5, 0.5], np.float32), (16, 16))
        made["model.layers.1.flat.weight"] += signs
        named.append((name, save(folder / name, made)))
    return open_models(save(folder / "base", base), named)


def of(models: Models, method: str) -> Models:
    """Return the models with as many experts as the method takes."""
    most = METHODS[method].experts[1] or len(models.experts)
    return Models(models.base, models.experts[:most], models.layout, models.buffers)


def recipe_of(models: Models, method: str, fixed: dict[str, float], seed: int = 1) -> Recipe:
    declared = METHODS[method]
    base, experts = models.refs
    columns = declared.columns(tuple(expert.name for expert in experts))
    rng = np.random.default_rng(seed)
    table = []
    for _ in partition(models.layout, "layer").blocks:
        row = []
        for column in columns:
            name = column.split(".")[0]
            low, high = declared.parameter(name).search
            drawn = float(rng.uniform(low + 0.2 * (high - low), high))
            row.append(fixed.get(column, fixed.get(name, drawn)))
        table.append(tuple(row))
    return Recipe(
        method=method, base=base, experts=experts, partition="layer",
        layout=models.layout.digest, columns=columns, table=tuple(table), seed=3, dtype="F32",
    )  # fmt: skip


def merged(models: Models, recipe: Recipe, threads: int = 1) -> list[np.ndarray[Any, Any]]:
    tool = Merger(models, threads)
    outputs = [np.zeros(slot.size, MERGEABLE["F32"]) for slot in models.layout.slots]
    tool.merge(tool.plan(recipe), recipe.partition, outputs, "F32")
    return outputs


def slot(models: Models, name: str) -> int:
    return [s.name for s in models.layout.slots].index(f"model.layers.{name}.weight")


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
def test_awkward_tensors_give_finite_weights(models: Models, method: str) -> None:
    chosen = of(models, method)
    for output in merged(chosen, recipe_of(chosen, method, {})):
        assert np.isfinite(output).all()


@pytest.mark.parametrize("method", sorted(set(OF_WEIGHTS) - {"passthrough", "linear"}))
def test_what_no_expert_changed_stays_the_base(models: Models, method: str) -> None:
    chosen = of(models, method)
    number = slot(models, "1.same")
    base = models.base.read(models.layout.slots[number].name)
    output = merged(chosen, recipe_of(chosen, method, {}))[number]
    np.testing.assert_allclose(output, base, rtol=3e-7, atol=0)


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
def test_threads_and_pieces_do_not_change_a_bit(
    models: Models, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = of(models, method)
    recipe = recipe_of(chosen, method, {})
    whole = merged(chosen, recipe)
    for pieces, threads in ((1, 1), (77, 2), (5000, 3)):
        monkeypatch.setattr(merger_module, "_WORK", pieces)
        for ours, theirs in zip(merged(chosen, recipe, threads), whole, strict=True):
            np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
def test_a_b_a_gives_a_and_only_changed_spans_are_written(models: Models, method: str) -> None:
    chosen = of(models, method)
    tool = Merger(chosen)
    outputs = [np.zeros(one.size, np.float32) for one in models.layout.slots]
    first, second = recipe_of(chosen, method, {}, seed=1), recipe_of(chosen, method, {}, seed=2)
    last = None
    states = []
    for recipe in (first, second, first):
        plan = tool.plan(recipe)
        tool.merge(plan, "layer", outputs, "F32", plan.changed(last))
        last = plan
        states.append([output.copy() for output in outputs])
    for ours, theirs in zip(states[2], states[0], strict=True):
        np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))
    assert not tool.plan(first).changed(last).any()
    if METHODS[method].parameters:
        assert tool.plan(second).changed(last).any()


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
def test_the_order_of_experts_is_irrelevant_or_declared(models: Models, method: str) -> None:
    if METHODS[method].experts[1] is not None or method in ORDERED:
        pytest.skip("the definition names its models one by one, or hashes their position")
    forward = recipe_of(models, method, {})
    base, refs = models.refs
    backward = Recipe(
        method=method, base=base, experts=refs[::-1], partition="layer",
        layout=forward.layout, columns=forward.columns, table=forward.table, seed=3, dtype="F32",
    )  # fmt: skip
    turned = Models(models.base, models.experts[::-1], models.layout, models.buffers)
    for ours, theirs in zip(merged(models, forward), merged(turned, backward), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


DENSE = sorted(set(reference.SELECT) - {"rank_bands"})


@pytest.mark.parametrize("method", DENSE)
def test_density_zero_keeps_nothing(models: Models, method: str) -> None:
    outputs = merged(models, recipe_of(models, method, {"density": 0.0, "epsilon": 0.0}))
    for number, output in enumerate(outputs):
        base = models.base.read(models.layout.slots[number].name)
        np.testing.assert_array_equal(output, base)


@pytest.mark.parametrize("method", sorted({"breadcrumbs", "dare_linear", "della_linear"}))
def test_density_one_is_task_arithmetic(models: Models, method: str) -> None:
    fixed = {"density": 1.0, "gamma": 0.0, "epsilon": 0.15, "weight": 0.4, "lambda": 1.0}
    ours = merged(models, recipe_of(models, method, fixed))
    theirs = merged(models, recipe_of(models, "task_arithmetic", {"weight": 0.4, "lambda": 1.0}))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)


def test_equal_magnitudes_are_kept_in_the_requested_share(models: Models) -> None:
    """All deltas of a tensor have one magnitude: only the hash can make the density right."""
    number = slot(models, "1.flat")
    for density in (0.1, 0.5, 0.9):
        fixed = {"density": density, "weight.a": 1.0, "weight.b": 0.0, "weight.c": 0.0}
        output = merged(models, recipe_of(models, "ties", fixed | {"lambda": 1.0}))[number]
        kept = float((output != 0).mean())
        assert abs(kept - density) < 4 * (density * (1 - density) / output.size) ** 0.5


def test_random_masks_are_nested_in_the_density(models: Models) -> None:
    number = slot(models, "0.matrix")
    base = models.base.read(models.layout.slots[number].name)
    kept = []
    for density in (0.2, 0.5, 0.8):
        fixed = {"density": density, "weight.a": 1.0, "weight.b": 0.0, "weight.c": 0.0}
        output = merged(models, recipe_of(models, "dare_linear", fixed | {"lambda": 1.0}))[number]
        kept.append(output != base)
        assert abs(kept[-1].mean() - density) < 0.03
    assert not (kept[0] & ~kept[1]).any()
    assert not (kept[1] & ~kept[2]).any()


def test_dare_is_unbiased(models: Models) -> None:
    number = slot(models, "0.matrix")
    name = models.layout.slots[number].name
    base, expert = models.base.read(name), models.experts[0].read(name)
    fixed = {"density": 0.3, "weight.a": 1.0, "weight.b": 0.0, "weight.c": 0.0, "lambda": 1.0}
    total = np.zeros(base.size)
    seeds = 200
    for seed in range(seeds):
        recipe = recipe_of(models, "dare_linear", fixed)
        recipe = Recipe(
            **{f: getattr(recipe, f) for f in recipe.__dataclass_fields__} | {"seed": seed}
        )
        total += merged(models, recipe)[number] - base
    delta = (expert - base).astype(np.float64)
    error = total / seeds - delta
    # variance of one draw: δ²·(1 - d)/d
    bound = 5 * np.sqrt((delta**2).sum() * (0.7 / 0.3) / seeds)
    assert np.linalg.norm(error) < bound


def test_rank_bands_contain_trimming(models: Models) -> None:
    """Gains 0, 0, 1, 1, 1 keep the top 20 %, up to the elements on the boundary keys."""
    number = slot(models, "0.matrix")
    gains = {f"gain{band}": float(band >= 2) for band in range(5)}
    ours = merged(models, recipe_of(models, "rank_bands", gains | {"weight": 1.0, "lambda": 1.0}))
    total = np.zeros(models.layout.slots[number].size)
    base = models.base.read(models.layout.slots[number].name).astype(np.float64)
    for expert in models.experts:
        delta = expert.read(models.layout.slots[number].name) - base
        cut = np.quantile(np.abs(delta), 0.8)
        total += np.where(np.abs(delta) >= cut, delta, 0.0)
    differs = np.abs(ours[number] - (base + total)) > 1e-5
    assert differs.mean() < 0.03


@pytest.mark.slow
def test_every_parameter_matters(models: Models) -> None:
    """A declared parameter that changes nothing would be a search dimension for nothing."""
    for method, declared in OF_WEIGHTS.items():
        chosen = of(models, method)
        start = recipe_of(chosen, method, {})
        before = np.concatenate(merged(chosen, start))
        for parameter in declared.parameters:
            low, high = parameter.search
            names = [expert.name for expert in chosen.experts]
            column = (
                f"{parameter.name}.{names[0]}"
                if parameter.scope is Scope.EXPERT
                else parameter.name
            )
            outputs = [
                np.concatenate(merged(chosen, recipe_of(chosen, method, {column: value})))
                for value in (low, (low + high) / 2, high)
            ]
            moved = any((output != before).any() for output in outputs)
            assert moved or parameter.name in {"eps", "tol", "max_iter"}, f"{method}.{column}"
