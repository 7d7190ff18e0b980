"""Slots, blocks and spans: what of a model shares which coefficients.

A *slot* is one parameter tensor. A *partition* sorts all rows of all slots into *blocks* that
share one row of the recipe's table. A *span* is the contiguous piece of one slot that lies in
one block; the engine works span by span.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod

from evomerge.errors import InputError, suggest


class SlotKind(StrEnum):
    """The role of a tensor; decides partitions and which methods treat it as dense."""

    LINEAR = "linear"
    EMBED = "embed"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    ROUTER = "router"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter tensor in canonical order.

    Attributes:
        name: as on disk.
        shape: as on disk.
        dtype: safetensors name (``F32``, ``BF16``, ``F16``).
        kind: the role of the tensor.
        layer: index of the transformer layer, None outside the layers.
        aliases: further names of the same tensor in memory (a tied head).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: SlotKind
    layer: int | None
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``start`` to ``stop`` of slot number ``slot``, governed by block number ``block``."""

    slot: int
    start: int
    stop: int
    block: int


@dataclass(frozen=True)
class Layout:
    """The slots of one model family in canonical order.

    Canonical order: embeddings, layers by index, final norm, head; by name inside each group.
    It numbers the elements for hashing and export, so it never depends on files or dicts.
    """

    slots: tuple[Slot, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Canonical index of the first element of each slot [S]."""
        starts, total = [], 0
        for slot in self.slots:
            starts.append(total)
            total += slot.size
        return tuple(starts)

    @cached_property
    def parameters(self) -> int:
        """Number of elements P, tied tensors once."""
        return sum(slot.size for slot in self.slots)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Sorted layer indices."""
        return tuple(sorted({slot.layer for slot in self.slots if slot.layer is not None}))

    @cached_property
    def digest(self) -> str:
        """Identity of names, shapes and order (not dtype, not values)."""
        rows = [(slot.name, slot.shape) for slot in self.slots]
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Partition:
    """Blocks over a layout.

    Attributes:
        spec: how the user wrote it, e.g. ``layer``.
        blocks: label of each block [B], in canonical order.
        spans: the spans in canonical order; they cover every row of every slot once.
    """

    spec: str
    blocks: tuple[str, ...]
    spans: tuple[Span, ...]


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
#: The norm before attention belongs to it; the one called "post attention" feeds the MLP.
_ATTENTION = re.compile(r"attn|attention(?!_layernorm)|input_layernorm|(^|\.)ln_1\.")


def slot_kind(name: str, shape: Sequence[int]) -> SlotKind:
    """Return the role of a tensor, judged by its name and rank."""
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if name.endswith(".bias"):
        return SlotKind.BIAS
    if re.search(r"norm|(^|\.)ln_", leaf) or len(shape) <= 1:
        return SlotKind.NORM
    if re.search(r"embed|^wte$|^wpe$|^shared$", leaf):
        return SlotKind.EMBED
    if leaf in {"lm_head", "score", "classifier"}:
        return SlotKind.HEAD
    if leaf in {"router"} or (leaf == "gate" and "mlp" in name):
        return SlotKind.ROUTER
    if ".experts." in name:
        return SlotKind.EXPERTS
    return SlotKind.LINEAR


def slot_layer(name: str) -> int | None:
    """Return the layer index in a tensor name, None outside the layers."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def _group(slot: Slot) -> int:
    """Return 0 before the layers, 1 inside, 2 for the final norm, 3 for the head."""
    if slot.layer is not None:
        return 1
    if slot.kind is SlotKind.EMBED:
        return 0
    return 3 if slot.kind is SlotKind.HEAD else 2


def canonical(slots: Iterable[Slot]) -> Layout:
    """Return the layout of ``slots`` in canonical order."""
    return Layout(
        tuple(
            sorted(
                slots,
                key=lambda slot: (
                    _group(slot),
                    slot.layer if slot.layer is not None else -1,
                    slot.name,
                ),
            )
        )
    )


def _block_label(slot: Slot, kind: str) -> str:
    """Return the label of the block that ``slot`` belongs to under a slot-wise partition."""
    if kind == "model":
        return "model"
    if kind == "tensor":
        return slot.name
    if slot.layer is None:
        return ("embed", "", "final", "head")[_group(slot)]
    if kind == "layer":
        return f"layer.{slot.layer}"
    part = "attention" if _ATTENTION.search(slot.name) else "mlp"
    return f"layer.{slot.layer}.{part}"


#: Partitions by the name that a study file uses; the value is what ``evomerge list`` prints.
PARTITIONS: dict[str, str] = {
    "model": "one block for the whole model",
    "layer": "one block per layer; embeddings, final norm and head are blocks of their own",
    "module": "attention and MLP of each layer; embeddings, final norm and head of their own",
    "tensor": "one block per tensor",
}


def partition(layout: Layout, spec: str) -> Partition:
    """Sort the rows of ``layout`` into blocks.

    Args:
        layout: the slots.
        spec: a key of ``PARTITIONS``.

    Raises:
        InputError: unknown partition.
    """
    if spec not in PARTITIONS:
        raise InputError(f"partition: unknown {spec!r}{suggest(spec, PARTITIONS)}")
    labels: dict[str, int] = {}
    spans = []
    for index, slot in enumerate(layout.slots):
        block = labels.setdefault(_block_label(slot, spec), len(labels))
        spans.append(Span(index, 0, slot.rows, block))
    return Partition(spec, tuple(labels), tuple(spans))
