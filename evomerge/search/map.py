"""MAP: quadratic surrogates, their front, and the truth about it (Li et al. 2024, specs/map.md).

A design is measured, one quadratic per objective is fitted (``evomerge.search.quadratic``), a
genetic algorithm finds the surrogates' front, and a batch of it is measured; then all is fitted
again. Only measured points count: the predicted front is optimistic by construction.

Bayesian MAP spends the first rounds where the surrogates know least. The published scheme scores
bins of directions by residuals and never visits a bin that is empty; here the posterior variance
of the same surrogates decides, one point after the other, over all objectives at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.design import nearest_failed, novel, sobol
from evomerge.search.kinds import snap
from evomerge.search.protocol import SearchProblem
from evomerge.search.quadratic import Quadratic, count_terms, fit
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

#: Above this many dimensions the full quadratic's unknowns are not counted on: 12 need 182 points.
_MOST_DIMENSIONS = 12

#: Candidates among which the variance chooses.
_VARIANCE_POOL = 256

#: Below these the predicted front is not worth its name (map.md 1.10, 4).
_FEWEST_PER_TERM, _LOWEST_R2 = 1.5, 0.9


class MapProposer:
    """Design, then rounds on quadratic surrogates.

    Args:
        problem: what is searched.
        rounds: in which the budget behind the design is spent on the front.
        effort: of the search on the surrogates.
        adaptive: spend the first two thirds of the budget by variance (Bayesian MAP).
    """

    def __init__(self, problem: SearchProblem, rounds: int, effort: Effort, adaptive: bool) -> None:
        self._problem = problem
        self._effort = effort
        self._adaptive = adaptive
        self._generator = np.random.default_rng(problem.seed)
        self._scale: Scale | None = None
        self._surrogates: tuple[Quadratic, ...] = ()
        self._points = 0  # behind the surrogates
        self._design = _design_size(problem, adaptive)
        self._learned = 2 * problem.budget // 3 if adaptive else self._design
        left = problem.budget - max(self._learned, self._design)
        self._batch = max(1, min(problem.parallel, problem.budget), ceil(left / rounds))

    def propose(self, known: Known) -> Proposal:
        """Return the design, then batches by variance or of the front."""
        spare = sobol(self._batch, self._problem.dimension, self._generator)
        if known.told == 0:
            return Proposal(sobol(self._design, self._problem.dimension, self._generator))
        if len(known.points) < 2:
            return Proposal(spare)
        if self._scale is None:
            self._scale = Scale.of(known.losses)
        self._surrogates = tuple(fit(known.points, column) for column in known.losses.T)
        self._points = len(known.points)
        if known.told < self._learned:
            proposal = self._uncertain(known, min(self._batch, self._learned - known.told))
            if len(proposal.points):
                return proposal
        start = measured_front(known.points, known.losses)
        seed = int(self._generator.integers(2**31))
        problem = self._problem
        pool = evolve(self._predict, start, problem.objectives, self._effort, seed, problem.kinds)
        around = surroundings(start, 3 * self._batch, self._generator)
        pool = snap(np.concatenate([pool, around]), problem.kinds)
        points = choose(
            pool, self._predict(pool), self._scale, known.points, known.losses, known.failed,
            self._batch, spare,
        )  # fmt: skip
        return Proposal(points, self._predict(points))

    def facts(self) -> Mapping[str, str]:
        """Return the surrogates' forms and their errors on points that were left out."""
        if not self._surrogates:
            return {}
        unknowns = count_terms(self._problem.dimension, "full")
        forms = [f"{one.choice}: R2 {one.r2:.3f}, rms {one.error:.3g}" for one in self._surrogates]
        facts = {
            "surrogate": f"quadratics of {self._points} points, error with each point left out: "
            + "; ".join(forms)
        }
        weak = min(one.r2 for one in self._surrogates) < _LOWEST_R2
        if weak or self._points < _FEWEST_PER_TERM * unknowns:
            facts["caution"] = (
                f"{self._points} points for {unknowns} unknowns, or R2 below {_LOWEST_R2:g}: trust "
                "the measured scores alone"
            )
        return facts

    def _predict(self, points: Array) -> Array:
        return np.stack([one(points) for one in self._surrogates], axis=1)

    def _uncertain(self, known: Known, count: int) -> Proposal:
        """Return the points whose measurement tells most; none where all merges are known."""
        assert self._scale is not None
        pool = sobol(_VARIANCE_POOL, self._problem.dimension, self._generator)
        pool = snap(pool, self._problem.kinds)
        usable = novel(pool, known.points)
        apart = usable & ~nearest_failed(pool, known.points, known.failed)
        pool = pool[apart if apart.sum() >= count else usable]
        pairs = zip(self._surrogates, self._scale.width, strict=True)
        known_to = [(one.covariance(pool, w), (one.error / w) ** 2) for one, w in pairs]
        rows = most_informative([c for c, _ in known_to], [e for _, e in known_to], count)
        return Proposal(pool[rows], self._predict(pool[rows]))


def most_informative(covariances: list[Array], noises: list[float], count: int) -> list[int]:
    """Return ``count`` rows by largest summed variance, each conditioned on those before.

    A Gaussian posterior's variance does not depend on what is measured, so a whole batch can be
    chosen before any of it is known (MacKay 1992).

    Args:
        covariances: one [c, c] per objective, in comparable units.
        noises: variance of one measurement, per objective.
        count: at most c.
    """
    left = [matrix.copy() for matrix in covariances]
    free = np.ones(len(left[0]), dtype=bool)
    rows: list[int] = []
    for _ in range(min(count, len(free))):
        total = np.sum([np.diag(matrix) for matrix in left], axis=0)
        row = int(np.argmax(np.where(free, total, -np.inf)))
        rows.append(row)
        free[row] = False
        for matrix, noise in zip(left, noises, strict=True):
            variance = matrix[row, row] + noise
            if variance > 0.0:
                np.subtract(matrix, np.outer(matrix[row], matrix[row]) / variance, out=matrix)
    return rows


def _design_size(problem: SearchProblem, adaptive: bool) -> int:
    """Return how many points are measured before the first fit, beside the warm ones.

    Twice the unknowns of a full quadratic, or as many as there are unknowns when the rest
    follows by variance; never more than half of the budget.
    """
    counted = count_terms(min(problem.dimension, _MOST_DIMENSIONS), "full")
    wanted = max((1 if adaptive else 2) * counted, problem.dimension + 6) - len(problem.warm)
    return max(1, min(max(wanted, 4), problem.budget // (4 if adaptive else 2)))


def quadratic_map(problem: SearchProblem, arguments: Mapping[str, Any]) -> RoundSearcher:
    """Return MAP."""
    return _searcher(problem, arguments, adaptive=False)


def bayesian(problem: SearchProblem, arguments: Mapping[str, Any]) -> RoundSearcher:
    """Return Bayesian MAP."""
    return _searcher(problem, arguments, adaptive=True)


def _searcher(
    problem: SearchProblem, arguments: Mapping[str, Any], adaptive: bool
) -> RoundSearcher:
    # As published where there is a front; NSGA-III's reference directions need two objectives.
    effort = surrogate_effort("nsga3" if problem.objectives > 1 else "nsga2", arguments)
    return RoundSearcher(problem, MapProposer(problem, arguments["rounds"], effort, adaptive))


def surrogate_effort(algorithm: str, arguments: Mapping[str, Any]) -> Effort:
    """Return the effort that the arguments ask for."""
    return Effort(algorithm, arguments["population"], arguments["generations"])
