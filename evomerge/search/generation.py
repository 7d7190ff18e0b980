"""How many candidates a searcher asks for before it learns from any of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

from evomerge.search.entry import CMA_POPULATION
from evomerge.search.protocol import SearchProblem
from evomerge.search.registry import check_arguments, find_searcher


def generation_size(name: str, arguments: Mapping[str, object], problem: SearchProblem) -> int:
    """Return the candidates of one generation; 1 for a searcher that has none.

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
    given = check_arguments(name, arguments).get("population")
    if isinstance(given, int):
        return given
    if entry.arguments.get("population") is CMA_POPULATION:
        return max(problem.parallel, 4 + int(3 * log(problem.dimension)))
    if entry.generational and "population" in entry.arguments:
        from evomerge.search.moo import default_population

        return default_population(problem)
    return 1
