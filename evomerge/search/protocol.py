"""The contract between the study and every searcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class WarmPoint:
    """A point whose losses are known before the search starts (a baseline).

    Attributes:
        x: in the unit box [d].
        losses: smaller is better, finite [m].
    """

    x: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SearchProblem:
    """Everything that a searcher may know.

    Attributes:
        dimension: d >= 1; the box is [0, 1]^d.
        objectives: m >= 1; every loss is minimised.
        budget: candidates that will be asked in all, known in advance.
        parallel: how many candidates may be outstanding; part of the replay contract, so it
            does not follow the size of the cluster.
        seed: of everything random in the searcher.
        warm: baselines, best used as starting points; may be empty.
    """

    dimension: int
    objectives: int
    budget: int
    parallel: int
    seed: int
    warm: tuple[WarmPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point to evaluate.

    Attributes:
        id: 0, 1, 2, ... in the order of asking, unique in this searcher.
        x: in the unit box [d], finite.
    """

    id: int
    x: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Told:
    """What became of a candidate.

    Attributes:
        id: of the candidate.
        losses: smaller is better, always finite [m]; for a failed trial the study puts a
            penalty here and sets ``failed``.
        failed: the losses are a penalty, not a measurement.
        items: item scores per objective [m][I], for searchers that need them; else empty.
    """

    id: int
    losses: tuple[float, ...]
    failed: bool = False
    items: tuple[tuple[float, ...], ...] = ()


class Searcher(Protocol):
    """The optimizer.

    Deterministic: the same problem, arguments and sequence of ``ask`` and ``tell`` calls give
    the same candidates bit for bit, in any process. The study resumes by replaying the calls.
    """

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return up to ``n`` new candidates.

        Returns fewer, or none, when it must first be told about outstanding ones (a generation
        is not complete), or when it has nothing left to propose (nothing is outstanding either).
        """
        ...

    def tell(self, results: Sequence[Told]) -> None:
        """Learn from results, in the order given.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, or a loss that is not finite.
        """
        ...
