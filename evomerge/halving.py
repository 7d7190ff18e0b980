"""Successive halving: the trials of a bracket share their rungs, and only the best go on.

All trials of a bracket are scored on the items of the first rung; the best 1/eta of them on those
of the next one, and so on; the last of them on all their items (Jamieson & Talwalkar 2016). The
items come in one order for all, so that at every rung the trials are compared on the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.errors import InputError
from evomerge.item_cache import Items
from evomerge.pareto import ranked
from evomerge.racing import require_rungs


@dataclass(frozen=True, slots=True)
class Halving:
    """How a study halves.

    Attributes:
        rungs: numbers of items per objective after which to look, ascending.
        eta: one in so many goes on, rounded up.
        bracket: trials of a bracket; None for all that the searcher asks before it must be told,
            which is a generation of those that have some.
    """

    rungs: tuple[int, ...] = (10, 20, 50, 200)
    eta: int = 2
    bracket: int | None = None

    def __post_init__(self) -> None:
        """Refuse settings that say nothing.

        Raises:
            InputError: rungs that do not ascend, or a number out of range.
        """
        require_rungs(self.rungs)
        if self.eta < 2:
            raise InputError(f"eta: must be at least 2, got {self.eta}")
        if self.bracket is not None and self.bracket < 2:
            raise InputError(f"bracket: must be at least 2, got {self.bracket}")

    def stages(self, items: Items) -> tuple[int, ...]:
        """Return the rungs that have fewer items than there are; all items come after them."""
        longest = max(map(len, items))
        return tuple(rung for rung in self.rungs if rung < longest)

    def kept(self, entered: int) -> int:
        """Return how many of those that entered a rung go on."""
        return -(-entered // self.eta)

    def cost(self, items: Items, trials: int) -> int:
        """Return the items that a bracket of some trials is scored on at most."""
        total, before, left = 0, 0, trials
        for rung in (*self.stages(items), max(map(len, items))):
            reached = sum(min(rung, len(ids)) for ids in items)
            total += left * (reached - before)
            before, left = reached, self.kept(left)
        return total


def best_first(losses: Sequence[tuple[float, ...]], violations: Sequence[float]) -> tuple[int, ...]:
    """Return the rows from best to worst, by Deb's rule (2000).

    Those that keep their constraints come first, by fronts and, within one, by how lonely they
    are (Deb et al. 2002); then the others, the smaller violation first. Of equals the earlier row.

    Args:
        losses: [n, m].
        violations: of constraints [n].
    """
    sound = [row for row, value in enumerate(violations) if value == 0]
    rest = [row for row, value in enumerate(violations) if value > 0]
    order = ranked([losses[row] for row in sound])
    return (*(sound[place] for place in order), *sorted(rest, key=lambda row: violations[row]))
