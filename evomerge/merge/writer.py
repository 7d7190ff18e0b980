"""Write a merge as a checkpoint: the bits that the engine would put into the live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import ITEM_BYTES, MERGEABLE
from evomerge.merge.merger import Merger
from evomerge.merge.plan import Plan
from evomerge.models import Models
from evomerge.recipe import Recipe

_DTYPE_NAMES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


def write_checkpoint(
    recipe: Recipe, models: Models, out: Path, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write safetensors shards, their index when there are several, and ``config.json``.

    One shard is held in memory at a time.

    Args:
        recipe: the merge.
        models: what it is made from.
        out: an existing directory; making the whole atomic is the caller's business.
        max_shard_bytes: a shard holds at least one tensor and otherwise stays below this.

    Raises:
        RecipeError: the recipe does not fit the models.
        OSError: the disk is full.
    """
    merger = Merger(models)
    plan = merger.plan(recipe)
    shards = _shards(recipe, models, max_shard_bytes)
    names = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for file, tensors in zip(names, shards, strict=True):
        total += _write_shard(out / file, tensors, recipe, models, merger, plan)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config = dict(models.base.config)
    config.pop("torch_dtype", None)
    config["dtype"] = _DTYPE_NAMES[recipe.dtype]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _shards(recipe: Recipe, models: Models, max_bytes: int) -> list[list[str]]:
    """Sort the tensors into shards, in canonical order, buffers last."""
    sizes = {slot.name: slot.size * ITEM_BYTES[recipe.dtype] for slot in models.layout.slots}
    for name in models.buffers:
        entry = models.base.tensors[name]
        sizes[name] = entry.stop - entry.start
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shard(
    path: Path, names: list[str], recipe: Recipe, models: Models, merger: Merger, plan: Plan
) -> int:
    """Merge and write one shard; return the bytes of its tensors."""
    import torch
    from safetensors.torch import save_file

    slots = {slot.name: number for number, slot in enumerate(models.layout.slots)}
    outputs: list[npt.NDArray[Any] | None] = [None] * len(slots)
    for name in names:
        if name in slots:
            size = models.layout.slots[slots[name]].size
            outputs[slots[name]] = np.empty(size, MERGEABLE[recipe.dtype])
    merger.merge(plan, recipe.partition, outputs, recipe.dtype)
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        entry = models.base.tensors[name]
        merged = outputs[slots[name]] if name in slots else None
        bits = np.array(models.base.read(name)) if merged is None else merged
        dtype = _DTYPE_NAMES[entry.dtype if merged is None else recipe.dtype]
        tensors[name] = torch.from_numpy(bits).view(getattr(torch, dtype)).reshape(entry.shape)
    save_file(tensors, str(path), metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
