"""Which items which model solves: what only one expert can do, and what the merge keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.gain import trial_name
from evomerge.plain_page import cells, heading, page, paragraph, table
from evomerge.study_record import Split
from evomerge.study_view import StudyView
from evomerge.trial import Direction, Trial

#: Items drawn at most per objective; the table counts all of them.
_MOST_DRAWN = 480
_NAMED = 12
_SOLVED, _NOT, _ALONE = "#117a4b", "#e4e8ec", "#c2410c"


@dataclass(frozen=True, slots=True)
class Coverage:
    """Right and wrong answers of some models to the items of one objective.

    Attributes:
        objective: its name.
        split: which items.
        items: their ids [I].
        models: names; base, experts and uniform average, the recommended merge last [M].
        experts: rows of ``models`` that are experts.
        solved: whether a model solves an item [M][I].
    """

    objective: str
    split: Split
    items: tuple[str, ...]
    models: tuple[str, ...]
    experts: tuple[int, ...]
    solved: tuple[tuple[bool, ...], ...]

    def alone(self, expert: int) -> tuple[int, ...]:
        """Return the items that this expert (a row) solves and no other expert does."""
        others = [row for row in self.experts if row != expert]
        return tuple(
            item
            for item in range(len(self.items))
            if self.solved[expert][item] and not any(self.solved[row][item] for row in others)
        )


def coverage(view: StudyView) -> tuple[Coverage, ...]:
    """Return the coverage of every objective whose items are either solved or not.

    On the held-out items where they were scored, else on the search items.
    """
    trials = [t for t in view.baselines if not t.label.startswith("task_arithmetic")]
    if view.knee is not None and view.knee not in {trial.number for trial in trials}:
        trials.append(view.trial(view.knee))
    for split in ("test", "search"):
        known = [trial for trial in trials if _has(view, split, trial)]
        if known and any(trial.label.startswith("expert:") for trial in known):
            found = (_coverage(view, split, known, k) for k in range(len(view.objectives)))
            return tuple(one for one in found if one is not None)
    return ()


def _has(view: StudyView, split: Split, trial: Trial) -> bool:
    return trial.number in view.test if split == "test" else trial.evaluation is not None


def _coverage(
    view: StudyView, split: Split, trials: Sequence[Trial], column: int
) -> Coverage | None:
    if view.objectives[column].direction is not Direction.MAXIMIZE:
        return None
    ids = view.items_of(split, trials[0].number)[column]
    kept, rows = [], []
    for trial in trials:
        scores = view.evaluation(split, trial.number).scores[column].items
        if view.items_of(split, trial.number)[column] == ids and len(scores) == len(ids):
            kept.append(trial)
            rows.append(scores)
    if not ids or any(score not in (0.0, 1.0) for row in rows for score in row):
        return None
    return Coverage(
        objective=view.objectives[column].name,
        split=split,
        items=tuple(ids),
        models=tuple(
            trial_name(trial) + (" (recommended)" if trial.number == view.knee else "")
            for trial in kept
        ),
        experts=tuple(r for r, trial in enumerate(kept) if trial.label.startswith("expert:")),
        solved=tuple(tuple(score == 1.0 for score in row) for row in rows),
    )


def coverage_html(title: str, found: Sequence[Coverage]) -> str:
    """Return the page, one table and one grid per objective."""
    body = [
        paragraph(
            "Alone: items that this expert solves and no other expert does. Kept: how many of "
            "those the recommended merge solves. The grid has one column per item; orange is "
            "solved by one expert alone, green by more."
        )
    ]
    for one in found:
        body += [heading(f"{one.objective}, {len(one.items)} {one.split} items"), *_parts(one)]
    return page(f"{title}: coverage of items", body)


def _parts(one: Coverage) -> list[str]:
    alone = {row: set(one.alone(row)) for row in one.experts}
    merged = one.solved[-1] if one.models[-1].endswith("(recommended)") else None
    rows = []
    for row, name in enumerate(one.models):
        count = sum(one.solved[row])
        mine = alone.get(row)
        kept = "" if mine is None or merged is None else sum(merged[item] for item in mine)
        named = "" if mine is None else ", ".join(one.items[i] for i in sorted(mine)[:_NAMED])
        more = " …" if mine is not None and len(mine) > _NAMED else ""
        rows.append([name, count, "" if mine is None else len(mine), kept, named + more])
    nobody = sum(not any(one.solved[row][i] for row in one.experts) for i in range(len(one.items)))
    rows.append(["no expert", nobody, "", "", ""])
    order = sorted(
        range(len(one.items)), key=lambda i: tuple(not row[i] for row in one.solved)
    )[:_MOST_DRAWN]  # fmt: skip
    every = set().union(*alone.values())
    colours = [
        [(_ALONE if i in every else _SOLVED) if solved[i] else _NOT for i in order]
        for solved in one.solved
    ]
    texts = [[f"{name}: item {one.items[i]}" for i in order] for name in one.models]
    return [
        table(["model", "solves", "alone", "kept", "which alone"], rows),
        cells(one.models, [""] * len(order), colours, texts),
    ]
