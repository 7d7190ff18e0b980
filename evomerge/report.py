"""A study as one page of HTML that needs nothing but itself: the front, and what is behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from evomerge.atomic_file import write_text
from evomerge.coefficient_page import heat_map, largest_coefficient
from evomerge.comparison_rows import (
    COMPARISON_HEADER,
    comparison_note,
    comparison_rows,
    overview_rows,
)
from evomerge.estimate_audits import distrust
from evomerge.front_page import FrontData, FrontPoint, front_html, summary
from evomerge.front_table import point_name, table_points
from evomerge.metric_names import objective_metrics
from evomerge.plain_page import heading, paragraph, table
from evomerge.presentation import (
    STUDY_FILE,
    export_command,
    project,
    shown_directory,
    verify_command,
)
from evomerge.projection import Projection
from evomerge.redaction import redacted
from evomerge.report_charts import line_chart
from evomerge.report_summary import recommended_comparison
from evomerge.study_view import StudyView

#: Heat maps that are open at once, and at most; failures, audits that are listed at most.
_OPEN, _MAPS, _FAILURES, _AUDITS = 3, 24, 40, 40

_STYLE = """
.report h2{font-size:16px;margin:30px 0 6px;padding-top:10px;border-top:1px solid var(--line)}
.report h3{font-size:14px;margin:14px 0 2px}
.report p{color:var(--soft);max-width:85ch;margin:4px 0}
.report svg{width:auto;max-width:100%}
.report .wide{overflow-x:auto}
.report table{margin:8px 0}
.report th,.report td{white-space:normal;vertical-align:top}
.report tbody tr{border-top:1px solid var(--line)}
.report .texts th,.report .texts td{text-align:left}
.report .texts td:nth-child(n+2){overflow-wrap:anywhere}
.report .pairs :is(th,td):nth-child(-n+2){text-align:left}
.report .pairs td{white-space:nowrap}
.report .charts{display:flex;flex-wrap:wrap;gap:14px 26px}
.report figure{margin:0}.report figcaption{font-weight:600;font-size:13px;margin-bottom:2px}
.report .line{fill:none;stroke:var(--front);stroke-width:1.8}
.report summary{cursor:pointer;color:var(--soft);margin:6px 0}
.report pre{background:var(--panel);max-width:100%}
.tiles{display:flex;flex-wrap:wrap;gap:8px;margin:10px 0 14px}
.tiles div{border:1px solid var(--line);border-radius:8px;background:var(--panel);padding:6px 14px}
.tiles b{display:block;font-size:17px;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:12px}
.lead{color:var(--soft);max-width:95ch;margin:0 0 4px}
@media print{.report pre{white-space:pre-wrap}.report{break-before:page}}
"""


def save_report(view: StudyView, path: Path) -> None:
    """Write the page of a study, whole or not at all.

    Raises:
        InputError: the file cannot be written.
        StorageError: the disk is full.
    """
    write_text(path, report_html(view), "--out")


def report_html(view: StudyView) -> str:
    """Return the page: the interactive front, and below it all that the journal says.

    It holds no credentials: texts that may hold some go through ``redacted``.
    """
    projection = project(view)
    page = front_html(projection.front)
    parts = list(_parts(view, projection))
    below = f'<section class="report" aria-label="Report">{"".join(parts)}</section>'
    for place, added in (
        ("</style>", f"{_STYLE}</style>"),
        ("</header>", f"</header>{_lead(view, projection)}"),
        ("</main>", f"{below}</main>"),
    ):
        assert page.count(place) == 1, place
        page = page.replace(place, added)
    return page


def _lead(view: StudyView, projection: Projection) -> str:
    counts, spent = view.counts, view.spending
    tiles = {
        "trials done": f"{counts.done:,}",
        "failed": f"{counts.failed:,}",
        "on the front": f"{len(view.front):,}",
        "item evaluations": f"{spent.scored:,}",
        "hypervolume, search items": f"{view.hypervolume:.4g}",
        "state": view.state.value,
    }
    if spent.saved:
        tiles["item evaluations saved"] = f"{spent.saved:,}"
    boxes = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for name, value in tiles.items()
    )
    words = [word.strip().replace("`", "") for word in projection.words]
    if view.message:
        words.append(f"It stopped early: {view.message}")
    lead = "".join(f'<p class="lead">{escape(redacted(word))}</p>' for word in words)
    return f'{lead}<div class="tiles">{boxes}</div>'


def _parts(view: StudyView, projection: Projection) -> Iterator[str]:
    yield from _gains(view)
    yield from _series(view, projection)
    yield from _coefficients(projection.front)
    yield from _failures(view)
    yield from _audits(view)
    yield from _commands(view)
    yield from _environment(view)


def _gains(view: StudyView) -> Iterator[str]:
    found = recommended_comparison(view)
    if found is None:
        return
    yield heading(f"What {found.names[found.first]} gains over the baselines")
    yield paragraph(comparison_note(found))
    short = overview_rows(found)
    yield _wide(table(COMPARISON_HEADER, short), "pairs")
    if len(short) < len(found.pairings):
        yield _folded(
            "Each objective", _wide(table(COMPARISON_HEADER, comparison_rows(found)), "pairs")
        )


def _series(view: StudyView, projection: Projection) -> Iterator[str]:
    steps = projection.steps
    if len(steps) < 2:
        return
    yield heading("Over the trials")
    yield paragraph(
        "By search scores; the dashed line is where the baselines end. Trials that were scored on "
        "a part of their items are not counted."
    )
    wanted = {"hypervolume of the front so far": "hypervolume"} | {
        f"{one.name}, best so far": f"best/{name}"
        for one, name in zip(view.objectives, objective_metrics(view.objectives), strict=True)
    }
    charts = (
        line_chart(title, [step.metrics.get(key) for step in steps], 0, len(view.baselines))
        for title, key in wanted.items()
    )
    yield f'<div class="charts">{"".join(charts)}</div>'


def _coefficients(front: FrontData) -> Iterator[str]:
    members = [p for p in table_points(front) if p.front and p.recipe is not None]
    if not members:
        return
    members.sort(key=lambda point: point.number != front.knee)
    members = members[:_MAPS]
    largest = largest_coefficient(members)
    yield heading("What the front is made of")
    yield paragraph(
        f"Coefficients, blocks from left to right. One colour scale for all: blue is negative, "
        f"white 0, orange {largest:.2f}."
    )
    for point in members[:_OPEN]:
        yield _map(point, front, largest)
    if rest := members[_OPEN:]:
        inside = "".join(_map(point, front, largest) for point in rest)
        yield _folded(f"{len(rest)} more members of the front", inside)


def _map(point: FrontPoint, front: FrontData, largest: float) -> str:
    assert point.recipe is not None
    number = f" · trial {point.number}" if point.label else ""
    title = f"<h3>{escape(point_name(point, front))}{number}</h3>"
    drawn = heat_map(point.recipe, front.blocks, largest)
    return f'{title}{paragraph(summary(point.recipe))}<div class="wide">{drawn}</div>'


def _failures(view: StudyView) -> Iterator[str]:
    failed = [(t.number, t.failure) for t in view.trials if t.failure is not None]
    if not failed:
        return
    yield heading(f"{len(failed)} failed trial{'s' * (len(failed) != 1)}")
    kinds = Counter(failure.kind for _, failure in failed)
    yield paragraph(", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    rows = [
        [number, failure.kind, redacted(failure.message)] for number, failure in failed[:_FAILURES]
    ]
    yield _wide(table(["trial", "kind", "error"], rows), "texts")
    if len(failed) > _FAILURES:
        yield paragraph(f"{len(failed) - _FAILURES} more are in the journal.")


def _audits(view: StudyView) -> Iterator[str]:
    audits = view.audits
    if not audits:
        return
    yield heading("How far off the estimates were")
    for warning in distrust(view):
        yield paragraph(f"Warning: {warning}")
    yield paragraph(
        f"{len(audits)} trials were scored on all search items besides. Beside the estimate stands "
        "the plain mean of the same few items: an estimator that is not nearer is not worth it."
    )
    rows = []
    for column, objective in enumerate(view.objectives):
        off = [
            [abs(audit.estimate.values[column] - audit.full[column]) for audit in audits],
            [abs(audit.mean.values[column] - audit.full[column]) for audit in audits],
        ]
        rows.append([objective.name, *(f"{sum(row) / len(row):.4f}" for row in off)])
    yield table(["objective", "mean error of the estimate", "of the plain mean"], rows)
    listed = [
        [
            audit.number, objective.name, f"{audit.full[column]:.4f}",
            f"{audit.estimate.values[column]:.4f} ± {audit.estimate.errors[column]:.4f}",
            f"{audit.mean.values[column]:.4f}",
        ]
        for audit in audits[:_AUDITS]
        for column, objective in enumerate(view.objectives)
    ]  # fmt: skip
    header = ["trial", "objective", "all items", "estimate", "plain mean"]
    yield _folded("Every one of them", _wide(table(header, listed)))


def _commands(view: StudyView) -> Iterator[str]:
    yield heading("Go on")
    export, study = export_command(view, "--pick knee", "merged"), shown_directory(view)
    lines = [
        f"{export}", verify_command(view, "merged"),
        f"evomerge compare {study} knee base --items 10", f"evomerge ui {study}",
    ]  # fmt: skip
    yield f"<pre>{escape(chr(10).join(lines))}</pre>"


def _environment(view: StudyView) -> Iterator[str]:
    yield heading("Environment")
    identity: Mapping[str, Any] = view.contract["identity"]
    rows: list[Sequence[object]] = [["study directory", view.directory.name]]
    times = sorted(view.times.values())
    for name, ends in (("first result", times[:1]), ("last result", times[-1:])):
        rows += [[name, f"{datetime.fromtimestamp(t, UTC):%Y-%m-%d %H:%M} UTC"] for t in ends]
    rows += [["seed", view.contract["seed"]], ["at a time", view.contract["parallel"]]]
    rows += [[f"worker: {key}", redacted(str(value))] for key, value in view.facts.items()]
    versions = {**identity.get("versions", {}), **identity.get("libraries", {})}
    rows += [[key, value] for key, value in versions.items()]
    yield _wide(table(["what", "value"], rows), "texts")
    file = view.directory / STUDY_FILE
    if file.exists():
        text = escape(redacted(file.read_text(encoding="utf-8")))
        yield _folded("The study file, resolved", f"<pre>{text}</pre>")


def _wide(inside: str, style: str = "") -> str:
    return f'<div class="wide {style}">{inside}</div>'


def _folded(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"
