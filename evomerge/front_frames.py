"""The front as it stood after the first trials: the frames of its film."""

from __future__ import annotations

from dataclasses import replace

from evomerge.feasibility import best_rows, violation
from evomerge.front_page import FrontData, FrontPoint
from evomerge.pareto import knee

#: Frames of a study: enough to scrub through, few enough for 10,000 trials to stay cheap.
FRAMES = 30


def frame_steps(planned: int, settled: int, first: int) -> list[int]:
    """Return after how many trials a frame is drawn, ascending.

    Args:
        planned: number of trials when all is done.
        settled: number of first trials that have a result.
        first: no frame before this many.
    """
    last = max(planned, 1)
    steps = sorted({-(-last * frame // FRAMES) for frame in range(1, FRAMES + 1)})
    return [step for step in steps if first <= step <= settled]


def frame(data: FrontData, trials: int) -> FrontData:
    """Return the front of the first ``trials`` trials by their scores on the search items."""
    points = [
        replace(point, front=False, validation=None, test=None)
        for point in data.points
        if point.number < trials and point.search is not None
    ]
    values = [point.search.values for point in points if point.search is not None]
    losses = [
        tuple(one.loss(value) for one, value in zip(data.objectives, row, strict=True))
        for row in values
    ]
    rows = best_rows(losses, [violation(data.objectives, row) for row in values])
    best = knee([losses[row] for row in rows]) if rows else None
    on_front = set(rows)
    marked: tuple[FrontPoint, ...] = tuple(
        replace(point, front=row in on_front) for row, point in enumerate(points)
    )
    return replace(
        data,
        title=f"{data.title}: after {trials} trials, search items",
        points=marked,
        knee=None if best is None else points[rows[best]].number,
    )
