"""Every registered searcher against the searcher's contract."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest

from evomerge.search.protocol import Searcher, SearchProblem
from evomerge.search.registry import SEARCHERS, make_searcher
from evomerge.testing import Build, SearcherConformance


class _Registered(SearcherConformance):
    name: ClassVar[str]

    def build(self, problem: SearchProblem) -> Searcher:
        return make_searcher(self.name, {}, problem)

    def remote_build(self) -> Build:
        return partial(make_searcher, self.name, {})


class TestCma(_Registered):
    name = "cma"


class TestDe(_Registered):
    name = "de"


class TestOnePlusOne(_Registered):
    name = "oneplusone"


class TestRandom(_Registered):
    name = "random"
    learns = False


class TestNsga2(_Registered):
    name = "nsga2"
    objectives = 2
    generational = True


class TestNsga2OneObjective(_Registered):
    name = "nsga2"
    generational = True


class TestNsga2ThreeObjectives(_Registered):
    name = "nsga2"
    objectives = 3
    generational = True


class TestGa(_Registered):
    name = "ga"
    generational = True


class TestPymooCmaes(_Registered):
    name = "pymoo-cmaes"
    generational = True


def test_every_registered_searcher_has_its_suite() -> None:
    assert {suite.name for suite in _Registered.__subclasses__()} == set(SEARCHERS)


@pytest.mark.parametrize("suite", _Registered.__subclasses__())
def test_the_suite_tests_what_the_registry_claims(suite: type[_Registered]) -> None:
    entry = SEARCHERS[suite.name]
    assert suite.generational == entry.generational
    assert suite.objectives == 1 or entry.multi_objective
