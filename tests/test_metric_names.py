"""Objectives whose names MLflow's tables have already: nothing is overwritten by anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from economy_study import study
from toy_study import OBJECTIVES

from evomerge.metric_names import metric_name, objective_metrics, renamed
from evomerge.presentation import project
from evomerge.projection import study_metrics, trial_metrics
from evomerge.study_note import study_note
from evomerge.study_view import StudyView
from evomerge.trial import Objective

Metrics = Mapping[str, float]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    """With all that a study can have: bounds, audits, validation and test scores."""
    bounded = (replace(OBJECTIVES[0], minimum=-1.0), OBJECTIVES[1])
    return study(tmp_path_factory.mktemp("s") / "s", "estimated", objectives=bounded).run()


def under(view: StudyView, *names: str) -> StudyView:
    """Return the same study with other names of its objectives."""
    pairs = zip(view.objectives, names, strict=True)
    return replace(view, objectives=tuple(replace(one, name=name) for one, name in pairs))


def shown(view: StudyView) -> tuple[list[Metrics], list[Metrics], Metrics]:
    """Return the metrics of the trials, of the study's steps, and of the study itself."""
    projection = project(view, pages=False)
    points = {point.number: point for point in projection.front.points}
    trials: list[Metrics] = [
        trial_metrics(trial, points.get(trial.number), projection.front)
        for trial in projection.trials
    ]
    ends = {"trials/finished": 0.0}  # the store adds it to each step
    steps: list[Metrics] = [{**step.metrics, **ends} for step in projection.steps]
    return trials, steps, study_metrics(projection.front)


def mapped(metrics: Metrics, old: Sequence[str], new: Sequence[str]) -> Metrics:
    """Return the metrics of a study whose objectives were renamed."""
    found = {}
    for key, value in metrics.items():
        family, slash, name = key.rpartition("/")
        found[f"{family}{slash}{dict(zip(old, new, strict=True)).get(name, name)}"] = value
    return found


def test_no_metric_of_a_study_can_be_taken_by_an_objective(view: StudyView) -> None:
    """An objective named ``front`` was shown as 0 or 1: every name that there is was tried."""
    trials, steps, best = shown(view)
    names = sorted({key for row in (*trials, *steps, best) for key in row})
    plain = tuple(objective.name for objective in view.objectives)
    assert {"front", "items", "violation", "hypervolume", "trials/failed"} <= set(names)
    assert {"validation/near_one", "test/near_one", "best/near_one"} <= set(names)
    assert any(name.startswith("audit/") for name in names)
    for name in names:
        if name in plain:
            continue
        other = under(view, name, plain[1])
        new = objective_metrics(other.objectives)
        assert new[0] not in names
        rows, series, last = shown(other)
        assert rows == [mapped(row, plain, new) for row in trials], name
        assert series == [mapped(row, plain, new) for row in steps], name
        assert last == mapped(best, plain, new)
        assert not set(last) & set(series[-1])


def test_most_objectives_keep_their_names() -> None:
    names = ("acc", "gsm8k", "response_tokens", "kl_base", "distance_l2", "best", "test", "my/own")
    assert objective_metrics([Objective(name) for name in names]) == names
    assert renamed([Objective(name) for name in names]) == {}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("front", "items"), ("objective front", "objective items")),
        (("best/x", "x"), ("objective best/x", "x")),
        (("front", "objective front"), ("objective front", "objective front 2")),
        (("a(b)", "a[b]", "a_b_"), ("a_b_", "a_b_ 2", "a_b_ 3")),
        (("a//b", "/a/b"), ("a/b", "a/b 2")),
    ],
)
def test_those_that_mlflow_cannot_tell_apart_are_numbered(
    names: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert objective_metrics([Objective(name) for name in names]) == expected


def test_no_name_is_too_long_for_mlflow(view: StudyView) -> None:
    trials, steps, _ = shown(under(view, "n" * 400, "n" * 401))
    assert max(len(key) for row in (*trials, *steps) for key in row) <= 250


def test_mlflow_takes_them() -> None:
    """Its own check, which its documentation only describes."""
    from mlflow.utils.validation import _validate_metric_name

    for name in ("a//b", "/a", "a/../b", "./a", "a/./b", "..", "a (b)", "äöü", "x@y", "", "/", "."):
        _validate_metric_name(metric_name(name))


def test_one_refused_name_would_lose_all_points_of_its_trial() -> None:
    """Blanks beside a dot, and a cut behind one, left a part that MLflow takes for a path."""
    from mlflow.utils.validation import _validate_metric_name

    for name in (". ", " ./a", "a/. ", ". /", " . /b", "a/ /b", f"{'a' * 199}/.x"):
        [shown] = objective_metrics([Objective(name)])
        for whole in (shown, f"best/{shown}", metric_name(f"seconds/{name}")):
            _validate_metric_name(whole)


def test_the_description_says_how_they_are_named(view: StudyView) -> None:
    note = study_note(project(under(view, "front", "b")), "abc", "#/pareto")
    assert "The objective `front` is the metric `objective front`." in note
    assert "is the metric" not in study_note(project(view), "abc", "#/pareto")
