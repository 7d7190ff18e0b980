"""Asks in the journal: written down when they are new, compared when they are repeated."""

from __future__ import annotations

from dataclasses import replace

from evomerge import numerics
from evomerge.errors import ReplayError
from evomerge.item_cache import Items
from evomerge.journal import Recorder
from evomerge.recipe import Recipe
from evomerge.study_record import History, ask_fields, frame_fields
from evomerge.trial import Trial


class Asks:
    """Takes every ask of a run.

    Args:
        journal: of the study.
        history: what it holds; new trials are added.
        pool: all search items [m][I].

    Attributes:
        compared: asks that were found equal to those of the journal.
    """

    def __init__(self, journal: Recorder, history: History, pool: Items) -> None:
        self._journal = journal
        self._history = history
        self._pool = pool
        self._frames = {frame: number for number, frame in enumerate(history.frames)}
        self._frame_of: dict[Recipe, int] = {}
        self._sets = {items: number for number, items in enumerate(history.sets)}
        self._noted = False
        self.compared = 0

    def take(self, trial: Trial, items: Items) -> Trial:
        """Journal an ask, or compare it with the recorded one.

        Args:
            trial: that is asked.
            items: it is to be scored on [m][I].

        Raises:
            ReplayError: they differ.
        """
        number = trial.number
        recorded = self._history.trials.get(number)
        if recorded is not None:
            compare(recorded, self._history.digests[number], trial)
            self.compared += 1
            if self._history.items_of("search", number) != items:
                raise ReplayError(
                    f"trial {number}: the journal has other items for it; what chooses them (an "
                    "estimator or its libraries) changed since the study began",
                    number,
                )
        else:
            self._note_numerics(number)
            frame = self._frame(trial.recipe)
            chosen = self._set(items)
            self._journal.append("ask", **ask_fields(trial, frame, chosen))
            if chosen is not None:
                self._history.set_of[number] = chosen
        self._history.trials[number] = trial
        self._history.digests[number] = trial.recipe.digest
        return trial

    def _note_numerics(self, number: int) -> None:
        """Write down with what trials are asked from now on, where that is new."""
        if self._noted:
            return
        self._noted = True
        here = dict(numerics.numerics())
        if self._history.provenance.latest != here:
            record = self._journal.append("numerics", trial=number, numerics=here)
            self._history.provenance.take(record, number)

    def _frame(self, recipe: Recipe) -> int:
        bare = replace(recipe, table=(), seed=0)
        if bare in self._frame_of:  # most often: the way through JSON takes milliseconds
            return self._frame_of[bare]
        fields = frame_fields(recipe)
        frame = Recipe.from_dict({**fields, "table": [], "seed": 0})
        if frame not in self._frames:
            self._journal.append("frame", recipe=fields)
            self._frames[frame] = len(self._frames)
        self._frame_of[bare] = self._frames[frame]
        return self._frames[frame]

    def _set(self, items: Items) -> int | None:
        """Return the number of a set of items, None for all search items in their order."""
        if items == self._pool:
            return None
        if items not in self._sets:
            self._journal.append("items", set=len(self._sets), items=items)
            self._history.sets.append(items)
            self._sets[items] = len(self._sets)
        return self._sets[items]


def compare(recorded: Trial, digest: str, trial: Trial) -> None:
    """Raise ``ReplayError`` unless the ask equals the recorded one bit for bit."""
    remedy = "the searcher, the space or their libraries changed since the study began"
    number = trial.number
    if (recorded.kind, recorded.label) != (trial.kind, trial.label):
        raise ReplayError(
            f"trial {number}: the journal has {recorded.kind} {recorded.label!r}, now asked "
            f"is {trial.kind} {trial.label!r}; {remedy}",
            number,
        )
    old, new = recorded.x or (), trial.x or ()
    if len(old) != len(new):
        raise ReplayError(
            f"trial {number}: the journal has {len(old)} dimensions, now {len(new)}; {remedy}",
            number,
        )
    for dimension, (before, now) in enumerate(zip(old, new, strict=True)):
        if before.hex() != now.hex():
            raise ReplayError(
                f"trial {number}: dimension {dimension}: the journal has {before!r}, the "
                f"searcher now asks {now!r}; {remedy}",
                number,
            )
    if digest != trial.recipe.digest:
        raise ReplayError(f"trial {number}: the same x decodes to another recipe; {remedy}", number)
