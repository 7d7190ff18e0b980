"""`evomerge merge`: one recipe file to one checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge import cli
from evomerge.byte_progress import byte_progress
from evomerge.errors import InputError
from evomerge.merge.writer import write_checkpoint
from evomerge.models import Models, open_models
from evomerge.one_shot import MergeSettings, find_sources, merge_recipe, read_recipe, size_bytes
from evomerge.recipe import ModelRef, Recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, llama_family: Callable[..., Any]) -> Path:
    """A folder with a recipe and its models beside it, under names of their own."""
    folder = tmp_path_factory.mktemp("home")
    base, experts = llama_family()
    shutil.copytree(base, folder / "origin")
    for name, source in experts:
        shutil.copytree(source, folder / f"my-{name}")
    (folder / "origin" / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(folder), "model_max_length": 64})
    )
    models = open_home(folder)
    base_ref, refs = models.refs
    recipe = Recipe(
        method="task_arithmetic",
        base=ModelRef("base", "./origin", base_ref.fingerprint),
        experts=tuple(ModelRef(ref.name, f"./my-{ref.name}", ref.fingerprint) for ref in refs),
        partition="layer",
        layout=models.layout.digest,
        columns=("weight.math", "weight.code"),
        table=((0.1, 0.9), (0.7, 0.2), (0.4, 0.3), (1.0, 0.0)),
    )
    (folder / "recipe.json").write_text(recipe.to_json())
    return folder


def open_home(folder: Path) -> Models:
    experts = [(name, str(folder / f"my-{name}")) for name in ("math", "code")]
    return open_models(str(folder / "origin"), experts)


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.out, output.err


class TestCommand:
    def test_writes_what_transformers_loads(
        self, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Compared with the formula in float64, through transformers' own loader."""
        import torch
        from transformers import AutoModelForCausalLM

        code, out, err = call(
            capsys, monkeypatch, "merge", home / "recipe.json", "--out", tmp_path / "m"
        )
        assert (code, err) == (0, "")
        assert out.startswith(f"wrote {tmp_path / 'm'}: task_arithmetic of math, code; 0.00 GB in ")
        assert out.count("\n") == 1
        merged, base, *experts = (
            AutoModelForCausalLM.from_pretrained(path).state_dict()
            for path in (tmp_path / "m", home / "origin", home / "my-math", home / "my-code")
        )
        assert merged.keys() == base.keys()
        rows = {"embed": (0.1, 0.9), "0": (0.7, 0.2), "1": (0.4, 0.3), "norm": (1.0, 0.0)}
        for name, tensor in merged.items():
            part = name.split(".")
            key = part[2] if part[1] == "layers" else ("norm" if part[1] == "norm" else "embed")
            origin = base[name].double()
            deltas = [
                weight * (expert[name].double() - origin)
                for weight, expert in zip(rows[key], experts, strict=True)
            ]
            torch.testing.assert_close(tensor.double(), origin + sum(deltas), rtol=1e-6, atol=1e-7)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()

    def test_json_tells_what_was_written(
        self, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        code, out, err = call(
            capsys, monkeypatch, "merge", home / "recipe.json", "--out", tmp_path / "m", "--json",
            "--dtype", "bfloat16", "--max-memory", "1.5MB", "--max-shard-size", "5KB",
            "--threads", 2,
        )  # fmt: skip
        assert (code, err) == (0, "")
        facts = json.loads(out)
        assert facts["dtype"] == "BF16"
        assert facts["files"] == sorted(path.name for path in (tmp_path / "m").iterdir())
        assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "m").iterdir())
        assert "model.safetensors.index.json" in facts["files"]
        written = Recipe.load(tmp_path / "m" / "evomerge_recipe.json")
        assert written.digest == facts["recipe"] != Recipe.load(home / "recipe.json").digest
        assert written.dtype == "BF16"
        assert [ref.source for ref in (written.base, *written.experts)] == [
            "./origin", "./my-math", "./my-code",
        ]  # fmt: skip
        opened = open_models(str(tmp_path / "m"), [])
        assert {slot.dtype for slot in opened.layout.slots} == {"BF16"}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.json"], "nowhere.json: cannot be read: No such file or directory"),
            (["bad.json"], "error: bad.json:1:2: no JSON: Expecting property name"),
            (
                ["r.md"],
                "error: r.md:1:1: no JSON: Expecting value (give the evomerge_recipe.json",
            ),
            (
                ["bytes.json"],
                "bytes.json: cannot be read: not a text file (give the evomerge_recipe.json",
            ),
            (
                ["."],
                ".: cannot be read: Is a directory (give the evomerge_recipe.json",
            ),
            (
                ["other.json"],
                "other.json: recipe: has no schema, so it is none (give the evomerge_recipe.json",
            ),
            (["recipe.json", "--base", "./gone"], "recipe.json: base: no such directory: ./gone\n"),
            (["recipe.json", "--expert", "mth=x"], "has no model 'mth' (did you mean 'math'?)"),
            (["recipe.json", "--expert", "math"], "--expert: expected NAME=MODEL, got 'math'"),
            (["recipe.json", "--max-memory", "lots"], "--max-memory: expected a size such as 5GB"),
            (["recipe.json", "--max-memory", "1KB"], "--max-memory: at least 1 MB are needed"),
            (["recipe.json", "--max-shard-size", "0GB"], "--max-shard-size: expected a size"),
            (["recipe.json", "--dtype", "int8"], "Invalid value for '--dtype'"),
            (
                ["recipe.json", "--expert", "math=./my-code", "--expert", "code=./my-math"],
                "math: ./my-code has other weights than the recipe was made for",
            ),
        ],
    )
    def test_bad_input_is_a_clear_error_and_exit_2(
        self, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str,
    ) -> None:  # fmt: skip
        shutil.copytree(home, tmp_path / "home")
        monkeypatch.chdir(tmp_path / "home")
        Path("bad.json").write_text("{")
        Path("r.md").write_text("# A model card")
        Path("other.json").write_text("{}")
        Path("bytes.json").write_bytes(b"\xff\xfe")
        before = sorted(Path().iterdir())
        code, out, err = call(capsys, monkeypatch, "merge", *arguments, "--out", "m")
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
        assert sorted(Path().iterdir()) == before

    def test_every_missing_model_is_named_with_its_option(
        self, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        shutil.copy(home / "recipe.json", tmp_path / "r.json")
        code, _, err = call(
            capsys, monkeypatch, "merge", tmp_path / "r.json", "--out", tmp_path / "m"
        )
        assert code == 2
        for option in ("--base DIR", "--expert math=DIR", "--expert code=DIR"):
            assert f"(say where it is: {option}, or --models FOLDER to find it by its" in err
        moved = [
            "--base", home / "origin", "--expert", f"math={home / 'my-math'}",
            "--expert", f"code={home / 'my-code'}",
        ]  # fmt: skip
        assert call(
            capsys, monkeypatch, "merge", tmp_path / "r.json", "--out", tmp_path / "m", *moved
        )[0] == 0  # fmt: skip


def test_equals_the_writer_and_carries_the_companions(home: Path, tmp_path: Path) -> None:
    merged = merge_recipe(home / "recipe.json", tmp_path / "m", {})
    (tmp_path / "w").mkdir()
    write_checkpoint(read_recipe(home / "recipe.json"), open_home(home), tmp_path / "w")
    name = "model.safetensors"
    assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "w" / name).read_bytes()
    assert merged.files == (
        "SHA256SUMS", "config.json", "evomerge_recipe.json", "generation_config.json",
        "mergekit_config.yml", "model.safetensors", "tokenizer_config.json",
    )  # fmt: skip
    for path in (tmp_path / "m").iterdir():
        assert str(home).encode() not in path.read_bytes(), path.name


def test_a_written_merge_can_be_repeated_from_its_own_recipe(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home, tmp_path / "home")
    first = merge_recipe(tmp_path / "home" / "recipe.json", tmp_path / "home" / "m", {})
    shutil.copy(first.out / "evomerge_recipe.json", tmp_path / "home" / "again.json")
    again = merge_recipe(tmp_path / "home" / "again.json", tmp_path / "home" / "n", {})
    files = [(one.out / "model.safetensors").read_bytes() for one in (first, again)]
    assert files[0] == files[1]
    assert first.recipe.digest == again.recipe.digest


def test_sources_are_hub_ids_or_lie_beside_the_recipe(home: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        method="task_arithmetic", base=ModelRef("base", "owner/base@v1", "f"),
        experts=(ModelRef("math", "./my-math", "f"), ModelRef("code", "my-code", "f")),
        partition="model", layout="", columns=(), table=(),
    )  # fmt: skip
    found = find_sources(recipe, home / "r.json", {})
    assert found == {
        "base": "owner/base@v1", "math": str(home / "my-math"), "code": str(home / "my-code"),
    }  # fmt: skip


class TestAtomic:
    def test_an_occupied_directory_is_refused_and_kept(self, home: Path, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "mine").write_text("keep")
        with pytest.raises(InputError, match="exists and is not empty"):
            merge_recipe(home / "recipe.json", tmp_path / "m", {})
        assert [path.name for path in (tmp_path / "m").iterdir()] == ["mine"]

    def test_too_little_space(
        self, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
        code, _, err = call(
            capsys, monkeypatch, "merge", home / "recipe.json", "--out", tmp_path / "m"
        )
        assert code == 6
        assert "needs 0.07 GB, 0.00 GB are free" in err
        assert list(tmp_path.iterdir()) == []

    def test_a_failure_half_way_leaves_nothing(
        self, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(done: int, total: int) -> None:
            assert [path.name for path in tmp_path.iterdir()] != []
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_recipe(home / "recipe.json", tmp_path / "m", {}, None, MergeSettings(), stop)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), (" 1.5 KB ", 1500), ("2TB", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_bytes(text, "--max-memory") == size


def test_the_bar_is_for_terminals(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=100)
        with byte_progress("merged", console) as progress:
            progress(5_000_000, 10_000_000)
        assert ("merged" in stream.getvalue()) == terminal


def test_weights_of_zero_write_the_base(home: Path, tmp_path: Path) -> None:
    recipe = json.loads((home / "recipe.json").read_text())
    recipe["table"] = [[0.0, 0.0]] * 4
    shutil.copytree(home, tmp_path / "home")
    (tmp_path / "home" / "zero.json").write_text(json.dumps(recipe))
    merge_recipe(tmp_path / "home" / "zero.json", tmp_path / "m", {})
    merged, base = open_models(str(tmp_path / "m"), []).base, open_home(home).base
    assert merged.tensors.keys() == base.tensors.keys()
    for name in base.tensors:
        np.testing.assert_array_equal(merged.read(name), base.read(name))


@pytest.mark.parametrize("found", [True, False], ids=["by digests", "as written"])
def test_one_directory_under_two_names(home: Path, tmp_path: Path, found: bool) -> None:
    """Of models with equal weights only the last was found, and then both were refused."""
    recipe = Recipe.load(home / "recipe.json")
    base, math = recipe.base, recipe.experts[0]
    twice = replace(
        recipe,
        experts=(math, replace(math, name="again"), replace(base, name="origin")),
        columns=("weight.math", "weight.again", "weight.origin"),
        table=((0.25, 0.5, 3.0), (0.5, 0.25, 3.0), (1.0, 0.0, 3.0), (0.0, 1.0, 3.0)),
    )
    (tmp_path / "r.json").write_text(twice.to_json())
    folders = [home]
    if not found:
        for name in ("origin", "my-math"):
            shutil.copytree(home / name, tmp_path / name)
        folders = []
    merged = merge_recipe(tmp_path / "r.json", tmp_path / "m", {}, folders=folders)
    once = replace(
        recipe, experts=(math,), columns=("weight.math",), table=((0.75,), (0.75,), (1.0,), (1.0,))
    )
    (tmp_path / "once.json").write_text(once.to_json())
    merge_recipe(tmp_path / "once.json", tmp_path / "o", {}, folders=[home])
    ours, theirs = (open_models(str(tmp_path / name), []).base for name in ("m", "o"))
    origin = open_models(str(home / "origin"), []).base
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in theirs.tensors:
        np.testing.assert_allclose(ours.read(name), theirs.read(name), rtol=3e-7, atol=1e-8)
    assert any(not np.array_equal(ours.read(name), origin.read(name)) for name in origin.tensors)
    assert [ref.name for ref in merged.recipe.experts] == ["math", "again", "origin"]
    again = merge_recipe(
        tmp_path / "m" / "evomerge_recipe.json", tmp_path / "n", {}, folders=[home]
    )
    files = [(one.out / "model.safetensors").read_bytes() for one in (merged, again)]
    assert files[0] == files[1]
