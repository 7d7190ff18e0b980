"""Score a checkpoint directory as a study scored the merge that it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config import StudyFile
from evomerge.errors import InputError
from evomerge.fitness.goals import PythonSpec, load_fitness
from evomerge.fitness.protocol import Live
from evomerge.fitness_file import goal_specs, include_paths, task_specs
from evomerge.merge.change import Change, coefficient_norm
from evomerge.merge.engine import Engine
from evomerge.merge.merger import Merger, alone, models_of
from evomerge.merge.residency import Residency
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe
from evomerge.scoring import public_path
from evomerge.trial import Objective, Score
from evomerge.worker import choose_device, live_model, load_tokenizer, scored_class

#: Keys of objectives under which paths of files stand.
_PATHS = ("text", "items")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to score; from an export, and from whoever checks it.

    Attributes:
        file: a study file with the fitness of the study; its models are not looked at.
        root: folder that relative paths of tasks start from.
        allow_code: whether tasks and Python objectives may run code.
        batch_size: prompts per forward pass of lm-eval's own code.
        batch_tokens: tokens per forward pass of ours; None to find it.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads.
    """

    file: StudyFile
    root: Path
    allow_code: bool
    batch_size: int
    batch_tokens: int | None
    device: str
    threads: int


def public_settings(file: StudyFile, facts: Mapping[str, str]) -> dict[str, Any]:
    """Return what an export records of how its study scored, without paths of a machine.

    Args:
        file: the resolved study file.
        facts: about the workers of the study.
    """
    fitness = file.fitness.model_dump(mode="json", include={
        "tasks", "objectives", "include_path", "batch_size", "batch_tokens", "allow_task_code",
    })  # fmt: skip
    given = fitness["include_path"]
    fitness["include_path"] = list(map(public_path, [given] if isinstance(given, str) else given))
    for goal in fitness["objectives"]:
        goal |= {key: public_path(goal[key]) for key in _PATHS if isinstance(goal.get(key), str)}
        if "function" in goal:
            path, _, name = goal["function"].rpartition(":")
            goal["function"] = f"{public_path(path)}:{name}"
    tokens = facts.get("batch_tokens", "")
    return {
        "fitness": fitness,
        "experts": list(file.models.experts),
        "batch_tokens": int(tokens) if tokens.isdigit() else None,
        "threads": int(facts.get("threads", "1")),
        "device": facts.get("device", ""),
    }


def read_settings(
    recorded: Mapping[str, Any],
    root: Path,
    include: Sequence[str] = (),
    allow_code: bool = False,
    device: str = "auto",
) -> Settings:
    """Return the settings that an export recorded.

    Args:
        recorded: by ``public_settings``, read from a file that may come from anybody.
        root: folder that relative paths of tasks start from.
        include: folders with task files, instead of the recorded ones.
        allow_code: see ``Settings``; what is recorded does not count.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: they are not settings, or name code that must not run.
    """
    from pydantic import ValidationError

    try:
        fitness = {**recorded["fitness"], "allow_task_code": allow_code}
        if include:
            fitness["include_path"] = list(include)
        experts = {str(name): "./absent" for name in recorded["experts"]}
        file = StudyFile.model_validate(
            {"models": {"base": "./absent", "experts": experts}, "fitness": fitness}
        )
        tokens, threads = recorded["batch_tokens"], int(recorded["threads"])
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise InputError(
            "the export does not say how it was scored (it was written by another version, or "
            "damaged); its digests can be checked: --digests-only"
        ) from error
    code = [spec.objective.name for spec in goal_specs(file) if isinstance(spec, PythonSpec)]
    if code and not allow_code:
        raise InputError(
            f"{', '.join(code)}: scored by Python code named in the export (--allow-task-code "
            f"runs it from {root})"
        )
    return Settings(file, root, allow_code, file.fitness.batch_size, tokens, device, threads)


def rescore(
    directory: Path,
    settings: Settings,
    items: Mapping[str, Sequence[str]],
    models: Models | None = None,
    recipe: Recipe | None = None,
    adapter: Path | None = None,
) -> tuple[tuple[Objective, Score], ...]:
    """Return the scores [m] of the model in ``directory``.

    Args:
        directory: a checkpoint; the base where there is an ``adapter``.
        settings: how it is scored.
        items: ids by name of objective.
        models: the sources of the merge, for objectives that compare with them.
        recipe: of the merge, for its distance in coefficients, and for the dtype of an adapter.
        adapter: a directory with a LoRA adapter: what it makes of the base is scored, folded.

    Raises:
        InputError: tasks, items or models cannot be used, or a source is needed and not given.
        EvaluationError: a score is not a number.
    """
    import torch

    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    experts = [("adapter", str(adapter))] if adapter is not None else []
    own = open_models(str(directory), experts, "export")
    if recipe is not None:  # what was merged as factors is scored from factors
        own = models_of(recipe, own) if adapter is not None else own
        models = None if models is None else models_of(recipe, models)
    origin = own if models is None else models
    dtype = recipe.dtype if adapter is not None and recipe is not None else own.dtype
    auto = scored_class(own.base.config)
    live = live_model(origin, auto, dtype, device)
    references = _References(models, recipe, live, dtype, settings.threads)
    fitness = load_fitness(
        task_specs(settings.file), goal_specs(settings.file),
        include_paths(settings.file, settings.root), settings.root, settings.allow_code,
        ("base", *settings.file.models.experts),
    )  # fmt: skip
    missing = [one.name for one in fitness.objectives if one.name not in items]
    if missing:
        raise InputError(f"the export has no item ids for {', '.join(missing)}")
    scorer = fitness.attach(
        Live(
            live, load_tokenizer(directory), settings.batch_size, settings.batch_tokens,
            references.put, references.distance,
            found=settings.file.fitness.batch_tokens is None,
        )
    )  # fmt: skip
    if adapter is not None:
        # Attaching may have left a reference's weights; this writes all of them.
        Engine(Merger(own, settings.threads), live, Residency.DISK).apply(alone(own, 0, dtype))
    elif models is not None:
        live.load_state_dict(live_model(own, auto, dtype, device).state_dict())
    scores = scorer.score([tuple(items[one.name]) for one in fitness.objectives])
    return tuple(zip(fitness.objectives, scores, strict=True))


class _References:
    """Base and experts, for objectives that compare with them."""

    def __init__(
        self, models: Models | None, recipe: Recipe | None, live: Any, dtype: str, threads: int
    ) -> None:
        self._models, self._recipe, self._live = models, recipe, live
        self._dtype, self._threads = dtype, threads
        self._engine: Engine | None = None

    def _merger(self, what: str) -> Merger:
        if self._models is None:
            raise InputError(
                f"an objective compares with {what}: say where the models are (--models FOLDER, "
                "or --base DIR and --expert NAME=DIR)"
            )
        return Merger(self._models, self._threads)

    def put(self, name: str) -> None:
        """Write the weights of the base or of an expert into the live model."""
        if self._engine is None:
            self._engine = Engine(self._merger(name), self._live, Residency.DISK)
            self._engine.require_base()
        assert self._models is not None
        names = [expert.name for expert in self._models.experts]
        which = None if name == "base" else names.index(name)
        self._engine.apply(alone(self._models, which, self._dtype))

    def distance(self, norm: str) -> float:
        """Return how far the live model is from the base."""
        merger = self._merger("the base")
        if norm == "l1":
            assert self._recipe is not None
            return coefficient_norm(merger, self._recipe)
        return Change(merger, self._live).relative()
