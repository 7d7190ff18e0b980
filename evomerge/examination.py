"""What a study file stands for, as far as it can be found, and all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from evomerge.capacity import MemoryEstimate, estimate_memory
from evomerge.checkpoint import resolve_source
from evomerge.config import StudyFile
from evomerge.default_estimator import decide
from evomerge.economy import economy, require_enough_items
from evomerge.errors import EvomergeError, InputError, SetupError
from evomerge.fitness.composite import Composite
from evomerge.fitness.splits import ItemSplit
from evomerge.fitness_file import file_fitness, file_splits
from evomerge.merge.factor_sources import factor_problems, factored
from evomerge.merge.masses import MASSES_FILE, Progress, stored_masses, task_vector_masses
from evomerge.merge.methods import METHODS
from evomerge.merge.sources import Sources
from evomerge.models import Models, open_models
from evomerge.partial_file import Part, partial_file
from evomerge.search.baselines import Baseline
from evomerge.search.registry import argument_problems, find_searcher
from evomerge.space import Range, Space
from evomerge.starting import start_baseline
from evomerge.study_space import columns_of, require_space, space_of
from evomerge.worker import load_tokenizer

T = TypeVar("T")


def study_directory(file: StudyFile, root: Path) -> Path:
    """Return where a study keeps its journal and results."""
    return root / (file.directory or f"studies/{file.name}")


class _WeightsNeededError(Exception):
    """Weights are read of a study file without problems only."""


@dataclass
class Found:
    """What a study file stands for, as far as it could be found, and what is wrong with it."""

    file: StudyFile
    problems: list[str] = field(default_factory=list)
    setup: bool = False  # the environment is at fault
    columns: dict[str, float | Range] | None = None
    models: Models | None = None
    tasks: Composite | None = None
    splits: tuple[ItemSplit, ...] | None = None
    estimate: str = ""
    space: Space | None = None
    start: tuple[tuple[Baseline, ...], tuple[str, ...]] | None = None
    memory: MemoryEstimate | None = None
    masses: dict[str, float] = field(default_factory=dict)

    def attempt(self, action: Callable[[], T]) -> T | None:
        """Return what an action returns, None where it finds a problem, which is noted."""
        try:
            return action()
        except EvomergeError as error:
            self.problems.extend(str(error).splitlines())
            self.setup = self.setup or isinstance(error, SetupError)
        except _WeightsNeededError:
            pass
        return None


def examine(
    file: StudyFile, path: Path, progress: Progress, unsure: Collection[Part] = ()
) -> Found:
    """Look at everything that a study file names.

    Args:
        file: the study file.
        path: where it lies.
        progress: see ``prepare``.
        unsure: parts of it that are not the user's.
    """
    root, found = path.resolve().parent, Found(file)
    if "searcher" not in unsure:
        found.attempt(lambda: _check_search(file, "objectives" not in unsure))
    if not {"method", "expert names"} & set(unsure):
        found.columns = found.attempt(lambda: columns_of(file))
    else:
        found.attempt(lambda: require_space(file, "method" not in unsure))
    models = found.models = found.attempt(lambda: _open(file, root))
    if "tasks" not in unsure:
        found.tasks = found.attempt(lambda: file_fitness(file, root))
    if models is not None:
        found.attempt(lambda: load_tokenizer(models.base.directory))
        if _merges_factors(file):
            found.models = found.attempt(lambda: factored(models))
    _examine_items(found, path, unsure)
    _examine_space(found, root, progress)
    return found


def _examine_items(found: Found, path: Path, unsure: Collection[Part]) -> None:
    """Divide the items, choose the estimator."""
    file, root, tasks = found.file, path.resolve().parent, found.tasks
    if tasks is None or "items" in unsure:
        return
    splits = found.splits = found.attempt(lambda: file_splits(file, tasks))
    if {"estimator", "objectives"} & set(unsure):
        return
    if splits is not None:
        found.file, found.estimate = decide(file, study_directory(file, root), tasks, splits)
        found.attempt(lambda: require_enough_items(found.file, splits))
    found.attempt(lambda: economy(found.file, root, tasks))


def _examine_space(found: Found, root: Path, progress: Progress) -> None:
    """Make the space, find the point to start from and where the models fit."""
    file, models, columns = found.file, found.models, found.columns
    if models is None or columns is None:
        return

    def find_masses() -> Mapping[str, float]:
        stored = stored_masses(study_directory(file, root) / MASSES_FILE, models)
        if stored is None and found.problems:
            raise _WeightsNeededError
        found.masses.update(stored or task_vector_masses(Sources(models), progress))
        return found.masses

    space = found.space = found.attempt(lambda: space_of(file, models, columns, find_masses))
    if space is not None:
        found.start = found.attempt(
            lambda: start_baseline(file.search.arguments, root, space, models.layout)
        )
        found.memory = found.attempt(lambda: estimate_memory(file.pool, models, space.dtype))


def _check_search(file: StudyFile, counted: bool) -> None:
    """Refuse what the searcher does not take; ``counted``: all objectives are known."""
    try:
        problems = argument_problems(file.search.searcher, file.search.arguments)
    except InputError as error:
        raise InputError(f"search.{error}") from error
    if problems:
        raise InputError("\n".join(f"search.arguments.{problem}" for problem in problems))
    entry, count = find_searcher(file.search.searcher), len(file.fitness.tasks)
    if counted and count + len(file.fitness.objectives) == 1 and not entry.single_objective:
        raise InputError(
            f"search.searcher: {file.search.searcher} needs at least two objectives, fitness has "
            "one (choose nsga2 or unsga3, or a searcher for one objective)"
        )


def _open(file: StudyFile, root: Path) -> Models:
    experts = [(name, resolve_source(source, root)) for name, source in file.models.experts.items()]
    base = resolve_source(file.models.base, root)
    if not _merges_factors(file):
        return open_models(base, experts)
    return open_models(base, experts, further=factor_problems)


def _merges_factors(file: StudyFile) -> bool:
    return file.space.method in METHODS and METHODS[file.space.method].adapters


def further_problems(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Return what else is wrong with a study file whose form is wrong.

    What cannot be told from what is in good form is left out.

    Args:
        path: of the study file.
        overrides: as for ``evomerge.config.load``.
    """
    partial = partial_file(path, overrides)
    file = partial.validated(path) if partial is not None else None
    if partial is None or file is None:
        return []
    found = examine(file, path, lambda done, total: None, frozenset(partial.unsure))
    return [*partial.further, *partial.own(found.problems)]
