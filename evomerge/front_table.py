"""The front and the baselines as CSV and as a Markdown table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from evomerge.feasibility import bounds_note, keeps_bounds
from evomerge.front_page import FrontData, FrontPoint, Measured, summary


def table_points(data: FrontData) -> list[FrontPoint]:
    """Return the front members, best first objective first, then the other baselines."""
    objective = data.objectives[0]
    front = [point for point in data.points if point.front and point.shown is not None]
    front.sort(key=lambda point: objective.loss(_first(point)))
    others = [
        point
        for point in data.points
        if not point.front and point.kind not in ("search", "grid") and point.shown is not None
    ]
    return front + others


def _first(point: FrontPoint) -> float:
    assert point.shown is not None
    return point.shown.values[0]


def point_name(point: FrontPoint, data: FrontData) -> str:
    """Return what a reader calls the point."""
    name = point.label.replace(":", " ").replace("task_arithmetic", "task arithmetic")
    if not name:
        name = f"trial {point.number}"
    return f"{name} (knee)" if point.number == data.knee else name


def front_csv(data: FrontData) -> str:
    """Return one row per front member and baseline, with all splits and standard errors."""
    names = [objective.name for objective in data.objectives]
    splits = ("search", "validation", "test")
    header = ["trial", "kind", "label", "front", "knee"]
    header += [f"{split}/{name}{end}" for split in splits for name in names for end in ("", "_se")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*header, "coefficients"])
    for point in table_points(data):
        row: list[object] = [
            point.number, point.kind, point.label, point.front, point.number == data.knee,
        ]  # fmt: skip
        for measured in (point.search, point.validation, point.test):
            row.extend(_cells(measured, len(names)))
        row.append(summary(point.recipe) if point.recipe is not None else "")
        writer.writerow(row)
    return text.getvalue()


def _cells(measured: Measured | None, objectives: int) -> Iterator[object]:
    if measured is None:
        yield from [""] * (2 * objectives)
        return
    for value, error in zip(measured.values, measured.standard_errors, strict=True):
        yield from (repr(value), repr(error))


def cell(text: str) -> str:
    """Return a text that a table in Markdown keeps in one cell."""
    return text.replace("|", r"\|").replace("\n", " ")


def front_markdown(data: FrontData) -> str:
    """Return the table for people: the best split that each model has, ± one standard error."""
    points = table_points(data)
    tested = any(point.test is not None for point in points)
    lines = [
        "| model | trial | " + " | ".join(cell(o.name) for o in data.objectives) + " |",
        "|---|---:|" + "---:|" * len(data.objectives),
    ]
    for point in points:
        measured = point.test if tested else point.shown
        cells = (
            [
                f"{value:.3f} ± {error:.3f}{'' if keeps_bounds(objective, value) else ' !'}"
                for objective, value, error in zip(
                    data.objectives, measured.values, measured.standard_errors, strict=True
                )
            ]
            if measured is not None
            else ["–"] * len(data.objectives)
        )
        bold = "**" if point.front else ""
        name = f"{bold}{point_name(point, data)}{bold}"
        lines.append(f"| {name} | {point.number} | {' | '.join(cells)} |")
    split = "held-out test items" if tested else "validation or search items"
    lines.append("")
    lines.append(f"Scores on {split}, ± one standard error; the front is in bold.")
    if any(" ! |" in line for line in lines):
        lines.append(f"! {bounds_note(data.objectives)}.")
    return "\n".join(lines) + "\n"
