"""A merge in place leaves nothing of the merge before it: compiled code, caches, probes.

Nothing here compiles a model or captures a graph of it. These tests hold for whoever does: torch
looks the weights up at every call, as long as they are the same tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hot_path import Request, lm_of, make, prompts, questions

from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.hot.likelihood import arranged, log_likelihoods
from evomerge.fitness.hot.runner import Runner
from evomerge.merge.engine import Engine
from evomerge.merge.merger import Merger
from evomerge.models import open_models
from evomerge.recipe import Recipe


def merged_into(model: Any, other: Any) -> None:
    """Write weights over those of a live model, as the engine does."""
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)


def others() -> list[Any]:
    return [make("llama", seed=seed) for seed in (3, 4, 5)]


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_a_compiled_model_sees_a_merge_in_place(
    backend: str, llama_family: Callable[..., tuple[Path, list[tuple[str, str]]]]
) -> None:
    from transformers import AutoModelForCausalLM

    base, named = llama_family(dtype="float32", experts=2)
    models = open_models(str(base), named)
    model = AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    engine = Engine(Merger(models), model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=backend)
    tokens = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    seen = []
    for weight in (0.0, 1.0, 0.4, 0.0):
        engine.apply(
            Recipe(
                method="task_arithmetic",
                base=models.refs[0],
                experts=models.refs[1],
                partition="model",
                layout=models.layout.digest,
                columns=tuple(f"weight.{expert.name}" for expert in models.refs[1]),
                table=((weight, 2 * weight),),
                dtype="F32",
            )
        )
        apart = copy.deepcopy(model)  # weights that nobody compiled
        with torch.inference_mode():
            mine = compiled(input_ids=tokens, use_cache=False).logits
            theirs = apart(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        seen.append(mine)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert torch.equal(seen[0], seen[3])
    torch.compiler.reset()


def answers(runner: Runner) -> dict[str, Any]:
    """Return answers of every kind, with shared prefixes and trees."""
    shots = "the same examples for all of them, some thirty tokens; "
    pairs = [Request((f"{shots}{n} {n * n}?", end)) for n in range(6) for end in (" yes", " no")]
    texts = [Request((f"{shots}text {n}",)) for n in range(3)]
    return {
        "loglikelihood": runner.loglikelihood(pairs),
        "rolling": runner.loglikelihood_rolling(texts),
        "generated": runner.generate_until(prompts(["<never>"], 12)),
    }


def test_the_hot_path_keeps_nothing_of_the_merge_before() -> None:
    """Prefixes, plans, probes and the cache of the generation, over several merges and back."""
    model = make("llama", seed=9)
    runner = Runner(lm_of(model), 256)
    merges = others()
    fresh = [answers(Runner(lm_of(other), 256)) for other in merges]
    assert fresh[0] != fresh[1] != fresh[2]
    for row in (0, 1, 2, 1, 0):
        merged_into(model, merges[row])
        assert answers(runner) == fresh[row]
        assert answers(runner) == fresh[row]


def test_a_merge_that_is_not_finite_leaves_no_trace() -> None:
    model = make("llama", seed=9)
    runner = Runner(lm_of(model), 256)
    other = others()[0]
    broken = make("llama", seed=6)
    with torch.no_grad():
        next(iter(broken.model.layers)).self_attn.v_proj.weight.fill_(float("nan"))
    merged_into(model, broken)
    answers(runner)
    merged_into(model, other)
    assert answers(runner) == answers(Runner(lm_of(other), 256))


@pytest.mark.parametrize(
    "make_first", [lambda: make("llama", seed=9), lambda: make("llama", seed=3)]
)
def test_what_the_probes_found_does_not_depend_on_the_weights(
    make_first: Callable[[], Any],
) -> None:
    model = make_first()
    forward = Forward(model)
    other = others()[1]
    merged_into(model, other)
    again = Forward(other)
    assert (forward.trees, forward.prefixes) == (again.trees, again.prefixes)
    asked = questions(2)
    mine = log_likelihoods(forward, arranged(forward, asked, 64), 512)
    assert mine == log_likelihoods(again, arranged(again, asked, 64), 512)
