"""Searchers of nevergrad: families with arguments, and every replayable optimizer by name.

All of them take several outstanding candidates and results in any order. Traps of nevergrad
1.0.12 that this module answers, each guarded by a test:

* ``ng.optimizers.CMA`` chooses between algorithms; ``ng.families.ParametrizedCMA`` is CMA-ES.
* On a fully bounded array CMA-ES starts with 0.3 (d < 18) or 0.15 times the step size asked
  for. It runs on an unbounded array here, and points are clipped to the box; in a comparison of
  five ways to keep the box this was as good inside and better at the faces.
* CMA-ES in one dimension needs a further package; a second, unused coordinate avoids that.
* From 300 dimensions on pycma adapts the step size by two mean-shift samples, which fails when
  results of two generations mix; cumulative step-size adaptation is asked for instead.
* pycma refuses a generation when it was not asked for points since the last one, and nevergrad
  drops that generation without a word; one point is asked for, and thrown away, after each.
* pycma takes options from a file ``cma_signals.in`` in the working directory; switched off.
* Its archive adds 0.1 sqrt(1e6 / 2) = 71 to a point evaluated once, and next to nothing to one
  evaluated twice, so that with losses near 1 a repeated point stays "best" for ever. Searchers
  that read the archive (DE, (1+1)-ES) get their losses in units of 1e-7, where 71 is nothing.
* A parametrization without a generator takes its seed from numpy's global one, already when its
  bounds are set; copies of it, and some mutations, draw from there later too. A searcher lends
  its own state to that generator while it works, and puts the old one back.
* A registered CMA-ES that meets one dimension sets its shared settings to another package, for
  every later search in the process; families are made anew here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.ledger import Ledger, check_count
from evomerge.search.ng_entries import OPTIMIZERS, Start
from evomerge.search.protocol import Candidate, SearchProblem, Told, WarmPoint

Vector = NDArray[np.float64]

# nevergrad replaces losses from 5e20 on by 5e20, with a warning; penalties may be larger. The
# other end keeps a scaled loss from becoming -inf, which nothing could ever beat.
_LARGEST_LOSS = 4e20

# 71 of these units are far below one item of any benchmark; 1e3 and more in original units would
# meet another clip of nevergrad, at 1e10, which only touches repeated points.
_ARCHIVE_SCALE = 1e7

# pycma switches from cumulative to two-point step-size adaptation at this dimension.
_TWO_POINT_DIMENSION = 300

# A full covariance of more dimensions costs more than 10 MB and a second per generation.
_FULL_COVARIANCE_DIMENSION = 1000


class NevergradSearcher:
    """Ask/tell over one nevergrad optimizer.

    Args:
        problem: what is searched.
        optimizer: a nevergrad optimizer whose values have at least d coordinates; further
            ones are ignored.
        scale: factor on the losses that the optimizer sees.
        length: how many candidates there are; None where there is no end.
    """

    def __init__(
        self,
        problem: SearchProblem,
        optimizer: Any,
        scale: float = 1.0,
        length: int | None = None,
    ) -> None:
        self._left = length
        self._global = _global_state(problem)
        self._dimension = problem.dimension
        self._optimizer = optimizer
        self._scale = scale
        self._ledger = Ledger(problem)
        self._parameters: dict[int, Any] = {}

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return ``n`` new candidates, fewer at the end; any number may be outstanding.

        Raises:
            ValueError: ``n`` is negative.
        """
        check_count(n)
        if self._left is not None:
            n = min(n, self._left)
            self._left -= n
        with _lent(self._global):
            return tuple(self._next() for _ in range(n))

    def tell(self, results: Sequence[Told]) -> None:
        """Learn from results, in the order given.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, or a loss that is not finite.
        """
        self._ledger.settle(results)
        # Equal losses have no spread, and some optimizers divide by it.
        with _lent(self._global), np.errstate(invalid="ignore", divide="ignore"):
            for told in results:
                self._learn(self._parameters.pop(told.id), told.losses[0])

    def _next(self) -> Candidate:
        parameter = self._optimizer.ask()
        candidate = self._ledger.issue(parameter.value[: self._dimension])
        self._parameters[candidate.id] = parameter
        return candidate

    def inform(self, point: WarmPoint) -> None:
        """Learn from a point that was not asked."""
        x = np.asarray(point.x, dtype=np.float64)
        with _lent(self._global):
            self._learn(self._optimizer.parametrization.spawn_child(new_value=x), point.losses[0])

    def _learn(self, parameter: Any, loss: float) -> None:
        seen = float(loss) * self._scale
        self._optimizer.tell(parameter, max(-_LARGEST_LOSS, min(seen, _LARGEST_LOSS)))


class CmaSearcher(NevergradSearcher):
    """CMA-ES that loses no generation, whatever the rhythm of asks and tells.

    nevergrad hands out a queue of points; when a whole generation of results arrives while the
    queue lasts, pycma says "tell can currently only be called once per iteration".
    """

    def _learn(self, parameter: Any, loss: float) -> None:
        strategy = self._optimizer.es
        generation = strategy.countiter
        super()._learn(parameter, loss)
        current = self._optimizer.es  # another one after a restart
        if current is not strategy or current.countiter != generation:
            current.ask(1)


class OnePlusOneSearcher(NevergradSearcher):
    """(1+1)-ES whose first result does not count as an improvement.

    nevergrad compares the first loss with infinity and doubles the step size for it.
    """

    def __init__(
        self, problem: SearchProblem, optimizer: Any, start_loss: float | None = None
    ) -> None:
        super().__init__(problem, optimizer, _ARCHIVE_SCALE)
        self._told = False
        if start_loss is not None:
            # The first candidate is the start itself, whose loss is known.
            self._learn(optimizer.ask(), start_loss)

    def _learn(self, parameter: Any, loss: float) -> None:
        super()._learn(parameter, loss)
        if not self._told:
            self._told = True
            self._optimizer._sigma = 1.0  # in units of the mutation sigma


def cma(problem: SearchProblem, arguments: Mapping[str, Any]) -> CmaSearcher:
    """Return CMA-ES (Hansen 2016), started at the best warm point, else at the centre.

    It restarts there when pycma finds that it has converged.
    """
    import nevergrad as ng
    from cma.sigma_adaptation import CMAAdaptSigmaCSA

    inopts: dict[str, Any] = {"signals_filename": ""}
    if problem.dimension >= _TWO_POINT_DIMENSION:
        inopts["AdaptSigma"] = CMAAdaptSigmaCSA
    diagonal = arguments["diagonal"]
    if diagonal is None:
        diagonal = problem.dimension > _FULL_COVARIANCE_DIMENSION
    family = ng.families.ParametrizedCMA(
        popsize=arguments["population"],
        diagonal=diagonal,
        elitist=arguments["elitist"],
        inopts=inopts,
    )
    start, _ = _start(problem)
    padded = np.append(start, 0.5) if problem.dimension == 1 else start
    array = _free(padded, arguments["sigma"], problem)
    return CmaSearcher(problem, _optimizer(family, array, problem))


def differential_evolution(
    problem: SearchProblem, arguments: Mapping[str, Any]
) -> NevergradSearcher:
    """Return curr-to-best differential evolution (Storn & Price 1997).

    Two-point crossover, the default, keeps neighbouring coordinates together, i.e. neighbouring
    layers. The warm points are members of the initial population.
    """
    import nevergrad as ng

    crossover, start = arguments["crossover"], arguments["initialization"]
    family = ng.families.DifferentialEvolution(
        crossover=0.5 if crossover == "uniform" else crossover,
        initialization="parametrization" if start == "uniform" else start,
        popsize=arguments["population"] or _population(problem),
        F1=arguments["weight"],
        F2=arguments["weight"],
    )
    return _population_searcher(problem, family)


def particle_swarm(problem: SearchProblem, arguments: Mapping[str, Any]) -> NevergradSearcher:
    """Return particle swarm optimization (SPSO 2011, Zambrano-Bigiarini et al. 2013).

    In the coordinates of the box: nevergrad's default squeezes them by an arctangent, whose
    particles stick to the faces.
    """
    import nevergrad as ng

    family = ng.families.ConfPSO(
        transform="identity",
        popsize=arguments["population"] or _population(problem),
        omega=arguments["inertia"],
        phip=arguments["own"],
        phig=arguments["swarm"],
    )
    return _population_searcher(problem, family)


def one_plus_one(problem: SearchProblem, arguments: Mapping[str, Any]) -> OnePlusOneSearcher:
    """Return the (1+1)-ES with the one-fifth rule, started like CMA-ES.

    Without a warm point the first candidate is the centre.
    """
    import nevergrad as ng

    start, loss = _start(problem)
    array = _free(start, arguments["sigma"], problem)
    noise = arguments["noise"]
    family = ng.families.ParametrizedOnePlusOne(
        mutation=arguments["mutation"], noise_handling=None if noise == "none" else noise
    )
    return OnePlusOneSearcher(problem, _optimizer(family, array, problem), loss)


def tbpsa(problem: SearchProblem, arguments: Mapping[str, Any]) -> NevergradSearcher:
    """Return test-based population-size adaptation (Hellwig & Beyer 2016), for noisy losses.

    Starts at the best warm point, else at the centre. Steps by means of parents, and asks for
    more candidates per step while the losses show no trend.
    """
    import nevergrad as ng

    # nevergrad's 4 d would not finish one step in many dimensions.
    default = max(8, min(4 * problem.dimension, problem.budget // 8))
    family = ng.families.ParametrizedTBPSA(
        naive=False, initial_popsize=(arguments["population"] or default) // 4
    )
    array = _bounded(_start(problem)[0], arguments["sigma"], problem)
    return NevergradSearcher(problem, _optimizer(family, array, problem), _ARCHIVE_SCALE)


def random(problem: SearchProblem, arguments: Mapping[str, Any]) -> NevergradSearcher:
    """Return uniform random search in the box."""
    import nevergrad as ng

    return NevergradSearcher(
        problem, _optimizer(ng.optimizers.RandomSearch, _box(problem), problem)
    )


def by_name(problem: SearchProblem, arguments: Mapping[str, Any]) -> NevergradSearcher:
    """Return the optimizer that nevergrad registers under a name, with the settings it has there.

    What it draws from is the unit box; steps have a standard deviation of 1/6.
    """
    import nevergrad as ng

    name = arguments["optimizer"]
    family = ng.optimizers.registry[name]
    if OPTIMIZERS[name] is Start.POPULATION:
        return _population_searcher(problem, family)
    if OPTIMIZERS[name] in (Start.SAMPLING, Start.SEQUENCE):
        length = problem.budget if OPTIMIZERS[name] is Start.SEQUENCE else None
        optimizer = _optimizer(family, _box(problem), problem)
        return NevergradSearcher(problem, optimizer, _ARCHIVE_SCALE, length)
    start, loss = _start(problem)
    optimizer = _optimizer(family, _bounded(start, 1 / 6, problem), problem)
    if name.endswith("OnePlusOne"):
        return OnePlusOneSearcher(problem, optimizer, loss)
    return NevergradSearcher(problem, optimizer, _ARCHIVE_SCALE)


def _population(problem: SearchProblem) -> int:
    """Return the members of a population.

    nevergrad's 30 or 40 would spend a small budget on the initial population alone.
    """
    return max(problem.parallel, min(30, max(8, problem.budget // 8)))


def _population_searcher(problem: SearchProblem, family: Any) -> NevergradSearcher:
    """Return an optimizer that starts all over the box, told about the warm points."""
    optimizer = _optimizer(family, _box(problem), problem)
    searcher = NevergradSearcher(problem, optimizer, _ARCHIVE_SCALE)
    for point in problem.warm:
        searcher.inform(point)
    if problem.start is not None and problem.start not in [point.x for point in problem.warm]:
        optimizer.suggest(np.asarray(problem.start, dtype=np.float64))  # the first candidate
    return searcher


def _start(problem: SearchProblem) -> tuple[Vector, float | None]:
    """Return where to start [d] and the loss there, None when it is not known.

    That is the point that the user named, else the best warm point, the first of equals, else
    the centre.
    """
    if problem.start is not None:
        known = [point.losses[0] for point in problem.warm if point.x == problem.start]
        return np.asarray(problem.start, dtype=np.float64), known[0] if known else None
    best = min(problem.warm, key=lambda point: point.losses[0], default=None)
    if best is None:
        return np.full(problem.dimension, 0.5), None
    return np.asarray(best.x, dtype=np.float64), best.losses[0]


def _free(start: Vector, sigma: float, problem: SearchProblem) -> Any:
    """Return an unbounded array [d] at ``start`` with mutations of size ``sigma``."""
    import nevergrad as ng

    array = ng.p.Array(init=start).set_mutation(sigma=sigma)
    # At once: whatever is done to a parametrization without a generator seeds one from numpy's
    # global generator. nevergrad accepts only the legacy class.
    seed = np.random.SeedSequence(problem.seed).generate_state(8)
    array.random_state = np.random.RandomState(seed)
    return array


def _box(problem: SearchProblem) -> Any:
    """Return the unit box [d]: points bounce off its faces, samples are uniform."""
    return _bounded(np.full(problem.dimension, 0.5), 1 / 6, problem)


def _bounded(start: Vector, sigma: float, problem: SearchProblem) -> Any:
    """Return the unit box [d] with mutations of size ``sigma``, ``start`` in its middle."""
    from nevergrad.common.errors import NevergradRuntimeWarning

    with warnings.catch_warnings():
        # Less than three standard deviations between the faces are the user's choice.
        warnings.simplefilter("ignore", NevergradRuntimeWarning)
        return _free(start, sigma, problem).set_bounds(0.0, 1.0)


def _optimizer(family: Any, array: Any, problem: SearchProblem) -> Any:
    """Return an optimizer of ``family`` over ``array``."""
    from nevergrad.common.errors import InefficientSettingsWarning

    with _lent(_global_state(problem)), warnings.catch_warnings():
        # A budget that nevergrad finds small for a method is the user's choice.
        warnings.simplefilter("ignore", InefficientSettingsWarning)
        return family(array, budget=problem.budget, num_workers=problem.parallel)


@dataclass(slots=True)
class _Generator:
    """Where a generator stands, as ``numpy.random.get_state`` gives it."""

    state: Any


def _global_state(problem: SearchProblem) -> _Generator:
    """Return what stands in for numpy's global generator."""
    seed = np.random.SeedSequence(problem.seed, spawn_key=(1,)).generate_state(8)
    return _Generator(np.random.RandomState(seed).get_state())


@contextmanager
def _lent(own: _Generator) -> Iterator[None]:
    """Give numpy's global generator the state ``own`` for a while, and keep where it got to."""
    before = np.random.get_state()  # noqa: NPY002 - nevergrad draws from it
    np.random.set_state(own.state)  # noqa: NPY002
    try:
        yield
    finally:
        own.state = np.random.get_state()  # noqa: NPY002
        np.random.set_state(before)  # noqa: NPY002
