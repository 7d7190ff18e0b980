"""The front of a study as one page of HTML that needs nothing but itself.

The page is drawn by hand-written SVG and JavaScript in ``front_page.html``: it opens from a
file, without a network, and inside MLflow's artifact viewer, whose frame allows scripts only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from evomerge.feasibility import bounds
from evomerge.merge.methods import changed_options
from evomerge.recipe import Recipe
from evomerge.trial import Direction, Objective

Kind = Literal["search", "base", "expert", "uniform", "task_arithmetic", "grid"]
#: More blocks than this are averaged in groups: the page stays small, the shape stays visible.
MAX_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """Objective values [m] of one model on one split, and their standard errors [m]."""

    values: tuple[float, ...]
    standard_errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One trial as the page shows it.

    Attributes:
        number: of the trial.
        kind: what it is; ``task_arithmetic`` is the best of its grid, ``grid`` any other.
        label: name of a baseline; empty for search trials.
        front: whether it is on the reported front.
        search: scores on the search items.
        validation: scores on all validation items, where it was re-scored.
        test: scores on the held-out items, where it was re-scored.
        recipe: given for the points that the page explains (front and baselines).
    """

    number: int
    kind: Kind
    label: str
    front: bool
    search: Measured | None
    validation: Measured | None = None
    test: Measured | None = None
    recipe: Recipe | None = None

    @property
    def shown(self) -> Measured | None:
        """The scores that place the point: validation where there are any, else search."""
        return self.validation or self.search


@dataclass(frozen=True, slots=True)
class FrontData:
    """Everything on the page.

    Attributes:
        title: name of the study.
        subtitle: one line about it.
        objectives: the axes [m].
        blocks: labels of the recipe's blocks [B], for the coefficient chart; may be empty.
        points: all trials with scores, and the baselines.
        knee: number of the knee, None without a front.
        command: export command with ``{n}`` in the place of the trial number.
    """

    title: str
    subtitle: str
    objectives: tuple[Objective, ...]
    blocks: tuple[str, ...]
    points: tuple[FrontPoint, ...]
    knee: int | None
    command: str


def in_table(point: FrontPoint) -> bool:
    """Return whether a point is a row of the table beside a picture."""
    return point.front or point.kind not in ("search", "grid")


def placed_by(
    data: FrontData, scores: Callable[[FrontPoint], Sequence[tuple[str, Measured | None]]]
) -> str:
    """Return by which items the points of a picture are placed.

    Args:
        data: the front.
        scores: returns the scores of a point by their items, the first choice first.
    """
    named, others = set[str](), set[str]()
    for point in data.points:
        splits = [split for split, found in scores(point) if found is not None]
        (named if in_table(point) else others).update(splits[:1])
    if named == others:
        return f"scores on {' or '.join(sorted(named))} items"
    parts = {"front and baselines": named, "other trials": others}
    return "; ".join(
        f"{who} by {' or '.join(sorted(splits))} items" for who, splits in parts.items() if splits
    )


def _items_note(data: FrontData) -> str:
    """Return by which items the page places its points, and where the others' scores are."""
    note = placed_by(
        data, lambda point: [("validation", point.validation), ("search", point.search)]
    )
    if not any(point.test for point in data.points):
        return f"Drawn: {note}."
    return (
        f"Drawn: {note}. The table below has test scores too; PNG and terminal plots are drawn by "
        "those."
    )


#: Columns that are all written out.
MOST_COLUMNS = 16


def summary(recipe: Recipe) -> str:
    """Return the columns' means, with their range over the blocks where they vary.

    Of many columns the weights that are largest. Options follow where they are not the method's
    defaults.
    """
    parts = []
    shown = recipe.columns
    if len(shown) > MOST_COLUMNS:
        weights = [name for name in shown if name.startswith("weight.")] or list(shown)
        weights.sort(key=lambda name: -max(map(abs, recipe.column(name))))
        shown = tuple(weights[: MOST_COLUMNS // 2])
    for name in shown:
        column = recipe.column(name)
        low, high, mean = min(column), max(column), sum(column) / len(column)
        spread = f" ({low:.2f} to {high:.2f})" if high - low > 0.005 else ""
        parts.append(f"{name.removeprefix('weight.')} {mean:.2f}{spread}")
    if len(shown) < len(recipe.columns):
        parts.append(f"and {len(recipe.columns) - len(shown)} smaller or other numbers")
    parts += [f"{name} {value}" for name, value in changed_options(recipe).items()]
    return f"{recipe.method}: " + ", ".join(parts)


def front_html(data: FrontData) -> str:
    """Return the page as text."""
    template = files("evomerge").joinpath("front_page.html").read_text(encoding="utf-8")
    # "<" must not occur inside the script element, or a name could close it.
    text = json.dumps(_page(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("__DATA__", text)


def _page(data: FrontData) -> dict[str, object]:
    explained = [point.recipe for point in data.points if point.recipe is not None]
    columns = _most_common([recipe.columns for recipe in explained])
    return {
        "title": data.title,
        "subtitle": data.subtitle,
        "items": _items_note(data),
        "axes": [
            {
                "name": objective.name,
                "unit": "" if objective.unit == "fraction" else objective.unit,
                "maximize": objective.direction is Direction.MAXIMIZE,
                **bounds(objective),
            }
            for objective in data.objectives
        ],
        "columns": list(columns),
        "blocks": [group[0] for group in block_groups(data.blocks)],
        "block_count": len(data.blocks),
        "knee": data.knee,
        "command": data.command,
        "points": [_point(point, data, columns) for point in data.points],
    }


def _most_common(columns: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return max(columns, key=columns.count) if columns else ()


def block_groups(rows: Sequence[str]) -> list[Sequence[str]]:
    """Divide block labels [B] into at most ``MAX_BLOCKS`` neighbouring groups."""
    size = -(-len(rows) // MAX_BLOCKS) or 1
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _point(point: FrontPoint, data: FrontData, columns: tuple[str, ...]) -> dict[str, object]:
    entry: dict[str, object] = {"n": point.number, "kind": point.kind}
    if point.label:
        entry["label"] = point.label
    if point.front:
        entry["front"] = True
    splits = (("s", "se", point.search), ("v", "ve", point.validation), ("t", "te", point.test))
    for key, error_key, measured in splits:
        if measured is not None:
            entry[key] = [round(value, 6) for value in measured.values]
            entry[error_key] = [round(error, 6) for error in measured.standard_errors]
    if point.recipe is not None:
        entry["summary"] = summary(point.recipe)
        table = point.recipe.table
        if point.recipe.columns == columns and len(table) in (1, len(data.blocks)):
            entry["w"] = averaged_rows(table)
    return entry


def averaged_rows(table: Sequence[Sequence[float]]) -> list[list[float]]:
    """Average the rows of a table [B, C] in the groups of ``block_groups``; three decimals."""
    size = -(-len(table) // MAX_BLOCKS) or 1
    groups = [table[start : start + size] for start in range(0, len(table), size)]
    return [
        [round(sum(column) / len(group), 3) for column in zip(*group, strict=True)]
        for group in groups
    ]
