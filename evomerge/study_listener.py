"""What a study tells those who watch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evomerge.study_record import Result, Split
from evomerge.study_view import StudyView
from evomerge.trial import Trial

#: ``complete``: finalists that a race had stopped are scored on the rest of their items.
Phase = Literal["baselines", "search", "complete", "validation", "test"]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a phase stands, in trials.

    Attributes:
        phase: which one.
        done: with a result, failed ones included.
        running: in the hands of workers.
        total: planned; the searcher may give fewer.
        items: scored by workers since the study began, over all objectives.
        stops: trials that a race stopped early since the study began.
    """

    phase: Phase
    done: int
    running: int
    total: int
    items: int = 0
    stops: int = 0


class StudyListener:
    """Is told what happens; subclass it and override what matters.

    What a listener raises is logged and never stops the search. On resume everything that the
    journal holds is told again, in the same order, with ``replayed`` set.
    """

    def on_phase(self, phase: Phase, total: int) -> None:
        """A phase with ``total`` trials begins."""

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        """A trial has its result on the search items; in ask order."""

    def on_result(self, trial: Trial, result: Result) -> None:
        """The same, with how it was scored: a race may have stopped it; after ``on_trial``."""

    def on_score(self, trial: Trial, split: Split, result: Result) -> None:
        """A finalist was scored on ``validation`` or ``test``, or completed."""

    def on_progress(self, progress: Progress) -> None:
        """A result arrived, or a trial was asked."""

    def on_workers(self, facts: Mapping[str, str]) -> None:
        """The workers are up."""

    def on_finish(self, view: StudyView) -> None:
        """The study is finished."""
