"""A merge of adapters as factors, taken home as what it is: one adapter of their rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.adapter import open_adapter
from evomerge.checkpoint import read_json_mapping
from evomerge.errors import InputError, RecipeError
from evomerge.lora import Kept, named_base
from evomerge.merge.factor_sources import FactorSources, factor_bytes, forms_of
from evomerge.merge.merger import Merger, models_of
from evomerge.merge.methods import METHODS
from evomerge.models import Models
from evomerge.recipe import Recipe

#: What says how the factors are applied; equal in all adapters that can be merged.
_APPLIED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def merges_factors(recipe: Recipe) -> bool:
    """Tell whether a recipe's merge is an adapter itself."""
    method = METHODS.get(recipe.method)
    return method is not None and method.adapters


def own_rank(models: Models) -> int:
    """Return the largest rank of the experts' factors."""
    return max(form.rank for form in forms_of(models, 0).values())


def adapter_bytes(models: Models) -> int:
    """Return the bytes of the merged adapter at most."""
    return 2 * factor_bytes(models) // max(len(models.experts), 1)


def write_factors(recipe: Recipe, models: Models, folder: Path) -> Kept:
    """Write the merged factors as a peft adapter; nothing is lost, folded it is the merge.

    Args:
        recipe: of a method of factors, with sources that can be shown.
        models: what it is made from.
        folder: an existing directory; making the whole atomic is the caller's business.

    Raises:
        ModelError: the experts are no adapters of equal form.
        InputError: nothing is merged.
        RecipeError: the recipe does not fit the models, or a factor is not finite.
    """
    from safetensors.numpy import save_file

    models = models_of(recipe, models)
    merger = Merger.of(recipe, models)
    plan = merger.plan(recipe)
    assert plan.shares is not None
    if not plan.weights.any():
        raise InputError("--lora: the merge does not differ from the base, there is no adapter")
    sources = merger.sources.factors
    sources.require_finite()
    tensors = {}
    for number, span in enumerate(merger.partition(recipe.partition).spans):
        if span.slot not in sources.forms:
            continue
        module = _module(models, span.slot)
        pair = sources.merged(span.slot, plan.weights[number], plan.shares[number])
        for factor, matrix in zip("AB", pair, strict=True):
            if not np.isfinite(matrix).all():
                raise RecipeError(f"merge: {factor} of {module} is not finite (smaller weights)")
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = matrix
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _config(recipe, models, sources)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    _require_same_form(folder, models)
    return Kept(
        rank=own_rank(models), share=1.0, error=0.0, worst="", worst_error=0.0, saved=(), lost=(),
        exact=True,
    )  # fmt: skip


def _config(recipe: Recipe, models: Models, sources: FactorSources) -> dict[str, Any]:
    """Return the config of the merged adapter: applied as the first of the experts is."""
    first = read_json_mapping(models.experts[0].directory / "adapter_config.json", "export")
    names = [_module(models, slot) for slot in sources.forms]
    return {
        "peft_type": "LORA", "task_type": first.get("task_type"), "inference_mode": True,
        **named_base(recipe),
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(names),
        "fan_in_fan_out": any(form.transposed for form in sources.forms.values()),
        "init_lora_weights": True, "use_dora": False, "modules_to_save": None,
        **{key: first[key] for key in _APPLIED if first.get(key) is not None},
    }  # fmt: skip


def _module(models: Models, slot: int) -> str:
    """Return what the experts call the module of a slot: peft knows it by that name."""
    return models.experts[0].folds[models.layout.slots[slot].name].module


def _require_same_form(folder: Path, models: Models) -> None:
    """Read the adapter back: its factors must be applied to the same slots, as they were.

    Raises:
        AssertionError: they are not: a bug.
    """
    written = open_adapter(str(folder), folder, "export", models.base, "export")
    alone = Models(models.base, (written,), models.layout, models.buffers)
    assert forms_of(alone, 0) == forms_of(models, 0)
