"""Searchers that think in rounds: a design first, then batches that a surrogate proposes.

A round is handed out piecewise and its results may arrive in any order, but the next round sees
all of them in ask order, so neither speed nor number of workers changes a search. Failed trials
are known to have failed: their penalties never reach a surrogate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.search.kinds import snap
from evomerge.search.ledger import Ledger, check_count
from evomerge.search.protocol import Candidate, SearchProblem, Told

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What was measured: warm points first, then candidates in ask order.

    Attributes:
        points: that succeeded [n, d].
        losses: of them [n, m]; none is beyond the ``fence``.
        failed: points that did not succeed [f, d].
        told: candidates told so far, failed ones counted, warm points not.
        warm: how many of ``points`` are warm points.
    """

    points: Array
    losses: Array
    failed: Array
    told: int
    warm: int


@dataclass(frozen=True)
class Proposal:
    """The next round.

    Attributes:
        points: to evaluate [q, d], q >= 1.
        predicted: their losses as the surrogate expects them [q, m]; None without a surrogate.
    """

    points: Array
    predicted: Array | None = None


class Proposer(Protocol):
    """What decides about the rounds."""

    def propose(self, known: Known) -> Proposal:
        """Return the next round; called when every candidate of the last one was told."""
        ...

    def facts(self) -> Mapping[str, str]:
        """Return what a user should know, by a short name."""
        ...


class RoundSearcher:
    """Ask/tell over a proposer; keeps what was predicted beside what came out."""

    def __init__(self, problem: SearchProblem, proposer: Proposer) -> None:
        self._problem = problem
        self._proposer = proposer
        self._ledger = Ledger(problem)
        self._points: Array = np.empty((0, problem.dimension))
        self._predicted: Array | None = None
        self._ids: list[int] = []  # of this round, in ask order
        self._told: dict[int, Told] = {}
        self._archive: list[tuple[tuple[float, ...], Told]] = []
        self._fence: Array = np.full(problem.objectives, np.inf)
        self._compared: list[tuple[Array, Array]] = []  # measured and predicted losses [m]

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return up to ``n`` candidates of this round; none while it waits.

        Raises:
            ValueError: ``n`` is negative.
        """
        check_count(n)
        if n and len(self._told) == len(self._points):
            self._next_round()
        first = len(self._ids)
        candidates = tuple(self._ledger.issue(x) for x in self._points[first : first + n])
        self._ids.extend(candidate.id for candidate in candidates)
        return candidates

    def tell(self, results: Sequence[Told]) -> None:
        """Store results; the proposer sees them when the round is complete.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, or a loss that is not finite.
        """
        self._ledger.settle(results)
        for told in results:
            self._told[told.id] = told

    def facts(self) -> Mapping[str, str]:
        """Return what the proposer says, and how good its predictions were.

        Predictions are compared with measurements only after they were made, so no point ever
        helped to predict itself. Proposals are chosen where the surrogate is optimistic, so this
        error is larger than a leave-one-out error, and it is the one that counts for a front.
        """
        facts = dict(self._proposer.facts())
        compared = [*self._compared, *self._comparisons()]
        if compared:
            facts["prediction error"] = _prediction_error(compared)
        return facts

    def _comparisons(self) -> list[tuple[Array, Array]]:
        """Return measured and predicted losses [m] of this round's results so far."""
        if self._predicted is None:
            return []
        rows = [(row, self._told.get(id_)) for row, id_ in enumerate(self._ids)]
        return [
            (np.array(told.losses), self._predicted[row])
            for row, told in rows
            if told is not None and not told.failed
        ]

    def _next_round(self) -> None:
        self._compared += self._comparisons()
        for row, id_ in enumerate(self._ids):
            told = self._told[id_]
            point = tuple(self._points[row].tolist())
            self._archive.append((point, told))
        proposal = self._proposer.propose(self._known())
        assert len(proposal.points), "a round needs at least one point"
        # What is archived is what was asked, and that lies in the middle of a level.
        self._points = snap(np.clip(proposal.points, 0.0, 1.0), self._problem.kinds)
        self._predicted = proposal.predicted
        self._ids, self._told = [], {}

    def _known(self) -> Known:
        problem = self._problem
        good = [(point, told.losses) for point, told in self._archive if not told.failed]
        rows = [(point.x, point.losses) for point in problem.warm] + good
        losses = np.array([y for _, y in rows], np.float64).reshape(-1, problem.objectives)
        if self._archive:  # baselines and design say what an outlier is for the whole search
            self._fence = np.where(np.isinf(self._fence), fence(losses), self._fence)
        failed = [point for point, told in self._archive if told.failed]
        return Known(
            points=np.array([x for x, _ in rows], np.float64).reshape(-1, problem.dimension),
            losses=np.minimum(losses, self._fence),
            failed=np.array(failed, np.float64).reshape(-1, problem.dimension),
            told=len(self._archive),
            warm=len(problem.warm),
        )


def fence(losses: Array) -> Array:
    """Return beyond which loss of each objective [m] a merge is an outlier.

    A broken merge may score thousands of times worse than all others. Its value would stretch
    the scale of a hypervolume, and the variance of a process, until the rest look alike. The
    fence stands three times the distance from the best to the upper quartile beyond the latter
    (Tukey's outer fence, from the best instead of the lower quartile); nowhere for less than
    four points, or where three quarters are level.

    Args:
        losses: [n, m], finite.
    """
    if len(losses) < 4:
        return np.full(losses.shape[1], np.inf)
    best, upper = losses.min(axis=0), np.quantile(losses, 0.75, axis=0, method="lower")
    with np.errstate(over="ignore"):
        return np.where(upper > best, upper + 3.0 * (upper - best), np.inf)


def _prediction_error(compared: Sequence[tuple[Array, Array]]) -> str:
    """Return how far predictions were off, for measured and predicted losses [m] of each."""
    measured = np.array([true for true, _ in compared])  # [k, m]
    errors = measured - np.array([predicted for _, predicted in compared])
    parts = [
        f"{np.sqrt((column**2).mean()):.3g} (bias {column.mean():+.2g}, spread {true.std():.2g})"
        for column, true in zip(errors.T, measured.T, strict=True)
    ]
    return f"rms on {len(errors)} proposals, per objective: " + "; ".join(parts)
