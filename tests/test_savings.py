"""What a study has cost, in words."""

from __future__ import annotations

from evomerge.savings import savings_lines


def test_a_study_without_scores_showed_empty_brackets() -> None:
    assert savings_lines({"items": {"scored": 0}}) == {"items scored": "0"}
    assert savings_lines({"items": {"scored": 70, "baselines": 60, "search": 10}}) == {
        "items scored": "70 (60 for baselines, 10 in the search)"
    }
