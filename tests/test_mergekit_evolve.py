"""mergekit-evolve's configs become study files that mean the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import tiny_project

from evomerge.config import load
from evomerge.errors import InputError
from evomerge.layout import partition
from evomerge.mergekit_evolve import study_from_evolve
from evomerge.mergekit_yaml import mergekit_config
from evomerge.prepare import prepare

GENOME = {
    "models": ["models/math", "models/code"],
    "merge_method": "dare_ties",
    "base_model": "models/base",
    "tokenizer_source": "base",
    "layer_granularity": 1,
    "normalize": False,
}
TASKS: list[Any] = [{"name": "pick_a", "weight": 0.5}, "pick_b"]


def config(folder: Path, genome: dict[str, Any], **top: Any) -> Path:
    path = folder / "evolve.yml"
    path.write_text(yaml.safe_dump({"genome": genome, "tasks": TASKS, "limit": 8, **top}))
    return path


def study(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(study_from_evolve(path).text)
    assert isinstance(found, dict)
    return found


def test_the_readme_example_of_mergekit_evolve_is_a_study_that_checks(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    tiny_project(tmp_path, save_llama)
    path = config(tmp_path, GENOME)
    file = tmp_path / "new.yaml"
    done = subprocess.run(
        [
            sys.executable, "-m", "evomerge", "init", str(file), "--mergekit-evolve", str(path),
            "--include-path", "fitness",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: prompts are given as the tasks have them" in done.stdout
    prepared = prepare(load(file), file)
    # A weight and a density for each of two models, in each group of one of two layers.
    assert prepared.space.dimension == 2 * 2 * 2
    assert prepared.space.blocks == ("layers.0-0", "layers.1-1")
    assert [objective.weight for objective in prepared.tasks.objectives] == [0.5, 1.0]
    assert prepared.file.search.searcher == "cma"
    assert prepared.file.search.trials == 100
    assert len(prepared.splits[0].search) == 8
    recipe = prepared.space.decode((0.5,) * 8)
    assert recipe.option("normalize", True) is False
    assert recipe.dtype == "BF16"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layer_granularity": 0}, {"partition": "model"}),
        ({"layer_granularity": 4}, {"partition": "layers(4)"}),
        ({"filters": ["self_attn", "mlp"]}, {"partition": "module"}),
        ({"normalize": None}, {"parameters": {"normalize": True}}),
        (
            {"merge_method": "task_arithmetic", "normalize": None, "allow_negative_weights": True},
            {"parameters": {"weight": {"low": -1.5, "high": 1.5}, "normalize": False}},
        ),
        (
            {"merge_method": "slerp", "models": ["models/base", "models/math"]},
            {"parameters": {"t": {"low": 0.0, "high": 1.0}}},
        ),
    ],
)
def test_the_space(tmp_path: Path, change: dict[str, Any], expected: dict[str, Any]) -> None:
    space = study(config(tmp_path, GENOME | change))["space"]
    for key, value in expected.items():
        if isinstance(value, dict):
            assert value.items() <= space[key].items()
        else:
            assert space[key] == value


def test_filters_with_groups_of_layers_say_what_they_become(tmp_path: Path) -> None:
    path = config(tmp_path, GENOME | {"filters": ["mlp"], "layer_granularity": 2})
    (note,) = (one for one in study_from_evolve(path).notes if one.startswith("filters"))
    assert "not of 2 layers together (layer_granularity)" in note


def test_models_without_a_base_and_adapters(tmp_path: Path) -> None:
    linear = {"models": ["org/a", "org/b"], "merge_method": "linear"}
    models = study(config(tmp_path, linear))["models"]
    assert models == {"base": "org/a", "experts": {"a": "org/a", "b": "org/b"}}
    adapters = GENOME | {"models": ["models/base+lora/one", "other/one", "models/base"]}
    models = study(config(tmp_path, adapters))["models"]
    assert models["experts"] == {"one": "lora/one", "one-2": "other/one"}


def test_the_step_is_a_sixth_of_the_coefficient(tmp_path: Path) -> None:
    for change, width in (({}, 1.5), ({"allow_negative_weights": True}, 3.0)):
        search = study(config(tmp_path, GENOME | change))["search"]
        assert search["arguments"]["sigma"] * width == pytest.approx(1 / 6, abs=1e-3)


@pytest.mark.parametrize(
    ("genome", "top", "problem"),
    [
        ({"merge_method": "sce"}, {}, "genome.merge_method: expected one of linear"),
        ({"base_model": None}, {}, "genome.base_model: dare_ties needs it"),
        ({"filters": ["lm_head"]}, {}, "genome.filters: lm_head"),
        ({"models": ["x+lora"]}, {}, "adapter of another model"),
        ({"models": ["models/base"]}, {}, "genome.models: expected a model beside the base"),
        ({"layer_granularity": "two"}, {}, "genome.layer_granularity: expected a number"),
        ({"colour": 1}, {}, "genome.colour: not a key of mergekit-evolve"),
        ({}, {"tasks": []}, "tasks: expected a list"),
        ({}, {"tasks": [{"task": "x"}]}, "tasks[0]: expected a name"),
        ({}, {"genome": None}, "genome: expected a mapping"),
        ({}, {"study": 1}, "study: not a key of mergekit-evolve"),
    ],
)
def test_what_has_no_counterpart_is_named(
    tmp_path: Path, genome: dict[str, Any], top: dict[str, Any], problem: str
) -> None:
    path = config(tmp_path, GENOME | genome)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | top))
    with pytest.raises(InputError) as caught:
        study_from_evolve(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


ORACLE = """
import json, sys
import torch, yaml
from mergekit.evo.config import EvolMergeConfiguration
from mergekit.evo.genome import ModelGenome
config = EvolMergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
genome = ModelGenome(config.genome)
values = torch.tensor(json.loads(sys.argv[2]), dtype=torch.float64)
found = genome.genotype_merge_config(values)
print(json.dumps(found.model_dump(mode="json", exclude_none=True)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("EVOMERGE_MERGEKIT_PYTHON"), reason="needs EVOMERGE_MERGEKIT_PYTHON"
)
def test_a_point_of_the_space_is_mergekit_evolves_merge(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    tiny_project(tmp_path, save_llama)
    path = config(tmp_path, GENOME | {"merge_method": "task_arithmetic"})
    file = tmp_path / "new.yaml"
    file.write_text(study_from_evolve(path).text)
    prepared = prepare(load(file), file)
    space = prepared.space
    x = tuple(0.1 + 0.1 * number for number in range(space.dimension))
    recipe = space.decode(x)
    table = dict(zip(space.blocks, recipe.table, strict=True))
    genotype = [
        [[[table[block][recipe.columns.index(f"weight.{name}")]]] for name in ("math", "code")]
        for block in space.blocks
    ]
    done = subprocess.run(
        [os.environ["EVOMERGE_MERGEKIT_PYTHON"], "-c", ORACLE, str(path), json.dumps(genotype)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    sources = {name: f"./models/{name}" for name in ("base", "math", "code")}
    written = mergekit_config(recipe, prepared.models.layout, sources)
    assert written.text is not None, written.reason
    ours = yaml.safe_load(written.text)
    assert partition(prepared.models.layout, recipe.partition).blocks == space.blocks
    assert ours["merge_method"] == theirs["merge_method"]
    for mine, other in zip(ours["slices"], theirs["slices"], strict=True):
        wanted = [source["parameters"] for source in other["sources"] if "parameters" in source]
        given = [source["parameters"] for source in mine["sources"] if "parameters" in source]
        assert len(wanted) == len(given) == 2
        for one, two in zip(given, wanted, strict=True):
            # Ours also names what lies outside the layers, in the first and in the last slice.
            inside = (
                one["weight"][-1]["value"] if isinstance(one["weight"], list) else one["weight"]
            )
            assert inside == pytest.approx(two["weight"], rel=1e-6)
