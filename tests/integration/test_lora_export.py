"""peft itself reads an adapter that was exported, and computes with it what the merge computes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mergekit_parity import PYTHON, needs_mergekit

from evomerge.lora import write_lora
from evomerge.merge.writer import write_checkpoint
from evomerge.models import open_models
from evomerge.recipe import Recipe

#: The environment that has mergekit has peft too.
pytestmark = [*needs_mergekit, pytest.mark.slow]

CODE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, merge = sys.argv[1:]
x = torch.tensor([[1, 5, 7, 3, 4, 9]])
with torch.no_grad():
    whole = AutoModelForCausalLM.from_pretrained(merge).eval()(x).logits
    plain = AutoModelForCausalLM.from_pretrained(base).eval()(x).logits
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    found = model.eval()(x).logits
print(json.dumps([(found - whole).abs().max().item(), (plain - whole).abs().max().item()]))
"""


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_peft_gives_the_logits_of_the_merge(
    tmp_path: Path, llama_family: Callable[..., tuple[Path, list[tuple[str, str]]]], kind: str
) -> None:
    if kind == "gpt2":
        base, experts = gpt2(tmp_path)
    else:
        base, experts = llama_family(tied=kind == "tied")
    models = open_models(str(base), experts)
    first, others = models.refs
    recipe = Recipe(
        method="task_arithmetic", base=first, experts=others, partition="model",
        layout=models.layout.digest, columns=tuple(f"weight.{one.name}" for one in others),
        table=((3.0, -2.0),),
    )  # fmt: skip
    for name in ("lora", "merge"):
        (tmp_path / name).mkdir()
    write_checkpoint(recipe, models, tmp_path / "merge")
    kept = write_lora(recipe, models, 64, tmp_path / "lora")
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", CODE, str(base), str(tmp_path / "lora"),
         str(tmp_path / "merge")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    apart, moved = json.loads(done.stdout.splitlines()[-1])
    assert moved > 1e-3
    if kind == "gpt2":  # its linear layers have biases, which are told to be lost
        assert kept.lost
        assert apart < moved
    else:
        assert kept.error < 1e-5
        assert apart < 1e-4 * max(moved, 1.0)


def gpt2(folder: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Return a tiny GPT-2, whose linear layers are stored as [in, out], and two experts of it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    paths = []
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2,
                                       n_head=2, bos_token_id=1, eos_token_id=2))  # fmt: skip
    for name in ("base", "one", "two"):
        model.save_pretrained(folder / name)
        paths.append(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return paths[0], [("one", str(paths[1])), ("two", str(paths[2]))]
