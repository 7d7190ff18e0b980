"""How far off a study's estimates were, on the trials that were scored in full."""

from __future__ import annotations

from typing import Any

from evomerge.study_view import StudyView


def audit_facts(view: StudyView) -> dict[str, Any]:
    """Return the estimator's name, how far off it was by objective, and whether to believe it."""
    return {"name": view.contract["estimation"]["name"], **_judged(view)}


def _judged(view: StudyView) -> dict[str, Any]:
    from evomerge.fitness.irt.trust import Audit, verdict

    facts: dict[str, Any] = {}
    for number, objective in enumerate(view.objectives):
        rows = [
            (one.full[number], one.estimate.values[number], one.estimate.errors[number],
             one.mean.values[number])
            for one in view.audits
        ]  # fmt: skip
        found: dict[str, Any] = {
            "audits": len(rows),
            "error": sum(abs(value - full) for full, value, _, _ in rows) / len(rows),
            "subset_mean_error": sum(abs(mean - full) for full, _, _, mean in rows) / len(rows),
        }
        audits = [Audit(value, error, full) for full, value, error, _ in rows if error > 0]
        if audits:
            judged = verdict(audits)
            found |= {"trusted": judged.trusted, "spread_ratio": judged.spread_ratio}
            if judged.reason:
                found["reason"] = judged.reason
        facts[objective.name] = found
    return facts


def distrust(view: StudyView) -> list[str]:
    """Return a warning for each objective whose estimates are further off than they say."""
    if not view.audits:
        return []
    return [
        f"the estimates of {name} are not to be trusted: {found['reason']} (another `name` and "
        "`fitness.estimator: none` score everything)"
        for name, found in _judged(view).items()
        if not found.get("trusted", True)
    ]
