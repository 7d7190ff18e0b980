"""Nested MAP: many experts as a tree of merges of two (Li et al. 2024; specs map.md 1.7).

A quadratic in N coefficients has (N+1)(N+2)/2 unknowns; one in two has six. Each node of a
binary tree merges the merges of its two children with two coefficients by MAP, the inner nodes
for the mean of their own objectives, the root for the front of all. A node's merge is
``base + a·left + b·right``, so a leaf's coefficient is the product along its path.

As published, children are paired by the most similar scores. Objectives belong to the expert
that is best in them, since a study need not have one task per expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.search.map import quadratic_map
from evomerge.search.protocol import SearchProblem, WarmPoint
from evomerge.search.stages import Seen, Stage, StagedSearcher
from evomerge.search.surrogate_front import Scale
from evomerge.search.tied import levels

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Node:
    """A merge in the tree.

    Attributes:
        name: of the experts below, e.g. ``(math+code)``.
        x: where it lies in the box [d].
        losses: measured [m]; None where they are not known.
        own: objectives that belong to the experts below.
    """

    name: str
    x: Array
    losses: tuple[float, ...] | None
    own: tuple[int, ...]


class NestedPlan:
    """One stage per node of the tree, from the leaves to the root.

    Args:
        problem: what is searched. Base and experts are found by the labels of its warm points,
            a base that was not scored by what the experts share; without experts the lowest
            corner stands for the base and each column for an expert.
        arguments: of MAP.
    """

    def __init__(self, problem: SearchProblem, arguments: Mapping[str, Any]) -> None:
        self._problem = problem
        self._arguments = arguments
        self._base, self._nodes = _leaves(problem)
        self._pair: tuple[Node, Node] | None = None
        losses = [node.losses for node in self._nodes if node.losses is not None]
        # Objectives of different units are averaged in units of what the experts differ by.
        self._scale = Scale.of(np.array(losses)) if losses else None

    def next_stage(self, last: Sequence[Seen], asked: int) -> Stage:
        """Return the next pair's stage; the last merge becomes a node first."""
        if self._pair is not None:
            self._nodes.append(self._merged(self._pair, last))
        left, right = self._pair = self._closest()
        self._nodes = [node for node in self._nodes if node is not left and node is not right]
        root = not self._nodes
        own = tuple(sorted({*left.own, *right.own})) or tuple(range(self._problem.objectives))
        budget = max(1, (self._problem.budget - asked) // (len(self._nodes) + 1))
        corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
        known = {point.x: point.losses for point in self._problem.warm}
        places = [tuple(self._lift(np.array(z)).tolist()) for z in corners]
        losses = [known.get(places[0]), left.losses, right.losses]
        seeds = np.random.SeedSequence([self._problem.seed, asked])
        stage = SearchProblem(
            dimension=2,
            objectives=self._problem.objectives if root else 1,
            budget=budget,
            parallel=self._problem.parallel,
            seed=int(seeds.generate_state(1)[0]),
            warm=tuple(
                WarmPoint(z, one if root else self._mean(one, own))
                for z, one in zip(corners, losses, strict=True)
                if one is not None
            ),
        )
        return Stage(
            title=f"{left.name} with {right.name}",
            searcher=quadratic_map(stage, self._arguments),
            lift=self._lift,
            losses=(lambda one: one) if root else (lambda one: self._mean(one, own)),
            limit=None if root else budget,
        )

    def is_over(self, current: Sequence[Seen], asked: int) -> bool:
        """Nodes end at their limit, the root never."""
        return False

    def _lift(self, z: Array) -> Array:
        """Return the merge [d] of the current pair with coefficients ``z`` [2]."""
        assert self._pair is not None
        left, right = self._pair
        moved = z[0] * (left.x - self._base) + z[1] * (right.x - self._base)
        return np.asarray(np.clip(self._base + moved, 0.0, 1.0))

    def _merged(self, pair: tuple[Node, Node], last: Sequence[Seen]) -> Node:
        """Return the best measured merge of a pair as a node; the equal one when all failed."""
        own = tuple(sorted({*pair[0].own, *pair[1].own}))
        name = f"({pair[0].name}+{pair[1].name})"
        good = [one for one in last if not one.told.failed]
        if not good:
            return Node(name, self._lift(np.array([0.5, 0.5])), None, own)
        objectives = own or tuple(range(self._problem.objectives))
        best = min(good, key=lambda one: self._mean(one.told.losses, objectives))
        return Node(name, np.array(best.x), best.told.losses, own)

    def _mean(self, losses: tuple[float, ...], own: tuple[int, ...]) -> tuple[float, ...]:
        """Return the one loss of an inner node: the mean of its own objectives."""
        row = np.array([losses])
        scaled = row if self._scale is None else self._scale(row)
        # Divided first, so that huge losses stay finite.
        return (float((scaled[0, list(own)] / len(own)).sum()),)

    def _closest(self) -> tuple[Node, Node]:
        """Return the two nodes whose own scores differ least; the first two without scores."""
        values = np.array([self._value(node) for node in self._nodes])  # [n]
        # A node without scores is as close to all others as can be.
        apart = np.nan_to_num(np.abs(values[:, None] - values[None, :]), nan=0.0)  # [n, n]
        apart[np.tril_indices(len(values))] = np.inf
        left, right = divmod(int(apart.argmin()), len(values))  # the first of equals
        return self._nodes[left], self._nodes[right]

    def _value(self, node: Node) -> float:
        """Return the mean of a node's own losses; NaN where they are not known."""
        if node.losses is None:
            return float("nan")
        return self._mean(node.losses, node.own or tuple(range(self._problem.objectives)))[0]


def _leaves(problem: SearchProblem) -> tuple[Array, list[Node]]:
    """Return the point of the base [d] and the experts as nodes."""
    base = next((point for point in problem.warm if point.label == "base"), None)
    experts = [point for point in problem.warm if point.label.startswith("expert:")]
    if len(experts) >= 2 and (base is not None or problem.groups):
        owners = np.array([point.losses for point in experts]).argmin(axis=0)  # [m]
        return _base(problem, experts) if base is None else np.array(base.x), [
            Node(
                point.label.removeprefix("expert:"),
                np.array(point.x),
                point.losses,
                tuple(np.flatnonzero(owners == number).tolist()),
            )
            for number, point in enumerate(experts)
        ]
    tying = levels(problem, 1)[0]
    if tying.max() == 0:  # one column: its blocks are what can be merged
        tying = np.arange(problem.dimension)
    columns = [(tying == place).astype(np.float64) for place in range(int(tying.max()) + 1)]
    if len(columns) == 1:
        columns.append(np.zeros(problem.dimension))
    leaves = [Node(f"column {number}", x, None, ()) for number, x in enumerate(columns)]
    return np.zeros(problem.dimension), leaves


def _base(problem: SearchProblem, experts: Sequence[WarmPoint]) -> Array:
    """Return the point of a base that was not scored [d]: in each expert all others are absent."""
    first, second = experts[0], experts[1]
    own = first.label.removeprefix("expert:")
    return np.array(
        [
            second.x[index] if column.partition(".")[2] == own else first.x[index]
            for index, (column, _) in enumerate(problem.groups)
        ]
    )


def left_out(problem: SearchProblem) -> tuple[str, ...]:
    """Return the experts of the space that are no leaves, as they were not scored alone."""
    labels = [point.label for point in problem.warm if point.label.startswith("expert:")]
    scored = {label.removeprefix("expert:") for label in labels}
    named = dict.fromkeys(column.partition(".")[2] for column, _ in problem.groups)
    return tuple(name for name in named if name and name not in scored) if scored else ()


class NestedSearcher(StagedSearcher):
    """The tree, which also says who is not in it."""

    def __init__(self, problem: SearchProblem, arguments: Mapping[str, Any]) -> None:
        super().__init__(problem, NestedPlan(problem, arguments))
        self._left_out = left_out(problem)

    def facts(self) -> Mapping[str, str]:
        """See ``StagedSearcher.facts``; experts that are not merged, where there are any."""
        facts = dict(super().facts())
        if self._left_out:
            shown = ", ".join(self._left_out[:3]) + (", ..." if len(self._left_out) > 3 else "")
            facts["left out"] = (
                f"{len(self._left_out)} experts that have no score alone are not merged: {shown}"
            )
        return facts


def nested(problem: SearchProblem, arguments: Mapping[str, Any]) -> StagedSearcher:
    """Return Nested MAP."""
    return NestedSearcher(problem, arguments)
