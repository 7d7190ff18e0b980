"""Open a model directory that is not trusted: headers first, weights memory-mapped.

Everything that a directory claims is checked here, before any weight is read: the rest of
evomerge receives a validated ``Checkpoint``. safetensors only; the header is parsed by hand
because the library accepts duplicate names, and shard paths that leave the directory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from evomerge.errors import ModelError, SetupError
from evomerge.file_map import map_file

if TYPE_CHECKING:
    from evomerge.low_rank import LowRank

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
#: Fingerprints cover tensors below this completely; norms and biases are the ones that matter.
_WHOLE_BYTES = 1 << 20
#: They cover this many blocks of each larger tensor, its first and its last among them.
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def to_float32(bits: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Return the values of raw bits; float32 passes through unchanged.

    Args:
        bits: float32 values, or uint16 patterns of F16 or BF16.
        dtype: safetensors name.
    """
    if dtype == "F32":
        return np.asarray(bits, dtype=np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: absolute byte range of a shard."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> npt.NDArray[Any]:
        """Return the tensor's bits, flat and read-only: a view of the shard's memory map.

        Raises:
            ModelError: the file is not the one that was opened.
            SetupError: this process may open no more files.
        """
        dtype = np.dtype(MERGEABLE.get(self.dtype, np.uint8))
        if self.start == self.stop:
            return np.empty(0, dtype)
        raw = map_file(self.shard)[self.start : self.stop]
        if len(raw) < self.stop - self.start:
            raise ModelError(f"{self.shard}: became shorter since it was opened (start again)")
        return raw.view(dtype)

    def values(self) -> npt.NDArray[np.float32]:
        """Return the tensor as float32, in its shape."""
        return to_float32(self.read(), self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A validated model directory.

    Attributes:
        name: short name in the study.
        source: as the user wrote it.
        directory: where it lies.
        config: its ``config.json``.
        tensors: by name, sorted.
        fingerprint: of headers and weights. Tensors below 1 MiB count completely, larger ones
            by 16 blocks of 4 KiB, evenly spaced: training changes all of them, an edit of a few
            rows of a large tensor can go unseen.
        folds: tensors that are computed instead of stored (a LoRA adapter's); ``tensors`` gives
            their shapes.
    """

    name: str
    source: str
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    fingerprint: str
    folds: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def pinned(self) -> str:
        """The source; of a hub id at the commit that was read, where the cache's layout tells it.

        A branch or tag may point to other weights tomorrow, or on another machine.
        """
        if is_local(self.source):
            return self.source
        repo, _, _ = self.source.partition("@")
        commit = self.directory.name
        known = self.directory.parent.name == "snapshots" and len(commit) == 40
        return f"{repo}@{commit}" if known else self.source

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
        """Return the bits of one tensor, flat: a read-only memory map, or a fold's result."""
        if name in self.folds:
            return self.folds[name].fold()
        return self.tensors[name].read()


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
    directory = locate(source, where)
    config = _read_config(directory, where)
    shards = _shards(directory, where)
    tensors: dict[str, TensorEntry] = {}
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        entries, body = read_header(shard, where)
        for tensor, entry in entries:
            if tensor in tensors:
                raise ModelError(f"{where}: tensor {tensor!r} is stored in two shards")
            tensors[tensor] = entry
        digest.update(_fingerprint(shard, body, [entry for _, entry in entries]))
    _check_index(directory, tensors, where)
    ordered = dict(sorted(tensors.items()))
    return Checkpoint(name, source, directory, config, ordered, digest.hexdigest())


def locate(source: str, where: str) -> Path:
    """Return the directory of a local model, or of a hub id after fetching it.

    Raises:
        ModelError: no such directory, or not a model that may be read.
        SetupError: the hub cannot be reached and the model is not cached.
    """
    try:
        path = Path(source).expanduser()
        found, taken = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # name too long, closed parent, unknown ~user
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{where}: no such directory: {source} ({reason})") from error
    if found:
        return path
    if taken:
        raise ModelError(f"{where}: {source} is a file (give the checkpoint directory)")
    if not _HUB_ID.match(source) or source.startswith((".", "/", "~")):
        raise ModelError(f"{where}: no such directory: {source}")
    return _download(source, where)


def resolve_source(source: str, root: Path) -> str:
    """Return a model source with a local directory made absolute; hub ids pass through.

    ``models/base`` reads like a hub id. It is a directory where one of that name exists, and
    also where only ``models`` does: a missing directory must not become a look-up on the hub.

    Args:
        source: directory or hub id.
        root: folder that relative paths start from.
    """
    try:
        path = Path(source).expanduser()
        beside = len(path.parts) > 1 and (root / path.parts[0]).is_dir()
        looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
        return str(root / path) if looks_local or beside or (root / path).exists() else source
    except (OSError, RuntimeError):
        return source  # not a path of this machine: ``locate`` says why


def is_local(source: str) -> bool:
    """Tell whether a model source is a directory of this machine."""
    try:
        return Path(source).expanduser().is_dir()
    except (OSError, RuntimeError):  # name too long, closed parent, unknown ~user
        return False


def _download(source: str, where: str) -> Path:
    """Fetch a hub snapshot into the usual Hugging Face cache, or find it there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = source.partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(_HUB_FILES))
        )
    except HFValidationError as error:
        raise ModelError(
            f"{where}: {source} is neither a directory nor a valid hub id (owner/name[@revision])"
        ) from error
    except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError) as error:
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
    config = read_json_mapping(path, where)
    if "auto_map" in config:
        raise ModelError(
            f"{where}: {directory.name} needs its own Python code (auto_map), which evomerge "
            "does not run (use a model that transformers supports itself)"
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{where}: {directory.name} is quantised (quantization_config), and quantised weights "
            "cannot be merged (use the model it was made from, or dequantise and save it)"
        )
    return config


def read_json_mapping(path: Path, where: str) -> dict[str, Any]:
    """Return the mapping in a JSON file of a model directory.

    Raises:
        ModelError: anything that is not exactly that, or too deep or too large to be read.
    """
    shown = f"{path.parent.name}/{path.name}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{where}: {shown}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: {shown}: invalid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{where}: {shown}: expected a mapping")
    return data


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
    return [inside(directory, name, where) for name in names]


def _weight_map(index: Path, where: str) -> dict[str, str]:
    mapping = read_json_mapping(index, where).get("weight_map")
    if not isinstance(mapping, dict):
        raise ModelError(f"{where}: {index.name}: no valid weight_map (expected a mapping)")
    return {tensor: str(shard) for tensor, shard in mapping.items()}


def inside(directory: Path, name: str, where: str) -> Path:
    """Return the path of a file of weights, refusing names that leave the directory.

    Raises:
        ModelError: missing, or outside.
    """
    if Path(name).name != name or name in {"", ".", ".."} or "\\" in name or "\0" in name:
        raise ModelError(f"{where}: index: shard {name!r} leaves the directory")
    path = directory / name
    if not path.exists():
        raise ModelError(f"{where}: shard {name} is missing from {directory.name}")
    require_inside(path, where)
    return path


def require_inside(path: Path, where: str) -> None:
    """Refuse a file of a model directory that is a link to somewhere else.

    Raises:
        ModelError: it leaves the directory.
    """
    root = path.parent.resolve()
    # The Hugging Face cache stores snapshots as links into its own blobs folder.
    allowed = (root, root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(folder) for folder in allowed):
        raise ModelError(
            f"{where}: {path.name} is a link that leaves {path.parent.name} "
            "(put the file itself there)"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"duplicate key {key!r}")
        seen[key] = value
    return seen


def read_header(shard: Path, where: str) -> tuple[list[tuple[str, TensorEntry]], int]:
    """Return the tensors of a safetensors file, checked, and the offset of its data.

    Raises:
        ModelError: not a safetensors file, or its header does not fit its size.
    """
    try:
        size = shard.stat().st_size
        raw = _header_bytes(shard, size, where)
    except OSError as error:
        raise ModelError(f"{where}: {shard.name}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: {shard.name}: bad header: {error}") from error
    if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
        raise ModelError(f"{where}: {shard.name}: bad header")
    body = 8 + len(raw)
    entries = list(_entries(header, body, size, shard, where))
    ranges = sorted((entry.start, entry.stop, name) for name, entry in entries)
    for (_, stop, first), (start, _, second) in pairwise(ranges):
        if start < stop:
            raise ModelError(f"{where}: {shard.name}: {first} and {second} overlap")
    return entries, body


def _header_bytes(shard: Path, size: int, where: str) -> bytes:
    with shard.open("rb") as file:
        first = file.read(8)
        if first.startswith(b"version "):
            raise ModelError(f"{where}: {shard.name} is a Git LFS pointer (run `git lfs pull`)")
        if first[:1] == b"<":
            raise ModelError(f"{where}: {shard.name} is a web page, not weights (download again)")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length < 2 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{where}: {shard.name} is not a complete safetensors file")
        return file.read(length)


def _entries(
    header: dict[str, Any], body: int, size: int, shard: Path, where: str
) -> Iterator[tuple[str, TensorEntry]]:
    """Check every entry of a header against the file and yield it."""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not _NAME.match(name):
            raise ModelError(f"{where}: {shard.name}: tensor name {name[:60]!r} is not allowed")
        try:
            dtype, shape = str(entry["dtype"]), tuple(_integer(n) for n in entry["shape"])
            start, stop = (_integer(n) for n in entry["data_offsets"])
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


def _integer(number: object) -> int:
    if type(number) is not int:
        raise TypeError(f"expected an integer, got {number!r}")
    return number


def _check_index(directory: Path, tensors: Mapping[str, TensorEntry], where: str) -> None:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return
    for tensor, shard in _weight_map(index, where).items():
        if tensor not in tensors or tensors[tensor].shard.name != shard:
            raise ModelError(f"{where}: index places {tensor} in {shard}, which lacks it")


def _fingerprint(shard: Path, body: int, entries: Sequence[TensorEntry]) -> bytes:
    """Return a digest of the size, the header and the weights, see ``Checkpoint``."""
    digest = hashlib.blake2b(str(shard.stat().st_size).encode(), digest_size=16)
    with shard.open("rb") as file:
        digest.update(file.read(body))
        for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
            size = entry.stop - entry.start
            if size < _WHOLE_BYTES:
                file.seek(entry.start)
                digest.update(file.read(size))
                continue
            for number in range(_SAMPLES):
                file.seek(entry.start + number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
