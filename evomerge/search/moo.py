"""Searchers of pymoo: evolutionary algorithms for one and for several objectives.

Those in whole generations ask and learn through ``GenerationalSearcher``; ``SteadySearcher``
breeds one offspring whenever one is asked for, from whatever results there are.

Constraints reach a searcher as penalties in its losses. An algorithm that handles violations
itself would get them in ``_evaluate``, pymoo's ``G``; MOEA/D refuses them there.

Traps of pymoo 0.6.2 that this module answers, each guarded by a test:

* ``CMAES`` draws from numpy's global generator, terminates itself, hangs when a generation is
  all NaN and swallows every exception. ``SimpleCMAES`` (pycma behind pymoo's ask/tell) is used
  instead, with a generator of its own; when it has converged it restarts from the best point.
* pycma needs two dimensions; a second, unused coordinate is added to one-dimensional problems.
* Operators are default arguments, shared between instances; every searcher builds its own.
* ``MOEAD`` takes one offspring at a time; its parallel variant breeds one for every weight and
  replaces in their order. It and DE match members to places: the population has a fixed size.
* ``RVEA`` counts generations against the last one, which is computed from the budget here.
* Differences and angles of huge or equal losses overflow or become NaN on the way to a choice;
  losses are kept within 1e30, and numpy is told to stay quiet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil, comb, log
from typing import Any

import numpy as np

from evomerge.search.generational import Array, GenerationalSearcher
from evomerge.search.kinds import snap
from evomerge.search.ledger import Ledger, check_count
from evomerge.search.mixed import with_levels
from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told

# Squares and cubes of it are still finite; no score comes near it.
_LARGEST_LOSS = 1e30


class Breeding:
    """A population algorithm of pymoo over the unit box, seeded, with the warm points in it.

    Attributes:
        box: pymoo's description of the problem.
        algorithm: set up; nothing was asked yet.

    Args:
        problem: what is searched.
        build: makes the algorithm from its initial population.
        size: members of the population.
        generations: how many there will be, where the algorithm must know; else None.
        fixed: the initial population has exactly ``size`` members.
    """

    def __init__(
        self,
        problem: SearchProblem,
        build: Callable[[Any], Any],
        size: int,
        generations: int | None = None,
        *,
        fixed: bool = False,
    ) -> None:
        from pymoo.core.termination import NoTermination
        from pymoo.termination.max_gen import MaximumGenerationTermination

        sampling_seed, seed = np.random.SeedSequence(problem.seed).spawn(2)
        self.box = _pymoo_problem(problem.dimension, problem.objectives)
        end = MaximumGenerationTermination(generations) if generations else NoTermination()
        initial = self._initial(problem, size, np.random.default_rng(sampling_seed), fixed)
        self.algorithm = build(initial).setup(self.box, seed=seed, termination=end)

    def _initial(
        self, problem: SearchProblem, size: int, rng: np.random.Generator, fixed: bool
    ) -> Any:
        """Return warm points with their losses, filled up by a Latin hypercube."""
        from pymoo.core.population import Population

        # Half of the population is fresh however many baselines there are: they lie in a few
        # planes of the box, and crossover cannot leave those.
        count = max(size - len(problem.warm), size // 2)
        cells = np.stack([rng.permutation(count) for _ in range(problem.dimension)], axis=1)
        points = snap((cells + rng.random(cells.shape)) / count, problem.kinds)  # [count, d]
        if problem.start is not None and problem.start not in [one.x for one in problem.warm]:
            points[0] = problem.start
        fresh = Population.new(X=points)
        if not problem.warm:
            return fresh
        warm = Population.new(X=np.array([point.x for point in problem.warm], np.float64))
        _evaluate(self.box, warm, np.array([point.losses for point in problem.warm]))
        return Population.merge(_fittest(warm, size - count) if fixed else warm, fresh)


class GeneticEngine:
    """Generations of a ``Breeding``."""

    def __init__(self, breeding: Breeding) -> None:
        self._breeding = breeding
        self._infills: Any = None  # the population that pymoo waits for
        self._fresh: Any = None  # the part of it without losses

    def generate(self) -> Array:
        """Return the next offspring [n, d]; n = 0 when only duplicates could be bred."""
        new = self._bred()
        if self._infills is not None and not new:
            # All of the first population are baselines, as may be where there are few merges.
            _advance(self._breeding.algorithm, self._infills)
            new = self._bred()
        if not new:
            return np.empty((0, self._breeding.box.n_var))
        self._fresh = self._infills[new]
        return np.asarray(self._fresh.get("X"), dtype=np.float64)

    def _bred(self) -> list[int]:
        """Let pymoo breed; return the rows of what has no losses yet."""
        self._infills = self._breeding.algorithm.ask()
        infills = () if self._infills is None else self._infills
        return [index for index, one in enumerate(infills) if not one.evaluated]

    def learn(self, losses: Array) -> None:
        """Give the offspring their losses [n, m] and select the survivors."""
        _evaluate(self._breeding.box, self._fresh, losses)
        _advance(self._breeding.algorithm, self._infills)


class SteadySearcher:
    """Ask/tell over a ``Breeding`` of one offspring at a time.

    Never waits once two losses are known; candidates depend on the order of the results.
    """

    def __init__(self, problem: SearchProblem, breeding: Breeding) -> None:
        self._ledger = Ledger(problem)
        self._breeding = breeding
        initial = breeding.algorithm.ask()
        self._unborn = deque(one for one in initial if not one.evaluated)
        self._founders = [one for one in initial if one.evaluated]
        self._individuals: dict[int, Any] = {}  # asked and not told
        self._found()

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return ``n`` candidates, fewer while fewer than two losses are known.

        Raises:
            ValueError: ``n`` is negative.
        """
        check_count(n)
        candidates: list[Candidate] = []
        while len(candidates) < n and (individual := self._next()) is not None:
            candidates.append(self._ledger.issue(individual.X))
            self._individuals[candidates[-1].id] = individual
        return tuple(candidates)

    def tell(self, results: Sequence[Told]) -> None:
        """Learn from results, in the order given.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, or a loss that is not finite.
        """
        from pymoo.core.population import Population

        self._ledger.settle(results)
        for told in results:
            individual = self._individuals.pop(told.id)
            alone = Population.create(individual)
            _evaluate(self._breeding.box, alone, np.array([told.losses], np.float64))
            if self._breeding.algorithm.is_initialized:
                _advance(self._breeding.algorithm, alone)
            else:
                self._founders.append(individual)
                self._found()

    def _found(self) -> None:
        """Begin to breed as soon as there are two parents; later results join them."""
        from pymoo.core.population import Population

        if len(self._founders) > 1:
            _advance(self._breeding.algorithm, Population.create(*self._founders))

    def _next(self) -> Any:
        """Return the next individual; None when none can be bred."""
        if self._unborn:
            return self._unborn.popleft()
        if not self._breeding.algorithm.is_initialized:
            return None
        offspring = self._breeding.algorithm.ask()
        return None if offspring is None else offspring[0]


class CmaesEngine:
    """CMA-ES (Hansen 2016) through pymoo's ``SimpleCMAES``.

    Starts at the point that the user named, else at the best warm point, else at the centre;
    restarts from the best point known.
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
        if problem.start is not None:
            self._best = np.append(problem.start, 0.5)[: self._problem.n_var]
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


def nsga2(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return NSGA-II (Deb et al. 2002)."""
    from pymoo.algorithms.moo.nsga2 import NSGA2

    return _genetic(problem, NSGA2, arguments)


def nsga3(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return NSGA-III (Deb & Jain 2014), its ties broken by the searcher's own generator."""
    from pymoo.algorithms.moo.nsga3 import NSGA3

    return _directed(problem, NSGA3, arguments)


def unsga3(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return U-NSGA-III (Seada & Deb 2016)."""
    from pymoo.algorithms.moo.unsga3 import UNSGA3

    return _directed(problem, UNSGA3, arguments)


def smsemoa(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return SMS-EMOA (Beume et al. 2007), as published one offspring at a time."""
    from pymoo.algorithms.moo.sms import SMSEMOA, LeastHypervolumeContributionSurvival

    algorithm = partial(SMSEMOA, survival=LeastHypervolumeContributionSurvival())
    return _genetic(problem, algorithm, arguments)


def agemoea(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return AGE-MOEA (Panichella 2019)."""
    from pymoo.algorithms.moo.age import AGEMOEA

    return _genetic(problem, AGEMOEA, arguments)


def moead(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return MOEA/D (Zhang & Li 2007) with Tchebycheff weights, from three objectives on PBI."""
    from pymoo.algorithms.moo.moead import ParallelMOEAD

    directions = _directions(problem, arguments)
    size = len(directions)

    def build(initial: Any) -> Any:
        return ParallelMOEAD(
            directions,
            n_neighbors=min(arguments["neighbors"], size),
            sampling=initial,
            **_operators(problem, arguments, crossover=1.0),
        )

    return GenerationalSearcher(problem, GeneticEngine(Breeding(problem, build, size, fixed=True)))


def rvea(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return RVEA (Cheng et al. 2016); the budget tells it how far it has come."""
    from pymoo.algorithms.moo.rvea import RVEA

    directions = _directions(problem, arguments)
    size = len(directions)

    def build(initial: Any) -> Any:
        return RVEA(
            directions,
            alpha=arguments["alpha"],
            sampling=initial,
            **_operators(problem, arguments, crossover=1.0),
        )

    generations = max(2, ceil(problem.budget / size))
    return GenerationalSearcher(problem, GeneticEngine(Breeding(problem, build, size, generations)))


def genetic(problem: SearchProblem, arguments: Mapping[str, Any]) -> Searcher:
    """Return an elitist genetic algorithm with SBX crossover and polynomial mutation."""
    from pymoo.algorithms.soo.nonconvex.ga import GA

    return _genetic(problem, GA, arguments)


def differential_evolution(
    problem: SearchProblem, arguments: Mapping[str, Any]
) -> GenerationalSearcher:
    """Return differential evolution (Storn & Price 1997), generation by generation."""
    from pymoo.algorithms.soo.nonconvex.de import DE

    # Two differences need five members beside the target.
    size = max(arguments["population"] or default_population(problem), 6)
    names = ("parent", "differences", "crossover")
    variant = "/".join(["DE", *(str(arguments[name]) for name in names)])

    def build(initial: Any) -> Any:
        return DE(
            pop_size=size,
            sampling=initial,
            variant=variant,
            CR=arguments["rate"],
            F=arguments["weight"],
        )

    return GenerationalSearcher(problem, GeneticEngine(Breeding(problem, build, size, fixed=True)))


def particle_swarm(problem: SearchProblem, arguments: Mapping[str, Any]) -> GenerationalSearcher:
    """Return adaptive particle swarm optimization (Zhan et al. 2009)."""
    from pymoo.algorithms.soo.nonconvex.pso import PSO

    size = arguments["population"] or default_population(problem)

    def build(initial: Any) -> Any:
        return PSO(
            pop_size=size,
            sampling=initial,
            w=arguments["inertia"],
            c1=arguments["own"],
            c2=arguments["swarm"],
            adaptive=arguments["adaptive"],
            max_velocity_rate=arguments["velocity"],
        )

    return GenerationalSearcher(problem, GeneticEngine(Breeding(problem, build, size, fixed=True)))


def cmaes(problem: SearchProblem, arguments: Mapping[str, Any]) -> GenerationalSearcher:
    """Return CMA-ES whose candidates do not depend on the order of completion."""
    return GenerationalSearcher(problem, CmaesEngine(problem, arguments))


def _genetic(problem: SearchProblem, algorithm: Any, arguments: Mapping[str, Any]) -> Searcher:
    """Return a genetic algorithm of pymoo, in generations or steady."""
    size = arguments["population"] or default_population(problem)
    steady = arguments["steady"]

    def build(initial: Any) -> Any:
        return algorithm(
            pop_size=size,
            n_offsprings=1 if steady else None,
            sampling=initial,
            **_operators(problem, arguments, crossover=0.9),
        )

    breeding = Breeding(problem, build, size)
    if steady:
        return SteadySearcher(problem, breeding)
    return GenerationalSearcher(problem, GeneticEngine(breeding))


def _directed(problem: SearchProblem, algorithm: Any, arguments: Mapping[str, Any]) -> Searcher:
    """Return a genetic algorithm of pymoo that needs reference directions."""
    directions = _directions(problem, arguments)
    # With few objectives the directions are as many as the members; with more they are fewer, but
    # never less than the objectives.
    size = max(arguments["population"] or default_population(problem), len(directions))
    return _genetic(problem, partial(algorithm, directions), {**arguments, "population": size})


def _operators(
    problem: SearchProblem, arguments: Mapping[str, Any], crossover: float
) -> dict[str, Any]:
    """Return SBX crossover and polynomial mutation (Deb & Agrawal 1995), not shared."""
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM

    sbx, pm = with_levels(SBX, PM, problem.kinds) if problem.kinds else (SBX, PM)
    return {
        "crossover": sbx(prob=crossover, eta=arguments["crossover_eta"]),
        "mutation": pm(eta=arguments["mutation_eta"]),
    }


def _directions(problem: SearchProblem, arguments: Mapping[str, Any]) -> Array:
    """Return evenly spread weights [n, m] (Das & Dennis 1998), about as many as members.

    At most one per member, but no less than the objectives.
    """
    from pymoo.util.ref_dirs import get_reference_directions

    size = arguments["population"] or default_population(problem)
    many = problem.objectives
    if many == 1:
        return np.ones((1, 1))
    parts = 1
    while comb(parts + many, many - 1) <= size:  # of parts + 1
        parts += 1
    directions = get_reference_directions("das-dennis", many, n_partitions=parts)
    return np.asarray(directions, dtype=np.float64)


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

    within = np.clip(losses, -_LARGEST_LOSS, _LARGEST_LOSS)
    Evaluator().eval(StaticProblem(problem, F=within), population)


def _advance(algorithm: Any, infills: Any) -> None:
    """Let ``algorithm`` learn from evaluated individuals."""
    with np.errstate(all="ignore"):
        algorithm.tell(infills=infills)


def _fittest(population: Any, count: int) -> Any:
    """Return the ``count`` members of the best ranks, the first of equals."""
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    _, ranks = NonDominatedSorting().do(population.get("F"), return_rank=True)
    return population[np.sort(np.argsort(ranks, kind="stable")[:count])]
