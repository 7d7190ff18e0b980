"""Line charts as SVG that follows the page's colours, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 360, 186
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 8, 26
#: More points than pixels of width cannot be seen.
_MOST_POINTS = 600


def line_chart(title: str, values: Sequence[float | None], first: int, mark: int | None) -> str:
    """Return a chart of one value over the trials, as steps.

    Args:
        title: of the chart; also what a screen reader says.
        values: one per trial [n]; None where there is none yet.
        first: number of the first trial.
        mark: trial at which a line is drawn (the baselines end there); None for none.
    """
    known = [(first + place, v) for place, v in enumerate(values) if v is not None]
    if not known:
        return ""
    lows, highs = min(v for _, v in known), max(v for _, v in known)
    pad = (highs - lows) * 0.06 or abs(highs) * 0.05 or 0.5
    low, high = lows - pad, highs + pad
    last = max(first + len(values) - 1, first + 1)

    def x(trial: float) -> float:
        return _LEFT + (trial - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line class="gridline" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" '
        f'y2="{y(value):.1f}"/><text class="tick" x="{_LEFT - 6}" y="{y(value) + 4:.1f}" '
        f'text-anchor="end">{_text(value)}</text>'
        for value in ticks(low, high, 4)
    ]
    parts += [
        f'<text class="tick" x="{x(value):.1f}" y="{_HEIGHT - 10}" '
        f'text-anchor="middle">{value:.0f}</text>'
        for value in ticks(first, last, 5)
        if value == round(value)
    ]
    parts.append(
        f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT + 2}" text-anchor="end">trial</text>'
    )
    if mark is not None and first < mark < last:
        parts.append(
            f'<line class="axis" stroke-dasharray="3 3" x1="{x(mark):.1f}" x2="{x(mark):.1f}" '
            f'y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
    every = max(1, -(-len(known) // _MOST_POINTS))
    path = f"M{x(known[0][0]):.1f} {y(known[0][1]):.1f}"
    path += "".join(f"H{x(trial):.1f}V{y(value):.1f}" for trial, value in known[every::every])
    path += f"H{x(known[-1][0]):.1f}V{y(known[-1][1]):.1f}"
    parts.append(f'<path class="line" d="{path}"/>')
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 8}" '
        f'width="{_WIDTH}" height="{_HEIGHT + 8}" role="img" aria-label="{escape(title)}: '
        f"{_text(known[0][1])} at trial {known[0][0]}, {_text(known[-1][1])} at trial "
        f'{known[-1][0]}">{"".join(parts)}</svg></figure>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return round values between two ends, about ``count`` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= raw)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.1e}"
    return f"{value:.3f}".rstrip("0").rstrip(".") or "0"
