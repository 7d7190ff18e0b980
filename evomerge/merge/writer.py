"""Write a merge as a checkpoint: the bits that the engine would put into the live model.

The merged weights stream to disk: a buffer is merged while the one before it is written, so a
shard may be larger than memory. Sources are memory-mapped, their pages are the system's to drop.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import (
    MERGEABLE,
    Checkpoint,
    open_checkpoint,
    read_json_mapping,
    require_inside,
)
from evomerge.errors import InputError, RecipeError
from evomerge.merge.merger import Merger
from evomerge.merge.plan import Plan, Rule
from evomerge.merge.shards import FileTensor, Shard, index_json, plan_shards, total_bytes
from evomerge.models import Models
from evomerge.recipe import Recipe

#: Merged and written at a time, where the ceiling allows it. Larger pieces gain nothing and lose
#: the cache; smaller ones pay for more hand-overs.
_PIECE_BYTES = 32 << 20
#: Below this a ceiling would be spent on hand-overs.
MIN_MEMORY_BYTES = 1 << 20
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
#: Bits without the sign, and their value at infinity; NaN lies above it.
_INFINITY: dict[str, tuple[npt.DTypeLike, int, int]] = {
    "F32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
}
_CHECK_ELEMENTS = 1 << 17
#: What makes a directory of weights a model, copied from the base where it has it.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
#: Those of them that belong to the tokenizer; they come from one model together.
TOKENIZER_FILES = COMPANIONS[1:-2]
#: Keys in which transformers keeps the path that a file was loaded from.
_PATH_KEYS = ("_name_or_path", "name_or_path")
_WITH_PATHS = ("config.json", "generation_config.json", "tokenizer_config.json")

Bits = npt.NDArray[Any]
#: Called with the bytes written so far, and of all.
Progress = Callable[[int, int], None]


def checkpoint_bytes(recipe: Recipe, models: Models) -> int:
    """Return the bytes of all tensors that ``write_checkpoint`` writes."""
    return total_bytes(plan_shards(models, recipe.dtype, 1 << 62))


def write_checkpoint(
    recipe: Recipe,
    models: Models,
    out: Path,
    max_shard_bytes: int = 5_000_000_000,
    max_memory_bytes: int = 4_000_000_000,
    threads: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write safetensors shards, their index when there are several, and ``config.json``.

    Args:
        recipe: the merge.
        models: what it is made from.
        out: an existing directory; making the whole atomic is the caller's business.
        max_shard_bytes: a shard holds at least one tensor and otherwise stays below this.
        max_memory_bytes: of merged weights in memory at a time, beside what the system caches of
            files. A tensor of more than half of it is merged into the mapped file instead.
        threads: CPU threads for merging; the result does not depend on it.
        progress: called with the bytes of tensors written so far, and of all.

    Raises:
        RecipeError: the recipe does not fit the models, or the merge is not finite.
        ModelError: a file of the base that travels too is a link out of it, or damaged; or a
            source is not finite.
        InputError: the ceiling is too low to work with.
        OSError: the disk is full.
    """
    if max_memory_bytes < MIN_MEMORY_BYTES:
        raise InputError(
            f"--max-memory: at least {MIN_MEMORY_BYTES / 1e6:.0f} MB are needed, "
            f"got {max_memory_bytes / 1e6:g} MB"
        )
    require_companions(models.base)
    merger = Merger.of(recipe, models, threads)
    plan = merger.plan(recipe)
    if plan.rule is not Rule.LINEAR or plan.cells is not None:
        # What is selected may leave out the NaN whose tensor it was selected from.
        merger.sources.require_finite()
    shards = plan_shards(models, recipe.dtype, max_shard_bytes)
    total = total_bytes(shards)

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    stream = _Stream(recipe, models, merger, plan, max_memory_bytes, report)
    for shard in shards:
        stream.write(shard, out / shard.file)
    if len(shards) > 1:
        (out / "model.safetensors.index.json").write_text(index_json(shards), encoding="utf-8")
    write_config(models.base, recipe.dtype, out)


class _Stream:
    """Two buffers between the merger and the disk."""

    def __init__(
        self,
        recipe: Recipe,
        models: Models,
        merger: Merger,
        plan: Plan,
        max_memory_bytes: int,
        progress: Callable[[int], None],
    ) -> None:
        self._recipe, self._models = recipe, models
        self._merger, self._plan = merger, plan
        self._half = max_memory_bytes // 2
        self._progress = progress
        self._written = 0
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def write(self, shard: Shard, path: Path) -> None:
        """Write one file."""
        with path.open("wb+", buffering=0) as file, ThreadPoolExecutor(1) as disk:
            file.truncate(shard.size)
            write_all(file, memoryview(shard.header), 0)
            pending: list[Future[int]] = []
            for group in _groups(shard.tensors, min(self._half, _PIECE_BYTES)):
                if len(pending) == 2:  # its buffer is the one that is needed now
                    self._finish(pending.pop(0))
                pending.append(self._start(file, disk, group))
                self._buffers.reverse()
            for future in pending:
                self._finish(future)

    def _finish(self, future: Future[int]) -> None:
        self._written += future.result()
        self._progress(self._written)

    def _start(
        self, file: FileIO, disk: ThreadPoolExecutor, group: Sequence[FileTensor]
    ) -> Future[int]:
        """Merge one group, and hand it to the thread that writes; its result is its bytes."""
        size = group[-1].stop - group[0].start
        if group[0].slot is None:
            return disk.submit(_copy, file, self._models.base.read(group[0].name), group[0].start)
        if size > self._half:
            self._merge_into_file(file, group[0])
            return disk.submit(lambda: size)
        if len(self._buffers[0]) < size:
            self._buffers[0] = np.empty(max(size, min(self._half, _PIECE_BYTES)), np.uint8)
        data = self._buffers[0][:size]
        start = group[0].start
        views = [
            data[tensor.start - start : tensor.stop - start].view(MERGEABLE[tensor.dtype])
            for tensor in group
        ]
        self._merge(group, views)
        return disk.submit(_check_and_write, file, group, views, data)

    def _merge(self, group: Sequence[FileTensor], views: Sequence[Bits]) -> None:
        outputs: list[Bits | None] = [None] * len(self._models.layout.slots)
        for tensor, view in zip(group, views, strict=True):
            assert tensor.slot is not None
            outputs[tensor.slot] = view
        self._merger.merge(self._plan, self._recipe.partition, outputs, self._recipe.dtype)

    def _merge_into_file(self, file: FileIO, tensor: FileTensor) -> None:
        """Merge a tensor that is too large for the buffers straight into the mapped file."""
        size = tensor.stop - tensor.start
        if hasattr(os, "posix_fallocate"):
            # A full disk must be an error here: in a mapping it would kill the process.
            os.posix_fallocate(file.fileno(), tensor.start, size)
        dtype = np.dtype(MERGEABLE[tensor.dtype])
        # Opened by name: the other thread moves the position of ``file``.
        mapped: np.memmap[Any, Any] = np.memmap(
            Path(file.name), dtype, "r+", tensor.start, shape=(size // dtype.itemsize,)
        )
        self._merge([tensor], [mapped])
        _require_finite(tensor, mapped)
        mapped.flush()


def _groups(tensors: Sequence[FileTensor], limit: int) -> Iterator[list[FileTensor]]:
    """Cut a shard into runs of merged tensors below ``limit`` bytes; a larger one is alone."""
    group: list[FileTensor] = []
    for tensor in tensors:
        full = bool(group) and tensor.stop - group[0].start > limit
        if group and (full or tensor.slot is None or group[-1].slot is None):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _check_and_write(
    file: FileIO, group: Sequence[FileTensor], views: Sequence[Bits], data: npt.NDArray[np.uint8]
) -> int:
    for tensor, view in zip(group, views, strict=True):
        _require_finite(tensor, view)
    return write_all(file, data.data, group[0].start)


def _copy(file: FileIO, bits: Bits, start: int) -> int:
    """Copy a memory-mapped integer tensor of the base."""
    return write_all(file, bits.view(np.uint8).data, start)


def write_all(file: FileIO, data: memoryview, start: int) -> int:
    """Write everything from a position, return how much; the system takes 2 GiB at a time."""
    file.seek(start)
    left = data
    while len(left):
        left = left[file.write(left) :]
    return len(data)


def _require_finite(tensor: FileTensor, bits: Bits) -> None:
    """Refuse merged weights that are infinite or not a number, before they are on disk.

    Raises:
        RecipeError: names the tensor.
    """
    dtype, mask, infinity = _INFINITY[tensor.dtype]
    patterns = bits.view(dtype)
    scratch = np.empty(min(_CHECK_ELEMENTS, len(patterns)), dtype)
    for start in range(0, len(patterns), _CHECK_ELEMENTS):
        piece = patterns[start : start + _CHECK_ELEMENTS]
        if np.bitwise_and(piece, mask, out=scratch[: len(piece)]).max() >= infinity:
            raise RecipeError(
                f"merge: {tensor.name} is not finite in {tensor.dtype} (use a wider dtype or "
                "smaller coefficients; or a source holds NaN or infinity)"
            )


def require_companions(base: Checkpoint) -> None:
    """Refuse what could not travel, before anything is merged.

    Raises:
        ModelError: a file of the base is a link to somewhere else, or is damaged.
    """
    for name in ("config.json", *COMPANIONS):
        path = base.directory / name
        if path.is_file():
            require_inside(path, "models.base")
            if name in _WITH_PATHS:
                read_json_mapping(path, "models.base")


def write_config(base: Checkpoint, dtype: str, folder: Path) -> None:
    """Write the base's ``config.json`` with the dtype of the new weights (safetensors name)."""
    config = dict(base.config)
    config.pop("torch_dtype", None)
    config["dtype"] = _DTYPE_NAMES[dtype]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_companions(base: Checkpoint, folder: Path, tokenizer: Path | None = None) -> None:
    """Copy tokenizer and generation settings; drop the paths that transformers leaves in JSON.

    Args:
        base: where they are taken from.
        folder: a checkpoint that has its ``config.json`` already.
        tokenizer: directory of the model whose tokenizer is wanted instead; its generation
            settings come with it where it has any, because chats end with their tokens.

    Raises:
        ModelError: a file of ``tokenizer`` is a link to somewhere else, or is damaged.
    """
    tokenizer = tokenizer or base.directory
    for name in COMPANIONS:
        theirs = name in TOKENIZER_FILES or (
            name == "generation_config.json" and (tokenizer / name).is_file()
        )
        source = (tokenizer if theirs else base.directory) / name
        if source.is_file():
            require_inside(source, "tokenizer")
            shutil.copyfile(source, folder / name)
    for name in _WITH_PATHS:
        path = folder / name
        if not path.exists():
            continue
        data = read_json_mapping(path, "tokenizer")
        if any(key in data for key in _PATH_KEYS):
            kept = {key: value for key, value in data.items() if key not in _PATH_KEYS}
            text = json.dumps(kept, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def verify_checkpoint(folder: Path, models: Models, recipe: Recipe) -> None:
    """Read the headers back: names, shapes and dtypes, with our reader and with safetensors.

    Raises:
        AssertionError: what was written is not what was asked for: a bug.
    """
    from safetensors import safe_open

    written = open_checkpoint(str(folder), "export", "export")
    expected = {slot.name: (recipe.dtype, slot.shape) for slot in models.layout.slots} | {
        name: (models.base.tensors[name].dtype, models.base.tensors[name].shape)
        for name in models.buffers
    }
    found = {name: (entry.dtype, entry.shape) for name, entry in written.tensors.items()}
    assert found == expected, sorted(set(found.items()) ^ set(expected.items()))[:3]
    names: set[str] = set()
    for shard in sorted({entry.shard for entry in written.tensors.values()}):
        with safe_open(shard, framework="numpy") as file:
            names.update(file.keys())
    assert names == set(expected)
