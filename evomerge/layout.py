"""Slots, blocks and spans: what of a model shares which coefficients.

A *slot* is one parameter tensor. A *partition* sorts all rows of all slots into *blocks* that
share one row of the recipe's table. A *span* is the contiguous piece of one slot that lies in
one block; the engine works span by span.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from math import prod

from evomerge.blocks import allot, cut_rows
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
        layer: index of the transformer layer, None outside the layers; decoder layers are
            numbered after the encoder's, text layers after those of vision.
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
    def output_norms(self) -> frozenset[str]:
        """Names of the norms called "post attention" that stand behind attention.

        In Llama that norm feeds the MLP; where the MLP has a norm behind it as well (Gemma 2,
        OLMo 2), it normalises what attention gives.
        """
        names = {slot.name for slot in self.slots}
        return frozenset(name for name in names if _AFTER in name and _behind_mlp(name) in names)

    @cached_property
    def digest(self) -> str:
        """Identity of names, shapes and order (not dtype, not values).

        Where attention's output has a norm, the digest also says that ``module`` counts it to
        attention: recipes made before it did must not be applied to other blocks.
        """
        rows: list[object] = [(slot.name, slot.shape) for slot in self.slots]
        if self.output_norms:
            rows.append("attention output norms: attention")
        return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Partition:
    """Blocks over a layout.

    Attributes:
        spec: e.g. ``layer`` or ``chunk(4)``; never needs the weights.
        blocks: label of each block [B], in canonical order.
        spans: the spans in canonical order; they cover every row of every slot once.
    """

    spec: str
    blocks: tuple[str, ...]
    spans: tuple[Span, ...]


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
#: The norm before attention belongs to it; the one called "post attention" mostly feeds the MLP.
_ATTENTION = re.compile(
    r"attn|attention(?!_layernorm)|input_layernorm|layernorm_before|layer_norm1|(^|\.)ln_1\."
    r"|\.layer\.0\.layer_norm|decoder\..*\.layer\.1\.layer_norm",
    re.IGNORECASE,
)
_AFTER = ".post_attention_layernorm."
_NORM = re.compile(r"norm|layrnorm|(^|\.)ln_", re.IGNORECASE)
_HEADS = {"lm_head", "score", "classifier", "embed_out", "qa_outputs"}
_EMBED = re.compile(r"embed|^wte$|^wpe$|^shared$|^(cls|mask|distillation|register)_tokens?$")
#: Norms that stand before the first layer without lying in a module of embeddings.
_FIRST_NORM = re.compile(r"^pre_la?y(er)?norm$|^pre_layrnorm$|embeddings?_layernorm$|^embed_norm$")
#: Towers that feed another one are numbered first.
_FEEDS = re.compile(r"vision|visual|image|audio|encoder")


def slot_kind(name: str, shape: Sequence[int]) -> SlotKind:
    """Return the role of a tensor, judged by its name and rank."""
    *parents, leaf = name.removesuffix(".weight").split(".")
    if leaf.endswith("bias") and (name.endswith(".bias") or not name.endswith(".weight")):
        return SlotKind.BIAS
    if _NORM.search(leaf):
        return SlotKind.NORM
    if leaf in {"router", "shared_expert_gate"} or "router" in parents:
        return SlotKind.ROUTER
    if leaf == "gate" and re.search(r"mlp|moe|feed_forward|ffn", name):
        return SlotKind.ROUTER
    if leaf in _HEADS:
        return SlotKind.HEAD
    # T5's relative_attention_bias is a table of embeddings inside the first layer.
    if _EMBED.search(leaf) or leaf == "relative_attention_bias" or _embedded(parents):
        return SlotKind.EMBED
    if len(shape) <= 1:
        return SlotKind.NORM
    return SlotKind.EXPERTS if ".experts." in name else SlotKind.LINEAR


def _embedded(parents: Sequence[str]) -> bool:
    """Tell whether a tensor lies in a module of embeddings (patches, positions, tokens)."""
    return any(re.search(r"embed", part) for part in parents)


def slot_layer(name: str) -> int | None:
    """Return the layer index in a tensor name, None outside the layers.

    It counts within the tower that the name belongs to; ``canonical`` numbers the layers of
    models with several towers one after the other.
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def _group(slot: Slot) -> int:
    """Return 0 before the layers, 1 inside, 2 for the final norm, 3 for the head.

    A bias goes with its matrix, and the norm of the embeddings with the embeddings.
    """
    if slot.layer is not None:
        return 1
    *parents, leaf = slot.name.removesuffix(".weight").removesuffix(".bias").split(".")
    if slot.kind is SlotKind.HEAD or leaf in _HEADS:
        return 3
    if slot.kind is SlotKind.EMBED or _embedded(parents) or _FIRST_NORM.search(leaf):
        return 0
    return 2


def _towers(slots: Sequence[Slot]) -> dict[str, int]:
    """Return the number of the first layer of each tower: 0, unless there are several.

    Encoders come before decoders and vision before text, as they run; their layers are
    numbered on, so that encoder layer 0 and decoder layer 0 are different layers.
    """
    counts: dict[str, int] = {}
    for slot in slots:
        match = _LAYER.search(slot.name)
        if match and slot.layer is not None:
            tower = slot.name[: match.start(1)]
            counts[tower] = max(counts.get(tower, 0), int(match.group(1)) + 1)
    starts, total = {}, 0
    for tower in sorted(counts, key=_tower_order):
        starts[tower] = total
        total += counts[tower]
    return starts


def _tower_order(tower: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    pieces = re.split(r"(\d+)", tower)
    natural = [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in pieces]
    return _FEEDS.search(tower) is None, natural


def canonical(slots: Iterable[Slot]) -> Layout:
    """Return the layout of ``slots`` in canonical order, the layers of all towers numbered on."""
    given = list(slots)
    starts = _towers(given)
    return Layout(
        tuple(
            sorted(
                (_numbered(slot, starts) for slot in given),
                key=lambda slot: (
                    _group(slot),
                    slot.layer if slot.layer is not None else -1,
                    slot.name,
                ),
            )
        )
    )


def _numbered(slot: Slot, starts: Mapping[str, int]) -> Slot:
    """Return ``slot`` with its layer counted over all towers."""
    match = _LAYER.search(slot.name)
    if match is None or slot.layer is None:
        return slot
    return replace(slot, layer=int(match.group(1)) + starts[slot.name[: match.start(1)]])


def _behind_mlp(name: str) -> str:
    """Return what the norm behind the MLP is called beside a norm called "post attention"."""
    return name.replace(_AFTER, ".post_feedforward_layernorm.")


def _block_label(layout: Layout, slot: Slot, kind: str) -> str:
    """Return the label of the block that ``slot`` belongs to under a slot-wise partition."""
    if kind == "model":
        return "model"
    if kind == "tensor":
        return slot.name
    if slot.layer is None:
        return ("embed", "", "final", "head")[_group(slot)]
    if kind == "layer":
        return f"layer.{slot.layer}"
    attention = _ATTENTION.search(slot.name) or slot.name in layout.output_norms
    return f"layer.{slot.layer}.{'attention' if attention else 'mlp'}"


#: Partitions as a study file writes them; the value is what ``evomerge list`` prints.
PARTITIONS: dict[str, str] = {
    "model": "one block for the whole model",
    "layer": "one block per layer; embeddings, final norm and head are blocks of their own",
    "layers(n)": "one block for n consecutive layers; embeddings with the first, final norm and "
    "head with the last (mergekit-evolve's layer_granularity)",
    "module": "attention and MLP of each layer; embeddings, final norm and head of their own",
    "tensor": "one block per tensor",
    "chunk(n)": "each block of `layer` cut into n of about equal size, between rows",
    "importance(n)": "n blocks in all, given to those of `layer` by the size of their task "
    "vectors, at least one each, and cut as by chunk (Expert Merging++)",
    "allot(i,j,...)": "blocks for the embeddings, each layer, final norm and head; what "
    "importance(n) becomes in a recipe",
}
_WHOLE_SLOTS = ("model", "layer", "module", "tensor")
_SPEC = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse_spec(spec: str) -> tuple[str, tuple[int, ...]]:
    """Return the name and the numbers of a partition such as ``chunk(4)``.

    Raises:
        InputError: unknown name, or numbers that it does not take.
    """
    match = _SPEC.fullmatch(spec)
    name, inside = (match.group(1), match.group(2)) if match else (spec, None)
    known = {key.partition("(")[0]: key for key in PARTITIONS}
    if name not in known:
        raise InputError(f"partition: unknown {spec!r}{suggest(spec, PARTITIONS)}")
    if name in _WHOLE_SLOTS:
        if inside is not None:
            raise InputError(f"partition: {name} takes no number, got {spec!r} (write {name})")
        return name, ()
    words = (inside or "").split(",")
    examples = {
        "layers": "layers(4)", "chunk": "chunk(4)", "importance": "importance(64)",
        "allot": "allot(1,2,2,1)",
    }  # fmt: skip
    example = examples[name]
    numbers = []
    for word in words:
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", word) or int(word) == 0:
            what = f"got {word.strip()!r}" if inside is not None else "got none"
            raise InputError(
                f"partition: {known[name]} takes whole numbers from 1, {what} (such as {example})"
            )
        numbers.append(int(word))
    if name != "allot" and len(numbers) != 1:
        raise InputError(f"partition: {known[name]} takes one number, got {spec!r}")
    return name, tuple(numbers)


def resolve_partition(spec: str, layout: Layout, masses: Callable[[], Mapping[str, float]]) -> str:
    """Return a partition that needs no weights: ``importance(n)`` becomes ``allot(...)``.

    Args:
        spec: as in ``PARTITIONS``.
        layout: the slots.
        masses: called for ``importance`` only; the mass of each block of ``layer``.

    Raises:
        InputError: malformed, or a number of blocks that the layout cannot have.
    """
    name, numbers = parse_spec(spec)
    if name != "importance":
        return f"{name}({','.join(map(str, numbers))})" if numbers else name
    (total,) = numbers
    parts = _parts(layout)
    rows = [sum(layout.slots[slot].rows for slot in slots) for slots in parts.values()]
    if not len(parts) <= total <= sum(rows):
        raise InputError(
            f"partition: importance({total}): this model has {len(parts)} layers and others and "
            f"{sum(rows)} rows (choose from {len(parts)} to {sum(rows)} blocks)"
        )
    found = masses()
    shares = allot([found[label] for label in parts], rows, total)
    return f"allot({','.join(map(str, shares))})"


def partition(layout: Layout, spec: str, masses: Mapping[str, float] | None = None) -> Partition:
    """Sort the rows of ``layout`` into blocks.

    Args:
        layout: the slots.
        spec: as in ``PARTITIONS``.
        masses: of each block of ``layer``; only for ``importance``.

    Raises:
        InputError: unknown partition, or one that does not fit the layout.
    """
    if parse_spec(spec)[0] == "importance" and masses is None:
        raise InputError(
            f"partition: {spec} depends on the weights (write the allot(...) that it becomes)"
        )
    spec = resolve_partition(spec, layout, lambda: masses or {})
    name, numbers = parse_spec(spec)
    if name in (*_WHOLE_SLOTS, "layers"):
        groups = _layer_groups(layout, numbers[0]) if name == "layers" else None
        labels: dict[str, int] = {}
        spans = []
        for index, slot in enumerate(layout.slots):
            label = groups[index] if groups else _block_label(layout, slot, name)
            block = labels.setdefault(label, len(labels))
            spans.append(Span(index, 0, slot.rows, block))
        return Partition(spec, tuple(labels), tuple(spans))
    return _cut(layout, spec, numbers if name == "allot" else None, numbers[0])


def _layer_groups(layout: Layout, size: int) -> list[str]:
    """Return the block of each slot, ``size`` consecutive layers together."""
    last = max((slot.layer for slot in layout.slots if slot.layer is not None), default=0)

    def label(slot: Slot) -> str:
        layer = slot.layer
        if layer is None:
            layer = 0 if _group(slot) == 0 else last
        first = layer // size * size
        return f"layers.{first}-{min(first + size - 1, last)}"

    return [label(slot) for slot in layout.slots]


def _parts(layout: Layout) -> dict[str, list[int]]:
    """Return the slots of each block of ``layer``."""
    parts: dict[str, list[int]] = {}
    for index, slot in enumerate(layout.slots):
        parts.setdefault(_block_label(layout, slot, "layer"), []).append(index)
    return parts


def _cut(layout: Layout, spec: str, shares: tuple[int, ...] | None, equal: int) -> Partition:
    """Cut every block of ``layer`` into its share of blocks, or into ``equal`` where it can."""
    parts = _parts(layout)
    if shares is not None and len(shares) != len(parts):
        raise InputError(
            f"partition: {spec} has {len(shares)} numbers, this model has {len(parts)} layers and "
            "others (use the partition with the models that it was made for)"
        )
    blocks: list[str] = []
    spans: list[Span] = []
    for number, (label, slots) in enumerate(parts.items()):
        sizes = [
            (layout.slots[slot].rows, layout.slots[slot].size // max(layout.slots[slot].rows, 1))
            for slot in slots
        ]
        rows = sum(count for count, _ in sizes)
        count = shares[number] if shares is not None else max(min(equal, rows), 1)
        if count > max(rows, 1):
            raise InputError(
                f"partition: {spec} cuts {label} into {count} blocks, but it has {rows} rows"
            )
        for place, pieces in enumerate(cut_rows(sizes, count)):
            blocks.append(label if count == 1 else f"{label}.chunk.{place}")
            spans += [
                Span(slots[index], start, stop, len(blocks) - 1) for index, start, stop in pieces
            ]
    return Partition(spec, tuple(blocks), tuple(sorted(spans, key=lambda s: (s.slot, s.start))))
