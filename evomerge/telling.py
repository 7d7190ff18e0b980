"""What the searcher is told: losses, and penalties for what failed; and what it tells us back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from evomerge.feasibility import violation
from evomerge.search.protocol import Searcher
from evomerge.study_view import bounded, weighted_mean
from evomerge.trial import Evaluation, Objective, Origin

#: Loss of a failed trial when nothing has succeeded yet. Scores are fractions, nats or counts;
#: this is worse than all of them, and small enough that squares stay exact in a float.
PENALTY_WITHOUT_SCALE = 1e6

#: The smallest penalty for a broken constraint, in spreads. It must be visible beside the losses
#: even where the violation is next to nothing.
_LEAST_PENALTY = 0.1


class Teller:
    """Turns results into losses, in the order of telling; remembers best and worst.

    A failed trial is told the worst loss that was measured so far plus the spread of the losses,
    per objective. One that violates a constraint is told, in every objective, the worst loss plus
    ``0.1 + 0.9·v / (1 + v)`` spreads, where v is its violation (``feasibility.violation``). So it
    stands behind everything that was measured before it, ahead of failures, and the less it
    violates the better; no violation, however large, drowns the scale of the losses.

    Args:
        objectives: [m].
        scalarise: tell the weighted mean of the losses instead of all of them.
    """

    def __init__(self, objectives: Sequence[Objective], scalarise: bool) -> None:
        self._objectives = tuple(objectives)
        self._scalarise = scalarise
        self._best: tuple[float, ...] | None = None
        self._worst: tuple[float, ...] | None = None

    def measure(self, evaluation: Evaluation) -> None:
        """Remember the losses of a trial that succeeded."""
        losses = self._losses(evaluation)
        self._best = tuple(map(min, self._best or losses, losses))
        self._worst = tuple(map(max, self._worst or losses, losses))

    def told(self, evaluation: Evaluation) -> tuple[float, ...]:
        """Return the losses of a measured trial; with the penalty where it violates something."""
        excess = violation(self._objectives, evaluation.values)
        if excess == 0:
            return self._losses(evaluation)
        return self._worse(_LEAST_PENALTY + (1 - _LEAST_PENALTY) * excess / (1 + excess))

    def penalty(self) -> tuple[float, ...]:
        """Return the losses of a failed trial."""
        if self._worst is None:
            count = 1 if self._scalarise else len(self._objectives)
            return (PENALTY_WITHOUT_SCALE,) * count
        return self._worse(1.0)

    def _worse(self, spreads: float) -> tuple[float, ...]:
        """Return the worst losses plus so many spreads, which count as 1 where they are 0."""
        assert self._best is not None
        assert self._worst is not None
        pairs = zip(self._best, self._worst, strict=True)
        return tuple(bounded(worst + spreads * ((worst - best) or 1.0)) for best, worst in pairs)

    def _losses(self, evaluation: Evaluation) -> tuple[float, ...]:
        losses = losses_of(self._objectives, evaluation.values)
        return (weighted_mean(losses, self._objectives),) if self._scalarise else losses


def losses_of(objectives: Sequence[Objective], values: Sequence[float]) -> tuple[float, ...]:
    """Return the losses [m] of values [m]."""
    pairs = zip(objectives, values, strict=True)
    return tuple(objective.loss(value) for objective, value in pairs)


def origin_of(searcher: Searcher, candidate: int, first: int) -> Origin | None:
    """Return the trials that a candidate was made from, where the searcher says so.

    Args:
        searcher: that asked for it.
        candidate: its id.
        first: number of the trial of candidate 0.
    """
    say: Callable[[int], Origin | None] = getattr(searcher, "origin", lambda _: None)
    origin = say(candidate)
    if origin is None:
        return None
    return Origin(tuple(first + parent for parent in origin.parents), origin.how)


def facts_of(searcher: Searcher, first: int) -> dict[str, str]:
    """Return what a searcher says of its work, with the numbers of trials for its candidates.

    Args:
        searcher: any.
        first: number of the trial of candidate 0.
    """
    say: Callable[[], Mapping[str, str]] = getattr(searcher, "facts", dict)
    return {
        key: re.sub(r"\bcandidate (\d+)", lambda found: f"trial {first + int(found[1])}", text)
        for key, text in say().items()
    }
