"""One forward pass of a causal language model, with logits only where they are wanted."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from evomerge.fitness.hot.trie import Row, Sequenced, arrange

_LOG = logging.getLogger(__name__)

#: Keys and values of each layer: ([1, heads, P, width], the same).
Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]

#: Largest difference of a log-likelihood by which a shortcut may move the probe's tokens, nats.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


class Forward:
    """A live causal model. It keeps no weights and nothing made of them.

    What the model's code does not support is found out by a probe with the weights that it holds
    when this object is made: trees in a row, and keys and values computed ahead.

    Args:
        model: a transformers model for causal language modelling.

    Attributes:
        trees: several sequences may share a row.
        prefixes: a prefix may be computed once for many rows.
        window: longest sequence for which that holds; models with sliding attention see less, and
            some turn all rows of a batch by its longest.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self._picked: torch.Tensor | None = None
        self._eager = getattr(model.config, "_attn_implementation", "") == "eager"
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self.window = _window(model.config)
        head = model.get_output_embeddings()
        self._picks = head is not None
        if head is not None:
            hook = head.register_forward_pre_hook(self._pick)
            self._picks = self._works("logits of single positions", trees=False, prefix=0)
            if not self._picks:
                hook.remove()
        self.trees = self._works("trees of sequences", trees=True, prefix=0)
        self.prefixes = self._works("prefixes computed ahead", trees=self.trees, prefix=3)

    def prefix(self, tokens: Sequence[int]) -> Prefix:
        """Return keys and values of a prefix, of the weights as they are now."""
        with torch.inference_mode():
            inputs = torch.tensor([list(tokens)], device=self.device)
            cache = self._run(inputs, wanted=torch.zeros(1, dtype=torch.long), use_cache=True)
            return layers_of(cache.past_key_values)

    def logits(self, rows: Sequence[Row], prefix: Prefix = ()) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits that a batch of rows wants, those of one place once.

        Args:
            rows: any number, right-padded to the longest.
            prefix: keys and values before all of them.

        Returns:
            logits of the places [U, vocabulary], and the place of what is wanted [N]: of every
            row in turn, of every sequence in it, of its positions.
        """
        from transformers import DynamicCache

        length = max(len(row.tokens) for row in rows)
        tokens = np.zeros((len(rows), length), np.int64)
        for at, row in enumerate(rows):
            tokens[at, : len(row.tokens)] = row.tokens
        wanted = np.concatenate(
            [at * length + nodes for at, row in enumerate(rows) for _, nodes in row.wanted]
        )
        unique, inverse = np.unique(wanted, return_inverse=True)
        extra: dict[str, Any] = {}
        ahead = prefix[0][0].shape[-2] if prefix else 0
        if ahead or any(row.mask is not None for row in rows):
            extra["attention_mask"] = self._mask(rows, length, ahead)
            if "position_ids" in self.takes:
                positions = np.zeros((len(rows), length), np.int64)
                for at, row in enumerate(rows):
                    positions[at, : len(row.tokens)] = row.positions
                extra["position_ids"] = torch.from_numpy(positions).to(self.device)
        if ahead:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(prefix):
                shape = (len(rows), -1, -1, -1)
                cache.update(keys.expand(shape), values.expand(shape), layer)
            extra["past_key_values"] = cache
        logits = self.picked(
            torch.from_numpy(tokens).to(self.device),
            torch.from_numpy(unique),
            use_cache=bool(ahead),
            **extra,
        )
        return logits, torch.from_numpy(inverse).to(logits.device)

    def picked(self, tokens: torch.Tensor, wanted: torch.Tensor, **extra: Any) -> torch.Tensor:
        """Run the model and return some logits.

        Args:
            tokens: [B, L].
            wanted: places in the flattened tokens [N].
            extra: further arguments of the model.

        Returns:
            [N, vocabulary].
        """
        with torch.inference_mode():
            logits: torch.Tensor = self._run(tokens, wanted, **extra).logits
            return logits[0] if self._picks else logits.flatten(0, 1)[wanted.to(logits.device)]

    def _run(self, tokens: torch.Tensor, wanted: torch.Tensor, **extra: Any) -> Any:
        with self._picking(wanted.to(self.device)):
            return self.model(input_ids=tokens, **extra)

    @contextmanager
    def _picking(self, wanted: torch.Tensor) -> Iterator[None]:
        self._picked = wanted
        try:
            yield
        finally:
            self._picked = None

    def _pick(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
        """Let the head see only the wanted positions: [B, L, H] becomes [1, N, H]."""
        if self._picked is None:
            return arguments
        hidden, *others = arguments
        return (hidden.flatten(0, 1)[self._picked].unsqueeze(0), *others)

    def _mask(self, rows: Sequence[Row], length: int, ahead: int) -> torch.Tensor:
        """Return which token sees which [B, 1, L, P + L], in the form that the attention takes."""
        sees = np.zeros((len(rows), length, ahead + length), np.bool_)
        sees[:, :, :ahead] = True
        causal = np.tri(length, dtype=np.bool_)
        for at, row in enumerate(rows):
            size = len(row.tokens)
            if row.mask is None:
                sees[at, :, ahead:] = causal
            else:
                sees[at, :size, ahead : ahead + size] = row.mask
                sees[at, size:, ahead:] |= np.eye(length, dtype=np.bool_)[size:]
        mask = torch.from_numpy(sees).unsqueeze(1).to(self.device)
        if not self._eager:
            return mask
        dtype = self.model.dtype
        blocked = torch.full_like(mask, torch.finfo(dtype).min, dtype=dtype)
        return blocked.masked_fill(mask, 0.0)

    def _works(self, what: str, trees: bool, prefix: int) -> bool:
        """Return whether a shortcut gives the same logits as whole sequences."""
        try:
            same = self._same(Sequenced((1, 2, 3, 4, 5, 6), 4), trees, prefix)
        except Exception as error:  # whatever the model's own code raises for what it cannot do
            _LOG.info("%s: %s are not used: %s", type(self.model).__name__, what, error)
            return False
        if not same:
            _LOG.info("%s: %s are not used: other logits", type(self.model).__name__, what)
        return same

    def _same(self, first: Sequenced, trees: bool, prefix: int) -> bool:
        """Compare a few sequences, some of which share a beginning, with one plain pass each."""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ends = ((7, 8), (9,), (7, 10, 11))
        heads = [tuple(token % vocabulary for token in (*first.tokens, *end)) for end in ends]
        group = _probe_group([Sequenced(tokens, first.start) for tokens in heads], trees, prefix)
        ahead = self.prefix(heads[0][:prefix]) if prefix else ()
        places, index = self.logits(group, ahead)
        logits = places[index].float()
        at = 0
        for row in group:
            for number, nodes in row.wanted:
                with torch.inference_mode():
                    whole = self.model(
                        input_ids=torch.tensor([heads[number]], device=self.device)
                    ).logits[0, first.start :]
                mine = logits[at : at + len(nodes)].log_softmax(-1)
                at += len(nodes)
                apart = (mine - whole.float().log_softmax(-1)).abs().max()
                # NaN weights are told by the scores, not here.
                if apart > _PROBE_TOLERANCE.get(whole.dtype, 1e-3):
                    return False
        return True


def _probe_group(sequences: Sequence[Sequenced], trees: bool, prefix: int) -> tuple[Row, ...]:
    """Return rows for the probe; with a prefix they lack its first tokens."""
    if not prefix:
        return tuple(row for group in arrange(sequences, trees, False) for row in group.rows)
    cut = [Sequenced(one.tokens[prefix:], one.start - prefix) for one in sequences]
    return tuple(
        Row(row.tokens, row.positions + prefix, row.mask, row.wanted)
        for group in arrange(cut, trees, False)
        for row in group.rows
    )


def layers_of(cache: Any) -> Prefix:
    """Return the keys and values of a transformers cache, layer by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _window(config: Any) -> int | None:
    """Return the longest sequence whose tokens all see each other and keep their positions.

    It is the shortest sliding window or chunk, and the length beyond which rotary embeddings
    change with the longest row of a batch; None where nothing of the kind is.
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    sizes = [_switch(rope, text) for rope in _ropes(text)]
    if kinds is None or any("sliding" in kind or "chunked" in kind for kind in kinds):
        sizes.append(getattr(text, "sliding_window", None))
        sizes.append(getattr(text, "attention_chunk_size", None))
    if "local" in (getattr(text, "attention_layers", None) or ()):  # GPT-Neo
        sizes.append(text.window_size)
    return min((int(size) for size in sizes if size), default=None)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the settings of rotary embeddings, of which a kind of layer may have its own."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [one for one in given.values() if isinstance(one, Mapping)]
    return nested or [given]


def _switch(rope: Mapping[str, Any], config: Any) -> int | None:
    """Return the longest sequence that rotary embeddings turn as they turn short ones."""
    kind = rope.get("rope_type")
    if kind == "longrope":
        return rope.get("original_max_position_embeddings")
    return getattr(config, "max_position_embeddings", None) if kind == "dynamic" else None
