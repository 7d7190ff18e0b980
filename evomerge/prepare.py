"""From a study file to the objects of a study: every problem is found before a GPU is touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from evomerge.advice import study_warnings
from evomerge.capacity import MemoryEstimate, capacity_warnings, estimate_memory
from evomerge.checkpoint import resolve_source
from evomerge.config import RangeSection, StudyFile
from evomerge.default_estimator import decide
from evomerge.direction_grams import direction_grams
from evomerge.economy import economy, planned_trials, require_enough_items, wants_margins
from evomerge.errors import (
    EvomergeError,
    InputError,
    ModelError,
    SetupError,
    StudyFileError,
    suggest,
)
from evomerge.fitness.composite import Composite
from evomerge.fitness.splits import ItemSplit
from evomerge.fitness_file import (
    file_fitness,
    file_splits,
    goal_specs,
    include_paths,
    task_specs,
)
from evomerge.layout import Partition, parse_spec, partition, resolve_partition
from evomerge.merge.masses import MASSES_FILE, Progress, stored_masses, task_vector_masses
from evomerge.merge.methods import METHODS, Method, Scope
from evomerge.merge.sources import Sources
from evomerge.merge.writer import COMPANIONS
from evomerge.models import Models, open_models
from evomerge.pool import Pool, SerialPool
from evomerge.search.auto import explain
from evomerge.search.baselines import Baseline, baselines
from evomerge.search.protocol import Searcher, SearchProblem
from evomerge.search.registry import (
    argument_problems,
    check_arguments,
    find_searcher,
    make_searcher,
)
from evomerge.search_facts import (
    expected_noise,
    informed,
    on_weighted_mean,
    outstanding,
    search_size,
    surrogate_versions,
)
from evomerge.space import Range, Space
from evomerge.starting import start_baseline
from evomerge.trial import WorkerFactory
from evomerge.worker import ModelWorkerFactory, load_tokenizer

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


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

    @property
    def parallel(self) -> int:
        """Outstanding trials; part of the replay contract."""
        return outstanding(self.file)

    @property
    def trials(self) -> int:
        """Trials of the search, baselines not counted; of a budget in items what it surely buys."""
        return planned_trials(self.file, self.splits)

    @property
    def scalarise(self) -> bool:
        """Whether the searcher sees one weighted loss instead of all."""
        return on_weighted_mean(self.file, len(self.splits))

    def make_searcher(self, problem: SearchProblem) -> Searcher:
        """Build the searcher of the study file."""
        searcher, arguments = self.file.search.searcher, self.file.search.arguments
        problem = self.informed(problem)
        if arguments.get("mixing", "linear") != "linear":
            problem = replace(problem, grams=direction_grams(self.space, self.models))
        return make_searcher(searcher, arguments, problem)

    def informed(self, problem: SearchProblem) -> SearchProblem:
        """Return ``problem`` with what is known here: names, noise, where to start."""
        per_trial = self.file.fitness.items.per_trial
        noise = expected_noise(self.tasks.objectives, self.splits, per_trial)
        objectives = self.tasks.objectives
        weights = tuple(objective.weight * -objective.loss(1.0) for objective in objectives)
        problem = replace(problem, item_weights=weights)
        return informed(problem, self.space, self.baselines, noise)

    @property
    def choice(self) -> str:
        """What ``search.searcher: auto`` takes and why; empty for any other searcher."""
        if self.file.search.searcher != "auto":
            return ""
        return explain(self.informed(search_size(self.file, self.space, self.splits)))

    def make_pool(self, wrap: Callable[[WorkerFactory], WorkerFactory] = lambda one: one) -> Pool:
        """Build the pool of the study file, of workers that ``wrap`` may change."""
        pool = self.file.pool
        if pool.kind == "serial":
            return SerialPool(wrap(self.factory))
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


def study_directory(file: StudyFile, root: Path) -> Path:
    """Return where a study keeps its journal and results."""
    return root / (file.directory or f"studies/{file.name}")


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
    root = path.resolve().parent
    problems: list[str] = []
    found: dict[str, object] = {}

    def attempt(name: str, action: Callable[[], object]) -> None:
        try:
            found[name] = action()
        except (InputError, SetupError) as error:
            problems.extend(str(error).splitlines())
            found.setdefault("setup", isinstance(error, SetupError))

    attempt("search", lambda: _check_search(file))
    attempt("columns", lambda: _columns(file))
    attempt("models", lambda: _open(file, root))
    attempt("tasks", lambda: file_fitness(file, root))
    models = found.get("models")
    if isinstance(models, Models):
        base = models.base.directory
        attempt("tokenizer", lambda: load_tokenizer(base))
    tasks, estimate = found.get("tasks"), ""
    if isinstance(tasks, Composite):
        loaded = tasks
        attempt("splits", lambda: file_splits(file, loaded))
        drawn = found.get("splits")
        if isinstance(drawn, tuple):
            file, estimate = decide(file, study_directory(file, root), loaded, drawn)
            attempt("enough", lambda: require_enough_items(file, drawn))
        attempt("economy", lambda: economy(file, root, loaded))
    if problems:
        if found.get("setup") and len(problems) == 1:
            raise SetupError(problems[0])
        raise StudyFileError(str(path), problems)
    columns, splits = found["columns"], found["splits"]
    assert isinstance(models, Models)
    assert isinstance(tasks, Composite)
    assert isinstance(columns, dict)
    assert isinstance(splits, tuple)
    masses: dict[str, float] = {}

    def find_masses() -> Mapping[str, float]:
        stored = stored_masses(study_directory(file, root) / MASSES_FILE, models)
        masses.update(stored or task_vector_masses(Sources(models), progress))
        return masses

    try:
        space = _space(file, models, columns, find_masses)
        start, averaged = start_baseline(file.search.arguments, root, space, models.layout)
        memory = estimate_memory(file.pool, models, space.dtype)
    except EvomergeError as error:
        raise StudyFileError(str(path), [str(error)]) from error
    return Prepared(
        file=file,
        root=root,
        directory=study_directory(file, root),
        models=models,
        tasks=tasks,
        splits=splits,
        space=space,
        baselines=(*_baselines(file, space), *start),
        factory=_factory(file, root, space),
        memory=memory,
        masses=masses or None,
        warnings=(
            *study_warnings(file, space, splits, search_size(file, space, splits)),
            *averaged,
            *capacity_warnings(file.pool, models, space.dtype),
        ),
        estimate=estimate,
    )


def _check_search(file: StudyFile) -> None:
    try:
        problems = argument_problems(file.search.searcher, file.search.arguments)
    except InputError as error:
        raise InputError(f"search.{error}") from error
    if problems:
        raise InputError("\n".join(f"search.arguments.{problem}" for problem in problems))
    if len(file.fitness.tasks) == 1 and not find_searcher(file.search.searcher).single_objective:
        raise InputError(
            f"search.searcher: {file.search.searcher} needs at least two objectives, fitness.tasks "
            "has one (choose nsga2 or unsga3, or a searcher for one objective)"
        )


def _method(file: StudyFile) -> Method:
    name = file.space.method
    if name not in METHODS:
        raise InputError(f"space.method: unknown {name!r}{suggest(name, METHODS)}")
    return METHODS[name]


def _columns(file: StudyFile) -> dict[str, float | Range]:
    """Return the columns of the table: searched ranges and fixed numbers."""
    problems = _form_problems(file)
    try:
        method = _method(file)
    except InputError as error:
        raise InputError("\n".join([str(error), *problems])) from error
    experts = tuple(file.models.experts)
    problems += _experts_problem(method, len(experts))
    given = {
        name: value
        for name, value in file.space.parameters.items()
        if name not in {option.name for option in method.options}
    }
    columns: dict[str, float | Range] = {}
    refused = False  # a range was given, with a problem of its own
    for parameter in method.parameters:
        per_expert = parameter.scope is Scope.EXPERT
        names = [f"{parameter.name}.{expert}" for expert in experts] if per_expert else []
        for column in names or [parameter.name]:
            key = column if column in given else parameter.name
            value = given.get(key)
            if value is None:
                # An essential number is searched, any other keeps its default.
                low, high = parameter.search
                columns[column] = (
                    Range(low, high) if parameter.default is None else parameter.default
                )
                continue
            try:
                columns[column] = _column_value(key, value, parameter.low, parameter.high)
            except InputError as error:
                problems.append(str(error))
                refused = refused or isinstance(value, RangeSection)
        given = {name: value for name, value in given.items() if name not in names}
        given.pop(parameter.name, None)
    known = [*columns, *(p.name for p in method.parameters), *(o.name for o in method.options)]
    known = list(dict.fromkeys(known))  # a parameter of the whole merge is a column too
    problems += [
        f"space.parameters.{name}: {method.name} has no such parameter{suggest(name, known)}"
        for name in given
    ]
    problems += _option_problems(file, method)
    if not refused and not any(isinstance(value, Range) for value in columns.values()):
        problems.append("space.parameters: nothing is searched (give at least one {low, high})")
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return columns


def _form_problems(file: StudyFile) -> list[str]:
    """Return what is wrong with the space whatever the method is."""
    problems = []
    try:
        parse_spec(file.space.partition)
    except InputError as error:
        problems.append(f"space.{error}")
    for name, value in file.space.parameters.items():
        if isinstance(value, RangeSection):
            try:
                _require_order(name, value)
            except InputError as error:
                problems.append(str(error))
    return problems


def _require_order(name: str, value: RangeSection) -> None:
    if not value.low < value.high:
        raise InputError(
            f"space.parameters.{name}: low {value.low:g} must be < high {value.high:g}"
        )


def _experts_problem(method: Method, count: int) -> list[str]:
    low, high = method.experts
    if count < low or (high is not None and count > high):
        limit = f"{low} to {high}" if high is not None else f"at least {low}"
        return [f"models.experts: {method.name} takes {limit} experts, got {count}"]
    return []


def _column_value(column: str, value: object, low: float, high: float) -> float | Range:
    where = f"space.parameters.{column}"
    if isinstance(value, RangeSection):
        _require_order(column, value)
        if value.low < low or value.high > high:
            raise InputError(f"{where}: must lie in [{low:g}, {high:g}]")
        return Range(value.low, value.high)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: expected a number or {{low, high}}, got {value!r}")
    if not low <= value <= high:
        raise InputError(f"{where}: must be in [{low:g}, {high:g}], got {value:g}")
    return float(value)


def _option_problems(file: StudyFile, method: Method) -> list[str]:
    problems = []
    for option in method.options:
        value = file.space.parameters.get(option.name, option.default)
        if value not in option.choices or isinstance(value, bool) != isinstance(
            option.default, bool
        ):
            choices = ", ".join(str(choice).lower() for choice in option.choices)
            problems.append(f"space.parameters.{option.name}: choose from {choices}, got {value!r}")
    return problems


def _open(file: StudyFile, root: Path) -> Models:
    experts = [(name, resolve_source(source, root)) for name, source in file.models.experts.items()]
    return open_models(resolve_source(file.models.base, root), experts)


def _options(file: StudyFile, method: Method) -> dict[str, str | float | bool]:
    """Return the method's options, checked before, completed by their defaults."""
    options: dict[str, str | float | bool] = {}
    for option in method.options:
        value = file.space.parameters.get(option.name, option.default)
        assert isinstance(value, str | bool)
        options[option.name] = value
    return options


def _partition(
    file: StudyFile, models: Models, masses: Callable[[], Mapping[str, float]]
) -> Partition:
    """Return the partition in the form that recipes hold: it never needs the weights again."""
    try:
        spec = resolve_partition(file.space.partition, models.layout, masses)
        return partition(models.layout, spec)
    except ModelError:
        raise
    except InputError as error:
        raise InputError(f"space.{error}") from error


def _space(
    file: StudyFile,
    models: Models,
    columns: dict[str, float | Range],
    masses: Callable[[], Mapping[str, float]],
) -> Space:
    base, experts = models.refs
    method = _method(file)
    dtype = _DTYPES[file.space.dtype] if file.space.dtype else models.dtype
    return Space(
        method=method.name,
        base=base,
        experts=experts,
        partition=_partition(file, models, masses),
        layout=models.layout.digest,
        columns=columns,
        options=_options(file, method),
        seed=file.seed,
        dtype=dtype,
    )


def _baselines(file: StudyFile, space: Space) -> tuple[Baseline, ...]:
    method = _method(file)
    experts = tuple(file.models.experts)
    options = _options(file, method)

    def anchor(weights: tuple[float, ...]) -> dict[str, float] | None:
        values = method.anchor(weights, options)
        if values is None:
            return None
        columns: dict[str, float] = {}
        for parameter in method.parameters:
            if parameter.name not in values:
                continue
            if parameter.scope is Scope.EXPERT:
                for expert, value in zip(experts, values[parameter.name], strict=True):
                    columns[f"{parameter.name}.{expert}"] = value
            else:
                columns[parameter.name] = values[parameter.name][0]
        return columns

    return baselines(space, experts, anchor, file.baselines.task_arithmetic)


def _factory(file: StudyFile, root: Path, space: Space) -> ModelWorkerFactory:
    return ModelWorkerFactory(
        base=resolve_source(file.models.base, root),
        experts=tuple(
            (name, resolve_source(source, root)) for name, source in file.models.experts.items()
        ),
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
