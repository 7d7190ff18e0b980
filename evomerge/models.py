"""The base and the experts of one study, compared before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoint import MERGEABLE, Checkpoint, open_checkpoint
from evomerge.errors import ModelError
from evomerge.layout import Layout, Slot, canonical, slot_kind, slot_layer
from evomerge.recipe import ModelRef

#: Keys of config.json that must agree; the shapes alone would not show a difference.
_CONFIG_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "rope_theta", "rms_norm_eps",
)  # fmt: skip


@dataclass(frozen=True)
class Models:
    """The base and the ordered, named experts.

    Attributes:
        base: what every merge is rebuilt from.
        experts: in the user's order.
        layout: slots of the base in canonical order; all experts have the same.
        buffers: integer tensors, always taken from the base.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    layout: Layout
    buffers: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """The dtype of most of the base's elements; what is scored and exported by default."""
        counts: dict[str, int] = {}
        for slot in self.layout.slots:
            counts[slot.dtype] = counts.get(slot.dtype, 0) + slot.size
        return max(sorted(counts), key=lambda dtype: counts[dtype])

    @property
    def refs(self) -> tuple[ModelRef, tuple[ModelRef, ...]]:
        """References for recipes: base, experts."""
        return _ref(self.base), tuple(_ref(expert) for expert in self.experts)


def _ref(checkpoint: Checkpoint) -> ModelRef:
    return ModelRef(checkpoint.name, checkpoint.source, checkpoint.fingerprint)


def open_models(base: str, experts: Sequence[tuple[str, str]], where: str = "models") -> Models:
    """Open and compare the models of a study, from headers and configs only.

    Args:
        base: directory or hub id of the base.
        experts: (name, directory or hub id), in order.
        where: dotted path for messages.

    Raises:
        ModelError: all differences of all experts, one per line.
    """
    origin = open_checkpoint(base, "base", f"{where}.base")
    opened: list[Checkpoint] = []
    problems: list[str] = []
    for name, source in experts:
        path = f"{where}.experts.{name}"
        try:
            expert = open_checkpoint(source, name, path)
            problems.extend(_differences(origin, expert, path))
            opened.append(expert)
        except ModelError as error:
            problems.append(str(error))
    problems.extend(_twins((origin, *opened), where))
    if problems:
        raise ModelError("\n".join(problems))
    slots = list(_slots(origin))
    names = {slot.name for slot in slots}
    buffers = tuple(
        name
        for name, entry in origin.tensors.items()
        if name not in names and entry.dtype not in MERGEABLE
    )
    return Models(origin, tuple(opened), canonical(slots), buffers)


def _slots(checkpoint: Checkpoint) -> Iterable[Slot]:
    """Yield the slots of a checkpoint; a tied head is an alias of the embedding."""
    heads = ("lm_head.weight",) if checkpoint.tied else ()
    for name, entry in checkpoint.tensors.items():
        if entry.dtype not in MERGEABLE or name in heads:
            continue
        aliases = heads if name.endswith("embed_tokens.weight") else ()
        kind = slot_kind(name, entry.shape)
        yield Slot(name, entry.shape, entry.dtype, kind, slot_layer(name), aliases)


def _differences(base: Checkpoint, expert: Checkpoint, where: str) -> Iterable[str]:
    """Yield what keeps ``expert`` from being merged with ``base``."""
    for key in _CONFIG_KEYS:
        mine, theirs = expert.config.get(key), base.config.get(key)
        if mine != theirs and mine is not None and theirs is not None:
            yield f"{where}: {key} is {mine}, the base has {theirs} (use fine-tunes of one base)"
    if expert.tied != base.tied:
        yield (
            f"{where}: its head is {'tied' if expert.tied else 'untied'}, the base's is not the "
            "same (re-save one of them with the other's tie_word_embeddings)"
        )
    skip = {"lm_head.weight"} if base.tied else set()
    missing = sorted(set(base.tensors) - set(expert.tensors) - skip)
    extra = sorted(set(expert.tensors) - set(base.tensors) - skip)
    for kind, names in (("missing", missing), ("not in the base", extra)):
        if names:
            yield f"{where}: {len(names)} tensors {kind} ({', '.join(names[:3])})"
    for name, entry in base.tensors.items():
        other = expert.tensors.get(name)
        if other is not None and other.shape != entry.shape:
            remedy = (
                "resize its vocabulary to the base's"
                if "embed" in name or name.startswith("lm_head")
                else "use fine-tunes of one base"
            )
            shapes = f"{name} is {_by(other.shape)}, the base has {_by(entry.shape)}"
            yield f"{where}: {shapes} ({remedy})"
    yield from _vocabulary_differences(base.directory, expert.directory, where)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _vocabulary_differences(base: Path, expert: Path, where: str) -> Iterable[str]:
    """Compare token strings by id; a directory without tokenizer.json is not compared."""
    mine, theirs = _vocabulary(expert), _vocabulary(base)
    if mine is None or theirs is None or mine == theirs:
        return
    changed = sorted(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])
    token, number = changed[0]
    yield (
        f"{where}: its tokenizer differs from the base's at id {number} ({token!r}) "
        "(token ids must mean the same in all models)"
    )


def _vocabulary(directory: Path) -> dict[str, int] | None:
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab = data.get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # unigram models store [token, score] pairs in order of id
        tokens = {str(entry[0]): number for number, entry in enumerate(vocab)}
    else:
        tokens = {str(token): int(number) for token, number in vocab.items()}
    tokens |= {str(added["content"]): int(added["id"]) for added in data.get("added_tokens", [])}
    return tokens


def _twins(checkpoints: Sequence[Checkpoint], where: str) -> Iterable[str]:
    """Yield pairs of models with the same weights."""
    seen: dict[str, str] = {}
    for checkpoint in checkpoints:
        twin = seen.setdefault(checkpoint.fingerprint, checkpoint.name)
        if twin != checkpoint.name:
            yield f"{where}: {checkpoint.name} has the same weights as {twin} (name it once)"
