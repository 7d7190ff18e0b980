"""Every registered searcher against the searcher's contract."""

from __future__ import annotations

import os
import subprocess
import sys
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


_ASKS = """
import sys
from evomerge.search.protocol import SearchProblem
from evomerge.search.registry import make_searcher
from evomerge.testing import sphere

searcher = make_searcher(sys.argv[1], {}, SearchProblem(150, 1, 400, 8, 0))
waiting = []
for _ in range(80):
    waiting += (asked := list(searcher.ask(1)))
    print(*(value.hex() for one in asked for value in one.x))
    while len(waiting) >= 8 or (waiting and not asked):
        searcher.tell([sphere(waiting.pop(0), 1)])
"""


@pytest.mark.parametrize("name", ["cma", "pymoo-cmaes"])
def test_asks_followed_the_number_of_blas_threads(name: str) -> None:
    """At 150 dimensions BLAS divides the work, and rounds differently."""

    def asks(threads: str) -> str:
        limits = {f"{library}_NUM_THREADS": threads for library in ("OMP", "OPENBLAS", "MKL")}
        return subprocess.run(
            [sys.executable, "-c", _ASKS, name], env={**os.environ, **limits},
            capture_output=True, text=True, check=True, timeout=200,
        ).stdout  # fmt: skip

    assert asks("1") == asks("2")


def test_every_registered_searcher_has_its_suite() -> None:
    assert {suite.name for suite in _Registered.__subclasses__()} == set(SEARCHERS)


@pytest.mark.parametrize("suite", _Registered.__subclasses__())
def test_the_suite_tests_what_the_registry_claims(suite: type[_Registered]) -> None:
    entry = SEARCHERS[suite.name]
    assert suite.generational == entry.generational
    assert suite.objectives == 1 or entry.multi_objective
