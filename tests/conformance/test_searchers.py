"""Every registered searcher against the searcher's contract.

All searchers take the whole suite in the slow run; ``conftest.py`` says what the default run
leaves out for most of them. What it leaves out across processes is made up for by one process
that replays all of them.
"""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest

from evomerge.search.ng_entries import OPTIMIZERS, Start
from evomerge.search.protocol import Searcher, SearchProblem
from evomerge.search.registry import SEARCHERS, make_searcher
from evomerge.testing import Build, SearcherConformance, asked, drive, sphere


class _Registered(SearcherConformance):
    name: ClassVar[str]
    arguments: ClassVar[Mapping[str, Any]] = {}
    prefix_step = 25  # every one in ``test_replays_at_every_prefix``

    def build(self, problem: SearchProblem) -> Searcher:
        return make_searcher(self.name, self.arguments, problem)

    def remote_build(self) -> Build:
        return partial(make_searcher, self.name, dict(self.arguments))


#: Beside every searcher with its defaults, on two objectives where it takes several.
_MORE: tuple[tuple[str, int, dict[str, Any]], ...] = (
    *((name, 1, {}) for name in ("nsga2", "unsga3")),
    *((name, 3, {}) for name in ("nsga2", "nsga3", "smsemoa", "agemoea", "moead", "rvea")),
    *((name, 2, {"steady": True}) for name in ("nsga2", "nsga3", "unsga3", "agemoea")),
    ("smsemoa", 2, {"steady": False}),
    ("ga", 1, {"steady": True}),
    ("de", 1, {"initialization": "LHS", "crossover": "uniform"}),
    ("cma", 1, {"elitist": True}),
    ("pymoo-de", 1, {"parent": "rand", "differences": 2, "crossover": "exp"}),
)

#: Surrogates are searched for seconds where tenths of seconds show the same behaviour.
_BRIEF: dict[str, dict[str, Any]] = {
    name: {"population": 12, "generations": 6}
    for name in ("map", "bayesian_map", "nested_map", "gp_rounds")
}

#: Where the last candidates need not be better than the first: uniform samples, and PBI, which
#: narrows a front of three objectives.
_NEVER_LEARN = (("random", 1), ("moead", 3))


def _suite(name: str, objectives: int, arguments: dict[str, Any]) -> type[_Registered]:
    entry = SEARCHERS[name]
    words = [name.replace("-", " ").replace("_", " ").title().replace(" ", "")]
    words += [f"{key.title()}{str(value).title()}" for key, value in arguments.items()]
    if (name, objectives, arguments) in _MORE and not arguments:
        words.append(f"Objectives{objectives}")
    waits = entry.generational if "steady" not in arguments else not arguments["steady"]
    fields = {
        "name": name,
        "arguments": arguments,
        "objectives": objectives,
        "generational": waits,
        "learns": (name, objectives) not in _NEVER_LEARN,
    }
    return type(f"Test{''.join(words)}", (_Registered,), fields)


SUITES = [
    *(
        _suite(name, 2 if entry.multi_objective else 1, _BRIEF.get(name, {}))
        for name, entry in SEARCHERS.items()
    ),
    *(_suite(*case) for case in _MORE),
]
globals().update({suite.__name__: suite for suite in SUITES})


def test_every_suite_has_a_name_of_its_own() -> None:
    assert len({suite.__name__ for suite in SUITES}) == len(SUITES)
    assert {suite.name for suite in SUITES} == set(SEARCHERS)


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_replays_at_every_prefix(suite: type[_Registered]) -> None:
    thorough = suite()
    thorough.prefix_step = 1
    thorough.test_replays_from_every_prefix_to_the_same_future()


_REPLAYS = """
import pickle, sys
from evomerge.testing import replay
for name, build, problem, calls in pickle.load(sys.stdin.buffer):
    try:
        replay(build(problem), calls)
    except AssertionError as error:
        print(name, error)
print("done")
"""


def _in_another_process(work: list[tuple[str, Build, SearchProblem, Any]]) -> str:
    hash_seed = "4242" if os.environ.get("PYTHONHASHSEED") != "4242" else "1"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _REPLAYS], input=pickle.dumps(work),
        env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True,
        timeout=250,
    ).stdout.decode()  # fmt: skip


@pytest.mark.slow
def test_all_replay_in_another_process_with_other_string_hashes() -> None:
    work: list[tuple[str, Build, SearchProblem, Any]] = []
    for suite in SUITES:
        one = suite()
        problem = one.problem(budget=36)
        work.append((suite.__name__, one.remote_build(), problem, one.run(problem)))
    assert _in_another_process(work) == "done\n"


def _named(optimizer: str, dimension: int, budget: int) -> tuple[Build, SearchProblem]:
    problem = SearcherConformance().problem(dimension, budget, warm=dimension == 1)
    return partial(make_searcher, "nevergrad", {"optimizer": optimizer}), problem


@pytest.mark.slow
def test_every_named_optimizer_of_nevergrad_replays_in_another_process() -> None:
    work: list[tuple[str, Build, SearchProblem, Any]] = []
    make_searcher("random", {}, SearcherConformance().problem())  # importing nevergrad draws
    before = random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002
    for name in OPTIMIZERS:
        for dimension, budget in ((1, 12), (6, 45)):
            build, problem = _named(name, dimension, budget)
            calls = drive(build(problem), sphere, problem.budget, problem.parallel, order=0)
            points = np.array([candidate.x for candidate in asked(calls)])
            assert points.shape == (budget, dimension), name
            assert ((points >= 0.0) & (points <= 1.0)).all(), name
            work.append((name, build, problem, calls))
    assert before == (random.getstate(), repr(np.random.get_state(legacy=False)))  # noqa: NPY002
    assert _in_another_process(work) == "done\n"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_named_optimizer_of_nevergrad_passes_the_suite(optimizer: str) -> None:
    class Suite(SearcherConformance):
        prefix_step = 5
        learns = False  # at their own settings many spend this budget on their first population

        def build(self, problem: SearchProblem) -> Searcher:
            return make_searcher("nevergrad", {"optimizer": optimizer}, problem)

    suite = Suite()
    for dimension in (1, 2, 6, 40, 400):
        suite.test_takes_a_hundred_results_at_every_size(dimension)
    for dimension in (1, 4, 40):
        suite.test_is_deterministic_whatever_the_global_generators(dimension)
    for parallel in (1, 7, 32):
        suite.test_accepts_every_completion_order(parallel)
    for loss in (1e3, 0.0, -1e300, 1e300):
        suite.test_survives_when_all_losses_are_equal(loss)
    suite.test_leaves_the_global_generators_alone()
    suite.test_replays_from_every_prefix_to_the_same_future()
    suite.test_two_searchers_in_one_process_do_not_meet()
    suite.test_a_refused_tell_changes_nothing()
    suite.test_survives_failures_and_still_finds_better_points()
    if OPTIMIZERS[optimizer] is not Start.SEQUENCE:
        suite.test_can_go_on_beyond_its_budget()
        suite.test_another_seed_gives_other_candidates()


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


@pytest.mark.parametrize("suite", SUITES)
def test_the_suite_tests_what_the_registry_claims(suite: type[_Registered]) -> None:
    entry = SEARCHERS[suite.name]
    if not suite.arguments:
        assert suite.generational == entry.generational
    assert suite.objectives == 1 or entry.multi_objective
    assert suite.objectives > 1 or entry.single_objective
