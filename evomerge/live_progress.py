"""How far a running study is: bars and a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
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

from evomerge.feasibility import constrained, violation
from evomerge.gain import trial_name
from evomerge.growing_front import GrowingFront, reference_point
from evomerge.study_listener import Phase, StudyListener
from evomerge.study_listener import Progress as StudyProgress
from evomerge.study_record import Result, Split
from evomerge.study_view import StudyView
from evomerge.telling import losses_of
from evomerge.trial import Direction, Evaluation, Objective, Trial

#: Without a terminal, one line at least every so many seconds.
_LINE_SECONDS = 10.0
#: Speeds are those of the last so many seconds.
_SPEED_SECONDS = 120.0
#: Objectives in the table; more would push the bar out of a small terminal.
_ROWS = 8

_PHASES: Mapping[Phase, str] = {
    "baselines": "baselines",
    "search": "search",
    "complete": "finalists, the rest of their items",
    "validation": "finalists, validation items",
    "test": "front, held-out items",
}


class _Bars(Progress):
    """Bars, and below them what would push them out of a narrow terminal."""

    below: tuple[RenderableType, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what is shown."""
        yield self.make_tasks_table(self.tasks)
        yield from self.below


class _Speed:
    """How fast a count grows, by its latest values."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def see(self, now: float, count: int) -> None:
        """Take in a value; one below the last begins anew."""
        if self._seen and count < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, count))
        while len(self._seen) > 2 and now - self._seen[0][0] > _SPEED_SECONDS:
            self._seen.popleft()

    @property
    def per_second(self) -> float:
        """0.0 while it is not known."""
        if not self._seen:
            return 0.0
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        return (after - before) / (end - start) if end > start else 0.0


class LiveProgress(StudyListener):
    """Bars and a table on a terminal, plain lines elsewhere.

    Args:
        console: where to.
        objectives: of the study, for the best values.
        clock: seconds that never run back.
    """

    def __init__(
        self,
        console: Console,
        objectives: Sequence[Objective],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._objectives = objectives
        self._clock = clock
        self._best: list[float | None] = [None] * len(objectives)
        self._best_of = [""] * len(objectives)
        self._base: tuple[float, ...] | None = None
        self._baselines: list[tuple[float, ...]] = []  # losses
        self._front: GrowingFront | None = None
        self._early: list[tuple[float, ...]] = []  # losses before the reference point is fixed
        self._failed = 0
        self._replayed = 0
        self._items, self._trials = _Speed(), _Speed()
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
        self._trials = _Speed()
        if self._bar is not None:
            self._task = self._bar.add_task(_PHASES[phase], total=total)
        else:
            self._console.print(f"{_PHASES[phase]}: {total} trials")
            self._spoke = self._clock()

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
        if trial.label == "base":
            self._base = trial.evaluation.values
        if violation(self._objectives, trial.evaluation.values) > 0:
            return
        for index, value in enumerate(trial.evaluation.values):
            best = self._best[index]
            loss = self._objectives[index].loss
            if best is None or loss(value) < loss(best):
                self._best[index] = value
                self._best_of[index] = trial_name(trial)

    def on_result(self, trial: Trial, result: Result) -> None:
        """Let the front grow; not by what was scored on a part of its items."""
        if isinstance(result.value, Evaluation) and result.rung is None:
            self._grow(trial, result.value)

    def on_score(self, trial: Trial, split: Split, result: Result) -> None:
        """Let the front grow by what was completed; the bar shows the others."""
        if split == "complete" and isinstance(result.value, Evaluation):
            self._grow(trial, result.value)

    def on_progress(self, progress: StudyProgress) -> None:
        """Move the bar, or print a line now and then."""
        now = self._clock()
        self._items.see(now, progress.items)
        self._trials.see(now, progress.done)
        if self._bar is not None and self._task is not None:
            self._bar.below = self._below(progress)
            self._bar.update(
                self._bar.task_ids[self._task], completed=progress.done, total=progress.total
            )
        elif progress.done and (
            progress.done == progress.total or now - self._spoke > _LINE_SECONDS
        ):
            self._spoke = now
            self._console.print(
                f"{_PHASES[progress.phase]}: {progress.done}/{progress.total}"
                f"{self._left(progress)}  {self._note(progress)}",
                highlight=False,
            )

    def on_finish(self, view: StudyView) -> None:
        """Say what was taken from the journal."""
        if self._replayed:
            self._console.print(f"{self._replayed} results were taken from the journal")

    def _grow(self, trial: Trial, evaluation: Evaluation) -> None:
        """Count a trial to the hypervolume, as ``StudyView.hypervolumes`` does.

        The baselines, which come first, fix the reference point.
        """
        losses = losses_of(self._objectives, evaluation.values)
        if trial.kind == "baseline":
            self._baselines.append(losses)
        if self._front is None and trial.kind != "baseline":
            self._front = GrowingFront(reference_point(self._baselines or [losses]))
            for early in self._early:
                self._front.add(early)
        if violation(self._objectives, evaluation.values) > 0:
            return
        if self._front is None:
            self._early.append(losses)
        else:
            self._front.add(losses)

    def _below(self, progress: StudyProgress) -> tuple[RenderableType, ...]:
        """Return what stands below the bars: one line of counts, and the best values."""
        counts = Text("; ".join([f"{progress.done} done", *self._counts(progress)]), style="dim")
        head = self._best_head(progress)
        if not head or not any(value is not None for value in self._best):
            return (counts, Text(head, style="dim")) if head else (counts,)
        table = Table.grid(padding=(0, 2))
        rows = zip(self._objectives, self._best, self._best_of, strict=True)
        for column, (objective, value, name) in enumerate(rows):
            if value is None or column >= _ROWS:
                continue
            less = "" if objective.direction is Direction.MAXIMIZE else "less is better"
            base = "" if self._base is None else f"base {self._base[column]:.3f}"
            table.add_row(f"  {objective.name}", f"{value:.3f}", name, base, less)
        more = len(self._objectives) - _ROWS
        parts: tuple[RenderableType, ...] = (counts, Text(f"{head}:", style="dim"), table)
        return (*parts, Text(f"  and {more} more", style="dim")) if more > 0 else parts

    def _counts(self, progress: StudyProgress) -> list[str]:
        parts = [f"{progress.running} running"]
        speed = self._items.per_second
        rate = f" ({speed:,.0f} a second)" if speed >= 10 else f" ({speed:.2g} a second)"
        parts.append(f"{progress.items:,} items scored{rate if speed > 0 else ''}")
        if progress.stops:
            parts.append(f"{progress.stops} stopped early")
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._front is not None:
            parts.append(f"hypervolume {self._front.volume:.4g}")
        return parts

    def _left(self, progress: StudyProgress) -> str:
        """Return the time that the phase still takes, by the trials of the last minutes."""
        speed = self._trials.per_second
        if not speed or progress.done >= progress.total:
            return ""
        seconds = round((progress.total - progress.done) / speed)
        return f"  about {timedelta(seconds=seconds)} left"

    def _best_head(self, progress: StudyProgress) -> str:
        """Return the words above the best values; empty where none belong here."""
        if progress.phase not in {"baselines", "search"}:
            return ""
        within = " within all bounds" if constrained(self._objectives) else ""
        if any(value is not None for value in self._best):
            return f"best so far of each objective{within}, search items"
        return "no trial is within all bounds yet" if within and progress.done else ""

    def _note(self, progress: StudyProgress) -> str:
        parts = self._counts(progress)
        head = self._best_head(progress)
        best = [
            f"{objective.name} {value:.3f}"
            for objective, value in zip(self._objectives, self._best, strict=True)
            if value is not None
        ]
        if head:
            parts.append(f"{head}: {', '.join(best)}" if best else head)
        return "; ".join(parts)
