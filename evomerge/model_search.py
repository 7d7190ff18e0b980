"""Find the models of a recipe on this machine by the digests of their weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from evomerge.adapter import is_adapter, open_adapter
from evomerge.checkpoint import open_checkpoint
from evomerge.errors import InputError, ModelError, SetupError
from evomerge.recipe import Recipe

#: How far below a folder models are looked for: owner/name/revision, and one more.
_DEPTH = 4
#: One of these makes a directory a model.
_CONFIGS = frozenset({"config.json", "adapter_config.json"})


def find_models(recipe: Recipe, folders: Sequence[Path], base: str | None = None) -> dict[str, str]:
    """Return the directories of those models of a recipe that lie below ``folders``.

    A model is known by the digest of its weights that the recipe holds, whatever its directory is
    called. Directories that cannot be read as models are passed over.

    Args:
        recipe: names the models and their digests.
        folders: to look below.
        base: directory or hub id of the base, where it may be elsewhere: adapters are known
            together with their base only.

    Raises:
        InputError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"--models: no such directory: {folder}")
    candidates = [found for folder in folders for found in _model_directories(folder)]
    found: dict[str, str] = {}
    wanted: dict[str, list[str]] = {}  # a recipe may take the same weights under several names
    for ref in (recipe.base, *recipe.experts):
        wanted.setdefault(ref.fingerprint, []).append(ref.name)
    for directory in candidates:
        if not is_adapter(directory):
            for name in wanted.get(_fingerprint(directory), ()):
                found.setdefault(name, str(directory))
    adapters = [one for one in candidates if is_adapter(one)]
    base = found.get(recipe.base.name, base)
    if not adapters or base is None:
        return found
    try:
        origin = open_checkpoint(base, "base", "base")
    except (ModelError, SetupError):  # whoever needs the base says so
        return found
    for directory in adapters:
        try:
            expert = open_adapter(str(directory), directory, "adapter", origin, str(directory))
        except ModelError:
            continue
        for name in wanted.get(expert.fingerprint, ()):
            found.setdefault(name, str(directory))
    return found


def _fingerprint(directory: Path) -> str:
    """Return the digest of a checkpoint's weights, empty where it is none that can be merged."""
    try:
        return open_checkpoint(str(directory), "model", str(directory)).fingerprint
    except ModelError:
        return ""


def _model_directories(folder: Path) -> Iterator[Path]:
    """Yield the directories with a model at ``folder`` and below it, in order of their names.

    A link to a model counts; other links are not followed.
    """
    root = len(folder.parts)
    for path, inside, files in os.walk(folder):
        directory = Path(path)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if len(directory.parts) - root >= _DEPTH:
            inside.clear()
        if _CONFIGS & set(files):
            yield directory
        for link in (directory / name for name in inside):
            if link.is_symlink() and any(os.access(link / name, os.R_OK) for name in _CONFIGS):
                yield link
