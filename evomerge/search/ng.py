"""Searchers of nevergrad: CMA-ES, differential evolution, (1+1)-ES and random search.

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
  bounds are set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.ledger import Ledger, check_count
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
    """

    def __init__(self, problem: SearchProblem, optimizer: Any, scale: float = 1.0) -> None:
        self._dimension = problem.dimension
        self._optimizer = optimizer
        self._scale = scale
        self._ledger = Ledger(problem)
        self._parameters: dict[int, Any] = {}

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return ``n`` new candidates; any number may be outstanding.

        Raises:
            ValueError: ``n`` is negative.
        """
        check_count(n)
        return tuple(self._next() for _ in range(n))

    def tell(self, results: Sequence[Told]) -> None:
        """Learn from results, in the order given.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, or a loss that is not finite.
        """
        self._ledger.settle(results)
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
        popsize=arguments["population"], diagonal=diagonal, inopts=inopts
    )
    start, _ = _start(problem)
    padded = np.append(start, 0.5) if problem.dimension == 1 else start
    array = _free(padded, arguments["sigma"], problem)
    return CmaSearcher(problem, _optimizer(family, array, problem))


def differential_evolution(
    problem: SearchProblem, arguments: Mapping[str, Any]
) -> NevergradSearcher:
    """Return curr-to-best differential evolution with two-point crossover.

    Two-point crossover keeps neighbouring coordinates together, i.e. neighbouring layers.
    The warm points are members of the initial population; the rest is uniform in the box.
    """
    import nevergrad as ng

    population = arguments["population"]
    if population is None:
        # nevergrad's 30 would spend a small budget on the initial population alone.
        population = max(problem.parallel, min(30, max(8, problem.budget // 8)))
    family = ng.families.DifferentialEvolution(
        crossover="twopoints",
        popsize=population,
        F1=arguments["weight"],
        F2=arguments["weight"],
    )
    optimizer = _optimizer(family, _box(problem), problem)
    searcher = NevergradSearcher(problem, optimizer, _ARCHIVE_SCALE)
    for point in problem.warm:
        searcher.inform(point)
    return searcher


def one_plus_one(problem: SearchProblem, arguments: Mapping[str, Any]) -> OnePlusOneSearcher:
    """Return the (1+1)-ES with the one-fifth rule, started like CMA-ES.

    Without a warm point the first candidate is the centre.
    """
    import nevergrad as ng

    start, loss = _start(problem)
    array = _free(start, arguments["sigma"], problem)
    family = ng.families.ParametrizedOnePlusOne()
    return OnePlusOneSearcher(problem, _optimizer(family, array, problem), loss)


def random(problem: SearchProblem, arguments: Mapping[str, Any]) -> NevergradSearcher:
    """Return uniform random search in the box."""
    import nevergrad as ng

    return NevergradSearcher(
        problem, _optimizer(ng.optimizers.RandomSearch, _box(problem), problem)
    )


def _start(problem: SearchProblem) -> tuple[Vector, float | None]:
    """Return the best warm point [d] and its loss, else the centre; the first of equals."""
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
    return _free(np.full(problem.dimension, 0.5), 1 / 6, problem).set_bounds(0.0, 1.0)


def _optimizer(family: Any, array: Any, problem: SearchProblem) -> Any:
    """Return an optimizer of ``family`` over ``array``."""
    return family(array, budget=problem.budget, num_workers=problem.parallel)
