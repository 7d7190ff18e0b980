"""Small LoRA adapters in peft's format for the tiny Llama of ``conftest``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: module → [out, in] of the tiny Llama in conftest.
MODULES = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.mlp.up_proj": (24, 16),
    "model.layers.1.self_attn.v_proj": (8, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
}


def save_adapter(
    directory: Path,
    seed: int,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    *,
    rank: int = 3,
    dtype: str = "float32",
    scale: float = 0.2,
    **config: Any,
) -> Path:
    """Write one random adapter; ``config`` overrides its settings."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, columns) in modules.items():
        for factor, shape in (("A", (rank, columns)), ("B", (out, rank))):
            value = scale * torch.randn(shape, generator=generator)
            key = f"base_model.model.{module}.lora_{factor}.weight"
            tensors[key] = value.to(getattr(torch, dtype))
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        "base_model_name_or_path": "/home/somebody/base",
    } | config  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def save_adapters(folder: Path, names: Sequence[str], **settings: Any) -> list[tuple[str, str]]:
    """Write random adapters of one form; return names and directories."""
    return [
        (name, str(save_adapter(folder / name, seed, **settings)))
        for seed, name in enumerate(names)
    ]
