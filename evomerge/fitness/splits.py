"""Dividing a task's items into search, validation and test."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.errors import InputError


@dataclass(frozen=True, slots=True)
class ItemSplit:
    """Three disjoint sets of item ids, each in the order of the task.

    Attributes:
        search: scored for every trial.
        validation: finalists are chosen on these.
        test: held out; scored once, for the report.
    """

    search: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def split_items(
    ids: Sequence[str],
    search: int | float,
    validation: int | float,
    test: int | float,
    seed: int,
    name: str,
) -> ItemSplit:
    """Draw three disjoint sets of items.

    The items are ordered by a hash of (seed, name, id), so the draw is the same in every
    process and does not touch any global generator. Test items are taken first, then
    validation, then search: a study that later asks for more search items keeps its test set.

    Args:
        ids: every item of the task, unique.
        search: how many: a count (int >= 1) or a fraction of all items (0 < float <= 1,
            rounded down).
        validation: as ``search``; 0 for none.
        test: as ``search``; 0 for none.
        seed: of the study.
        name: of the objective or task, so that two tasks are drawn independently.

    Raises:
        InputError: duplicate ids, a number out of range, a fraction that rounds to no item, or
            more items asked for than there are.
    """
    if len(set(ids)) != len(ids):
        raise InputError(f"{name}: {len(ids) - len(set(ids))} item ids occur more than once")
    asked = {"test": test, "validation": validation, "search": search}
    counts = {part: _count(share, len(ids), f"{name}: {part}") for part, share in asked.items()}
    if counts["search"] == 0:
        raise InputError(f"{name}: search: must be at least 1 item, got {search}")
    if sum(counts.values()) > len(ids):
        parts = " + ".join(f"{counts[part]} {part}" for part in ("search", "validation", "test"))
        raise InputError(
            f"{name}: {parts} = {sum(counts.values())} items asked for, but the task has "
            f"{len(ids)} (ask for fewer)"
        )
    drawn = sorted(range(len(ids)), key=lambda index: _rank(seed, name, ids[index]))
    taken, start = {}, 0
    for part, count in counts.items():
        taken[part] = tuple(ids[index] for index in sorted(drawn[start : start + count]))
        start += count
    return ItemSplit(**taken)


def _count(share: int | float, total: int, where: str) -> int:
    """Return the number of items that ``share`` means."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise InputError(f"{where}: expected a count or a fraction, got {share!r}")
    if isinstance(share, int):
        if share < 0:
            raise InputError(
                f"{where}: must be an integer >= 0 or a fraction in (0, 1], got {share}"
            )
        return share
    if share == 0.0:
        return 0
    if not 0.0 < share <= 1.0:
        raise InputError(f"{where}: must be an integer >= 0 or a fraction in (0, 1], got {share}")
    # 1e-9 undoes the rounding of products like 0.29 * 100 = 28.999999999999996.
    count = math.floor(share * total + 1e-9)
    if count == 0:
        raise InputError(f"{where}: {share} of {total} items is not one item (ask for a count)")
    return count


def _rank(seed: int, name: str, item: str) -> bytes:
    """Return the position of an item in the draw, as bytes that sort uniformly."""
    # repr keeps ('a', 'b:c') and ('a:b', 'c') apart.
    return hashlib.blake2b(repr((seed, "split", name, item)).encode(), digest_size=16).digest()
