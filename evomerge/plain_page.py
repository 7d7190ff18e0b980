"""Pages of HTML without scripts: headings, paragraphs, tables and grids of coloured cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#57606a;--line:#d0d7de}
@media (prefers-color-scheme:dark){:root{--bg:#0f1419;--fg:#e6edf3;--soft:#9aa7b4;--line:#30363d}}
body{margin:0;background:var(--bg);color:var(--fg);font:14px/1.45 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:14px 20px 28px}
h1{font-size:19px;margin:0}h2{font-size:15px;margin:22px 0 4px}
p{margin:2px 0;color:var(--soft)}
svg{display:block;max-width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:6px 0}
th,td{padding:3px 10px;text-align:right;border-top:1px solid var(--line)}
th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_LABEL_WIDTH, _ROW_HEIGHT, _TEXT_WIDTH = 190, 18, 84


def page(title: str, body: Sequence[str]) -> str:
    """Return a whole page of parts that the other functions made."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"</head><body><main><h1>{escape(title)}</h1>{''.join(body)}</main></body></html>\n"
    )


def heading(text: str) -> str:
    """Return a heading."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; its first column is text, the others are numbers."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def cells(
    rows: Sequence[str],
    columns: Sequence[str],
    colours: Sequence[Sequence[str]],
    texts: Sequence[Sequence[str]],
) -> str:
    """Return a grid of coloured cells.

    Args:
        rows: labels [R].
        columns: labels [C]; written below the grid where they fit.
        colours: CSS colour of each cell [R][C].
        texts: what is said when the pointer rests on a cell [R][C]; an empty one says nothing.
    """
    count = max(1, len(columns))
    width = min(90.0, 960.0 / count)
    parts = []
    for row, label in enumerate(rows):
        y = row * _ROW_HEIGHT
        shown = label if len(label) <= 26 else label[:25] + "…"
        parts.append(f'<text x="0" y="{y + 13}">{escape(shown)}</text>')
        for column, colour in enumerate(colours[row]):
            x, text = _LABEL_WIDTH + column * width, texts[row][column]
            title = f"<title>{escape(text)}</title>" if text else ""
            parts.append(
                f'<rect x="{x:.2f}" y="{y + 1}" width="{max(width - 0.6, 0.5):.2f}" '
                f'height="{_ROW_HEIGHT - 2}" fill="{colour}">{title}</rect>'
            )
    bottom = len(rows) * _ROW_HEIGHT
    every = math.ceil(_TEXT_WIDTH / width)
    for column in range(0, len(columns), every):
        x = _LABEL_WIDTH + column * width
        parts.append(f'<text x="{x:.1f}" y="{bottom + 12}">{escape(columns[column][:14])}</text>')
    box = f"0 0 {_LABEL_WIDTH + count * width:.0f} {bottom + 18}"
    size = f'width="{_LABEL_WIDTH + count * width:.0f}" height="{bottom + 18}"'
    return f'<svg viewBox="{box}" {size} role="img">{"".join(parts)}</svg>'
