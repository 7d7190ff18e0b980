"""Searchers of pymoo: NSGA-II, a genetic algorithm and CMA-ES, generation by generation.

A generation is handed out piecewise and its results may arrive in any order, but pymoo gets
them in ask order: otherwise the completion order would change every later candidate.

Traps of pymoo 0.6.2 that this module answers, each guarded by a test:

* ``CMAES`` draws from numpy's global generator, terminates itself, hangs when a generation is
  all NaN and swallows every exception. ``SimpleCMAES`` (pycma behind pymoo's ask/tell) is used
  instead, with a generator of its own; when it has converged it restarts from the best point.
* pycma needs two dimensions; a second, unused coordinate is added to one-dimensional problems.
* Operators are default arguments, shared between instances; every searcher builds its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, log
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.search.ledger import Ledger, check_count
from evomerge.search.protocol import Candidate, SearchProblem, Told

Array = NDArray[np.float64]


class Engine(Protocol):
    """One generation after the other."""

    def generate(self) -> Array:
        """Return the next generation's points [n, d]; n = 0 when nothing is left."""
        ...

    def learn(self, losses: Array) -> None:
        """Take the losses [n, m] of the points last generated, in their order."""
        ...


class GenerationalSearcher:
    """Ask/tell over an engine that thinks in whole generations."""

    def __init__(self, problem: SearchProblem, engine: Engine) -> None:
        self._ledger = Ledger(problem)
        self._engine = engine
        self._points: Array = np.empty((0, problem.dimension))
        self._ids: list[int] = []  # of the points handed out, in ask order
        self._losses: dict[int, tuple[float, ...]] = {}

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return up to ``n`` candidates of the current generation; none while it waits.

        Raises:
            ValueError: ``n`` is negative.
        """
        check_count(n)
        if n and len(self._losses) == len(self._points):
            self._next_generation()
        first = len(self._ids)
        candidates = tuple(self._ledger.issue(x) for x in self._points[first : first + n])
        self._ids.extend(candidate.id for candidate in candidates)
        return candidates

    def tell(self, results: Sequence[Told]) -> None:
        """Store results; the engine learns when its generation is complete.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, or a loss that is not finite.
        """
        self._ledger.settle(results)
        for told in results:
            self._losses[told.id] = told.losses

    def _next_generation(self) -> None:
        if self._ids:
            self._engine.learn(np.array([self._losses[id_] for id_ in self._ids], np.float64))
        self._points = self._engine.generate()
        self._ids, self._losses = [], {}


class GeneticEngine:
    """A genetic algorithm of pymoo, with the warm points in its initial population.

    Args:
        problem: what is searched.
        algorithm: pymoo class ``NSGA2`` or ``GA``.
        arguments: ``population`` or None, ``crossover_eta``, ``mutation_eta``.
    """

    def __init__(
        self, problem: SearchProblem, algorithm: Any, arguments: Mapping[str, Any]
    ) -> None:
        from pymoo.core.termination import NoTermination
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM

        size = arguments["population"] or default_population(problem)
        sampling_seed, seed = np.random.SeedSequence(problem.seed).spawn(2)
        self._problem = _pymoo_problem(problem.dimension, problem.objectives)
        self._algorithm = algorithm(
            pop_size=size,
            sampling=self._initial(problem, size, np.random.default_rng(sampling_seed)),
            crossover=SBX(prob=0.9, eta=arguments["crossover_eta"]),
            mutation=PM(eta=arguments["mutation_eta"]),
        ).setup(self._problem, seed=seed, termination=NoTermination())
        self._infills: Any = None  # the population that pymoo waits for
        self._fresh: Any = None  # the part of it without losses

    def generate(self) -> Array:
        """Return the next offspring [n, d]; n = 0 when only duplicates could be bred."""
        self._infills = self._algorithm.ask()
        if self._infills is None:
            return np.empty((0, self._problem.n_var))
        new = [index for index, one in enumerate(self._infills) if not one.evaluated]
        self._fresh = self._infills[new]
        return np.asarray(self._fresh.get("X"), dtype=np.float64)

    def learn(self, losses: Array) -> None:
        """Give the offspring their losses [n, m] and select the survivors."""
        _evaluate(self._problem, self._fresh, losses)
        self._algorithm.tell(infills=self._infills)

    def _initial(self, problem: SearchProblem, size: int, rng: np.random.Generator) -> Any:
        """Return warm points with their losses, filled up by a Latin hypercube."""
        from pymoo.core.population import Population

        # Half of the population is fresh however many baselines there are: they lie in a few
        # planes of the box, and crossover cannot leave those.
        count = max(size - len(problem.warm), size // 2)
        cells = np.stack([rng.permutation(count) for _ in range(problem.dimension)], axis=1)
        fresh = Population.new(X=(cells + rng.random(cells.shape)) / count)  # [count, d]
        if not problem.warm:
            return fresh
        warm = Population.new(X=np.array([point.x for point in problem.warm], np.float64))
        _evaluate(self._problem, warm, np.array([point.losses for point in problem.warm]))
        return Population.merge(warm, fresh)


class CmaesEngine:
    """CMA-ES (Hansen 2016) through pymoo's ``SimpleCMAES``.

    Starts at the best warm point, else at the centre; restarts from the best point known.
    """

    def __init__(self, problem: SearchProblem, arguments: Mapping[str, Any]) -> None:
        self._dimension = problem.dimension
        self._sigma: float = arguments["sigma"]
        default = max(problem.parallel, 4 + int(3 * log(max(problem.dimension, 2))))
        self._size: int = arguments["population"] or default
        self._rng = np.random.default_rng(problem.seed)
        self._problem = _pymoo_problem(max(problem.dimension, 2), 1)
        self._best: Array = np.full(self._problem.n_var, 0.5)
        self._best_loss = float("inf")
        for point in problem.warm:
            self._remember(np.asarray(point.x, np.float64), point.losses[0])
        self._algorithm = self._started()
        self._infills: Any = None

    def generate(self) -> Array:
        """Return the next generation [n, d]."""
        if not self._algorithm.has_next():
            self._algorithm = self._started()
        self._infills = self._algorithm.ask()
        points = np.asarray(self._infills.get("X"), dtype=np.float64)
        return points[:, : self._dimension]

    def learn(self, losses: Array) -> None:
        """Take the losses [n, 1]."""
        _evaluate(self._problem, self._infills, losses)
        points = np.asarray(self._infills.get("X"), dtype=np.float64)
        for x, loss in zip(points, losses[:, 0], strict=True):
            self._remember(x, float(loss))
        self._algorithm.tell(infills=self._infills)

    def _remember(self, x: Array, loss: float) -> None:
        """Keep ``x`` [d], or padded, when it is better than all before."""
        if loss < self._best_loss:
            self._best_loss = loss
            self._best = np.append(x, 0.5)[: self._problem.n_var]

    def _started(self) -> Any:
        """Return a ``SimpleCMAES`` that stands at the best point."""
        from pymoo.algorithms.soo.nonconvex.cmaes import SimpleCMAES
        from pymoo.core.population import Population
        from pymoo.core.termination import NoTermination

        start = Population.new(X=self._best[None, :])
        # SimpleCMAES takes the best of its initial sample; of one point, whatever its loss.
        _evaluate(self._problem, start, np.zeros((1, 1)))
        options = {
            "popsize": self._size,
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "signals_filename": "",  # else pycma takes options from the working directory
            "verbose": -9,
        }
        algorithm = SimpleCMAES(initial=start, sigma=self._sigma, opts=options)
        algorithm.setup(self._problem, seed=0, termination=NoTermination())
        algorithm.opts["seed"] = float("nan")  # pycma warns of a seed that randn makes useless
        algorithm.tell(infills=algorithm.ask())
        return algorithm


def nsga2(problem: SearchProblem, arguments: Mapping[str, Any]) -> GenerationalSearcher:
    """Return NSGA-II (Deb et al. 2002)."""
    from pymoo.algorithms.moo.nsga2 import NSGA2

    return GenerationalSearcher(problem, GeneticEngine(problem, NSGA2, arguments))


def genetic(problem: SearchProblem, arguments: Mapping[str, Any]) -> GenerationalSearcher:
    """Return an elitist genetic algorithm with SBX crossover and polynomial mutation."""
    from pymoo.algorithms.soo.nonconvex.ga import GA

    return GenerationalSearcher(problem, GeneticEngine(problem, GA, arguments))


def cmaes(problem: SearchProblem, arguments: Mapping[str, Any]) -> GenerationalSearcher:
    """Return CMA-ES whose candidates do not depend on the order of completion."""
    return GenerationalSearcher(problem, CmaesEngine(problem, arguments))


def default_population(problem: SearchProblem) -> int:
    """Return the population of a genetic algorithm for this budget and parallelism.

    An eighth of the budget between 16 and 40, so that there are about ten generations; less
    when the budget does not hold two of those; rounded up to whole waves of parallel trials.
    """
    size = min(40, max(16, problem.budget // 8))
    size = min(size, max(4, problem.budget // 2))
    return max(4, ceil(size / problem.parallel) * problem.parallel)


def _pymoo_problem(dimension: int, objectives: int) -> Any:
    """Return pymoo's description of the unit box [d] with m losses."""
    from pymoo.core.problem import Problem

    return Problem(n_var=dimension, n_obj=objectives, xl=0.0, xu=1.0)


def _evaluate(problem: Any, population: Any, losses: Array) -> None:
    """Give a population [n] its losses [n, m]."""
    from pymoo.core.evaluator import Evaluator
    from pymoo.problems.static import StaticProblem

    Evaluator().eval(StaticProblem(problem, F=losses), population)
