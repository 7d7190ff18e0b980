"""`evomerge list` in terminals of two widths, and in a pipe."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest
from test_cli import call

from evomerge.catalogue import catalogue_lines
from evomerge.listing import listing

TABLES = ("methods", "searchers", "partitions", "objectives", "estimators")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("what", TABLES)
def test_a_terminal_is_not_exceeded_and_nothing_is_lost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str, width: int
) -> None:
    """Details stood in one line, which terminals broke at any place, without an indentation."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = call(capsys, monkeypatch, "list", what)
    assert code == 0
    lines = click.unstyle(out).splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line != line.rstrip() for line in lines)
    rows = catalogue_lines(what, Path())
    names = [next(iter(row.values())) for row in rows]
    heads = [number for number, line in enumerate(lines) if not line.startswith(" ")]
    assert len(heads) == len(rows)
    for row, name, start, stop in zip(rows, names, heads, [*heads[1:], None], strict=True):
        assert lines[start].startswith(f"{name} ")
        shown = " ".join(" ".join(lines[start:stop]).split())
        for key, text in list(row.items())[1:]:
            for part in text.splitlines():
                assert " ".join(part.split()) in shown, (name, key)


@pytest.mark.parametrize("what", TABLES)
def test_a_pipe_gets_one_plain_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = call(capsys, monkeypatch, "list", what)[1].splitlines()
    rows = catalogue_lines(what, Path())
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert "\x1b" not in line
        for text in row.values():
            assert "; ".join(text.splitlines()) in line


def test_columns_are_aligned() -> None:
    rows = [
        {"name": "short", "what it does": "one two three four five six seven eight nine",
         "needs": "a\nb", "source": "somewhere far away in the world of papers"},
        {"name": "a_rather_long_name_of_it", "what it does": "one two", "needs": ""},
    ]  # fmt: skip
    found = [f"{name}{text}" for name, text in listing(rows, 40)]
    assert found == [
        "short            one two three four five\n"
        "                 six seven eight nine\n"
        "    needs   a\n"
        "            b\n"
        "    source  somewhere far away in the\n"
        "              world of papers",
        "a_rather_long_name_of_it  one two",
    ]
    assert [f"{name}{text}" for name, text in listing(rows, None)] == [
        "short            one two three four five six seven eight nine; needs: a; b; source: "
        "somewhere far away in the world of papers",
        "a_rather_long_name_of_it  one two",
    ]
