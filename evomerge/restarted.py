"""A search that goes on with a fresh searcher: what becomes of the trials before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import ReplayError
from evomerge.halving import Halving
from evomerge.items import Chosen, TrialItems
from evomerge.restart_record import EARLIER, Restart
from evomerge.search.protocol import Candidate, Searcher, Told, WarmPoint
from evomerge.search.registry import ends_with_budget
from evomerge.study_record import History, Limit
from evomerge.trial import Evaluation, Trial
from evomerge.window import Window

if TYPE_CHECKING:
    from evomerge.study import Study


@dataclass(frozen=True, slots=True)
class Asker:
    """A searcher, and what its numbers are those of.

    Attributes:
        searcher: that is asked.
        first: number of the first search trial.
        began: number of the trial that is its candidate 0.
        draws: what is added to its generations.
    """

    searcher: Searcher
    first: int
    began: int
    draws: int

    @property
    def generation(self) -> int | None:
        """Of the candidate that was asked last; None where the searcher knows none."""
        generation: int | None = getattr(self.searcher, "generation", None)
        return None if generation is None else generation + self.draws


class NoSearcher:
    """Stands for a searcher where the budget leaves it nothing to ask."""

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return no candidate."""
        return ()

    def tell(self, results: Sequence[Told]) -> None:
        """Never called: nothing was asked."""
        raise AssertionError(results)


def earlier(history: History, restart: Restart, first: int) -> Iterator[Trial]:
    """Yield the search trials that others than the last searcher asked, ``first`` first."""
    for number in range(first, restart.trial):
        yield history.trials[number]


def chosen_earlier(items: TrialItems, history: History, number: int, first: int) -> Chosen:
    """Return what a trial before a restart is scored on; it races no more.

    Raises:
        ReplayError: an estimator now chooses other items than those that it was asked for.
    """
    recorded = history.items_of("search", number)
    if items.design is None:
        return Chosen(recorded)
    chosen = items.of(number - first, None)
    if chosen.items != recorded:
        raise ReplayError(
            f"trial {number}: the estimator chose other items for it when it was asked, so that "
            "estimates of then and now are not of one kind",
            number,
        )
    return chosen


def warm_points(
    history: History, restart: Restart, told: Callable[[Evaluation], tuple[float, ...]]
) -> tuple[WarmPoint, ...]:
    """Return all points with a result before a restart, each once; the first trial gives it.

    Baselines keep the label that the study finds for them; search trials are ``trial <number>``.
    """
    points: dict[tuple[float, ...], WarmPoint] = {}
    for number in range(restart.trial):
        trial, result = history.trials[number], history.results.get(("search", number))
        if trial.x is None or result is None or not isinstance(result.value, Evaluation):
            continue
        label = "" if trial.kind == "baseline" else f"{EARLIER}{number}"
        points.setdefault(trial.x, WarmPoint(trial.x, told(result.value), label))
    return tuple(points.values())


def left(window: Window, limits: Sequence[Limit], restart: Restart) -> int:
    """Return the budget of a fresh searcher: what was left, or what the first extension gave.

    0 where nothing is left. Later extensions change it no more than they do in other searches.
    """
    for limit in limits[restart.limits - 1 :]:
        trials = window.left(limit)
        if trials > 0:
            return trials
    return 0


def draws_before(history: History, restart: Restart, first: int) -> int:
    """Return what is added to a fresh searcher's generations, so that they draw fresh items.

    0 where all trials shared their items: those of a searcher without generations are compared.
    """
    sets = {history.set_of.get(number) for number in range(first, restart.trial)}
    return len(sets) if len(sets) > 1 else 0


def restart_problem(study: Study) -> str:
    """Return why a study cannot go on with a fresh searcher; empty where it can."""
    if isinstance(study.racing, Halving):
        return (
            "search.racing: a bracket of a search that halves is scored and told as a whole, and "
            "one that is cut in two would compare what cannot be compared"
        )
    if study.estimation is not None and study.estimation.refresh == "generation":
        return (
            "fitness.estimator.refresh: generation: the items of a trial follow from the "
            "generations of the searcher that is to be replaced"
        )
    identity: Mapping[str, Any] = study.contract()["identity"]
    name, arguments = str(identity.get("searcher")), identity.get("arguments", {})
    if name == "m2n2" and arguments.get("experts_only"):
        return (
            "search.arguments.experts_only: its archive takes the experts only, so a fresh one "
            "would know nothing of what was found"
        )
    if name == "nested_map":
        return "search.searcher: nested_map merges the experts pair by pair, from the beginning"
    if ends_with_budget(name, arguments):
        return f"search.searcher: {name} lays all its points out before the first one is scored"
    return ""
