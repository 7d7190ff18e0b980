"""Rounds on Gaussian processes: NSGA-II on optimistic predictions, then a hypervolume batch.

One process per objective with a Matérn-5/2 kernel (scikit-learn's), a length scale per dimension
up to ``_ARD_DIMENSIONS``. The surrogate search minimises ``mean - 0.5 sd``: in the prototype
(map.md, 4) this was the best or level with BoTorch's qLogNEHVI up to a dozen coefficients, at a
few hundredths of its cost. The only module that imports scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.design import sobol
from evomerge.search.kinds import snap
from evomerge.search.map import surrogate_effort
from evomerge.search.protocol import SearchProblem
from evomerge.search.rounds import Known, Proposal, RoundSearcher
from evomerge.search.surrogate_front import (
    Effort,
    Scale,
    choose,
    evolve,
    measured_front,
    surroundings,
)

Array = NDArray[np.float64]

#: Beyond, there are more length scales than a few hundred points can tell apart; in the
#: prototype their advantage was gone at 48.
_ARD_DIMENSIONS = 24

#: A fit costs n^3; of more points the front and the latest are kept.
_MOST_POINTS = 300

#: L-BFGS steps per fit; later rounds start where the last one ended.
_STEPS = 40

#: Log likelihood above that of nothing but noise, below which a fit is tried from the fixed guess.
_INFORMATIVE = 0.5

#: Bounds of the hyper-parameters, in a unit box and for losses of variance one: length scales
#: from "changes within a twentieth of the box" to "constant", noise from exact scores to nothing
#: but noise.
_LENGTH, _SIGNAL, _NOISE = (0.05, 20.0), (0.05, 50.0), (1e-6, 1.0)


@dataclass(frozen=True)
class _Plane:
    """Where n points lie, in coordinates of their own: fewer than d, at equal distances.

    One length scale for all dimensions sees distances only, so nothing is lost, and every step
    of a fit costs n²·n instead of n²·d.
    """

    centre: Array  # [d]
    axes: Array  # [d, r], r <= n

    @staticmethod
    def of(points: Array) -> _Plane:
        centre = points.mean(axis=0)
        return _Plane(centre, np.linalg.qr((points - centre).T)[0])

    def __call__(self, points: Array) -> Array:
        """Return the coordinates [n, r + 1]; the last is how far outside a point lies."""
        moved = points - self.centre
        inside = moved @ self.axes
        outside = (moved**2).sum(axis=1) - (inside**2).sum(axis=1)
        return np.column_stack([inside, np.sqrt(np.maximum(outside, 0.0))])


@dataclass(frozen=True)
class Process:
    """The Gaussian process of one objective.

    Attributes:
        theta: logarithms of its hyper-parameters, as scikit-learn orders them.
        r2: share of the variance that leave-one-out predictions explain.
        error: their root mean squared error, in units of the loss.
    """

    theta: Array
    r2: float
    error: float
    _model: Any
    _plane: _Plane | None
    _mean: float
    _deviation: float

    def __call__(self, points: Array) -> tuple[Array, Array]:
        """Return means [n] and standard deviations [n] at points [n, d], in loss units."""
        places = points if self._plane is None else self._plane(points)
        mean, deviation = self._model.predict(places, return_std=True)
        return (
            np.asarray(self._mean + self._deviation * mean),
            np.asarray(self._deviation * deviation),
        )


def fit_process(points: Array, losses: Array, start: Array | None = None) -> Process:
    """Return the process with the largest marginal likelihood that L-BFGS finds.

    Args:
        points: [n, d], n >= 2.
        losses: [n], finite.
        start: hyper-parameters to begin with; a fixed guess where absent, or where they lead to
            nothing but noise.
    """
    from scipy.optimize import minimize
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    dimension = points.shape[1]
    scales = np.full(dimension, 0.5) if dimension <= _ARD_DIMENSIONS else 0.5 * dimension**0.5
    kernel = ConstantKernel(1.0, _SIGNAL) * Matern(scales, _LENGTH, nu=2.5)
    kernel += WhiteKernel(1e-3, _NOISE)
    mean = float((losses / len(losses)).sum())
    largest = float(np.abs(losses - mean).max())
    deviation = largest * float(np.sqrt(np.mean(((losses - mean) / (largest or 1.0)) ** 2)))
    normal = (losses - mean) / (deviation or 1.0)
    wide = dimension > max(_ARD_DIMENSIONS, len(points))
    plane = _Plane.of(points) if wide else None
    points = plane(points) if plane else points
    model = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None).fit(points, normal)

    def negative(theta: Array) -> tuple[float, Array]:
        value, slope = model.log_marginal_likelihood(theta, eval_gradient=True, clone_kernel=False)
        return -float(value), -np.asarray(slope)

    def climb(begin: Array) -> Any:
        # scikit-learn's own optimiser warns of every bound that it meets.
        found = minimize(
            negative, begin, jac=True, method="L-BFGS-B", bounds=kernel.bounds,
            options={"maxiter": _STEPS},
        )  # fmt: skip
        theta = np.clip(found.x, *kernel.bounds.T)
        fitted = GaussianProcessRegressor(kernel.clone_with_theta(theta), alpha=0.0, optimizer=None)
        return fitted.fit(points, normal)

    best = climb(kernel.theta if start is None else start)
    if start is not None and _likelihood(best) < _nothing_but_noise(len(losses)) + _INFORMATIVE:
        # A start that fitted few points can be so wrong for more that the first step leaps to
        # length scales at which no point tells of another, and there is no slope there.
        best = max(best, climb(kernel.theta), key=_likelihood)
    left_out = _left_out_residuals(best)
    return Process(
        np.asarray(best.kernel_.theta),
        1.0 - float((left_out**2).mean()),
        deviation * float(np.sqrt((left_out**2).mean())),
        best,
        plane,
        mean,
        deviation,
    )


def _likelihood(model: Any) -> float:
    return float(model.log_marginal_likelihood_value_)


def _nothing_but_noise(count: int) -> float:
    """Return the log likelihood of ``count`` losses of variance one as independent noise."""
    return -0.5 * count * (log(2.0 * pi) + 1.0)


def _left_out_residuals(model: Any) -> Array:
    """Return leave-one-out residuals [n] (Rasmussen & Williams 2006, eq. 5.12)."""
    inverse = np.linalg.inv(model.L_)
    return np.asarray(model.alpha_ / (inverse**2).sum(axis=0))


class GpProposer:
    """Design, then batches on Gaussian processes.

    Args:
        problem: what is searched.
        batch: points per round.
        optimism: standard deviations below the mean that the surrogate search minimises.
        effort: of the search on the surrogates.
    """

    def __init__(self, problem: SearchProblem, batch: int, optimism: float, effort: Effort) -> None:
        self._problem = problem
        self._batch = batch
        self._optimism = optimism
        self._effort = effort
        self._generator = np.random.default_rng(problem.seed)
        self._scale: Scale | None = None
        self._processes: tuple[Process, ...] = ()
        self._points = 0

    def propose(self, known: Known) -> Proposal:
        """Return the design, then batches."""
        dimension = self._problem.dimension
        spare = sobol(self._batch, dimension, self._generator)
        if known.told == 0:
            return Proposal(sobol(_design_size(self._problem), dimension, self._generator))
        if len(known.points) < 2:
            return Proposal(spare)
        if self._scale is None:
            self._scale = Scale.of(known.losses)
        self._fit(known)
        start = measured_front(known.points, known.losses)
        seed = int(self._generator.integers(2**31))
        problem = self._problem
        pool = evolve(
            self._optimistic, start, problem.objectives, self._effort, seed, problem.kinds
        )
        around = surroundings(start, 3 * self._batch, self._generator)
        pool = snap(np.concatenate([pool, around]), problem.kinds)
        points = choose(
            pool, self._optimistic(pool), self._scale, known.points, known.losses, known.failed,
            self._batch, spare,
        )  # fmt: skip
        return Proposal(points, np.stack([one(points)[0] for one in self._processes], axis=1))

    def facts(self) -> Mapping[str, str]:
        """Return the surrogates' errors on points that were left out."""
        if not self._processes:
            return {}
        errors = [f"R2 {one.r2:.3f}, rms {one.error:.3g}" for one in self._processes]
        return {
            "surrogate": f"Gaussian processes of {self._points} points, error with each point left "
            "out: " + "; ".join(errors)
        }

    def _fit(self, known: Known) -> None:
        rows = _kept(known)
        starts: Sequence[Array | None] = [one.theta for one in self._processes]
        starts = starts or [None] * self._problem.objectives
        columns = zip(known.losses[rows].T, starts, strict=True)
        self._processes = tuple(
            fit_process(known.points[rows], column, start) for column, start in columns
        )
        self._points = len(rows)

    def _optimistic(self, points: Array) -> Array:
        columns = []
        for process in self._processes:
            mean, deviation = process(points)
            columns.append(mean - self._optimism * deviation)
        return np.stack(columns, axis=1)


def _kept(known: Known) -> list[int]:
    """Return the rows that the processes are made of: all, or the front and the latest."""
    count = len(known.points)
    if count <= _MOST_POINTS:
        return list(range(count))
    from evomerge.pareto import spread

    front = spread(known.losses, _MOST_POINTS // 2)
    latest = [row for row in range(count) if row not in set(front)]
    return sorted([*front, *latest[len(front) - _MOST_POINTS :]])


def _design_size(problem: SearchProblem) -> int:
    """Return how many points are measured before the first fit, beside the warm ones.

    Two per dimension and two, up to a third of the budget: later points know where to go.
    """
    wanted = 2 * problem.dimension + 2 - len(problem.warm)
    return max(1, min(max(wanted, 4), 40, problem.budget // 3))


def gp_rounds(problem: SearchProblem, arguments: Mapping[str, Any]) -> RoundSearcher:
    """Return rounds on Gaussian processes."""
    batch = arguments["batch"] or max(5, problem.parallel)
    effort = surrogate_effort("nsga2", arguments)
    return RoundSearcher(problem, GpProposer(problem, batch, arguments["optimism"], effort))
