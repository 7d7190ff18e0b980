"""Several fitnesses as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain

from evomerge.errors import TaskError
from evomerge.fitness.aggregate import Aggregate
from evomerge.fitness.protocol import NOTHING, Fitness, Live, Scorer
from evomerge.trial import Objective, Score


class Composite:
    """The objectives of some fitnesses, one after the other.

    Args:
        parts: at least one objective together.

    Raises:
        TaskError: two objectives have one name.
    """

    def __init__(self, parts: Sequence[Fitness]) -> None:
        self.parts = tuple(parts)
        names = [objective.name for objective in self.objectives]
        for name in names:
            if names.count(name) > 1:
                raise TaskError(
                    f"objectives: {name!r} is the name of two objectives "
                    "(give one a name of its own)"
                )

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """[m]."""
        return tuple(chain.from_iterable(part.objectives for part in self.parts))

    @property
    def item_ids(self) -> tuple[tuple[str, ...], ...]:
        """All items of each objective [m][I]."""
        return tuple(chain.from_iterable(part.item_ids for part in self.parts))

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """How the value of each objective is made of item scores [m]."""
        return tuple(chain.from_iterable(part.aggregates for part in self.parts))

    @property
    def sources(self) -> tuple[str | None, ...]:
        """What the items of each objective are drawn from [m]."""
        return tuple(chain.from_iterable(part.sources for part in self.parts))

    @property
    def ungraded(self) -> tuple[str, ...]:
        """Why an objective has no margins [m]; empty where each of its items has one."""
        return tuple(chain.from_iterable(part.ungraded for part in self.parts))

    @property
    def digest(self) -> str:
        """Identity of all parts; of a single one its own."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        text = "\n".join(part.digest for part in self.parts)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def attach(self, live: Live) -> Scorer:
        """Return what scores a live model."""
        sizes = [len(part.objectives) for part in self.parts]
        return _Scorers([part.attach(live) for part in self.parts], sizes)


class _Scorers:
    """The scorers of a composite."""

    def __init__(self, scorers: Sequence[Scorer], sizes: Sequence[int]) -> None:
        self._scorers = tuple(scorers)
        self._sizes = tuple(sizes)

    def score(self, items: Sequence[Sequence[str]]) -> tuple[Score, ...]:
        """Score the model as it is now; see ``Scorer``."""
        if len(items) != sum(self._sizes):
            raise TaskError(
                f"items: expected one list per objective [m={sum(self._sizes)}], got {len(items)}"
            )
        scores: list[Score] = []
        for scorer, size in zip(self._scorers, self._sizes, strict=True):
            asked = items[len(scores) : len(scores) + size]
            scores += scorer.score(asked) if any(asked) else [NOTHING] * size
        return tuple(scores)

    def facts(self) -> Mapping[str, str]:
        """Return the facts of all."""
        return {key: value for scorer in self._scorers for key, value in scorer.facts().items()}
