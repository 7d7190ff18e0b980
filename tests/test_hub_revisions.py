"""Models of the Hub: what is written down names the commits that were read, of adapters as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from small_study import EXPERTS, finished
from tiny_project import tiny_project

from evomerge.advice import adapter_warnings
from evomerge.config import load
from evomerge.export import ExportOptions, choose, export
from evomerge.facts import plan_facts
from evomerge.licences import stated_licence
from evomerge.lora import write_lora
from evomerge.models import Models, open_models
from evomerge.one_shot import merge_recipe
from evomerge.prepare import prepare
from evomerge.recipe import Recipe

BASE, ADAPTER, MOVED = "ba" * 20, "ad" * 20, "cc" * 20


class Cache:
    """A cache of huggingface_hub, as it leaves it on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, repo: str, commit: str, source: Path) -> Path:
        """Store a directory as a commit, and let the branch main point to it."""
        place = self._folder / f"models--{repo.replace('/', '--')}"
        shutil.copytree(source, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        return place / "snapshots" / commit


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return Cache(tmp_path / "hub")


@pytest.fixture
def sources(llama_family: Callable[..., tuple[Path, list[tuple[str, str]]]]) -> Models:
    base, experts = llama_family(experts=3)
    named = zip(EXPERTS, experts, strict=True)
    return open_models(str(base), [(name, path) for name, (_, path) in named])


@pytest.fixture
def models(cache: Cache, sources: Models, tmp_path: Path) -> Models:
    """A base and an adapter from the Hub, and two local experts."""
    cache.add("owner/base", BASE, sources.base.directory)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_lora(mixed(sources), sources, 4, adapter)
    cache.add("owner/adapter", ADAPTER, adapter)
    local = [(one.name, one.source) for one in sources.experts[1:]]
    return open_models("owner/base", [("one", "owner/adapter@main"), *local])


def mixed(models: Models) -> Recipe:
    base, experts = models.refs
    return Recipe(
        "task_arithmetic", base, experts, "model", models.layout.digest,
        tuple(f"weight.{name}" for name in EXPERTS), ((0.5, 0.3, 0.2),),
    )  # fmt: skip


def test_exports_name_both_commits(models: Models, tmp_path: Path) -> None:
    view = finished(tmp_path / "study", models=models)
    out = export(view, choose(view), models, tmp_path / "m").out
    recipe = Recipe.load(out / "evomerge_recipe.json")
    base, adapter = f"owner/base@{BASE}", f"owner/adapter@{ADAPTER}"
    assert (recipe.base.source, recipe.experts[0].source) == (base, adapter)
    mergekit = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert mergekit["base_model"] == base
    # An adapter alone is no model for mergekit; this is how it writes one on its base.
    assert f"{base}+{adapter}" in (out / "mergekit_config.yml").read_text()
    card = (out / "README.md").read_text()
    assert f"[{base}](https://huggingface.co/owner/base)" in card
    assert f"[{adapter}](https://huggingface.co/owner/adapter)" in card
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter["base_model"] == ["owner/base", "owner/adapter"]


def test_an_exported_adapter_pins_its_base(models: Models, tmp_path: Path) -> None:
    """peft loads the base at ``revision``; without it whatever main is by then."""
    view = finished(tmp_path / "study", models=models)
    out = export(view, choose(view), models, tmp_path / "l", options=ExportOptions(lora=2)).out
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["revision"] == BASE
    of_directory = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert of_directory["revision"] is None


def test_a_branch_that_moves_changes_nothing(
    models: Models, sources: Models, cache: Cache, tmp_path: Path
) -> None:
    view = finished(tmp_path / "study", models=models)
    first = export(view, choose(view), models, tmp_path / "m").out
    cache.add("owner/base", MOVED, sources.experts[0].directory)
    assert open_models("owner/base", []).base.fingerprint != models.base.fingerprint
    # As the journal says it, and as the export does.
    journaled = view.trial(choose(view)).recipe
    assert journaled.base.source == f"owner/base@{BASE}"
    assert journaled.experts[0].source == f"owner/adapter@{ADAPTER}"
    (tmp_path / "r.json").write_text(journaled.to_json())
    again = merge_recipe(tmp_path / "r.json", tmp_path / "n", {})
    written = [(one / "model.safetensors").read_bytes() for one in (first, again.out)]
    assert written[0] == written[1]


def test_the_licence_is_that_of_the_commit(models: Models, cache: Cache, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(models.base.directory, newer)
    (newer / "README.md").write_text("---\nlicense: mit\n---\n")
    cache.add("owner/base", MOVED, newer)
    assert stated_licence(models.base) == "unknown"
    assert stated_licence(open_models("owner/base", []).base) == "mit"


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"base_model_name_or_path": "owner/base", "revision": BASE}, ""),
        ({"base_model_name_or_path": "Owner/Base", "revision": "main"}, ""),
        ({"base_model_name_or_path": "/home/me/base"}, ""),
        ({}, ""),
        (
            {"base_model_name_or_path": "owner/other"},
            "models.experts.one: the adapter was made for owner/other, the base is owner/base",
        ),
        (
            {"base_model_name_or_path": "owner/base", "revision": MOVED},
            f"models.experts.one: the adapter was made for owner/base@{MOVED}, the base is at "
            f"{BASE} (models.base: owner/base@{MOVED})",
        ),
    ],
)
def test_an_adapter_of_another_base_is_pointed_out(
    models: Models, config: dict[str, str], warning: str
) -> None:
    path = models.experts[0].directory / "adapter_config.json"
    before = json.loads(path.read_text())
    del before["base_model_name_or_path"], before["revision"]
    path.write_text(json.dumps({**before, **config}))
    assert adapter_warnings(models) == ([warning] if warning else [])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_worker_has_the_commit_that_was_checked(
    cache: Cache, tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    (tmp_path / "p").mkdir()
    folder = tiny_project(tmp_path / "p", save_llama)
    cache.add("owner/base", BASE, folder / "models/base")
    overrides = ["models.base=owner/base"]
    prepared = prepare(load(folder / "study.yaml", overrides), folder / "study.yaml")
    assert prepared.factory.base == f"owner/base@{BASE}"
    assert dict(prepared.factory.experts)["math"] == str(folder / "models/math")
    assert plan_facts(prepared)["models"]["base"] == f"owner/base@{BASE}"
