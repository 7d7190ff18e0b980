"""Open a model directory that is not trusted: headers first, weights memory-mapped.

Everything that a directory claims is checked here, before any weight is read: the rest of
evomerge receives a validated ``Checkpoint``. safetensors only; the header is parsed by hand
because the library accepts duplicate names, and shard paths that leave the directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.errors import ModelError, SetupError

#: Bytes per element of the dtypes that occur in checkpoints.
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
#: The dtypes that can be merged, with the NumPy dtype that carries their bits.
MERGEABLE: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.uint16, "BF16": np.uint16}
_COPIED = {"I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL"}
_MAX_HEADER_BYTES = 64 << 20
_MAX_TENSORS = 200_000
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+(@[\w.\-/]+)?\Z")
#: What is fetched from the hub: weights and the files that describe them, never pickles.
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
#: Fingerprints sample this many blocks of each shard beside its header.
_SAMPLES, _SAMPLE_BYTES = 1024, 4096


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: absolute byte range of a shard."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A validated model directory.

    Attributes:
        name: short name in the study.
        source: as the user wrote it.
        directory: where it lies.
        config: its ``config.json``.
        tensors: by name, sorted.
        fingerprint: of headers and sampled weights; changes when the weights change.
    """

    name: str
    source: str
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    fingerprint: str

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding.

        transformers writes the flag for some architectures only at its default, so an absent
        flag is decided by the file: no head stored means that it is tied.
        """
        flag = self.config.get("tie_word_embeddings")
        if isinstance(flag, bool):
            return flag
        return "lm_head.weight" not in self.tensors

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return one tensor as a flat read-only memory map of its bits."""
        entry = self.tensors[name]
        dtype = np.dtype(MERGEABLE.get(entry.dtype, np.uint8))
        count = (entry.stop - entry.start) // dtype.itemsize
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(entry.shard, dtype=dtype, mode="r", offset=entry.start, shape=(count,))


def open_checkpoint(source: str, name: str, where: str) -> Checkpoint:
    """Validate a local directory or a hub id and return its checkpoint.

    Args:
        source: directory, or hub id ``owner/name[@revision]``.
        name: short name in the study.
        where: dotted path in the study file, for messages.

    Raises:
        ModelError: anything that keeps the model from being merged.
        SetupError: the hub cannot be reached and the model is not cached.
    """
    directory = _locate(source, where)
    config = _read_config(directory, where)
    shards = _shards(directory, where)
    tensors: dict[str, TensorEntry] = {}
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        header, body = _read_header(shard, where)
        for tensor, entry in _entries(header, body, shard, where):
            if tensor in tensors:
                raise ModelError(f"{where}: tensor {tensor!r} is stored in two shards")
            tensors[tensor] = entry
        digest.update(_sample(shard, body))
    _check_index(directory, tensors, where)
    ordered = dict(sorted(tensors.items()))
    return Checkpoint(name, source, directory, config, ordered, digest.hexdigest())


def _locate(source: str, where: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{where}: {source} is a file (give the checkpoint directory)")
    if not _HUB_ID.match(source) or source.startswith((".", "/", "~")):
        raise ModelError(f"{where}: no such directory: {source}")
    return _download(source, where)


def _download(source: str, where: str) -> Path:
    """Fetch a hub snapshot into the usual Hugging Face cache, or find it there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    repo, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(_HUB_FILES))
        )
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise ModelError(
            f"{where}: {source} is neither a directory nor a hub model that you may read "
            "(check the spelling, or log in with `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SetupError(
            f"{where}: {source} is not a directory, not in the local cache, and the hub cannot "
            "be reached (check the path, or the network and HF_HUB_OFFLINE)"
        ) from error


def _read_config(directory: Path, where: str) -> dict[str, Any]:
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise ModelError(
            f"{where}: {directory.name} is a LoRA adapter, not a full checkpoint "
            "(merge it into its base first)"
        )
    path = directory / "config.json"
    if not path.exists():
        raise ModelError(f"{where}: {directory.name}/config.json not found")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{where}: {directory.name}/config.json: invalid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{where}: {directory.name}/config.json: expected a mapping")
    if "auto_map" in config:
        raise ModelError(
            f"{where}: {directory.name} needs its own Python code (auto_map), which evomerge "
            "does not run (use a model that transformers supports itself)"
        )
    return config


def _shards(directory: Path, where: str) -> list[Path]:
    """Return the shard files, sorted, each inside the directory."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_weight_map(index, where).values()))
    elif (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt"))
        hint = (
            "only pickled weights, which can run code on loading (convert them to safetensors)"
            if pickles
            else "no model.safetensors and no model.safetensors.index.json"
        )
        raise ModelError(f"{where}: {directory.name}: {hint}")
    return [_inside(directory, name, where) for name in names]


def _weight_map(index: Path, where: str) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(shard) for tensor, shard in mapping.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: {index.name}: no valid weight_map ({error})") from error


def _inside(directory: Path, name: str, where: str) -> Path:
    """Return the path of a shard, refusing names that leave the directory."""
    if Path(name).name != name or name in {"", ".", ".."} or "\\" in name or "\0" in name:
        raise ModelError(f"{where}: index: shard {name!r} leaves the directory")
    path = directory / name
    if not path.exists():
        raise ModelError(f"{where}: shard {name} is missing from {directory.name}")
    root = directory.resolve()
    # The Hugging Face cache stores snapshots as links into its own blobs folder.
    allowed = (root, root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(folder) for folder in allowed):
        raise ModelError(f"{where}: {name} is a link that leaves {directory.name}")
    return path


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"duplicate key {key!r}")
        seen[key] = value
    return seen


def _read_header(shard: Path, where: str) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and the offset of its data."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        first = file.read(8)
        if first.startswith(b"version "):
            raise ModelError(f"{where}: {shard.name} is a Git LFS pointer (run `git lfs pull`)")
        if first[:1] == b"<":
            raise ModelError(f"{where}: {shard.name} is a web page, not weights (download again)")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length < 2 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{where}: {shard.name} is not a complete safetensors file")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: {shard.name}: bad header: {error}") from error
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise ModelError(f"{where}: {shard.name}: bad header")
    return header, 8 + length


def _entries(
    header: dict[str, Any], body: int, shard: Path, where: str
) -> Iterator[tuple[str, TensorEntry]]:
    """Check every entry of a header against the file and yield it."""
    size = shard.stat().st_size
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not _NAME.match(name):
            raise ModelError(f"{where}: {shard.name}: tensor name {name[:60]!r} is not allowed")
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
            start, stop = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{where}: {shard.name}: {name}: bad header entry") from error
        expected = prod(shape) * ITEM_BYTES.get(dtype, 0)
        if dtype not in ITEM_BYTES or min(shape, default=0) < 0 or stop - start != expected:
            raise ModelError(f"{where}: {shard.name}: {name}: dtype, shape and size disagree")
        if start < 0 or body + stop > size:
            raise ModelError(f"{where}: {shard.name}: {name} reaches beyond the file (truncated?)")
        if dtype not in MERGEABLE and dtype not in _COPIED:
            raise ModelError(
                f"{where}: {name} has dtype {dtype}, which cannot be merged (use F32, F16 or BF16)"
            )
        yield name, TensorEntry(shard, dtype, shape, body + start, body + stop)


def _check_index(directory: Path, tensors: Mapping[str, TensorEntry], where: str) -> None:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return
    for tensor, shard in _weight_map(index, where).items():
        if tensor not in tensors or tensors[tensor].shard.name != shard:
            raise ModelError(f"{where}: index places {tensor} in {shard}, which lacks it")


def _sample(shard: Path, body: int) -> bytes:
    """Return a digest of the header, the size and evenly spaced blocks of the data."""
    size = shard.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    step = max((size - body) // _SAMPLES, _SAMPLE_BYTES)
    with shard.open("rb") as file:
        digest.update(file.read(body))
        for offset in range(body, size, step):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
