"""The merge on a CUDA device; run with ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_adapters import save_adapters
from test_engine import (
    TORCH_NAMES,
    make_recipe,
    merged_bits,
    open_family,
    require_device_equals_kernels,
)

from evomerge.merge.factor_sources import factored
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, OF_WEIGHTS
from evomerge.merge.residency import Residency
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda() -> Any:
    """Skip without a device."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda:0")


def models_for(family: Family, dtype: str, method: str) -> Models:
    return open_family(family, TORCH_NAMES[dtype], min(METHODS[method].experts[1] or 3, 3))


def recipe_of(models: Models, method: str, seed: int = 3, partition: str = "module") -> Recipe:
    rng = np.random.default_rng(seed)
    declared = {parameter.name: parameter for parameter in METHODS[method].parameters}

    def value(column: str, row: int) -> float:
        low, high = declared[column.split(".")[0]].search
        return float(rng.uniform(low, high))

    return make_recipe(models, method, partition, value)


def merged_on(
    device: Any, models: Models, recipe: Recipe, residency: Residency, triton: bool,
    staging_bytes: int = 1 << 20,
) -> list[np.ndarray[Any, Any]]:  # fmt: skip
    """Return the bits of all slots, merged on the device."""
    import torch

    from evomerge.merge.device_merger import DeviceMerger
    from evomerge.merge.device_sources import DeviceSources

    merger = Merger(models)
    sources = DeviceSources(merger.sources, device, residency, staging_bytes)
    dtype = getattr(torch, TORCH_NAMES[recipe.dtype])
    outputs = [torch.zeros(slot.size, dtype=dtype, device=device) for slot in models.layout.slots]
    cut = merger.partition(recipe.partition)
    everything = np.ones(len(cut.spans), np.bool_)
    DeviceMerger(sources, outputs, triton).merge(merger.plan(recipe), cut, everything)
    host = [output.cpu() for output in outputs]
    return [(one if recipe.dtype == "F32" else one.view(torch.uint16)).numpy() for one in host]


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_torch_on_cuda_equals_the_cpu_kernels(
    llama_family: Family, method: str, dtype: str
) -> None:
    """The same arithmetic in the same order: equal bits, not close values."""
    require_device_equals_kernels(llama_family, method, dtype, "cuda:0")


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_triton_equals_the_cpu_kernels(
    llama_family: Family, cuda: Any, method: str, dtype: str
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    models = models_for(llama_family, dtype, method)
    recipe = recipe_of(models, method)
    ours = merged_on(cuda, models, recipe, Residency.DEVICE, triton=True)
    for slot, expected in enumerate(merged_bits(models, recipe)):
        np.testing.assert_array_equal(
            ours[slot].view(np.uint8), expected.view(np.uint8), models.layout.slots[slot].name
        )


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("staging_bytes", [3000, 1 << 20])
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "widen"])
def test_residency_does_not_change_a_bit(
    llama_family: Family, cuda: Any, method: str, staging_bytes: int, triton: bool
) -> None:
    """Copies and merges overlap on two streams; a missing event would show here."""
    if triton:
        pytest.importorskip("triton", reason="triton is not installed")
    models = models_for(llama_family, "BF16", method)
    recipe = recipe_of(models, method)
    expected = merged_bits(models, recipe)
    for residency in Residency:
        for _ in range(3):
            ours = merged_on(cuda, models, recipe, residency, triton, staging_bytes)
            for mine, other in zip(ours, expected, strict=True):
                np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("residency", list(Residency))
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_b_a_gives_the_digest_of_a(
    llama_family: Family, cuda: Any, method: str, residency: Residency
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from evomerge.merge.engine import Engine

    models = models_for(llama_family, "BF16", method)
    model = AutoModelForCausalLM.from_pretrained(models.base.directory, dtype=torch.bfloat16)
    engine = Engine(Merger(models), model.to(cuda), residency)
    engine.require_base()
    states = []
    for seed in (1, 2, 1):
        engine.apply(recipe_of(models, method, seed))
        states.append({key: value.cpu().clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert engine.apply(recipe_of(models, method, 1)) == 0


@pytest.mark.parametrize("residency", list(Residency))
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_adapters_merged_as_factors_equal_the_cpu_kernels(
    tmp_path: Path, save_llama: Callable[..., Path], cuda: Any, dtype: str, residency: Residency
) -> None:
    base = save_llama("base", 1, dtype=TORCH_NAMES[dtype])
    adapters = save_adapters(tmp_path, ("a", "b", "c"))
    models = factored(open_models(str(base), adapters))
    origin, experts = models.refs
    columns = tuple(f"{kind}.{one.name}" for kind in ("weight", "density") for one in experts)
    recipe = Recipe(
        method="lora_factors", base=origin, experts=experts, partition="model",
        layout=models.layout.digest, columns=columns, table=((0.9, -1.2, 0.4, 1.0, 0.5, 0.7),),
        dtype=dtype,
    )  # fmt: skip
    ours = merged_on(cuda, models, recipe, residency, triton=False, staging_bytes=3000)
    for mine, other in zip(ours, merged_bits(models, recipe), strict=True):
        np.testing.assert_array_equal(mine, other)
