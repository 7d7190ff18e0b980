"""Keys and values of rows that come and go, written in place.

Every row of a batch has a **seat** with columns of its own: its prefix, its prompt and what was
generated stand there from the first column on, without gaps. So rows of different lengths are
next to each other, a new row takes the seat of a finished one, and no pass looks at more columns
than the longest row has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from evomerge.fitness.hot.forward import Prefix

#: Columns that are cleared at a time. What no pass looks at is never touched: a text may have
#: room for a thousand tokens and end after ten.
CLEARED = 64


@dataclass(slots=True)
class _Pass:
    """What the next forward pass reads and writes, the same in all layers.

    Attributes:
        seats: of its rows [B]; a tensor only where they are scattered.
        before: columns that they see in front of what the pass adds.
        columns: of the only new token of each row [B]; None where whole prompts are new.
        places: 0 to B - 1, where there are ``columns``.
        ahead: keys and values of what stands before the prompts.
        room: seats and columns that there are.
    """

    seats: slice | torch.Tensor | None = None
    before: int = 0
    columns: torch.Tensor | None = None
    places: torch.Tensor | None = None
    ahead: Prefix = ()
    room: tuple[int, int] = (0, 0)


class Seats:
    """The seats of a batch, as a cache for transformers models.

    Args:
        layers: of the model.
        device: of the model.

    Attributes:
        cache: for ``past_key_values``; before each pass ``enter`` or ``go_on`` is called.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self._device = device
        self._pass = _Pass()
        self._layers = [_Layer(number, self._pass) for number in range(layers)]
        self.cache = Cache(layers=self._layers)

    @property
    def room(self) -> tuple[int, int]:
        """Seats, and columns of each."""
        return self._pass.room

    def resize(self, seats: int, columns: int) -> None:
        """Make room for other numbers of rows and of tokens; what fits is kept."""
        self._pass.room = (seats, columns)
        for layer in self._layers:
            layer.resize()

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let rows change their seats [n]."""
        if not sources:
            return
        left, taken = (torch.tensor(seats, device=self._device) for seats in (sources, targets))
        for layer in self._layers:
            layer.move(left, taken)

    def enter(self, seats: Sequence[int], ahead: Prefix) -> None:
        """Let the next pass write the prompts of rows that take these seats [B], right-padded."""
        now = self._pass
        first, last = seats[0], seats[-1]
        together = list(seats) == list(range(first, last + 1))
        scattered = torch.tensor(seats, device=self._device)
        now.seats = slice(first, last + 1) if together else scattered
        now.before = ahead[0][0].shape[-2] if ahead else 0
        now.columns, now.places, now.ahead = None, None, ahead

    def go_on(self, columns: torch.Tensor, places: torch.Tensor, width: int) -> None:
        """Let the next pass write one more token of each of the first rows.

        Args:
            columns: of the tokens [B].
            places: 0 to B - 1, on the same device.
            width: one more than the largest column.
        """
        now = self._pass
        now.seats, now.before = slice(0, len(columns)), width - 1
        now.columns, now.places, now.ahead = columns, places, ()


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
    """Keys and values of one layer."""

    def __init__(self, number: int, shared: _Pass) -> None:
        super().__init__()
        self._number = number
        self._pass = shared
        self._cleared = 0  # columns that hold numbers, if only zeros: NaN times 0 is NaN
        self._rooms: tuple[torch.Tensor, ...] = ()  # keys and values [seats, heads, columns, width]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the room that was asked for."""
        super().lazy_initialization(key_states, value_states)
        seats, columns = self._pass.room
        self._rooms = tuple(
            like.new_empty((seats, like.shape[1], columns, like.shape[3]))
            for like in (key_states, value_states)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what is new and return all that the rows of the pass have."""
        if not self._rooms:
            self.lazy_initialization(key_states, value_states)
        now = self._pass
        stop = now.before + key_states.shape[-2]
        self._clear(stop)
        ahead = now.ahead[self._number] if now.ahead else (None, None)
        for room, new, prefix in zip(self._rooms, (key_states, value_states), ahead, strict=True):
            if now.columns is not None:
                room[now.places, :, now.columns] = new[:, :, 0]
                continue
            if prefix is not None:
                room[now.seats, :, : now.before] = prefix
            room[now.seats, :, now.before : stop] = new
            room[now.seats, :, stop : self._cleared] = 0  # of who sat there before
        keys, values = self._rooms
        return keys[now.seats, :, :stop], values[now.seats, :, :stop]

    def _clear(self, stop: int) -> None:
        """Let all columns before ``stop`` hold numbers."""
        if stop <= self._cleared:
            return
        until = max(stop, min(self._cleared + CLEARED, self._pass.room[1]))
        for room in self._rooms:
            room[:, :, self._cleared : until] = 0
        self._cleared = until

    def resize(self) -> None:
        """Take the size that was asked for."""
        seats, columns = self._pass.room
        self._cleared = min(self._cleared, columns)
        rooms = []
        for old in self._rooms:
            new = old.new_empty((seats, old.shape[1], columns, old.shape[3]))
            both = min(seats, len(old))
            new[:both, :, : self._cleared] = old[:both, :, : self._cleared]
            new[both:, :, : self._cleared] = 0
            rooms.append(new)
        self._rooms = tuple(rooms)

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy rows to other seats."""
        for room in self._rooms:
            room[targets, :, : self._cleared] = room[sources, :, : self._cleared]

    def get_seq_length(self) -> int:
        """Return how many columns the rows of the next pass have before it."""
        return self._pass.before
