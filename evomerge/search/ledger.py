"""Which candidates were asked and which were told: the bookkeeping of every searcher."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike

from evomerge.errors import CallOrderError
from evomerge.search.kinds import snap
from evomerge.search.protocol import Candidate, SearchProblem, Told


class Ledger:
    """Numbers candidates and refuses results that do not belong to them.

    Attributes:
        outstanding: candidates asked and not told, by id, in the order of asking.
    """

    def __init__(self, problem: SearchProblem) -> None:
        self._dimension = problem.dimension
        self._objectives = problem.objectives
        self._kinds = problem.kinds
        self._asked = 0
        self.outstanding: dict[int, Candidate] = {}

    def issue(self, x: ArrayLike) -> Candidate:
        """Return the next candidate, at ``x`` [d] clipped to the unit box.

        Where a dimension has levels, it is at the middle of one: see ``SearchProblem.kinds``.
        """
        point = np.asarray(x, dtype=np.float64)
        if point.shape != (self._dimension,) or not np.isfinite(point).all():
            raise AssertionError(f"expected a finite point [{self._dimension}], got {point!r}")
        # Adding 0.0 turns -0.0 into 0.0, so that equal points also look equal in the journal.
        inside = snap(np.clip(point, 0.0, 1.0) + 0.0, self._kinds)
        candidate = Candidate(self._asked, tuple(inside.tolist()))
        self._asked += 1
        self.outstanding[candidate.id] = candidate
        return candidate

    def settle(self, results: Sequence[Told]) -> None:
        """Take ``results`` off the outstanding candidates; all of them or, on error, none.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, or a loss that is not finite.
        """
        seen: dict[int, None] = {}
        for told in results:
            if not 0 <= told.id < self._asked:
                raise CallOrderError(
                    f"tell: candidate {told.id} was never asked (asked so far: {self._asked}); "
                    "tell only ids that ask returned"
                )
            if told.id not in self.outstanding or told.id in seen:
                raise CallOrderError(
                    f"tell: candidate {told.id} was told already; tell each candidate once"
                )
            seen[told.id] = None
            self._check_losses(told)
        for told in results:
            del self.outstanding[told.id]

    def _check_losses(self, told: Told) -> None:
        """Refuse losses of the wrong number or kind."""
        if len(told.losses) != self._objectives:
            raise ValueError(
                f"tell: candidate {told.id} needs {self._objectives} losses [m], "
                f"got {len(told.losses)}: {told.losses}"
            )
        if not all(isfinite(loss) for loss in told.losses):
            raise ValueError(
                f"tell: candidate {told.id} has losses {told.losses}, which are not all finite; "
                "give a failed trial a finite penalty and set failed=True"
            )


def check_count(n: int) -> None:
    """Refuse a negative number of candidates.

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"ask: expected n >= 0 candidates, got {n}")
