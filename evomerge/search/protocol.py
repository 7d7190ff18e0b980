"""The contract between the study and every searcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.space import Kind


@dataclass(frozen=True, slots=True)
class WarmPoint:
    """A point whose losses are known before the search starts (a baseline).

    Attributes:
        x: in the unit box [d].
        losses: smaller is better, finite [m].
        label: what it is (``base``, ``expert:<name>``, ...); empty when that is not known.
    """

    x: tuple[float, ...]
    losses: tuple[float, ...]
    label: str = ""


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
        groups: what each dimension is [d]: the searched column (``weight.<expert>``) and the
            block that it belongs to, blocks in canonical order; empty when that is not known.
        start: a point to start from [d], where the user named one.
        noise: standard error to expect in a loss, in its unit; None when that is not known.
        ranges: the coefficient at 0 and at 1 of each dimension [d]; empty when that is not known.
        grams: inner products of what the searched columns of each block multiply [B][C][C],
            where merges are linear in them; empty when they are not known.
        kinds: what each dimension is [d]; empty where all are real. Candidates lie in the middle
            of the bins of what is not (``Ledger`` sees to it), and so do warm points and start.
        item_weights: of each task in ``Told.items``, negative where smaller scores are better;
            empty for 1 each.
    """

    dimension: int
    objectives: int
    budget: int
    parallel: int
    seed: int
    warm: tuple[WarmPoint, ...] = ()
    groups: tuple[tuple[str, str], ...] = ()
    start: tuple[float, ...] | None = None
    noise: float | None = None
    ranges: tuple[tuple[float, float], ...] = ()
    grams: tuple[tuple[tuple[float, ...], ...], ...] = ()
    item_weights: tuple[float, ...] = ()
    kinds: tuple[Kind, ...] = ()


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
        items: item scores per objective [m][I], for searchers that need them; those of all
            results are for the same items; empty where there are none, or only for other items
            (a race stopped the trial).
    """

    id: int
    losses: tuple[float, ...]
    failed: bool = False
    items: tuple[tuple[float, ...], ...] = ()


class Searcher(Protocol):
    """The optimizer.

    Deterministic: the same problem, arguments and sequence of ``ask`` and ``tell`` calls give
    the same candidates bit for bit, in any process. The study resumes by replaying the calls.

    A searcher may also have ``facts() -> Mapping[str, str]``: what a user should know about its
    work, by short names. The study writes them down and shows them; they must not change what is
    asked. And it may have ``generation: int``, the number of the generation that the candidate
    which was asked last belongs to: candidates of one generation are scored on the same items.
    And it may have ``origin(candidate: int) -> Origin | None``: the candidates that one was made
    from, all by id. The study writes them down as trials.
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
