"""One recipe to disk: the merge of a recipe file, without a study."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.atomic_directory import atomic_directory, require_free, require_space
from evomerge.checkpoint import is_local, resolve_source
from evomerge.checksums import write_sums
from evomerge.errors import InputError, ModelError, RecipeError, suggest
from evomerge.export import MERGEKIT_FILE, RECIPE_FILE, mergekit_sources, public_recipe
from evomerge.merge.writer import (
    Progress,
    checkpoint_bytes,
    copy_companions,
    verify_checkpoint,
    write_checkpoint,
)
from evomerge.mergekit_yaml import mergekit_config
from evomerge.model_search import find_models
from evomerge.models import Models, open_models
from evomerge.recipe import EXPECTED, ModelRef, Recipe, listed

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
#: Names of dtypes on the command line.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """How a merge is written; nothing here changes its numbers.

    Attributes:
        max_memory_bytes: of merged weights held at a time.
        max_shard_bytes: largest file, as far as single tensors allow.
        threads: CPU threads; None for all that this process may use.
    """

    max_memory_bytes: int = 4_000_000_000
    max_shard_bytes: int = 5_000_000_000
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written.

    Attributes:
        out: the directory.
        recipe: as it was merged, with sources that can be shown.
        files: names in it, sorted.
        bytes: of all of them.
        seconds: from opening the models to the durable directory.
    """

    out: Path
    recipe: Recipe
    files: tuple[str, ...]
    bytes: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "directory": str(self.out),
            "method": self.recipe.method,
            "dtype": self.recipe.dtype,
            "recipe": self.recipe.digest,
            "bytes": self.bytes,
            "files": list(self.files),
            "seconds": round(self.seconds, 3),
        }

    def line(self) -> str:
        """Return it in one line."""
        experts = listed([expert.name for expert in self.recipe.experts])
        return (
            f"wrote {self.out}: {self.recipe.method} of {experts}; {self.bytes / 1e9:.2f} GB in "
            f"{self.seconds:.1f} s"
        )


def size_bytes(text: str, option: str) -> int:
    """Return the number of bytes in ``5GB``, ``500MB`` and the like.

    Args:
        text: what the user wrote.
        option: for the message.

    Raises:
        InputError: not a size, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", text.upper())
    size = int(float(match.group(1)) * _UNITS[match.group(2)]) if match else 0
    if size == 0:
        raise InputError(f"{option}: expected a size such as 5GB or 500MB, got {text!r}")
    return size


def merge_recipe(
    path: Path,
    out: Path,
    overrides: Mapping[str, str],
    dtype: str | None = None,
    settings: MergeSettings | None = None,
    progress: Progress | None = None,
    folders: Sequence[Path] = (),
) -> Merged:
    """Write the merge of a recipe file as a checkpoint directory.

    Args:
        path: the recipe; relative sources in it start from its folder.
        out: the new directory; an empty one is replaced.
        overrides: sources by model name, instead of those in the recipe; ``base`` is the base.
        dtype: safetensors name, instead of the recipe's.
        settings: memory, shards, threads.
        progress: called with the bytes written so far, and of all.
        folders: to look below for models by the digests of their weights, before anywhere else.

    Raises:
        InputError: no such file, ``out`` is not free, or a model is missing.
        RecipeError: no valid recipe, or not for these models.
        StorageError: there is not enough space.
    """
    settings = settings or MergeSettings()
    out = out.absolute()
    recipe = read_recipe(path)
    if dtype is not None:
        recipe = replace(recipe, dtype=dtype)
    sources = find_sources(recipe, path, known_models(recipe, path, folders, overrides))
    require_free(out)
    started = time.perf_counter()
    models = open_models(
        sources[recipe.base.name],
        [(expert.name, sources[expert.name]) for expert in recipe.experts],
        str(path),
        repeats=True,
    )
    _require_same_weights(recipe, models, path)
    public = public_recipe(recipe, models)
    require_space(out, checkpoint_bytes(recipe, models))
    with atomic_directory(out) as temporary:
        try:
            write_checkpoint(
                recipe, models, temporary, settings.max_shard_bytes, settings.max_memory_bytes,
                settings.threads or available_threads(), progress,
            )  # fmt: skip
        except RecipeError as error:
            raise _in_file(path, error) from error
        copy_companions(models.base, temporary)
        (temporary / RECIPE_FILE).write_text(public.to_json(), encoding="utf-8")
        mergekit = mergekit_config(public, models.layout, mergekit_sources(public, models))
        if mergekit.text is not None:
            (temporary / MERGEKIT_FILE).write_text(mergekit.text, encoding="utf-8")
        verify_checkpoint(temporary, models, recipe)
        write_sums(temporary)
    written = sorted(out.iterdir())
    return Merged(
        out=out,
        recipe=public,
        files=tuple(file.name for file in written),
        bytes=sum(file.stat().st_size for file in written),
        seconds=time.perf_counter() - started,
    )


def available_threads() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        InputError: it cannot be read.
        RecipeError: it is not a recipe.
    """
    try:
        return Recipe.load(path)
    except RecipeError as error:
        raise _in_file(path, error) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: cannot be read: {reason} ({EXPECTED})") from error


def _in_file(path: Path, error: RecipeError) -> RecipeError:
    """Return an error that names the recipe's file, in each of its lines."""
    lines = str(error).splitlines()
    named = (line if line.startswith(f"{path}:") else f"{path}: {line}" for line in lines)
    return RecipeError("\n".join(named))


def known_models(
    recipe: Recipe, path: Path, folders: Sequence[Path], overrides: Mapping[str, str]
) -> dict[str, str]:
    """Return sources by model name: those found below ``folders``, and ``overrides`` before them.

    Args:
        recipe: names the models and their digests.
        path: of its file; relative sources in it start from its folder.
        folders: to look below.
        overrides: by model name; relative ones start from the current folder.

    Raises:
        InputError: a folder does not exist.
    """
    base = overrides.get(recipe.base.name, _beside(recipe.base, path))
    return {**find_models(recipe, folders, base), **overrides}


def find_sources(recipe: Recipe, path: Path, overrides: Mapping[str, str]) -> dict[str, str]:
    """Return where each model of a recipe lies: hub ids as they are, directories as paths.

    Args:
        recipe: names the models.
        path: of its file; relative sources in it start from its folder.
        overrides: by model name; relative ones start from the current folder.

    Raises:
        InputError: an override for a model that the recipe does not have.
        ModelError: every directory that is missing.
    """
    refs = (recipe.base, *recipe.experts)
    names = [ref.name for ref in refs]
    for name in overrides:
        if name not in names:
            raise InputError(f"{path}: the recipe has no model {name!r}{suggest(name, names)}")
    found, problems = {}, []
    for ref in refs:
        given = overrides.get(ref.name)
        source = given if given is not None else _beside(ref, path)
        if source.startswith((".", "/", "~")) and not is_local(source):
            option = "--base DIR" if ref is recipe.base else f"--expert {ref.name}=DIR"
            option += ", or --models FOLDER to find it by its weights"
            remedy = "" if given is not None else f" (say where it is: {option})"
            problems.append(f"{path}: {ref.name}: no such directory: {source}{remedy}")
        found[ref.name] = source
    if problems:
        raise ModelError("\n".join(problems))
    return found


def _beside(ref: ModelRef, path: Path) -> str:
    """Return a recipe's own source; a directory is looked for beside the recipe."""
    return resolve_source(ref.source, path.absolute().parent)


def _require_same_weights(recipe: Recipe, models: Models, path: Path) -> None:
    """Name the models that are not those of the recipe.

    Raises:
        RecipeError: one line for each.
    """
    opened = (models.base, *models.experts)
    problems = [
        f"{path}: {ref.name}: {checkpoint.source} has other weights than the recipe was made for "
        "(give the same model, or the same revision)"
        for ref, checkpoint in zip((recipe.base, *recipe.experts), opened, strict=True)
        if ref.fingerprint != checkpoint.fingerprint
    ]
    if problems:
        raise RecipeError("\n".join(problems))
