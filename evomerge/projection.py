"""What MLflow shows of a study at one moment: plain records, nothing of MLflow itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.front_page import FrontData, FrontPoint, front_html, summary
from evomerge.front_table import front_csv, front_markdown
from evomerge.trial import Trial

#: Colours of the runs in MLflow's own charts; the same as on the front page.
_COLOURS = {
    "front": "#c2410c", "base": "#1b1f24", "expert": "#0b62b8", "uniform": "#117a4b",
    "task_arithmetic": "#7c3aed", "grid": "#b79df0", "search": "#8c959f",
}  # fmt: skip
_MEAN_COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Step:
    """The state of a study after one more trial was finished.

    Attributes:
        milliseconds: unix time of it.
        metrics: by name.
    """

    milliseconds: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Projection:
    """What MLflow shall show of a study at one moment.

    Attributes:
        study: identity of the study, the same in every projection.
        front: its points, front and baselines.
        trials: all trials, by number from 0.
        steps: one per finished trial, in the order of finishing; only ever grows.
        params: facts about the study, short.
        files: further artifacts, text by name (the resolved study file).
        state: ``running``, ``finished``, ``interrupted`` or ``failed``.
    """

    study: str
    front: FrontData
    trials: tuple[Trial, ...]
    steps: tuple[Step, ...]
    params: Mapping[str, str]
    files: Mapping[str, str]
    state: str


def metric_name(name: str) -> str:
    """Return ``name`` with everything that MLflow refuses replaced by ``_``."""
    clean = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII).strip("/ ")
    return re.sub(r"\.{2,}", ".", clean) or "_"


def trial_tags(trial: Trial, point: FrontPoint | None) -> dict[str, str]:
    """Return what MLflow's tables filter trials by, and the colour of its charts."""
    front = point is not None and point.front
    kind = point.kind if point is not None else trial.kind
    colour = "front" if front and kind == "search" else kind
    tags = {
        "evomerge.kind": trial.kind,
        "evomerge.label": trial.label,
        "evomerge.state": trial.state.value,
        "evomerge.front": "true" if front else "false",
        "evomerge.recipe": trial.recipe.digest,
        "mlflow.runColor": _COLOURS.get(colour, _COLOURS["search"]),
    }
    if trial.failure is not None:
        tags["evomerge.failure"] = f"{trial.failure.kind}: {trial.failure.message}"[:500]
    return {key: value for key, value in tags.items() if value}


def trial_metrics(trial: Trial, point: FrontPoint | None, front: FrontData) -> dict[str, float]:
    """Return the numbers by which MLflow's tables and charts rank and draw trials."""
    metrics: dict[str, float] = {}
    if trial.evaluation is not None:
        for objective, score in zip(front.objectives, trial.evaluation.scores, strict=True):
            metrics[objective.name] = score.value
            metrics[f"standard_error/{objective.name}"] = score.standard_error
        for phase, seconds in trial.evaluation.seconds.items():
            metrics[f"seconds/{phase}"] = seconds
        metrics["front"] = float(point is not None and point.front)
    if point is not None:
        for split, measured in (("validation", point.validation), ("test", point.test)):
            if measured is not None:
                for objective, value in zip(front.objectives, measured.values, strict=True):
                    metrics[f"{split}/{objective.name}"] = value
    return metrics


def trial_params(trial: Trial) -> dict[str, str]:
    """Return a few searchable facts; the whole table would be too much for MLflow's pages."""
    recipe = trial.recipe
    params = {"method": recipe.method}
    for column in recipe.columns[:_MEAN_COLUMNS]:
        values = recipe.column(column)
        params[f"mean {column}"] = f"{sum(values) / len(values):.4f}"
    return params


def artifact_texts(projection: Projection) -> dict[str, str]:
    """Return the artifacts of the study's run, by path."""
    texts = dict(projection.files)
    texts["front.html"] = front_html(projection.front)
    texts["front.csv"] = front_csv(projection.front)
    for point in projection.front.points:
        if point.front and point.recipe is not None:
            texts[f"recipes/{point.number}.json"] = point.recipe.to_json()
    return texts


def study_note(projection: Projection) -> str:
    """Return the Markdown that MLflow shows on the study's overview."""
    front = projection.front
    members = [point for point in front.points if point.front]
    lines = [f"**{front.title}**: {front.subtitle}", ""]
    if members:
        lines += [
            "Open **front.html** under *Artifacts* for the interactive front.",
            "",
            front_markdown(front),
        ]
        knee = next((point for point in members if point.number == front.knee), members[0])
        if knee.recipe is not None:
            lines += [f"Trial {knee.number} is {summary(knee.recipe)}.", ""]
        command = front.command.replace("{n}", str(knee.number))
        lines += ["Take one home:", "", f"    {command}", ""]
    else:
        lines += ["No trial has finished yet.", ""]
    note = "\n".join(lines)
    # MLflow cuts tags off at 8000 characters without a word.
    return note if len(note) < 7500 else note[:7400] + "\n\n(more in front.csv)\n"
