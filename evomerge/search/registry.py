"""The searchers by the name that a study file uses, and how to build one.

Searchers from other packages join through the entry-point group ``evomerge.searchers``; each
entry point loads to a ``SearcherEntry`` of the same name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import EntryPoint, entry_points
from math import isfinite
from types import MappingProxyType

from threadpoolctl import ThreadpoolController, threadpool_limits

from evomerge.errors import InputError, SetupError, suggest
from evomerge.search.entry import ArgumentSpec, ArgumentValue, SearcherEntry
from evomerge.search.merging_entries import MERGING
from evomerge.search.moo_entries import PYMOO
from evomerge.search.ng_entries import NEVERGRAD
from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told
from evomerge.search.surrogate_entries import SURROGATES
from evomerge.trial import Origin

__all__ = [
    "GROUP",
    "SEARCHERS",
    "ArgumentSpec",
    "ArgumentValue",
    "SearcherEntry",
    "argument_problems",
    "check_arguments",
    "find_searcher",
    "make_searcher",
    "searcher_names",
]

#: The entry-point group for searchers of other packages.
GROUP = "evomerge.searchers"

SEARCHERS: Mapping[str, SearcherEntry] = MappingProxyType(
    {
        **NEVERGRAD,
        **PYMOO,
        **SURROGATES,
        **MERGING,
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
        assert value is None or isinstance(value, bool | int | float | str)
        complete[key] = float(value) if spec.type is float and value is not None else value
    return complete


def ends_with_budget(name: str, arguments: Mapping[str, object]) -> bool:
    """Return whether a searcher lays all its points out for the budget that it was built for.

    Of one that only a study from Python knows nothing is known: False.
    """
    if name not in searcher_names():
        return False
    return find_searcher(name).ends(check_arguments(name, arguments))


class _OneThread:
    """A searcher whose linear algebra runs on one thread.

    BLAS rounds differently on another number of threads, and a resumed study must repeat every
    ask bit for bit, wherever it goes on.
    """

    def __init__(self, inner: Searcher) -> None:
        self._inner = inner
        self._modules = 0
        self._libraries = ThreadpoolController()

    def _limited(self) -> AbstractContextManager[object]:
        """Return the limit on every library that is loaded by now."""
        if len(sys.modules) != self._modules:  # looking for them takes milliseconds
            self._modules = len(sys.modules)
            self._libraries = ThreadpoolController()
        limit: AbstractContextManager[object] = self._libraries.limit(limits=1)
        return limit

    def ask(self, n: int) -> Sequence[Candidate]:
        """See ``Searcher.ask``."""
        with self._limited():
            return self._inner.ask(n)

    @property
    def generation(self) -> int | None:
        """See ``Searcher``; None where the searcher knows none."""
        generation: int | None = getattr(self._inner, "generation", None)
        return generation

    def facts(self) -> Mapping[str, str]:
        """Return what the searcher says of its work; nothing where it does not."""
        say: Callable[[], Mapping[str, str]] = getattr(self._inner, "facts", dict)
        return say()

    def origin(self, candidate: int) -> Origin | None:
        """See ``Searcher``; None where the searcher does not say."""
        say: Callable[[int], Origin | None] = getattr(self._inner, "origin", lambda _: None)
        return say(candidate)

    def tell(self, results: Sequence[Told]) -> None:
        """See ``Searcher.tell``."""
        with self._limited():
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
    if problem.objectives == 1 and not entry.single_objective:
        raise InputError(
            f"searcher {name!r} needs at least two objectives, the problem has one "
            "(choose nsga2 or unsga3, or a searcher for one objective)"
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
    if problem.groups and len(problem.groups) != problem.dimension:
        raise ValueError(
            f"SearchProblem.groups: expected none or [{problem.dimension}], got "
            f"[{len(problem.groups)}]"
        )
    if problem.kinds and len(problem.kinds) != problem.dimension:
        raise ValueError(
            f"SearchProblem.kinds: expected none or [{problem.dimension}], got "
            f"[{len(problem.kinds)}]"
        )
    start = problem.start
    if start is not None and (
        len(start) != problem.dimension or not all(0.0 <= value <= 1.0 for value in start)
    ):
        raise ValueError(f"SearchProblem.start: expected [{problem.dimension}] in [0, 1]")
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
