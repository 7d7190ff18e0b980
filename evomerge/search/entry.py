"""What the registry knows of a searcher: its name, its arguments and how to build it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import isfinite

from threadpoolctl import threadpool_limits

from evomerge.search.protocol import Searcher, SearchProblem

ArgumentValue = bool | int | float | str | None
Build = Callable[[SearchProblem, Mapping[str, ArgumentValue]], Searcher]


@dataclass(frozen=True, slots=True)
class ArgumentSpec:
    """One argument of a searcher.

    Attributes:
        type: ``bool``, ``int``, ``float`` or ``str``; an int is accepted where a float is
            expected.
        default: None when the searcher chooses by the problem, as ``help`` says.
        low: smallest valid value; None for no bound.
        high: largest valid value; None for no bound.
        help: one line for the user.
        choices: the valid texts; any text when there are none.
    """

    type: type[bool] | type[int] | type[float] | type[str]
    default: ArgumentValue
    low: float | None
    high: float | None
    help: str
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What the user may write, e.g. ``float in [0.001, 1]``."""
        if self.type is str:
            return f"one of {', '.join(self.choices)}" if self.choices else "text"
        if self.low is None and self.high is None:
            return self.type.__name__
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{self.type.__name__} in [{low}, {high}]"

    def accepts(self, value: object) -> bool:
        """Return whether ``value`` has the type and lies in the range or among the choices."""
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        if self.type is str or isinstance(value, str):
            known = value in self.choices if self.choices else value != ""
            return self.type is str and isinstance(value, str) and known
        if not isinstance(value, int | float) or not isfinite(value):
            return False
        if self.type is int and not isinstance(value, int):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def choice(default: str, text: str, *others: str) -> ArgumentSpec:
    """Return an argument that is one of several texts, the default first."""
    return ArgumentSpec(str, default, None, None, text, (default, *others))


@dataclass(frozen=True, slots=True)
class SearcherEntry:
    """A searcher that a study file can name.

    Attributes:
        name: as in the study file.
        library: the package behind it.
        summary: one line for ``evomerge list``.
        multi_objective: takes several losses; others get one scalar from the study.
        generational: candidates depend on whole generations, not on the completion order.
        arguments: by name.
        build: makes the searcher; imports its library only then. Arguments are complete.
        single_objective: also takes a single loss.
        ends: whether it proposes nothing beyond the budget that it was built for, by its
            arguments; others go on when a study is extended.
    """

    name: str
    library: str
    summary: str
    multi_objective: bool
    generational: bool
    arguments: Mapping[str, ArgumentSpec]
    build: Build
    single_objective: bool = True
    ends: Callable[[Mapping[str, ArgumentValue]], bool] = lambda arguments: False


def builder(module: str, function: str) -> Build:
    """Return a builder that imports a module of this package only when it is called."""

    def build(problem: SearchProblem, arguments: Mapping[str, ArgumentValue]) -> Searcher:
        found = import_module(f"evomerge.search.{module}")
        with threadpool_limits(1):  # here again: the import has loaded further libraries
            searcher: Searcher = getattr(found, function)(problem, arguments)
        return searcher

    return build


# 1/6 puts the faces of the box three standard deviations from its centre; it is the value of
# the published coefficient searches (Akiba et al. 2024, mergekit-evolve).
SIGMA = ArgumentSpec(float, 1 / 6, 1e-3, 1.0, "initial standard deviation in the unit box")
CMA_POPULATION = ArgumentSpec(
    int, None, 4, 10_000, "candidates per generation; default 4 + 3 ln d, at least `parallel`"
)
