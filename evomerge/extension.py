"""Give a study a larger budget; ``evomerge run`` then goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.journal import JOURNAL, Journal
from evomerge.search.registry import check_arguments, find_searcher, searcher_names
from evomerge.study_record import History, Limit


@dataclass(frozen=True, slots=True)
class Extended:
    """A budget before and after."""

    before: Limit
    after: Limit


def extend(directory: Path, trials: int = 0, items: int = 0) -> Extended:
    """Add to the budget of the study in ``directory``, running or finished.

    The searcher is built for the first budget all the same: what it plans by it (the size of a
    population, stages, a surrogate's design) is part of every candidate that it asked already.
    It goes on behind the end of its plan. The new end is written into the journal.

    Args:
        directory: of the study; no driver may be at work there.
        trials: of the search to add.
        items: item evaluations to add.

    Raises:
        InputError: nothing to add, a budget that the study does not have, a searcher that
            proposes nothing behind its budget, or no study.
        LockedError: a driver is at work.
        StorageError: the journal is damaged or cannot be written.
    """
    if trials < 0 or items < 0 or trials + items == 0:
        raise InputError(
            f"extend: expected --trials N or --items N of at least 1, got {trials} and {items}"
        )
    if not (directory / JOURNAL).exists():
        raise InputError(f"{directory}: this study has not been run yet; change its study file")
    with Journal(directory) as journal:
        history = History.of(journal.records, str(directory))
        if history.opened is None:
            raise InputError(f"{directory}: this study has not begun yet; change its study file")
        _require_going_on(history.opened)
        first = Limit(
            None if history.opened.get("open_ended") else history.opened["budget"],
            history.opened.get("item_budget"),
        )
        before = history.limits(first.trials, first.items)[-1]
        after = Limit(
            _more(before.trials, trials, "trials"), _more(before.items, items, "items")
        )  # fmt: skip
        fields = {"trials": after.trials, "items": after.items}
        journal.append("extend", **{key: n for key, n in fields.items() if n is not None})
    return Extended(before, after)


def _more(limit: int | None, added: int, unit: str) -> int | None:
    if limit is None and added:
        other = "items" if unit == "trials" else "trials"
        raise InputError(
            f"extend: search.{unit} does not end this study, search.{other} does; use --{other}"
        )
    return None if limit is None else limit + added


def _require_going_on(contract: dict[str, Any]) -> None:
    """Refuse a searcher that ends with its budget; of a foreign one nothing is known."""
    identity = contract["identity"]
    name = identity.get("searcher")
    if name not in searcher_names():
        return
    arguments = check_arguments(name, identity.get("arguments", {}))
    if find_searcher(name).ends(arguments):
        raise InputError(
            f"search.searcher: {name} {dict(arguments)} lays all its points out for the budget "
            "that it begins with and has none behind it; begin another study with the larger one"
        )
