"""What a user should know before a study starts; nothing of it prevents the start."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evomerge.adapter import made_for
from evomerge.checkpoint import is_local
from evomerge.config import PoolSection, StudyFile
from evomerge.economy import item_evaluations
from evomerge.fitness.splits import ItemSplit
from evomerge.models import Models
from evomerge.search.generation import generation_size
from evomerge.search.protocol import SearchProblem
from evomerge.search.registry import check_arguments
from evomerge.space import Space
from evomerge.study_space import MIXING

#: Methods that Evo-Merging's densities are about.
_TRIMMING = ("lora_factors", "breadcrumbs")


def study_warnings(
    file: StudyFile, space: Space, splits: Sequence[ItemSplit], problem: SearchProblem
) -> list[str]:
    """Return what is odd in a study file that can be run.

    Args:
        file: the study file, its estimator decided.
        space: what is searched.
        splits: item ids of each objective [m].
        problem: what the searcher will be given, without the baselines' scores.
    """
    return [*_search(file, space), *_item_budget(file, splits, problem), *_pool(file)]


def adapter_warnings(models: Models) -> list[str]:
    """Return which adapters say that they were made for another base, or another commit of it.

    Both must be of the Hub: the paths of a machine that trained an adapter tell nothing here.
    """
    repo, _, commit = models.base.pinned.partition("@")
    warnings = []
    for expert in models.experts:
        if not expert.folds or is_local(models.base.source):
            continue
        where = f"models.experts.{expert.name}"
        named, revision = made_for(expert.directory, where)
        if named.count("/") == 1 and named[0] not in "./~" and named.lower() != repo.lower():
            warnings.append(f"{where}: the adapter was made for {named}, the base is {repo}")
        elif re.fullmatch("[0-9a-f]{40}", revision) and commit and revision != commit:
            warnings.append(
                f"{where}: the adapter was made for {repo}@{revision}, the base is at {commit} "
                f"(models.base: {repo}@{revision})"
            )
    return warnings


def _search(file: StudyFile, space: Space) -> list[str]:
    warnings = []
    if file.search.trials is not None and file.search.trials < 2 * space.dimension:
        warnings.append(
            f"search.trials: {file.search.trials} trials for {space.dimension} coefficients is "
            "little (use a coarser partition, or more trials)"
        )
    if space.kinds and file.search.searcher in MIXING:
        warnings.append(
            f"search.searcher: {file.search.searcher} mixes the baselines, which lie at few "
            "values of what is no real number, and hardly leaves them (nsga2, ga or gp_rounds do)"
        )
    return [*warnings, *_unfit(file)]


def _unfit(file: StudyFile) -> list[str]:
    """Return whether a searcher is for other methods, or has too few trials for what it does."""
    name, trials, experts = file.search.searcher, file.search.trials, len(file.models.experts)
    if name == "evo_merging":
        return _evo_merging(file)
    if trials is None:
        return []
    if name == "m2n2" and trials <= 2 * experts:
        return [
            f"search.trials: m2n2 begins with the baselines as trials of its own, one for each of "
            f"{experts} experts at least, and {trials} trials leave it little to mix (give it "
            f"{5 * experts} or more)"
        ]
    if name == "nested_map" and trials < 6 * (experts - 1):
        return [
            f"search.trials: nested_map merges {experts} experts in {experts - 1} steps, and a "
            f"quadratic of two coefficients has 6 unknowns; {trials} trials may end before the "
            f"last step (give it {6 * (experts - 1)} or more)"
        ]
    return []


def _evo_merging(file: StudyFile) -> list[str]:
    warnings = []
    if file.space.method not in _TRIMMING:
        warnings.append(
            f"search.searcher: evo_merging is for {' and '.join(_TRIMMING)}; it starts from the "
            f"uniform average and takes small steps, for {file.space.method} auto goes farther"
        )
    arguments = check_arguments("evo_merging", file.search.arguments)
    population, trials = arguments["population"], file.search.trials
    assert isinstance(population, int)
    if arguments["stages"] == "both" and trials is not None and trials < 3 * population:
        warnings.append(
            f"search.trials: {trials} trials are less than three generations of {population} for "
            "the two stages of evo_merging (give it more, or a smaller population)"
        )
    return warnings


def _item_budget(file: StudyFile, splits: Sequence[ItemSplit], problem: SearchProblem) -> list[str]:
    """Return whether ``search.items`` ends the search before the searcher has learned anything."""
    budget = file.search.items
    if budget is None:
        return []
    one = item_evaluations(file, splits)
    size = generation_size(file.search.searcher, file.search.arguments, problem)
    if budget >= size * one:
        return []
    buys = "not one trial" if budget < one else f"{budget // one} trials"
    if size == 1:
        need = f"a trial takes {one:,}"
    else:
        need = (
            f"{file.search.searcher} learns after {size} trials of {one:,} items, {size * one:,} "
            "in all"
        )
    return [
        f"search.items: {budget:,} item evaluations buy {buys} ({need}; base, experts and other "
        "baselines are not counted)"
    ]


def _pool(file: StudyFile) -> list[str]:
    warnings = []
    pool = file.pool
    if pool.device == "cuda" and pool.kind == "ray" and pool.gpus_per_worker == 0:
        warnings.append("pool.gpus_per_worker: 0, so Ray hides the GPUs from the workers")
    default = PoolSection.model_fields["workers"].default  # also what `evomerge init` writes
    if pool.kind == "serial" and pool.workers > default:
        warnings.append(
            f"pool.workers: {pool.workers}, but kind: serial works alone, in this process (kind: "
            "ray starts them)"
        )
    return warnings
