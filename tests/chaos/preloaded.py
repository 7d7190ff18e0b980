"""What the process that drivers and workers are forked from loads once, and compiles."""

from __future__ import annotations

import chaos_study

from evomerge.search.protocol import SearchProblem
from evomerge.search.registry import make_searcher

for _name in chaos_study.SEARCHERS:
    _objectives = 2 if _name == "nsga2" else 1
    _searcher = make_searcher(_name, {}, SearchProblem(2, _objectives, 4, 2, seed=0))
    _searcher.ask(1)
