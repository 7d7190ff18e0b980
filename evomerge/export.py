"""Take a merge home: a checkpoint with its recipe, its scores and how to repeat both.

The directory appears whole or not at all: everything is written and checked beside it, then
renamed. Nothing in it names a path or a user of the machine that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evomerge.atomic_directory import atomic_directory, require_free, require_space
from evomerge.checkpoint import Checkpoint, is_local
from evomerge.checksums import write_sums
from evomerge.errors import InputError, NothingUsableError, RecipeError
from evomerge.export_documents import (
    MERGEKIT_FILE as MERGEKIT_FILE,
)
from evomerge.export_documents import (
    RECIPE_FILE as RECIPE_FILE,
)
from evomerge.export_documents import (
    SCORES_FILE as SCORES_FILE,
)
from evomerge.export_documents import (
    Adapter,
    Written,
    best_split,
    documents,
    reproduction,
    split_values,
)
from evomerge.factor_adapter import adapter_bytes, merges_factors, own_rank, write_factors
from evomerge.licences import combined_licence, stated_licence
from evomerge.lora import Kept, lora_bytes, write_lora
from evomerge.merge.writer import (
    checkpoint_bytes,
    copy_companions,
    verify_checkpoint,
    write_checkpoint,
)
from evomerge.mergekit_yaml import mergekit_config
from evomerge.models import Models
from evomerge.picking import pick_trial
from evomerge.recipe import ModelRef, Recipe
from evomerge.scoring import Scoring
from evomerge.study_view import StudyView
from evomerge.tokenizer_source import tokenizer_source
from evomerge.trial import Evaluation, TrialState

#: See ``ExportOptions.lora``.
OWN_RANK = 0


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a merge is written.

    Attributes:
        dtype: safetensors name, instead of the one that was scored.
        max_shard_bytes: largest shard.
        tokenizer: ``base``, ``expert:NAME`` or a directory; None to decide.
        recipe_only: leave out weights, config and tokenizer.
        lora: rank of the adapter that is written instead of the whole model; None for the model,
            ``OWN_RANK`` for the merged factors of a method that merges adapters as factors.
    """

    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000
    tokenizer: str | None = None
    recipe_only: bool = False
    lora: int | None = None


#: Scores an adapter directory on the items of the export; None where it cannot, with the reason.
Rescore = Callable[[Path], tuple[Evaluation | None, str]]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        out: the directory.
        trial: number of the trial.
        files: names in it, sorted.
        bytes: of all of them.
        mergekit: whether there is a mergekit configuration; else ``mergekit_reason`` says why.
        mergekit_reason: see ``mergekit``.
        commands: lm_eval commands that repeat the scores, for this machine.
        notes: what else it takes to repeat them.
        expected: value of each objective that they must give.
        split: which items they score.
        adapter: what an adapter keeps of the merge; None where the merge itself was written.
    """

    out: Path
    trial: int
    files: tuple[str, ...]
    bytes: int
    mergekit: bool
    mergekit_reason: str
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    expected: Mapping[str, float]
    split: str
    adapter: Adapter | None = None


def choose(
    view: StudyView,
    *,
    best: str | None = None,
    trial: int | None = None,
    pick: str | None = None,
) -> int:
    """Return the number of the trial to export: the knee where nothing else is asked for.

    Args:
        view: the study.
        best: name of an objective: the front member that is best in it.
        trial: a number.
        pick: one of ``evomerge.picking.PICKS``.

    Raises:
        InputError: unknown objective or trial, or a trial without an evaluation.
        NothingUsableError: the knee of a study in which nothing has succeeded.
    """
    if best is not None and trial is not None:
        raise InputError("export: give either an objective or a trial, not both")
    if pick is not None:
        return pick_trial(view, pick)
    if best is not None:
        return view.best(best)
    if trial is not None:
        found = view.trial(trial)
        if found.state is not TrialState.DONE:
            why = found.failure.message if found.failure else "it has no result yet"
            raise InputError(f"trial {trial}: cannot be exported: {why}")
        return trial
    if view.knee is None:
        raise NothingUsableError(f"{view.directory}: no trial has succeeded, nothing to export")
    return view.knee


def export(
    view: StudyView,
    number: int,
    models: Models,
    out: Path,
    scoring: Scoring | None = None,
    max_shard_bytes: int = 5_000_000_000,
    root: Path | None = None,
    options: ExportOptions | None = None,
    rescore: Rescore | None = None,
) -> Exported:
    """Write trial ``number`` of a study as a checkpoint directory.

    Args:
        view: the study.
        number: of the trial, see ``choose``.
        models: what it is made from.
        out: the new directory; an empty one is replaced.
        scoring: how the study scores; None where lm_eval does not apply.
        max_shard_bytes: largest shard, where ``options`` does not say.
        root: folder of the study file, where the commands are run; None for the current one.
        options: how it is written.
        rescore: scores an adapter; without it what an adapter loses is told of the weights only.

    Raises:
        InputError: ``out`` is not empty, or cannot be made; or the options do not go together.
        RecipeError: the models are not those of the study, or the merge is not finite.
        StorageError: there is not enough space.
    """
    options = options or ExportOptions(max_shard_bytes=max_shard_bytes)
    _require_one_form(options)
    out = out.absolute()
    here = (root or Path.cwd()).resolve()
    shown = out.relative_to(here) if out.is_relative_to(here) else Path(out.name)
    require_free(out)
    scored = view.trial(number).recipe
    recipe = public_recipe(replace(scored, dtype=options.dtype or scored.dtype), models)
    tokenizer = tokenizer_source(models, options.tokenizer)
    licence = combined_licence(
        {one.name: stated_licence(one) for one in (models.base, *models.experts)}
    )
    require_space(out, _needed_bytes(recipe, models, options))
    adapter: Adapter | None = None
    with atomic_directory(out) as temporary:
        if options.lora is not None:
            kept = _write_adapter(recipe, models, options.lora, temporary)
            evaluation, reason = rescore(temporary) if rescore else (None, "no study at hand")
            adapter = Adapter(kept, evaluation, reason, options.lora)
            copy_companions(models.base, temporary, tokenizer.directory)
        elif not options.recipe_only:
            write_checkpoint(recipe, models, temporary, options.max_shard_bytes)
            copy_companions(models.base, temporary, tokenizer.directory)
        written = Written(
            recipe=recipe,
            scored=scored,
            mergekit=mergekit_config(recipe, models.layout, mergekit_sources(recipe, models)),
            shown=shown,
            licence=licence,
            tokenizer="" if options.recipe_only else tokenizer.note,
            weights=not options.recipe_only,
            adapter=adapter,
        )
        for name, text in documents(view, number, scoring, written).items():
            (temporary / name).write_text(text, encoding="utf-8")
        if written.weights and adapter is None:
            verify_checkpoint(temporary, models, recipe)
        write_sums(temporary)
    split = best_split(view, number)
    commands, notes = reproduction(view, number, scoring, replace(written, shown=out))
    files = sorted(path for path in out.iterdir())
    return Exported(
        out=out,
        trial=number,
        files=tuple(path.name for path in files),
        bytes=sum(path.stat().st_size for path in files),
        mergekit=written.mergekit.text is not None,
        mergekit_reason=written.mergekit.reason,
        commands=tuple(commands),
        notes=tuple(notes),
        expected=split_values(view, number, split),
        split=split,
        adapter=adapter,
    )


def _require_one_form(options: ExportOptions) -> None:
    if options.recipe_only and options.lora is not None:
        raise InputError("export: --recipe-only writes no weights, --lora does (give one of them)")
    if options.recipe_only and options.tokenizer is not None:
        raise InputError("export: --recipe-only writes no tokenizer (leave --tokenizer out)")


def _needed_bytes(recipe: Recipe, models: Models, options: ExportOptions) -> int:
    if options.recipe_only:
        return 0
    if options.lora is not None and merges_factors(recipe):
        return adapter_bytes(models)
    if options.lora is not None:
        return lora_bytes(models, options.lora)
    return checkpoint_bytes(recipe, models)


def _write_adapter(recipe: Recipe, models: Models, rank: int, folder: Path) -> Kept:
    """Write an adapter: the merged factors where they fit the rank, else the nearest ones.

    Raises:
        InputError: no rank is given, and the merge is none of factors.
    """
    if merges_factors(recipe) and (rank == OWN_RANK or rank >= own_rank(models)):
        return write_factors(recipe, models, folder)
    if rank == OWN_RANK:
        raise InputError(
            f"--lora: give a rank, such as --lora 16: {recipe.method} merges weights, so that the "
            "merge has no rank of its own"
        )
    return write_lora(recipe, models, rank, folder)


# -- before --------------------------------------------------------------------------------


def public_sources(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return how an exported file names each model: its hub id, or ``./`` and its directory.

    As much of a directory's path is shown as tells the models apart: ``./final``, or
    ``./math/final`` and ``./code/final``. Where that would reach up to the home directory or the
    top of the disk, the model's name in the study stands there instead.
    """
    paths = [one.directory.resolve() if is_local(one.source) else None for one in checkpoints]
    shown = []
    for one, path in zip(checkpoints, paths, strict=True):
        if path is None:
            shown.append(one.pinned)
            continue
        others = [other.parts for other in paths if other not in (None, path) and other]
        home = Path.home().resolve()
        private = len(home.parts) if path.is_relative_to(home) else 2  # the root and one folder
        lengths = range(1, max(len(path.parts) - private, 1) + 1)
        length = next(
            (n for n in lengths if all(path.parts[-n:] != other[-n:] for other in others)), None
        )
        tail = path.parts[-length:] if length else (one.name, path.name)
        shown.append("./" + "/".join(tail))
    return tuple(shown)


def public_recipe(recipe: Recipe, models: Models) -> Recipe:
    """Return the recipe with sources that can be shown; its digest does not change."""
    opened = (models.base, *models.experts)
    shown_as = public_sources(opened)
    named = {one.name: source for one, source in zip(opened, shown_as, strict=True)}

    def shown(ref: ModelRef) -> ModelRef:
        if ref.name not in named:
            raise RecipeError(f"recipe: the study has no model {ref.name!r}")
        return replace(ref, source=named[ref.name])

    public = replace(
        recipe, base=shown(recipe.base), experts=tuple(shown(ref) for ref in recipe.experts)
    )
    assert public.digest == recipe.digest
    return public


def mergekit_sources(recipe: Recipe, models: Models) -> dict[str, str]:
    """Return what mergekit calls each model, by its name in the recipe: ``base+adapter``."""
    adapters = {expert.name for expert in models.experts if expert.folds}
    base = recipe.base.source
    return {
        ref.name: f"{base}+{ref.source}" if ref.name in adapters else ref.source
        for ref in (recipe.base, *recipe.experts)
    }
