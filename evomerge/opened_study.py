"""A study from Python: ``evomerge.Study.open(directory).front()``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from evomerge.errors import InputError, NothingUsableError, suggest
from evomerge.gain import front_rows, trial_name
from evomerge.recipe import Recipe
from evomerge.study_record import SPLITS, Split
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Objective, Trial

if TYPE_CHECKING:
    import pandas as pd

    from evomerge.export import Exported
    from evomerge.item_comparison import Comparison


@dataclass(frozen=True, slots=True)
class Measurement:
    """The value of one objective on the items of one split.

    Attributes:
        value: in the objective's unit.
        standard_error: of ``value``, same unit.
        items: how many were scored.
    """

    value: float
    standard_error: float
    items: int


@dataclass(frozen=True, slots=True)
class Merge:
    """One trial of a study: a merge and what it scored.

    Attributes:
        number: of the trial.
        name: ``base``, ``expert:math``, ``uniform``, ..., else ``trial 12``.
        kind: ``baseline`` or ``search``.
        state: ``asked``, ``done`` or ``failed``.
        error: why it failed, else empty.
        front: whether it is on the reported front.
        knee: whether it is the recommended one.
        recipe: the merge as numbers; ``recipe.to_json()`` is what ``evomerge merge`` reads.
        scores: by split (``search``, ``validation``, ``test``) and objective; only splits on
            which it was scored.
    """

    number: int
    name: str
    kind: str
    state: str
    error: str
    front: bool
    knee: bool
    recipe: Recipe
    scores: Mapping[str, Mapping[str, Measurement]]

    @property
    def coefficients(self) -> dict[str, tuple[float, ...]]:
        """Coefficients of each column of the recipe over the blocks [B]."""
        return {name: self.recipe.column(name) for name in self.recipe.columns}

    def score(self, objective: str, split: str | None = None) -> Measurement:
        """Return the score in one objective.

        Args:
            objective: its name.
            split: which items; None for test items where there are, else validation items, else
                search items.

        Raises:
            InputError: no such objective, or no scores on that split.
        """
        known = [one for one in reversed(SPLITS) if one in self.scores]
        if split is None:
            split = known[0] if known else "search"
        if split not in self.scores:
            raise InputError(
                f"{self.name}: no scores on {split} items; it has them on "
                f"{', '.join(known) or 'none'}"
            )
        values = self.scores[split]
        if objective not in values:
            raise InputError(f"objective: unknown {objective!r}{suggest(objective, values)}")
        return values[objective]


class Merges(Sequence[Merge]):
    """Some merges of one study, in order; ``to_frame()`` makes them a pandas table.

    Args:
        merges: of the study.
    """

    def __init__(self, merges: Sequence[Merge]) -> None:
        self._merges = tuple(merges)

    @overload
    def __getitem__(self, index: int) -> Merge: ...
    @overload
    def __getitem__(self, index: slice) -> Merges: ...
    def __getitem__(self, index: int | slice) -> Merge | Merges:
        found = self._merges[index]
        return found if isinstance(found, Merge) else Merges(found)

    def __len__(self) -> int:
        return len(self._merges)

    def __iter__(self) -> Iterator[Merge]:
        return iter(self._merges)

    def __repr__(self) -> str:
        names = ", ".join(merge.name for merge in self._merges[:8])
        return f"<{len(self)} merges: {names}{', ...' if len(self) > 8 else ''}>"

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas table with one row per merge; the trial numbers are its index.

        Columns: name, kind, state, front, knee; ``split/objective`` and its standard error
        ``split/objective_se`` for every split on which any of them was scored; and each column of
        the recipes by its own name, such as ``weight.math``: the mean over the blocks.
        """
        import pandas as pd

        numbers = pd.Index([merge.number for merge in self._merges], name="trial")
        parts = [[part(merge) for merge in self._merges] for part in (_facts, _scores, _means)]
        return pd.concat([pd.DataFrame(rows, index=numbers) for rows in parts], axis=1)


def _facts(merge: Merge) -> dict[str, Any]:
    names = ("name", "kind", "state", "front", "knee")
    return {name: getattr(merge, name) for name in names}


def _scores(merge: Merge) -> dict[str, float]:
    cells: dict[str, float] = {}
    for split, scores in merge.scores.items():
        for name, score in scores.items():
            cells[f"{split}/{name}"] = score.value
            cells[f"{split}/{name}_se"] = score.standard_error
    return cells


def _means(merge: Merge) -> dict[str, float]:
    return {name: sum(column) / len(column) for name, column in merge.coefficients.items()}


class Study:
    """A study that was run, or is running, as its journal told it when it was opened.

    ``Study.open("studies/demo")`` reads it; opening it again sees what came since. Nothing here
    changes the study.

    Args:
        view: the journal, read.
    """

    def __init__(self, view: StudyView) -> None:
        self.view = view

    @staticmethod
    def open(path: str | Path) -> Study:
        """Read a study.

        Args:
            path: its directory, its study file, or the folder of its study file.

        Raises:
            InputError: there is no study, or it has not been run yet.
            StorageError: its journal is damaged.
        """
        from evomerge.study_location import open_view

        return Study(open_view(str(path)))

    def __repr__(self) -> str:
        counts = self.view.counts
        return (
            f"<evomerge study {self.name!r}: {self.state}, {counts.done} of {counts.asked} trials "
            f"done, {len(self.view.front)} on the front>"
        )

    @property
    def name(self) -> str:
        """As in the study file, else that of the directory."""
        from evomerge.presentation import study_name

        return study_name(self.view)

    @property
    def directory(self) -> Path:
        """Holds the journal."""
        return self.view.directory

    @property
    def state(self) -> str:
        """``running``, ``finished``, ``interrupted`` or ``failed``."""
        return self.view.state.value

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is searched for [m]."""
        return self.view.objectives

    @property
    def hypervolume(self) -> float:
        """Of the search scores, by a reference point that the baselines fix."""
        return self.view.hypervolume

    def front(self) -> Merges:
        """Return the front, best mean first; preliminary while the search runs."""
        on_front = [t for t in front_rows(self.view) if t.number in self.view.front]
        return Merges([self._merge(trial) for trial in on_front])

    def trials(self) -> Merges:
        """Return all trials by number, baselines and failed ones included."""
        return Merges([self._merge(trial) for trial in self.view.trials])

    def baselines(self) -> Merges:
        """Return the base, the experts and the simple merges."""
        return Merges([self._merge(trial) for trial in self.view.baselines])

    def trial(self, number: int) -> Merge:
        """Return one trial.

        Raises:
            InputError: no such trial.
        """
        return self._merge(self.view.trial(number))

    @property
    def knee(self) -> Merge:
        """The recommended merge.

        Raises:
            NothingUsableError: no trial has succeeded yet.
        """
        if self.view.knee is None:
            raise NothingUsableError(f"{self.directory}: no trial has succeeded yet")
        return self.trial(self.view.knee)

    def pick(self, how: str) -> Merge:
        """Return a member of the front: ``knee``, ``asf:0.7,0.3``, ``best:OBJECTIVE`` or ``hv``.

        Raises:
            InputError: another word, an unknown objective or wrong weights.
            NothingUsableError: no trial has succeeded yet.
        """
        from evomerge.picking import pick_trial

        return self.trial(pick_trial(self.view, how))

    def compare(self, *merges: Merge | int | str, split: Split | None = None) -> Comparison:
        """Compare the first of some merges with each other one, item by item.

        Args:
            merges: of this study, trial numbers, or words as on the command line (``knee``,
                ``base``, ``expert:math``); a single one is compared with all baselines.
            split: which items; None for the best that both were scored on.

        Raises:
            InputError: see ``evomerge.item_comparison.compare_trials``.
        """
        from evomerge.item_comparison import compare_trials, find_trial, rivals_of

        words = [one.number if isinstance(one, Merge) else one for one in merges]
        numbers = [find_trial(self.view, str(word)) for word in words]
        if len(numbers) == 1:
            numbers += rivals_of(self.view, numbers[0])
        return compare_trials(self.view, numbers, split)

    def export(
        self, out: str | Path, merge: Merge | int | str = "knee", *, max_shard_size: str = "5GB"
    ) -> Exported:
        """Write a merge as a checkpoint directory, as ``evomerge export`` does.

        Args:
            out: the new directory.
            merge: of this study, a trial number, or a word as in ``pick``.
            max_shard_size: such as ``2GB``.

        Raises:
            InputError: no such merge, or ``out`` is not free.
            ModelError: the models are gone or changed.
        """
        from evomerge.item_comparison import find_trial
        from evomerge.take_home import export_trial

        number = merge.number if isinstance(merge, Merge) else find_trial(self.view, str(merge))
        return export_trial(self.view, trial=number, out=Path(out), shards=max_shard_size)

    def report(self, path: str | Path) -> None:
        """Write the page that ``evomerge report`` writes.

        Raises:
            InputError: the file cannot be written.
            StorageError: the disk is full.
        """
        from evomerge.report import save_report

        save_report(self.view, Path(path))

    def _merge(self, trial: Trial) -> Merge:
        evaluations: dict[str, Evaluation | None] = {
            "search": trial.evaluation,
            "validation": self.view.validation.get(trial.number),
            "test": self.view.test.get(trial.number),
        }
        return Merge(
            number=trial.number,
            name=trial_name(trial),
            kind=trial.kind,
            state=trial.state.value,
            error="" if trial.failure is None else trial.failure.message,
            front=trial.number in self.view.front,
            knee=trial.number == self.view.knee,
            recipe=trial.recipe,
            scores={
                split: {
                    objective.name: Measurement(score.value, score.standard_error, len(score.items))
                    for objective, score in zip(
                        self.view.objectives, evaluation.scores, strict=True
                    )
                }
                for split, evaluation in evaluations.items()
                if evaluation is not None
            },
        )
