"""Exports of a small real study: adapters, other dtypes, and checking them without the study."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_project import tiny_project

from evomerge import cli, launch
from evomerge.checkpoint import to_float32
from evomerge.checksums import write_sums
from evomerge.config import load
from evomerge.errors import InputError, ModelError
from evomerge.export import Exported, ExportOptions
from evomerge.item_comparison import compare_trials
from evomerge.item_texts import item_texts
from evomerge.lora import factors, write_lora
from evomerge.model_search import find_models
from evomerge.models import open_models
from evomerge.prepare import prepare
from evomerge.recipe import Recipe
from evomerge.rescoring import public_settings
from evomerge.study_view import StudyView
from evomerge.take_home import export_trial
from evomerge.verification import Where, verify, verify_digests


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("take-home"), save_llama)
    launch.run(prepare(load(folder / "study.yaml"), folder / "study.yaml"), [])
    return folder


@pytest.fixture(scope="module")
def view(project: Path) -> StudyView:
    return StudyView.load(project / "studies/tiny")


@pytest.fixture(scope="module")
def mixed(view: StudyView) -> int:
    """A trial that mixes both experts."""
    return next(trial.number for trial in view.trials if trial.label == "uniform")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, view: StudyView, mixed: int) -> Exported:
    return export_trial(view, trial=mixed, out=tmp_path_factory.mktemp("out") / "merged")


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.out, output.err


@pytest.fixture
def elsewhere(tmp_path: Path, project: Path, merged: Exported) -> Path:
    """Another machine: the export and the tasks, neither study nor models."""
    shutil.copytree(merged.out, tmp_path / "merged")
    shutil.copytree(project / "fitness", tmp_path / "fitness")
    return tmp_path


class TestVerify:
    def test_an_export_is_as_recorded_without_the_study(
        self, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(elsewhere)
        code, out, err = call(capsys, monkeypatch, "verify", "merged")
        assert (code, err) == (0, "")
        assert out.splitlines()[0] == "10 files are as they were written"
        recorded = json.loads((elsewhere / "merged/evomerge_scores.json").read_text())
        for name, value in recorded["reproduce"]["expected"].items():
            assert f"{name}: {value:.4f}, all 10 items as recorded" in out

    def test_other_weights_are_found_by_digest_and_by_score(
        self, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = elsewhere / "merged/model.safetensors"
        weights = load_file(path)
        turned = {name: -tensor for name, tensor in weights.items()}
        save_file(turned, path, metadata={"format": "pt"})
        monkeypatch.chdir(elsewhere)
        code, out, _ = call(capsys, monkeypatch, "verify", "merged", "--json")
        facts = json.loads(out)
        assert code == 1
        assert facts["equal"] is False
        assert facts["problems"] == ["model.safetensors: has changed since it was written"]
        assert facts["objectives"] == {}
        write_sums(elsewhere / "merged")
        code, out, _ = call(capsys, monkeypatch, "verify", "merged", "--json")
        facts = json.loads(out)
        assert code == 1
        differing = [row for one in facts["objectives"].values() for row in one["differing"]]
        assert differing
        assert all(row["recorded"] != row["found"] for row in differing)

    def test_a_damaged_config_was_an_error_of_usage(
        self, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (elsewhere / "merged/config.json").write_text("{")
        monkeypatch.chdir(elsewhere)
        code, out, err = call(capsys, monkeypatch, "verify", "merged")
        assert (code, err) == (1, "")
        assert out.splitlines() == [
            "merged: config.json: has changed since it was written",
            "merged: not scored again, because its files are not as written",
        ]

    def test_other_records_are_found_by_score(self, elsewhere: Path) -> None:
        path = elsewhere / "merged/evomerge_scores.json"
        record = json.loads(path.read_text())
        scores = record["reproduce"]["item_scores"]["pick_a"]
        scores[3] = 1.0 - scores[3]
        path.write_text(json.dumps(record))
        write_sums(elsewhere / "merged")
        found = verify(elsewhere / "merged", Where(elsewhere))
        item = record["reproduce"]["items"]["pick_a"][3]
        assert found.objectives[0].differing == ((item, scores[3], 1.0 - scores[3]),)
        assert found.objectives[1].differing == ()
        assert any(line.startswith(f"    item {item}: ") for line in found.lines())
        assert not found.equal
        within = verify(elsewhere / "merged", Where(elsewhere, tolerance=1.0))
        assert not any(one.differing for one in within.objectives)

    def test_a_value_that_its_items_do_not_give_is_found(
        self, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = elsewhere / "merged/evomerge_scores.json"
        record = json.loads(path.read_text())
        assert record["reproduce"]["split"] == "test"
        record["reproduce"]["expected"]["pick_a"] += 0.25
        path.write_text(json.dumps(record))
        write_sums(elsewhere / "merged")
        monkeypatch.chdir(elsewhere)
        code, out, _ = call(capsys, monkeypatch, "verify", "merged")
        assert code == 1
        assert "although all 10 items are as recorded" in out

    def test_a_recorded_score_that_is_no_number_is_found(self, elsewhere: Path) -> None:
        path = elsewhere / "merged/evomerge_scores.json"
        record = json.loads(path.read_text())
        record["reproduce"]["item_scores"]["pick_a"][3] = float("nan")
        path.write_text(json.dumps(record))
        write_sums(elsewhere / "merged")
        assert len(verify(elsewhere / "merged", Where(elsewhere)).objectives[0].differing) == 1

    def test_missing_and_added_files(
        self, elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        merged = elsewhere / "merged"
        assert verify_digests(merged).equal
        (merged / ".gitattributes").write_text("from the Hub")
        assert verify_digests(merged).equal
        (merged / "config.json").unlink()
        (merged / "model-2.safetensors").write_text("")
        code, out, _ = call(capsys, monkeypatch, "verify", merged, "--digests-only")
        assert code == 1
        assert out.splitlines() == [
            f"{merged}: config.json: missing",
            f"{merged}: model-2.safetensors: was not written with the others",
        ]

    def test_sha256sum_reads_the_list(self, merged: Exported) -> None:
        done = subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=merged.out,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(": OK") == len(merged.files) - 1

    def test_tasks_that_are_not_here(self, elsewhere: Path, project: Path) -> None:
        shutil.rmtree(elsewhere / "fitness")
        with pytest.raises(InputError, match="fitness"):
            verify(elsewhere / "merged", Where(elsewhere))
        include = (str(project / "fitness"),)
        assert verify(elsewhere / "merged", Where(project, include)).equal

    def test_code_named_in_an_export_does_not_run(self, elsewhere: Path) -> None:
        path = elsewhere / "merged/evomerge_scores.json"
        record = json.loads(path.read_text())
        goal = {"kind": "python", "function": "merged/own.py:score", "items": "merged/i.jsonl"}
        record["reproduce"]["settings"]["fitness"]["objectives"] = [goal]
        record["reproduce"]["settings"]["fitness"]["allow_task_code"] = True
        path.write_text(json.dumps(record))
        (elsewhere / "merged/own.py").write_text("raise SystemExit('ran')\n")
        write_sums(elsewhere / "merged")
        with pytest.raises(InputError, match=r"score: scored by Python code .*--allow-task-code"):
            verify(elsewhere / "merged", Where(elsewhere))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.pop("reproduce"), "no item scores to compare with"),
            (lambda r: r["reproduce"].pop("item_scores"), "no item scores to compare with"),
            (lambda r: r["reproduce"]["items"]["pick_a"].pop(), "no item scores to compare with"),
            (lambda r: r["reproduce"].pop("settings"), "does not say how it was scored"),
            (lambda r: r["reproduce"]["settings"].update(fitness=3), "does not say how it was"),
        ],
    )
    def test_damaged_records(
        self, elsewhere: Path, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        path = elsewhere / "merged/evomerge_scores.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
        write_sums(elsewhere / "merged")
        with pytest.raises(InputError, match=message):
            verify(elsewhere / "merged", Where(elsewhere))

    def test_no_export(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such directory"):
            verify_digests(tmp_path / "gone")
        with pytest.raises(InputError, match=r"SHA256SUMS: cannot be read: .*export writes it"):
            verify_digests(tmp_path)
        (tmp_path / "SHA256SUMS").write_text("zz  ../a\n")
        with pytest.raises(InputError, match="not a list of SHA-256 digests"):
            verify_digests(tmp_path)

    def test_an_objective_that_compares_with_the_base_needs_it(
        self, tmp_path: Path, project: Path
    ) -> None:
        """The distance of a merge from its base cannot be measured without the base."""
        shutil.copytree(project, tmp_path / "p", ignore=shutil.ignore_patterns("studies"))
        path = tmp_path / "p/study.yaml"
        goal = "  objectives: [{kind: distance, norm: l2}]\n  include_path: fitness\n"
        path.write_text(path.read_text().replace("  include_path: fitness\n", goal))
        view = launch.run(prepare(load(path), path), []).view
        export_trial(view, trial=4, out=tmp_path / "m")
        root = tmp_path / "p"
        with pytest.raises(InputError, match="compares with the base: say where the models are"):
            verify(tmp_path / "m", Where(root))
        found = verify(tmp_path / "m", Where(root, folders=[root / "models"]))
        assert found.equal
        assert found.objectives[-1].found == view.test[4].values[-1] > 0


class TestPrivate:
    def test_no_file_names_a_path_of_this_machine(self, project: Path, merged: Exported) -> None:
        for path in merged.out.iterdir():
            data = path.read_bytes()
            assert str(project.parent).encode() not in data, path.name
            assert str(Path.home()).encode() + b"/" not in data, path.name

    def test_settings_keep_the_last_name_of_absolute_paths(self, project: Path) -> None:
        path = project / "study.yaml"
        goals = (
            "fitness.objectives=[{kind: kl, of: base, text: /home/CANARY/texts.txt}, "
            "{kind: python, function: '/home/CANARY/own.py:score', items: /home/CANARY/i.jsonl}]"
        )
        file = load(path, ["fitness.include_path=/home/CANARY/tasks", goals])
        settings = public_settings(file, {"batch_tokens": "4096", "threads": "2"})
        assert "CANARY" not in json.dumps(settings)
        assert settings["fitness"]["include_path"] == ["tasks"]
        first, second = settings["fitness"]["objectives"]
        assert first["text"] == "texts.txt"
        assert (second["function"], second["items"]) == ("own.py:score", "i.jsonl")
        assert (settings["batch_tokens"], settings["threads"]) == (4096, 2)


class TestOptions:
    def test_another_dtype_is_written_and_told(
        self, tmp_path: Path, view: StudyView, mixed: int, merged: Exported
    ) -> None:
        options = ExportOptions(dtype="BF16")
        result = export_trial(view, trial=mixed, out=tmp_path / "m", options=options)
        wide = open_models(str(merged.out), []).base
        narrow = open_models(str(tmp_path / "m"), []).base
        for name in wide.tensors:
            import torch

            rounded = torch.from_numpy(np.array(wide.read(name))).to(torch.bfloat16)
            assert narrow.tensors[name].dtype == "BF16"
            np.testing.assert_array_equal(narrow.read(name), rounded.view(torch.uint16).numpy())
        assert any("measured in float32; these weights are rounded to" in n for n in result.notes)
        scores = json.loads((tmp_path / "m/evomerge_scores.json").read_text())
        assert scores["dtype"] == {"scored": "float32", "written": "bfloat16"}
        assert Recipe.load(tmp_path / "m/evomerge_recipe.json").dtype == "BF16"

    def test_a_recipe_alone(
        self, tmp_path: Path, project: Path, view: StudyView, mixed: int, merged: Exported
    ) -> None:
        options = ExportOptions(recipe_only=True)
        result = export_trial(view, trial=mixed, out=tmp_path / "r", options=options)
        assert result.files == (
            "README.md", "SHA256SUMS", "evomerge_recipe.json", "evomerge_scores.json",
            "mergekit_config.yml",
        )  # fmt: skip
        recipes = [(one.out / "evomerge_recipe.json").read_bytes() for one in (result, merged)]
        assert recipes[0] == recipes[1]
        with pytest.raises(InputError, match="a recipe without weights"):
            verify(result.out, Where(project))
        assert verify_digests(result.out).equal

    def test_options_that_exclude_each_other(
        self, tmp_path: Path, view: StudyView, mixed: int
    ) -> None:
        for options in (
            ExportOptions(recipe_only=True, lora=2),
            ExportOptions(recipe_only=True, tokenizer="base"),
        ):
            with pytest.raises(InputError, match="--recipe-only writes no"):
                export_trial(view, trial=mixed, out=tmp_path / "m", options=options)
        assert list(tmp_path.iterdir()) == []

    def test_the_command_line_takes_all_of_them(
        self, tmp_path: Path, project: Path, view: StudyView,
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        code, out, _ = call(
            capsys, monkeypatch, "export", project / "study.yaml", "--pick", "asf:1,0", "--out",
            tmp_path / "m", "--dtype", "float16", "--tokenizer", "expert:code",
            "--max-shard-size", "5KB", "--json",
        )  # fmt: skip
        assert code == 0
        facts = json.loads(out)
        assert facts["trial"] == view.best("pick_a")
        assert "model.safetensors.index.json" in facts["files"]
        assert any("are those of code, as asked" in note for note in facts["notes"])
        assert {e.dtype for e in open_models(facts["directory"], []).base.tensors.values()} == {
            "F16"
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--pick", "hv", "--knee"], "choose exactly one of --pick HOW"),
            (["--pick", "asf:1"], "expected 2 weights >= 0"),
            (["--knee", "--public"], "--public is for --push-to-hub"),
            (["--knee", "--push-to-hub", "alone"], "expected owner/name, got 'alone'"),
            (["--knee", "--lora", "some"], "Invalid value for '--lora'"),
            (["--knee", "--lora"], "--lora: give a rank, such as --lora 16: task_arithmetic"),
            (["--knee", "--tokenizer", "expert:mth"], "no expert 'mth' (did you mean 'math'?)"),
            (["--knee", "--tokenizer", "nowhere"], "expected base, expert:NAME or a directory"),
        ],
    )
    def test_bad_usage_writes_nothing(
        self, tmp_path: Path, project: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str,
    ) -> None:  # fmt: skip
        out = tmp_path / "m"
        study = project / "study.yaml"
        code, _, err = call(capsys, monkeypatch, "export", study, "--out", out, *arguments)
        assert code == 2
        assert message in err
        assert list(tmp_path.iterdir()) == []


class TestTokenizer:
    @pytest.fixture
    def templated(self, tmp_path: Path, project: Path) -> Path:
        """A copy of the project in which one expert has a chat template and its own stop token."""
        shutil.copytree(project, tmp_path / "p")
        expert = tmp_path / "p/models/code"
        (expert / "chat_template.jinja").write_text("{{ messages }}")
        (expert / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
        return tmp_path / "p"

    def export(self, folder: Path, tokenizer: str | None) -> Exported:
        view = StudyView.load(folder / "studies/tiny")
        options = ExportOptions(tokenizer=tokenizer)
        return export_trial(view, trial=1, out=folder / "m", options=options)

    def test_decided_and_said(self, templated: Path) -> None:
        result = self.export(templated, None)
        assert "chat_template.jinja" not in result.files
        [note] = [one for one in result.notes if "Tokenizer" in one]
        assert note.endswith(
            "The base has no chat template; take an expert's with --tokenizer expert:code."
        )
        assert note in (result.out / "README.md").read_text()

    def test_asked(self, templated: Path) -> None:
        from transformers import AutoTokenizer

        result = self.export(templated, "expert:code")
        assert AutoTokenizer.from_pretrained(result.out).chat_template == "{{ messages }}"
        settings = json.loads((result.out / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [2, 5]

    def test_a_directory_with_other_token_ids(self, templated: Path) -> None:
        other = templated / "other"
        shutil.copytree(templated / "models/base", other)
        text = (other / "tokenizer.json").read_text().replace('"a": 3', '"q": 3')
        (other / "tokenizer.json").write_text(text)
        with pytest.raises(ModelError, match="--tokenizer: its tokenizer differs from the base's"):
            self.export(templated, str(other))
        (other / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="--tokenizer: other has no tokenizer"):
            self.export(templated, str(other))


class TestLora:
    def test_at_full_rank_it_is_the_merge(
        self, tmp_path: Path, project: Path, view: StudyView, mixed: int, merged: Exported
    ) -> None:
        """Read back by our reader of adapters, and its scores are the merge's."""
        options = ExportOptions(lora=24)
        result = export_trial(view, trial=mixed, out=tmp_path / "l", options=options)
        assert result.adapter is not None
        assert result.adapter.kept.error < 1e-5
        assert result.adapter.kept.lost == ()
        base = str(project / "models/base")
        [adapter] = open_models(base, [("lora", str(result.out))]).experts
        whole = open_models(str(merged.out), []).base
        for name, entry in whole.tensors.items():
            found = to_float32(adapter.read(name), adapter.tensors[name].dtype)
            expected = to_float32(whole.read(name), entry.dtype)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert result.adapter.evaluation is not None
        merge = view.test[mixed]
        assert [one.items for one in result.adapter.evaluation.scores] == [
            one.items for one in merge.scores
        ]
        assert verify(result.out, Where(project, sources={"base": base})).equal

    def test_what_it_loses_is_measured(
        self, tmp_path: Path, project: Path, view: StudyView, mixed: int, merged: Exported
    ) -> None:
        """Against the singular values that NumPy finds, tensor by tensor."""
        options = ExportOptions(lora=3)
        result = export_trial(view, trial=mixed, out=tmp_path / "l", options=options)
        assert result.adapter is not None
        base = load_file(project / "models/base/model.safetensors")
        merge = load_file(merged.out / "model.safetensors")
        missing = whole = 0.0
        for name, tensor in merge.items():
            delta = tensor.astype(np.float64) - base[name]
            whole += float((delta**2).sum())
            if delta.ndim == 2 and "embed" not in name:
                values = np.linalg.svd(delta, compute_uv=False)
                missing += float((values[3:] ** 2).sum())
        kept = result.adapter.kept
        assert kept.share == pytest.approx(1 - missing / whole, rel=1e-4)
        assert kept.error == pytest.approx((missing / whole) ** 0.5, rel=1e-4)
        assert kept.saved[:1] == ("model.embed_tokens",)
        card = (result.out / "README.md").read_text()
        assert f"it keeps {100 * kept.share:.2f} % of the squared change" in card
        assert "library_name: peft" in card
        assert "base = AutoModelForCausalLM.from_pretrained('models/base')" in card
        assert "model = PeftModel.from_pretrained(base, 'l')" in card
        assert "`base_model_name_or_path` in `adapter_config.json` is `./base`" in card
        assert "`evomerge verify DIR --base models/base`" in card
        scores = json.loads((result.out / "evomerge_scores.json").read_text())
        assert scores["adapter"]["rank"] == 3
        found = verify(result.out, Where(project, folders=[project / "models"]))
        assert [one.found for one in found.objectives] == list(scores["adapter"]["values"].values())
        assert found.equal

    def test_the_base_itself_has_no_adapter(self, tmp_path: Path, view: StudyView) -> None:
        base = next(trial.number for trial in view.trials if trial.label == "base")
        with pytest.raises(InputError, match="--lora: the merge does not differ from the base"):
            export_trial(view, trial=base, out=tmp_path / "l", options=ExportOptions(lora=2))
        assert list(tmp_path.iterdir()) == []

    def test_experts_of_a_mixture_are_refused(self, tmp_path: Path) -> None:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
        ))  # fmt: skip
        model.save_pretrained(tmp_path / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        model.save_pretrained(tmp_path / "one")
        models = open_models(str(tmp_path / "base"), [("one", str(tmp_path / "one"))])
        base, experts = models.refs
        recipe = Recipe(
            method="task_arithmetic", base=base, experts=experts, partition="model",
            layout=models.layout.digest, columns=("weight.one",), table=((1.0,),),
        )  # fmt: skip
        with pytest.raises(InputError, match=r"changes \S*experts\S*, and weights of a mixture's"):
            write_lora(recipe, models, 2, tmp_path)

    def test_few_ranks_of_a_large_matrix(self) -> None:
        """The random projection is as good as the full decomposition, and the same every time."""
        rng = np.random.default_rng(0)
        u, v = rng.normal(size=(300, 120)), rng.normal(size=(120, 250))
        matrix = (u * 0.9 ** np.arange(120) @ v).astype(np.float32)
        a, b = factors(matrix, 8)
        assert a.shape == (8, 250)
        values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        best = np.sqrt((values[8:] ** 2).sum())
        assert best <= np.linalg.norm(matrix - b @ a) * (1 + 1e-5) < best * 1.001
        again = factors(matrix, 8)
        np.testing.assert_array_equal(a, again[0])
        np.testing.assert_array_equal(b, again[1])


class TestAgain:
    def test_a_recipe_finds_its_models_on_another_machine(
        self, tmp_path: Path, project: Path, merged: Exported,
        capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """By their weights, under other names, and gives the same bits."""
        store = tmp_path / "store/deep"
        for name, source in (("b-7", "base"), ("x", "math"), ("y", "code")):
            shutil.copytree(project / "models" / source, store / name)
        (store / "broken").mkdir()
        (store / "broken/config.json").write_text("{")
        shutil.copy(merged.out / "evomerge_recipe.json", tmp_path)
        code, _, err = call(
            capsys, monkeypatch, "merge", tmp_path / "evomerge_recipe.json", "--out",
            tmp_path / "m", "--models", tmp_path / "store",
        )  # fmt: skip
        assert (code, err) == (0, "")
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / "m" / name).read_bytes() == (merged.out / name).read_bytes()
        assert verify_digests(tmp_path / "m").equal

    def test_a_folder_of_links_to_models_was_empty(
        self, tmp_path: Path, project: Path, view: StudyView, mixed: int
    ) -> None:
        """A study takes such a folder as its experts; a ring of links must not be walked."""
        store = tmp_path / "store"
        (store / "deep").mkdir(parents=True)
        for name, source in (("b", "base"), ("x", "math"), ("deep/y", "code")):
            (store / name).symlink_to(project / "models" / source)
        (store / "ring").symlink_to(store)
        (store / "nowhere").symlink_to(tmp_path / "gone")
        assert find_models(view.trial(mixed).recipe, [store]) == {
            "base": str(store / "b"), "math": str(store / "x"), "code": str(store / "deep/y"),
        }  # fmt: skip

    def test_an_adapter_is_found_beside_its_base(
        self, tmp_path: Path, project: Path, view: StudyView, mixed: int
    ) -> None:
        export_trial(view, trial=mixed, out=tmp_path / "l", options=ExportOptions(lora=2))
        shutil.copytree(project / "models/base", tmp_path / "base")
        models = open_models(str(tmp_path / "base"), [("lora", str(tmp_path / "l"))])
        base, experts = models.refs
        recipe = replace(view.trial(mixed).recipe, base=base, experts=experts, columns=(), table=())
        assert find_models(recipe, [tmp_path]) == {
            "base": str(tmp_path / "base"), "lora": str(tmp_path / "l"),
        }  # fmt: skip
        twice = replace(recipe, experts=(*experts, replace(experts[0], name="again")))
        assert find_models(twice, [tmp_path])["again"] == str(tmp_path / "l")
        assert find_models(recipe, [project / "models/math"]) == {}
        with pytest.raises(InputError, match="--models: no such directory"):
            find_models(recipe, [tmp_path / "gone"])


def test_compare_shows_what_the_items_ask(
    project: Path, view: StudyView, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = compare_trials(view, [2, 1])
    texts = item_texts(view, found, 3)
    asked = {
        name: [json.loads(line)["text"] + "=" for line in path.read_text().splitlines()]
        for name in ("pick_a", "pick_b")
        if (path := project / "fitness" / f"{name}.jsonl")
    }
    wanted = {
        (pairing.objective, change.item): asked[pairing.objective][int(change.item)]
        for pairing in found.pairings
        for change in pairing.changes[:3]
    }
    assert texts == wanted
    assert wanted, "the merges must differ somewhere"
    code, out, _ = call(
        capsys, monkeypatch, "compare", view.directory, 2, 1, "--items", 3, "--text", "--json"
    )
    assert code == 0
    shown = [c["text"] for pair in json.loads(out)["pairs"] for c in pair.get("changed", ())]
    assert sorted(shown) == sorted(wanted.values())
    code, _, err = call(capsys, monkeypatch, "compare", view.directory, 2, 1, "--text")
    assert (code, "--text is for --items N" in err) == (2, True)
