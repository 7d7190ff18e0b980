"""How a study file saves item evaluations, as arguments of a study and in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evomerge.config import StudyFile
from evomerge.errors import InputError
from evomerge.estimation import estimation
from evomerge.fitness.composite import Composite
from evomerge.fitness.irt.estimators import ESTIMATORS
from evomerge.fitness.splits import ItemSplit
from evomerge.halving import Halving
from evomerge.items import Resampled
from evomerge.racing import Racing
from evomerge.search.registry import find_searcher


def economy(file: StudyFile, root: Path, fitness: Composite) -> dict[str, Any]:
    """Return the arguments of ``Study`` that a study file asks for.

    Raises:
        InputError: every problem of ``fitness.estimator``.
    """
    items, racing = file.fitness.items, file.search.racing
    arguments: dict[str, Any] = {"estimation": estimation(file, root, fitness)}
    if items.policy == "resampled":
        assert items.per_trial is not None
        arguments["resampled"] = Resampled(items.per_trial, items.every)
    if racing is not None and racing.rule == "halving":
        bracket = None if in_generations(file) else racing.bracket
        arguments["racing"] = Halving(tuple(racing.rungs), racing.eta, bracket)
    elif racing is not None:
        arguments["racing"] = Racing(
            tuple(racing.rungs), racing.z, references=racing.references
        )  # fmt: skip
    return arguments


def in_generations(file: StudyFile) -> bool:
    """Return whether the searcher asks a whole generation before it must be told anything."""
    steady = file.search.arguments.get("steady", False)
    return find_searcher(file.search.searcher).generational and not steady


def require_enough_items(file: StudyFile, splits: Sequence[ItemSplit]) -> None:
    """Refuse to score trials on more items than there are.

    Raises:
        InputError: no objective has so many search items.
    """
    most = max(len(split.search) for split in splits)
    estimator = file.fitness.estimated
    asked = {
        "fitness.items.per_trial": file.fitness.items.per_trial,
        "fitness.estimator.items": None if estimator is None else estimator.items,
    }
    problems = [
        f"{key}: {count} items for each trial, but there are at most {most} search items "
        "(ask for fewer, or raise fitness.items.search)"
        for key, count in asked.items()
        if count is not None and count > most
    ]
    if problems:
        raise InputError("\n".join(problems))


def wants_margins(file: StudyFile) -> bool:
    """Return whether the estimator of a study file uses margins.

    Generated answers have them only where this is said, because they cost.
    """
    section = file.fitness.estimated
    if section is None:
        return False
    entry = ESTIMATORS.get(section.name)
    needed = entry is not None and "margins" in entry.needs
    return needed or section.name == "ppi" or section.design.endswith("margins")


def planned_trials(file: StudyFile, splits: Sequence[ItemSplit]) -> int:
    """Return the trials of the search: those asked for, or what a budget in items surely buys."""
    if file.search.trials is not None:
        return file.search.trials
    assert file.search.items is not None
    return max(1, file.search.items // item_evaluations(file, splits))


def item_evaluations(file: StudyFile, splits: Sequence[ItemSplit]) -> int:
    """Return the items of one trial, over all objectives, where nothing is known or stopped."""
    items, estimator = file.fitness.items, file.fitness.estimated
    sizes = [len(split.search) for split in splits]
    most = items.per_trial or (estimator.items if estimator is not None else max(sizes))
    return sum(min(size, most) for size in sizes)


def economy_facts(file: StudyFile) -> dict[str, Any]:
    """Return what a study does to score less, as data; what it does not use is not there."""
    items, estimator, racing = file.fitness.items, file.fitness.estimated, file.search.racing
    return {
        **({"items": file.search.items} if file.search.items is not None else {}),
        **({"resampled": items.per_trial} if items.per_trial is not None else {}),
        **({"racing": racing.settings()} if racing is not None else {}),
        **({"estimator": estimator.model_dump()} if estimator is not None else {}),
    }


def economy_lines(file: StudyFile) -> list[str]:
    """Return what a study does to score less, for people."""
    items, estimator, racing = file.fitness.items, file.fitness.estimated, file.search.racing
    lines = []
    if file.search.items is not None:
        lines.append(f"at most {file.search.items:,} item evaluations")
    if items.per_trial is not None:
        lines.append(f"{items.per_trial} fresh items per generation")
    if estimator is not None:
        fresh = {"never": "", "generation": ", fresh per generation"}.get(
            str(estimator.refresh), f", fresh after {estimator.refresh} trials"
        )
        lines.append(f"{estimator.name} from {estimator.items} items ({estimator.design}{fresh})")
    if racing is not None:
        rungs = ", ".join(map(str, racing.rungs))
        halves = racing.rule == "halving"
        lines.append(
            f"the best 1/{racing.eta} go on after {rungs} items" if halves
            else f"races after {rungs} items"
        )  # fmt: skip
    return lines
