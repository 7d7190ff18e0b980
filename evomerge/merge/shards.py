"""Where every byte of a safetensors checkpoint goes, before any of them exists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.checkpoint import ITEM_BYTES
from evomerge.models import Models

#: The library sorts tensors by dtype, this first, then by name. Its order keeps tensors aligned
#: to their element size, and makes our files equal to its own byte for byte.
_DTYPE_ORDER = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL",
)  # fmt: skip
_HEADER_ALIGNMENT = 8  # as the library pads its header


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor in a shard.

    Attributes:
        name: as in the file.
        dtype: safetensors name.
        shape: of the tensor.
        slot: its number in the layout; None for a buffer that is copied from the base.
        start, stop: absolute byte range in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    slot: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        file: its name.
        header: the first bytes, up to the first tensor.
        tensors: in the order of the file, without gaps.
    """

    file: str
    header: bytes
    tensors: tuple[FileTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.tensors[-1].stop if self.tensors else len(self.header)


def plan_shards(models: Models, dtype: str, max_bytes: int) -> tuple[Shard, ...]:
    """Sort the tensors of a merge into files: canonical order, buffers last.

    Args:
        models: what is merged.
        dtype: safetensors name of the merged dtype.
        max_bytes: a shard holds at least one tensor and otherwise stays below this.
    """
    wanted: list[tuple[str, str, tuple[int, ...], int | None]] = [
        (slot.name, dtype, slot.shape, number) for number, slot in enumerate(models.layout.slots)
    ]
    for name in models.buffers:
        entry = models.base.tensors[name]
        wanted.append((name, entry.dtype, entry.shape, None))
    groups: list[list[tuple[str, str, tuple[int, ...], int | None]]] = [[]]
    filled = 0
    for tensor in wanted:
        size = _bytes(tensor[1], tensor[2])
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    return tuple(
        _shard(_file_name(number, len(groups)), group) for number, group in enumerate(groups)
    )


def total_bytes(shards: Sequence[Shard]) -> int:
    """Return the bytes of all tensors, headers left out."""
    return sum(tensor.stop - tensor.start for shard in shards for tensor in shard.tensors)


def index_json(shards: Sequence[Shard]) -> str:
    """Return the index of a checkpoint of several shards."""
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {
        "metadata": {"total_size": total_bytes(shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=1) + "\n"


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = ITEM_BYTES[dtype]
    for length in shape:
        size *= length
    return size


def _shard(file: str, group: Sequence[tuple[str, str, tuple[int, ...], int | None]]) -> Shard:
    ordered = sorted(group, key=lambda tensor: (_DTYPE_ORDER.index(tensor[1]), tensor[0]))
    entries: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, _ in ordered:
        stop = at + _bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    tensors, at = [], len(header)
    for name, dtype, shape, slot in ordered:
        stop = at + _bytes(dtype, shape)
        tensors.append(FileTensor(name, dtype, shape, slot, at, stop))
        at = stop
    return Shard(file, header, tuple(tensors))
