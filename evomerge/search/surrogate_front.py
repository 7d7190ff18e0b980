"""From surrogates to points: an evolutionary front on them, and a batch out of it.

The front is found by a searcher of this package on the predicted losses, which cost nothing; the
batch is chosen by predicted hypervolume, one point after the other (map.md 1.10, 5).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evomerge.pareto import hypervolume, nondominated
from evomerge.search.design import SAME, nearest_failed, novel
from evomerge.search.protocol import SearchProblem, Told, WarmPoint
from evomerge.space import Kind

Array = NDArray[np.float64]

#: Predicted losses [n, m] of points [n, d].
Predict = Callable[[Array], Array]

#: How many of the predicted points a batch is chosen from.
_POOL = 200

#: How far apart, in some coordinate, two points of a batch should be that gain no hypervolume;
#: less for a larger batch, whose members would else fill the box.
_APART = 0.1

#: Coordinates that one call may let the evolution breed: above about 100 dimensions its own
#: overhead grows with them, and a candidate must not cost more than 50 ms.
_COORDINATES = 240_000


@dataclass(frozen=True, slots=True)
class Effort:
    """How long the surrogates are searched.

    Attributes:
        algorithm: name of the searcher that does it: ``nsga2`` or ``nsga3``.
        population: points per generation.
        generations: at most; fewer in high dimensions.
    """

    algorithm: str
    population: int
    generations: int


def evolve(
    predict: Predict, start: Array, objectives: int, effort: Effort, seed: int,
    kinds: Sequence[Kind] = (),
) -> Array:  # fmt: skip
    """Return good points of the surrogates [<= 200, d]: their front, and what is close to it.

    Args:
        predict: of the surrogates.
        start: points to begin with [s, d], s >= 1; the measured front.
        objectives: m.
        effort: see there.
        seed: of the evolution.
        kinds: of the dimensions.
    """
    from evomerge.search.registry import SEARCHERS

    dimension = start.shape[1]
    population = effort.population
    generations = max(4, min(effort.generations, _COORDINATES // (dimension * population)))
    start = start[: population // 2]
    warm = tuple(
        WarmPoint(tuple(x), tuple(y))
        for x, y in zip(start.tolist(), predict(start).tolist(), strict=True)
    )
    problem = SearchProblem(
        dimension, objectives, generations * population, population, seed, warm, kinds=tuple(kinds)
    )
    entry = SEARCHERS[effort.algorithm]  # our own: looking for plugins takes milliseconds
    arguments = {name: spec.default for name, spec in entry.arguments.items()}
    searcher = entry.build(problem, {**arguments, "population": population})
    points, losses = [start], [predict(start)]
    for _ in range(generations):
        asked = searcher.ask(10 * population)
        if not asked:  # only duplicates could be bred
            break
        rows = np.array([candidate.x for candidate in asked])
        values = predict(rows)
        told = zip(asked, values.tolist(), strict=True)
        searcher.tell([Told(candidate.id, tuple(value)) for candidate, value in told])
        points.append(rows)
        losses.append(values)
    everything, predicted = np.concatenate(points), np.concatenate(losses)
    return everything[_best_layers(predicted, _POOL)]


def _best_layers(losses: Array, count: int) -> list[int]:
    """Return up to ``count`` rows of ``losses`` [n, m], front by front, equal rows once."""
    _, first = np.unique(losses, axis=0, return_index=True)
    rest = np.sort(first)
    if losses.shape[1] == 1:
        return [int(row) for row in rest[np.argsort(losses[rest, 0], kind="stable")][:count]]
    chosen: list[int] = []
    while len(rest) and len(chosen) < count:
        front = list(nondominated(losses[rest]))
        chosen += [int(row) for row in rest[front][: count - len(chosen)]]
        rest = np.delete(rest, front)
    return chosen


@dataclass(frozen=True)
class Scale:
    """Losses in units in which all objectives count alike: what hypervolume is measured in.

    Attributes:
        low: [m].
        width: [m], above 0.
    """

    low: Array
    width: Array

    #: Beyond the worst loss that the scale was made from, by a tenth of their range.
    REFERENCE = 1.1

    @staticmethod
    def of(losses: Array) -> Scale:
        """Return the scale on which ``losses`` [n, m], n >= 1, fill [0, 1]."""
        low, high = losses.min(axis=0), losses.max(axis=0)
        with np.errstate(over="ignore"):
            width = high - low
        return Scale(low, np.where((width > 0.0) & np.isfinite(width), width, 1.0))

    def __call__(self, losses: Array) -> Array:
        """Return ``losses`` [n, m] on the scale, bounded so that products stay finite."""
        return np.asarray(np.clip((losses - self.low) / self.width, -1e3, 1e3))


def greedy_batch(predicted: Array, known: Array, count: int) -> list[int]:
    """Return up to ``count`` rows that raise the hypervolume most, one after the other.

    Hypervolume has diminishing returns, so an old gain bounds the new one from above and most
    gains need no second look (Minoux 1978); the rows are those of the plain greedy rule. Rows
    that gain nothing are left out.

    Args:
        predicted: candidates [c, m] on a ``Scale``.
        known: measured [n, m] on the same one.
        count: of rows to choose.
    """
    objectives = predicted.shape[1]
    reference = (Scale.REFERENCE,) * objectives
    front = known[list(nondominated(known))]
    volume = hypervolume(front, reference) if len(front) else 0.0

    def gain(row: int) -> float:
        return hypervolume(np.vstack([front, predicted[row : row + 1]]), reference) - volume

    waiting = [(-gain(row), row, 0) for row in range(len(predicted))]
    heapq.heapify(waiting)
    chosen: list[int] = []
    while waiting and len(chosen) < count:
        bound, row, seen = heapq.heappop(waiting)
        if bound > -1e-12:  # rounding of volumes near one
            break
        if seen < len(chosen):
            heapq.heappush(waiting, (-gain(row), row, len(chosen)))
            continue
        chosen.append(row)
        front = np.vstack([front, predicted[row : row + 1]])
        volume = hypervolume(front, reference)
    return chosen


def choose(
    pool: Array, predicted: Array, scale: Scale, known: Array, losses: Array, failed: Array,
    count: int, spare: Array,
) -> Array:  # fmt: skip
    """Return ``count`` points to evaluate next [count, d].

    The greedy batch out of the pool; where it gains nothing more, the best predicted points that
    are apart from everything known; then spare points.

    Args:
        pool: candidates [c, d].
        predicted: their losses [c, m].
        scale: of the hypervolume.
        known: measured points [n, d].
        losses: of them [n, m].
        failed: points that failed [f, d].
        count: wanted.
        spare: points anywhere [s, d], s >= count.
    """
    usable = novel(pool, np.concatenate([known, failed])) & ~nearest_failed(pool, known, failed)
    pool, predicted = pool[usable], scale(predicted[usable])
    rows = greedy_batch(predicted, scale(losses), count) if len(pool) else []
    rows += _apart(pool, predicted, rows, count - len(rows))
    return np.concatenate([pool[rows], spare[: count - len(rows)]])


def _apart(pool: Array, predicted: Array, taken: Sequence[int], count: int) -> list[int]:
    """Return up to ``count`` more rows, the best by their mean that keep a distance.

    The distance is halved until there are enough.
    """
    order = np.argsort(predicted.mean(axis=1), kind="stable")
    chosen: list[int] = []
    distance = _APART * max(count, 1) ** (-1.0 / pool.shape[1])
    while len(chosen) < count and distance > SAME:
        for row in order:
            if len(chosen) == count:
                break
            others = pool[[*taken, *chosen]]
            if not len(others) or np.abs(others - pool[row]).max(axis=1).min() >= distance:
                chosen.append(int(row))
        distance /= 2
    return chosen


def surroundings(points: Array, count: int, generator: np.random.Generator) -> Array:
    """Return ``count`` points [count, d] around ``points`` [f, d], near ones and far ones.

    An evolution that has converged leaves a batch nothing to choose from; these do.
    """
    centres = points[np.arange(count) % len(points)]
    spread = np.geomspace(0.01, 0.2, count)[generator.permutation(count)]
    steps = spread[:, None] * generator.standard_normal(centres.shape)
    return np.asarray(np.clip(centres + steps, 0.0, 1.0))


def measured_front(points: Array, losses: Array) -> Array:
    """Return the points [f, d] of ``points`` [n, d] whose losses [n, m] nothing dominates."""
    rows: Sequence[int] = nondominated(losses)
    return points[list(rows)]
