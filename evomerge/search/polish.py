"""Polish: CMA-ES with small steps around one merge, usually the winner of another search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from evomerge.search.protocol import Searcher, SearchProblem, WarmPoint


def polish(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return CMA-ES on the full box, started at ``problem.start``, else at the best warm point.

    The start must not lose to a better baseline: who polishes a merge wants that merge improved.
    """
    from evomerge.search.registry import check_arguments, find_searcher

    if problem.start is not None:
        # Its loss only says where to begin; CMA-ES ranks what it measures itself.
        problem = replace(problem, warm=(WarmPoint(problem.start, (0.0,)),))
    own = {key: arguments[key] for key in ("sigma", "population")}
    # Its steps may be smaller than those that CMA-ES may be given to begin with.
    return find_searcher("cma").build(problem, {**check_arguments("cma", {}), **own})
