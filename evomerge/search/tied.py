"""Tie, then untie: few coefficients first, more of them when the coarser space stops paying.

A level whose searcher gained nothing did not pay: when that is so of the last one, the search ends
where it gained last.

Level 0 has one coordinate per column (one coefficient per expert), shared by all blocks; the
middle level one per column and run of neighbouring blocks; the last level is the space itself.
A point of a coarse level is a point of every finer one, so nothing is lost by going on. In the
prototype (map.md, 4) a tied search beat every untied one at 48 dimensions, and untying after 60
trials gained a little more at 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.pareto import hypervolume, nondominated
from evomerge.search.protocol import Searcher, SearchProblem, WarmPoint
from evomerge.search.stages import Seen, Stage, StagedSearcher
from evomerge.search.surrogate_front import Scale

Array = NDArray[np.float64]

#: Up to here Gaussian processes search a level (map.md 2.6); above, an evolutionary algorithm.
SURROGATE_DIMENSIONS = 12

#: Members of the coarser levels that a finer one starts from: what was good, not all there was.
_INHERITED = 24

#: A gain in hypervolume (or best loss), in units of the losses' range, below which a level has
#: stopped paying: an item of a hundred moves one objective by a hundredth of its range or so.
_PAYS = 0.005


def levels(problem: SearchProblem, blocks: int) -> tuple[NDArray[np.intp], ...]:
    """Return, coarse to fine, the tied coordinate of every dimension [d].

    Args:
        problem: its groups name column and block of each dimension; without groups every
            dimension counts as a block of one column.
        blocks: runs of blocks at the middle level.

    Returns:
        One map per level, without levels that tie like another one.
    """
    groups = problem.groups or tuple(("", str(index)) for index in range(problem.dimension))
    columns = {name: number for number, name in enumerate(dict.fromkeys(c for c, _ in groups))}
    named = [b for _, b in groups if b]  # what belongs to the whole merge has no block
    order = {name: number for number, name in enumerate(dict.fromkeys(named))}
    found: list[NDArray[np.intp]] = []
    for runs in sorted({1, min(blocks, len(order)), len(order)}):
        keys = [(columns[c], order[b] * runs // len(order) if b else 0) for c, b in groups]
        number = {key: index for index, key in enumerate(sorted(set(keys)))}
        tying = np.array([number[key] for key in keys])
        if not found or tying.max() > found[-1].max():
            found.append(tying)
    return tuple(found)


class TiedPlan:
    """One stage per level, the next one starting from what the last one found.

    Args:
        problem: what is searched, in all its dimensions.
        blocks: runs of blocks at the middle level.
        patience: trials without a gain after which a level is left; None for a tenth of the
            budget, at least 10.
        share: of the budget that the levels before the last one may use together.
    """

    def __init__(
        self, problem: SearchProblem, blocks: int, patience: int | None, share: float
    ) -> None:
        self._problem = problem
        self._levels = levels(problem, blocks)
        self._patience = patience or max(10, 2 * problem.parallel, problem.budget // 10)
        self._share = share
        self._archive = [(point.x, point.losses) for point in problem.warm]
        self._level = -1
        self._paid = 0  # the last level that gained anything
        self._final = False

    def next_stage(self, last: Sequence[Seen], asked: int) -> Stage:
        """Return the next level, started from the warm points and the best of what is known."""
        good = [one.told.losses for one in last if not one.told.failed]
        if self._level > 0 and self._gained(good):
            self._paid = self._level
        self._archive += [(one.x, one.told.losses) for one in last if not one.told.failed]
        self._final = self._level == len(self._levels) - 1
        self._level = self._paid if self._final else self._level + 1
        tying = self._levels[self._level]
        dimension = int(tying.max()) + 1
        seeds = np.random.SeedSequence([self._problem.seed, self._level, self._final])
        kinds = self._problem.kinds and tuple(self._problem.kinds[n] for n in _first(tying))
        problem = SearchProblem(
            dimension,
            self._problem.objectives,
            max(1, self._problem.budget - asked),
            self._problem.parallel,
            int(seeds.generate_state(1)[0]),
            tuple(self._inherited(tying)),
            kinds=kinds,
        )
        name = level_searcher(problem)
        return Stage(
            title=f"{dimension} coefficients by {name}",
            searcher=_make(name, problem),
            lift=lambda z: z[tying],
            losses=lambda losses: losses,
        )

    def is_over(self, current: Sequence[Seen], asked: int) -> bool:
        """Return whether this level has stopped paying, or used up its share of the budget.

        The last level is left only where it has not paid at all, and has had time to.
        """
        good = [one.told.losses for one in current if not one.told.failed]
        if self._final or len(self._levels) == 1:
            return False
        if self._level == len(self._levels) - 1:
            enough = max(2 * self._patience, self._problem.budget // 4)
            return len(current) >= enough and not self._gained(good)
        if asked >= self._share * self._problem.budget:
            return True
        if len(current) < self._patience or len(good) < 2:
            return len(current) >= 2 * self._patience
        old = sum(not one.told.failed for one in current[: len(current) - self._patience])
        return not self._gained(good[old:], good[:old])

    def _gained(
        self, new: Sequence[tuple[float, ...]], recent: Sequence[tuple[float, ...]] = ()
    ) -> bool:
        """Return whether new losses improved on what was known before the level, and on recent."""
        before = [*(losses for _, losses in self._archive), *recent]
        if len(before) < 2 or not new:
            return len(before) < 2
        return _gain(np.array(before), np.array(new)) >= _PAYS

    def _inherited(self, tying: NDArray[np.intp]) -> list[WarmPoint]:
        """Return what is known and can be said in this level's coordinates, the best of it."""
        first = _first(tying)  # [dimension]
        known = [
            WarmPoint(tuple(np.asarray(x)[first].tolist()), losses)
            for x, losses in self._archive
            if np.array_equal(np.asarray(x)[first][tying], np.asarray(x))
        ]
        if self._level == 0 or len(known) <= _INHERITED:
            return known
        return [known[row] for row in _best_first([one.losses for one in known])[:_INHERITED]]


def _first(tying: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the first dimension of each tied coordinate."""
    return np.unique(tying, return_index=True)[1]


def _gain(before: Array, after: Array) -> float:
    """Return by how much ``after`` [k, m] raises the hypervolume of ``before`` [n, m].

    In units of the ranges of ``before``; with one objective, how far the best loss fell.
    """
    scale = Scale.of(before)
    reference = (Scale.REFERENCE,) * before.shape[1]
    known = scale(before)
    both = np.vstack([known, scale(after)])
    return hypervolume(both, reference) - hypervolume(known, reference)


def _best_first(losses: Sequence[tuple[float, ...]]) -> list[int]:
    """Return all rows of ``losses`` [n, m], front by front."""
    rows, matrix = list(range(len(losses))), np.array(losses, np.float64)
    order: list[int] = []
    while rows:
        front = [rows[index] for index in nondominated(matrix[rows])]
        order += front
        rows = [row for row in rows if row not in set(front)]
    return order


def level_searcher(problem: SearchProblem) -> str:
    """Return the name of the searcher for a level: few coefficients, one loss, or a front."""
    if problem.dimension <= SURROGATE_DIMENSIONS:
        return "gp_rounds"
    if problem.objectives == 1:
        return "cma"
    return "smsemoa" if problem.objectives <= 3 else "nsga3"


def _make(name: str, problem: SearchProblem) -> Searcher:
    from evomerge.search.registry import check_arguments, find_searcher

    return find_searcher(name).build(problem, check_arguments(name, {}))


def tied(problem: SearchProblem, arguments: Mapping[str, Any]) -> StagedSearcher:
    """Return tie, then untie."""
    plan = TiedPlan(problem, arguments["groups"], arguments["patience"], arguments["share"])
    return StagedSearcher(problem, plan)
