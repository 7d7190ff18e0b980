"""A search over adapters finds the weights behind a merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lora_adapters import MODULES
from lora_project import NAMES, lora_project, main

from evomerge.config import load
from evomerge.merge.writer import write_checkpoint
from evomerge.prepare import Prepared, prepare
from evomerge.study_view import StudyView


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    return lora_project(tmp_path_factory.mktemp("repository"), save_llama)


@pytest.fixture(scope="module")
def prepared(project: Path) -> Prepared:
    path = project / "study.yaml"
    return prepare(load(path), path)


DISTANCE = """
from pathlib import Path
from safetensors.torch import load_file

TARGET = load_file(Path(__file__).parent / "target.safetensors")


def score(model, tokenizer, items):
    names = [module + ".weight" for module in MODULES]
    state = model.state_dict()
    apart = sum(float((state[name] - TARGET[name]).square().sum()) for name in names)
    return [apart] * len(items)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "near"), [("scale", 0.02), ("joint", 0.1)])
def test_a_search_finds_the_weights_behind_a_merge(
    project: Path, tmp_path: Path, prepared: Prepared, stages: str, near: float
) -> None:
    """The target is a merge with known weights; the search sees the distance from it only."""
    shutil.copytree(project, tmp_path / "p", ignore=shutil.ignore_patterns("studies"))
    wanted = np.array([0.9, -0.6, 0.0, 0.4, 0.0, 0.2])
    values = {f"weight.{name}": weight for name, weight in zip(NAMES, wanted, strict=True)}
    (tmp_path / "t").mkdir()
    write_checkpoint(prepared.space.outside(values), prepared.models, tmp_path / "t")
    shutil.copyfile(tmp_path / "t/model.safetensors", tmp_path / "p/fitness/target.safetensors")
    (tmp_path / "p/fitness/distance.py").write_text(f"MODULES = {list(MODULES)}\n{DISTANCE}")
    (tmp_path / "p/fitness/items.jsonl").write_text("1\n2\n3\n")
    path = tmp_path / "p/study.yaml"
    goal = "{kind: python, function: fitness/distance.py:score, items: fitness/items.jsonl, "
    goal += "direction: minimize}"
    overrides = [
        "fitness.tasks=[]", f"fitness.objectives=[{goal}]", "search.trials=600",
        "fitness.items={search: 1, validation: 1, test: 1}",
        f"search.arguments={{stages: {stages}, weight_l1: 0.0, density_l1: 0.0, sigma: 0.2}}",
    ]  # fmt: skip
    if stages == "scale":
        overrides.append("space.parameters.density=1")
    assert main("run", path, *(f"--set={one}" for one in overrides)) == 0
    view = StudyView.load(tmp_path / "p/studies/repository")
    assert view.knee is not None
    table = view.trial(view.knee).recipe.table[0]
    found = np.array(table[:6])
    assert found == pytest.approx(wanted, abs=near)
