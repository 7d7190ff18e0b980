"""What is known of one objective's items before any candidate is scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.fitness.irt.bank import ItemBank

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Endpoints:
    """The base and the experts, scored once on every item of a population.

    Attributes:
        names: of the models [K], in the study's order.
        scores: of the items [K, I].
        margins: graded scores [K, I], nats; None where the task has none.
        base: which of the K is the base; None where it is not among them.
    """

    names: tuple[str, ...]
    scores: Floats
    margins: Floats | None = None
    base: int | None = None

    def __post_init__(self) -> None:
        expected = (len(self.names), self.scores.shape[-1])
        for what, array in (("scores", self.scores), ("margins", self.margins)):
            if array is not None and array.shape != expected:
                raise InputError(
                    f"endpoints: {what}: expected [K, I] = {list(expected)}, "
                    f"got {list(array.shape)}"
                )
            if array is not None and not np.isfinite(array).all():
                raise InputError(f"endpoints: {what}: not all finite (score every item first)")
        if not self.names:
            raise InputError("endpoints: expected at least one model, got none")
        if self.base is not None and not 0 <= self.base < len(self.names):
            raise InputError(
                f"endpoints: base: expected a number below {len(self.names)}, got {self.base}"
            )


@dataclass(frozen=True, slots=True)
class Design:
    """A subset of items, and how it came about.

    Attributes:
        name: of the way, e.g. ``d_optimal``.
        ids: of the items [n], each once.
        weights: of their scores in a weighted mean [n], summing to 1; empty where all are equal.
        random: whether every item had the same chance, so that the plain mean is unbiased.
    """

    name: str
    ids: tuple[str, ...]
    weights: tuple[float, ...] = ()
    random: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """All items that one objective's value is over, and what helps to guess it from a few.

    Attributes:
        ids: of the items [I], each once.
        weights: of the items in the value [I], mean 1; equal where not given. The value is the
            mean of weight times score.
        groups: the task or topic of each item [I]; empty for one.
        endpoints: models that were scored on all items.
        bank: item parameters of at least these items.
        training: scores of the models that the bank was fitted to [M, I]; for anchors. Those that
            the bank holds, where none are given.
        subset_weights: of a weighted mean over the chosen items, by id; empty where equal.
        random: whether candidates are scored on items drawn at random.
        within_groups: how many items were drawn, a fixed number from every group; 0 where they
            were chosen otherwise.
    """

    ids: tuple[str, ...]
    weights: Floats = field(default_factory=lambda: np.empty(0))
    groups: tuple[str, ...] = ()
    endpoints: Endpoints | None = None
    bank: ItemBank | None = None
    training: Floats | None = None
    subset_weights: Mapping[str, float] = field(default_factory=dict)
    random: bool = True
    within_groups: int = 0
    _index: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.ids)
        object.__setattr__(self, "_index", {name: row for row, name in enumerate(self.ids)})
        if count == 0 or len(self._index) != count:
            raise InputError(
                f"population: expected item ids [I >= 1], each once, got {count} with "
                f"{len(self._index)} different"
            )
        if not self.weights.size:
            object.__setattr__(self, "weights", np.ones(count))
        given = np.asarray(self.weights, dtype=np.float64)
        if given.shape != (count,) or not (np.isfinite(given).all() and (given > 0).all()):
            raise InputError(f"population: weights: expected [I={count}] positive numbers")
        object.__setattr__(self, "weights", given / given.mean())
        if self.groups and len(self.groups) != count:
            raise InputError(
                f"population: groups: expected [I={count}] names, got {len(self.groups)}"
            )
        if self.endpoints is not None and self.endpoints.scores.shape[1] != count:
            raise InputError(
                f"population: endpoints: expected scores of the {count} items, got "
                f"{self.endpoints.scores.shape[1]}"
            )
        if self.training is not None and self.training.shape[1:] != (count,):
            raise InputError(
                f"population: training: expected [M, I={count}], got {list(self.training.shape)}"
            )
        if self.bank is not None:
            object.__setattr__(self, "bank", self.bank.select(self.ids))
            if self.training is None:
                object.__setattr__(self, "training", self.bank.responses)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Sequence[str]) -> Rows:
        """Return the places of items [n] among ``ids``.

        Raises:
            InputError: an item that is not in the population, or twice.
        """
        unknown = [name for name in ids if name not in self._index]
        if unknown:
            raise InputError(f"population: item {unknown[0]!r} is not one of its {len(self)} items")
        if len(set(ids)) != len(ids):
            raise InputError(f"population: {len(ids) - len(set(ids))} items are given twice")
        return np.array([self._index[name] for name in ids], dtype=np.intp)

    def grouping(self) -> tuple[Rows, Rows]:
        """Return the number of each item's group [I], by name, and the sizes of the groups [G]."""
        names = {name: number for number, name in enumerate(sorted(set(self.groups)))}
        group = np.array([names[name] for name in self.groups], dtype=np.intp)
        return group, np.bincount(group, minlength=len(names)).astype(np.intp)

    def scored_endpoints(self, purpose: str) -> Endpoints:
        """Return the endpoints.

        Raises:
            InputError: there are none.
        """
        if self.endpoints is None:
            raise InputError(f"{purpose}: needs the endpoints' scores (score them first)")
        return self.endpoints

    def fitted_bank(self, purpose: str) -> ItemBank:
        """Return the item bank.

        Raises:
            InputError: there is none.
        """
        if self.bank is None:
            raise InputError(f"{purpose}: needs an item bank (fit or import one)")
        return self.bank

    def check_size(self, n: int) -> None:
        """Refuse to choose fewer than 1 or more than all items."""
        if not 1 <= n <= len(self):
            raise InputError(f"design: expected 1 to {len(self)} items, got {n}")

    def choice(
        self, name: str, rows: Rows, weights: Floats | None = None, *, random: bool = False
    ) -> Design:
        """Return the design that holds some rows [n], with weights in proportion to the given."""
        shares = () if weights is None else tuple((weights / weights.sum()).tolist())
        return Design(name, tuple(self.ids[row] for row in rows), shares, random)

    def on(self, design: Design) -> Population:
        """Return the population as it is seen through the items of a design."""
        self.rows(design.ids)
        weights = dict(zip(design.ids, design.weights, strict=True)) if design.weights else {}
        grouped = len(design.ids) if design.name == "stratified" else 0
        return replace(self, subset_weights=weights, random=design.random, within_groups=grouped)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What some candidates scored on the same items.

    Attributes:
        rows: places of the items in their population [s].
        scores: of the candidates [n, s].
        margins: graded scores [n, s], nats; None where there are none.
    """

    rows: Rows
    scores: Floats
    margins: Floats | None = None

    def part(self, columns: Rows) -> Sample:
        """Return the sample on some of its items only."""
        margins = None if self.margins is None else self.margins[:, columns]
        return Sample(self.rows[columns], self.scores[:, columns], margins)
