"""An exported directory: complete, verified, portable, and whole or absent."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_study import EXPERTS, finished

import evomerge.export as export_module
from evomerge import atomic_directory, export_documents
from evomerge.errors import InputError, ModelError, NothingUsableError, RecipeError, StorageError
from evomerge.export import Exported, choose, export, public_recipe, public_sources
from evomerge.model_card import hub_ids
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe
from evomerge.scoring import Scoring, lm_eval_command, lm_eval_notes, lm_eval_runs
from evomerge.study_view import StudyView

SCORING = Scoring(
    tasks=("reverse", "sort"), num_fewshot=(None, None), include_path=("fitness",),
    batch_size=16, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Models:
    """Models in a folder whose path must not show in anything that is exported."""
    home = tmp_path_factory.mktemp("CANARY-home")
    for seed, name in enumerate(("base", *EXPERTS)):
        made = save_llama(name, 1 + seed, base=None if name == "base" else home / "base")
        shutil.copytree(made, home / name)
    (home / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (home / "base" / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(home / "base"), "model_max_length": 64})
    )
    for name in EXPERTS:
        shutil.copy(home / "base" / "tokenizer.json", home / name)
    config = json.loads((home / "base" / "config.json").read_text())
    config["_name_or_path"] = str(home / "base")
    (home / "base" / "config.json").write_text(json.dumps(config))
    (home / "base" / "optimizer.pt").write_text("must not travel")
    return open_models(str(home / "base"), [(name, str(home / name)) for name in EXPERTS])


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory, models: Models) -> StudyView:
    return finished(tmp_path_factory.mktemp("CANARY-study") / "strings", models=models)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, view: StudyView, models: Models) -> Exported:
    out = tmp_path_factory.mktemp("CANARY-out") / "merged"
    return export(view, choose(view), models, out, SCORING)


class TestContents:
    def test_holds_what_a_checkpoint_needs_and_nothing_else(self, exported: Exported) -> None:
        assert exported.files == (
            "README.md", "SHA256SUMS", "config.json", "evomerge_recipe.json",
            "evomerge_samples.json", "evomerge_scores.json",
            "generation_config.json", "mergekit_config.yml",
            "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        )  # fmt: skip
        assert exported.bytes == sum(p.stat().st_size for p in exported.out.iterdir())

    def test_nothing_tells_about_the_machine(
        self, exported: Exported, models: Models, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        root = str(tmp_path_factory.getbasetemp())
        for path in exported.out.iterdir():
            data = path.read_bytes()
            assert b"CANARY" not in data, path.name
            assert root.encode() not in data, path.name
            assert str(Path.home()).encode() + b"/" not in data, path.name

    def test_weights_are_base_plus_weighted_deltas(
        self, exported: Exported, view: StudyView, models: Models
    ) -> None:
        """Compared in float64 with the formula itself, block by block."""
        from safetensors.numpy import load_file

        recipe = view.trials[exported.trial].recipe
        base, *experts = (
            load_file(one.directory / "model.safetensors") for one in (models.base, *models.experts)
        )
        merged = load_file(exported.out / "model.safetensors")
        assert merged.keys() == base.keys()
        rows = {"embed": 0, "layer.0": 1, "layer.1": 2, "final": 3}
        for name, tensor in merged.items():
            part = name.split(".")
            block = f"layer.{part[2]}" if part[1] == "layers" else (
                "embed" if "embed" in name else "final"
            )  # fmt: skip
            weights = recipe.table[rows[block]]
            start = base[name].astype(np.float64)
            deltas = [w * (e[name] - start) for w, e in zip(weights, experts, strict=True)]
            assert np.allclose(tensor, start + sum(deltas), rtol=1e-6, atol=1e-7), name

    def test_transformers_loads_it(self, exported: Exported) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(exported.out)
        logits = model(torch.tensor([[1, 5, 7]])).logits
        assert logits.shape == (1, 3, 32)
        assert bool(torch.isfinite(logits).all())

    def test_recipe_restores_the_same_merge(self, exported: Exported, view: StudyView) -> None:
        recipe = Recipe.load(exported.out / "evomerge_recipe.json")
        assert recipe.digest == view.trials[exported.trial].recipe.digest
        assert recipe.base.source == "./base"
        assert [expert.source for expert in recipe.experts] == ["./one", "./two", "./three"]

    def test_scores_are_those_of_the_study(self, exported: Exported, view: StudyView) -> None:
        scores = json.loads((exported.out / "evomerge_scores.json").read_text())
        evaluation = view.test[exported.trial]
        for number, name in enumerate(("reverse", "sort")):
            assert scores["objectives"][name]["test"] == {
                "value": evaluation.scores[number].value, "standard_error": 0.02, "n": 3,
            }  # fmt: skip
            assert set(scores["objectives"][name]) >= {"search", "validation", "test"}
        assert scores["reproduce"]["expected"] == dict(exported.expected)
        assert scores["reproduce"]["items"]["sort"] == ["10", "11", "12"]
        samples = json.loads((exported.out / "evomerge_samples.json").read_text())
        assert samples == {"reverse": [10, 11, 12], "sort": [10, 11, 12]}
        [command] = scores["reproduce"]["commands"]
        assert "pretrained=merged,dtype=float32" in command
        assert "--include_path fitness --samples merged/evomerge_samples.json" in command

    def test_a_trial_without_test_scores_reports_what_it_has(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        number = next(
            t.number for t in view.trials
            if t.evaluation is not None and t.number not in view.validation
        )  # fmt: skip
        result = export(view, number, models, tmp_path / "m", SCORING)
        assert result.split == "search"
        card = (tmp_path / "m" / "README.md").read_text()
        assert "it is not on its Pareto front" in card

    def test_several_shards_have_an_index(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        result = export(view, choose(view), models, tmp_path / "m", max_shard_bytes=6_000)
        shards = [name for name in result.files if name.endswith(".safetensors")]
        assert len(shards) > 1
        index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == shards
        assert result.commands == ()


class TestCard:
    def test_the_hub_accepts_it(self, exported: Exported) -> None:
        from huggingface_hub import ModelCard, ModelCardData

        card = ModelCard.load(exported.out / "README.md")
        assert isinstance(card.data, ModelCardData)
        assert card.data.tags == ["merge", "evomerge"]
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.base_model is None
        for heading in ("### Merge Method", "### Models Merged", "## Configuration", "## Scores"):
            assert heading in card.text
        yml = (exported.out / "mergekit_config.yml").read_text()
        assert yml in card.text
        assert "expert one" in card.text

    def test_measured_scores_are_a_model_index(self, exported: Exported, view: StudyView) -> None:
        """Read by huggingface_hub, and written by it to the same front matter."""
        import yaml
        from huggingface_hub import EvalResult, ModelCard
        from huggingface_hub.repocard_data import (
            eval_results_to_model_index,
            model_index_to_eval_results,
        )

        card = ModelCard.load(exported.out / "README.md")  # raises on a wrong model-index
        results = card.data.eval_results
        assert results is not None
        assert card.data.model_name == "merged"
        assert all(isinstance(one, EvalResult) for one in results)
        found = {(one.dataset_type, one.dataset_split): one.metric_value for one in results}
        expected: dict[tuple[str, str], float] = {}
        for split, scores in (
            ("search", view.told(exported.trial)),
            ("validation", view.validation[exported.trial]),
            ("test", view.test[exported.trial]),
        ):
            expected |= {
                (name, split): value
                for name, value in zip(("reverse", "sort"), scores.values, strict=True)
            }
        assert found == expected
        names = [one.dataset_name for one in results]
        assert names[0] == "reverse, search items (the search optimised these)"
        assert names[-1] == "sort, test items (held out)"
        text = (exported.out / "README.md").read_text().split("---\n")[1]
        index = yaml.safe_load(text)["model-index"]
        assert index == eval_results_to_model_index("merged", results)
        assert model_index_to_eval_results(index) == ("merged", results)

    def test_objectives_of_one_task_are_metrics_of_one_result(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        from huggingface_hub import ModelCard

        scoring = replace(SCORING, tasks=("reverse", "reverse"), metrics=("acc", "acc_norm"))
        export(view, choose(view), models, tmp_path / "m", scoring)
        data = ModelCard.load(tmp_path / "m" / "README.md").data.to_dict()
        results = data["model-index"][0]["results"]
        assert [one["dataset"]["split"] for one in results] == ["search", "validation", "test"]
        assert [one["type"] for one in results[0]["metrics"]] == ["acc", "acc_norm"]

    def test_the_licence_comes_from_the_models(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        from huggingface_hub import ModelCard

        opened = []
        for one, licence in zip(
            (models.base, *models.experts), ("mit", "apache-2.0", "mit", "mit"), strict=True
        ):
            shutil.copytree(one.directory, tmp_path / one.name)
            (tmp_path / one.name / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
            opened.append(replace(one, directory=tmp_path / one.name))
        licensed = replace(models, base=opened[0], experts=tuple(opened[1:]))
        export(view, choose(view), licensed, tmp_path / "m")
        card = ModelCard.load(tmp_path / "m" / "README.md")
        assert card.data.license == "apache-2.0"
        assert "one: apache-2.0, two: mit, three: mit); apache-2.0 is the strictest." in card.text
        export(view, choose(view), models, tmp_path / "n")
        card = ModelCard.load(tmp_path / "n" / "README.md")
        assert card.data.license == "unknown"
        assert "The licence of base, one, two, three is not known" in card.text

    def test_only_hub_models_are_base_models(self) -> None:
        sources = {"base": "o/base@v1", "one": "./one", "two": "o/two", "three": "o/base"}
        assert hub_ids(sources) == ["o/base", "o/two"]

    def test_base_models_of_the_hub_are_named(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        from huggingface_hub import ModelCard

        def hub(index: int, one: Any) -> Any:
            return replace(one, source=f"owner/model-{index}")

        named = replace(
            models,
            base=hub(0, models.base),
            experts=tuple(hub(n + 1, one) for n, one in enumerate(models.experts)),
        )
        export(view, choose(view), named, tmp_path / "m")
        card = ModelCard.load(tmp_path / "m" / "README.md")
        assert card.data.base_model == [f"owner/model-{n}" for n in range(4)]
        assert card.data.to_dict()["base_model_relation"] == "merge"
        assert "model: owner/model-1" in (tmp_path / "m" / "mergekit_config.yml").read_text()


class TestChoice:
    def test_the_knee_is_the_default(self, view: StudyView) -> None:
        assert choose(view) == view.knee

    def test_best_of_an_objective(self, view: StudyView) -> None:
        best = choose(view, best="sort")
        values = {n: view.validation[n].values[1] for n in view.front}
        assert values[best] == max(values.values())

    def test_unknown_objective(self, view: StudyView) -> None:
        with pytest.raises(InputError, match=r"unknown 'sorted' \(did you mean 'sort'"):
            choose(view, best="sorted")

    def test_a_trial_that_does_not_exist(self, view: StudyView) -> None:
        with pytest.raises(InputError, match=r"trial 99: .* has trials 0 to 18"):
            choose(view, trial=99)

    def test_a_failed_trial_says_why(self, view: StudyView) -> None:
        with pytest.raises(InputError, match=r"trial 10: cannot be exported: .*on purpose"):
            choose(view, trial=10)

    def test_both(self, view: StudyView) -> None:
        with pytest.raises(InputError, match="either an objective or a trial"):
            choose(view, best="sort", trial=1)

    def test_nothing_succeeded(self, view: StudyView) -> None:
        with pytest.raises(NothingUsableError, match="nothing to export"):
            choose(replace(view, knee=None, front=()))


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestAtomic:
    def test_an_occupied_directory_is_refused(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "mine").write_text("keep")
        with pytest.raises(InputError, match=r"m: exists and is not empty \(choose a new"):
            export(view, choose(view), models, tmp_path / "m")
        assert (tmp_path / "m" / "mine").read_text() == "keep"

    def test_an_empty_directory_is_used(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        (tmp_path / "m").mkdir()
        export(view, choose(view), models, tmp_path / "m")
        assert left_behind(tmp_path) == ["m"]

    def test_a_file_or_link_in_the_way(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        (tmp_path / "m").write_text("")
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        for name in ("m", "link"):
            with pytest.raises(InputError, match="is in the way"):
                export(view, choose(view), models, tmp_path / name)

    def test_a_parent_that_is_a_file(self, tmp_path: Path, view: StudyView, models: Models) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be written"):
            export(view, choose(view), models, tmp_path / "file" / "m")

    def test_too_little_space_is_seen_before_anything_is_written(
        self, tmp_path: Path, view: StudyView, models: Models, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
        with pytest.raises(StorageError, match=r"needs 0\.07 GB, 0\.00 GB are free"):
            export(view, choose(view), models, tmp_path / "m")
        assert left_behind(tmp_path) == []

    @pytest.mark.parametrize(
        ("module", "step"),
        [(export_module, "write_checkpoint"), (export_module, "verify_checkpoint"),
         (atomic_directory, "publish")],
    )  # fmt: skip
    def test_a_full_disk_leaves_nothing(
        self, tmp_path: Path, view: StudyView, models: Models,
        monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str,
    ) -> None:  # fmt: skip
        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, step, full)
        with pytest.raises(StorageError, match="the disk is full; nothing was left behind"):
            export(view, choose(view), models, tmp_path / "m")
        assert left_behind(tmp_path) == []

    def test_weights_that_are_not_finite_are_refused(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        number = choose(view)
        trial = view.trials[number]
        # 16 is the largest weight; the narrow dtype overflows where the base is large.
        narrow = replace(trial.recipe, dtype="F16", table=((16.0,) * 3,) * len(trial.recipe.table))
        trials = (*view.trials[:number], replace(trial, recipe=narrow), *view.trials[number + 1 :])
        models = huge(models, tmp_path / "models")
        with pytest.raises(RecipeError, match=r"model\.norm\.weight is not finite in F16"):
            export(replace(view, trials=trials), number, models, tmp_path / "m")
        assert left_behind(tmp_path) == ["models"]

    def test_other_models_are_refused(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        swapped = replace(models, experts=models.experts[::-1])
        with pytest.raises(RecipeError, match="made for other weights"):
            export(view, choose(view), swapped, tmp_path / "m")
        assert left_behind(tmp_path) == []


def huge(models: Models, folder: Path) -> Models:
    """Return the models with one expert whose weights are beyond half precision.

    The fingerprints are kept: the study must believe that these are its models.
    """
    from safetensors.numpy import load_file, save_file

    shutil.copytree(models.experts[0].directory, folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + np.float32(1e5)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    experts = [(one.name, str(one.directory)) for one in models.experts]
    opened = open_models(str(models.base.directory), [(EXPERTS[0], str(folder)), *experts[1:]])
    first = replace(opened.experts[0], fingerprint=models.experts[0].fingerprint)
    return replace(opened, experts=(first, *opened.experts[1:]))


class TestScoring:
    def test_one_call_where_it_can_be(self) -> None:
        runs = lm_eval_runs(SCORING, [("3", "1"), ("10", "9")])
        assert len(runs) == 1
        assert runs[0].samples == {"reverse": [1, 3], "sort": [9, 10]}
        assert runs[0].objectives == [0, 1]

    def test_two_calls_where_lm_eval_has_one_setting(self) -> None:
        scoring = Scoring(("a", "b", "a"), (None, 5, None))
        runs = lm_eval_runs(scoring, [("1",), ("2",), ("3",)])
        assert [run.objectives for run in runs] == [[0], [1], [2]]
        assert runs[1].num_fewshot == 5

    def test_groups_are_scored_task_by_task(self) -> None:
        scoring = Scoring(("both", "a"), (None, None), unreported=("length",))
        runs = lm_eval_runs(scoring, [("a/3", "b/0", "a/1"), ("1", "3"), ("0",)])
        assert [run.samples for run in runs] == [{"a": [1, 3], "b": [0]}]
        assert "--tasks a,b " in lm_eval_command(scoring, runs[0], "out", "BF16", "s.json")
        assert lm_eval_notes(scoring, runs) == [
            "lm_eval reports the tasks of both one by one; the study's value is their mean, by "
            "size where the group says so.",
            "lm_eval has no number for length: `evomerge` alone computes it.",
        ]

    def test_the_command(self) -> None:
        scoring = Scoring(("a b",), (2,), ("/home/CANARY/tasks",), 8, "cuda", True)
        [run] = lm_eval_runs(scoring, [("1",)])
        assert lm_eval_command(scoring, run, "out", "BF16", "out/s.json") == (
            "lm_eval --model hf --model_args pretrained=out,dtype=bfloat16 --tasks 'a b' "
            "--include_path tasks --samples out/s.json --batch_size 8 --num_fewshot 2 "
            "--device cuda --confirm_run_unsafe_code"
        )

    def test_lm_eval_understands_the_command(self) -> None:
        """Its own parser takes every word, and reads the documents from the file."""
        import shlex

        from lm_eval._cli.harness import HarnessCLI

        [run] = lm_eval_runs(SCORING, [("1",), ("2",)])
        words = shlex.split(lm_eval_command(SCORING, run, "out", "F32", "out/s.json"))
        args = HarnessCLI()._parser.parse_args(["run", *words[1:]])
        assert args.samples == "out/s.json"
        assert args.include_path == "fitness"
        assert args.tasks == ["reverse", "sort"] or args.tasks == "reverse,sort"


class TestNotes:
    """What the lm_eval command cannot say stands beside it."""

    SEVERAL = replace(
        SCORING, include_path=("fitness", "more tasks", "/home/CANARY/own"), num_fewshot=(0, 2)
    )

    def test_several_folders_and_calls(self) -> None:
        runs = lm_eval_runs(self.SEVERAL, [("1",), ("2",)])
        assert lm_eval_notes(self.SEVERAL, runs) == [
            "lm_eval takes one --include_path, the study used several folders: put the task files "
            "of more tasks, own into fitness too, with the data that they name.",
            "The study scored all tasks together; lm_eval needs 2 calls, whose batches hold other "
            "items, so values may differ by rounding.",
        ]
        assert lm_eval_notes(SCORING, lm_eval_runs(SCORING, [("1",), ("2",)])) == []
        bare = replace(SCORING, include_path=())
        assert lm_eval_notes(bare, lm_eval_runs(bare, [("1",), ("2",)])) == []

    def test_they_are_in_scores_card_and_result(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        """Only the first folder was named, and nothing told that others are missing."""
        result = export(view, choose(view), models, tmp_path / "m", self.SEVERAL)
        scores = json.loads((tmp_path / "m" / "evomerge_scores.json").read_text())
        assert len(scores["reproduce"]["commands"]) == 2
        assert scores["reproduce"]["notes"] == list(result.notes)
        card = (tmp_path / "m" / "README.md").read_text()
        assert len(result.notes) == 3  # and where the tokenizer comes from
        assert all(note in card for note in result.notes)
        assert "CANARY" not in card


class TestPublicSources:
    @staticmethod
    def named(models: Models, *paths: Path) -> list[str]:
        for path in paths:
            path.mkdir(parents=True, exist_ok=True)
        made = [
            replace(models.base, name=f"n{k}", source=str(path), directory=path)
            for k, path in enumerate(paths)
        ]
        return list(public_sources(made))

    def test_a_hub_model_is_named_by_its_id(self, models: Models) -> None:
        hub = replace(models.base, source="owner/base@v1")
        assert public_sources([hub, models.base]) == ("owner/base@v1", "./base")

    def test_a_hub_model_is_named_by_the_commit_that_was_read(
        self, models: Models, tmp_path: Path
    ) -> None:
        """A branch can move before the recipe is repeated elsewhere."""
        snapshot = tmp_path / "models--owner--base" / "snapshots" / ("0a" * 20)
        hub = replace(models.base, source="owner/base@main", directory=snapshot)
        assert public_sources([hub]) == (f"owner/base@{'0a' * 20}",)
        assert hub_ids({"base": public_sources([hub])[0]}) == ["owner/base"]

    def test_directories_of_one_name_are_told_apart(self, models: Models, tmp_path: Path) -> None:
        """math/final and code/final were both ./final."""
        paths = [tmp_path / name for name in ("math/final", "code/final", "base")]
        assert self.named(models, *paths) == ["./math/final", "./code/final", "./base"]
        deep = [tmp_path / name for name in ("a/x/final", "b/x/final", "c/final")]
        assert self.named(models, *deep) == ["./a/x/final", "./b/x/final", "./c/final"]

    def test_a_home_directory_is_not_named(
        self, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "alice"))
        paths = [tmp_path / "alice" / "final", tmp_path / "data" / "final"]
        assert self.named(models, *paths) == ["./n0/final", "./data/final"]

    def test_recipe_and_mergekit_configuration_keep_all_models(
        self, models: Models, tmp_path: Path
    ) -> None:
        folders = []
        for checkpoint in (models.base, *models.experts):
            folders.append(tmp_path / checkpoint.name / "final")
            shutil.copytree(checkpoint.directory, folders[-1])
        opened = open_models(
            str(folders[0]), list(zip(EXPERTS, map(str, folders[1:]), strict=True))
        )
        base, experts = opened.refs
        recipe = Recipe(
            "linear", base, experts, "model", opened.layout.digest,
            tuple(f"weight.{name}" for name in EXPERTS), ((0.2, 0.3, 0.5),),
        )  # fmt: skip
        public = public_recipe(recipe, opened)
        sources = [ref.source for ref in (public.base, *public.experts)]
        assert sources == [f"./{folder.parent.name}/final" for folder in folders]


class TestCompanions:
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
    def test_links_out_of_the_model_are_not_followed(
        self, tmp_path: Path, view: StudyView, models: Models, name: str
    ) -> None:
        """A linked private file travelled with the export."""
        shutil.copytree(models.base.directory, tmp_path / "base")
        (tmp_path / "base" / name).rename(tmp_path / "private.json")
        (tmp_path / "base" / name).symlink_to(tmp_path / "private.json")
        linked = replace(models, base=replace(models.base, directory=tmp_path / "base"))
        with pytest.raises(ModelError, match=f"models.base: {name} is a link that leaves base"):
            export(view, choose(view), linked, tmp_path / "m")
        assert left_behind(tmp_path) == ["base", "private.json"]

    def test_a_damaged_one_is_named_before_the_merge(
        self, tmp_path: Path, view: StudyView, models: Models
    ) -> None:
        shutil.copytree(models.base.directory, tmp_path / "base")
        (tmp_path / "base" / "generation_config.json").write_text("{oops")
        broken = replace(models, base=replace(models.base, directory=tmp_path / "base"))
        with pytest.raises(ModelError, match=r"base/generation_config\.json: invalid JSON"):
            export(view, choose(view), broken, tmp_path / "m")
        assert left_behind(tmp_path) == ["base"]


def test_a_score_from_some_of_the_search_items_is_called_an_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = SimpleNamespace(items=(1.0, 0.0))
    found: Any = SimpleNamespace(scores=(few, SimpleNamespace(items=(1.0,) * 5)))
    monkeypatch.setattr(export_documents, "evaluation_of", lambda view, number, split: found)
    view: Any = SimpleNamespace(
        objectives=(SimpleNamespace(name="math"), SimpleNamespace(name="code")),
        contract={"items": {"search": [["a"] * 9, ["b"] * 5]}},
    )
    assert export_documents.estimated(view, 3) == {"math": (2, 9)}
    monkeypatch.setattr(export_documents, "evaluation_of", lambda view, number, split: None)
    assert export_documents.estimated(view, 3) == {}
