"""One model directory: what its fingerprint sees, and one clear line for everything damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.checkpoint import open_checkpoint, resolve_source
from evomerge.errors import ModelError
from evomerge.models import open_models

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]
#: Elements (F32) of each of 64 norms, and of a matrix of 64 MiB behind them.
NORM, MATRIX = 1024, 1 << 24
START = 64 * 4 * NORM


@pytest.fixture
def damaged(llama_family: Family, tmp_path: Path) -> Path:
    """A copy of a base that a test may damage."""
    import shutil

    return Path(shutil.copytree(llama_family()[0], tmp_path / "model"))


def refusal(directory: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        open_models(str(directory), [])
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def large(directory: Path, *changed: int) -> str:
    """Write norms and a matrix of zeros, with a 1 at some bytes; return the fingerprint."""
    header = {f"norm.{number}": entry(NORM, 4 * NORM * number) for number in range(64)}
    header["matrix"] = entry(MATRIX, START)
    text = json.dumps(header).encode()
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    with (directory / "model.safetensors").open("wb") as file:
        body = file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(body + START + 4 * MATRIX)  # a hole: nothing is written
        for offset in changed:
            file.seek(body + offset)
            file.write(b"\1")
    return open_checkpoint(str(directory), "m", "m").fingerprint


def entry(count: int, start: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [count], "data_offsets": [start, start + 4 * count]}


@pytest.mark.parametrize("number", [1, 31, 63])
def test_fingerprint_sees_one_byte_of_any_small_tensor(tmp_path: Path, number: int) -> None:
    """Norms and biases lay between the samples, so that other weights had the same identity."""
    assert large(tmp_path / "a") != large(tmp_path / "b", 4 * NORM * number + 2001)


def test_fingerprint_sees_both_ends_of_a_large_tensor_and_training(tmp_path: Path) -> None:
    end = START + 4 * MATRIX
    prints = {
        large(tmp_path / "same"),
        large(tmp_path / "again"),
        large(tmp_path / "first", START),
        large(tmp_path / "last", end - 1),
        large(tmp_path / "trained", *range(START + 4096, end - 4096, 4096)),
    }
    assert len(prints) == 4


def test_fingerprint_reads_little_of_large_tensors(tmp_path: Path) -> None:
    """What it cannot see is said in the docstring: a few rows of a large tensor."""
    assert large(tmp_path / "a") == large(tmp_path / "b", START + 8192)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{oops", "invalid JSON"),
        ("[]", "expected a mapping"),
        ("[" * 200_000, "invalid JSON: maximum recursion depth"),
        ('{"a":' + "9" * 5000 + "}", "invalid JSON: Exceeds the limit"),
        ('{"a": "\xff', "invalid JSON"),
    ],
    ids=["broken", "list", "deep", "digits", "encoding"],
)
def test_json_files_that_cannot_be_used(damaged: Path, file: str, text: str, problem: str) -> None:
    (damaged / file).write_text(text, encoding="latin-1")
    assert f"models.base: model/{file}: {problem}" in refusal(damaged)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors.index.json", "tokenizer.json", "model.safetensors"]
)
def test_directories_in_the_place_of_files(damaged: Path, file: str) -> None:
    (damaged / file).unlink(missing_ok=True)
    (damaged / file).mkdir()
    assert "cannot be read: Is a directory" in refusal(damaged)


@pytest.mark.parametrize(
    "tokenizer",
    [
        '{"model": null}',
        '{"model": 3}',
        '{"model": {"vocab": null}}',
        '{"model": {"vocab": {"a": null}}}',
        '{"model": {"vocab": {"a": Infinity}}}',
        '{"model": {"vocab": [3]}}',
        '{"model": {"vocab": [[]]}}',
        '{"added_tokens": [{"id": 3}]}',
        '{"added_tokens": null}',
    ],
)
def test_tokenizers_without_a_vocabulary(damaged: Path, tokenizer: str) -> None:
    (damaged / "tokenizer.json").write_text(tokenizer)
    assert refusal(damaged) == (
        "models.base: model/tokenizer.json: no valid vocabulary (save the tokenizer again)"
    )


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ("[Infinity]", "[0, 4]"),
        ("[1]", "[1e400, 4]"),
        ("[1]", "[NaN, 4]"),
        ("[1.5]", "[0, 4]"),
        ('["1"]', "[0, 4]"),
        ("[true]", "[0, 4]"),
        ("[1]", "[0, 4, 8]"),
    ],
)
def test_header_numbers_that_are_no_integers(damaged: Path, shape: str, offsets: str) -> None:
    header = f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'.encode()
    content = struct.pack("<Q", len(header)) + header + b"\0" * 64
    (damaged / "model.safetensors").write_bytes(content)
    assert refusal(damaged) == "models.base: model.safetensors: a: bad header entry"


def test_tensors_that_share_bytes(damaged: Path) -> None:
    header = json.dumps({"a": entry(2, 0), "b": entry(2, 4)}).encode()
    content = struct.pack("<Q", len(header)) + header + b"\0" * 64
    (damaged / "model.safetensors").write_bytes(content)
    assert refusal(damaged) == "models.base: model.safetensors: a and b overlap"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("~nosuchuser/x", "no such directory: ~nosuchuser/x (Could not determine home directory"),
        ("a" * 300, "(File name too long)"),
        ("a/" + "b" * 300, "is neither a directory nor a valid hub id (owner/name[@revision])"),
        ("a/" + "b" * 150, "is neither a directory nor a valid hub id (owner/name[@revision])"),
        ("a/b--c", "is neither a directory nor a valid hub id (owner/name[@revision])"),
    ],
)
def test_sources_that_cannot_be(source: str, problem: str, tmp_path: Path) -> None:
    assert problem in refusal(source)
    assert problem in refusal(resolve_source(source, tmp_path))


def test_a_missing_directory_beside_others_is_not_a_hub_id(tmp_path: Path) -> None:
    """``models/base`` was looked up on the hub, and the network was blamed."""
    (tmp_path / "models").mkdir()
    missing = resolve_source("models/base", tmp_path)
    assert refusal(missing) == f"models.base: no such directory: {tmp_path / 'models/base'}"
    (tmp_path / "models" / "base").mkdir()
    assert resolve_source("models/base", tmp_path) == str(tmp_path / "models/base")
    assert resolve_source("org/base", tmp_path) == "org/base"
    assert resolve_source("org/base@v1", tmp_path) == "org/base@v1"


def test_quantised_models_are_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (damaged / "config.json").write_text(json.dumps(config))
    assert "model is quantised (quantization_config)" in refusal(damaged)
    assert "(use the model it was made from, or dequantise and save it)" in refusal(damaged)
    config["quantization_config"] = None
    (damaged / "config.json").write_text(json.dumps(config))
    open_models(str(damaged), [])
