"""Searchers: ``ask(n)`` for candidates, ``tell`` their losses.

No searcher sees weights, torch, Ray or the fitness: a candidate is a point of the unit box.
"""

from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told, WarmPoint

__all__ = ["Candidate", "SearchProblem", "Searcher", "Told", "WarmPoint"]
