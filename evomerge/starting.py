"""Where a search is to start: a recipe, or a trial of another study, as a point of the space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import EvomergeError, InputError
from evomerge.layout import Layout, Partition, partition
from evomerge.one_shot import read_recipe
from evomerge.recipe import Recipe
from evomerge.search.baselines import Baseline
from evomerge.search_facts import START
from evomerge.space import Space
from evomerge.study_view import StudyView

#: Means of equal coefficients differ from them by less than this.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Start:
    """A point to start from.

    Attributes:
        x: in the unit box [d].
        averaged: how far the table's numbers had to move because its blocks are finer than the
            space's; 0.0 when the point is the recipe itself.
    """

    x: tuple[float, ...]
    averaged: float


def start_baseline(
    arguments: Mapping[str, object], root: Path, space: Space, layout: Layout
) -> tuple[tuple[Baseline, ...], tuple[str, ...]]:
    """Return the merge that a searcher is to start from, and what a user should know of it.

    It is scored before the search like every baseline, so that the gain over it is seen.

    Args:
        arguments: of the searcher; ``start`` names the merge.
        root: folder that relative paths start from.
        space: what is searched.
        layout: of the models.

    Returns:
        One baseline, or none where no start is named; warnings.

    Raises:
        InputError: no such merge, or it is no point of the space.
    """
    text = arguments.get("start")
    if not isinstance(text, str):
        return (), ()
    blocks = partition(layout, space.partition)
    try:
        found = start_point(start_recipe(text, root), space, layout, blocks)
    except InputError as error:
        raise InputError(f"search.arguments.{error}") from error
    warning = (
        "search.arguments.start: its blocks are finer than the study's, so its coefficients were "
        f"averaged (they moved by up to {found.averaged:.3g}); a finer space.partition keeps them"
    )
    baseline = Baseline(START, found.x, space.decode(found.x))
    return (baseline,), (warning,) if found.averaged > _ROUNDING else ()


def start_recipe(text: str, root: Path) -> Recipe:
    """Return the recipe that a user names.

    Args:
        text: path of a recipe file, or ``<study directory>:<trial number>``.
        root: folder that relative paths start from.

    Raises:
        InputError: no such file, study or trial.
    """
    folder, colon, number = text.rpartition(":")
    try:
        if colon and number.isdigit():
            return StudyView.load(root / folder).trial(int(number)).recipe
        return read_recipe(root / text)
    except EvomergeError as error:
        raise InputError(
            f"start: {error} (give a recipe file, or <study directory>:<trial number>)"
        ) from error


def start_point(recipe: Recipe, space: Space, layout: Layout, blocks: Partition) -> Start:
    """Return where a recipe lies in a space.

    Blocks of the recipe that the space splits keep their numbers; blocks that it joins are
    averaged by their elements.

    Args:
        recipe: of the same models, with the space's method, options and columns.
        space: what is searched.
        layout: of the models.
        blocks: partition of the space.

    Raises:
        InputError: other models, method, options or columns, or numbers outside the space.
    """
    own = space.decode((0.0,) * space.dimension)
    _check_same(recipe, own, space)
    weights = _overlap(partition(layout, recipe.partition), blocks, layout)
    table = np.array(recipe.table, dtype=np.float64)  # [B of the recipe, C]
    rows = weights @ table  # [B of the space, C]
    # What was averaged: the distance of a block's number from that of a block it went into.
    apart = np.abs(rows[:, None, :] - table[None, :, :]) * (weights > 0)[:, :, None]
    places = [recipe.columns.index(name) for name in own.columns]
    return Start(
        space.encode_rows(
            [dict(zip(own.columns, row[places].tolist(), strict=True)) for row in rows],
            dict(recipe.options),
        ),
        float(apart.max(initial=0.0)),
    )


def _check_same(recipe: Recipe, own: Recipe, space: Space) -> None:
    """Refuse a recipe that is no point of the space, with every reason."""
    problems = []
    if recipe.base.fingerprint != own.base.fingerprint or recipe.layout != own.layout:
        problems.append("it has another base")
    fingerprints = [[expert.fingerprint for expert in one.experts] for one in (recipe, own)]
    if fingerprints[0] != fingerprints[1]:
        problems.append("it has other experts, or in another order")
    if recipe.method != own.method:
        problems.append(f"its method is {recipe.method}, the study's is {own.method}")
    elif dict(recipe.options).keys() != dict(own.options).keys() or (
        space.encode_options(dict(recipe.options)) is None
    ):
        own_options = dict(space.method[1])
        problems.append(f"its options are {dict(recipe.options)}, the study's are {own_options}")
    elif set(recipe.columns) != set(own.columns):
        problems.append(
            f"its columns are {', '.join(recipe.columns)}, the study's {', '.join(own.columns)}"
        )
    if problems:
        raise InputError(
            "start: the recipe is no point of this study's space: " + "; ".join(problems)
        )


def _overlap(old: Partition, new: Partition, layout: Layout) -> NDArray[np.float64]:
    """Return the share of each old block in each new one [B new, B old], rows summing to 1."""
    spans = defaultdict(list)
    for span in old.spans:
        spans[span.slot].append(span)
    elements = np.zeros((len(new.blocks), len(old.blocks)))
    for span in new.spans:
        slot = layout.slots[span.slot]
        width = slot.size // max(slot.rows, 1)
        for other in spans[span.slot]:
            rows = min(span.stop, other.stop) - max(span.start, other.start)
            elements[span.block, other.block] += max(rows, 0) * width
    return np.asarray(elements / elements.sum(axis=1, keepdims=True))
