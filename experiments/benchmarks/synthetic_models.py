"""Checkpoints of the shape of a Llama, made from a seed, for measurements only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a Llama with an untied head."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name → shape."""
        hidden, intermediate = self.hidden, self.intermediate
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
        }
        for layer in range(self.layers):
            inside: dict[str, tuple[int, ...]] = {
                f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"
            }
            inside |= {
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "mlp.down_proj": (hidden, intermediate),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }
            for part, shape in inside.items():
                shapes[f"model.layers.{layer}.{part}.weight"] = shape
        return shapes

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(prod(shape) for shape in self.tensors().values())

    def config(self, dtype: str) -> str:
        """Return the text of config.json."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
        }
        return json.dumps(config, indent=1)


#: Llama 2 7B.
LLAMA_7B = LlamaShape(32_000, 4096, 11_008, 32, 32)


def parse_count(text: str) -> int:
    """Return the number in ``100M`` and the like."""
    factor = _SUFFIXES.get(text[-1:].upper(), 1)
    digits = text[:-1] if factor > 1 else text
    return int(float(digits) * factor)


def shape_of(parameters: int) -> LlamaShape:
    """Return the shape with about as many parameters."""
    if parameters >= 6 * 10**9:
        return LLAMA_7B
    vocabulary = 32_000 if parameters >= 50 * 10**6 else 2_000
    layers = 12 if parameters < 10**9 else 24

    def shape(hidden: int) -> LlamaShape:
        intermediate = 64 * round(hidden * 8 / 3 / 64)
        return LlamaShape(vocabulary, hidden, intermediate, layers, hidden // 64)

    candidates = [shape(hidden) for hidden in range(64, 4097, 64)]
    return min(candidates, key=lambda one: abs(one.parameters - parameters))


def save_models(folder: Path, shape: LlamaShape, experts: int, dtype: str, seed: int = 0) -> None:
    """Write ``base``, ``one``, ``two``, ... below ``folder``: a base and its fine-tunes.

    Args:
        folder: existing.
        shape: of all of them.
        experts: K.
        dtype: torch's name.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file

    target = getattr(torch, dtype)
    for number, name in enumerate(model_names(experts)):
        state = {}
        for index, (tensor, size) in enumerate(shape.tensors().items()):
            origin = torch.Generator().manual_seed(seed + 1000 * index)
            own = torch.Generator().manual_seed(seed + 1000 * index + number)
            values = torch.randn(size, generator=origin) * 0.02 + (1.0 if len(size) == 1 else 0.0)
            if number:
                values += torch.randn(size, generator=own) * 0.002
            state[tensor] = values.to(target)
        _write(folder / name, shape, dtype)
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})


def model_names(experts: int) -> list[str]:
    """Return the names of the base and the experts."""
    return ["base", *(f"expert{k + 1}" for k in range(experts))]


def save_headers(folder: Path, shape: LlamaShape, experts: int, dtype: str = "BF16") -> None:
    """Write models whose weights are holes in their files: layouts that take no disk.

    Args:
        folder: existing.
        shape: of all of them.
        experts: K.
        dtype: safetensors name of a two-byte dtype.
    """
    at, header = 0, {}
    for name, size in shape.tensors().items():
        stop = at + 2 * prod(size)
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    for number, name in enumerate(model_names(experts)):
        _write(folder / name, shape, "bfloat16")
        with (folder / name / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(bytes([number] * 64))  # so that no two models are the same
            file.truncate(8 + len(text) + at)


def _write(directory: Path, shape: LlamaShape, dtype: str) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(shape.config(dtype), encoding="utf-8")
