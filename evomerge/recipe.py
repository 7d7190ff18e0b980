"""One merge as numbers: small, frozen, with a digest and a JSON form.

A recipe never holds tensors. Its table has one row per block and one column per method
parameter, named as in mergekit: ``weight.<expert>``, ``density.<expert>``, ``t``, ``lambda``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evomerge.errors import RecipeError

SCHEMA = 1

#: Said of a file that is no recipe; ``evomerge_recipe.json`` is its name in an export.
EXPECTED = "give the evomerge_recipe.json of an export"


@dataclass(frozen=True, slots=True)
class ModelRef:
    """One model of a study.

    Attributes:
        name: short name used in columns and reports; ``base`` for the base.
        source: directory as the user wrote it, or hub id at the commit that was read; not part
            of the recipe's identity.
        fingerprint: of the weights; part of the recipe's identity.
    """

    name: str
    source: str
    fingerprint: str


@dataclass(frozen=True)
class Recipe:
    """One merge.

    Attributes:
        method: the merge method by its mergekit name.
        base: the model that deltas are taken from and that everything is rebuilt from.
        experts: in the order of the study; order is data.
        partition: spec of the partition, e.g. ``layer``.
        layout: digest of the layout that the blocks refer to.
        columns: names of the table's columns [C].
        table: coefficients [B, C].
        options: flavour and fixed hyper-parameters, sorted by name.
        seed: of the random masks.
        dtype: safetensors name of the dtype that is scored and exported.
    """

    method: str
    base: ModelRef
    experts: tuple[ModelRef, ...]
    partition: str
    layout: str
    columns: tuple[str, ...]
    table: tuple[tuple[float, ...], ...]
    options: tuple[tuple[str, str | float | bool], ...] = ()
    seed: int = 0
    dtype: str = "F32"

    def __post_init__(self) -> None:
        """Refuse equal names, ragged tables and numbers that are not finite."""
        names = [ref.name for ref in (self.base, *self.experts)]
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"recipe: two models are named {name!r} (rename one)")
        for row_number, row in enumerate(self.table):
            if len(row) != len(self.columns):
                raise RecipeError(
                    f"table[{row_number}]: {len(row)} values for {len(self.columns)} columns"
                )
            for column, value in zip(self.columns, row, strict=True):
                if not math.isfinite(value):
                    raise RecipeError(f"table[{row_number}].{column}: {value} is not finite")

    @cached_property
    def digest(self) -> str:
        """Identity of the merge: models by fingerprint, never by path."""
        identity = self.to_dict()
        identity["base"].pop("source")
        for expert in identity["experts"]:
            expert.pop("source")
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def column(self, name: str) -> tuple[float, ...]:
        """Return one column of the table [B].

        Raises:
            RecipeError: no such column.
        """
        if name not in self.columns:
            raise RecipeError(f"table: no column {name!r} (has {', '.join(self.columns)})")
        index = self.columns.index(name)
        return tuple(row[index] for row in self.table)

    def option(self, name: str, default: str | float | bool) -> str | float | bool:
        """Return an option, or ``default`` where the recipe does not set it."""
        return dict(self.options).get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "base": _ref_dict(self.base),
            "experts": [_ref_dict(expert) for expert in self.experts],
            "partition": self.partition,
            "layout": self.layout,
            "columns": list(self.columns),
            "table": [list(row) for row in self.table],
            "options": dict(self.options),
            "seed": self.seed,
            "dtype": self.dtype,
        }

    def to_json(self) -> str:
        """Return the JSON text; ``from_json`` restores it exactly."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a JSON form.

        Raises:
            RecipeError: unknown schema, missing or unknown keys, wrong types.
        """
        if "schema" not in data:
            raise RecipeError(f"recipe: has no schema, so it is none ({EXPECTED})")
        schema = data["schema"]
        if schema != SCHEMA:
            raise RecipeError(
                f"recipe: schema {schema!r} is not {SCHEMA} (use the evomerge that wrote it)"
            )
        expected = {
            "schema", "method", "base", "experts", "partition", "layout", "columns", "table",
            "options", "seed", "dtype",
        }  # fmt: skip
        if set(data) != expected:
            wrong = sorted(set(data) ^ expected)
            raise RecipeError(f"recipe: missing or unknown keys: {', '.join(wrong)}")
        try:
            return Recipe(
                method=str(data["method"]),
                base=ModelRef(**data["base"]),
                experts=tuple(ModelRef(**expert) for expert in data["experts"]),
                partition=str(data["partition"]),
                layout=str(data["layout"]),
                columns=tuple(str(column) for column in data["columns"]),
                table=tuple(tuple(float(value) for value in row) for row in data["table"]),
                options=tuple(sorted(data["options"].items())),
                seed=int(data["seed"]),
                dtype=str(data["dtype"]),
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise RecipeError(f"recipe: {error}") from error

    @staticmethod
    def from_json(text: str, where: str = "recipe") -> Recipe:
        """Return the recipe of a JSON text.

        Raises:
            RecipeError: not JSON, or not a recipe.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            place = f"{where}:{error.lineno}:{error.colno}"
            raise RecipeError(f"{place}: no JSON: {error.msg} ({EXPECTED})") from error
        if not isinstance(data, dict):
            got = type(data).__name__
            raise RecipeError(f"{where}: expected a mapping, got {got} ({EXPECTED})")
        return Recipe.from_dict(data)

    @staticmethod
    def load(path: Path) -> Recipe:
        """Read a recipe file."""
        return Recipe.from_json(path.read_text(encoding="utf-8"), where=str(path))


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names for a sentence; of many the first, and how many more there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most // 2])} and {len(names) - most // 2} more"


def _ref_dict(ref: ModelRef) -> dict[str, str]:
    return {"name": ref.name, "source": ref.source, "fingerprint": ref.fingerprint}
