"""The demo's models: a small base and three experts, trained in a minute or two on one core.

The pool was picked for being instructive, and its figures say nothing about merging large models.
It is built so that simple merges lose and searched ones win, for a reason that real experts have
as well:

- The base can reverse, sort and shift five letters, but only when a *symbol* asks for it
  (``< b f a c d =``). Operation *words* it has seen with an arbitrary operation's answer, so it
  knows them without following them.
- Each expert was taught to follow one word (``reverse b f a c d =``), and follows the two others
  badly: the experts agree on what to compute and disagree on how words are routed to it. An
  average of them mixes the routes; coefficients per layer can keep all three.

Everything is deterministic: fixed seeds, one thread, so one machine trains the same weights each
time. Other machines round differently and get other weights; the demo's claims were checked over
several training seeds for that reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from evomerge.errors import InputError, LockedError

if TYPE_CHECKING:
    import torch

#: Operation words in the order of the experts; also the names of the expert directories.
SKILLS = ("reverse", "sort", "shift")
#: Directories of a complete pool, base first.
MODELS = ("base", *SKILLS)
#: Items in the task file of each skill.
ITEMS = 1300

LETTERS = "abcdefgh"
_LENGTH = 5  # letters per item
_SYMBOLS = ("<", "^", ">")  # the operations in the base's own language, in the order of SKILLS
_PAD, _END, _UNKNOWN = "<pad>", "<eos>", "<unk>"
_VOCABULARY = (_PAD, _END, _UNKNOWN, "=", *_SYMBOLS, *SKILLS, *LETTERS)
_IDS = {token: index for index, token in enumerate(_VOCABULARY)}
_FORMAT = 1  # raised when the same Training would give other weights
_STATE = "pool.json"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

Ints = npt.NDArray[np.int64]
#: Called with (model name, steps done, steps in total).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Training:
    """How the pool is trained; the defaults are the demo's.

    Attributes:
        seed: of the initial weights and of all batches.
        base_steps: optimizer steps of the base.
        expert_steps: optimizer steps of each expert.
        base_rate: peak learning rate of the base.
        expert_rate: peak learning rate of the experts.
        batch: sequences per step.
        words: share of the base's sequences that show a word with an arbitrary answer.
        own: share of an expert's sequences that show its own word, answered correctly; the rest
            replays the base's mixture.
        hidden: width of the residual stream.
        layers: transformer layers.
        heads: attention heads.
        inner: width of the MLP.
    """

    seed: int = 1
    base_steps: int = 450
    expert_steps: int = 80
    base_rate: float = 2e-3
    expert_rate: float = 5e-4
    batch: int = 64
    words: float = 0.3
    own: float = 0.5
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    inner: int = 352

    @property
    def digest(self) -> str:
        """Identity of the weights that this training gives on one machine."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- data ---------------------------------------------------------------------------------------


@cache
def _strings() -> tuple[Ints, Ints]:
    """Return all letter strings, divided by a hash of the letters.

    Returns:
        Training strings [28,000 or so, 5] and held-out strings in the order of their hash
        [about an eighth of 8^5, 5]; letters as numbers from 0.
    """
    training, held_out = [], []
    for string in itertools.product(range(len(LETTERS)), repeat=_LENGTH):
        text = "".join(LETTERS[letter] for letter in string)
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if digest[0] < 32:
            held_out.append((digest, string))
        else:
            training.append(string)
    return np.array(training), np.array([string for _, string in sorted(held_out)])


def training_strings() -> Ints:
    """Return the letter strings that training draws from [n, 5], letters as numbers from 0."""
    return _strings()[0]


def _answers(strings: Ints) -> Ints:
    """Return the answers of all operations, in the order of ``SKILLS`` [n, 3, 5]."""
    shifted = (strings + 1) % len(LETTERS)
    return np.stack([strings[:, ::-1], np.sort(strings, axis=1), shifted], axis=1)


def skill_items(skill: str) -> tuple[dict[str, str], ...]:
    """Return the held-out items of one skill, as they stand in its task file.

    No item's letters occur in training, for any operation, and the skills share no letters, so
    that their scores are independent.

    Args:
        skill: one of ``SKILLS``.

    Returns:
        ``ITEMS`` records with ``letters`` and ``answer``, letters divided by blanks.
    """
    index = SKILLS.index(skill)
    strings = _strings()[1][index * ITEMS : (index + 1) * ITEMS]
    answers = _answers(strings)[:, index]
    return tuple(
        {"letters": _spell(string), "answer": _spell(answer)}
        for string, answer in zip(strings, answers, strict=True)
    )


def _spell(string: Ints) -> str:
    return " ".join(LETTERS[letter] for letter in string)


def items_text(skill: str) -> str:
    """Return the content of ``fitness/skills/<skill>.jsonl``."""
    return "".join(json.dumps(item) + "\n" for item in skill_items(skill))


def _sequences(strings: Ints, heads: Ints, operations: Ints) -> Ints:
    """Return token sequences ``head, letters, =, answer, <eos>`` [n, 13].

    Args:
        strings: letters as numbers [n, 5].
        heads: token id of the symbol or word at the front [n].
        operations: which operation is answered [n].
    """
    count = len(strings)
    answers = _answers(strings)[np.arange(count), operations]  # [n, 3, 5] -> [n, 5]
    column = np.ones((count, 1), dtype=np.int64)
    first = _IDS[LETTERS[0]]
    return np.hstack(
        [
            heads[:, None],
            strings + first,
            column * _IDS["="],
            answers + first,
            column * _IDS[_END],
        ]
    )


def _base_batch(draw: np.random.Generator, count: int, training: Training) -> Ints:
    """Return sequences of the base's mixture: symbols, and words with arbitrary answers."""
    strings = draw.choice(training_strings(), size=count)
    operations = draw.integers(len(SKILLS), size=count)
    arbitrary = _IDS[SKILLS[0]] + draw.integers(len(SKILLS), size=count)
    worded = draw.random(count) < training.words
    heads = np.where(worded, arbitrary, _IDS[_SYMBOLS[0]] + operations)
    return _sequences(strings, heads, operations)


def _batch(draw: np.random.Generator, model: str, training: Training) -> Ints:
    """Return one batch for ``model`` [batch, 13]."""
    if model == "base":
        return _base_batch(draw, training.batch, training)
    own = round(training.batch * training.own)
    strings = draw.choice(training_strings(), size=own)
    heads = np.full(own, _IDS[model])
    taught = _sequences(strings, heads, np.full(own, SKILLS.index(model)))
    return np.vstack([taught, _base_batch(draw, training.batch - own, training)])


# --- training -----------------------------------------------------------------------------------


def tokenizer() -> Any:
    """Return the pool's tokenizer: one token per blank-divided word, no tokens added around.

    Nothing is added, because lm-eval encodes prompts with the tokenizer's own defaults and
    training must see the same sequences.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(_IDS), unk_token=_UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        padding_side="left",
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    )


def _new_model(training: Training) -> Any:
    """Return a model with random weights from torch's global generator."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(_VOCABULARY),
        hidden_size=training.hidden,
        intermediate_size=training.inner,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.heads,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        pad_token_id=_IDS[_PAD],
        eos_token_id=_IDS[_END],
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Silence transformers' own progress bars; ours is the ``progress`` callback."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _one_thread(seed: int) -> Iterator[None]:
    """Run with one thread and seeded generator; give the caller's back afterwards.

    Sums over several threads depend on their number, and so would the weights.
    """
    import torch

    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _fit(model: Any, name: str, training: Training, progress: Progress) -> None:
    """Train ``model`` in place: AdamW, cosine schedule with warm-up, loss on the answers only."""
    import torch

    steps = training.base_steps if name == "base" else training.expert_steps
    rate = training.base_rate if name == "base" else training.expert_rate
    warm_up = max(1, steps // 9)
    draw = np.random.default_rng([training.seed, MODELS.index(name)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    prompt = 1 + _LENGTH + 1  # head, letters, "="
    model.train()
    progress(name, 0, steps)
    for step in range(steps):
        factor = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        batch = torch.from_numpy(_batch(draw, name, training))
        # The logits at place i predict token i + 1, so the answer's begin one before it.
        logits = model(batch[:, :-1], use_cache=False).logits[:, prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, prompt:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(name, step + 1, steps)
    model.eval()


def _load_weights(model: Any, directory: Path) -> None:
    """Copy the saved weights of ``directory`` into ``model``."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied, saved once
    model.load_state_dict(weights)


def train_one(directory: Path, name: str, training: Training, progress: Progress) -> None:
    """Train one model and put it at ``directory/name``, whole or not at all."""
    with _one_thread(training.seed):
        model = _new_model(training)
        if name != "base":
            _load_weights(model, directory / "base")
        _fit(model, name, training, progress)
    partial = directory / f".{name}.partial"
    with _no_bars():
        model.save_pretrained(partial)
    tokenizer().save_pretrained(partial)
    target = directory / name
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


# --- cache --------------------------------------------------------------------------------------


def _fingerprint(directory: Path) -> str | None:
    """Return a digest of a model's files, None where one of them is absent."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _FILES:
        path = directory / name
        if not path.is_file():
            return None
        digest.update(hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


def _read_state(directory: Path, training: Training) -> dict[str, str]:
    """Return the fingerprints of the finished models that are intact; empty for other trainings.

    Raises:
        InputError: the directory holds something that no training of ours has written.
    """
    path = directory / _STATE
    if not path.exists():
        foreign = [name for name in MODELS if (directory / name).exists()]
        if foreign:
            raise InputError(
                f"{directory}: {foreign[0]!r} is there, but no {_STATE}; training would overwrite "
                "it (give the demo models a directory of their own)"
            )
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        recorded = dict(state["models"]) if state["training"] == training.digest else {}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not written by evomerge, or damaged: {error!r} (delete the directory to "
            "train the demo models again)"
        ) from error
    return {
        name: recorded[name]
        for name in MODELS
        if name in recorded and _fingerprint(directory / name) == recorded[name]
    }


def _write_state(directory: Path, training: Training, models: dict[str, str]) -> None:
    """Replace the state file at once."""
    state = {
        "training": training.digest,
        "settings": asdict(training),
        "models": {name: models[name] for name in MODELS if name in models},
    }
    partial = directory / f".{_STATE}.partial"
    partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    partial.replace(directory / _STATE)


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold the directory against a second training; the system frees it when we die."""
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"{directory}: another process trains the demo models there (wait until it is done)"
            ) from error
        yield
    finally:
        os.close(handle)


def is_trained(directory: Path, training: Training | None = None) -> bool:
    """Tell whether ``train_pool`` would return at once.

    Raises:
        InputError: as ``train_pool``.
    """
    return set(_read_state(directory, training or Training())) == set(MODELS)


def train_pool(directory: Path, progress: Progress, training: Training | None = None) -> Path:
    """Train base and experts into ``directory``, or return at once where they already are.

    Each model becomes an ordinary checkpoint directory (config, safetensors, tokenizer) named as
    in ``MODELS``. It appears whole or not at all, so a training that was killed continues with
    the first model that it had not finished, and gives the same weights.

    Args:
        directory: is created; holds nothing but the pool.
        progress: called at every step with (model name, steps done, steps in total).
        training: settings other than the demo's.

    Returns:
        ``directory``.

    Raises:
        InputError: the directory cannot be made, or holds something else.
        LockedError: another process trains into the directory.
    """
    training = training or Training()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory}: no directory for the demo models: {error.strerror} (choose another)"
        ) from error
    if is_trained(directory, training):
        return directory
    with _lock(directory):
        models = _read_state(directory, training)
        if "base" not in models:  # experts of a lost base would not be its experts
            models = {}
        # Before the first model: from here on everything in the directory is known to be ours.
        _write_state(directory, training, models)
        for leftover in sorted(directory.glob(".*.partial")):
            shutil.rmtree(leftover)
        for name in MODELS:
            if name in models:
                continue
            train_one(directory, name, training, progress)
            fingerprint = _fingerprint(directory / name)
            assert fingerprint is not None, "a saved model has all its files"
            models[name] = fingerprint
            _write_state(directory, training, models)
    return directory
