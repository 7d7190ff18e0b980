"""Names of metrics in MLflow: what it accepts, and none of them twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from evomerge.trial import Objective

#: Metrics of a study's run and of its trials that are no objectives.
TAKEN = frozenset({"front", "items", "violation", "hypervolume"})
#: What stands before the slash in the names of the others.
FAMILIES = frozenset(
    {"standard_error", "subset_mean", "seconds", "validation", "test", "best", "audit", "trials",
     "items", "system"}
)  # fmt: skip
#: MLflow takes 250; the families stand before an objective's name.
_CHARACTERS = 200


def metric_name(name: str) -> str:
    """Return ``name`` with everything that MLflow refuses replaced or left out."""
    clean = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    clean = re.sub(r"\.{2,}", ".", clean)
    parts = [part for part in clean.split("/") if part.strip() not in ("", ".")]
    return "/".join(parts).strip() or "_"


def objective_metrics(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """Return the name under which MLflow shows each objective [m].

    It is the objective's own wherever it can be. ``objective`` stands before one that a metric of
    every study has, and a number behind one that MLflow cannot tell from another's.
    """
    return _distinct(tuple(objective.name for objective in objectives))


def renamed(objectives: Sequence[Objective]) -> dict[str, str]:
    """Return name in MLflow by own name, of the objectives for which that is another one."""
    pairs = zip(objectives, objective_metrics(objectives), strict=True)
    return {one.name: shown for one, shown in pairs if shown != one.name}


@cache
def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for name in names:
        clean = metric_name(metric_name(name)[:_CHARACTERS])
        family, slash, _ = clean.partition("/")
        if clean in TAKEN or (slash and family in FAMILIES):
            clean = f"objective {clean}"
        shown, copy = clean, 1
        while shown in found:
            copy += 1
            shown = f"{clean} {copy}"
        found.append(shown)
    return tuple(found)
