"""A repository of LoRA adapters from study.yaml to export, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from lora_adapters import MODULES, save_adapter
from lora_project import NAMES, lora_project, main
from safetensors.numpy import load_file

from evomerge.config import StudyFile, load
from evomerge.errors import StudyFileError
from evomerge.journal import JOURNAL
from evomerge.merge.engine import Engine
from evomerge.merge.merger import Merger, alone, models_of
from evomerge.merge.writer import write_checkpoint
from evomerge.mergekit_yaml import mergekit_config
from evomerge.models import open_models
from evomerge.prepare import Prepared, prepare
from evomerge.recipe import Recipe
from evomerge.search.baselines import chosen_experts
from evomerge.study_space import baseline_warnings, scored_alone
from evomerge.study_view import StudyView
from evomerge.submission import pack

EXAMPLE = Path(__file__).resolve().parents[1] / "experiments/lora_repository/study.yaml"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    return lora_project(tmp_path_factory.mktemp("repository"), save_llama)


@pytest.fixture(scope="module")
def prepared(project: Path) -> Prepared:
    path = project / "study.yaml"
    return prepare(load(path), path)


@pytest.fixture(scope="module")
def view(project: Path) -> StudyView:
    assert main("run", project / "study.yaml") == 0
    return StudyView.load(project / "studies/repository")


def best(view: StudyView) -> int:
    """Return a searched trial that has results on test items, else any searched one."""
    searched = [trial.number for trial in view.trials if trial.kind == "search"]
    return next((number for number in searched if number in view.test), searched[-1])


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = load_file(folder / "model.safetensors")
    return found


class TestStudyFile:
    def test_a_folder_becomes_its_experts_in_order(self, project: Path) -> None:
        file = load(project / "study.yaml")
        assert file.models.experts == {name: f"adapters/{name}" for name in NAMES}
        assert list(file.models.experts) == sorted(NAMES)
        (project / "adapters" / ".cache").mkdir(exist_ok=True)
        (project / "adapters" / "README.md").write_text("not a model")
        assert load(project / "study.yaml").models.experts == file.models.experts

    def test_what_is_no_expert_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "study.yaml"
        path.write_text("models: {base: b, experts: adapters}\nfitness: {tasks: [t]}\n")
        with pytest.raises(StudyFileError, match=r"models.experts: no such folder: adapters \(a"):
            load(path)
        (tmp_path / "adapters").mkdir()
        with pytest.raises(StudyFileError, match=r"adapters has no subfolders"):
            load(path)
        (tmp_path / "adapters" / "half").mkdir()
        with pytest.raises(StudyFileError, match=r"adapters/half is no model: .*move it out"):
            load(path)
        save_adapter(tmp_path / "adapters" / "v1.5", 1)
        shutil.rmtree(tmp_path / "adapters" / "half")
        with pytest.raises(StudyFileError, match=r"models\.experts.*v1\.5.*use letters"):
            load(path)

    def test_every_problem_is_reported_before_any_weight_is_read(
        self, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        save_llama: Callable[..., Path],
    ) -> None:  # fmt: skip
        shutil.copytree(project, tmp_path / "p", ignore=shutil.ignore_patterns("studies"))
        save_adapter(tmp_path / "p/adapters/odd", 1, rank=2)
        fewer = dict(list(MODULES.items())[:1])
        save_adapter(tmp_path / "p/adapters/small", 2, fewer)
        shutil.copytree(
            save_llama("whole", 5, base=project / "models/base"), tmp_path / "p/adapters/whole"
        )
        code = main("check", tmp_path / "p/study.yaml", "--set", "space.partition=layer")
        errors = capsys.readouterr().err
        assert code == 2
        assert "space.partition: lora_factors has one weight and density per adapter" in errors
        assert "got layer (write partition: model)" in errors
        assert "models.experts.odd: model.layers.0.mlp.up_proj.weight has rank 2, 3 in" in errors
        assert "models.experts.small: does not change" in errors
        assert "models.experts.whole: is no LoRA adapter" in errors

    def test_problems_of_several_adapters_came_in_rounds(
        self, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """First folders, then files, then forms; and none of an adapter where the base is wrong."""
        adapters = tmp_path / "p/adapters"
        shutil.copytree(project, tmp_path / "p", ignore=shutil.ignore_patterns("studies"))
        save_adapter(adapters / "odd", 1, rank=2)
        save_adapter(adapters / "dora", 2, use_dora=True)
        save_adapter(adapters / "cut", 3)
        (adapters / "cut/adapter_model.safetensors").write_bytes(b"cut")
        (adapters / "notes").mkdir()
        expected = {"notes": "adapters/notes is no model", "dora": "DoRA", "cut": "safetensors",
                    "odd": "has rank 2, 3 in"}  # fmt: skip
        for name in ("", "notes", "base"):
            more: tuple[str, ...] = ()
            if name == "notes":
                shutil.rmtree(adapters / name)
            if name == "base":
                more = ("--set", "models.base=nowhere")
                del expected["odd"]  # what it changes is only known of its base
            expected.pop(name, None)
            assert main("check", tmp_path / "p/study.yaml", *more) == 2
            found = [line for line in capsys.readouterr().err.splitlines() if "experts" in line]
            assert len(found) == len(expected), found
            for one, text in expected.items():
                assert any(one in line and text in line for line in found), (one, found)

    def test_check_shows_the_plan(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main("check", project / "study.yaml") == 0
        text = capsys.readouterr().out
        assert "lora_factors, partition model: 12 coefficients (1 blocks)" in text
        assert (
            "baselines.experts: 4 of 6 experts are scored alone, evenly spaced in their order "
            "(chat, code, math, ...)" in text
        )

    def test_temporary_files_that_do_not_fit_are_told(
        self, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each worker sorts the magnitudes of all A into a file, or folds every adapter."""
        path, free = project / "study.yaml", SimpleNamespace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
        count = len(NAMES)
        magnitudes = 4 * 3 * (16 + 16 + 16 + 24) * count
        folded = 4 * sum(out * columns for out, columns in MODULES.values()) * count
        whole = [
            "space.method=task_arithmetic", "space.parameters={weight: {low: 0, high: 1}}",
            "search={searcher: random, trials: 4}",
        ]  # fmt: skip
        for overrides, expected, what in (
            ([], magnitudes, "sorted magnitudes of the adapters"), (whole, folded, "folded ad"),
            (["space.parameters.density=1"], 0, ""),
        ):  # fmt: skip
            for less in (0, 1) if expected else (0,):
                free.free = expected - less
                found = [w for w in prepare(load(path, overrides), path).warnings if "TMPDIR" in w]
                assert len(found) == less
                assert all(f"1 worker will write 0.00 GB each ({what}" in line for line in found)

    def test_list_shows_the_method(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main("list", "methods") == 0
        assert "lora_factors" in capsys.readouterr().out

    def test_a_cluster_is_told_of_the_folder_once(self, project: Path, tmp_path: Path) -> None:
        for number in range(8):
            save_adapter(tmp_path / "adapters" / f"a{number}", number)
        for name in ("study.yaml", "fitness", "texts.txt"):
            copy = shutil.copytree if (project / name).is_dir() else shutil.copyfile
            copy(project / name, tmp_path / name)
        save_adapter(tmp_path / "adapters" / "a8", 8)
        overrides = ["directory=/shared/x", "pool.kind=ray", "fitness.objectives=[]"]
        file = load(tmp_path / "study.yaml", overrides)
        (tmp_path / "out").mkdir()
        package = pack(file, tmp_path / "study.yaml", tmp_path / "out")
        folder = tmp_path / "adapters"
        assert [note for note in package.notes if "adapters" in note] == [
            f"models: 9 of them: weights are not sent; {folder} must be there on every machine of "
            "the cluster (a shared volume, or a hub id instead)"
        ]
        sent = yaml.safe_load((tmp_path / "out/study.yaml").read_text())
        assert sent["models"]["experts"]["a3"] == str(folder / "a3")

    def test_init_writes_a_study_of_a_folder(
        self, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(project / "adapters", tmp_path / "adapters")
        path = tmp_path / "study.yaml"
        assert (
            main("init", path, "--base", "models/base", "--adapters", "adapters", "--task", "t")
            == 0
        )
        file = load(path)
        assert list(file.models.experts) == list(NAMES)
        assert (file.space.method, file.space.partition) == ("lora_factors", "model")
        assert file.search.searcher == "evo_merging"
        assert file.baselines.task_arithmetic == [0.17, 0.67]
        assert [getattr(one, "metric", None) for one in file.fitness.tasks] == [
            "reference_loglikelihood"
        ]
        assert main("init", tmp_path / "b.yaml", "--adapters", "nowhere") == 2
        assert main("init", tmp_path / "b.yaml", "--adapters", "a", "--expert", "a=b") == 2
        errors = capsys.readouterr().err
        assert "--adapters: no such folder: nowhere" in errors
        assert "names the experts already" in errors

    def test_the_example_fits(self, project: Path) -> None:
        """experiments/lora_repository/study.yaml, with a task that is there."""
        path = project / "example.yaml"
        shutil.copyfile(EXAMPLE, path)
        overrides = [
            "fitness.tasks=[pick_a]", "fitness.items={search: 10, validation: 5, test: 5}",
            "pool.gpus_per_worker=0",
        ]  # fmt: skip
        found = prepare(load(path, overrides), path)
        assert found.space.dimension == 12
        assert [one.label for one in found.baselines][-2:] == [
            "task_arithmetic:0.01", "task_arithmetic:0.04",
        ]  # fmt: skip
        lorahub = ["space.parameters.density=1", "search.searcher=cma", "search.arguments={}"]
        assert prepare(load(path, overrides + lorahub), path).space.dimension == 6
        path.unlink()


class TestBaselines:
    @pytest.mark.parametrize(
        ("wanted", "expected"),
        [
            ("all", "abcdefg"), (9, "abcdefg"), (7, "abcdefg"), (3, "adg"), (2, "ag"), (1, "a"),
            (0, ""), (["f", "b"], "bf"),
        ],
    )  # fmt: skip
    def test_which_experts_are_scored_alone(self, wanted: Any, expected: str) -> None:
        assert chosen_experts("abcdefg", wanted) == tuple(expected)

    def test_what_the_labels_mean(self, prepared: Prepared) -> None:
        found = {one.label: one for one in prepared.baselines}
        alone_ones = [f"expert:{name}" for name in ("chat", "code", "math", "poet")]
        assert list(found) == ["base", *alone_ones, "uniform", "task_arithmetic:0.25"]
        for label, weight in (("uniform", 1 / 6), ("task_arithmetic:0.25", 0.5), ("base", 0.0)):
            recipe = found[label].recipe
            assert recipe.method == "lora_factors"
            assert recipe.table[0] == pytest.approx((weight,) * 6 + (1.0,) * 6)
            assert found[label].x is not None
        assert found["expert:math"].recipe.table[0][:6] == pytest.approx((0, 0, 0, 1, 0, 0))

    def test_outside_of_the_box_they_are_still_merges_of_factors(self, project: Path) -> None:
        path = project / "study.yaml"
        found = prepare(load(path, ["space.parameters.weight={low: 0, high: 0.3}"]), path)
        baselines = {one.label: one for one in found.baselines}
        assert baselines["expert:math"].x is None
        assert baselines["expert:math"].recipe.method == "lora_factors"
        assert baselines["uniform"].x is not None
        fixed = prepare(load(path, ["space.parameters.density=0.5"]), path)
        assert [one.x for one in fixed.baselines] == [None] * 7

    def test_of_many_adapters_twenty_are_scored_alone(self) -> None:
        names = ", ".join(f"a{number:02d}: adapters/{number}" for number in range(100))
        text = f"models: {{base: b, experts: {{{names}}}}}\nfitness: {{tasks: [t]}}\n"
        for method, searcher, count in (
            ("lora_factors", "evo_merging", 20), ("lora_factors", "nested_map", 100),
            ("lora_factors", "m2n2", 100), ("task_arithmetic", "cma", 100),
        ):  # fmt: skip
            space = f"space: {{method: {method}}}\nsearch: {{searcher: {searcher}}}\n"
            file = StudyFile.model_validate(yaml.safe_load(text + space))
            assert len(scored_alone(file)) == count
            assert len(baseline_warnings(file)) == (count == 20)

    def test_experts_that_a_mixing_searcher_would_leave_out_are_told(self) -> None:
        """The warning spoke of the best one, and with names there was none."""
        text = "models: {base: b, experts: {a: a, b: b, c: c}}\nfitness: {tasks: [t]}\n"
        text += "space: {method: lora_factors}\n"
        for wanted, left in (("2", 1), ("[b]", 2)):
            text_of = text + "search: {searcher: %s}\nbaselines: {experts: %s}\n"
            file = StudyFile.model_validate(yaml.safe_load(text_of % ("nested_map", wanted)))
            assert baseline_warnings(file) == [
                f"baselines.experts: nested_map mixes the baselines, and {left} of 3 experts are "
                "not among them alone (all gives it each of them)"
            ]

    def test_no_scale_below_zero_is_a_square(self, project: Path) -> None:
        """-0.5 was scored as 0.5, under its own name: all signs turned is the same merge."""
        path = project / "study.yaml"
        with pytest.raises(StudyFileError, match=r"task_arithmetic: -0.5: lora_factors adds the s"):
            prepare(load(path, ["baselines.task_arithmetic=[0.5, -0.5]"]), path)
        others = ["space.method=task_arithmetic", "space.parameters={weight: {low: 0, high: 1}}"]
        others += ["baselines.task_arithmetic=[-0.5]", "search.searcher=random"]
        found = prepare(load(path, [*others, "search.arguments={}"]), path)
        assert found.baselines[-1].label == "task_arithmetic:-0.5"

    def test_of_negative_weights_baselines_are_points(self, project: Path) -> None:
        """They were none: recipes have the other sign, which lies outside of such a box."""
        path = project / "study.yaml"
        found = prepare(load(path, ["space.parameters.weight={low: -1.5, high: 0}"]), path)
        for one in found.baselines:
            assert one.x is not None
            assert found.space.decode(one.x).digest == one.recipe.digest
            assert min(one.recipe.table[0]) >= 0.0

    def test_unknown_names_are_problems(self, project: Path) -> None:
        path = project / "study.yaml"
        with pytest.raises(StudyFileError, match=r"baselines.experts: no expert is named 'mathe'"):
            prepare(load(path, ["baselines.experts=[mathe]"]), path)


class TestStudy:
    def test_it_runs_to_its_end(self, view: StudyView) -> None:
        assert view.state.value == "finished"
        assert view.counts.failed == 0
        searched = [trial for trial in view.trials if trial.kind == "search"]
        assert len(searched) == 16
        for trial in searched:
            weights = trial.recipe.table[0][:6]
            assert max(weights, key=abs) > 0.0  # signs are fixed wherever weights are shown

    def test_an_interrupted_run_continues_to_the_same_end(
        self, project: Path, view: StudyView, tmp_path: Path
    ) -> None:
        shutil.copytree(project, tmp_path / "p")
        journal = tmp_path / "p/studies/repository" / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[: len(lines) // 2]))
        assert main("run", tmp_path / "p/study.yaml") == 0
        again = StudyView.load(tmp_path / "p/studies/repository")
        assert [one.recipe.table for one in again.trials] == [
            one.recipe.table for one in view.trials
        ]
        assert (again.front, again.knee) == (view.front, view.knee)
        assert main("replay", tmp_path / "p/study.yaml") == 0

    def test_another_search_starts_at_one_of_its_merges(
        self, project: Path, view: StudyView
    ) -> None:
        number, path = best(view), project / "study.yaml"
        start = f"{{start: 'studies/repository:{number}'}}"
        overrides = ["name=later", "search.searcher=polish", f"search.arguments={start}"]
        found = prepare(load(path, overrides), path).baselines[-1]
        assert found.label == "start"
        assert found.recipe.table[0] == pytest.approx(view.trial(number).recipe.table[0])

    def test_a_folder_that_has_another_adapter_later_is_noticed(
        self, project: Path, view: StudyView, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(project, tmp_path / "p")
        resolved = load(tmp_path / "p/studies/repository/study.resolved.yaml")
        assert list(resolved.models.experts) == list(NAMES)
        save_adapter(tmp_path / "p/adapters/new", 77)
        assert main("run", tmp_path / "p/study.yaml") == 2
        assert "models (their weights): 7 of them -> 8 of them" in capsys.readouterr().err

    def test_looking_at_it(self, view: StudyView, capsys: pytest.CaptureFixture[str]) -> None:
        for command in (["front"], ["status"], ["compare", str(best(view)), "base"]):
            assert main(command[0], view.directory, *command[1:]) == 0
        assert capsys.readouterr().out


class TestTakeHome:
    def test_the_checkpoint_is_what_was_scored(
        self, project: Path, view: StudyView, prepared: Prepared, tmp_path: Path,
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        import torch
        from transformers import AutoModelForCausalLM

        number = best(view)
        assert main("export", view.directory, "--trial", number, "--out", tmp_path / "m") == 0
        assert "mergekit" in capsys.readouterr().out
        scored = AutoModelForCausalLM.from_pretrained(project / "models/base", dtype=torch.float32)
        scored.requires_grad_(False)
        Engine(Merger(prepared.models), scored).apply(view.trial(number).recipe)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        for name, tensor in scored.state_dict().items():
            assert (loaded.state_dict()[name] == tensor).all()
        prompt = torch.tensor([[1, 5, 4, 3, 9]])
        assert (loaded(prompt).logits == scored(prompt).logits).all()
        assert not (tmp_path / "m/mergekit_config.yml").exists()
        card = (tmp_path / "m/README.md").read_text()
        assert "mergekit merges weights; it has no sum of the factors" in card
        assert "`lora_factors` over the partition `model`" in card
        assert "/home" not in card
        monkeypatch.chdir(project)
        given = ["--base", "models/base"]
        given += [f"--expert={name}=adapters/{name}" for name in NAMES]
        assert main("verify", tmp_path / "m", *given) == 0, capsys.readouterr()

    def test_one_recipe_is_one_merge(self, project: Path, view: StudyView, tmp_path: Path) -> None:
        number = best(view)
        out = tmp_path / "m"
        assert main("export", view.directory, "--trial", number, "--out", out) == 0
        recipe = tmp_path / "r"
        assert (
            main("export", view.directory, "--trial", number, "--out", recipe, "--recipe-only") == 0
        )
        assert not (recipe / "model.safetensors").exists()
        again = tmp_path / "again"
        path = recipe / "evomerge_recipe.json"
        assert main("merge", path, "--out", again, "--models", project) == 0
        for name, tensor in tensors(out).items():
            np.testing.assert_array_equal(tensors(again)[name], tensor)

    def test_adapters_are_found_where_their_base_is_elsewhere(
        self, project: Path, view: StudyView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        """Below --models there had to be the base too, and with --base they were not found."""
        out = tmp_path / "m"
        assert main("export", view.directory, "--trial", best(view), "--out", out) == 0
        shutil.copytree(project / "adapters", tmp_path / "store")
        shutil.copytree(project / "models/base", tmp_path / "base")
        places = ["--base", tmp_path / "base", "--models", tmp_path / "store"]
        again = tmp_path / "again"
        assert main("merge", out / "evomerge_recipe.json", "--out", again, *places) == 0
        for name, tensor in tensors(out).items():
            np.testing.assert_array_equal(tensors(again)[name], tensor)
        monkeypatch.chdir(project)
        assert main("verify", out, *places) == 0, capsys.readouterr()

    def test_the_adapter_is_the_merge_itself(
        self, project: Path, view: StudyView, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        number = best(view)
        adapter, out = tmp_path / "a", tmp_path / "m"
        assert main("export", view.directory, "--trial", number, "--out", adapter, "--lora") == 0
        assert "nothing of the merge is lost" in capsys.readouterr().out
        assert main("export", view.directory, "--trial", number, "--out", out) == 0
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (3, 6)
        assert config["base_model_name_or_path"] == "./base"
        models = open_models(str(project / "models/base"), [("merged", str(adapter))])
        for name, tensor in tensors(out).items():
            fold = models.experts[0].read(name).reshape(tensor.shape)
            np.testing.assert_array_equal(fold, tensor)  # folded it is the checkpoint, bit for bit
        # As an expert of any other merge it is the same but for the rounding of its task vector.
        whole = alone(models, 0, "F32")
        (tmp_path / "w").mkdir()
        write_checkpoint(whole, models, tmp_path / "w")
        for name, tensor in tensors(out).items():
            np.testing.assert_allclose(tensors(tmp_path / "w")[name], tensor, rtol=2e-7, atol=1e-8)
        scores = json.loads((adapter / "evomerge_scores.json").read_text())
        assert scores["adapter"]["exact"] is True
        values = scores["adapter"]["item_scores"]
        assert values == scores["reproduce"]["item_scores"]  # of the same bits
        monkeypatch.chdir(project)
        given = ["--base", "models/base"]
        given += [f"--expert={name}=adapters/{name}" for name in NAMES]
        assert main("verify", adapter, *given) == 0, capsys.readouterr()

    def test_a_smaller_rank_is_the_nearest_adapter(
        self, view: StudyView, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        number = best(view)
        for rank, exact in ((2, False), (3, True), (64, True)):
            out = tmp_path / str(rank)
            assert main(
                "export", view.directory, "--trial", number, "--out", out, "--lora", rank
            ) == 0  # fmt: skip
            scores = json.loads((out / "evomerge_scores.json").read_text())
            assert scores["adapter"]["exact"] is exact
            notes = " ".join(scores["reproduce"]["notes"])
            assert ("The factors have rank 3 and are written exactly" in notes) is exact
            assert ("although rank 64 was asked for" in notes) is (rank == 64)
            assert scores["adapter"]["rank"] == min(rank, 3)
            assert (scores["adapter"]["relative_error"] == 0.0) is exact
        capsys.readouterr()

    def test_the_base_has_no_adapter(
        self, view: StudyView, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main("export", view.directory, "--trial", 0, "--out", tmp_path / "m", "--lora") == 2
        assert "does not differ from the base" in capsys.readouterr().err
        assert not (tmp_path / "m").exists()

    def test_mergekit_cannot_say_it(self, prepared: Prepared, view: StudyView) -> None:
        recipe = view.trial(0).recipe
        found = mergekit_config(recipe, prepared.models.layout, {})
        assert found.text is None
        assert "no sum of the factors" in found.reason


def test_a_recipe_opens_its_models_as_it_needs_them(prepared: Prepared) -> None:
    whole = replace(prepared.models, factored=False)
    recipe: Recipe = prepared.baselines[-1].recipe
    assert models_of(recipe, whole).factored
    assert not models_of(alone(whole, 0, "F32"), whole).factored
