"""What a person sees on the terminal: progress while it runs, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from evomerge.errors import InputError
from evomerge.facts import front_rows, gains, one_unit, trial_name
from evomerge.launch import Finished, run
from evomerge.prepare import Prepared
from evomerge.presentation import export_command, front_data
from evomerge.study import Phase, StudyListener
from evomerge.study import Progress as StudyProgress
from evomerge.study_record import Result, Split
from evomerge.study_view import StudyView
from evomerge.tracking_target import ui_command, ui_url
from evomerge.trial import Direction, Objective, Trial

#: Without a terminal, one line at least every so many seconds.
_LINE_SECONDS = 10.0

_PHASES: Mapping[Phase, str] = {
    "baselines": "baselines",
    "search": "search",
    "validation": "finalists, validation items",
    "test": "front, held-out items",
}


def make_console(stderr: bool = False) -> Console:
    """Return a console; without a terminal its tables are wide enough for their content."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 120))


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
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
                console=console,
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
            self._task = self._bar.add_task(_PHASES[phase], total=total, note="")
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
        if trial.evaluation is None:
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
            self._bar.update(
                self._bar.task_ids[self._task],
                completed=progress.done, total=progress.total, note=note,
            )  # fmt: skip
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
        parts = [f"{progress.running} running"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        if progress.phase in {"baselines", "search"}:
            parts += [
                f"{objective.name} {value:.3f}"
                for objective, value in zip(self._objectives, self._best, strict=True)
                if value is not None
            ]
        return "  ".join(parts)


def front_table(view: StudyView) -> Table:
    """Return the front with the baselines beside it, on held-out items where they were scored."""
    tested = bool(view.test)
    split = "held-out test items" if tested else f"{view.front_split} items"
    scores = view.test if tested else {t.number: view.scores(t.number) for t in view.trials}
    table = Table(
        title=f"Pareto front and baselines, {split} (± standard error)", caption="★ recommended"
    )
    table.add_column("merge", no_wrap=True)
    table.add_column("trial", justify="right")
    for objective in view.objectives:
        arrow = "↑" if objective.direction is Direction.MAXIMIZE else "↓"
        table.add_column(f"{objective.name} {arrow}", justify="right")
    # A mean of values that are not alike, or of which one is to be small, would say nothing.
    directions = {objective.direction for objective in view.objectives}
    mean = len(view.objectives) > 1 and len(directions) == 1 and one_unit(view.objectives)
    if mean:
        table.add_column("mean", justify="right")
    for trial in front_rows(view):
        evaluation = scores.get(trial.number)
        if evaluation is None:
            continue
        on_front = trial.number in view.front
        name = trial_name(trial) + (" ★" if trial.number == view.knee else "")
        cells = [f"{score.value:.3f} ±{score.standard_error:.3f}" for score in evaluation.scores]
        if mean:
            cells.append(f"{sum(evaluation.values) / len(evaluation.values):.3f}")
        style = "bold green" if trial.number == view.knee else ("green" if on_front else "dim")
        table.add_row(name, str(trial.number), *cells, style=style)
    return table


def gains_table(view: StudyView) -> Table | None:
    """Return the gains as a table, None without test scores."""
    rows = gains(view)
    if not rows:
        return None
    table = Table(title="The recommended merge against the baselines (paired, held-out items)")
    table.add_column("against")
    table.add_column("mean gain" if one_unit(view.objectives) else "gain", justify="right")
    table.add_column("standard error", justify="right")
    table.add_column("beyond 2 standard errors")
    for gain in rows:
        difference = gain.difference
        name = f"{gain.against}, {gain.objective}" if gain.objective else gain.against
        verdict = "no" if not difference.clear else ("yes" if difference.value > 0 else "worse")
        table.add_row(name, f"{difference.value:+.3f}", f"{difference.standard_error:.3f}", verdict)
    return table


def run_with_progress(prepared: Prepared, console: Console) -> Finished:
    """Run a study while showing how far it is."""
    for warning in prepared.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    with LiveProgress(console, prepared.tasks.objectives) as live:
        return run(prepared, [live])


def print_finished(console: Console, finished: Finished) -> None:
    """Show the front, what it is worth, and what to do next, in commands to paste."""
    view = finished.view
    console.print(front_table(view))
    table = gains_table(view)
    if table is not None:
        console.print(table)
    console.print("\nLook:", style="bold")
    if finished.target is not None and finished.synced is not None:
        command = ui_command(finished.target)
        if command:
            _command(console, command)
        console.print("  then open", ui_url(finished.target, finished.synced, page="front.html"),
                      soft_wrap=True, highlight=False)  # fmt: skip
    if finished.problem:
        console.print(
            f"  MLflow lacks something ({finished.problem}); send it later with:", markup=False
        )
        _command(console, f"evomerge sync {view.directory}")
    console.print("Take home:", style="bold")
    if view.knee is not None:
        _command(console, export_command(view, "--knee", "merged"))
    other = next((number for number in view.front if number != view.knee), None)
    if other is not None:
        console.print("  or another point of the front, by its trial number:")
        _command(console, export_command(view, f"--trial {other}", f"merged-{other}"))
    console.print("Where:", style="bold")
    console.print(f"  journal, study file and MLflow store: {view.directory}",
                  soft_wrap=True, highlight=False)  # fmt: skip


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
