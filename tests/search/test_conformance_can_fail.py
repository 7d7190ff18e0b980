"""The searchers' suite finds the faults that it is there for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from evomerge.errors import CallOrderError
from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told
from evomerge.search.registry import make_searcher
from evomerge.testing import SearcherConformance


class _Faulty:
    """A correct searcher to spoil."""

    def __init__(self, problem: SearchProblem) -> None:
        self.inner = make_searcher("random", {}, problem)

    def ask(self, n: int) -> Sequence[Candidate]:
        return self.inner.ask(n)

    def tell(self, results: Sequence[Told]) -> None:
        self.inner.tell(results)


class _Outside(_Faulty):
    def ask(self, n: int) -> Sequence[Candidate]:
        return [Candidate(one.id, tuple(2 * x for x in one.x)) for one in super().ask(n)]


class _GlobalGenerator(_Faulty):
    def ask(self, n: int) -> Sequence[Candidate]:
        return [Candidate(one.id, (random.random(), *one.x[1:])) for one in super().ask(n)]


class _Forgiving(_Faulty):
    def tell(self, results: Sequence[Told]) -> None:
        pass


class _HalfTold(_Faulty):
    def tell(self, results: Sequence[Told]) -> None:
        for result in results:
            self.inner.tell([result])


class _Chatty(_Faulty):
    def tell(self, results: Sequence[Told]) -> None:
        print("told", len(results))
        super().tell(results)


class _Stuck(_Faulty):
    def ask(self, n: int) -> Sequence[Candidate]:
        return [Candidate(one.id, (1.0,) * len(one.x)) for one in super().ask(n)]


def suite(fault: type[_Faulty]) -> SearcherConformance:
    class Suite(SearcherConformance):
        def build(self, problem: SearchProblem) -> Searcher:
            return fault(problem)

    return Suite()


@pytest.mark.parametrize(
    ("fault", "test", "arguments"),
    [
        (_Outside, "candidates_are_finite_points_of_the_box_numbered_in_order", (4, 60, False)),
        (_GlobalGenerator, "is_deterministic_whatever_the_global_generators", (4,)),
        (_GlobalGenerator, "leaves_the_global_generators_alone", ()),
        (_GlobalGenerator, "replays_from_every_prefix_to_the_same_future", ()),
        (_GlobalGenerator, "two_searchers_in_one_process_do_not_meet", ()),
        (_Forgiving, "refuses_unknown_and_repeated_ids", ()),
        (_Forgiving, "refuses_losses_that_are_not_finite", (float("nan"),)),
        (_Forgiving, "refuses_the_wrong_number_of_losses", ()),
        (_HalfTold, "a_refused_tell_changes_nothing", ()),
        (_Stuck, "later_candidates_are_better", (4,)),
        (_Stuck, "survives_failures_and_still_finds_better_points", ()),
        (_Stuck, "another_seed_gives_other_candidates", ()),
    ],
)
def test_a_fault_fails(fault: type[_Faulty], test: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, CallOrderError)):
        getattr(suite(fault), f"test_{test}")(*arguments)


def test_printing_fails(capfd: pytest.CaptureFixture[str]) -> None:
    suite(_Faulty).test_leaves_no_thread_behind_and_prints_nothing(capfd)
    with pytest.raises(AssertionError):
        suite(_Chatty).test_leaves_no_thread_behind_and_prints_nothing(capfd)
