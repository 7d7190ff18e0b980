"""Evo-Merging: denoise each expert by its density, then scale it by a signed weight.

Two searches by CMA-ES, one after the other, each with its L1 term (the published code of
Evo-Merging, which merges LoRA adapters as factors: method ``lora_factors``):

    stage 1   min over α in [0, 1]^N      loss + λ·mean|α|    with every weight 1/N
    stage 2   min over β in [-1.5, 1.5]^N loss + λ·mean|β|    with the best α of stage 1

On full task vectors this is the trimmed sum W_base + Σ β_k·S(τ_k; α_k), where S keeps the α_k
largest magnitudes of each tensor: method ``breadcrumbs`` with ``gamma: 0``. ``ties`` trims alike
but elects a sign per element, so that a negative weight would flip the election instead of the
expert; ``dare_linear`` drops by chance instead of by magnitude, and rescales.

Stage 1 alone changes little: every weight is 1/N there, the loss is nearly flat, and the L1 term
pulls. Hence the choice of stages: both, ``joint`` (α and β together), ``scale`` (LoraHub's
problem, no densities), ``denoise``. Loss and terms are added as they are, so λ is in the loss's
unit; 0.05 was made for cross-entropy in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.search.generational import GenerationalSearcher
from evomerge.search.protocol import SearchProblem, Told

Array = NDArray[np.float64]

#: pycma keeps and factorises a full covariance; above this a generation would take seconds.
_FULL_COVARIANCE_DIMENSION = 500


class Strategy:
    """CMA-ES within bounds, as pycma does it; restarts from its best point when it has ended.

    Args:
        start: where to begin [d], within the bounds.
        low: bounds [d].
        high: bounds [d].
        sigma: initial standard deviation.
        population: points per generation.
        rng: of everything random.
    """

    def __init__(
        self, start: Array, low: Array, high: Array, sigma: float, population: int,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self._low, self._high = low, high
        self._sigma, self._population, self._rng = sigma, population, rng
        self._points: list[Array] = []
        self.best = start
        self.best_loss = inf
        self._strategy = self._started()

    def generate(self) -> Array:
        """Return the next points [n, d]."""
        if self._strategy.stop():
            self._strategy = self._started()
        self._points = self._strategy.ask()
        return np.stack(self._points)[:, : len(self.best)]

    def learn(self, losses: Array, failed: NDArray[np.bool_]) -> None:
        """Take the losses [n] of the points last generated, and which of them are penalties [n]."""
        best = int(np.argmin(np.where(failed, inf, losses)))
        if not failed[best] and losses[best] < self.best_loss:
            self.best_loss = float(losses[best])
            self.best = np.array(self._points[best][: len(self.best)])
        self._strategy.tell(self._points, losses.tolist())

    def _started(self) -> Any:
        import cma

        # pycma needs two dimensions; a second, unused one does no harm.
        spare = max(2 - len(self.best), 0)
        options = {
            "popsize": self._population,
            "bounds": [np.append(self._low, [0.0] * spare), np.append(self._high, [1.0] * spare)],
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "seed": float("nan"),  # its own generator is never used
            "signals_filename": "",  # else pycma takes options from the working directory
            "verbose": -9,
        }
        if len(self.best) > _FULL_COVARIANCE_DIMENSION:
            options["CMA_diagonal"] = True
        start = np.append(self.best, [0.5] * spare)
        return cma.CMAEvolutionStrategy(start, self._sigma, options)


class EvoMergingEngine:
    """The stages, one generation after the other.

    Args:
        problem: what is searched; ``groups`` says which dimensions are densities and which are
            weights (without them all are weights), ``ranges`` what they mean (without them the
            coefficients are the coordinates).
        arguments: ``stages``, ``population``, ``sigma``, ``denoise_share``, ``density_l1``,
            ``weight_l1``; see the registry.

    Raises:
        InputError: other columns are searched, or none of those that the stages are about.
    """

    def __init__(self, problem: SearchProblem, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._rng = np.random.default_rng(problem.seed)
        columns = [column for column, _ in problem.groups] or ["weight.*"] * problem.dimension
        kinds = np.array([column.partition(".")[0] for column in columns])
        self._density, self._weight = kinds == "density", kinds == "weight"
        self._low, self._high = np.array(problem.ranges or ((0.0, 1.0),) * problem.dimension).T
        experts = len({column for column in columns if column.startswith("weight.")})
        share = 1.0 / max(experts if problem.groups else problem.dimension, 1)
        start = np.clip(np.where(self._density, 1.0, share), self._low, self._high)
        if problem.start is not None:
            start = self._low + np.array(problem.start) * (self._high - self._low)
        self._point: Array = start  # what holds for dimensions that no stage searches now
        self._stages = self._plan(problem, set(columns))
        self._generations = 0
        #: Which of the generation that is learned from next failed [n].
        self.failed = np.zeros(arguments["population"], dtype=bool)
        self._enter(0)

    def generate(self) -> Array:
        """Return the next points in the unit box [n, d]."""
        if self._at + 1 < len(self._stages) and self._generations >= self._stages[self._at][1]:
            self._point = self._whole(self._strategy.best[None, :])[0]
            self._enter(self._at + 1)
        self._generations += 1
        self._coefficients = self._whole(self._strategy.generate())
        width = np.where(self._high > self._low, self._high - self._low, 1.0)
        return np.asarray((self._coefficients - self._low) / width)

    def learn(self, losses: Array) -> None:
        """Take the losses [n, 1], and add the L1 terms of what the stage searches."""
        total = losses[:, 0].copy()
        for kind, name in ((self._density, "density_l1"), (self._weight, "weight_l1")):
            searched = kind & self._mask
            if searched.any():
                size = np.abs(self._coefficients[:, searched]).mean(axis=1)
                total = total + self._arguments[name] * size
        self._strategy.learn(total, self.failed[: len(total)])

    def facts(self) -> Mapping[str, str]:
        """Return which stage it is, and its best coefficients."""
        name = self._stages[self._at][2]
        best = self._whole(self._strategy.best[None, :])[0]
        facts = {"stage": f"{self._at + 1} of {len(self._stages)} ({name})"}
        for kind, mask in (("densities", self._density), ("weights", self._weight)):
            if mask.any():
                values = best[mask]
                facts[f"best {kind}"] = (
                    f"{values.min():.3g} to {values.max():.3g}, mean {values.mean():.3g}"
                )
        return facts

    def _plan(self, problem: SearchProblem, columns: set[str]) -> list[tuple[Array, float, str]]:
        """Return the stages: dimensions [d], generations and name of each."""
        other = sorted(columns - {c for c in columns if c.startswith(("density.", "weight."))})
        if other:
            raise InputError(
                f"searcher 'evo_merging': searches densities and weights of experts, not "
                f"{', '.join(other)} (give them one number, as in gamma: 0)"
            )
        wanted = {
            "both": [(self._density, "densities"), (self._weight, "weights")],
            "joint": [(self._density | self._weight, "densities and weights")],
            "denoise": [(self._density, "densities")],
            "scale": [(self._weight, "weights")],
        }[self._arguments["stages"]]
        found = [(mask, name) for mask, name in wanted if mask.any()]
        if not found:
            raise InputError(
                f"searcher 'evo_merging': stages: {self._arguments['stages']} needs searched "
                f"{wanted[0][1]}, and this space has none (give them a {{low, high}} range)"
            )
        generations = problem.budget / self._arguments["population"]
        first = max(1.0, round(self._arguments["denoise_share"] * generations))
        lengths = [first, inf] if len(found) == 2 else [inf]
        return [(mask, length, name) for (mask, name), length in zip(found, lengths, strict=True)]

    def _enter(self, number: int) -> None:
        """Begin a stage at the present point."""
        self._at = number
        self._mask = self._stages[number][0]
        self._strategy = Strategy(
            self._point[self._mask],
            self._low[self._mask],
            self._high[self._mask],
            self._arguments["sigma"],
            self._arguments["population"],
            self._rng,
        )

    def _whole(self, searched: Array) -> Array:
        """Return all coefficients [n, d] of those that the stage searches."""
        points = np.tile(self._point, (len(searched), 1))
        points[:, self._mask] = searched
        return points


class EvoMergingSearcher(GenerationalSearcher):
    """Ask/tell over the stages."""

    def __init__(self, problem: SearchProblem, arguments: Mapping[str, Any]) -> None:
        self._stages = EvoMergingEngine(problem, arguments)
        self._failed: set[int] = set()
        super().__init__(problem, self._stages)

    def tell(self, results: Sequence[Told]) -> None:
        """See ``GenerationalSearcher.tell``; a failed merge never is the best of a stage."""
        super().tell(results)
        self._failed.update(told.id for told in results if told.failed)

    def _next_generation(self) -> None:
        self._stages.failed = np.array([id_ in self._failed for id_ in self._ids], dtype=bool)
        super()._next_generation()

    def facts(self) -> Mapping[str, str]:
        """See ``EvoMergingEngine.facts``."""
        return self._stages.facts()


def evo_merging(problem: SearchProblem, arguments: Mapping[str, Any]) -> EvoMergingSearcher:
    """Return Evo-Merging; ``stages: scale`` is LoraHub's problem, solved by CMA-ES."""
    return EvoMergingSearcher(problem, arguments)
