"""From a study file to the objects of a study: every problem is found before a GPU is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from evomerge.advice import adapter_warnings, study_warnings
from evomerge.capacity import MemoryEstimate, capacity_warnings, require_gpus, temporary_warnings
from evomerge.config import StudyFile
from evomerge.direction_grams import direction_grams
from evomerge.economy import planned_trials, wants_margins
from evomerge.errors import SetupError, StorageError, StudyFileError
from evomerge.examination import examine
from evomerge.examination import study_directory as study_directory
from evomerge.fitness.composite import Composite
from evomerge.fitness.splits import ItemSplit
from evomerge.fitness_file import (
    goal_specs,
    include_paths,
    task_specs,
)
from evomerge.journal import JOURNAL, read
from evomerge.merge.masses import Progress
from evomerge.merge.methods import METHODS
from evomerge.merge.writer import COMPANIONS
from evomerge.metric_names import metric_name, renamed
from evomerge.models import Models
from evomerge.pool import Pool, SerialPool
from evomerge.search.auto import explain
from evomerge.search.baselines import Baseline
from evomerge.search.protocol import Searcher, SearchProblem
from evomerge.search.registry import (
    check_arguments,
    make_searcher,
)
from evomerge.search_facts import (
    expected_noise,
    informed,
    on_weighted_mean,
    outstanding,
    search_size,
    surrogate_versions,
    taking_over,
)
from evomerge.space import Space
from evomerge.study_record import History
from evomerge.study_space import baseline_warnings, baselines_of
from evomerge.trial import WorkerFactory
from evomerge.worker import ModelWorkerFactory


@dataclass(frozen=True)
class Prepared:
    """Everything that a study needs, checked.

    Attributes:
        file: the study file with its defaults.
        root: folder that relative paths start from.
        directory: of journal and results.
        models: opened and compared, from headers.
        tasks: all objectives, tasks first; loaded, without a model.
        splits: item ids of each objective [m].
        space: what is searched.
        baselines: what it is compared with.
        factory: builds a worker.
        memory: what a worker needs, and where its sources would lie on this machine.
        masses: what ``importance(n)`` divided its blocks by, None for other partitions.
        warnings: what a user should know before starting; nothing that prevents it.
        estimate: what ``fitness.estimator: auto`` took and why; empty where the file says it.
        extended: the study file with the budget that ``evomerge extend`` gave, None where it gave
            none. The searcher keeps to the first one.
    """

    file: StudyFile
    root: Path
    directory: Path
    models: Models
    tasks: Composite
    splits: tuple[ItemSplit, ...]
    space: Space
    baselines: tuple[Baseline, ...]
    factory: ModelWorkerFactory
    memory: MemoryEstimate
    masses: Mapping[str, float] | None
    warnings: tuple[str, ...]
    estimate: str = ""
    extended: StudyFile | None = None

    @property
    def parallel(self) -> int:
        """Outstanding trials; part of the replay contract."""
        return outstanding(self.file)

    @property
    def trials(self) -> int:
        """Trials of the search, baselines not counted; of a budget in items what it surely buys."""
        return planned_trials(self.extended or self.file, self.splits)

    @property
    def scalarise(self) -> bool:
        """Whether the searcher sees one weighted loss instead of all."""
        return on_weighted_mean(self.file, len(self.splits))

    def make_searcher(self, problem: SearchProblem) -> Searcher:
        """Build the searcher of the study file."""
        searcher, arguments = self.file.search.searcher, self.file.search.arguments
        problem = taking_over(self.informed(problem), searcher, arguments)
        if arguments.get("mixing", "linear") != "linear":
            problem = replace(problem, grams=direction_grams(self.space, self.models))
        return make_searcher(searcher, arguments, problem)

    def informed(self, problem: SearchProblem) -> SearchProblem:
        """Return ``problem`` with what is known here: names, noise, where to start."""
        per_trial = self.file.fitness.items.per_trial
        objectives = self.tasks.objectives
        noise = expected_noise(objectives, self.splits, self.tasks.sources, per_trial)
        weights = tuple(objective.weight * -objective.loss(1.0) for objective in objectives)
        problem = replace(problem, item_weights=weights)
        return informed(problem, self.space, self.baselines, noise)

    @property
    def choice(self) -> str:
        """What ``search.searcher: auto`` takes and why; empty for any other searcher."""
        if self.file.search.searcher != "auto":
            return ""
        chosen = explain(self.informed(search_size(self.file, self.space, self.splits)))
        return chosen if self.extended is None else f"{chosen}; chosen before it was extended"

    def make_pool(self, wrap: Callable[[WorkerFactory], WorkerFactory] = lambda one: one) -> Pool:
        """Build the pool of the study file, of workers that ``wrap`` may change.

        Raises:
            EvomergeError: it cannot start; at once where this machine lacks the GPUs asked for.
        """
        pool = self.file.pool
        if pool.kind == "serial":
            return SerialPool(wrap(self.factory))
        require_gpus(pool)
        from evomerge.ray_pool import RayPool

        return RayPool(
            wrap(self.factory),
            workers=pool.workers,
            cpus_per_worker=pool.cpus_per_worker,
            gpus_per_worker=pool.gpus_per_worker,
            max_attempts=pool.max_attempts,
            timeout=pool.timeout,
        )

    def identity(self) -> Mapping[str, object]:
        """Return what must not change between the runs of one study."""
        return {
            "name": str(self.file.name),
            "blocks": list(self.space.blocks),
            "searcher": self.file.search.searcher,
            "arguments": check_arguments(self.file.search.searcher, self.file.search.arguments),
            **surrogate_versions(self.file.search.searcher),
            "space": self.space.digest,
            "fitness": self.tasks.digest,
            "models": [self.models.base.fingerprint]
            + [expert.fingerprint for expert in self.models.experts],
            "base_files": _file_digests(self.models.base.directory),
            "batch_size": self.file.fitness.batch_size,
            "batch_tokens": self.file.fitness.batch_tokens,
            "device": self.file.pool.device,
            **({"estimator": self.estimate} if self.estimate else {}),
        }


def _file_digests(directory: Path) -> dict[str, str]:
    """Return digests of what decides scores beside the weights: config and tokenizer."""
    return {
        name: blake2b((directory / name).read_bytes(), digest_size=16).hexdigest()
        for name in ("config.json", *COMPANIONS)
        if (directory / name).is_file()
    }


def prepare(file: StudyFile, path: Path, progress: Progress = lambda done, total: None) -> Prepared:
    """Check a study file against the world and return its objects.

    Reads headers, configs and tasks; no GPU, no Ray, and no weights but for one partition:
    ``importance(n)`` reads all of them once, after everything else was found right, unless an
    earlier run of the study has left what it found.

    Args:
        file: the study file.
        path: where it lies; relative paths in it start from its folder.
        progress: called with the bytes of weights read so far, and of all, where any are.

    Raises:
        StudyFileError: every problem that could be found, together.
        SetupError: only the environment is at fault.
    """
    found = examine(file, path, progress)
    if found.problems:
        if found.setup and len(found.problems) == 1:
            raise SetupError(found.problems[0])
        raise StudyFileError(str(path), found.problems)
    root, file = path.resolve().parent, found.file
    models, tasks, splits, space = found.models, found.tasks, found.splits, found.space
    assert models is not None
    assert tasks is not None
    assert splits is not None
    assert space is not None
    assert found.start is not None
    assert found.memory is not None
    assert found.columns is not None
    start, averaged = found.start
    directory = study_directory(file, root)
    extended = _extended(file, directory)
    trims = any(
        name.startswith("density.") and column != 1.0 for name, column in found.columns.items()
    )
    return Prepared(
        file=file,
        root=root,
        directory=directory,
        models=models,
        tasks=tasks,
        splits=splits,
        space=space,
        baselines=(*baselines_of(file, space), *start),
        factory=_factory(file, root, space, models),
        memory=found.memory,
        masses=found.masses or None,
        warnings=(
            *study_warnings(extended or file, space, splits, search_size(file, space, splits)),
            *(_name_warnings(tasks) if file.tracking.enabled else ()),
            *averaged,
            *baseline_warnings(file),
            *capacity_warnings(file.pool, models, space.dtype),
            *temporary_warnings(file.pool, models, trims),
            *adapter_warnings(models),
        ),
        estimate=found.estimate,
        extended=extended,
    )


def _extended(file: StudyFile, directory: Path) -> StudyFile | None:
    """Return a study file with the budget to which its study was extended, None if it was not."""
    if not (directory / JOURNAL).exists():
        return None
    try:
        extensions = History.of(read(directory).records, str(directory)).extensions
    except StorageError:
        return None  # Study.run says what is wrong with the journal
    if not extensions:
        return None
    update = {"trials": extensions[-1].trials, "items": extensions[-1].items}
    return file.model_copy(update={"search": file.search.model_copy(update=update)})


def _name_warnings(tasks: Composite) -> list[str]:
    return [
        f"fitness: MLflow shows the objective {own!r} as {shown!r}: its tables have another "
        "column of that name (choose one by `name:`)"
        for own, shown in renamed(tasks.objectives).items()
        if shown != metric_name(own)
    ]


def _factory(file: StudyFile, root: Path, space: Space, models: Models) -> ModelWorkerFactory:
    return ModelWorkerFactory(
        factored=METHODS[file.space.method].adapters,
        # At the commits that were read here: every worker has the same, whenever it starts.
        base=models.base.pinned,
        experts=tuple((expert.name, expert.pinned) for expert in models.experts),
        dtype=space.dtype,
        device=file.pool.device,
        residency=file.pool.residency,
        workers=file.pool.workers if file.pool.kind == "ray" else 1,
        gpu_share=min(file.pool.gpus_per_worker, 1.0) or 1.0,
        threads=file.pool.cpus_per_worker,
        tasks=task_specs(file),
        goals=goal_specs(file),
        include_paths=include_paths(file, root),
        data_root=root,
        allow_task_code=file.fitness.allow_task_code,
        batch_size=file.fitness.batch_size,
        batch_tokens=file.fitness.batch_tokens,
        margins=wants_margins(file),
    )
