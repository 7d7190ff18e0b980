"""The base and the experts of one study, compared before any weight is read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.adapter import is_adapter, open_adapter, require_readable
from evomerge.checkpoint import (
    MERGEABLE,
    Checkpoint,
    TensorEntry,
    locate,
    open_checkpoint,
    read_json_mapping,
)
from evomerge.errors import ModelError
from evomerge.layout import Layout, Slot, canonical, slot_kind, slot_layer
from evomerge.model_settings import setting_differences
from evomerge.recipe import ModelRef

#: Numbers that some checkpoints store beside the parameters although nobody trains them: causal
#: masks of old GPT-2 files, rotary frequencies, running statistics.
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|masked_bias|running_mean|running_var|position_ids)\Z"
)
#: Tensors with one row per token.
_VOCABULARY = re.compile(
    r"(^|\.)(embed_tokens|wte|shared|word_embeddings|embed_in|embed_out|lm_head)\.weight\Z"
)
#: Names that one embedding has besides its own, where transformers ties them.
_TIED_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@dataclass(frozen=True)
class Models:
    """The base and the ordered, named experts.

    Attributes:
        base: what every merge is rebuilt from.
        experts: in the user's order; LoRA adapters among them as what they fold into.
        layout: slots of the base in canonical order; all experts have the same.
        buffers: integer tensors and stored constants, always taken from the base.
        factored: the experts are LoRA adapters of equal form that are merged as factors, never
            folded; see ``evomerge.merge.factor_sources``.
    """

    base: Checkpoint
    experts: tuple[Checkpoint, ...]
    layout: Layout
    buffers: tuple[str, ...]
    factored: bool = False

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
    return ModelRef(checkpoint.name, checkpoint.pinned, checkpoint.fingerprint)


def open_models(
    base: str, experts: Sequence[tuple[str, str]], where: str = "models", repeats: bool = False,
    further: Callable[[Checkpoint, Sequence[Checkpoint]], Iterable[str]] = lambda base, experts: (),
) -> Models:  # fmt: skip
    """Open and compare the models of a study, from headers and configs only.

    Args:
        base: directory or hub id of the base.
        experts: (name, directory or hub id), in order.
        where: dotted path for messages.
        repeats: whether two models may have the same weights, as in a recipe that was written by
            hand; in a search one of them would be in vain.
        further: returns what else is wrong with those experts that can be opened, one per line.

    Raises:
        ModelError: all differences of all experts, one per line.
    """
    try:
        origin = open_checkpoint(base, "base", f"{where}.base")
        vocabulary = _vocabulary(origin.directory, f"{where}.base")
    except ModelError as error:
        raise ModelError("\n".join([str(error), *_unreadable(experts, where)])) from error
    opened: list[Checkpoint] = []
    problems: list[str] = []
    known = {_tokenizer_digest(origin.directory)}  # adapters often bring the base's own file
    for name, source in experts:
        path = f"{where}.experts.{name}"
        try:
            expert = _open_expert(source, name, origin, path)
            problems.extend(_differences(origin, expert, path))
            digest = _tokenizer_digest(expert.directory)
            if not digest or digest not in known:
                found = list(_vocabulary_differences(vocabulary, expert.directory, path))
                problems.extend(found)
                known |= set() if found else {digest}
            opened.append(expert)
        except ModelError as error:
            problems.append(str(error))
    if not repeats:
        problems.extend(_twins((origin, *opened), where))
    problems.extend(further(origin, opened))
    if problems:
        raise ModelError("\n".join(problems))
    slots = list(_slots(origin))
    names = {slot.name for slot in slots}
    buffers = tuple(
        name
        for name, entry in origin.tensors.items()
        if name not in names and (entry.dtype not in MERGEABLE or _is_buffer(name, entry.shape))
    )
    return Models(origin, tuple(opened), canonical(slots), buffers)


def _unreadable(experts: Sequence[tuple[str, str]], where: str) -> list[str]:
    """Return what is wrong with experts by themselves, where there is no base to compare with."""
    problems = []
    for name, source in experts:
        path = f"{where}.experts.{name}"
        try:
            directory = locate(source, path)
            if is_adapter(directory):
                require_readable(directory, path)
            else:
                open_checkpoint(source, name, path)
        except ModelError as error:
            problems.append(str(error))
    return problems


def _open_expert(source: str, name: str, base: Checkpoint, where: str) -> Checkpoint:
    """Open a full checkpoint under the base's tensor names, or an adapter of the base."""
    directory = locate(source, where)
    if is_adapter(directory):
        return open_adapter(source, directory, name, base, where)
    expert = open_checkpoint(source, name, where)
    return replace(expert, tensors=_renamed(expert.tensors, base.tensors))


def _renamed(
    tensors: Mapping[str, TensorEntry], base: Mapping[str, TensorEntry]
) -> Mapping[str, TensorEntry]:
    """Return ``tensors`` under the base's names where a prefix is all that differs.

    transformers reads ``wte.weight`` and ``transformer.wte.weight`` as the same tensor (the
    first comes from a model saved without its head), so fine-tunes of one base can differ in it.
    """
    theirs, ours = _prefix(tensors, base), _prefix(base, tensors)
    if theirs:
        return {name.removeprefix(theirs): entry for name, entry in tensors.items()}
    if ours:
        return {
            f"{ours}{name}" if f"{ours}{name}" in base else name: entry
            for name, entry in tensors.items()
        }
    return tensors


def _prefix(longer: Mapping[str, TensorEntry], shorter: Mapping[str, TensorEntry]) -> str:
    """Return what stands before every name of ``shorter`` in ``longer``, empty if nothing does."""
    first = {name.partition(".")[0] for name in longer if name != "lm_head.weight"}
    prefix = f"{next(iter(first))}." if len(first) == 1 else ""
    if not prefix or any(name.startswith(prefix) for name in shorter):
        return ""
    found = sum(f"{prefix}{name}" in longer for name in shorter)
    # Some names only must match: what differs besides the prefix is told by name later.
    return prefix if found * 2 > len(shorter) else ""


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    return bool(_BUFFER.search(name)) or (name.endswith(".attn.bias") and len(shape) > 1)


def _aliases(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Return tensor → further names of it in memory: a tied head, T5's shared embedding."""
    aliases: dict[str, tuple[str, ...]] = {}
    heads = ("lm_head.weight",) if checkpoint.tied else ()
    for name in checkpoint.tensors:
        if name == "shared.weight":
            aliases[name] = (*_TIED_EMBEDDINGS, *heads)
        elif re.search(r"(^|\.)(embed_tokens|wte)\.weight\Z", name):
            aliases[name] = heads
    shared = aliases.get("shared.weight", ())
    return {name: others for name, others in aliases.items() if name not in shared}


def _slots(checkpoint: Checkpoint) -> Iterable[Slot]:
    """Yield the slots of a checkpoint; what is tied to another tensor is its alias."""
    aliases = _aliases(checkpoint)
    tied = {alias for others in aliases.values() for alias in others}
    for name, entry in checkpoint.tensors.items():
        if entry.dtype not in MERGEABLE or name in tied or _is_buffer(name, entry.shape):
            continue
        kind = slot_kind(name, entry.shape)
        layer = slot_layer(name)
        yield Slot(name, entry.shape, entry.dtype, kind, layer, aliases.get(name, ()))


def _differences(base: Checkpoint, expert: Checkpoint, where: str) -> Iterable[str]:
    """Yield what keeps ``expert`` from being merged with ``base``."""
    for name, mine, theirs in setting_differences(expert.config, base.config):
        yield f"{where}: {name} is {mine}, the base has {theirs} (use fine-tunes of one base)"
    if expert.tied != base.tied:
        yield (
            f"{where}: its head is {'tied' if expert.tied else 'untied'}, the base's is not the "
            "same (re-save one of them with the other's tie_word_embeddings)"
        )
    skip = {alias for others in _aliases(base).values() for alias in others}
    skip |= {"lm_head.weight"} if base.tied else set()
    skip |= {
        name
        for tensors in (base.tensors, expert.tensors)
        for name, entry in tensors.items()
        if _is_buffer(name, entry.shape)
    }
    missing = sorted(set(base.tensors) - set(expert.tensors) - skip)
    extra = sorted(set(expert.tensors) - set(base.tensors) - skip)
    for kind, names in (("missing", missing), ("not in the base", extra)):
        if names:
            yield f"{where}: {len(names)} tensors {kind} ({', '.join(names[:3])})"
    for name, entry in base.tensors.items():
        other = expert.tensors.get(name)
        if other is not None and name not in skip and other.shape != entry.shape:
            remedy = (
                "resize its vocabulary to the base's"
                if _VOCABULARY.search(name)
                else "use fine-tunes of one base"
            )
            shapes = f"{name} is {_by(other.shape)}, the base has {_by(entry.shape)}"
            yield f"{where}: {shapes} ({remedy})"


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _vocabulary_differences(
    theirs: dict[str, int] | None, expert: Path, where: str
) -> Iterable[str]:
    """Compare token strings by id; a directory without tokenizer.json is not compared."""
    mine = _vocabulary(expert, where)
    if mine is None or theirs is None or mine == theirs:
        return
    changed = sorted(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])
    token, number = changed[0]
    yield (
        f"{where}: its tokenizer differs from the base's at id {number} ({token!r}) "
        "(token ids must mean the same in all models)"
    )


def vocabulary_difference(base: Path, other: Path, where: str) -> str | None:
    """Return how the token ids of two directories differ, None where they do not.

    A directory without tokenizer.json is not compared.

    Raises:
        ModelError: a tokenizer.json is damaged.
    """
    return next(iter(_vocabulary_differences(_vocabulary(base, where), other, where)), None)


def _tokenizer_digest(directory: Path) -> str:
    """Return a digest of a directory's tokenizer, empty where it has none."""
    path = directory / "tokenizer.json"
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return ""  # absent, or unreadable: reading it says so


def _vocabulary(directory: Path, where: str) -> dict[str, int] | None:
    """Return token → id, None without tokenizer.json.

    Raises:
        ModelError: the file is no tokenizer.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    data = read_json_mapping(path, where)
    try:
        vocab = data.get("model", {}).get("vocab", {})
        if isinstance(vocab, list):  # unigram models store [token, score] pairs in order of id
            tokens = {str(entry[0]): number for number, entry in enumerate(vocab)}
        else:
            tokens = {str(token): int(number) for token, number in vocab.items()}
        added = data.get("added_tokens", [])
        return tokens | {str(one["content"]): int(one["id"]) for one in added}
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"{where}: {directory.name}/tokenizer.json: no valid vocabulary "
            "(save the tokenizer again)"
        ) from error


def _twins(checkpoints: Sequence[Checkpoint], where: str) -> Iterable[str]:
    """Yield pairs of models with the same weights."""
    seen: dict[str, str] = {}
    for checkpoint in checkpoints:
        twin = seen.setdefault(checkpoint.fingerprint, checkpoint.name)
        if twin != checkpoint.name:
            yield f"{where}: {checkpoint.name} has the same weights as {twin} (name it once)"
