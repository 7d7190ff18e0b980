"""The front as characters: two objectives against each other, or one over the trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from evomerge.errors import InputError, suggest
from evomerge.front_page import FrontData, FrontPoint, Measured
from evomerge.front_plot import placed, split_note
from evomerge.front_table import point_name
from evomerge.trial import Direction

#: Character, the same in ASCII, and style by what a point is; later ones are drawn over earlier.
_MARKS: dict[str, tuple[str, str, str]] = {
    "search": ("·", ".", "dim"),
    "grid": ("▿", "v", "magenta"),
    "task_arithmetic": ("▼", "V", "bold magenta"),
    "uniform": ("▲", "U", "bold cyan"),
    "expert": ("◆", "E", "bold blue"),
    "base": ("■", "B", "bold"),
    "front": ("●", "o", "green"),
    "knee": ("★", "*", "bold yellow"),
    "picked": ("◉", "@", "bold red"),
}
_WORDS = {
    "search": "trial",
    "grid": "other task arithmetic",
    "task_arithmetic": "best task arithmetic",
    "uniform": "uniform average",
}
#: Rows of the canvas, and the width of the numbers left of it.
_ROWS, _TICK = 16, 8


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to cells; better is right or up, so the axis of a minimised objective runs back."""

    low: float
    high: float
    cells: int
    reverse: bool

    def cell(self, value: float) -> int:
        share = (value - self.low) / (self.high - self.low)
        return round((1 - share if self.reverse else share) * (self.cells - 1))

    def value(self, cell: int) -> float:
        share = cell / (self.cells - 1)
        return self.low + (1 - share if self.reverse else share) * (self.high - self.low)


def narrowed(data: FrontData, names: Sequence[str]) -> FrontData:
    """Return the front as seen in some of its objectives, in this order.

    The members stay those of the front in all objectives.

    Raises:
        InputError: an unknown objective, or one twice.
    """
    known = [objective.name for objective in data.objectives]
    for name in names:
        if name not in known:
            raise InputError(f"--objectives: unknown {name!r}{suggest(name, known)}")
    if len(set(names)) < len(names):
        raise InputError(f"--objectives: {', '.join(names)}: each one once")
    columns = [known.index(name) for name in names]

    def kept(measured: Measured | None) -> Measured | None:
        if measured is None:
            return None
        return Measured(
            tuple(measured.values[c] for c in columns),
            tuple(measured.standard_errors[c] for c in columns),
        )

    return replace(
        data,
        objectives=tuple(data.objectives[c] for c in columns),
        points=tuple(
            replace(p, search=kept(p.search), validation=kept(p.validation), test=kept(p.test))
            for p in data.points
        ),
    )


def front_text(data: FrontData, width: int, picked: int | None = None, plain: bool = False) -> Text:
    """Return the first two objectives as a picture of characters; a single one over the trials.

    Args:
        data: the front; points without scores are left out.
        width: of the picture in characters, at least 40.
        picked: number of a trial to mark.
        plain: use ASCII only.
    """
    shown = [point for point in data.points if placed(point) is not None]
    single = len(data.objectives) == 1
    columns = max(width, 40) - _TICK - 3
    places = [_place(point, single) for point in shown]
    x = _axis([place[0] for place in places], columns, not single and _less(data, 0))
    y = _axis([place[1] for place in places], _ROWS, _less(data, 0 if single else 1))
    canvas = [[(" ", "")] * columns for _ in range(_ROWS)]
    order = list(_MARKS)
    ranked = sorted(
        zip(shown, places, strict=True),
        key=lambda pair: order.index(_kind(pair[0], data, picked)),
    )
    for point, place in ranked:
        character, ascii_, style = _MARKS[_kind(point, data, picked)]
        canvas[_ROWS - 1 - y.cell(place[1])][x.cell(place[0])] = (
            ascii_ if plain else character,
            style,
        )
    for point, place in reversed(ranked):
        if point.kind in ("base", "expert") or _kind(point, data, picked) in ("knee", "picked"):
            row = canvas[_ROWS - 1 - y.cell(place[1])]
            name = _short(point, data)
            _label(row, x.cell(place[0]), name, _MARKS[_kind(point, data, picked)][2])
    return _framed(canvas, data, x, y, single, plain, _legend(ranked, data, picked, plain, width))


def _less(data: FrontData, column: int) -> bool:
    return data.objectives[column].direction is Direction.MINIMIZE


def _place(point: FrontPoint, single: bool) -> tuple[float, float]:
    measured = placed(point)
    assert measured is not None
    values = measured.values
    return (float(point.number), values[0]) if single else (values[0], values[1])


def _axis(values: Sequence[float], cells: int, reverse: bool) -> _Axis:
    low, high = min(values), max(values)
    if high - low < 1e-12:  # closer than any score can tell apart: one value, in the middle
        low, high = low - 0.5, high + 0.5
    return _Axis(low, high, cells, reverse)


def _kind(point: FrontPoint, data: FrontData, picked: int | None) -> str:
    if point.number == picked:
        return "picked"
    if point.number == data.knee:
        return "knee"
    return "front" if point.front and point.kind == "search" else point.kind


def _short(point: FrontPoint, data: FrontData) -> str:
    return point_name(point, data).removeprefix("expert ").replace("trial ", "")


def _label(row: list[tuple[str, str]], column: int, name: str, style: str) -> None:
    """Write a name beside its mark, on the right or the left, where nothing stands."""
    for start in (column + 2, column - 1 - len(name)):
        end = start + len(name)
        # One free cell on each side, or two names would read as one.
        around = row[max(0, start - 1) : end + 1]
        around = [c for at, c in enumerate(around, start=max(0, start - 1)) if at != column]
        if start >= 0 and end <= len(row) and all(cell[0] in " ·." for cell in around):
            for place, letter in enumerate(name, start=start):
                row[place] = (letter, style)
            return


def _framed(
    canvas: Sequence[Sequence[tuple[str, str]]], data: FrontData, x: _Axis, y: _Axis,
    single: bool, plain: bool, legend: Text,
) -> Text:  # fmt: skip
    upright, corner, flat, arrows = ("|", "+", "-", ("^", ">")) if plain else (
        "│", "└", "─", ("↑", "→"),
    )  # fmt: skip
    text = Text()
    text.append(f"{' ' * _TICK} {arrows[0]} {_title(data, 0 if single else 1)}\n", "bold")
    for number, row in enumerate(canvas):
        height = len(canvas) - 1 - number
        tick = _number(y.value(height)) if height % 5 == 0 else ""
        text.append(f"{tick:>{_TICK}} ", "dim").append(upright, "dim")
        for character, style in row:
            text.append(character, style)
        text.append("\n")
    text.append(f"{' ' * _TICK} {corner}{flat * len(canvas[0])}\n", "dim")
    ticks = [_number(x.value(cell)) for cell in (0, (x.cells - 1) // 2, x.cells - 1)]
    if single:
        ticks = [f"{float(tick):.0f}" for tick in ticks]
    gap = x.cells - sum(map(len, ticks))
    line = ticks[0] + " " * (gap // 2) + ticks[1] + " " * (gap - gap // 2) + ticks[2]
    text.append(f"{' ' * (_TICK + 2)}{line}\n", "dim")
    title = f"{'trial' if single else _title(data, 0)} {arrows[1]}"
    text.append(f"{' ' * (_TICK + 2)}{title:>{x.cells}}\n", "bold")
    text.append(legend)
    return text.append(f"\n{' ' * (_TICK + 2)}{split_note(data)}")


def _title(data: FrontData, column: int) -> str:
    less = " (less is better)" if _less(data, column) else ""
    return data.objectives[column].name + less


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 1000 or 0 < abs(value) < 0.01 else f"{value:.3f}"


def _legend(
    ranked: Sequence[tuple[FrontPoint, object]],
    data: FrontData,
    picked: int | None,
    plain: bool,
    width: int,
) -> Text:
    text, line = Text(), ""
    found = [_kind(point, data, picked) for point, _ in ranked]
    for kind in dict.fromkeys(reversed(found)):
        character, ascii_, style = _MARKS[kind]
        word = f" {_WORDS.get(kind, kind)}   "
        if not line or len(line) + len(word) - 2 > width:
            text.append(("\n" if line else "") + " " * (_TICK + 2))
            line = " " * (_TICK + 2)
        text.append(ascii_ if plain else character, style).append(word, "dim")
        line += character + word
    return text
