"""Export a trial of a study: finds the models and the scoring that the study used."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from evomerge.checkpoint import is_local, resolve_source
from evomerge.config import StudyFile, load
from evomerge.errors import EvomergeError
from evomerge.export import Exported, ExportOptions, choose, export
from evomerge.export_documents import scored_items
from evomerge.fitness.measures import MEASURES
from evomerge.fitness_file import include_paths, task_specs
from evomerge.models import Models, open_models
from evomerge.one_shot import size_bytes
from evomerge.presentation import STUDY_FILE
from evomerge.recipe import ModelRef, Recipe
from evomerge.rescoring import public_settings, read_settings, rescore
from evomerge.scoring import Scoring, public_path
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation

_LOG = logging.getLogger(__name__)


def export_trial(
    view: StudyView,
    *,
    best: str | None = None,
    trial: int | None = None,
    pick: str | None = None,
    out: Path,
    shards: str = "5GB",
    options: ExportOptions | None = None,
) -> Exported:
    """Write one merge of a study as a checkpoint directory.

    Args:
        view: the study.
        best: objective whose best front member is wanted.
        trial: number of the wanted trial.
        pick: see ``evomerge.picking``; without all three, the recommended merge.
        out: the new directory.
        shards: largest shard, such as ``5GB``.
        options: how it is written; its shard size is ``shards``.

    Raises:
        InputError: nothing such in the study, or ``out`` is not free.
        ModelError: the models are gone or changed.
    """
    options = replace(
        options or ExportOptions(), max_shard_bytes=size_bytes(shards, "--max-shard-size")
    )
    number = choose(view, best=best, trial=trial, pick=pick)
    root = study_root(view.directory)
    recipe = view.trial(number).recipe
    models = _models(recipe, view.directory, root)

    def rescore_adapter(adapter: Path) -> tuple[Evaluation | None, str]:
        dtype = options.dtype or recipe.dtype
        return _adapter_scores(view, number, replace(recipe, dtype=dtype), models, adapter)

    return export(
        view, number, models, out, _scoring(view), root=root, options=options,
        rescore=rescore_adapter,
    )  # fmt: skip


def _adapter_scores(
    view: StudyView, number: int, recipe: Recipe, models: Models, adapter: Path
) -> tuple[Evaluation | None, str]:
    """Score the base with an adapter on the items of an export.

    Returns:
        the evaluation and an empty text; or None and why the adapter could not be scored.
    """
    path = view.directory / STUDY_FILE
    if not path.exists():
        return None, f"the study has no {STUDY_FILE}"
    file = load(path)
    root = study_root(view.directory) or Path.cwd()
    try:
        settings = read_settings(
            public_settings(file, view.facts), root, tuple(map(str, include_paths(file, root))),
            file.fitness.allow_task_code, file.pool.device,
        )  # fmt: skip
        settings = replace(settings, file=file)  # its paths as they are here
        names = [objective.name for objective in view.objectives]
        items = dict(zip(names, scored_items(view, number), strict=True))
        scores = rescore(models.base.directory, settings, items, models, recipe, adapter)
    except EvomergeError as error:
        # The reason can name paths of this machine, which no exported file may.
        _LOG.warning("the adapter was not scored: %s", error)
        return None, "its fitness could not be set up where it was exported"
    return Evaluation(tuple(score for _, score in scores), {}), ""


def study_root(directory: Path) -> Path | None:
    """Return the folder of the study file that a study directory belongs to.

    None where the study file put its directory somewhere else by an absolute path.
    """
    path = directory / STUDY_FILE
    inside = load(path).directory if path.exists() else None
    if inside is None or Path(inside).is_absolute() or ".." in Path(inside).parts:
        return None
    return (directory.resolve() / "_").parents[len(Path(inside).parts)]


def _models(recipe: Recipe, directory: Path, root: Path | None) -> Models:
    """Open the models where the study file has them, else where the study found them.

    A project that was moved has them elsewhere than its journal says. What does not fit the
    recipe's fingerprints is refused when it is merged.
    """
    base, experts = "", dict[str, str]()
    if root is not None:
        section = load(directory / STUDY_FILE).models
        base = resolve_source(section.base, root)
        experts = {name: resolve_source(source, root) for name, source in section.experts.items()}

    def place(ref: ModelRef, named: str) -> str:
        return named if named and is_local(named) else ref.source

    return open_models(
        place(recipe.base, base),
        [(ref.name, place(ref, experts.get(ref.name, ""))) for ref in recipe.experts],
    )


def _scoring(view: StudyView) -> Scoring | None:
    """Return how the study scores, from the resolved file beside its journal."""
    path = view.directory / STUDY_FILE
    if not path.exists():
        return None
    file = load(path)
    specs = task_specs(file)
    return Scoring(
        tasks=tuple(spec.task for spec in specs),
        num_fewshot=tuple(spec.num_fewshot for spec in specs),
        include_path=_include_path(file),
        batch_size=view.contract["identity"].get("batch_size", file.fitness.batch_size),
        device=view.facts.get("device", ""),
        allow_task_code=file.fitness.allow_task_code,
        unreported=tuple(
            objective.name
            for number, objective in enumerate(view.objectives)
            if number >= len(specs) or specs[number].metric in MEASURES
        ),
        metrics=tuple(spec.metric or "" for spec in specs),
        settings=public_settings(file, view.facts),
        base=public_path(file.models.base),
    )


def _include_path(file: StudyFile) -> tuple[str, ...]:
    given = file.fitness.include_path
    return (given,) if isinstance(given, str) else tuple(given)
