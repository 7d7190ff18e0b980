"""Rows that are generated together: waiting ones take the seats of those that ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from evomerge.fitness.hot.forward import Forward, Prefix
from evomerge.fitness.hot.likelihood import batches
from evomerge.fitness.hot.seats import CLEARED, Seats
from evomerge.fitness.hot.trie import Group, Row

#: Rows that ended are replaced, or taken out, when they are at least this share of the batch.
ENDED = 0.2
#: The cache gets more seats where there would be so many times as many: all of it is copied then.
GROWTH = 1.25
#: It gets so many times as many columns as its rows fill. All that they could come to need might
#: not fit into a device, and most texts end early.
AHEAD = 1.5


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends a text.

    Attributes:
        most: new tokens, at least 1.
        ends: token ids; they are part of the text.
        reached: whether the new tokens so far end it.
    """

    most: int
    ends: frozenset[int]
    reached: Callable[[Sequence[int]], bool]


@dataclass(slots=True)
class _Text:
    """A row that is being generated.

    Attributes:
        row: its prompt.
        start: tokens in front of the new ones, the prefix counted.
        tokens: new ones.
        done: whether it ended.
    """

    row: Row
    start: int
    tokens: list[int]
    done: bool = False


class Batch:
    """A batch that goes on until no row waits.

    Args:
        forward: of the model, with the weights as they are now.
        groups: of prompts, a row each.
        budget: tokens per forward pass, padding counted; one row at least.
        ending: of a text.
    """

    def __init__(
        self, forward: Forward, groups: Sequence[Group], budget: int, ending: Ending
    ) -> None:
        self._forward, self._budget, self._ending = forward, budget, ending
        self._waiting = deque((group, row) for group in groups for row in group.rows)
        # The cache holds as much as the largest batch of prompts that fills a pass would.
        self._tokens = max(
            len(rows) * self._columns(group, rows[0])
            for group in groups
            for rows in batches(group.rows, budget, budget)
        )
        self._seats = self._empty()
        self._texts: list[_Text] = []  # by seat
        self._ahead: tuple[Group, Prefix] | None = None
        self._places = torch.arange(0)
        # Of the token that each row reads next: itself, its column, and the last column that the
        # row can come to; rows that ended wait there.
        self._next = self._at = self._last = self._places
        self._width = self._widest = 0  # columns of a pass: now, and at most

    def run(self) -> Iterator[tuple[Row, list[int]]]:
        """Yield every row with its new tokens."""
        while True:
            ended = [text for text in self._texts if text.done]
            if len(ended) < ENDED * len(self._texts):
                self._step()
                continue
            yield from ((text.row, text.tokens) for text in ended)
            self._change()
            if not self._texts:
                return

    def _empty(self) -> Seats:
        config = self._forward.model.config.get_text_config(decoder=True)
        return Seats(config.num_hidden_layers, self._forward.device)

    def _columns(self, group: Group, row: Row) -> int:
        """Return how many columns a row can come to need."""
        return len(group.prefix) + len(row.tokens) + self._ending.most

    def _step(self) -> None:
        """Add a token to every row."""
        if self._width > self._seats.room[1]:
            self._widen()
        places, columns = self._places, self._at.unsqueeze(1)  # [B], [B, 1]
        self._seats.go_on(self._at, places, self._width)
        seen = torch.arange(self._width, device=columns.device) <= columns  # [B, W]
        found = self._likeliest(self._next.unsqueeze(1), places, columns, seen.long())
        for text, token in zip(self._texts, found.tolist(), strict=True):
            if not text.done:
                self._add(text, token)
        self._next = found
        self._at = torch.minimum(self._at + 1, self._last)
        self._width = min(self._width + 1, self._widest)

    def _add(self, text: _Text, token: int) -> None:
        text.tokens.append(token)
        ending = self._ending
        text.done = (
            len(text.tokens) == ending.most or token in ending.ends or ending.reached(text.tokens)
        )

    def _likeliest(
        self, tokens: torch.Tensor, wanted: torch.Tensor, columns: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Return the most likely token behind some.

        Args:
            tokens: [B, L].
            wanted: places in the flattened tokens [B].
            columns: of the tokens [B, L]; they are their positions too.
            seen: which columns hold tokens [B, W].

        Returns:
            [B].
        """
        extra: dict[str, Any] = {"attention_mask": seen, "past_key_values": self._seats.cache}
        logits = self._forward.picked(tokens, wanted, position_ids=columns, **extra)
        return logits.argmax(-1)

    def _change(self) -> None:
        """Let waiting rows take the seats of those that ended, and close the gaps."""
        kept = [seat for seat, text in enumerate(self._texts) if not text.done]
        fresh = self._joining([self._texts[seat] for seat in kept])
        count = len(kept) + len(fresh)
        staying = {seat: self._texts[seat] for seat in kept if seat < count}
        moving = [seat for seat in kept if seat >= count]
        free = [seat for seat in range(count) if seat not in staying]
        self._seats.move(moving, free[: len(moving)])
        staying |= {to: self._texts[seat] for seat, to in zip(moving, free, strict=False)}
        self._make_room(count, [*staying.values()], fresh)
        joined = zip(free[len(moving) :], fresh, strict=True)
        for _, members in groupby(joined, key=lambda one: id(one[1][0])):
            staying |= self._enter(list(members))
        self._texts = [staying[seat] for seat in range(count)]
        if count:
            self._look()

    def _joining(self, kept: Sequence[_Text]) -> list[tuple[Group, Row]]:
        """Take as many waiting rows as fit beside those that go on; one at least where none do."""
        fresh: list[tuple[Group, Row]] = []
        columns = max((text.start + self._ending.most for text in kept), default=0)
        longest = 0
        while self._waiting:
            group, row = self._waiting[0]
            longest = max(longest, len(row.tokens))
            columns = max(columns, self._columns(group, row))
            count = len(fresh) + 1
            fits = count * longest <= self._budget
            fits = fits and len(kept) + count <= self._room(columns, bool(kept))
            if not fits and (kept or fresh):
                break
            fresh.append(self._waiting.popleft())
        return fresh

    def _room(self, columns: int, seated: bool) -> int:
        """Return how many rows of so many columns the cache may have."""
        seats = self._tokens // columns
        have = self._seats.room[0]
        return have if seated and have < seats < GROWTH * have else seats

    def _make_room(
        self, count: int, kept: Sequence[_Text], fresh: Sequence[tuple[Group, Row]]
    ) -> None:
        most = self._ending.most
        filled = [text.start + len(text.tokens) for text in kept]
        filled += [self._columns(*one) - most + 1 for one in fresh]
        seats, have = self._seats.room
        if count > seats or max(filled, default=0) > have:
            if not kept:  # nothing to copy, and the old room is free before there is a new one
                self._seats = self._empty()
            columns = [text.start + most for text in kept] + [self._columns(*one) for one in fresh]
            self._seats.resize(count, _ahead(max(filled), max(columns)))

    def _widen(self) -> None:
        """Make room for longer texts; seats that nobody has are given up for it."""
        columns = _ahead(self._width, self._widest)
        seats = min(self._seats.room[0], self._tokens // columns)
        self._seats.resize(max(seats, len(self._texts)), columns)

    def _enter(self, joined: Sequence[tuple[int, tuple[Group, Row]]]) -> dict[int, _Text]:
        """Compute the prompts of rows of one group; return them by seat, with a token each."""
        group = joined[0][1][0]
        rows = [row for _, (_, row) in joined]
        if self._ahead is None or self._ahead[0] is not group:
            ahead = self._forward.prefix(group.prefix) if group.prefix else ()
            self._ahead = (group, ahead)
        prefix = len(group.prefix)
        length = max(len(row.tokens) for row in rows)
        tokens = torch.zeros((len(rows), length), dtype=torch.long)
        seen = torch.ones((len(rows), prefix + length), dtype=torch.long)
        for at, row in enumerate(rows):
            tokens[at, : len(row.tokens)] = torch.from_numpy(row.tokens)
            seen[at, prefix + len(row.tokens) :] = 0
        wanted = torch.tensor([at * length + len(row.tokens) - 1 for at, row in enumerate(rows)])
        columns = torch.arange(prefix, prefix + length).expand(len(rows), -1)
        device = self._forward.device
        self._seats.enter([seat for seat, _ in joined], self._ahead[1])
        found = self._likeliest(tokens.to(device), wanted, columns.to(device), seen.to(device))
        texts = {}
        for (seat, _), row, token in zip(joined, rows, found.tolist(), strict=True):
            texts[seat] = _Text(row, prefix + len(row.tokens), [])
            self._add(texts[seat], token)
        return texts

    def _look(self) -> None:
        """Note what each row reads next, and where."""
        device = self._forward.device
        at = [text.start + len(text.tokens) - 1 for text in self._texts]
        last = [text.start + self._ending.most - 1 for text in self._texts]
        self._next = torch.tensor([text.tokens[-1] for text in self._texts], device=device)
        self._at, self._last = torch.tensor(at, device=device), torch.tensor(last, device=device)
        self._places = torch.arange(len(self._texts), device=device)
        self._width, self._widest = max(at) + 1, max(last) + 1


def _ahead(filled: int, most: int) -> int:
    """Return how many columns to have where so many are filled, and can come to be at most."""
    return min(most, max(filled + CLEARED, int(AHEAD * filled)))
