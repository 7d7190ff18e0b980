"""What MLflow shows of what a study spent, estimated and bounded; no MLflow here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
from economy_study import study
from toy_study import OBJECTIVES

from evomerge.feasibility import violation
from evomerge.halving import Halving
from evomerge.presentation import project
from evomerge.projection import trial_metrics


def test_a_trial_has_its_items_and_its_violation(tmp_path: Path) -> None:
    bounded = (replace(OBJECTIVES[0], minimum=-1.0), OBJECTIVES[1])
    view = study(tmp_path / "s", "plain", objectives=bounded, racing=Halving((10, 20))).run()
    projection = project(view)
    rows = [trial_metrics(trial, None, projection.front) for trial in projection.trials]
    for trial, row in zip(view.trials, rows, strict=True):
        assert trial.evaluation is not None
        rung = view.history.rung_of(trial.number)
        assert row["items"] == 2 * (rung or 30)
        assert row["violation"] == violation(bounded, trial.evaluation.values)
    assert {20.0, 60.0} <= {row["items"] for row in rows}
    assert 0.0 in {row["violation"] for row in rows}
    assert any(row["violation"] > 0 for row in rows)


def test_a_study_without_bounds_has_no_violation(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "plain").run()
    projection = project(view)
    assert "violation" not in trial_metrics(projection.trials[0], None, projection.front)


@pytest.mark.parametrize("feature", ["plain", "racing", "halving", "estimated"])
def test_the_series_of_items_ends_with_what_the_search_cost(tmp_path: Path, feature: str) -> None:
    view = study(tmp_path / "s", feature, finalists=1).run()
    series = [step.metrics["items/scored"] for step in project(view).steps]
    assert series == sorted(series)
    later = sum(
        result.fresh
        for (split, _), result in view.results.items()
        if split not in ("search", "part")
    )
    assert series[-1] == view.spending.scored - later


def test_an_estimated_trial_has_the_plain_mean_of_its_items_beside(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "estimated").run()
    projection = project(view)
    audited = {audit.number for audit in view.audits}
    seen = 0
    for trial in view.trials:
        means = projection.subset_means.get(trial.number, ())
        row = trial_metrics(trial, None, projection.front, means)
        assert ("subset_mean/near_one" in row) == bool(means)
        if not means or trial.number in audited:
            continue
        assert trial.evaluation is not None
        for objective, score in zip(view.objectives, trial.evaluation.scores, strict=True):
            assert row[f"subset_mean/{objective.name}"] == pytest.approx(fmean(score.items))
        seen += 1
    assert seen > 1


def test_audits_are_a_series_of_mean_errors(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "estimated").run()
    steps = project(view).steps
    assert len(view.audits) > 1
    first, last = view.audits[0], view.audits[-1]
    for column, objective in enumerate(view.objectives):
        estimate = f"audit/estimate error/{objective.name}"
        mean = f"audit/subset mean error/{objective.name}"
        assert estimate not in steps[first.number - 1].metrics
        wrong = abs(first.estimate.values[column] - first.full[column])
        assert steps[first.number].metrics[estimate] == pytest.approx(wrong)
        errors = [abs(a.mean.values[column] - a.full[column]) for a in view.audits]
        assert steps[last.number].metrics[mean] == pytest.approx(sum(errors) / len(errors))
        assert steps[-1].metrics[mean] == steps[last.number].metrics[mean]


def test_the_best_of_a_study_is_no_lucky_estimate(tmp_path: Path) -> None:
    view = study(tmp_path / "s", "halving").run()
    steps = project(view).steps
    for column, objective in enumerate(view.objectives):
        whole = [
            objective.loss(t.evaluation.values[column])
            for t in view.trials
            if t.evaluation is not None and view.history.rung_of(t.number) is None
        ]
        found = steps[-1].metrics[f"best/{objective.name}"]
        assert objective.loss(found) == min(whole)
