"""The front as a static picture, for places that show no HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evomerge.front_page import FrontData, FrontPoint, Measured, in_table, placed_by
from evomerge.front_table import point_name
from evomerge.trial import Direction

_STYLE: dict[str, tuple[str, str, float]] = {
    "base": ("s", "#1b1f24", 60),
    "expert": ("D", "#0b62b8", 55),
    "uniform": ("^", "#117a4b", 75),
    "task_arithmetic": ("v", "#7c3aed", 75),
    "grid": ("o", "#7c3aed", 16),
}
_FRONT = "#c2410c"


def placed(point: FrontPoint) -> Measured | None:
    """Return the scores that place a point of a picture.

    What stands in the table beside it is placed as there: by test items where it was scored on
    them. The other trials, of which only some have more, are all placed by the search items.
    """
    return next((scores for _, scores in _scores(point) if scores is not None), None)


def _scores(point: FrontPoint) -> list[tuple[str, Measured | None]]:
    """Return the scores of a point by their items, the first choice first."""
    search, validation = ("search", point.search), ("validation", point.validation)
    if in_table(point):
        return [("test", point.test), validation, search]
    return [search, validation]


def split_note(data: FrontData) -> str:
    """Return by which items the points of a picture are placed."""
    return placed_by(data, _scores)


def save_front(data: FrontData, path: Path) -> None:
    """Draw the first two objectives, or one over the trials; the suffix chooses the format.

    Args:
        data: the front.
        path: ``.png`` or ``.svg``.
    """
    _figure(data).savefig(path)


def front_picture(data: FrontData) -> Any:
    """Return the same as an array of pixels [height, width, 3], bytes."""
    import numpy as np

    figure = _figure(data)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()


def _figure(data: FrontData) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no global state, no window
    axes = figure.add_subplot()
    single = len(data.objectives) == 1
    # Dots first: they settle the limits by which labels choose their side. All in one call: there
    # may be thousands.
    dots = [point for point in data.points if point.kind == "search" and not point.front]
    places = [_place(point, single) for point in dots if placed(point) is not None]
    if places:
        xs, ys = zip(*places, strict=True)
        axes.scatter(xs, ys, s=9, c="#8c959f", alpha=0.6, linewidths=0, zorder=1)
    for point in data.points:
        if placed(point) is not None and (point.kind != "search" or point.front):
            _draw(axes, data, point)
    axes.set_xlabel("trial" if single else _axis(data, 0))
    axes.set_ylabel(_axis(data, 0 if single else 1))
    if not single and data.objectives[0].direction is Direction.MINIMIZE:
        axes.invert_xaxis()
    if data.objectives[0 if single else 1].direction is Direction.MINIMIZE:
        axes.invert_yaxis()
    axes.grid(alpha=0.25)
    figure.suptitle(data.title)
    axes.set_title(split_note(data), fontsize=9, color="#57606a")
    return figure


def _place(point: FrontPoint, single: bool) -> tuple[float, float]:
    """Return where a point is drawn: by two objectives, or by trial and objective."""
    measured = placed(point)
    assert measured is not None
    values = measured.values
    return (float(point.number), values[0]) if single else (values[0], values[1])


def _axis(data: FrontData, index: int) -> str:
    objective = data.objectives[index]
    unit = "" if objective.unit == "fraction" else f" ({objective.unit})"
    return f"{objective.name}{unit} →"


def _draw(axes: Any, data: FrontData, point: FrontPoint) -> None:
    measured = placed(point)
    assert measured is not None
    single = len(data.objectives) == 1
    x, y = _place(point, single)
    if point.kind == "search":
        colour = _FRONT
        marker, size = ("*", 230.0) if point.number == data.knee else ("o", 48.0)
    else:
        marker, colour, size = _STYLE[point.kind]
    errors = measured.standard_errors
    axes.errorbar(
        [x], [y], xerr=None if single else [errors[0]], yerr=[errors[0 if single else 1]],
        fmt="none", ecolor=colour, alpha=0.4, elinewidth=1, zorder=2,
    )  # fmt: skip
    axes.scatter(
        [x], [y], s=size, c=colour, marker=marker, edgecolors="white", linewidths=0.8, zorder=3
    )
    if point.kind not in ("search", "grid") or point.number == data.knee:
        low, high = axes.get_xlim()
        left = x > low + 0.7 * (high - low)
        axes.annotate(
            point_name(point, data), (x, y), xytext=(-8 if left else 8, 6),
            ha="right" if left else "left", textcoords="offset points",
            fontsize=9, color=colour, fontweight="bold", zorder=4,
        )  # fmt: skip
