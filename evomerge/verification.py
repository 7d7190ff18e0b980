"""Check an exported directory: its files by their digests, its model by scoring it again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.checkpoint import read_json_mapping
from evomerge.checksums import differing_files, recorded_files
from evomerge.errors import InputError, ModelError
from evomerge.export_documents import RECIPE_FILE, SCORES_FILE
from evomerge.merge.sources import Sources
from evomerge.models import Models, open_models
from evomerge.one_shot import find_sources, known_models, read_recipe
from evomerge.recipe import Recipe
from evomerge.rescoring import read_settings, rescore

#: Items that are listed one by one; the rest is counted.
_LISTED = 10


@dataclass(frozen=True, slots=True)
class Compared:
    """One objective, as recorded and as found.

    Attributes:
        name: of the objective.
        recorded, found: values.
        items: number of them.
        differing: id, recorded and found score of every item that differs.
        equal: whether the value is as recorded too, as far as its items are.
    """

    name: str
    recorded: float
    found: float
    items: int
    differing: tuple[tuple[str, float, float], ...]
    equal: bool = True


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found.

    Attributes:
        directory: that was looked at.
        files: number of recorded files.
        problems: what is wrong with files or weights, one line each.
        objectives: what was scored again; empty where only digests were compared.
        stopped: whether it was not scored again because files differ.
    """

    directory: Path
    files: int
    problems: tuple[str, ...]
    objectives: tuple[Compared, ...] = ()
    stopped: bool = False

    @property
    def equal(self) -> bool:
        """Whether everything is as it was recorded."""
        return not self.problems and not any(
            one.differing or not one.equal for one in self.objectives
        )

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "directory": str(self.directory),
            "equal": self.equal,
            "files": self.files,
            "problems": list(self.problems),
            "objectives": {
                one.name: {
                    "recorded": one.recorded,
                    "found": one.found,
                    "items": one.items,
                    "equal": one.equal,
                    "differing": [
                        {"item": item, "recorded": was, "found": now}
                        for item, was, now in one.differing
                    ],
                }
                for one in self.objectives
            },
        }

    def lines(self) -> list[str]:
        """Return it for a person."""
        lines = [f"{self.directory}: {problem}" for problem in self.problems]
        if not self.problems:
            lines.append(f"{self.files} files are as they were written")
        if self.stopped:
            lines.append(
                f"{self.directory}: not scored again, because its files are not as written"
            )
        for one in self.objectives:
            if not one.differing and not one.equal:
                lines.append(
                    f"{one.name}: {one.found:.4f} instead of {one.recorded:.4f}, although all "
                    f"{one.items} items are as recorded"
                )
                continue
            if not one.differing:
                lines.append(f"{one.name}: {one.found:.4f}, all {one.items} items as recorded")
                continue
            lines.append(
                f"{one.name}: {one.found:.4f} instead of {one.recorded:.4f}; {len(one.differing)} "
                f"of {one.items} items differ"
            )
            lines += [
                f"    item {item}: {now:g} instead of {was:g}"
                for item, was, now in one.differing[:_LISTED]
            ]
            if len(one.differing) > _LISTED:
                lines.append(f"    and {len(one.differing) - _LISTED} more")
        return lines


@dataclass(frozen=True, slots=True)
class Where:
    """What an export cannot know about this machine.

    Attributes:
        root: folder that relative paths of tasks start from.
        include: folders with task files, instead of the recorded ones.
        allow_code: whether tasks and Python objectives may run code.
        device: ``auto``, ``cpu`` or ``cuda``.
        folders: to look below for the models of the merge, by the digests of their weights.
        sources: of models by name, ``base`` for the base.
        tolerance: how far an item's score may be off: 0 for equal; last bits of log-likelihoods
            differ between machines.
    """

    root: Path
    include: Sequence[str] = ()
    allow_code: bool = False
    device: str = "auto"
    folders: Sequence[Path] = ()
    sources: Mapping[str, str] | None = None
    tolerance: float = 0.0


def verify_digests(directory: Path) -> Verified:
    """Compare the files of an export with their recorded digests.

    Raises:
        InputError: there is no such export.
    """
    _require_directory(directory)
    problems = differing_files(directory)
    return Verified(directory, recorded_files(directory), tuple(problems))


def verify(directory: Path, where: Where) -> Verified:
    """Check an export: digests, and where these agree weights and every recorded item score.

    Needs neither the study nor, unless objectives compare with them or the export is an adapter,
    the models that were merged; only the tasks.

    Args:
        directory: what ``evomerge export`` wrote.
        where: what this machine has.

    Raises:
        InputError: no export with weights and scores, or what it needs is not here.
        EvaluationError: a score is not a number.
    """
    found = verify_digests(directory)
    if found.problems:  # damaged files need not even load
        return replace(found, stopped=True)
    recipe = read_recipe(directory / RECIPE_FILE)
    record = read_json_mapping(directory / SCORES_FILE, str(directory))
    adapter = (directory / "adapter_config.json").is_file()
    if not adapter and not (directory / "config.json").is_file():
        raise InputError(f"{directory}: a recipe without weights (use --digests-only)")
    expected, values, items = _recorded(directory, record, adapter)
    settings = read_settings(
        record["reproduce"].get("settings", {}), where.root, where.include, where.allow_code,
        where.device,
    )  # fmt: skip
    problems: list[str] = []
    path = directory / RECIPE_FILE
    given = known_models(recipe, path, where.folders, where.sources or {})
    models = None if adapter and given.keys() <= {"base"} else _sources(recipe, directory, given)
    if adapter:
        base = _base_directory(recipe, models, directory, given)
        scores = rescore(base, settings, items, models, recipe, directory)
    else:
        problems = _weight_problems(directory, recipe)
        scores = rescore(directory, settings, items, models, recipe)
    compared = []
    for objective, score in scores:
        was = expected[objective.name]
        pairs = zip(items[objective.name], was, score.items, strict=True)
        differing = tuple(
            (item, old, new)
            for item, old, new in pairs
            # Turned round: nothing is near to a recorded NaN.
            if not (old == new or abs(old - new) <= where.tolerance * max(1.0, abs(old)))
        )
        value = values[objective.name]
        # The value on search items may be an estimate of all from some. Elsewhere equal items
        # give an equal value, however it is made of them.
        equal = (
            (not adapter and record["reproduce"].get("split") == "search")
            or tuple(was) != tuple(score.items)
            or math.isclose(value, score.value, rel_tol=1e-9, abs_tol=1e-12)
        )
        compared.append(Compared(objective.name, value, score.value, len(was), differing, equal))
    return Verified(directory, found.files, tuple(problems), tuple(compared))


def _require_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")


def _recorded(
    directory: Path, record: Mapping[str, Any], adapter: bool
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, list[str]]]:
    """Return recorded item scores, values and item ids by objective.

    Raises:
        InputError: there are none.
    """
    try:
        reproduce = record["reproduce"]
        scores = record["adapter"] if adapter else reproduce
        values = scores["values"] if adapter else reproduce["expected"]
        expected = {name: list(map(float, row)) for name, row in scores["item_scores"].items()}
        items = {name: list(map(str, reproduce["items"][name])) for name in expected}
        found = {name: float(values[name]) for name in expected}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{directory / SCORES_FILE}: no item scores to compare with (use --digests-only)"
        ) from error
    if not expected or any(len(expected[name]) != len(items[name]) for name in expected):
        raise InputError(
            f"{directory / SCORES_FILE}: no item scores to compare with (use --digests-only)"
        )
    return expected, found, items


def _weight_problems(directory: Path, recipe: Recipe) -> list[str]:
    """Return what is wrong with the weights: names, shapes, dtype, or values not finite."""
    try:
        models = open_models(str(directory), [], "export")
        if models.layout.digest != recipe.layout:
            return ["the weights have other names or shapes than the recipe"]
        if models.dtype != recipe.dtype:
            return [f"the weights are {models.dtype}, the recipe says {recipe.dtype}"]
        Sources(models).require_finite()
    except ModelError as error:
        return str(error).splitlines()
    return []


def _sources(recipe: Recipe, directory: Path, given: Mapping[str, str]) -> Models | None:
    """Return the models that were merged where they were said to be, None where nothing was said.

    Raises:
        InputError: they are not there, or are others.
    """
    if not given:
        return None
    found = find_sources(recipe, directory / RECIPE_FILE, given)
    models = open_models(
        found[recipe.base.name], [(one.name, found[one.name]) for one in recipe.experts]
    )
    for ref, checkpoint in zip(
        (recipe.base, *recipe.experts), (models.base, *models.experts), strict=True
    ):
        if ref.fingerprint != checkpoint.fingerprint:
            raise InputError(f"{ref.name}: {checkpoint.source} has other weights than were merged")
    return models


def _base_directory(
    recipe: Recipe, models: Models | None, directory: Path, given: Mapping[str, str]
) -> Path:
    """Return where the base of an adapter lies; the experts may be gone.

    Raises:
        InputError: it is not there, or is another model.
    """
    if models is not None:
        return models.base.directory
    alone = replace(recipe, experts=(), columns=(), table=())
    source = find_sources(alone, directory / RECIPE_FILE, given)[recipe.base.name]
    opened = open_models(source, [], "export").base
    if opened.fingerprint != recipe.base.fingerprint:
        raise InputError(
            f"base: {source} has other weights than the adapter was made for "
            "(say where the base is: --base DIR)"
        )
    return opened.directory
