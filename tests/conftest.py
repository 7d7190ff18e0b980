"""Tiny real checkpoints for every test that needs weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import searcher_marks

# Its asserts explain themselves only if nobody imports it first.
pytest.register_assert_rewrite("evomerge.testing_pool")

# One thread everywhere: the machines that run the tests have two cores, and results must not
# depend on how many there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# lm-eval bootstraps in processes that it forks, which can hang where a test has left a thread.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

SaveLlama = Callable[..., Path]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what only the slow run takes, before it is sorted out."""
    searcher_marks.mark(items)


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Keep torch on one thread where a test imports it."""
    yield


@pytest.fixture(scope="session")
def save_llama(tmp_path_factory: pytest.TempPathFactory) -> SaveLlama:
    """Return a function that saves a tiny random Llama and returns its directory."""

    def save(
        name: str,
        seed: int,
        *,
        tied: bool = True,
        dtype: str = "float32",
        base: Path | None = None,
        scale: float = 0.05,
        layers: int = 2,
        vocab: int = 32,
        shard_size: str = "50GB",
    ) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        if base is None:
            model = LlamaForCausalLM(config)
        else:
            model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(
                        scale * torch.randn_like(parameter) * parameter.std().nan_to_num(1)
                    )
        model = model.to(getattr(torch, dtype))
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory, max_shard_size=shard_size)
        return directory

    return save


@pytest.fixture(scope="session")
def llama_family(save_llama: SaveLlama) -> Callable[..., tuple[Path, list[tuple[str, str]]]]:
    """Return a function giving a base and named experts of it, cached per arguments."""
    made: dict[tuple[Any, ...], tuple[Path, list[tuple[str, str]]]] = {}

    def family(
        dtype: str = "float32", tied: bool = True, experts: int = 2
    ) -> tuple[Path, list[tuple[str, str]]]:
        key = (dtype, tied, experts)
        if key not in made:
            base = save_llama("base", 1, tied=tied, dtype=dtype)
            made[key] = (
                base,
                [
                    (name, str(save_llama(name, 2 + k, tied=tied, dtype=dtype, base=base)))
                    for k, name in enumerate(("math", "code", "chat", "law", "bio")[:experts])
                ],
            )
        return made[key]

    return family
