"""The searchers by the name that a study file uses, and how to build one.

Searchers from other packages join through the entry-point group ``evomerge.searchers``; each
entry point loads to a ``SearcherEntry`` of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from math import isfinite
from types import MappingProxyType

from threadpoolctl import threadpool_limits

from evomerge.errors import InputError, SetupError, suggest
from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told

#: The entry-point group for searchers of other packages.
GROUP = "evomerge.searchers"

ArgumentValue = bool | int | float | None
Build = Callable[[SearchProblem, Mapping[str, ArgumentValue]], Searcher]


@dataclass(frozen=True, slots=True)
class ArgumentSpec:
    """One argument of a searcher.

    Attributes:
        type: ``bool``, ``int`` or ``float``; an int is accepted where a float is expected.
        default: None when the searcher chooses by the problem, as ``help`` says.
        low: smallest valid value; None for no bound.
        high: largest valid value; None for no bound.
        help: one line for the user.
    """

    type: type[bool] | type[int] | type[float]
    default: ArgumentValue
    low: float | None
    high: float | None
    help: str

    @property
    def expected(self) -> str:
        """What the user may write, e.g. ``float in [0.001, 1]``."""
        if self.low is None and self.high is None:
            return self.type.__name__
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{self.type.__name__} in [{low}, {high}]"

    def accepts(self, value: object) -> bool:
        """Return whether ``value`` has the type and lies in the range."""
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        if not isinstance(value, int | float) or not isfinite(value):
            return False
        if self.type is int and not isinstance(value, int):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


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
    """

    name: str
    library: str
    summary: str
    multi_objective: bool
    generational: bool
    arguments: Mapping[str, ArgumentSpec]
    build: Build


def _nevergrad(function: str) -> Build:
    """Return a builder that imports nevergrad when it is called."""

    def build(problem: SearchProblem, arguments: Mapping[str, ArgumentValue]) -> Searcher:
        from evomerge.search import ng

        with threadpool_limits(1):  # here again: the import has loaded further libraries
            searcher: Searcher = getattr(ng, function)(problem, arguments)
        return searcher

    return build


def _pymoo(function: str) -> Build:
    """Return a builder that imports pymoo when it is called."""

    def build(problem: SearchProblem, arguments: Mapping[str, ArgumentValue]) -> Searcher:
        from evomerge.search import moo

        with threadpool_limits(1):
            searcher: Searcher = getattr(moo, function)(problem, arguments)
        return searcher

    return build


# 1/6 puts the faces of the box three standard deviations from its centre; it is the value of
# the published coefficient searches (Akiba et al. 2024, mergekit-evolve).
_SIGMA = ArgumentSpec(float, 1 / 6, 1e-3, 1.0, "initial standard deviation in the unit box")
_CMA_POPULATION = ArgumentSpec(
    int, None, 4, 10_000, "candidates per generation; default 4 + 3 ln d, at least `parallel`"
)
_GENETIC: Mapping[str, ArgumentSpec] = MappingProxyType(
    {
        "population": ArgumentSpec(
            int, None, 4, 10_000, "members; default an eighth of the budget, 16 to 40"
        ),
        "crossover_eta": ArgumentSpec(
            float, 15.0, 0.0, 1000.0, "SBX distribution index; larger stays nearer the parents"
        ),
        "mutation_eta": ArgumentSpec(
            float, 20.0, 0.0, 1000.0, "polynomial mutation index; larger mutates less"
        ),
    }
)

SEARCHERS: Mapping[str, SearcherEntry] = MappingProxyType(
    {
        "cma": SearcherEntry(
            "cma",
            "nevergrad",
            "CMA-ES; one objective, any number of workers without waiting",
            multi_objective=False,
            generational=False,
            arguments={
                "sigma": _SIGMA,
                "population": _CMA_POPULATION,
                "diagonal": ArgumentSpec(
                    bool, None, None, None, "diagonal covariance; default above 1000 dimensions"
                ),
            },
            build=_nevergrad("cma"),
        ),
        "de": SearcherEntry(
            "de",
            "nevergrad",
            "differential evolution with two-point crossover; baselines join its population",
            multi_objective=False,
            generational=False,
            arguments={
                "population": ArgumentSpec(
                    int, None, 4, 10_000, "members; default an eighth of the budget, 8 to 30"
                ),
                "weight": ArgumentSpec(float, 0.8, 0.0, 2.0, "differential weights F1 and F2"),
            },
            build=_nevergrad("differential_evolution"),
        ),
        "oneplusone": SearcherEntry(
            "oneplusone",
            "nevergrad",
            "(1+1)-ES; for very small budgets",
            multi_objective=False,
            generational=False,
            arguments={"sigma": _SIGMA},
            build=_nevergrad("one_plus_one"),
        ),
        "random": SearcherEntry(
            "random",
            "nevergrad",
            "uniform random search; the control that others must beat",
            multi_objective=False,
            generational=False,
            arguments={},
            build=_nevergrad("random"),
        ),
        "nsga2": SearcherEntry(
            "nsga2",
            "pymoo",
            "NSGA-II; several objectives, finds a Pareto front",
            multi_objective=True,
            generational=True,
            arguments=_GENETIC,
            build=_pymoo("nsga2"),
        ),
        "ga": SearcherEntry(
            "ga",
            "pymoo",
            "elitist genetic algorithm; one objective",
            multi_objective=False,
            generational=True,
            arguments=_GENETIC,
            build=_pymoo("genetic"),
        ),
        "pymoo-cmaes": SearcherEntry(
            "pymoo-cmaes",
            "pymoo",
            "CMA-ES generation by generation (SimpleCMAES); the completion order does not matter",
            multi_objective=False,
            generational=True,
            arguments={"sigma": _SIGMA, "population": _CMA_POPULATION},
            build=_pymoo("cmaes"),
        ),
    }
)


def searcher_names() -> tuple[str, ...]:
    """Return every valid name, sorted, without importing any searcher.

    Raises:
        SetupError: a name is registered twice.
    """
    return tuple(sorted([*SEARCHERS, *_plugins()]))


def find_searcher(name: str) -> SearcherEntry:
    """Return the entry of ``name``.

    Raises:
        InputError: unknown name.
        SetupError: a name is registered twice, or the package that offers it is broken.
    """
    plugins = _plugins()
    if name in SEARCHERS:
        return SEARCHERS[name]
    if name in plugins:
        return _loaded(plugins[name])
    raise InputError(f"searcher: unknown {name!r}{suggest(name, [*SEARCHERS, *plugins])}")


def argument_problems(name: str, arguments: Mapping[str, object]) -> tuple[str, ...]:
    """Return what is wrong with the arguments of searcher ``name``, one line each.

    Each line begins with the argument's name, so that the caller can put a dotted path before.

    Raises:
        InputError: unknown searcher.
        SetupError: as in ``find_searcher``.
    """
    specs = find_searcher(name).arguments
    problems = []
    for key, value in arguments.items():
        if key not in specs:
            remedy = suggest(key, specs) if specs else f" ({name} takes no arguments)"
            problems.append(f"{key}: unknown argument of searcher {name!r}{remedy}")
        elif value is None and specs[key].default is None:
            continue
        elif not specs[key].accepts(value):
            problems.append(f"{key}: expected {specs[key].expected}, got {value!r}")
    return tuple(problems)


def check_arguments(name: str, arguments: Mapping[str, object]) -> dict[str, ArgumentValue]:
    """Return the arguments of searcher ``name``, completed by its defaults.

    Raises:
        InputError: unknown searcher or argument, wrong type, or out of range; names the
            nearest valid name or the expected range, all problems together.
        SetupError: as in ``find_searcher``.
    """
    problems = argument_problems(name, arguments)
    if problems:
        raise InputError("\n".join(f"searcher {name!r}: {problem}" for problem in problems))
    complete: dict[str, ArgumentValue] = {}
    for key, spec in find_searcher(name).arguments.items():
        value = arguments.get(key, spec.default)
        assert value is None or isinstance(value, bool | int | float)
        complete[key] = float(value) if spec.type is float and value is not None else value
    return complete


class _OneThread:
    """A searcher whose linear algebra runs on one thread.

    BLAS rounds differently on another number of threads, and a resumed study must repeat every
    ask bit for bit, wherever it goes on.
    """

    def __init__(self, inner: Searcher) -> None:
        self._inner = inner

    def ask(self, n: int) -> Sequence[Candidate]:
        """See ``Searcher.ask``."""
        with threadpool_limits(1):
            return self._inner.ask(n)

    def tell(self, results: Sequence[Told]) -> None:
        """See ``Searcher.tell``."""
        with threadpool_limits(1):
            self._inner.tell(results)


def make_searcher(name: str, arguments: Mapping[str, object], problem: SearchProblem) -> Searcher:
    """Return a fresh searcher for ``problem``.

    What it asks does not depend on the number of threads of the numerical libraries.

    Raises:
        InputError: as in ``check_arguments``, or several objectives for a searcher of one.
        SetupError: as in ``find_searcher``.
        ValueError: the problem is malformed.
    """
    entry = find_searcher(name)
    complete = check_arguments(name, arguments)
    _check_problem(problem)
    if problem.objectives > 1 and not entry.multi_objective:
        several = [key for key, other in SEARCHERS.items() if other.multi_objective]
        raise InputError(
            f"searcher {name!r} takes one objective, the problem has {problem.objectives} "
            f"(search their weighted sum, or choose from: {', '.join(several)})"
        )
    with threadpool_limits(1):
        return _OneThread(entry.build(problem, complete))


def _plugins() -> dict[str, EntryPoint]:
    """Return the entry points of other packages by name.

    Raises:
        SetupError: a name is registered twice.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        if point.name in SEARCHERS or point.name in found:
            other = found[point.name].value if point.name in found else "evomerge itself"
            raise SetupError(
                f"searcher {point.name!r} is registered twice: by {other} and by {point.value} "
                f"(entry-point group {GROUP}); uninstall one of the packages"
            )
        found[point.name] = point
    return found


def _loaded(point: EntryPoint) -> SearcherEntry:
    """Return the entry behind an entry point.

    Raises:
        SetupError: it cannot be imported, or is not an entry of that name.
    """
    try:
        entry = point.load()
    except (ImportError, AttributeError) as error:
        raise SetupError(
            f"searcher {point.name!r}: cannot load {point.value} ({error}); "
            "repair or uninstall the package that offers it"
        ) from error
    if not isinstance(entry, SearcherEntry) or entry.name != point.name:
        raise SetupError(
            f"searcher {point.name!r}: {point.value} must be a SearcherEntry named "
            f"{point.name!r}, got {entry!r}"
        )
    return entry


def _check_problem(problem: SearchProblem) -> None:
    """Refuse a problem that no searcher can work on.

    Raises:
        ValueError: a size below 1, a negative seed, or a warm point of the wrong shape.
    """
    for field in ("dimension", "objectives", "budget", "parallel"):
        if getattr(problem, field) < 1:
            raise ValueError(f"SearchProblem.{field}: expected >= 1, got {getattr(problem, field)}")
    if problem.seed < 0:
        raise ValueError(f"SearchProblem.seed: expected >= 0, got {problem.seed}")
    for index, point in enumerate(problem.warm):
        if len(point.x) != problem.dimension or len(point.losses) != problem.objectives:
            raise ValueError(
                f"SearchProblem.warm[{index}]: expected x [{problem.dimension}] and losses "
                f"[{problem.objectives}], got [{len(point.x)}] and [{len(point.losses)}]"
            )
        if not all(0.0 <= value <= 1.0 for value in point.x):
            raise ValueError(f"SearchProblem.warm[{index}].x: expected values in [0, 1]")
        if not all(isfinite(loss) for loss in point.losses):
            raise ValueError(f"SearchProblem.warm[{index}].losses: expected finite values")
