"""Model directories are data: everything wrong with them is found from headers alone."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.errors import ModelError, SetupError
from evomerge.layout import SlotKind, partition
from evomerge.models import open_models

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]


@pytest.fixture
def family(llama_family: Family, tmp_path: Path) -> tuple[Path, list[tuple[str, str]]]:
    """A base and two experts that a test may damage."""
    base, experts = llama_family()
    copied = [(name, str(shutil.copytree(source, tmp_path / name))) for name, source in experts]
    return Path(shutil.copytree(base, tmp_path / "base")), copied


def refusal(base: Path, experts: list[tuple[str, str]]) -> str:
    with pytest.raises(ModelError) as caught:
        open_models(str(base), experts)
    return str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | changes))


def test_layout_is_canonical_and_counts_a_tied_head_once(llama_family: Family) -> None:
    base, experts = llama_family()
    models = open_models(str(base), experts)
    names = [slot.name for slot in models.layout.slots]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == "model.norm.weight"
    assert models.layout.slots[0].aliases == ("lm_head.weight",)
    assert models.layout.layers == (0, 1)
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(base)
    assert models.layout.parameters == sum(p.numel() for p in live.parameters())
    untied, more = llama_family(tied=False)
    layout = open_models(str(untied), more).layout
    assert layout.slots[-1].name == "lm_head.weight"
    assert layout.slots[-1].kind is SlotKind.HEAD


@pytest.mark.parametrize(
    ("spec", "blocks"),
    [
        ("model", ("model",)),
        ("layer", ("embed", "layer.0", "layer.1", "final", "head")),
        (
            "module",
            ("embed", "layer.0.mlp", "layer.0.attention", "layer.1.mlp", "layer.1.attention",
             "final", "head"),
        ),
    ],
)  # fmt: skip
def test_partitions(llama_family: Family, spec: str, blocks: tuple[str, ...]) -> None:
    base, experts = llama_family(tied=False)
    layout = open_models(str(base), experts).layout
    cut = partition(layout, spec)
    assert set(cut.blocks) == set(blocks)
    covered = sum(
        (span.stop - span.start) * (layout.slots[span.slot].size // layout.slots[span.slot].rows)
        for span in cut.spans
    )
    assert covered == layout.parameters
    norm = next(i for i, s in enumerate(layout.slots) if "input_layernorm" in s.name)
    if spec == "module":
        assert cut.blocks[cut.spans[norm].block] == "layer.0.attention"
        after = next(i for i, s in enumerate(layout.slots) if "post_attention" in s.name)
        assert cut.blocks[cut.spans[after].block] == "layer.0.mlp"


def test_sharded_and_single_files_give_the_same_layout(
    save_llama: Callable[..., Path], tmp_path: Path
) -> None:
    one = save_llama("one", 5, vocab=512)
    many = save_llama("many", 6, vocab=512, base=one, shard_size="20KB")
    assert (many / "model.safetensors.index.json").exists()
    models = open_models(str(one), [("many", str(many))])
    assert len({entry.shard for entry in models.experts[0].tensors.values()}) > 1


def test_missing_directory(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere", []) == (
        f"models.base: no such directory: {tmp_path / 'nowhere'}"
    )


def test_unknown_hub_id_offline_is_the_environments_fault() -> None:
    with pytest.raises(SetupError, match="not in the local cache, and the hub cannot"):
        open_models("nobody/nothing", [])


def test_hub_ids_are_found_in_the_cache(
    llama_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = llama_family()
    commit = "a" * 40
    repo = tmp_path / "models--org--tiny"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / commit
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    models = open_models("org/tiny@main", experts)
    assert models.base.directory == snapshot
    assert models.base.fingerprint == open_models(str(base), experts).base.fingerprint


def test_no_config(family: tuple[Path, list[tuple[str, str]]]) -> None:
    (family[0] / "config.json").unlink()
    assert refusal(*family) == "models.base: base/config.json not found"


def test_broken_config(family: tuple[Path, list[tuple[str, str]]]) -> None:
    (family[0] / "config.json").write_text('{"a": ')
    assert "base/config.json: invalid JSON" in refusal(*family)


def test_own_code(family: tuple[Path, list[tuple[str, str]]]) -> None:
    edit_json(family[0] / "config.json", auto_map={"AutoModel": "x.Y"})
    assert "needs its own Python code (auto_map)" in refusal(*family)


def test_pickles(family: tuple[Path, list[tuple[str, str]]]) -> None:
    (family[0] / "model.safetensors").rename(family[0] / "pytorch_model.bin")
    assert "only pickled weights" in refusal(*family)


def test_adapter(family: tuple[Path, list[tuple[str, str]]]) -> None:
    (family[0] / "config.json").rename(family[0] / "adapter_config.json")
    assert "is a LoRA adapter" in refusal(*family)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"", "is not a complete safetensors file"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{", "is not a complete safetensors file"),
        (struct.pack("<Q", 1 << 40) + b"{}", "is not a complete safetensors file"),
        (struct.pack("<Q", 4) + b"{{}}", "bad header"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "duplicate key 'a'"),
    ],
)
def test_files_that_are_no_weights(
    family: tuple[Path, list[tuple[str, str]]], content: bytes, problem: str
) -> None:
    (family[0] / "model.safetensors").write_bytes(content)
    assert problem in refusal(*family)


def safetensors(header: dict[str, object], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("name", "entry", "problem"),
    [
        ("../evil", {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "is not allowed"),
        ("a", {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "dtype, shape and size"),
        ("a", {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}, "reaches beyond the file"),
        ("a", {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "cannot be merged"),
        ("a", {"dtype": "F32", "shape": [1]}, "bad header entry"),
        ("a", {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "dtype, shape and size"),
    ],
)
def test_entries_that_lie(
    family: tuple[Path, list[tuple[str, str]]], name: str, entry: dict[str, object], problem: str
) -> None:
    (family[0] / "model.safetensors").write_bytes(safetensors({name: entry}, b"\0" * 4))
    assert problem in refusal(*family)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x", "a/b.safetensors", "..", "a\\b"])
def test_index_that_leaves_the_directory(
    family: tuple[Path, list[tuple[str, str]]], shard: str
) -> None:
    index = family[0] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    assert "leaves the directory" in refusal(*family)


def test_link_that_leaves_the_directory(
    family: tuple[Path, list[tuple[str, str]]], tmp_path: Path
) -> None:
    (family[0] / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (family[0] / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert "is a link that leaves base" in refusal(*family)


def test_missing_shard(family: tuple[Path, list[tuple[str, str]]]) -> None:
    index = family[0] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    assert "shard model-2.safetensors is missing from base" in refusal(*family)


def test_other_shapes_and_layers_are_named_for_all_experts_at_once(
    family: tuple[Path, list[tuple[str, str]]], save_llama: Callable[..., Path]
) -> None:
    base, _ = family
    text = refusal(
        base,
        [
            ("wide", str(save_llama("wide", 3, vocab=40))),
            ("deep", str(save_llama("deep", 3, layers=3))),
            ("untied", str(save_llama("untied", 3, tied=False))),
            ("copy", str(base)),
        ],
    )
    assert (
        "models.experts.wide: model.embed_tokens.weight is 40x16, the base has 32x16 "
        "(resize its vocabulary to the base's)" in text
    )
    assert "models.experts.deep: num_hidden_layers is 3, the base has 2" in text
    assert "models.experts.deep: 9 tensors not in the base (model.layers.2" in text
    assert "models.experts.untied: its head is untied" in text
    assert "models: copy has the same weights as base" in text


def test_other_tokenizers_are_refused_by_id(family: tuple[Path, list[tuple[str, str]]]) -> None:
    base, experts = family
    vocab = {"a": 0, "b": 1, "c": 2}
    (base / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    vocab = {"a": 0, "c": 1, "b": 2}
    (Path(experts[0][1]) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    assert "its tokenizer differs from the base's at id 1" in refusal(base, experts)


def test_damaged_weights_are_refused_by_name(family: tuple[Path, list[tuple[str, str]]]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from evomerge.merge.sources import Sources

    base, experts = family
    path = Path(experts[1][1]) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    tensors["model.norm.weight"][5] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    sources = Sources(open_models(str(base), experts))
    with pytest.raises(ModelError, match=r"code: 2 values of model.norm.weight are not finite"):
        sources.require_finite()
