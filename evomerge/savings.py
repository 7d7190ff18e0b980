"""What a study reports of its item evaluations, estimates and constraints, as plain data."""

from __future__ import annotations

from typing import Any

from evomerge.estimate_audits import audit_facts
from evomerge.study_view import StudyView


def savings_facts(view: StudyView) -> dict[str, Any]:
    """Return item evaluations, races, audits and broken constraints.

    What a study has none of is not there, but for the item evaluations.
    """
    spent = view.spending
    items = {
        "scored": spent.scored,
        "baselines": spent.baselines,
        "calibration": spent.calibration,
        "search": spent.search,
        "held_out": spent.held_out,
        "saved": spent.saved,
    }
    facts: dict[str, Any] = {"items": {key: count for key, count in items.items() if count}}
    if spent.stops:
        facts["stopped_early"] = spent.stops
    if view.audits:
        facts["estimator"] = audit_facts(view)
    if view.violation:
        facts["violation"] = view.violation
    return facts


def savings_lines(facts: dict[str, Any]) -> dict[str, str]:
    """Return the facts of ``savings_facts`` for people, by what they are called."""
    items = facts["items"]
    parts = [
        f"{items[key]:,} {name}"
        for key, name in (
            ("baselines", "for baselines"), ("calibration", "for calibration"),
            ("search", "in the search"), ("held_out", "held out"),
        )
        if key in items
    ]  # fmt: skip
    saved = f"; {items['saved']:,} of the search were saved" if "saved" in items else ""
    inside = f" ({', '.join(parts)})" if parts else ""
    lines = {"items scored": f"{items.get('scored', 0):,}{inside}{saved}"}
    if "stopped_early" in facts:
        lines["stopped early"] = f"{facts['stopped_early']} trials, by racing"
    for name, found in facts.get("estimator", {}).items():
        if name == "name":
            continue
        text = (
            f"mean error {found['error']:.4f}, of the plain mean of the same items "
            f"{found['subset_mean_error']:.4f} ({found['audits']} trials scored in full)"
        )
        if not found.get("trusted", True):
            text += f"; do not trust it: {found['reason']}"
        lines[f"estimate of {name}"] = text
    if "violation" in facts:
        lines["constraints"] = (
            f"no merge keeps all of them; shown is the one that violates least "
            f"({facts['violation']:.3f} in units of the bounds)"
        )
    return lines
