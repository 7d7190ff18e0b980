"""What a person sees on the terminal when a study is done: tables, plots, what to do next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from evomerge.atomic_file import atomic_file, write_text
from evomerge.comparison_rows import COMPARISON_HEADER, comparison_note, comparison_rows
from evomerge.errors import InputError
from evomerge.estimate_audits import distrust
from evomerge.feasibility import bounds_note, keeps_bounds
from evomerge.gain import front_rows, gains, one_unit, trial_name
from evomerge.item_comparison import Comparison
from evomerge.launch import Finished, run
from evomerge.live_progress import LiveProgress as LiveProgress
from evomerge.prepare import Prepared
from evomerge.presentation import export_command, front_data, shown_directory
from evomerge.study_view import StudyView
from evomerge.tracking_target import pareto_url, ui_command, ui_url
from evomerge.trial import Direction


def make_console(stderr: bool = False) -> Console:
    """Return a console; without a terminal its tables are wide enough for their content."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 120))


def front_table(view: StudyView) -> Table:
    """Return the front with the baselines beside it, on held-out items where they were scored."""
    tested = bool(view.test)
    split = "held-out test items" if tested else f"{view.front_split} items"
    scores = view.test if tested else {t.number: view.scores(t.number) for t in view.trials}
    table = Table(
        title=f"Pareto front and baselines, {split} (± standard error)", caption=_caption(view)
    )
    table.add_column("merge", no_wrap=True)
    table.add_column("trial", justify="right")
    for objective in view.objectives:
        arrow = "↑" if objective.direction is Direction.MAXIMIZE else "↓"
        table.add_column(f"{objective.name} {arrow}", justify="right")
    outside = False
    # A mean of values that are not alike, or of which one is to be small, would say nothing.
    directions = {objective.direction for objective in view.objectives}
    mean = len(view.objectives) > 1 and len(directions) == 1 and one_unit(view.objectives)
    if mean:
        table.add_column("mean", justify="right")
    rows = [trial for trial in front_rows(view, scores) if scores.get(trial.number) is not None]
    last = sum(trial.number in view.front for trial in rows) - 1
    for row, trial in enumerate(rows):
        evaluation = scores[trial.number]
        assert evaluation is not None
        on_front = trial.number in view.front
        name = trial_name(trial) + (" ★" if trial.number == view.knee else "")
        pairs = list(zip(view.objectives, evaluation.scores, strict=True))
        broken = [not keeps_bounds(objective, score.value) for objective, score in pairs]
        outside = outside or any(broken)
        cells = [
            f"{score.value:.3f} ±{score.standard_error:.3f}{' !' * breaks}"
            for (_, score), breaks in zip(pairs, broken, strict=True)
        ]
        if mean:
            cells.append(f"{sum(evaluation.values) / len(evaluation.values):.3f}")
        style = "bold green" if trial.number == view.knee else ("green" if on_front else "dim")
        table.add_row(name, str(trial.number), *cells, style=style, end_section=row == last)
    if outside:
        table.caption = f"{table.caption}\n! {bounds_note(view.objectives)}"
    return table


def _caption(view: StudyView) -> str:
    text = "★ recommended\nabove the line the front, best mean first; below it other baselines"
    if view.knee is not None and view.trial(view.knee).kind == "baseline":
        text += "\nThe recommended merge is a baseline: the search found no better compromise."
    if view.violation:
        text += "\nNo merge keeps all constraints: shown is the one that violates least."
    return "\n".join([text, *(f"{key}: {value}" for key, value in view.searcher.items())])


def gains_table(view: StudyView) -> Table | None:
    """Return the gains as a table, None without test scores."""
    rows = gains(view)
    if not rows:
        return None
    table = Table(title="The recommended merge against the baselines (paired, held-out items)")
    table.add_column("against")
    table.add_column("gain" if any(row.objective for row in rows) else "mean gain", justify="right")
    table.add_column("standard error", justify="right")
    table.add_column("beyond 2 standard errors")
    for gain in rows:
        difference = gain.difference
        name = f"{gain.against}, {gain.objective}" if gain.objective else gain.against
        error, verdict = f"{difference.standard_error:.3f}", "no"
        if not difference.comparable:
            error = verdict = "–"  # nothing was drawn: there is no error to stand outside of
        elif difference.clear:
            verdict = "yes" if difference.value > 0 else "worse"
        table.add_row(name, f"{difference.value:+.3f}", error, verdict)
    return table


def run_with_progress(prepared: Prepared, console: Console, restart: bool = False) -> Finished:
    """Run a study while showing how far it is; ``restart`` is that of ``Study.run``."""
    for warning in prepared.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    if prepared.choice:
        console.print(f"searcher: {prepared.choice}", markup=False, highlight=False)
    if prepared.estimate:
        console.print(f"estimator: {prepared.estimate}", markup=False, highlight=False)
    pool = prepared.file.pool

    def starting() -> None:
        count = 1 if pool.kind == "serial" else pool.workers
        console.print(f"starting {count} worker{'s' * (count != 1)} ...", highlight=False)

    def sending(seconds: float) -> None:
        console.print(f"sending the rest to MLflow, up to {seconds:.0f} s ...", highlight=False)

    with LiveProgress(console, prepared.tasks.objectives) as live:
        return run(prepared, [live], starting, sending, restart)


def print_finished(console: Console, finished: Finished) -> None:
    """Show the front, what it is worth, and what to do next, in commands to paste."""
    view = finished.view
    console.print(front_table(view))
    table = gains_table(view)
    if table is not None:
        console.print(table)
    for warning in distrust(view):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    study = shown_directory(view)
    activate = activation()
    if activate:
        console.print("\nOnce in this shell, so that the commands below are found:", style="bold")
        _command(console, activate)
    console.print("\nLook:", style="bold")
    if finished.target is not None and finished.synced is not None:
        command = ui_command(finished.target)
        if command:
            _command(console, f"evomerge ui {study}")
            console.print("  or MLflow's own command:")
            _command(console, command)
        for name, url in (
            ("Pareto page", pareto_url(finished.target, finished.synced)),
            ("interactive front", ui_url(finished.target, finished.synced, page="front.html")),
        ):
            console.print(f"  {'then open the ' if command else ''}{name}:", url,
                          soft_wrap=True, highlight=False)  # fmt: skip
    if finished.problem:
        console.print(
            f"  MLflow lacks something ({finished.problem}); send it later with:",
            markup=False, highlight=False,
        )  # fmt: skip
        _command(console, f"evomerge sync {study}")
    console.print("  or all of it as one HTML page, and what a difference is worth:")
    _command(console, f"evomerge report {study}")
    _command(console, f"evomerge compare {study}")
    console.print("Take home:", style="bold")
    if view.knee is not None:
        _command(console, export_command(view, "--knee", "merged"))
    other = next(
        (t.number for t in front_rows(view) if t.kind == "search" and t.number != view.knee), None
    )
    if other is not None:
        console.print("  or another point of the front, by its trial number:")
        _command(console, export_command(view, f"--trial {other}", f"merged-{other}"))
    console.print("Where:", style="bold")
    console.print(f"  journal, study file and MLflow store: {view.directory}",
                  soft_wrap=True, highlight=False)  # fmt: skip


def activation() -> str:
    """Return the command that puts ``evomerge`` on the PATH; empty where it is there already."""
    folder = Path(sys.executable).parent
    if not (folder / "evomerge").exists() or not (folder / "activate").exists():
        return ""
    found = shutil.which("evomerge")
    if found is not None and Path(found).resolve() == (folder / "evomerge").resolve():
        return ""
    here = Path.cwd()
    shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
    return f"source {shlex.quote(str(shown / 'activate'))}"


def _command(console: Console, command: str) -> None:
    """Print a command without wrapping it, so that it can be pasted."""
    console.print(f"    {command}", soft_wrap=True, highlight=False, markup=False)


def save_plot(view: StudyView, path: Path, names: Sequence[str] | None = None) -> None:
    """Draw the front into a file, whole or not at all; the suffix chooses the form.

    Args:
        view: the study.
        path: of the file.
        names: objectives to draw; all of them on a page and the first two in a picture where
            absent.

    Raises:
        InputError: another suffix, unknown objectives, or the file cannot be written.
        StorageError: the disk is full.
    """
    from evomerge.front_page import front_html
    from evomerge.front_plot import save_front
    from evomerge.terminal_plot import narrowed

    if path.suffix not in {".html", ".png", ".svg"}:
        raise InputError(
            f"--plot: {path.name}: use a name that ends in .html, .png or .svg, or - for the "
            "terminal"
        )
    data = front_data(view) if names is None else narrowed(front_data(view), names)
    if path.suffix == ".html":
        write_text(path, front_html(data), "--plot")
        return
    with atomic_file(path, "--plot") as temporary:
        save_front(data, temporary)


def print_plot(
    console: Console, view: StudyView, names: Sequence[str] | None, picked: int | None
) -> None:
    """Draw the front in characters.

    Args:
        console: where to; ASCII only where its encoding has nothing else.
        view: the study.
        names: one or two objectives; the first two where absent.
        picked: number of a trial to mark.

    Raises:
        InputError: unknown objectives, or more than two.
    """
    from evomerge.terminal_plot import front_text, narrowed

    data = front_data(view)
    known = [objective.name for objective in data.objectives]
    if names is not None and len(names) > 2:
        raise InputError(f"--objectives: {', '.join(names)}: one or two can be drawn here")
    data = narrowed(data, names or known[:2])
    plain = "utf" not in console.encoding.lower()
    console.print(front_text(data, min(console.width, 100), picked, plain), highlight=False)
    if names is None and len(known) > 2:
        console.print(f"Other pairs: --objectives A,B of {', '.join(known)}", style="dim",
                      highlight=False)  # fmt: skip


def print_comparison(
    console: Console, found: Comparison, count: int, texts: Mapping[tuple[str, str], str]
) -> None:
    """Show a comparison of trials, and the items on which they differ.

    Args:
        console: where to.
        found: the comparison.
        count: how many items to list per objective.
        texts: what is asked, by objective and item; may be empty.
    """
    title = f"{found.names[found.first]} against the others, on the items that both were scored on"
    table = Table(title=title, caption=comparison_note(found), box=box.SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(COMPARISON_HEADER):
        table.add_column(name, justify="left" if column < 2 else "right", no_wrap=True)
    rows = list(zip(comparison_rows(found), found.pairings, strict=True))
    for place, (row, one) in enumerate(rows):
        last = place + 1 == len(rows) or rows[place + 1][1].theirs != one.theirs
        style = "" if not one.clear else ("green" if one.difference > 0 else "red")
        table.add_row(*row, style=style, end_section=last)
    # Numbers are never cut: a narrow terminal wraps the lines, a pipe gets them whole.
    console.print(table, width=max(console.width, console.measure(table).maximum), crop=False)
    for one in found.pairings if count else ():
        if not one.objective or not one.changes:
            continue
        console.print(
            f"\n{one.objective}, against {found.names[one.theirs]}: {len(one.changes)} of "
            f"{one.items} items differ (its score → that of {found.names[one.ours]})",
            style="bold", highlight=False, markup=False,
        )  # fmt: skip
        for change in one.changes[:count]:
            asked = texts.get((one.objective, change.item), "")
            console.print(
                f"  {change.item:>8}  {change.theirs:g} → {change.ours:g}"
                + (f"  {asked}" if asked else ""),
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
