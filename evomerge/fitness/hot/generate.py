"""Greedy generation in a batch that rows join and leave, with a cache that is written in place.

When some rows have ended, waiting prompts take their seats, so that a long answer is seldom
computed alone; see ``batch`` and ``seats``.

transformers' own continuous batching (``generate_batch``) is not used: its requests end at token
ids and lengths only, so each would run on behind its stop string; and without flash attention, to
which it switches the live model where it can, it packs all rows into one sequence under a dense
mask, whose cost grows with the square of their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.fitness.hot.batch import Batch, Ending
from evomerge.fitness.hot.forward import Forward
from evomerge.fitness.hot.trie import Group, Sequenced, arrange


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts in the order in which they are computed.

    Attributes:
        groups: rows; each is one prompt, and may stand for several equal ones.
        count: number of prompts.
    """

    groups: tuple[Group, ...]
    count: int


def arranged_prompts(forward: Forward, prompts: Sequence[Sequence[int]]) -> Prompts:
    """Return how to compute some prompts [n]; the same for every candidate."""
    sequences = [Sequenced(tuple(tokens), len(tokens) - 1) for tokens in prompts]
    groups = arrange(sequences, trees=False, prefixes=forward.prefixes, continued=False)
    # The longest first, so that the cache seldom has to grow.
    longest_first = sorted(groups, key=lambda one: -len(one.prefix) - len(one.rows[0].tokens))
    return Prompts(tuple(longest_first), len(sequences))


class Stops:
    """Tells when a generated text holds one of the stop strings.

    A text can only come to hold one with a token that brings the string's last character, so
    most tokens are not decoded twice.

    Args:
        tokenizer: a transformers tokenizer.
        strings: stop strings.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = [string for string in strings if string]
        self._last = {string[-1] for string in self._strings}
        encoded = [tokenizer.encode(one, add_special_tokens=False) for one in self._strings]
        # Another split into tokens may need more of them.
        self._tail = 2 + max((len(one) for one in encoded), default=0)
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before = tokenizer.decode(self._anchor)
        self._may_end: dict[int, bool] = {}

    def reached(self, tokens: Sequence[int]) -> bool:
        """Return whether the text of ``tokens``, which just grew by one, holds a stop string."""
        if not self._strings or not self._ends(tokens[-1]):
            return False
        text = self._tokenizer.decode(tokens[-self._tail :])
        return any(string in text for string in self._strings)

    def _ends(self, token: int) -> bool:
        known = self._may_end.get(token)
        if known is None:
            # Beside another token, because alone its leading space may be dropped.
            text = self._tokenizer.decode([*self._anchor, token])
            added = text[len(self._before) :] if text.startswith(self._before) else text
            known = not added or "�" in text or any(one in added for one in self._last)
            self._may_end[token] = known
        return known


def generate(
    forward: Forward, plan: Prompts, budget: int, most: int, ends: frozenset[int],
    reached: Callable[[Sequence[int]], bool],
) -> list[list[int]]:  # fmt: skip
    """Return the greedy continuation of every prompt, up to what ended it.

    Args:
        forward: of the model, with the weights as they are now.
        plan: the prompts.
        budget: tokens per forward pass, padding counted; one prompt at least.
        most: new tokens of each.
        ends: token ids that end a text; they are part of the result.
        reached: whether the tokens so far end a text.

    Returns:
        [n] new tokens.
    """
    found: list[list[int]] = [[] for _ in range(plan.count)]
    if not plan.groups or most < 1:
        return found
    with torch.inference_mode():
        for row, tokens in Batch(forward, plan.groups, budget, Ending(most, ends, reached)).run():
            for number, _ in row.wanted:
                found[number] = tokens
    return found
