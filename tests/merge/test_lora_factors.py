"""``lora_factors``: the engine against a slow NumPy twin, a dense reference, and itself turned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_adapters import MODULES, save_adapter, save_adapters

from evomerge.checkpoint import MERGEABLE, to_float32
from evomerge.errors import InputError, ModelError, RecipeError
from evomerge.layout import partition
from evomerge.merge import factor_merge
from evomerge.merge.change import coefficient_norm
from evomerge.merge.device_merger import DeviceMerger
from evomerge.merge.device_sources import DeviceSources
from evomerge.merge.engine import Engine
from evomerge.merge.factor_sources import FactorSources, factor_bytes, factored, stored_bytes
from evomerge.merge.factors import merge_factors, open_repository, with_fixed_sign
from evomerge.merge.merger import Merger, alone
from evomerge.merge.methods import METHODS
from evomerge.merge.plan import Rule
from evomerge.merge.reference_factors import merge_slot
from evomerge.merge.residency import Needs, Residency
from evomerge.merge.writer import write_checkpoint
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe
from evomerge.space import Range, Space

Array = np.ndarray[Any, Any]
NAMES = ("law", "med", "math", "code", "chat")
TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Models:
    folder = tmp_path_factory.mktemp("repository")
    return factored(open_models(str(save_llama("base", 1)), save_adapters(folder, NAMES)))


def recipe_of(
    models: Models, weights: list[float], densities: list[float] | None = None, dtype: str = "F32"
) -> Recipe:
    base, experts = models.refs
    names = [expert.name for expert in experts]
    columns = [f"weight.{name}" for name in names]
    row = list(weights)
    if densities is not None:
        columns += [f"density.{name}" for name in names]
        row += densities
    return Recipe(
        method="lora_factors", base=base, experts=experts, partition="model",
        layout=models.layout.digest, columns=tuple(columns), table=(tuple(row),), dtype=dtype,
    )  # fmt: skip


def drawn(models: Models, seed: int, dtype: str = "F32") -> Recipe:
    rng = np.random.default_rng(seed)
    count = len(models.experts)
    weights = rng.uniform(-1.5, 1.5, count)
    weights[seed % count] = 0.0  # has a branch of its own
    densities = rng.choice([0.0, 0.2, 0.5, 0.77, 1.0], count)
    return recipe_of(models, weights.tolist(), densities.tolist(), dtype)


def merged(models: Models, recipe: Recipe, threads: int = 1) -> list[Array]:
    tool = Merger(models, threads)
    outputs = [np.zeros(slot.size, MERGEABLE[recipe.dtype]) for slot in models.layout.slots]
    tool.merge(tool.plan(recipe), recipe.partition, outputs, recipe.dtype)
    return outputs


def live(models: Models, dtype: str = "F32") -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        models.base.directory, dtype=getattr(torch, TORCH[dtype])
    ).requires_grad_(False)


def bits(output: Array) -> Array:
    return output.view(np.uint32 if output.dtype == np.float32 else np.uint16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_engine_equals_the_numpy_twin_bit_for_bit(
    tmp_path: Path, save_llama: Callable[..., Path], stored: str, dtype: str, seed: int
) -> None:
    base = save_llama("base", 1, dtype=TORCH[dtype])
    adapters = save_adapters(tmp_path, NAMES[: seed + 1], dtype=stored)
    models = factored(open_models(str(base), adapters))
    recipe = drawn(models, seed, dtype)
    model = live(models, dtype)
    Engine(Merger(models), model).apply(recipe)
    tensors = model.state_dict()
    for number, slot in enumerate(models.layout.slots):
        found = tensors[slot.name].reshape(-1)
        if dtype != "F32":
            import torch

            found = found.view(torch.uint16)
        np.testing.assert_array_equal(bits(found.numpy()), bits(merge_slot(recipe, models, number)))


def test_it_is_near_the_dense_sums_in_double_precision(models: Models) -> None:
    """Every entry of A ranked by sorting, products by NumPy's own, nothing shared."""
    recipe = drawn(models, 3)
    row = dict(zip(recipe.columns, recipe.table[0], strict=True))
    for slot, output in zip(models.layout.slots, merged(models, recipe), strict=True):
        base = models.base.tensors[slot.name].values().astype(np.float64)
        expected = base
        if slot.name.removesuffix(".weight") in MODULES:
            a, b = np.zeros(()), np.zeros(())
            for expert in models.experts:
                fold = expert.folds[slot.name]
                left, right = (one.values().astype(np.float64) for one in (fold.b, fold.a))
                keep = round(row[f"density.{expert.name}"] * right.size)
                small = np.argsort(-np.abs(right), axis=None)[keep:]
                right.reshape(-1)[small] = 0.0
                a = a + row[f"weight.{expert.name}"] * right
                b = b + row[f"weight.{expert.name}"] * left
            expected = base + 2.0 * (b @ a)
            assert np.abs(expected - base).max() > 0.05
        np.testing.assert_allclose(output.reshape(slot.shape), expected, atol=3e-6)


def test_it_equals_the_factors_of_a_repository(models: Models) -> None:
    """The engine of ``factors``, which knows no base, sums the same factors bit for bit."""
    recipe = drawn(models, 4)
    count = len(models.experts)
    weights, densities = recipe.table[0][:count], recipe.table[0][count:]
    repository = open_repository([(one.name, one.directory) for one in models.experts])
    pairs = merge_factors(repository, weights, densities)
    sources = FactorSources(models)
    plan = Merger(models).plan(recipe)
    assert plan.shares is not None
    for number, slot in enumerate(models.layout.slots):
        if number in sources.forms:
            found = sources.merged(number, plan.weights[number], plan.shares[number])
            for mine, theirs in zip(found, pairs[slot.name.removesuffix(".weight")], strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("seed", range(3))
def test_turning_all_signs_changes_no_bit(models: Models, seed: int) -> None:
    recipe = drawn(models, seed)
    count = len(models.experts)
    turned = [-value for value in recipe.table[0][:count]]
    other = recipe_of(models, turned, list(recipe.table[0][count:]))
    for one, two in zip(merged(models, recipe), merged(models, other), strict=True):
        np.testing.assert_array_equal(bits(one), bits(two))


def test_one_adapter_alone_is_its_fold_and_no_weight_is_the_base(models: Models) -> None:
    dense = replace(models, factored=False)
    for k, expert in enumerate(models.experts):
        for slot, output in zip(
            models.layout.slots, merged(models, alone(models, k, "F32")), strict=True
        ):
            whole = to_float32(expert.read(slot.name), expert.tensors[slot.name].dtype)
            np.testing.assert_array_equal(bits(output), bits(whole))
    assert alone(dense, 1, "F32").method == "task_arithmetic"
    for slot, output in zip(
        models.layout.slots, merged(models, alone(models, None, "F32")), strict=True
    ):
        np.testing.assert_array_equal(bits(output), bits(models.base.read(slot.name)))


def test_what_no_adapter_touches_is_never_written_again(models: Models) -> None:
    model = live(models)
    engine = Engine(Merger(models), model)
    first, second = drawn(models, 1), drawn(models, 2)
    assert engine.apply(first) == len(models.layout.slots)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert engine.apply(first) == 0
    assert engine.apply(second) == len(MODULES)
    assert engine.apply(first) == len(MODULES)  # from the base, not from what was there
    for name, tensor in model.state_dict().items():
        assert (tensor == before[name]).all()


def test_threads_and_pieces_do_not_change_a_bit(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = drawn(models, 3)
    whole = merged(models, recipe)
    for size, threads in ((1, 1), (70, 3), (1 << 20, 2)):
        monkeypatch.setattr(factor_merge, "_WORK", size)
        for one, two in zip(merged(models, recipe, threads), whole, strict=True):
            np.testing.assert_array_equal(bits(one), bits(two))


@pytest.mark.parametrize("residency", list(Residency))
def test_the_device_path_equals_the_cpu_kernels(models: Models, residency: Residency) -> None:
    """On the CPU as device, with buffers so small that pieces end within rows."""
    import torch

    recipe = drawn(models, 2)
    tool = Merger(models)
    outputs = [torch.zeros(slot.size) for slot in models.layout.slots]
    sources = DeviceSources(tool.sources, torch.device("cpu"), residency, 1200, threads=2)
    assert sources.experts == 0
    merger = DeviceMerger(sources, outputs, triton=False)
    everything = np.ones(len(models.layout.slots), np.bool_)
    merger.merge(tool.plan(recipe), tool.partition("model"), everything)
    for one, two in zip(outputs, merged(models, recipe), strict=True):
        np.testing.assert_array_equal(bits(one.numpy()), bits(two))


def test_no_adapter_is_ever_folded(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.low_rank import LowRank

    def fold(self: LowRank) -> Array:
        raise AssertionError("folded")

    monkeypatch.setattr(LowRank, "fold", fold)
    for residency in (Residency.DISK, Residency.HOST):
        merger = Merger(models)
        merger.sources.require_finite()
        engine = Engine(merger, live(models), residency)
        sum_before = engine.checksum()
        engine.apply(drawn(models, 0))
        assert engine.checksum() == sum_before
        assert merger.sources.experts == 0


def test_the_need_for_memory_is_that_of_base_and_factors(models: Models) -> None:
    parameters = models.layout.parameters
    ranks = sum(3 * (rows + columns) for rows, columns in MODULES.values())
    assert factor_bytes(models) == 4 * len(NAMES) * ranks
    assert stored_bytes(models) == 4 * (parameters + len(NAMES) * ranks)
    assert Needs.of(models, "F32").sources == stored_bytes(models)
    assert stored_bytes(replace(models, factored=False)) == 4 * 6 * parameters


def test_a_written_checkpoint_is_what_the_engine_applied(models: Models, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    recipe = drawn(models, 2)
    write_checkpoint(recipe, replace(models, factored=False), tmp_path, max_shard_bytes=4000)
    written: dict[str, Array] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        written |= load_file(path)
    model = live(models)
    Engine(Merger(models), model).apply(recipe)
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, model.state_dict()[name].numpy())


def test_modules_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds [in, out]; the fold is the reference."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    modules = {"transformer.h.0.attn.c_attn": (48, 16), "transformer.h.0.mlp.c_proj": (16, 64)}
    adapters = save_adapters(tmp_path, NAMES[:2], modules=modules)
    models = factored(open_models(str(tmp_path / "base"), adapters))
    for number, output in enumerate(merged(models, drawn(models, 1))):
        twin = merge_slot(drawn(models, 1), models, number)
        np.testing.assert_array_equal(bits(output), bits(twin))
    for slot, output in zip(
        models.layout.slots, merged(models, alone(models, 1, "F32")), strict=True
    ):
        np.testing.assert_array_equal(output, models.experts[1].read(slot.name))


def test_coefficients_have_a_norm(models: Models) -> None:
    recipe = recipe_of(models, [0.5, -1.0, 0.0, 0.25, 0.0])
    assert coefficient_norm(Merger(models), recipe) == pytest.approx(1.75)


def test_density_cuts_are_those_of_every_dtype(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    base = save_llama("base", 1)
    for dtype in ("float32", "bfloat16", "float16"):
        adapters = save_adapters(tmp_path / dtype, NAMES[:2], dtype=dtype)
        models = factored(open_models(str(base), adapters))
        sources = FactorSources(models)
        for slot in sources.forms:
            for density in (0.0, 0.01, 0.3, 0.5, 0.999, 1.0):
                cuts = sources.cuts(slot, np.array([density, 1.0]))
                size = np.abs(sources.entry(slot, 0, "A").values())
                kept = int((size >= cuts[0]).sum())
                least = max(round(density * size.size), 1) if density else 0
                assert kept >= least
                assert int((size > cuts[0]).sum()) <= least
                assert cuts[1] == 0.0


class TestRefusals:
    def test_everything_that_does_not_fit_is_said_together(
        self, tmp_path: Path, save_llama: Callable[..., Path]
    ) -> None:
        base = save_llama("base", 1)
        fewer = dict(list(MODULES.items())[:2])
        adapters = [
            ("rank", str(save_adapter(tmp_path / "rank", 1, rank=2))),
            *save_adapters(tmp_path, NAMES[:3]),
            ("alpha", str(save_adapter(tmp_path / "alpha", 5, lora_alpha=12))),
            ("few", str(save_adapter(tmp_path / "few", 6, fewer))),
            ("whole", str(save_llama("whole", 7, base=base))),
        ]
        models = open_models(str(base), adapters)
        with pytest.raises(ModelError) as caught:
            factored(models)
        lines = str(caught.value).splitlines()
        slot = "model.layers.0.mlp.up_proj.weight"
        assert lines == [
            f"models.experts.rank: {slot} has rank 2, 3 in law (factors can only be added "
            "where modules, rank and scaling are equal)",
            f"models.experts.alpha: {slot} has scaling 4, 2 in law (factors can only be "
            "added where modules, rank and scaling are equal)",
            "models.experts.few: does not change model.layers.1.mlp.down_proj.weight, law does; 2 "
            "modules differ (factors can only be added where modules, rank and scaling are equal)",
            "models.experts.whole: is no LoRA adapter, and lora_factors merges nothing else "
            "(leave it out, or merge by task_arithmetic, which takes both)",
        ]

    def test_square_modules_that_are_read_the_other_way_round(self, tmp_path: Path) -> None:
        """They were merged as the first adapter's are: nothing but the flag tells them apart."""
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=32, n_embd=16, n_layer=1, n_head=4, n_positions=32, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        square = {"transformer.h.0.attn.c_proj": (16, 16)}
        experts = [
            (name, str(save_adapter(tmp_path / name, seed, square, fan_in_fan_out=flag)))
            for seed, (name, flag) in enumerate((("one", True), ("two", True), ("odd", False)))
        ]
        with pytest.raises(ModelError, match=r"experts.odd: .*c_proj.weight is read the other way"):
            factored(open_models(str(tmp_path / "base"), experts))

    def test_modules_saved_whole(self, tmp_path: Path, save_llama: Callable[..., Path]) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        adapter = save_adapter(tmp_path / "norm", 1, modules_to_save=["norm"])
        path = adapter / "adapter_model.safetensors"
        save_file(
            load_file(path) | {"base_model.model.model.norm.weight": torch.full((16,), 2.0)}, path
        )
        models = open_models(str(save_llama("base", 1)), [("norm", str(adapter))])
        with pytest.raises(
            ModelError, match=r"norm: saves model.norm.weight whole \(modules_to_save\)"
        ):
            factored(models)

    def test_another_partition(self, models: Models) -> None:
        blocks = len(partition(models.layout, "layer").blocks)
        whole = drawn(models, 1)
        recipe = replace(whole, partition="layer", table=whole.table * blocks)
        with pytest.raises(RecipeError, match="one row of coefficients, for the whole model"):
            Merger(models).plan(recipe)

    def test_another_method_where_experts_are_factors(self, models: Models) -> None:
        recipe = alone(replace(models, factored=False), 0, "F32")
        with pytest.raises(RecipeError, match="task_arithmetic needs whole experts"):
            Merger(models).plan(recipe)

    def test_factors_that_are_not_finite(
        self, tmp_path: Path, save_llama: Callable[..., Path]
    ) -> None:
        adapter = save_adapter(tmp_path / "bad", 1, scale=float("nan"))
        models = factored(open_models(str(save_llama("base", 1)), [("bad", str(adapter))]))
        with pytest.raises(ModelError, match=r"bad: 48 values of A of .*q_proj.weight are not fin"):
            Merger(models).sources.require_finite()


def space_of(models: Models, low: float = -1.5, high: float = 1.5) -> Space:
    base, experts = models.refs
    columns = {f"weight.{one.name}": Range(low, high) for one in experts}
    return Space(
        method="lora_factors", base=base, experts=experts,
        partition=partition(models.layout, "model"), layout=models.layout.digest,
        columns={**columns, **{f"density.{one.name}": Range(0.0, 1.0) for one in experts}},
        options={}, seed=0, dtype="F32", twins=METHODS["lora_factors"].twins,
    )  # fmt: skip


def test_both_signs_decode_to_one_recipe(models: Models) -> None:
    space = space_of(models)
    count = len(models.experts)
    point = [0.125, 0.5, 0.75, 0.25, 0.625, *([0.5] * count)]
    mirrored = [1.0 - x for x in point[:count]] + point[count:]
    one, two = space.decode(point), space.decode(mirrored)
    assert one.digest == two.digest
    assert one.table[0][:count] == (1.125, 0.0, -0.75, 0.75, -0.375)
    assert one.table[0][count:] == (0.5,) * count
    assert space.decode(point[:count] + [0.25] * count).digest != one.digest
    assert str(one.table[0][1]) == "0.0"


@pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (-1.5, 0.0), (0.0, 1.5)])
def test_a_recipe_is_a_point_of_the_space_that_it_is_from(
    models: Models, low: float, high: float
) -> None:
    """A search could not start from its own merges where the box has one sign only."""
    space = space_of(models, low, high)
    count = len(models.experts)
    point = (0.25, 0.5, 0.75, 0.125, 0.625, *([0.5] * count))
    recipe = space.decode(point)
    columns = dict(zip(recipe.columns, recipe.table[0], strict=True))
    x = space.encode(columns)
    assert x is not None
    assert space.encode_rows([columns]) == x
    assert space.decode(x).digest == recipe.digest


def test_a_recipe_is_a_point_where_a_weight_is_fixed(models: Models) -> None:
    """The fixed sign turned the fixed weight too, and then it was another one."""
    base, experts = models.refs
    names = [f"weight.{one.name}" for one in experts]
    columns = {name: Range(-1.5, 1.5) for name in names} | {names[0]: 0.5}
    columns |= {f"density.{one.name}": 1.0 for one in experts}
    space = Space(
        method="lora_factors", base=base, experts=experts,
        partition=partition(models.layout, "model"), layout=models.layout.digest,
        columns=columns, options={}, seed=0, dtype="F32", twins=METHODS["lora_factors"].twins,
    )  # fmt: skip
    point = (0.0, 0.5, 0.25, 0.75)
    recipe = space.decode(point)
    assert recipe.table[0][0] == -0.5  # -1.5 is the largest, and made positive
    row = dict(zip(recipe.columns, recipe.table[0], strict=True))
    assert space.encode_rows([row]) == pytest.approx(point)
    assert space.encode(row) == pytest.approx(point)
    with pytest.raises(InputError, match=r"weight\.\w+ is 0.75 in model, the study fixes 0.5"):
        space.encode_rows([row | {names[0]: 0.75}])
    assert space.encode(row | {names[0]: 0.75}) is None


def test_a_fixed_sign_has_no_negative_zero() -> None:
    assert [str(value) for value in with_fixed_sign([0.0, -1.0])] == ["0.0", "1.0"]
    assert with_fixed_sign([-0.5, 0.5]) == with_fixed_sign([0.5, -0.5]) == (0.5, -0.5)


def test_plans_know_their_rule(models: Models) -> None:
    plan = Merger(models).plan(drawn(models, 1))
    assert plan.rule is Rule.FACTORS
    assert (plan.weights.any(axis=1)).sum() == len(MODULES)
