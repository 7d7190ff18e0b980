"""M2N2: merging with niches, attraction and moving split points (Abrantes et al. 2025).

arXiv 2508.16204 and its code, on coefficient tables (``tables``) with competition for items
(``niches``). A child takes its parents' tables, one share before a block by chance and the
opposite share from it on, and joins an archive from which the member that earns least is dropped.

Where this differs from the publication, and why:

* The archive holds tables, which give the same models (tests replay genealogies on weights).
* Split points lie between the blocks of the study's partition, the finest of which are rows.
* Results join whenever they come; the publication evaluates one child at a time. Failed ones,
  and ones without the item scores that others have (a race was stopped), never join.
* Without item scores the loss counts as one item, in units of its range in the archive.
* All baselines of the study are first members, not only the experts; ``experts_only`` undoes it.
  They are asked again, so that they are scored on the same items as their children; a study knows
  their scores already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.search import niches
from evomerge.search.ledger import Ledger, check_count
from evomerge.search.protocol import Candidate, SearchProblem, Told
from evomerge.search.tables import Pair, Table, arc, cross, on_arc, prefix_grams
from evomerge.trial import Origin

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Birth:
    """Where a member comes from.

    Attributes:
        parents: candidate ids; empty for first members.
        weight: w, the second parent's share (or place on the arc) before the split; 1 - w after.
        split: the first block of the second side; 0 puts all blocks there.
    """

    parents: tuple[int, ...] = ()
    weight: float = 0.0
    split: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One member of the archive.

    Attributes:
        id: candidate id.
        table: its coefficients.
        row: item scores, larger is better [I]; minus its losses where there are no item scores.
    """

    id: int
    table: Table
    row: Array


class M2N2Searcher:
    """Ask/tell over an archive of coefficient tables.

    Attributes:
        generation: 0 for ever: where a study draws fresh items per generation, the members of
            one archive are scored on the same ones.
        lineage: of all candidates asked, by id; with the first members it gives every table again.

    Args:
        problem: what is searched; ``groups`` gives the blocks (without them every dimension is
            a block), ``ranges`` and ``grams`` the geometry for slerp.
        arguments: ``archive``, ``alpha``, ``attraction``, ``split``, ``mixing``, ``mutation``,
            ``warmup``, ``relative``, ``experts_only``, ``ties``; see the registry.

    Raises:
        InputError: slerp without inner products.
        ValueError: ``ranges`` or ``grams`` of the wrong shape.
    """

    def __init__(self, problem: SearchProblem, arguments: Mapping[str, Any]) -> None:
        self._ledger = Ledger(problem)
        self._rng = np.random.default_rng(problem.seed)
        self._blocks, self._columns = grid(problem)
        ranges = np.array(problem.ranges or ((0.0, 1.0),) * problem.dimension)  # [d, 2]
        if ranges.shape != (problem.dimension, 2):
            raise ValueError(
                f"SearchProblem.ranges: expected [{problem.dimension}, 2], got {ranges.shape}"
            )
        self._low, self._width = ranges[:, 0], ranges[:, 1] - ranges[:, 0]
        self._mixing: str = arguments["mixing"]
        self._prefix = self._prefix_grams(problem) if self._mixing != "linear" else None
        self._size: int = arguments["archive"] or max(10, min(20, 5 + problem.budget // 100))
        self._alpha: float = arguments["alpha"]
        self._attraction: bool = arguments["attraction"]
        self._split: bool = arguments["split"]
        self._mutation: float = arguments["mutation"]
        self._ties: str = arguments["ties"]
        self._relative: bool = arguments["relative"]
        self._item_weights = problem.item_weights
        self.generation = 0
        self.lineage: dict[int, Birth] = {}
        self._archive: list[Member] = []
        self._counts: tuple[int, ...] = ()  # items per task of the archive
        self._strange = 0  # results without the items that others have

        warm = [
            point.x
            for point in problem.warm
            if not arguments["experts_only"] or point.label.startswith("expert:")
        ]
        self._first = len(warm)  # candidates 0 to this are baselines
        self._waiting = list(warm)
        # Fewer than two models cannot be crossed; then the box is sampled instead.
        self._random = self._size - len(warm) if len(warm) < 2 else 0
        default = max(0, min(50, self._size - len(warm)))
        self._warmup: int = default if arguments["warmup"] is None else arguments["warmup"]

    @property
    def archive(self) -> tuple[Member, ...]:
        """The members, oldest first; with ``ties: place`` in their places."""
        return tuple(self._archive)

    def ask(self, n: int) -> Sequence[Candidate]:
        """Return up to ``n`` candidates; fewer while fewer than two members have results.

        Raises:
            ValueError: ``n`` is negative.
        """
        check_count(n)
        candidates: list[Candidate] = []
        while len(candidates) < n:
            candidate = self._next()
            if candidate is None:
                break
            candidates.append(candidate)
        return tuple(candidates)

    def tell(self, results: Sequence[Told]) -> None:
        """Let results join the archive, in the order given.

        Raises:
            CallOrderError: an id that was not asked, or was told already.
            ValueError: wrong number of losses, a loss that is not finite, or item scores that
                do not fit ``item_weights`` or are not finite.
        """
        for told in results:
            self._check_items(told)
        points = dict(self._ledger.outstanding)
        self._ledger.settle(results)
        for told in results:
            if not told.failed:
                self._join(told, points[told.id].x)

    def facts(self) -> Mapping[str, str]:
        """Return the state of the archive, and the best member's rows and parents."""
        facts = {"archive": f"{len(self._archive)} of {self._size} members"}
        if self._strange:
            facts["left out"] = f"{self._strange} results without the items of the others"
        if self._archive:
            best = self._archive[int(np.argmax(self._plain_means()))]
            birth = self.lineage[best.id]
            facts["best member"] = (
                f"candidate {best.id}, {len(best.table.rows)} rows for {self._blocks} blocks "
                f"({len(best.table.compact(0.01).rows)} when rows within 0.01 are joined)"
            )
            if birth.parents:
                first, second = birth.parents
                facts["its birth"] = (
                    f"from candidate {first} and candidate {second}, split at block {birth.split}, "
                    f"w = {birth.weight:.3f}"
                )
        return facts

    def origin(self, candidate: int) -> Origin | None:
        """Return the parents of a candidate; None of first members."""
        birth = self.lineage[candidate]
        if not birth.parents:
            return None
        split = f"split before block {birth.split}, " if self._split else ""
        return Origin(birth.parents, f"{split}w = {birth.weight:.3f}")

    # -- asking --------------------------------------------------------------------------------

    def _next(self) -> Candidate | None:
        """Return the next candidate; None to wait for results."""
        if self._waiting:
            return self._issue(np.asarray(self._waiting.pop(0), np.float64), Birth())
        if self._random > 0 or (len(self._archive) < 2 and not self._ledger.outstanding):
            self._random -= 1
            return self._issue(self._rng.random(len(self._low)), Birth())
        if len(self._archive) < 2:
            return None
        first, second = self._parents()
        return self._child(self._archive[first], self._archive[second])

    def _issue(self, x: Array, birth: Birth) -> Candidate:
        candidate = self._ledger.issue(x)
        self.lineage[candidate.id] = birth
        return candidate

    def _parents(self) -> tuple[int, int]:
        """Return the places of two members in the archive."""
        if self._warmup > 0:
            self._warmup -= 1
            first_ones = [i for i, one in enumerate(self._archive) if one.id < self._first]
            if len(first_ones) >= 2:
                a, b = self._rng.choice(len(first_ones), size=2, replace=False)
                return first_ones[int(a)], first_ones[int(b)]
        scores = self._scores()
        share = self._share(scores)
        earned = niches.fitness(scores, share)
        first = niches.roulette(self._rng, earned)
        if not self._attraction:
            return first, niches.roulette(self._rng, earned)
        offered = niches.attraction(scores, first, share)
        if offered.max() > 0.0:
            return first, niches.roulette(self._rng, offered)
        # Nobody has what the first lacks: any other member that earns, else any other.
        others = earned.copy()
        others[first] = 0.0
        if not others.max() > 0.0:
            others = (np.arange(len(others)) != first).astype(np.float64)
        return first, niches.roulette(self._rng, others)

    def _child(self, one: Member, two: Member) -> Candidate:
        weight = float(self._rng.random())
        split = int(self._rng.integers(self._blocks)) if self._split else 0
        before, after = self._shares_of_parents(one.table, two.table, split, weight)
        dense = cross(one.table, two.table, split, before, after).dense().reshape(-1)
        # A column with one value only has no width; its coordinate does not matter.
        width = np.where(self._width > 0.0, self._width, 1.0)
        x = (dense - self._low) / width
        if self._mutation > 0.0:
            x = x + self._mutation * self._rng.standard_normal(len(x))
        return self._issue(x, Birth((one.id, two.id), weight, split))

    def _shares_of_parents(
        self, one: Table, two: Table, split: int, weight: float
    ) -> tuple[Pair, Pair]:
        """Return the parents' coefficients before the split and after it."""
        angles = (0.0, 0.0)
        if self._prefix is not None and self._mixing == "one_angle":
            angles = (arc(one, two, self._prefix, 0, self._blocks),) * 2
        elif self._prefix is not None:
            angles = (
                arc(one, two, self._prefix, 0, split),
                arc(one, two, self._prefix, split, self._blocks),
            )
        return on_arc(angles[0], weight), on_arc(angles[1], 1.0 - weight)

    # -- the archive ---------------------------------------------------------------------------

    def _join(self, told: Told, x: Sequence[float]) -> None:
        """Add a member; of too many the one that earns least goes, be it the new one."""
        counts = tuple(map(len, told.items)) if any(told.items) else ()
        if counts and not self._counts:
            self._strange += len(self._archive)
            self._archive, self._counts = [], counts
        if counts != self._counts:
            self._strange += 1
            return
        if counts:
            signs = np.repeat(np.sign(self._task_weights(counts)), counts)
            row = np.concatenate([np.asarray(scores, np.float64) for scores in told.items]) * signs
        else:
            row = -np.asarray(told.losses, np.float64)
        dense = self._low + np.asarray(x) * self._width
        table = Table.of(dense.reshape(self._blocks, self._columns))
        self._archive.append(Member(told.id, table, row))
        if len(self._archive) > self._size:
            scores = self._scores()
            worst = int(np.argmin(niches.fitness(scores, self._share(scores))))
            if self._ties == "place" and worst < self._size:
                self._archive[worst] = self._archive.pop()
            else:
                del self._archive[worst]

    def _rows(self) -> Array:
        return np.stack([member.row for member in self._archive])  # [P, I]

    def _scores(self) -> Array:
        """Return scores that are at least 0 [P, I]."""
        if self._counts:
            return niches.above_worst(self._rows(), self._relative)
        # Halves, so that the range of the largest floats is finite.
        return niches.in_units_of_best(niches.above_worst(self._rows() / 2, relative=True))

    def _share(self, scores: Array) -> Array:
        counts = self._counts or (1,) * scores.shape[1]
        weights = niches.task_weights(counts, self._task_weights(counts))
        return niches.shares(scores, niches.capacities(scores, weights), self._alpha)

    def _plain_means(self) -> Array:
        """Return the weighted mean score of each member [P]."""
        counts = self._counts or (1,) * len(self._archive[0].row)
        weights = niches.task_weights(counts, self._task_weights(counts))
        return np.asarray((self._rows() * weights).sum(axis=1))

    def _task_weights(self, counts: Sequence[int]) -> Sequence[float]:
        """Return the weight of each task; 1 each without item scores, where losses are signed."""
        return self._item_weights if self._counts and self._item_weights else (1.0,) * len(counts)

    # -- checks --------------------------------------------------------------------------------

    def _check_items(self, told: Told) -> None:
        if told.items and self._item_weights and len(told.items) != len(self._item_weights):
            raise ValueError(
                f"tell: candidate {told.id} has item scores of {len(told.items)} tasks, "
                f"item_weights of the problem are for {len(self._item_weights)}"
            )
        if not all(np.isfinite(scores).all() for scores in told.items):
            raise ValueError(f"tell: candidate {told.id} has item scores that are not finite")

    def _prefix_grams(self, problem: SearchProblem) -> Array:
        if not problem.grams:
            raise InputError(
                f"searcher 'm2n2': mixing: {self._mixing} needs inner products of what the "
                "searched columns multiply, and this space has none (search the weight of every "
                "expert of linear with normalize: false, or of task_arithmetic; or use mixing: "
                "linear)"
            )
        grams = np.array(problem.grams, np.float64)
        if grams.shape != (self._blocks, self._columns, self._columns):
            raise ValueError(
                f"SearchProblem.grams: expected [{self._blocks}, {self._columns}, "
                f"{self._columns}], got {grams.shape}"
            )
        return prefix_grams(grams)


def grid(problem: SearchProblem) -> tuple[int, int]:
    """Return B and C where every block has the same columns in the same order, else d and 1."""
    blocks: dict[str, list[str]] = {}
    for column, block in problem.groups:
        blocks.setdefault(block, []).append(column)
    columns = next(iter(blocks.values()), [])
    regular = [(column, block) for block in blocks for column in columns]
    if not blocks or regular != list(problem.groups):
        return problem.dimension, 1
    return len(blocks), len(columns)


def m2n2(problem: SearchProblem, arguments: Mapping[str, Any]) -> M2N2Searcher:
    """Return M2N2, or with ``alpha: 0``, ``attraction: false`` the genetic algorithm beside it."""
    return M2N2Searcher(problem, arguments)
