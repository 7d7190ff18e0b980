"""mergekit itself, run on our configurations, gives our tensors within one rounding step."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.layout import partition
from evomerge.merge.methods import METHODS
from evomerge.merge.writer import write_checkpoint
from evomerge.mergekit_yaml import mergekit_config
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe

PYTHON = os.environ.get("EVOMERGE_MERGEKIT_PYTHON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="needs mergekit in its own environment: python -m venv mk && "
        "mk/bin/pip install torch==2.13.0 && mk/bin/pip install mergekit==0.1.5, "
        "then EVOMERGE_MERGEKIT_PYTHON=mk/bin/python",
    ),
    pytest.mark.timeout(600),
]

EXPERTS = ("one", "two", "three")


def save_pool(folder: Path, dtype: str, tied: bool) -> None:
    """Save a tiny random base and three experts near it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in ("base", *EXPERTS):
        if name != "base":
            # Large steps, so that slerp sees both its arc and its straight line.
            moved = {
                key: tensor + (0.02 * torch.randn_like(tensor) if tensor.ndim > 1 else 0.3)
                for key, tensor in state.items()
            }
            if tied:
                moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
            base.load_state_dict(moved)
        base.to(getattr(torch, dtype)).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    made: dict[tuple[str, bool], Path] = {}

    def get(dtype: str, tied: bool) -> Path:
        if (dtype, tied) not in made:
            made[dtype, tied] = tmp_path_factory.mktemp(f"pool-{dtype}-{tied}")
            save_pool(made[dtype, tied], dtype, tied)
        return made[dtype, tied]

    return get


def random_recipe(
    models: Models, method: str, spec: str, options: dict[str, str | float | bool]
) -> Recipe:
    base, experts = models.refs
    columns = METHODS[method].columns(tuple(expert.name for expert in experts))
    columns = tuple(name for name in columns if not name.startswith("density."))
    rng = random.Random(f"{method} {spec}")
    rows = len(partition(models.layout, spec).blocks)
    table = tuple(tuple(rng.uniform(0.1, 0.9) for _ in columns) for _ in range(rows))
    return Recipe(
        method=method, base=base, experts=experts, partition=spec, layout=models.layout.digest,
        columns=columns, table=table, options=tuple(sorted(options.items())), dtype=models.dtype,
    )  # fmt: skip


CASES: list[tuple[str, int, str, dict[str, str | float | bool]]] = [
    ("linear", 3, "model", {}),
    ("linear", 3, "layer", {}),
    ("linear", 3, "module", {"normalize": False}),
    ("linear", 2, "tensor", {}),
    ("task_arithmetic", 3, "model", {}),
    ("task_arithmetic", 3, "layer", {}),
    ("task_arithmetic", 3, "module", {"normalize": True}),
    ("task_arithmetic", 2, "tensor", {}),
    ("slerp", 1, "layer", {}),
    ("slerp", 2, "module", {}),
    ("ties", 3, "layer", {"zero_sum": "plus"}),
    ("ties", 3, "module", {"zero_sum": "plus", "normalize": False}),
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mergekit_gives_the_same_tensors(
    pool: Callable[[str, bool], Path], tmp_path: Path, dtype: str, tied: bool
) -> None:
    """One mergekit process per pool runs all cases: its start is most of the time."""
    import torch
    from safetensors.torch import load_file

    folder = pool(dtype, tied)
    names: list[str] = []
    for method, count, spec, options in CASES:
        experts = [(name, str(folder / name)) for name in EXPERTS[:count]]
        models = open_models(str(folder / "base"), experts)
        recipe = random_recipe(models, method, spec, dict(options))
        name = f"{method}-{count}-{spec}"
        names.append(name)
        found = mergekit_config(recipe, models.layout, {n: f"./{n}" for n in ("base", *EXPERTS)})
        assert found.text is not None, found.reason
        (tmp_path / f"{name}.yml").write_text(found.text)
        (tmp_path / name).mkdir()
        write_checkpoint(recipe, models, tmp_path / name, 5_000_000)
    run_mergekit(folder, tmp_path, names)
    sources = [load_file(folder / name / "model.safetensors") for name in ("base", *EXPERTS)]
    for name in names:
        ours = load_file(tmp_path / name / "model.safetensors")
        theirs: dict[str, torch.Tensor] = {}
        for shard in sorted((tmp_path / f"{name}-theirs").glob("*.safetensors")):
            theirs |= load_file(shard)
        assert ours.keys() == theirs.keys(), name
        for key, mine in ours.items():
            assert mine.dtype == theirs[key].dtype
            a, b = mine.double(), theirs[key].double()
            # One rounding step of the output dtype, and two of float32 per term of the sum
            # (subtraction and product): mergekit adds the terms in another order than we do.
            step = torch.finfo(mine.dtype).eps * torch.maximum(a.abs(), b.abs())
            terms = 2 * torch.finfo(torch.float32).eps * sum(s[key].double().abs() for s in sources)
            worst = float(((a - b).abs() / (step + terms)).max())
            assert worst <= 1, f"{name}: {key} differs by {worst:.2f} steps"


RUN_ALL = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
folder = sys.argv[1]
for name in sys.argv[2:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(open(f"{folder}/{name}.yml")))
    run_merge(config, f"{folder}/{name}-theirs", MergeOptions(copy_tokenizer=False, quiet=True))
"""


def run_mergekit(folder: Path, work: Path, names: list[str]) -> None:
    """Run mergekit where the models lie, as the header of the YAML says."""
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", RUN_ALL, str(work), *names],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
