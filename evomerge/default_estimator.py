"""``fitness.estimator: auto``: what a trial is scored on where the study file does not say.

``soft_reg`` on 60 items that tell most about a merge of these experts (``value_optimal_margins``),
where its evidence reaches, else the plain mean of all search items. The figures are those of
``experiments/estimators/README.md``, on the demo's merges:

* Which estimator and items: in whole searches (ten seeds, a coefficient per layer and expert) the
  chosen merge scored against the full search's -3.9 points of loss ([-7.0, -1.1], a gain) with 60
  such items and -3.7 ([-7.4, -0.2]) with 20; with items by task -0.5 ([-3.5, 2.6]) and -1.3
  ([-5.4, 2.9]); with the plain mean of 20 +6.7, with ``gmpirt`` on 20 +7.2. On random merges such
  items rank worse than items by task; why they are better in searches was not looked into.
* How many items: 60 for the narrower interval and against surprises; endpoints and finalists are
  paid by every search, so that 60 items save a factor of 6.6 in all where 20 save 8.6. These
  searches had no checks: with five in 100 trials on 1,020 items 60 save 5.2 and 20 save 6.2.
* From how many search items on: at 200 an estimated trial costs a third of a full one, checks
  counted; below, endpoints and finalists leave too little to save.
* With one expert that is scored alone nothing was measured: items by task, at random where an
  objective is one task.
* Checks: every 20th trial is scored in full, more often in short searches, so that there are the
  five that a verdict on the estimate needs (``fitness.irt.trust``); with fewer than 25 trials, or
  a budget of items that buys fewer, they would be over a fifth of the search, which is then scored
  in full instead.

Left out, because nothing was measured: objectives that are no share of right answers (perplexities,
lengths, Python functions, texts), answers without margins, searches that save items in another way
(``resampled``, ``racing``), and ``m2n2``, which lets merges compete for items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config import StudyFile
from evomerge.economy_sections import BY_ITEMS, EstimatorSection
from evomerge.errors import StorageError
from evomerge.fitness.composite import Composite
from evomerge.fitness.splits import ItemSplit
from evomerge.journal import JOURNAL
from evomerge.study_space import scored_alone
from evomerge.study_view import StudyView

ITEMS = 60
#: Search items of each objective, and trials of the search, from which an estimate is taken.
FEWEST_ITEMS, FEWEST_TRIALS = 200, 25
#: Trials between two that are scored in full; and how many of these a search should have.
FULL_EVERY, CHECKS = 20, 5


@dataclass(frozen=True, slots=True)
class Choice:
    """What ``auto`` takes.

    Attributes:
        section: the estimator; None for the mean of all search items.
        text: what it is and why, for people.
    """

    section: EstimatorSection | None
    text: str


def decide(
    file: StudyFile, directory: Path, fitness: Composite, splits: Sequence[ItemSplit]
) -> tuple[StudyFile, str]:
    """Return a study file in which ``auto`` is what it stands for, and what was taken and why.

    A study that was begun keeps what it was begun with, whatever the rule says now.

    Args:
        file: the study file.
        directory: of the study, whose journal is looked for.
        fitness: all objectives.
        splits: item ids of each objective [m].

    Returns:
        The text is empty where the study file names its estimator, or none.
    """
    if file.fitness.estimator != "auto":
        return file, ""
    contract = _begun(directory)
    choice = choose(file, fitness, splits) if contract is None else _kept(contract)
    section = file.fitness.model_copy(update={"estimator": choice.section})
    return file.model_copy(update={"fitness": section}), choice.text


def choose(file: StudyFile, fitness: Composite, splits: Sequence[ItemSplit]) -> Choice:
    """Return what ``auto`` takes for a study that is begun now.

    Args:
        file: the study file.
        fitness: all objectives.
        splits: item ids of each objective [m].
    """
    every = _every(file, splits)
    against = _otherwise(file, every) or _unfit(fitness, splits)
    if against:
        return Choice(None, f"none: the mean of all search items ({against})")
    groups = any(aggregate.strata for aggregate in fitness.aggregates)
    design, drawn = ("stratified", "by task") if groups else ("random", "at random")
    known = "with one expert it was not measured"
    if len(scored_alone(file)) > 1:
        design, drawn = "value_optimal_margins", "that tell most"
        known = "on the demo's merges such searches found what full ones did or better"
    section = EstimatorSection(name="soft_reg", items=ITEMS, design=design, full_every=every)  # type: ignore[call-arg]
    largest = max(len(split.search) for split in splits)
    return Choice(
        section,
        f"soft_reg on {ITEMS} items {drawn} of each objective's up to {largest:,} search items, "
        f"every {every}th trial on all of them (every item has a margin; {known})",
    )


def _every(file: StudyFile, splits: Sequence[ItemSplit]) -> int:
    """Return how many trials lie between two checks; 0 where the search is too short for them."""
    few = sum(min(len(split.search), ITEMS) for split in splits)
    full = sum(len(split.search) for split in splits)
    for every in range(FULL_EVERY, FEWEST_TRIALS // CHECKS - 1, -1):
        limits = [] if file.search.trials is None else [file.search.trials]
        if file.search.items is not None:  # what these buy
            limits.append(every * file.search.items // ((every - 1) * few + full))
        if min(limits) >= CHECKS * every:
            return every
    return 0


def _otherwise(file: StudyFile, every: int) -> str:
    """Return what in the study file speaks against an estimate; empty where nothing does."""
    if file.fitness.items.policy == "resampled":
        return "fitness.items.policy: resampled chooses them"
    if file.search.racing is not None:
        return "search.racing saves items already; both together were not measured"
    if file.search.searcher in BY_ITEMS:
        return f"{file.search.searcher} learns from single items"
    if file.search.trials is not None and file.search.trials < FEWEST_TRIALS:
        return (
            f"{file.search.trials} trials; an estimate is taken from {FEWEST_TRIALS}, because "
            f"{CHECKS} of them check it"
        )
    if not scored_alone(file):
        return "no expert is scored alone (baselines.experts), of which it could learn"
    if not every:
        return (
            f"{file.search.items:,} item evaluations buy fewer than {FEWEST_TRIALS} trials, "
            f"{CHECKS} of which would check it"
        )
    return ""


def _unfit(fitness: Composite, splits: Sequence[ItemSplit]) -> str:
    """Return why the objectives cannot be estimated, the first reason; empty where they can."""
    drawn = [number for number, source in enumerate(fitness.sources) if source is not None]
    if not drawn:
        return "no objective has items to save"
    for number in drawn:
        name, count = fitness.objectives[number].name, len(splits[number].search)
        if count < FEWEST_ITEMS:
            return f"{name} has {count} search items; an estimate pays from {FEWEST_ITEMS}"
        if fitness.objectives[number].unit != "fraction":
            return f"{name} is no share of right answers"
    for number, reason in enumerate(fitness.ungraded):
        if number in drawn and reason:
            return f"{fitness.objectives[number].name} has no margins: {reason}"
    for number in drawn:
        tasks = len(set(fitness.aggregates[number].strata.values()))
        if tasks > ITEMS:
            name = fitness.objectives[number].name
            return f"{name} has {tasks} tasks, more than the {ITEMS} items of an estimate"
    return ""


def _begun(directory: Path) -> Mapping[str, Any] | None:
    """Return the contract of the study in ``directory``, None where none was begun."""
    if not (directory / JOURNAL).exists():
        return None
    try:
        return StudyView.load(directory).contract
    except StorageError:
        return None  # Study.run reports what is wrong with the journal


def _kept(contract: Mapping[str, Any]) -> Choice:
    """Return the estimator of a study that was begun, in the words that were recorded then."""
    found = contract.get("estimation")
    section = None
    if found is not None and not found["settings"]["banks"]:  # their files are not recorded
        settings = found["settings"]
        section = EstimatorSection(
            name=found["name"], items=settings["items"], design=settings["design"],
            full_every=found["full_every"], calibration=found["calibration"],
            refresh=found.get("refresh", "never"),
        )  # fmt: skip
    text = contract["identity"].get("estimator")
    if text is None:
        what = "none: the mean of all search items" if section is None else section.name
        text = f"{what} (this study was begun so)"
    return Choice(section, str(text))
