"""What MLflow shows of a study at one moment: plain records, nothing of MLflow itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from evomerge.coefficient_page import coefficient_html
from evomerge.feasibility import constrained, violation
from evomerge.front_page import FrontData, FrontPoint, front_html
from evomerge.front_table import front_csv
from evomerge.gain import Gain
from evomerge.merge.methods import changed_options
from evomerge.metric_names import metric_name, objective_metrics
from evomerge.recipe import Recipe
from evomerge.redaction import redacted
from evomerge.trial import Trial

#: Colours of the runs in MLflow's own charts; the same as on the front page.
_COLOURS = {
    "front": "#c2410c", "base": "#1b1f24", "expert": "#0b62b8", "uniform": "#117a4b",
    "task_arithmetic": "#7c3aed", "grid": "#b79df0", "search": "#8c959f",
}  # fmt: skip
_MEAN_COLUMNS = 8
#: Up to so many columns, the means of both halves stand beside them: ten parameters at most.
_HALVED_COLUMNS = 3


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
        planned: number of trials when all is done, baselines included.
        words: what is searched and what it cost, sentences in Markdown.
        gains: of the recommended merge over each baseline; empty before the end.
        rivals: the baselines in ``gains`` that a reader wants first.
        arrived: unix milliseconds at which each trial's result arrived, by number.
        subset_means: plain mean of each objective's scored items [m], by trial that was estimated.
        began: unix milliseconds at which the study was begun.
        milliseconds: unix time at which the study stood so.
    """

    study: str
    front: FrontData
    trials: tuple[Trial, ...]
    steps: tuple[Step, ...]
    params: Mapping[str, str]
    files: Mapping[str, str]
    state: str
    planned: int = 0
    words: tuple[str, ...] = ()
    gains: tuple[Gain, ...] = ()
    rivals: tuple[str, ...] = ()
    arrived: Mapping[int, int] = field(default_factory=dict)
    subset_means: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    began: int = 0
    milliseconds: int = 0


def trial_tags(trial: Trial, point: FrontPoint | None, knee: int | None) -> dict[str, str]:
    """Return what MLflow's tables filter trials by, and the colour of its charts."""
    front = point is not None and point.front
    kind = point.kind if point is not None else trial.kind
    colour = "front" if front and kind == "search" else kind
    tags = {
        "evomerge.kind": trial.kind,
        "evomerge.label": trial.label,
        "evomerge.state": trial.state.value,
        "front": _yes(front),
        "knee": _yes(trial.number == knee),
        "baseline": _yes(trial.kind == "baseline"),
        "evomerge.recipe": trial.recipe.digest,
        "mlflow.runColor": _COLOURS.get(colour, _COLOURS["search"]),
    }
    if trial.failure is not None:
        message = redacted(trial.failure.message)
        tags["evomerge.failure"] = f"{trial.failure.kind}: {message}"[:500]
    return {key: value for key, value in tags.items() if value}


def trial_metrics(
    trial: Trial, point: FrontPoint | None, front: FrontData, subset_means: Sequence[float] = ()
) -> dict[str, float]:
    """Return the numbers by which MLflow's tables and charts rank and draw trials.

    Args:
        trial: one of the study.
        point: its place on the front's picture, where it has one.
        front: the picture, for the objectives.
        subset_means: of an estimated trial: the plain mean of each objective's items [m].
    """
    metrics: dict[str, float] = {}
    names = objective_metrics(front.objectives)
    if trial.evaluation is not None:
        for name, score in zip(names, trial.evaluation.scores, strict=True):
            metrics[name] = score.value
            metrics[f"standard_error/{name}"] = score.standard_error
        for name, value in zip(names, subset_means, strict=False):
            metrics[f"subset_mean/{name}"] = value
        for phase, seconds in trial.evaluation.seconds.items():
            metrics[metric_name(f"seconds/{phase}")] = seconds
        metrics["front"] = float(point is not None and point.front)
        metrics["items"] = float(sum(len(score.items) for score in trial.evaluation.scores))
        if constrained(front.objectives):
            metrics["violation"] = violation(front.objectives, trial.evaluation.values)
    if point is not None:
        for split, measured in (("validation", point.validation), ("test", point.test)):
            if measured is not None:
                for name, value in zip(names, measured.values, strict=True):
                    metrics[f"{split}/{name}"] = value
    return metrics


def study_metrics(front: FrontData) -> dict[str, float]:
    """Return the recommended merge's values, on held-out items where it has them.

    They are the columns in which the list of runs shows the study.
    """
    best = next((point for point in front.points if point.number == front.knee), None)
    measured = None if best is None else best.test or best.shown
    if measured is None:
        return {}
    return dict(zip(objective_metrics(front.objectives), measured.values, strict=True))


def _yes(value: bool) -> str:
    return "true" if value else "false"


def trial_params(trial: Trial) -> dict[str, str]:
    """Return a few searchable facts; the whole table would be too much for MLflow's pages."""
    recipe = trial.recipe
    return {
        "method": recipe.method,
        **changed_options(recipe),
        **{name: f"{fmean(values):.4f}" for name, values in _summaries(recipe).items()},
    }


def coefficient_params(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of a trial's parameters that are coefficients of the whole model."""
    return tuple(name for name in _summaries(recipe) if not name.endswith(_HALVES))


_HALVES = (" lower half", " upper half")


def _summaries(recipe: Recipe) -> dict[str, tuple[float, ...]]:
    """Return the coefficients by name: of each column all, and of few columns those of halves.

    The halves are those of the model's depth, of recipes with four blocks or more.
    """
    summaries: dict[str, tuple[float, ...]] = {}
    columns = recipe.columns[:_MEAN_COLUMNS]
    half = len(recipe.table) // 2
    for column in columns:
        values = recipe.column(column)
        summaries[column] = values
        if half >= 2 and len(columns) <= _HALVED_COLUMNS:
            summaries |= {column + _HALVES[0]: values[:half], column + _HALVES[1]: values[half:]}
    return summaries


def artifact_texts(projection: Projection) -> dict[str, str]:
    """Return the artifacts of the study's run, by path."""
    texts = dict(projection.files)
    texts["front.html"] = front_html(projection.front)
    texts["front.csv"] = front_csv(projection.front)
    if any(point.front for point in projection.front.points):
        texts["coefficients.html"] = coefficient_html(projection.front)
    for point in projection.front.points:
        if point.front and point.recipe is not None:
            texts[f"recipes/{point.number}.json"] = point.recipe.to_json()
    return texts
