"""What the front members are made of: a heat map per member, coefficients over blocks."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.front_page import FrontData, FrontPoint, averaged_rows, block_groups, summary
from evomerge.front_table import point_name, table_points
from evomerge.plain_page import cells, heading, page, paragraph
from evomerge.recipe import Recipe

#: Heat maps at most: the recommended one first, then by the first objective.
_MOST = 24


def coefficient_html(data: FrontData) -> str:
    """Return the page; one heat map [columns, blocks] for each front member."""
    members = [p for p in table_points(data) if p.front and p.recipe is not None]
    members.sort(key=lambda point: point.number != data.knee)
    shown = members[:_MOST]
    largest = largest_coefficient(shown)
    body = [
        paragraph(
            f"One colour scale for all: blue is negative, white 0, orange {largest:.2f}. Rows are "
            "the columns of the recipe, its blocks run from left to right."
        )
    ]
    for point in shown:
        assert point.recipe is not None
        body += [
            heading(point_name(point, data) + (f" · trial {point.number}" if point.label else "")),
            paragraph(summary(point.recipe)),
            heat_map(point.recipe, data.blocks, largest),
        ]
    if len(members) > _MOST:
        body.append(paragraph(f"{len(members) - _MOST} more members are in the folder recipes."))
    return page(f"{data.title}: coefficients of the front", body)


def largest_coefficient(points: Sequence[FrontPoint]) -> float:
    """Return the largest absolute coefficient of some merges, for their common colour scale."""
    values = [abs(value) for point in points for row in _table(point) for value in row]
    return max(values, default=0.0) or 1.0


def _table(point: FrontPoint) -> tuple[tuple[float, ...], ...]:
    return point.recipe.table if point.recipe is not None else ()


def heat_map(recipe: Recipe, blocks: tuple[str, ...], largest: float) -> str:
    """Return a merge's coefficients as coloured cells: columns of the recipe by blocks.

    Args:
        recipe: the merge.
        blocks: labels [B].
        largest: coefficient of the strongest colour.
    """
    averaged = averaged_rows(recipe.table)  # [groups, columns]
    known = len(blocks) == len(recipe.table)
    labels = [
        group[0] if len(group) == 1 else f"{group[0]} …"
        for group in block_groups(blocks if known else [str(i) for i in range(len(recipe.table))])
    ]
    values = [[row[column] for row in averaged] for column in range(len(recipe.columns))]
    colours = [[_colour(value / largest) for value in row] for row in values]
    texts = [
        [f"{name}, {label}: {value:.3f}" for label, value in zip(labels, row, strict=True)]
        for name, row in zip(recipe.columns, values, strict=True)
    ]
    return cells(list(recipe.columns), labels, colours, texts)


def _colour(share: float) -> str:
    """Return the colour of a value in -1 to 1: blue, white, orange."""
    end = (0xC2, 0x41, 0x0C) if share >= 0 else (0x0B, 0x62, 0xB8)
    weight = min(1.0, abs(share))
    mixed = (round(0xF6 + (channel - 0xF6) * weight) for channel in end)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
