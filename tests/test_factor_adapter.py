"""The merged factors as an adapter: peft itself reads them and computes what the merge does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lora_adapters import MODULES, save_adapters

from evomerge.factor_adapter import adapter_bytes, write_factors
from evomerge.lora import write_lora
from evomerge.merge.factor_sources import forms_of
from evomerge.merge.writer import write_checkpoint
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe

GPT2 = {"transformer.h.0.attn.c_attn": (48, 16), "transformer.h.0.mlp.c_proj": (16, 64)}


def recipe_of(models: Models) -> Recipe:
    base, experts = models.refs
    columns = [f"{kind}.{one.name}" for kind in ("weight", "density") for one in experts]
    return Recipe(
        method="lora_factors", base=base, experts=experts, partition="model",
        layout=models.layout.digest, columns=tuple(columns),
        table=((0.9, -1.2, 0.4, 1.0, 0.5, 0.7),),
    )  # fmt: skip


def repository(
    folder: Path, save_llama: Callable[..., Path], kind: str, **settings: Any
) -> tuple[Path, Models]:
    """Return a base, Llama or GPT-2, and its models with three adapters."""
    if kind == "llama":
        base, modules = save_llama("base", 1), MODULES
    else:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        base, modules = folder / "base", GPT2
        config = GPT2Config(
            vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(base)
    last = list(modules)[-1].rpartition(".")[2]
    for key in ("alpha_pattern", "rank_pattern"):
        if key in settings:
            settings[key] = {last: settings[key]}
    adapters = save_adapters(folder / "adapters", ("a", "b", "c"), modules=modules, **settings)
    return base, open_models(str(base), adapters)


#: Settings of adapters that are applied in another way than by alpha over rank.
SETTINGS = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": 5},
    {"rank_pattern": 3, "lora_alpha": 7},
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_is_applied_as_the_experts_are(
    tmp_path: Path, save_llama: Callable[..., Path], kind: str, settings: dict[str, Any]
) -> None:
    base, models = repository(tmp_path, save_llama, kind, **settings)
    (tmp_path / "out").mkdir()
    kept = write_factors(recipe_of(models), models, tmp_path / "out")
    assert (kept.rank, kept.exact, kept.error) == (3, True, 0.0)
    written = open_models(str(base), [("merged", str(tmp_path / "out"))])
    assert forms_of(written, 0) == forms_of(models, 0)
    assert (tmp_path / "out/adapter_model.safetensors").stat().st_size < 2 * adapter_bytes(models)


def test_modules_keep_the_names_that_the_experts_gave_them(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    """A body saved without its head has no ``model.`` before its names; adapters have it."""
    from safetensors.torch import load_file, save_file

    base, _ = repository(tmp_path, save_llama, "llama")
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    weights = load_file(bare / "model.safetensors")
    plain = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(plain, bare / "model.safetensors", metadata={"format": "pt"})
    names = [(name, str(tmp_path / "adapters" / name)) for name in "abc"]
    models = open_models(str(bare), names)
    (tmp_path / "out").mkdir()
    write_factors(recipe_of(models), models, tmp_path / "out")
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert written.keys() == load_file(tmp_path / "adapters/a/adapter_model.safetensors").keys()


# peft reads an attribute that transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_gives_the_logits_of_the_merge(
    tmp_path: Path, save_llama: Callable[..., Path], kind: str, settings: dict[str, Any]
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    base, models = repository(tmp_path, save_llama, kind, **settings)
    for name in ("lora", "merge"):
        (tmp_path / name).mkdir()
    write_checkpoint(recipe_of(models), models, tmp_path / "merge")
    write_factors(recipe_of(models), models, tmp_path / "lora")
    prompt = torch.tensor([[1, 5, 7, 3, 4, 9]])
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merge").eval()(prompt).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(prompt).logits
        model = AutoModelForCausalLM.from_pretrained(base)
        found = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()(prompt).logits
    moved = (plain - whole).abs().max().item()
    assert moved > 1e-3
    assert (found - whole).abs().max().item() < 1e-4 * max(moved, 1.0)


@pytest.mark.parametrize(
    ("source", "base", "revision"),
    [
        ("owner/base@" + "ab" * 20, "owner/base", "ab" * 20),
        ("owner/base", "owner/base", None),
        ("./me@work/base", "./me@work/base", None),
    ],
)
def test_merged_factors_name_their_base_as_other_adapters_do(
    tmp_path: Path, save_llama: Callable[..., Path], source: str, base: str, revision: str | None
) -> None:
    """The commit was dropped, and so was the rest of a directory behind an ``@``."""
    _, models = repository(tmp_path, save_llama, "llama")
    recipe = recipe_of(models)
    recipe = replace(recipe, base=replace(recipe.base, source=source))
    for name in ("factors", "nearest"):
        (tmp_path / name).mkdir()
    write_factors(recipe, models, tmp_path / "factors")
    write_lora(recipe, models, 2, tmp_path / "nearest")
    for name in ("factors", "nearest"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)
