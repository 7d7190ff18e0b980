"""From which model an export takes its tokenizer, chat template and generation settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoint import Checkpoint, is_local, read_json_mapping
from evomerge.errors import InputError, ModelError, suggest
from evomerge.models import Models, vocabulary_difference

#: A few of the files would not be a tokenizer: one of these must be there.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where the files come from.

    Attributes:
        directory: that holds them.
        name: ``base``, an expert's name, or the last name of a directory of the user's.
        note: one sentence on the choice, for people.
    """

    directory: Path
    name: str
    note: str


def tokenizer_source(models: Models, wanted: str | None = None) -> TokenizerSource:
    """Return where the tokenizer of an export comes from.

    Without a wish it is the base's: the study scored every merge with it.

    Args:
        models: of the merge.
        wanted: ``base``, ``expert:NAME`` or a directory.

    Raises:
        InputError: no such expert or directory.
        ModelError: there is no tokenizer, or its token ids mean something else than the base's.
    """
    if wanted is None:
        return TokenizerSource(models.base.directory, "base", _decided(models))
    if wanted == "base":
        _require_tokenizer(models.base.directory)
        note = "Tokenizer and generation settings are the base's, as asked."
        return TokenizerSource(models.base.directory, "base", note)
    directory, name = _asked(models, wanted)
    _require_tokenizer(directory)
    problem = vocabulary_difference(models.base.directory, directory, "--tokenizer")
    if problem is not None:
        raise ModelError(problem)
    template = (
        "and chat template "
        if chat_template(directory) is not None
        else "(it has no chat template) "
    )
    note = (
        f"Tokenizer {template}are those of {name}, as asked; the study scored with the base's, so "
        "scores can differ where prompts are tokenised differently."
    )
    return TokenizerSource(directory, name, note)


def chat_template(directory: Path) -> str | None:
    """Return the chat template of a model directory, None where it has none.

    Raises:
        ModelError: a file that could hold it is damaged.
    """
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        if path.is_file() and (found := read_json_mapping(path, "tokenizer").get("chat_template")):
            return str(found)
    return None


def _asked(models: Models, wanted: str) -> tuple[Path, str]:
    word, colon, name = wanted.partition(":")
    if word == "expert" and colon:
        experts: dict[str, Checkpoint] = {expert.name: expert for expert in models.experts}
        if name not in experts:
            raise InputError(f"--tokenizer: no expert {name!r}{suggest(name, experts)}")
        return experts[name].directory, name
    if not is_local(wanted):
        raise InputError(
            f"--tokenizer: expected base, expert:NAME or a directory, got {wanted!r} (experts: "
            f"{', '.join(expert.name for expert in models.experts)})"
        )
    path = Path(wanted).expanduser()
    return path, path.resolve().name


def _require_tokenizer(directory: Path) -> None:
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise ModelError(
            f"--tokenizer: {directory.name} has no tokenizer (expected one of "
            f"{', '.join(_VOCABULARIES)})"
        )


def _decided(models: Models) -> str:
    note = "Tokenizer and generation settings are the base's: the study scored with them."
    ours = chat_template(models.base.directory)
    theirs = {one.name: chat_template(one.directory) for one in models.experts}
    others = [name for name, found in theirs.items() if found is not None and found != ours]
    if others:
        has = "has no chat template" if ours is None else "has another chat template than these"
        options = " or ".join(f"--tokenizer expert:{name}" for name in others)
        return f"{note} The base {has}; take an expert's with {options}."
    return note if ours is not None else f"{note} There is no chat template."
