"""What lies beside the weights of an export: recipe, scores, what to score, card, mergekit file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge import __version__
from evomerge.front_table import point_name, table_points
from evomerge.item_cache import Items
from evomerge.licences import Licence
from evomerge.lora import Kept
from evomerge.mergekit_yaml import MergekitConfig
from evomerge.model_card import CardFacts, model_card
from evomerge.presentation import front_data, study_name
from evomerge.recipe import Recipe
from evomerge.scoring import Scoring, lm_eval_command, lm_eval_notes, lm_eval_runs
from evomerge.study_record import SPLITS, Split
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation

RECIPE_FILE = "evomerge_recipe.json"
SCORES_FILE = "evomerge_scores.json"
MERGEKIT_FILE = "mergekit_config.yml"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an exported adapter keeps of the merge.

    Attributes:
        kept: of the weights.
        evaluation: of the base with the adapter, on the items of the export; None where it could
            not be scored.
        reason: why not.
        asked: rank that was asked for; 0 for the adapter's own.
    """

    kept: Kept
    evaluation: Evaluation | None
    reason: str
    asked: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """What is written beside the documents.

    Attributes:
        recipe: as it is written, with sources that can be shown.
        scored: as the study scored it.
        mergekit: its mergekit configuration.
        shown: path of the directory, as commands name it.
        licence: of the merge.
        tokenizer: one sentence on where it comes from; empty where there is none.
        weights: whether there are any.
        adapter: what it keeps, where the weights are those of an adapter.
    """

    recipe: Recipe
    scored: Recipe
    mergekit: MergekitConfig
    shown: Path
    licence: Licence
    tokenizer: str
    weights: bool
    adapter: Adapter | None


def documents(
    view: StudyView, number: int, scoring: Scoring | None, written: Written
) -> dict[str, str]:
    """Return the texts of an export by file name.

    Args:
        view: the study.
        number: of the trial.
        scoring: how the study scores; None where lm_eval does not apply.
        written: what lies beside them.
    """
    commands, notes = reproduction(view, number, scoring, written)
    files = {RECIPE_FILE: written.recipe.to_json()}
    if written.mergekit.text is not None:
        files[MERGEKIT_FILE] = written.mergekit.text
    if scoring is not None and written.weights and written.adapter is None:
        for index, run in enumerate(lm_eval_runs(scoring, scored_items(view, number))):
            files[_samples_name(index)] = json.dumps(run.samples) + "\n"
    scores = _scores(view, number, scoring, written, commands, notes)
    files[SCORES_FILE] = json.dumps(scores, indent=1, allow_nan=False) + "\n"
    files["README.md"] = model_card(_card(view, number, scoring, written, commands, notes))
    return files


def reproduction(
    view: StudyView, number: int, scoring: Scoring | None, written: Written
) -> tuple[list[str], list[str]]:
    """Return the commands that repeat the scores, and what else must be known about them."""
    notes = [written.tokenizer] if written.tokenizer else []
    if written.recipe.dtype != written.scored.dtype:
        notes.append(
            f"The scores were measured in {_DTYPES[written.scored.dtype]}; these weights are "
            f"rounded to {_DTYPES[written.recipe.dtype]} and can give others."
        )
    if best_split(view, number) == "search":
        notes += [
            f"The score of {name} is an estimate from {count} of {full} search items; the mean of "
            f"these {count}, which lm_eval gives, is another number."
            for name, (count, full) in estimated(view, number).items()
        ]
    if written.adapter is not None:
        notes += adapter_notes(view, number, written.adapter)
    if scoring is None or not written.weights:
        return [], notes
    runs = lm_eval_runs(scoring, scored_items(view, number))
    notes += lm_eval_notes(scoring, runs)
    if written.adapter is not None:
        return [], notes  # lm_eval would need the base beside it: what it gives stands there
    commands = [
        lm_eval_command(
            scoring, run, str(written.shown), written.recipe.dtype,
            str(written.shown / _samples_name(index)),
        )
        for index, run in enumerate(runs)
    ]  # fmt: skip
    return commands, notes


def adapter_notes(view: StudyView, number: int, adapter: Adapter) -> list[str]:
    """Return what an adapter loses, one sentence each."""
    kept = adapter.kept
    notes = ["The adapter holds the merged factors themselves: nothing of the merge is lost."]
    if kept.exact and adapter.asked:
        notes.append(
            f"The factors have rank {kept.rank} and are written exactly, in this rank, although "
            f"rank {adapter.asked} was asked for."
            if adapter.asked > kept.rank
            else f"The factors have rank {kept.rank} and are written exactly."
        )
    if not kept.exact:
        notes = [
            f"The adapter has rank {kept.rank}: it keeps {100 * kept.share:.2f} % of the squared "
            f"change of the weights (relative error {kept.error:.2e}; the worst tensor is "
            f"{kept.worst}, {kept.worst_error:.2e})."
        ]
    if kept.saved:
        notes.append(
            f"What LoRA cannot hold is saved whole: {', '.join(kept.saved)} (modules_to_save)."
        )
    if kept.lost:
        notes.append(
            f"Not in the adapter, although the merge changes them: {', '.join(kept.lost)}."
        )
    if adapter.evaluation is None:
        notes.append(f"The adapter was not scored: {adapter.reason}.")
        return notes
    split = best_split(view, number)
    merge = split_values(view, number, split)
    pairs = zip(view.objectives, adapter.evaluation.values, strict=True)
    rows = [f"{one.name} {value:.4f} ({merge[one.name]:.4f})" for one, value in pairs]
    notes.append(
        f"Scores of the adapter on the {split} items, in brackets the merge's: {', '.join(rows)}."
    )
    return notes


def evaluation_of(view: StudyView, number: int, split: Split) -> Evaluation | None:
    """Return the scores of a trial on a split, None where it has none."""
    if split == "search":
        return view.trial(number).evaluation
    return (view.validation if split == "validation" else view.test).get(number)


def best_split(view: StudyView, number: int) -> Split:
    """Return the most independent split that the trial was scored on."""
    return next((s for s in reversed(SPLITS) if evaluation_of(view, number, s)), "search")


def scored_items(view: StudyView, number: int) -> Items:
    """Return the items behind the scores of that split [m][I]."""
    split = best_split(view, number)
    evaluation = evaluation_of(view, number, split)
    items = view.items_of(split, number)
    if evaluation is None:
        return items
    # A race scores the first items only.
    pairs = zip(items, evaluation.scores, strict=True)
    return tuple(ids[: len(score.items)] for ids, score in pairs)


def split_values(view: StudyView, number: int, split: Split) -> dict[str, float]:
    """Return the value of each objective on a split; none where the trial has no scores there."""
    evaluation = evaluation_of(view, number, split)
    if evaluation is None:
        return {}
    pairs = zip(view.objectives, evaluation.values, strict=True)
    return {objective.name: value for objective, value in pairs}


def _samples_name(index: int) -> str:
    return f"evomerge_samples{f'_{index + 1}' if index else ''}.json"


def estimated(view: StudyView, number: int) -> dict[str, tuple[int, int]]:
    """Return, by objective, on how many of how many search items a trial's search score rests.

    Only of those scored on fewer than all: their value is an estimate.
    """
    evaluation = evaluation_of(view, number, "search")
    if evaluation is None:
        return {}
    return {
        objective.name: (len(score.items), len(items))
        for objective, score, items in zip(
            view.objectives, evaluation.scores, view.contract["items"]["search"], strict=True
        )
        if 0 < len(score.items) < len(items)
    }


def _scores(
    view: StudyView,
    number: int,
    scoring: Scoring | None,
    written: Written,
    commands: list[str],
    notes: list[str],
) -> dict[str, Any]:
    objectives: dict[str, Any] = {}
    for index, objective in enumerate(view.objectives):
        entry: dict[str, Any] = {"direction": objective.direction.value, "unit": objective.unit}
        for name in SPLITS:
            evaluation = evaluation_of(view, number, name)
            if evaluation is not None:
                score = evaluation.scores[index]
                entry[name] = {
                    "value": score.value,
                    "standard_error": score.standard_error,
                    "n": len(score.items),
                }
                if name == "search" and objective.name in estimated(view, number):
                    entry[name]["estimated"] = True
        objectives[objective.name] = entry
    split = best_split(view, number)
    names = [objective.name for objective in view.objectives]
    evaluation = evaluation_of(view, number, split)
    reproduce: dict[str, Any] = {
        "split": split,
        "expected": split_values(view, number, split),
        "items": dict(zip(names, map(list, scored_items(view, number)), strict=True)),
        "item_scores": _item_scores(names, evaluation),
        "run_from": "the folder of the study file",
        "commands": commands,
        "notes": notes,
        "versions": view.contract["identity"].get("versions", {}),
        "settings": dict(scoring.settings) if scoring is not None else {},
    }
    scores = {
        "schema": 1,
        "evomerge": __version__,
        "study": study_name(view),
        "trial": number,
        "label": view.trial(number).label,
        "on_front": number in view.front,
        "recipe": written.recipe.digest,
        "dtype": {
            "scored": _DTYPES[written.scored.dtype], "written": _DTYPES[written.recipe.dtype]
        },
        "objectives": objectives,
        "reproduce": reproduce,
    }  # fmt: skip
    if written.adapter is not None:
        found = written.adapter.evaluation
        scores["adapter"] = written.adapter.kept.facts() | (
            {
                "values": dict(zip(names, found.values, strict=True)),
                "item_scores": _item_scores(names, found),
            }
            if found is not None
            else {}
        )
    return scores


def _item_scores(names: list[str], evaluation: Evaluation | None) -> Mapping[str, list[float]]:
    if evaluation is None:
        return {}
    return {name: list(score.items) for name, score in zip(names, evaluation.scores, strict=True)}


def _card(
    view: StudyView,
    number: int,
    scoring: Scoring | None,
    written: Written,
    commands: list[str],
    notes: list[str],
) -> CardFacts:
    data = front_data(view)
    split = best_split(view, number)
    rivals = [
        (point_name(point, data), evaluation)
        for point in table_points(data)
        if point.label and point.number != number
        if (evaluation := evaluation_of(view, point.number, split)) is not None
    ]
    scores: dict[str, Evaluation] = {
        name: evaluation
        for name in SPLITS
        if (evaluation := evaluation_of(view, number, name)) is not None
    }
    recipe = written.recipe
    return CardFacts(
        title=written.shown.name,
        recipe=recipe,
        sources={ref.name: ref.source for ref in (recipe.base, *recipe.experts)},
        objectives=view.objectives,
        scores=scores,
        rivals=rivals,
        rival_split=split,
        place=_place(view, number),
        mergekit=written.mergekit.text or "",
        mergekit_reason=written.mergekit.reason,
        commands=commands,
        notes=notes,
        version=__version__,
        licence=written.licence,
        metrics=scoring.metrics if scoring is not None else (),
        tasks=scoring.tasks if scoring is not None else (),
        form="adapter" if written.adapter else "merge" if written.weights else "recipe",
        base=scoring.base if scoring is not None else "",
    )


def _place(view: StudyView, number: int) -> str:
    """Return one sentence on a trial's place in its study."""
    place = f"It is trial {number} of the study “{study_name(view)}”"
    trial = view.trial(number)
    if trial.kind == "baseline":
        place += f", its baseline “{trial.label}”, which the search did not make"
    if number == view.knee:
        return f"{place}, the recommended one of {len(view.front)} on its Pareto front."
    if number in view.front:
        return f"{place}, one of {len(view.front)} on its Pareto front."
    return f"{place}; it is not on its Pareto front."
