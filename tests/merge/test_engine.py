"""The engine against its NumPy twin, the exporter and the definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.checkpoint import MERGEABLE
from evomerge.errors import RecipeError
from evomerge.layout import partition
from evomerge.merge import reference
from evomerge.merge.engine import Engine
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, OF_WEIGHTS, Scope
from evomerge.merge.sources import Sources, to_float32
from evomerge.merge.writer import write_checkpoint
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]
TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def open_family(family: Family, dtype: str = "float32", experts: int = 2, **kwargs: Any) -> Models:
    base, named = family(dtype=dtype, experts=experts, **kwargs)
    return open_models(str(base), named)


def make_recipe(
    models: Models,
    method: str,
    spec: str,
    value: Callable[[str, int], float],
    dtype: str | None = None,
    **options: Any,
) -> Recipe:
    base, experts = models.refs
    columns = METHODS[method].columns(tuple(expert.name for expert in experts))
    blocks = partition(models.layout, spec).blocks
    table = tuple(tuple(value(column, row) for column in columns) for row in range(len(blocks)))
    return Recipe(
        method=method,
        base=base,
        experts=experts,
        partition=spec,
        layout=models.layout.digest,
        columns=columns,
        table=table,
        options=tuple(sorted(options.items())),
        seed=7,
        dtype=dtype or models.dtype,
    )


def merged_bits(models: Models, recipe: Recipe, threads: int = 1) -> list[np.ndarray[Any, Any]]:
    merger = Merger(models, threads)
    outputs = [np.zeros(slot.size, MERGEABLE[recipe.dtype]) for slot in models.layout.slots]
    merger.merge(merger.plan(recipe), recipe.partition, outputs, recipe.dtype)
    return outputs


def options_of(method: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {option.name: st.sampled_from(option.choices) for option in METHODS[method].options}
    )


#: Methods whose coefficients come from Gram matrices have their own comparison.
_TWINS = {*reference.LINEAR_FAMILY, *reference.SELECT, *reference.LOCAL, "slerp"}
EXACT = sorted(set(METHODS) & _TWINS)


@pytest.mark.parametrize("method", EXACT)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_engine_equals_numpy_twin_bit_for_bit(
    llama_family: Family, method: str, data: st.DataObject
) -> None:
    source = data.draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    most = METHODS[method].experts[1] or 5
    models = open_family(llama_family, source, data.draw(st.integers(1, min(most, 5))))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    declared = {parameter.name: parameter for parameter in METHODS[method].parameters}

    def value(column: str, row: int) -> float:
        low, high = declared[column.split(".")[0]].search
        # Zero and the ends of the range have their own branches.
        return float(rng.choice([low, high, rng.uniform(low, high), rng.uniform(low, high)]))

    recipe = make_recipe(
        models,
        method,
        data.draw(st.sampled_from(["model", "layer", "module", "tensor", "chunk(3)"])),
        value,
        data.draw(st.sampled_from(sorted(MERGEABLE))),
        **data.draw(options_of(method)),
    )
    divides = method not in reference.ELECTED and recipe.option("normalize", method == "linear")
    if divides and any(sum(row[: len(recipe.experts)]) == 0 for row in recipe.table):
        with pytest.raises(RecipeError, match="sum to zero"):
            Merger(models).plan(recipe)
        return
    outputs = merged_bits(models, recipe, threads=data.draw(st.sampled_from([1, 2])))
    sources = Sources(models)
    for slot, output in enumerate(outputs):
        expected = reference.merge_slot(recipe, sources, slot)
        np.testing.assert_array_equal(
            output.view(np.uint8), expected.view(np.uint8), err_msg=models.layout.slots[slot].name
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_weights_give_the_base_bit_for_bit(llama_family: Family, dtype: str) -> None:
    models = open_family(llama_family, dtype)
    recipe = make_recipe(models, "task_arithmetic", "layer", lambda column, row: 0.0)
    for slot, output in enumerate(merged_bits(models, recipe)):
        np.testing.assert_array_equal(output, Sources(models).base(slot)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
def test_one_expert_at_weight_one_gives_that_expert(
    llama_family: Family, method: str, dtype: str
) -> None:
    models = open_family(llama_family, dtype)

    def value(column: str, row: int) -> float:
        return {"weight.math": 0.0, "weight.code": 1.0}.get(column, 1.0)

    recipe = make_recipe(models, method, "tensor", value)
    sources = Sources(models)
    for slot, output in enumerate(merged_bits(models, recipe)):
        ours = to_float32(output, recipe.dtype).astype(np.float64)
        expert = to_float32(*sources.expert(slot, 1)).astype(np.float64)
        base = to_float32(*sources.base(slot)).astype(np.float64)
        step = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}[recipe.dtype]
        bound = step * np.maximum(np.abs(expert), np.abs(base) * 2.0**-10) + 1e-9
        if recipe.dtype == "F32":  # the delta itself was rounded once more
            bound = step * np.maximum(np.abs(expert), np.abs(base)) * 1.5
        assert (np.abs(ours - expert) <= bound).all()


def test_slerp_equals_the_closed_form_in_double_precision(llama_family: Family) -> None:
    models = open_family(llama_family, experts=1)
    sources = Sources(models)
    recipe = make_recipe(models, "slerp", "tensor", lambda column, row: 0.1 + 0.8 * row / 30)
    rows = [row[0] for row in recipe.table]
    apart = 0
    for slot, output in enumerate(merged_bits(models, recipe)):
        a = to_float32(*sources.base(slot)).astype(np.float64)
        b = to_float32(*sources.expert(slot, 0)).astype(np.float64)
        t = rows[partition(models.layout, "tensor").spans[slot].block]
        cos = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        if cos > 0.9995:
            expected = (1 - t) * a + t * b
        else:
            apart += 1
            angle = np.arccos(cos)
            expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6 * np.abs(a).max())
    assert apart > 0


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_keeps_the_requested_share_of_each_tensor(
    llama_family: Family, dtype: str, density: float
) -> None:
    models = open_family(llama_family, dtype)
    merger = Merger(models)
    sources = Sources(models)
    for slot, record in enumerate(models.layout.slots):
        if record.size < 200:
            continue
        edge, share = merger.stats.cut(slot, 0, int(density * record.size), whole_edge=False)
        delta = to_float32(*sources.expert(slot, 0)) - to_float32(*sources.base(slot))
        keys = (delta.view(np.uint32) & 0x7FFFFFFF) >> 16
        kept = int((keys > edge).sum()) + (keys == edge).sum() * share / 2**32
        assert kept == pytest.approx(int(density * record.size), abs=1e-3)


def test_live_model_equals_the_written_checkpoint(llama_family: Family, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    for name, code in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        models = open_family(llama_family, name)
        model = AutoModelForCausalLM.from_pretrained(models.base.directory, dtype=code)
        engine = Engine(Merger(models), model)
        recipe = make_recipe(models, "ties", "module", lambda column, row: 0.3 + 0.05 * row % 0.6)
        engine.apply(recipe)
        out = tmp_path / name
        out.mkdir()
        write_checkpoint(recipe, models, out)
        written = load_file(out / "model.safetensors")
        live = model.state_dict()
        assert set(written) == set(live) - {"lm_head.weight"}
        for tensor, value in written.items():
            assert torch.equal(value, live[tensor]), tensor
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        again = AutoModelForCausalLM.from_pretrained(out, dtype=code)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in live.items())


def test_shards_hold_every_tensor_once(llama_family: Family, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    models = open_family(llama_family, "bfloat16", tied=False)
    recipe = make_recipe(models, "linear", "layer", lambda column, row: 0.5)
    for name, size in (("one", 10**9), ("many", 1500)):
        (tmp_path / name).mkdir()
        write_checkpoint(recipe, models, tmp_path / name, max_shard_bytes=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[key], many[key]) for key in one)


def test_a_b_a_gives_a_and_unchanged_spans_are_skipped(llama_family: Family) -> None:
    from transformers import AutoModelForCausalLM

    models = open_family(llama_family)
    model = AutoModelForCausalLM.from_pretrained(models.base.directory)
    engine = Engine(Merger(models), model)
    first = make_recipe(models, "task_arithmetic", "layer", lambda column, row: 0.3)
    second = make_recipe(
        models, "task_arithmetic", "layer", lambda column, row: 0.9 if row == 1 else 0.3
    )
    everything = engine.apply(first)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rewritten = engine.apply(second)
    assert 0 < rewritten < everything
    assert engine.apply(first) == rewritten
    after = model.state_dict()
    assert all((before[key] == after[key]).all() for key in before)


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_device_path_equals_the_cpu_kernels(llama_family: Family, method: str, dtype: str) -> None:
    require_device_equals_kernels(llama_family, method, dtype, "cpu")


def require_device_equals_kernels(
    llama_family: Family, method: str, dtype: str, where: str
) -> None:
    """Compare the merge in torch on one device with the CPU kernels, bit for bit."""
    import torch

    from evomerge.merge import device
    from evomerge.merge.device_sources import DeviceSources

    models = open_family(llama_family, TORCH_NAMES[dtype], min(METHODS[method].experts[1] or 3, 3))
    rng = np.random.default_rng(3)
    merger = Merger(models)
    sources = DeviceSources(merger.sources, torch.device(where))
    declared = {parameter.name: parameter for parameter in METHODS[method].parameters}

    def value(column: str, row: int) -> float:
        low, high = declared[column.split(".")[0]].search
        return float(rng.uniform(low, high))

    recipe = make_recipe(models, method, "module", value)
    plan = merger.plan(recipe)
    outputs = [
        torch.zeros(slot.size, dtype=getattr(torch, TORCH_NAMES[dtype]), device=where)
        for slot in models.layout.slots
    ]
    cut = merger.partition("module")
    device.merge(plan, cut, sources, outputs, np.ones(len(cut.spans), np.bool_))
    for flat, expected in zip(outputs, merged_bits(models, recipe), strict=True):
        output = flat.cpu()
        bits = output.view(torch.uint16).numpy() if dtype == "BF16" else output.numpy()
        np.testing.assert_array_equal(bits, expected)


def test_counter_hash_is_uniform_nested_and_the_same_everywhere() -> None:
    from evomerge.merge import bits
    from evomerge.merge.launch import hash_keys

    index = np.arange(2**33 - 5000, 2**33 + 5000, dtype=np.int64)
    twin = reference.counter_hash(99, 2, index)
    key = hash_keys(99, 3)[2]
    ours = [int(bits.draw(bits.scatter(bits.counter_of(i)), key)) for i in index[::100]]
    assert ours == twin[::100].tolist()
    for density in (0.1, 0.5, 0.9):
        kept = (twin < density * 2**32).mean()
        assert abs(kept - density) < 4 * (density * (1 - density) / len(index)) ** 0.5
    other = reference.counter_hash(99, 1, index)
    assert abs(np.corrcoef(twin, other)[0, 1]) < 0.05


def test_recipe_for_other_weights_is_refused(llama_family: Family) -> None:
    models = open_family(llama_family)
    other = open_family(llama_family, tied=False)
    recipe = make_recipe(models, "linear", "model", lambda column, row: 0.5)
    with pytest.raises(RecipeError, match="made for other weights"):
        Merger(other).plan(recipe)


def test_values_outside_the_definition_are_refused(llama_family: Family) -> None:
    models = open_family(llama_family)
    recipe = make_recipe(
        models, "ties", "layer", lambda column, row: 1.7 if column == "density.code" else 0.5
    )
    with pytest.raises(RecipeError, match=r"table\[0\]\.density\.code: must be in \[0.0, 1.0\]"):
        Merger(models).plan(recipe)


def test_slerp_takes_two_models(llama_family: Family) -> None:
    models = open_family(llama_family, experts=3)
    recipe = make_recipe(models, "slerp", "model", lambda column, row: 0.5)
    with pytest.raises(RecipeError, match="slerp takes 1 to 2 experts, got 3"):
        Merger(models).plan(recipe)


def test_methods_declare_consistent_parameters() -> None:
    for method in METHODS.values():
        for parameter in method.parameters:
            low, high = parameter.search
            assert parameter.low <= low < high <= parameter.high
            assert parameter.scope in Scope
            if parameter.default is not None:
                assert parameter.low <= parameter.default <= parameter.high
