"""Rows of ``evomerge list`` as text: wrapped for a terminal, each in one line elsewhere."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

#: Columns that say what a row is; the second column where there is none of them.
_SUMMARIES = ("what it does", "what it is", "blocks", "state")
#: Names are padded to so many characters; the text behind a longer one begins after two spaces.
_NAME = 16
_INDENT = 4
#: Nothing can be read in a narrower terminal.
_NARROWEST = 40


def listing(rows: Sequence[Mapping[str, str]], width: int | None) -> Iterator[tuple[str, str]]:
    """Yield names and what follows each of them, which may be several lines.

    Args:
        rows: of one table; the first column of each is its name.
        width: of the terminal; None for one line per row, which a program can search.
    """
    for row in rows:
        (key, name), *rest = row.items()
        other = next((one for one in _SUMMARIES if one in row and one != key), rest[0][0])
        details = {one: text for one, text in rest if one != other and text}
        if width is None:
            facts = (f"{one}: {'; '.join(text.splitlines())}" for one, text in details.items())
            yield name, "; ".join([f"{' ' * _gap(name)}{row[other]}", *facts])
        else:
            yield name, "\n".join(_wrapped(name, row[other], details, max(width, _NARROWEST)))


def _gap(name: str) -> int:
    return max(_NAME - len(name), 1) + 1


def _wrapped(name: str, summary: str, details: Mapping[str, str], width: int) -> Iterator[str]:
    """Yield the summary behind the name, then a block of lines for every detail."""
    indent = _NAME + 1
    first = " " * (len(name) + _gap(name))
    lines = _lines(summary, width, first, " " * indent)
    yield lines[0][len(name) :]
    yield from lines[1:]
    column = _INDENT + max(map(len, details), default=0) + 2
    for key, text in details.items():
        for number, paragraph in enumerate(text.splitlines()):
            lead = f"{'':<{_INDENT}}{key}" if number == 0 else ""
            yield from _lines(paragraph, width, f"{lead:<{column}}", " " * (column + 2))


def _lines(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False,
        break_on_hyphens=False,
    ) or [first]  # fmt: skip
