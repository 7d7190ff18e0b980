"""A study says when its estimates were further off than they claim."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from evomerge.estimate_audits import audit_facts, distrust
from evomerge.study_view import StudyView


def view(errors: list[float], claimed: float) -> StudyView:
    """A study of one objective whose estimates were off by ``errors``."""
    audits = [
        SimpleNamespace(
            full=(0.5,),
            estimate=SimpleNamespace(values=(0.5 + error,), errors=(claimed,)),
            mean=SimpleNamespace(values=(0.5,)),
        )
        for error in errors
    ]
    found: Any = SimpleNamespace(
        audits=audits,
        objectives=(SimpleNamespace(name="math"),),
        contract={"estimation": {"name": "soft_reg"}},
    )
    return cast("StudyView", found)


def test_estimates_within_their_errors_raise_no_alarm() -> None:
    assert distrust(view([], 0.1)) == []
    fair = view([0.03, -0.05, 0.02, 0.04, -0.02, -0.01], 0.04)
    assert distrust(fair) == []
    assert audit_facts(fair)["math"]["error"] == pytest.approx(0.17 / 6)


def test_estimates_far_beyond_their_errors_are_a_warning_that_says_what_to_do() -> None:
    (warning,) = distrust(view([0.3, -0.25, 0.35, 0.3, -0.4, 0.28], 0.04))
    assert warning.startswith("the estimates of math are not to be trusted: ")
    assert "`fitness.estimator: none`" in warning
