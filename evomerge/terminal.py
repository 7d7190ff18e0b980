"""What a person sees on the terminal: progress while it runs, tables when it is done."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from evomerge.errors import InputError
from evomerge.feasibility import bounds_note, constrained, keeps_bounds, violation
from evomerge.gain import front_rows, gains, one_unit, trial_name
from evomerge.launch import Finished, run
from evomerge.prepare import Prepared
from evomerge.presentation import export_command, front_data
from evomerge.study import Phase, StudyListener
from evomerge.study import Progress as StudyProgress
from evomerge.study_record import Result, Split
from evomerge.study_view import StudyView
from evomerge.tracking_target import pareto_url, ui_command, ui_url
from evomerge.trial import Direction, Objective, Trial

#: Without a terminal, one line at least every so many seconds.
_LINE_SECONDS = 10.0

_PHASES: Mapping[Phase, str] = {
    "baselines": "baselines",
    "search": "search",
    "complete": "finalists, the rest of their items",
    "validation": "finalists, validation items",
    "test": "front, held-out items",
}


def make_console(stderr: bool = False) -> Console:
    """Return a console; without a terminal its tables are wide enough for their content."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 120))


class _Bars(Progress):
    """Bars, and below them what would push them out of a narrow terminal."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is shown."""
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, style="dim")


class LiveProgress(StudyListener):
    """Bars on a terminal, plain lines elsewhere.

    Args:
        console: where to.
        objectives: of the study, for the best values.
    """

    def __init__(self, console: Console, objectives: Sequence[Objective]) -> None:
        self._console = console
        self._objectives = objectives
        self._best: list[float | None] = [None] * len(objectives)
        self._failed = 0
        self._replayed = 0
        self._phase: Phase | None = None
        self._spoke = 0.0
        self._bar: _Bars | None = None
        if console.is_terminal:
            self._bar = _Bars(
                TextColumn("{task.description:<27}"),
                BarColumn(max(5, min(40, console.width - 70))), MofNCompleteColumn(),
                TextColumn("elapsed"), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
        self._task: int | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_phase(self, phase: Phase, total: int) -> None:
        """Begin a bar or say so."""
        self._phase = phase
        if self._bar is not None:
            self._task = self._bar.add_task(_PHASES[phase], total=total)
        else:
            self._console.print(f"{_PHASES[phase]}: {total} trials")
            self._spoke = time.monotonic()

    def on_workers(self, facts: Mapping[str, str]) -> None:
        """Show where trials run."""
        text = ", ".join(f"{key} {value}" for key, value in facts.items())
        self._console.print(f"workers: {text}")

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        """Remember the best values and the failures."""
        self._replayed += replayed
        if trial.failure is not None:
            self._failed += 1
            if not replayed:
                self._console.print(
                    f"trial {trial.number} failed ({trial.failure.kind}): {trial.failure.message}",
                    markup=False,
                )
        if trial.evaluation is None or violation(self._objectives, trial.evaluation.values) > 0:
            return
        for index, value in enumerate(trial.evaluation.values):
            best = self._best[index]
            loss = self._objectives[index].loss
            if best is None or loss(value) < loss(best):
                self._best[index] = value

    def on_score(self, trial: Trial, split: Split, result: Result) -> None:
        """Nothing: the bar shows it."""

    def on_progress(self, progress: StudyProgress) -> None:
        """Move the bar, or print a line now and then."""
        note = self._note(progress)
        if self._bar is not None and self._task is not None:
            self._bar.note = note
            self._bar.update(
                self._bar.task_ids[self._task], completed=progress.done, total=progress.total
            )
        elif progress.done and (
            progress.done == progress.total or time.monotonic() - self._spoke > _LINE_SECONDS
        ):
            self._spoke = time.monotonic()
            self._console.print(
                f"{_PHASES[progress.phase]}: {progress.done}/{progress.total}  {note}",
                highlight=False,
            )

    def on_finish(self, view: StudyView) -> None:
        """Say what was taken from the journal."""
        if self._replayed:
            self._console.print(f"{self._replayed} results were taken from the journal")

    def _note(self, progress: StudyProgress) -> str:
        parts = [f"{progress.running} running", f"{progress.items:,} items scored"]
        if progress.stops:
            parts.append(f"{progress.stops} stopped early")
        if self._failed:
            parts.append(f"{self._failed} failed")
        if progress.phase in {"baselines", "search"}:
            best = [
                f"{objective.name} {value:.3f}"
                for objective, value in zip(self._objectives, self._best, strict=True)
                if value is not None
            ]
            within = " within all bounds" if constrained(self._objectives) else ""
            if best:
                text = f"best so far of each objective{within}, search items: {', '.join(best)}"
                parts.append(text)
            elif within and progress.done:
                parts.append("no trial is within all bounds yet")
        return "; ".join(parts)


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


def run_with_progress(prepared: Prepared, console: Console) -> Finished:
    """Run a study while showing how far it is."""
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

    with LiveProgress(console, prepared.tasks.objectives) as live:
        return run(prepared, [live], starting)


def print_finished(console: Console, finished: Finished) -> None:
    """Show the front, what it is worth, and what to do next, in commands to paste."""
    view = finished.view
    console.print(front_table(view))
    table = gains_table(view)
    if table is not None:
        console.print(table)
    activate = activation()
    if activate:
        console.print("\nOnce in this shell, so that the commands below are found:", style="bold")
        _command(console, activate)
    console.print("\nLook:", style="bold")
    if finished.target is not None and finished.synced is not None:
        command = ui_command(finished.target)
        if command:
            _command(console, f"evomerge ui {shlex.quote(str(view.directory))}")
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
        _command(console, f"evomerge sync {view.directory}")
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


def save_plot(view: StudyView, path: Path) -> None:
    """Draw the front into a file; the suffix chooses the form.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    from evomerge.front_page import front_html
    from evomerge.front_plot import save_front

    data = front_data(view)
    try:
        if path.suffix == ".html":
            path.write_text(front_html(data), encoding="utf-8")
        elif path.suffix in {".png", ".svg"}:
            save_front(data, path)
        else:
            raise InputError(f"--plot: {path.name}: use a name that ends in .html, .png or .svg")
    except OSError as error:
        raise InputError(f"--plot: {path}: cannot be written: {error.strerror}") from error
