"""The box that a searcher explores, and its map to recipes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evomerge.errors import InputError
from evomerge.layout import Partition
from evomerge.recipe import ModelRef, Recipe


@dataclass(frozen=True, slots=True)
class Range:
    """A searched coefficient: uniform between ``low`` and ``high``.

    Attributes:
        low: smallest value.
        high: largest value.
        integer: only whole numbers, each with an equal share of the coordinate.
    """

    low: float
    high: float
    integer: bool = False

    @property
    def levels(self) -> int:
        """How many values there are; 0 for a continuum."""
        return round(self.high - self.low) + 1 if self.integer else 0


@dataclass(frozen=True, slots=True)
class Choices:
    """A searched option: one of ``values``, each with an equal share of the coordinate."""

    values: tuple[str | bool, ...]

    @property
    def levels(self) -> int:
        """How many values there are."""
        return len(self.values)


@dataclass(frozen=True, slots=True)
class Kind:
    """What one dimension of the box is.

    Attributes:
        name: ``real``, ``integer``, or ``choice``, whose levels have no order.
        levels: values, each with an equal bin of the coordinate; 0 for a real dimension.
    """

    name: Literal["real", "integer", "choice"]
    levels: int = 0


REAL = Kind("real")

#: What an option of a space may be: fixed, or searched.
OptionValue = str | float | bool | Choices


def level_of(x: float, levels: int) -> int:
    """Return the number of the equal bin of [0, 1] that ``x`` lies in."""
    return min(int(x * levels), levels - 1)


def centre_of(level: int, levels: int) -> float:
    """Return the middle of bin ``level``, far from where rounding could leave the bin."""
    return (level + 0.5) / levels


#: Numbers of one block, in the order of the columns.
Row = tuple[float, ...]


class Space:
    """Points of the unit box [d] ↔ recipes.

    Dimension number ``b·C' + c`` is searched column c of block b; the searched options follow,
    one dimension each for the whole merge, in the order of their names. Whole numbers and
    options have equal bins of their coordinate, so every searcher can take them.

    Args:
        method: merge method of every recipe.
        base: what everything is rebuilt from.
        experts: in the study's order.
        partition: gives the blocks [B].
        layout: digest of the layout.
        columns: of the recipes' table, in order; a number is fixed, a range is searched.
        options: flavour and hyper-parameters, fixed or searched.
        seed: of random masks; the same for all candidates, so that they are compared under
            common random numbers.
        dtype: safetensors name of the dtype that is scored and exported.
        twins: from the names of the columns and a row to all rows that are the same merge, the
            one that recipes hold first; None where no two rows are.
    """

    def __init__(
        self,
        *,
        method: str,
        base: ModelRef,
        experts: Sequence[ModelRef],
        partition: Partition,
        layout: str,
        columns: Mapping[str, float | Range],
        options: Mapping[str, OptionValue],
        seed: int,
        dtype: str,
        twins: Callable[[tuple[str, ...], Row], tuple[Row, ...]] | None = None,
    ) -> None:
        self._columns = dict(columns)
        self._searched = [(n, r) for n, r in self._columns.items() if isinstance(r, Range)]
        self._blocks = partition.blocks
        self._method, self._partition = method, partition.spec
        self._base, self._experts = base, tuple(experts)
        self._layout, self._seed = layout, seed
        self._twins = twins
        #: safetensors name of the dtype that is scored and exported.
        self.dtype = dtype
        self._options = tuple(sorted(options.items()))
        self._chosen = [(n, o) for n, o in self._options if isinstance(o, Choices)]
        #: How many coordinates ``decode`` had to clip into the box so far.
        self.clipped = 0

    @property
    def dimension(self) -> int:
        """d; 0 when nothing is searched."""
        return len(self._blocks) * len(self._searched) + len(self._chosen)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Labels of the blocks [B]."""
        return self._blocks

    @property
    def partition(self) -> str:
        """Spec of the partition."""
        return self._partition

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each dimension [d], ``<block>/<column>``, or that of the option."""
        return tuple(f"{block}/{name}" if block else name for name, block in self.groups)

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """Column and block of each dimension [d]; an option has no block (``""``)."""
        columns = [(name, block) for block in self._blocks for name, _ in self._searched]
        return (*columns, *((name, "") for name, _ in self._chosen))

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """The coefficient at 0 and at 1 of each dimension [d]; 0 and 1 for an option."""
        columns = [(item.low, item.high) for _ in self._blocks for _, item in self._searched]
        return (*columns, *((0.0, 1.0) for _ in self._chosen))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What each dimension is [d]; empty where all are real."""
        columns = [
            Kind("integer", item.levels) if item.integer else REAL
            for _ in self._blocks
            for _, item in self._searched
        ]
        kinds = (*columns, *(Kind("choice", item.levels) for _, item in self._chosen))
        return () if all(kind == REAL for kind in kinds) else kinds

    @property
    def method(self) -> tuple[str, Mapping[str, OptionValue]]:
        """The method of every recipe, and its options."""
        return self._method, dict(self._options)

    @property
    def digest(self) -> str:
        """Identity of the map from points to recipes."""
        columns: dict[str, object] = {
            name: [item.low, item.high] + ["integer"] * item.integer
            if isinstance(item, Range)
            else item
            for name, item in self._columns.items()
        }
        columns |= {name: {"choices": item.values} for name, item in self._chosen}
        origin = self.decode((0.0,) * self.dimension)
        text = json.dumps([columns, list(self._blocks), origin.digest])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def decode(self, x: Sequence[float]) -> Recipe:
        """Return the recipe of a point.

        The only place that clips: coordinates outside [0, 1] move to the border and are
        counted in ``clipped``.

        Args:
            x: [d], finite.

        Raises:
            ValueError: wrong number of coordinates.
        """
        if len(x) != self.dimension:
            raise ValueError(f"expected {self.dimension} coordinates, got {len(x)}")
        inside = [min(max(value, 0.0), 1.0) for value in x]
        self.clipped += sum(a != b for a, b in zip(x, inside, strict=True))
        coordinates = iter(inside)
        table = []
        for _ in self._blocks:
            row = [
                _value(item, coordinates) if isinstance(item, Range) else item
                for item in self._columns.values()
            ]
            table.append(self._row(tuple(self._columns), tuple(row)))
        chosen = {
            name: item.values[level_of(next(coordinates), item.levels)]
            for name, item in self._chosen
        }
        return self._recipe(tuple(self._columns), tuple(table), chosen)

    def outside(self, values: Mapping[str, float]) -> Recipe:
        """Return the recipe with the given columns in every block, wherever the box ends.

        For methods without options; columns that are not named have their default.
        """
        row = self._row(tuple(values), tuple(values.values()))
        return self._recipe(tuple(values), (row,) * len(self._blocks), {})

    def _row(self, columns: tuple[str, ...], row: Row) -> Row:
        """Return a row as recipes hold it."""
        return row if self._twins is None else self._twins(columns, row)[0]

    def _same(self, values: Mapping[str, float]) -> Iterator[dict[str, float]]:
        """Yield column values, then others that are the same merge."""
        yield dict(values)
        if self._twins is not None:
            for row in self._twins(tuple(values), tuple(values.values())):
                yield dict(zip(values, row, strict=True))

    def encode(
        self, values: Mapping[str, float], options: Mapping[str, object] | None = None
    ) -> tuple[float, ...] | None:
        """Return a point at which every block is merged by the given column values.

        Args:
            values: by column; columns that are not named must be searched nowhere.
            options: by name; those that are not named must be searched nowhere.

        Returns:
            [d], or None when the values lie outside the box or differ from a fixed column, or
            an option is no choice of the space. Whole numbers and choices give bin centres.
        """
        places = (self._place(same) for same in self._same(values))
        row = next((place for place in places if place is not None), None)
        if row is None:
            return None
        chosen = self.encode_options(options or {})
        return None if chosen is None else (*(row * len(self._blocks)), *chosen)

    def _place(self, values: Mapping[str, float]) -> Row | None:
        """Return the coordinates of a block's column values, None outside the box."""
        row = []
        for name, item in self._columns.items():
            value = values.get(name)
            if isinstance(item, Range):
                if value is None or not item.low <= value <= item.high:
                    return None
                if item.integer and value != round(value):
                    return None
                row.append(_coordinate(item, value))
            elif value is not None and value != item:
                return None
        return tuple(row)

    def encode_options(self, options: Mapping[str, object]) -> tuple[float, ...] | None:
        """Return the coordinates of the searched options, None where one is no choice.

        Args:
            options: by name; fixed ones that are named must be what the space fixes.
        """
        for name, item in self._options:
            if not isinstance(item, Choices) and options.get(name, item) != item:
                return None
        places = []
        for name, item in self._chosen:
            value = options.get(name)
            # True equals 1, but is another choice in JSON.
            same = [n for n, v in enumerate(item.values) if v == value and type(v) is type(value)]
            if not same:
                return None
            places.append(centre_of(same[0], item.levels))
        return tuple(places)

    def encode_rows(
        self, rows: Sequence[Mapping[str, float]], options: Mapping[str, object] | None = None
    ) -> tuple[float, ...]:
        """Return the point at which each block has column values of its own.

        Args:
            rows: value of every column, by name, for each block [B].
            options: by name; those that are not named must be searched nowhere.

        Raises:
            InputError: a value outside its range, or another than the fixed one; names them all.
        """
        problems: dict[str, None] = {}
        point: list[float] = []
        for block, row in zip(self._blocks, rows, strict=True):
            found = [self._nearest(block, same) for same in self._same(row)]
            coordinates, wrong = min(found, key=lambda one: bool(one[1]))  # the first that fits
            point += coordinates
            problems |= dict.fromkeys(wrong)
        chosen = self.encode_options(options or {})
        if chosen is None:
            searched = {name: list(item.values) for name, item in self._chosen}
            problems[f"its options are {dict(options or {})}, the study searches {searched}"] = None
        if problems:
            raise InputError("start: outside the study's space: " + "; ".join(problems))
        return (*point, *(chosen or ()))

    def _nearest(self, block: str, row: Mapping[str, float]) -> tuple[list[float], list[str]]:
        """Return coordinates of a block's column values, and which lie outside the space."""
        point, problems = [], []
        for name, item in self._columns.items():
            value = row[name]
            if not isinstance(item, Range):
                if value != item:
                    problems.append(f"{name} is {value:g} in {block}, the study fixes {item:g}")
                continue
            # A mean of equal numbers can miss them by a rounding.
            slack = 1e-12 * (item.high - item.low)
            whole = not item.integer or abs(value - round(value)) <= slack
            if not item.low - slack <= value <= item.high + slack or not whole:
                limits = f"[{item.low:g}, {item.high:g}]"
                limits = f"whole numbers in {limits}" if item.integer else limits
                problems.append(f"{name} is {value:g} in {block}, the study searches {limits}")
            point.append(min(max(_coordinate(item, value), 0.0), 1.0))
        return point, problems

    def _recipe(
        self,
        columns: tuple[str, ...],
        table: tuple[tuple[float, ...], ...],
        chosen: Mapping[str, str | bool],
    ) -> Recipe:
        options = tuple(
            (name, chosen[name] if isinstance(item, Choices) else item)
            for name, item in self._options
        )
        return Recipe(
            method=self._method,
            base=self._base,
            experts=self._experts,
            partition=self._partition,
            layout=self._layout,
            columns=columns,
            table=table,
            options=options,
            seed=self._seed,
            dtype=self.dtype,
        )

    def task_arithmetic(self, weights: Sequence[float]) -> Recipe:
        """Return ``W_base + Σ_k weights[k]·τ_k`` as a recipe, whatever the space's method."""
        return Recipe(
            method="task_arithmetic",
            base=self._base,
            experts=self._experts,
            partition="model",
            layout=self._layout,
            columns=tuple(f"weight.{expert.name}" for expert in self._experts),
            table=(tuple(weights),),
            dtype=self.dtype,
        )


def _value(item: Range, coordinates: Iterator[float]) -> float:
    x = next(coordinates)
    if item.integer:
        return item.low + level_of(x, item.levels)
    return item.low + x * (item.high - item.low)


def _coordinate(item: Range, value: float) -> float:
    if item.integer:
        return centre_of(round(value - item.low), item.levels)
    return (value - item.low) / (item.high - item.low)
