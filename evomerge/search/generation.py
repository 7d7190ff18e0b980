"""How many trials a searcher needs before it learns from any of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

from evomerge.search.entry import CMA_POPULATION
from evomerge.search.protocol import SearchProblem
from evomerge.search.registry import check_arguments, find_searcher, make_searcher

#: More than any generation has.
_MANY = 100_000


def generation_size(name: str, arguments: Mapping[str, object], problem: SearchProblem) -> int:
    """Return the candidates of the first generation or design; 1 for a searcher that has none.

    Args:
        name: of the searcher.
        arguments: its own, as in the study file.
        problem: what it is to search.

    Raises:
        InputError: unknown searcher or argument.
    """
    if name == "auto":
        from evomerge.search.auto import choose

        name, arguments = choose(problem).searcher, {}
    entry = find_searcher(name)
    complete = check_arguments(name, arguments)
    given = None if "generations" in complete else complete.get("population")
    if complete.get("steady", False):
        return 1
    if isinstance(given, int):
        return given
    if entry.generational or "steady" in complete:
        # It hands a whole generation or design out before it waits.
        return max(1, len(make_searcher(name, arguments, problem).ask(_MANY)))
    if entry.arguments.get("population") is CMA_POPULATION:
        return max(problem.parallel, 4 + int(3 * log(problem.dimension)))
    return 1
