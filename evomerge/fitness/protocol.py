"""What a fitness is: objectives and items without a model, item scores with one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from evomerge.fitness.aggregate import Aggregate
from evomerge.trial import Objective, Score


@dataclass(frozen=True, slots=True)
class Live:
    """A model whose weights change between scorings, and what can be asked about them.

    Attributes:
        model: a live transformers model in evaluation mode; it holds the base's weights when a
            fitness is attached to it.
        tokenizer: its tokenizer (a transformers one).
        batch_size: prompts per forward pass of lm-eval's own code.
        batch_tokens: tokens per forward pass of ours; None to find it.
        put: writes the weights of ``base`` or of the named expert into the model. What is
            scored later is written over them.
        distance: returns how far the model is from the base: ``l1``, the mean over all weights
            of the sum of |coefficients|, or ``l2``, ||W - W0|| / ||W0||.
        found: ``batch_tokens`` is what an earlier run found by its memory, not what was asked for:
            it may shrink where it does not fit any more, and is not for what has a size of its own.
        share: of a GPU that may be filled; other workers have the rest.
    """

    model: Any
    tokenizer: Any
    batch_size: int
    batch_tokens: int | None
    put: Callable[[str], None]
    distance: Callable[[str], float]
    found: bool = False
    share: float = 1.0


#: The score of an objective that is asked for no items: another one needs them.
NOTHING = Score(0.0, 0.0, ())


class Scorer(Protocol):
    """Scores the weights that a live model holds now."""

    def score(self, items: Sequence[Sequence[str]]) -> tuple[Score, ...]:
        """Score the model as it is now.

        Args:
            items: ids to score for each objective [m][I], each id once; none where an
                objective's scores are known already.

        Returns:
            one score per objective [m]; ``NOTHING`` where no items were asked for.

        Raises:
            TaskError: ids that there are not.
            EvaluationError: a score is not a number.
        """
        ...

    def facts(self) -> Mapping[str, str]:
        """Return what decides the last bits of the scores, for the record."""
        ...


class Fitness(Protocol):
    """Some objectives, known without any model; nothing of it is heavy."""

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """[m]."""
        ...

    @property
    def item_ids(self) -> tuple[tuple[str, ...], ...]:
        """All items of each objective [m][I]."""
        ...

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """How the value of each objective is made of item scores [m]."""
        ...

    @property
    def sources(self) -> tuple[str | None, ...]:
        """What the items of each objective are drawn from [m].

        Objectives of one source are divided alike, so that one answer of the model serves all.
        None where there is nothing to draw: every split is the one item.
        """
        ...

    @property
    def ungraded(self) -> tuple[str, ...]:
        """Why an objective has no margins [m]; empty where each of its items has one."""
        ...

    @property
    def digest(self) -> str:
        """Identity of what is asked and how it is scored; not of where it lies."""
        ...

    def attach(self, live: Live) -> Scorer:
        """Return what scores a live model.

        Raises:
            InputError: the model cannot be scored so.
        """
        ...
