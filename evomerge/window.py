"""The candidates that a searcher waits for, and whether its budgets allow one more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.items import Chosen
from evomerge.search.protocol import Candidate
from evomerge.study_record import Limit
from evomerge.trial import Trial

#: A search without a limit on trials ends when so many in a row cost nothing: it repeats itself.
FREE_IN_A_ROW = 100


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A trial that was asked and not told, and the items that it may cost."""

    candidate: Candidate
    trial: Trial
    chosen: Chosen

    @property
    def cost(self) -> int:
        """Items that a worker scores for it at most."""
        return sum(map(len, self.chosen.items))


class Window:
    """What was asked and not told, in the order of asking.

    A search that was extended runs to each of its limits in turn, and the window is empty
    between them: so it does not matter for its replay when it was extended.

    Args:
        size: most that may be outstanding; None for as many as the searcher asks.
        cost_of: most items that the candidate of a number may cost, by its number.
        together: most items that the outstanding ones and the candidate of a number may cost,
            where that is less than the sum.

    Attributes:
        asked: candidates since the beginning.
    """

    def __init__(
        self,
        size: int | None,
        cost_of: Callable[[int], int],
        together: Callable[[Sequence[Chosen], int], int] | None = None,
    ) -> None:
        self._size = size
        self._cost_of = cost_of
        self._together = together
        self._limit = Limit(0, None)
        self._outstanding: list[Outstanding] = []
        self._spent = 0
        self._free = 0
        self.asked = 0

    def __len__(self) -> int:
        """Return how many are outstanding."""
        return len(self._outstanding)

    def until(self, limit: Limit) -> None:
        """Go on to another limit."""
        self._limit = limit
        self._free = 0

    def has_room(self) -> bool:
        """Return whether one more keeps within the limit, whatever the outstanding ones cost."""
        if self._size is not None and len(self._outstanding) >= self._size:
            return False
        trials, items = self._limit.trials, self._limit.items
        if trials is not None and self.asked >= trials:
            return False
        if items is None:
            return True
        if trials is None and self._free >= FREE_IN_A_ROW:
            return False
        if self._together is not None:
            chosen = [one.chosen for one in self._outstanding]
            return self._spent + self._together(chosen, self.asked) <= items
        committed = self._spent + sum(one.cost for one in self._outstanding)
        return committed + self._cost_of(self.asked) <= items

    @property
    def outstanding(self) -> tuple[Outstanding, ...]:
        """Those that were asked and not told, in the order of asking."""
        return tuple(self._outstanding)

    def add(self, one: Outstanding) -> None:
        """Take in what was asked."""
        self._outstanding.append(one)
        self.asked += 1

    def take(self, arrived: Callable[[Sequence[int]], int] | None) -> Outstanding:
        """Take out the one to tell next.

        Args:
            arrived: returns which of some trials has its result first; None to take the one that
                was asked first.
        """
        if arrived is None:
            return self._outstanding.pop(0)
        first = arrived([one.trial.number for one in self._outstanding])
        row = next(n for n, one in enumerate(self._outstanding) if one.trial.number == first)
        return self._outstanding.pop(row)

    def spend(self, items: int) -> None:
        """Count what one that was told has cost."""
        self._spent += items
        self._free = 0 if items else self._free + 1

    def skip(self, items: int) -> None:
        """Count a trial that another searcher asked, and that cost so much."""
        self.asked += 1
        self.spend(items)

    def left(self, limit: Limit) -> int:
        """Return how many more trials a limit allows at their full cost; 0 or more."""
        counts = []
        if limit.trials is not None:
            counts.append(limit.trials - self.asked)
        if limit.items is not None:
            counts.append((limit.items - self._spent) // self._cost_of(self.asked))
        return max(0, min(counts))
