"""Take a merge home: a checkpoint with its recipe, its scores and how to repeat both.

The directory appears whole or not at all: everything is written and checked beside it, then
renamed. Nothing in it names a path or a user of the machine that made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge import __version__
from evomerge.atomic_directory import atomic_directory, require_free, require_space
from evomerge.checkpoint import Checkpoint, is_local
from evomerge.errors import InputError, NothingUsableError, RecipeError
from evomerge.front_table import point_name, table_points
from evomerge.merge.writer import (
    checkpoint_bytes,
    copy_companions,
    verify_checkpoint,
    write_checkpoint,
)
from evomerge.mergekit_yaml import MergekitConfig, mergekit_config
from evomerge.model_card import CardFacts, model_card
from evomerge.models import Models
from evomerge.presentation import front_data, study_name
from evomerge.recipe import ModelRef, Recipe
from evomerge.scoring import Scoring, lm_eval_command, lm_eval_notes, lm_eval_runs
from evomerge.study_record import SPLITS, Split
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, TrialState

RECIPE_FILE = "evomerge_recipe.json"
SCORES_FILE = "evomerge_scores.json"
MERGEKIT_FILE = "mergekit_config.yml"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        out: the directory.
        trial: number of the trial.
        files: names in it, sorted.
        bytes: of all of them.
        mergekit: whether there is a mergekit configuration; else ``mergekit_reason`` says why.
        mergekit_reason: see ``mergekit``.
        commands: lm_eval commands that repeat the scores, for this machine.
        notes: what else it takes to repeat them.
        expected: value of each objective that they must give.
        split: which items they score.
    """

    out: Path
    trial: int
    files: tuple[str, ...]
    bytes: int
    mergekit: bool
    mergekit_reason: str
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    expected: Mapping[str, float]
    split: str


def choose(view: StudyView, *, best: str | None = None, trial: int | None = None) -> int:
    """Return the number of the trial to export: the knee where nothing else is asked for.

    Args:
        view: the study.
        best: name of an objective: the front member that is best in it.
        trial: a number.

    Raises:
        InputError: unknown objective or trial, or a trial without an evaluation.
        NothingUsableError: the knee of a study in which nothing has succeeded.
    """
    if best is not None and trial is not None:
        raise InputError("export: give either an objective or a trial, not both")
    if best is not None:
        return view.best(best)
    if trial is not None:
        found = view.trial(trial)
        if found.state is not TrialState.DONE:
            why = found.failure.message if found.failure else "it has no result yet"
            raise InputError(f"trial {trial}: cannot be exported: {why}")
        return trial
    if view.knee is None:
        raise NothingUsableError(f"{view.directory}: no trial has succeeded, nothing to export")
    return view.knee


def export(
    view: StudyView,
    number: int,
    models: Models,
    out: Path,
    scoring: Scoring | None = None,
    max_shard_bytes: int = 5_000_000_000,
    root: Path | None = None,
) -> Exported:
    """Write trial ``number`` of a study as a checkpoint directory.

    Args:
        view: the study.
        number: of the trial, see ``choose``.
        models: what it is made from.
        out: the new directory; an empty one is replaced.
        scoring: how the study scores; None where lm_eval does not apply.
        max_shard_bytes: largest shard.
        root: folder of the study file, where the commands are run; None for the current one.

    Raises:
        InputError: ``out`` is not empty, or cannot be made.
        RecipeError: the models are not those of the study, or the merge is not finite.
        StorageError: there is not enough space.
    """
    out = out.absolute()
    here = (root or Path.cwd()).resolve()
    shown = out.relative_to(here) if out.is_relative_to(here) else Path(out.name)
    require_free(out)
    recipe = public_recipe(view.trial(number).recipe, models)
    require_space(out, checkpoint_bytes(recipe, models))
    with atomic_directory(out) as temporary:
        write_checkpoint(recipe, models, temporary, max_shard_bytes)
        copy_companions(models.base, temporary)
        mergekit = mergekit_config(recipe, models.layout, _sources(recipe))
        files = _documents(view, number, recipe, mergekit, scoring, shown)
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        verify_checkpoint(temporary, models, recipe)
    split = _best_split(view, number)
    written = sorted(path for path in out.iterdir())
    return Exported(
        out=out,
        trial=number,
        files=tuple(path.name for path in written),
        bytes=sum(path.stat().st_size for path in written),
        mergekit=mergekit.text is not None,
        mergekit_reason=mergekit.reason,
        commands=tuple(_commands(view, recipe, scoring, split, out)),
        notes=tuple(_notes(view, scoring, split)),
        expected=_values(view, number, split),
        split=split,
    )


# -- before --------------------------------------------------------------------------------


def public_sources(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return how an exported file names each model: its hub id, or ``./`` and its directory.

    As much of a directory's path is shown as tells the models apart: ``./final``, or
    ``./math/final`` and ``./code/final``. Where that would reach up to the home directory or the
    top of the disk, the model's name in the study stands there instead.
    """
    paths = [one.directory.resolve() if is_local(one.source) else None for one in checkpoints]
    shown = []
    for one, path in zip(checkpoints, paths, strict=True):
        if path is None:
            shown.append(one.source)
            continue
        others = [other.parts for other in paths if other not in (None, path) and other]
        home = Path.home().resolve()
        private = len(home.parts) if path.is_relative_to(home) else 2  # the root and one folder
        lengths = range(1, max(len(path.parts) - private, 1) + 1)
        length = next(
            (n for n in lengths if all(path.parts[-n:] != other[-n:] for other in others)), None
        )
        tail = path.parts[-length:] if length else (one.name, path.name)
        shown.append("./" + "/".join(tail))
    return tuple(shown)


def public_recipe(recipe: Recipe, models: Models) -> Recipe:
    """Return the recipe with sources that can be shown; its digest does not change."""
    opened = (models.base, *models.experts)
    shown_as = public_sources(opened)
    named = {one.name: source for one, source in zip(opened, shown_as, strict=True)}

    def shown(ref: ModelRef) -> ModelRef:
        if ref.name not in named:
            raise RecipeError(f"recipe: the study has no model {ref.name!r}")
        return replace(ref, source=named[ref.name])

    public = replace(
        recipe, base=shown(recipe.base), experts=tuple(shown(ref) for ref in recipe.experts)
    )
    assert public.digest == recipe.digest
    return public


def _sources(recipe: Recipe) -> dict[str, str]:
    return {ref.name: ref.source for ref in (recipe.base, *recipe.experts)}


# -- writing -------------------------------------------------------------------------------


def _documents(
    view: StudyView,
    number: int,
    recipe: Recipe,
    mergekit: MergekitConfig,
    scoring: Scoring | None,
    shown: Path,
) -> dict[str, str]:
    """Return recipe, scores, documents to score, mergekit configuration and model card."""
    split = _best_split(view, number)
    commands = list(_commands(view, recipe, scoring, split, shown))
    files = {RECIPE_FILE: recipe.to_json()}
    if mergekit.text is not None:
        files[MERGEKIT_FILE] = mergekit.text
    if scoring is not None:
        runs = lm_eval_runs(scoring, view.contract["items"][split])
        for index, run in enumerate(runs):
            files[_samples_name(index)] = json.dumps(run.samples) + "\n"
    notes = _notes(view, scoring, split)
    scores = _scores(view, number, recipe, split, commands, notes)
    files[SCORES_FILE] = json.dumps(scores, indent=1, allow_nan=False) + "\n"
    files["README.md"] = model_card(_card(view, number, recipe, mergekit, commands, notes, shown))
    return files


def _samples_name(index: int) -> str:
    return f"evomerge_samples{f'_{index + 1}' if index else ''}.json"


def _commands(
    view: StudyView, recipe: Recipe, scoring: Scoring | None, split: Split, shown: Path
) -> list[str]:
    if scoring is None:
        return []
    runs = lm_eval_runs(scoring, view.contract["items"][split])
    return [
        lm_eval_command(scoring, run, str(shown), recipe.dtype, str(shown / _samples_name(index)))
        for index, run in enumerate(runs)
    ]


def _notes(view: StudyView, scoring: Scoring | None, split: Split) -> list[str]:
    if scoring is None:
        return []
    return lm_eval_notes(scoring, lm_eval_runs(scoring, view.contract["items"][split]))


def _evaluation(view: StudyView, number: int, split: Split) -> Evaluation | None:
    if split == "search":
        return view.trial(number).evaluation
    return (view.validation if split == "validation" else view.test).get(number)


def _best_split(view: StudyView, number: int) -> Split:
    """Return the most independent split that the trial was scored on."""
    return next((s for s in reversed(SPLITS) if _evaluation(view, number, s)), "search")


def _values(view: StudyView, number: int, split: Split) -> dict[str, float]:
    evaluation = _evaluation(view, number, split)
    if evaluation is None:
        return {}
    pairs = zip(view.objectives, evaluation.values, strict=True)
    return {objective.name: value for objective, value in pairs}


def _scores(
    view: StudyView,
    number: int,
    recipe: Recipe,
    split: Split,
    commands: list[str],
    notes: list[str],
) -> dict[str, Any]:
    objectives: dict[str, Any] = {}
    for index, objective in enumerate(view.objectives):
        entry: dict[str, Any] = {"direction": objective.direction.value, "unit": objective.unit}
        for name in SPLITS:
            evaluation = _evaluation(view, number, name)
            if evaluation is not None:
                score = evaluation.scores[index]
                entry[name] = {
                    "value": score.value,
                    "standard_error": score.standard_error,
                    "n": len(score.items),
                }
        objectives[objective.name] = entry
    names = [objective.name for objective in view.objectives]
    return {
        "schema": 1,
        "evomerge": __version__,
        "study": study_name(view),
        "trial": number,
        "label": view.trial(number).label,
        "on_front": number in view.front,
        "recipe": recipe.digest,
        "objectives": objectives,
        "reproduce": {
            "split": split,
            "expected": _values(view, number, split),
            "items": dict(zip(names, view.contract["items"][split], strict=True)),
            "run_from": "the folder of the study file",
            "commands": commands,
            "notes": notes,
            "versions": view.contract["identity"].get("versions", {}),
        },
    }


def _card(
    view: StudyView,
    number: int,
    recipe: Recipe,
    mergekit: MergekitConfig,
    commands: list[str],
    notes: list[str],
    shown: Path,
) -> CardFacts:
    data = front_data(view)
    split = _best_split(view, number)
    rivals = [
        (point_name(point, data), evaluation)
        for point in table_points(data)
        if point.label and point.number != number
        if (evaluation := _evaluation(view, point.number, split)) is not None
    ]
    scores: dict[str, Evaluation] = {
        name: evaluation
        for name in SPLITS
        if (evaluation := _evaluation(view, number, name)) is not None
    }
    place = f"It is trial {number} of the study “{study_name(view)}”"
    trial = view.trial(number)
    if trial.kind == "baseline":
        place += f", its baseline “{trial.label}”, which the search did not make"
    if number == view.knee:
        place += f", the recommended one of {len(view.front)} on its Pareto front."
    elif number in view.front:
        place += f", one of {len(view.front)} on its Pareto front."
    else:
        place += "; it is not on its Pareto front."
    return CardFacts(
        title=shown.name,
        recipe=recipe,
        sources=_sources(recipe),
        objectives=view.objectives,
        scores=scores,
        rivals=rivals,
        rival_split=split,
        place=place,
        mergekit=mergekit.text or "",
        mergekit_reason=mergekit.reason,
        commands=commands,
        notes=notes,
        version=__version__,
    )
