"""What a merge method declares, and how it reads a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from evomerge.errors import RecipeError, suggest
from evomerge.layout import Partition
from evomerge.merge.plan import Plan
from evomerge.merge.stats import Stats
from evomerge.recipe import Recipe

F64 = npt.NDArray[np.float64]


#: From names of columns and their values to all values that are the same merge.
Twins = Callable[[tuple[str, ...], tuple[float, ...]], tuple[tuple[float, ...], ...]]


class Scope(StrEnum):
    """How many columns a parameter has."""

    EXPERT = "expert"  # one per expert: weight.<name>
    BLOCK = "block"  # one for all models: t, lambda


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number that a method takes per block; every parameter can be searched.

    Attributes:
        name: as in mergekit.
        scope: one column per expert, or one for all.
        default: used where a study neither fixes nor searches it; None where it must.
        low, high: hard limits of the definition.
        search: the range that is searched where a study gives none.
        help: one line.
    """

    name: str
    scope: Scope
    default: float | None
    low: float
    high: float
    search: tuple[float, float]
    help: str


@dataclass(frozen=True, slots=True)
class Option:
    """A switch or flavour of a method; fixed for a study.

    Attributes:
        name: as in mergekit where mergekit has it.
        default: value where a study gives none.
        choices: the valid values.
        help: one line.
    """

    name: str
    default: str | bool
    choices: tuple[str | bool, ...]
    help: str


@dataclass(frozen=True)
class Method:
    """One merge method.

    Attributes:
        name: as in mergekit.
        summary: one line.
        source: paper or public definition.
        parameters: numbers per block.
        options: switches and flavours.
        experts: smallest and largest number of experts, None for no limit.
        plan: recipe → plan; pure, given the statistics.
        anchor: (weights, options) → the parameter values at which the method with these options
            is the given task arithmetic (``W_base + Σ_k w_k·τ_k``), or None where it has none;
            lets baselines be points of the search space.
        adapters: the experts are LoRA adapters of equal form, merged as factors; such a method
            has one row of coefficients for the whole model, and its ``anchor`` says what stands
            for a task arithmetic where factors are added.
        twins: (columns, row) → all rows that are the same merge, the one that recipes hold
            first; None where no two rows are.
    """

    name: str
    summary: str
    source: str
    parameters: tuple[Parameter, ...]
    options: tuple[Option, ...]
    experts: tuple[int, int | None]
    plan: Callable[[Recipe, Partition, Stats], Plan]
    anchor: Callable[[tuple[float, ...], Mapping[str, object]], dict[str, tuple[float, ...]] | None]
    adapters: bool = False
    twins: Twins | None = None

    def parameter(self, name: str) -> Parameter:
        """Return a parameter.

        Raises:
            RecipeError: unknown parameter.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        known = [parameter.name for parameter in self.parameters]
        raise RecipeError(f"{self.name}: unknown parameter {name!r}{suggest(name, known)}")

    def columns(self, experts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of the table's columns for the given experts [C]."""
        names: list[str] = []
        for parameter in self.parameters:
            if parameter.scope is Scope.EXPERT:
                names.extend(f"{parameter.name}.{expert}" for expert in experts)
            else:
                names.append(parameter.name)
        return tuple(names)


class Table:
    """The table of a recipe, spread over spans.

    Args:
        recipe: the merge.
        partition: its blocks.
        method: declares the columns.

    Raises:
        RecipeError: wrong number of rows, unknown column, or a value outside its limits.
    """

    def __init__(self, recipe: Recipe, partition: Partition, method: Method) -> None:
        if len(recipe.table) != len(partition.blocks):
            raise RecipeError(
                f"table: {len(recipe.table)} rows for {len(partition.blocks)} blocks of partition "
                f"{partition.spec!r}"
            )
        self._recipe = recipe
        self._method = method
        self._experts = tuple(expert.name for expert in recipe.experts)
        known = method.columns(self._experts)
        for column in recipe.columns:
            if column not in known:
                raise RecipeError(f"table: unknown column {column!r}{suggest(column, known)}")
        self._rows = np.asarray([span.block for span in partition.spans])

    def expert(self, name: str) -> F64:
        """Return a per-expert parameter on every span [S, K]."""
        columns = [self._column(name, f"{name}.{expert}") for expert in self._experts]
        values: F64 = np.stack(columns, axis=1)[self._rows]
        return values

    def block(self, name: str) -> F64:
        """Return a shared parameter on every span [S]."""
        values: F64 = self._column(name, name)[self._rows]
        return values

    def _column(self, name: str, column: str) -> F64:
        parameter = self._method.parameter(name)
        if column in self._recipe.columns:
            values = np.asarray(self._recipe.column(column), dtype=np.float64)
        elif parameter.default is not None:
            values = np.full(len(self._recipe.table), parameter.default)
        else:
            raise RecipeError(f"table: {self._method.name} needs column {column!r}")
        outside = (values < parameter.low) | (values > parameter.high)
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise RecipeError(
                f"table[{row}].{column}: must be in [{parameter.low}, {parameter.high}], "
                f"got {values[row]}"
            )
        return values


def option(recipe: Recipe, method: Method, name: str) -> str | bool:
    """Return an option of a recipe, checked against its choices.

    Raises:
        RecipeError: a value that is not a choice.
    """
    declared = next(item for item in method.options if item.name == name)
    value = recipe.option(name, declared.default)
    # 1 and 0 equal True and False, but JSON tells them apart.
    if value not in declared.choices or type(value) is not type(declared.default):
        choices = ", ".join(map(str, declared.choices))
        raise RecipeError(f"options.{name}: {value!r} is not one of {choices}")
    assert not isinstance(value, float)
    return value
