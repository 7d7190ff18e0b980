"""Which items each trial of a search is scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from evomerge.errors import InputError
from evomerge.item_cache import Items
from evomerge.valuation import Mode

#: Trials that share their items where the searcher knows no generations.
TRIALS_PER_DRAW = 20


@dataclass(frozen=True, slots=True)
class Resampled:
    """Fresh items for every generation, common within it.

    Attributes:
        per_trial: items of each objective, drawn from its search items; at most all of them.
        every: trials that share their items; None for the generations of the searcher, or
            ``TRIALS_PER_DRAW`` where it has none.
    """

    per_trial: int
    every: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers below 1.

        Raises:
            InputError: there is one.
        """
        if self.per_trial < 1:
            raise InputError(f"per_trial: must be at least 1, got {self.per_trial}")
        if self.every is not None and self.every < 1:
            raise InputError(f"every: must be at least 1, got {self.every}")


@dataclass(frozen=True, slots=True)
class Chosen:
    """What one trial is scored on.

    Attributes:
        items: ids [m][I], in the order of scoring.
        mode: what is made of the scores; ``check`` for all items, to see how far off the
            estimator is.
        design: the items that an estimator chose [m][n]; empty without one.
        draw: number of the draw; trials of one draw are scored on the same items.
    """

    items: Items
    mode: Mode = "mean"
    design: Items = ()
    draw: int = 0


@dataclass(frozen=True, slots=True)
class TrialItems:
    """The items of each trial, a pure function of its place in the search.

    Attributes:
        pool: the search items [m][I].
        seed: of the study.
        resampled: fresh items per generation; None for the same ones throughout.
        shuffled: score the items in an order by chance: what a race scores first must stand for
            the rest.
        design: returns the items that an estimator chose, by number of the draw; None without
            one.
        full_every: of a search with an estimator every so many-th trial is scored in full.
        refresh: of a search with an estimator so many trials share its items, or those of a
            generation; None for all of them.
    """

    pool: Items
    seed: int
    resampled: Resampled | None = None
    shuffled: bool = False
    design: Callable[[int], Items] | None = None
    full_every: int | None = None
    refresh: int | Literal["generation"] | None = None

    def of(self, index: int, generation: int | None, draw: int | None = None) -> Chosen:
        """Return the items of a trial.

        Args:
            index: its place among the trials of the search, from 0.
            generation: of the searcher, None where it has none.
            draw: where it is known, because the trial shares the items of another one.
        """
        if draw is None:
            draw = self._draw(index, generation)
        if self.design is not None:
            few = self.design(draw)
            full = self.full_every is not None and (index + 1) % self.full_every == 0
            return Chosen(self.pool if full else few, "check" if full else "estimate", few, draw)
        if self.resampled is not None:
            return Chosen(drawn(self.pool, self.seed, draw, self.resampled.per_trial), draw=draw)
        if self.shuffled:
            return Chosen(drawn(self.pool, self.seed, 0, None))
        return Chosen(self.pool)

    def cost(self, index: int) -> int:
        """Return how many items a trial is scored on at most, over all objectives."""
        return sum(map(len, self.of(index, None, 0).items))  # all draws are of one size

    def _draw(self, index: int, generation: int | None) -> int:
        every: int | Literal["generation"] | None = self.refresh
        if self.resampled is not None:
            every = self.resampled.every or "generation"
        if every is None:
            return 0
        if every == "generation":
            return index // TRIALS_PER_DRAW if generation is None else generation
        return index // every


def drawn(pool: Items, seed: int, draw: int, count: int | None) -> Items:
    """Return ``count`` items of each objective in an order by chance.

    The order is that of a hash of (seed, draw, id), so that it is the same in every process, and
    that objectives which share items share them here too.

    Args:
        pool: ids [m][I].
        seed: of the study.
        draw: number of the draw.
        count: items per objective, all of them where there are fewer; None for all.
    """
    return tuple(
        tuple(sorted(ids, key=lambda item: _rank(seed, draw, item))[:count]) for ids in pool
    )


def _rank(seed: int, draw: int, item: str) -> bytes:
    # repr keeps (1, 'a') and ('1', 'a') apart.
    return hashlib.blake2b(repr((seed, "draw", draw, item)).encode(), digest_size=16).digest()
