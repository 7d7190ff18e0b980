"""Give a study a larger budget; ``evomerge run`` then goes on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.config import StudyFile, load
from evomerge.errors import InputError, StudyFileError
from evomerge.journal import JOURNAL, Journal
from evomerge.prepare import study_directory
from evomerge.presentation import STUDY_FILE
from evomerge.search.registry import ends_with_budget
from evomerge.study_record import History, Limit
from evomerge.take_home import study_root
from evomerge.tracking_target import anchored_uri


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
    name, arguments = str(identity.get("searcher")), identity.get("arguments", {})
    if ends_with_budget(name, arguments):
        raise InputError(
            f"search.searcher: {name} {dict(arguments)} lays all its points out for the budget "
            "that it begins with and has none behind it; begin another study with the larger one"
        )


def continuing(text: str, directory: Path) -> str:
    """Return the command that continues a study with the settings that it was begun with.

    What its study file says otherwise (it was begun with ``--set``, or the file was changed
    since) is overridden.

    Args:
        text: what the user named the study by: study file, its folder or the study's directory.
        directory: of the study.
    """
    resolved = directory / STUDY_FILE
    begun = load(resolved) if resolved.exists() else None
    for path in _study_files(text, directory):
        try:
            settings = [] if begun is None else list(_overrides(load(path), begun, path))
            file = load(path, settings)
        except StudyFileError:
            continue  # Not a file that could be run as it is.
        if study_directory(file, path.resolve().parent).resolve() == directory.resolve():
            words = ["evomerge", "run", str(path)]
            words += [word for one in settings for word in ("--set", one)]
            return shlex.join(words)
    return "evomerge run STUDY.yaml (the study file, with the settings that the study began with)"


def _study_files(text: str, directory: Path) -> list[Path]:
    path, root = Path(text), study_root(directory)
    if path.is_file() and path.name != STUDY_FILE:
        return [path]
    folders = [path, *([] if root is None else [root])]
    return [folder / "study.yaml" for folder in folders if (folder / "study.yaml").is_file()]


def _overrides(file: StudyFile, begun: StudyFile, path: Path) -> Iterator[str]:
    """Yield ``key=value`` for what ``begun`` has otherwise than the study file at ``path``."""
    old, new = file.model_dump(mode="json"), begun.model_dump(mode="json")
    # The resolved file names what the user's leaves open.
    if old["fitness"]["estimator"] == "auto":
        old["fitness"]["estimator"] = new["fitness"]["estimator"]
    if old["directory"] is None and new["directory"] == f"studies/{new['name']}":
        old["directory"] = new["directory"]
    uri = old["tracking"]["uri"]
    if uri and anchored_uri(uri, path.resolve().parent) == new["tracking"]["uri"]:
        old["tracking"]["uri"] = new["tracking"]["uri"]
    yield from _changed(old, new, "")


def _changed(old: Any, new: Any, key: str) -> Iterator[str]:
    if old == new:
        return
    both = isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys()
    if both and not any("." in name for name in new):
        for name in new:
            yield from _changed(old[name], new[name], f"{key}.{name}" if key else name)
    else:
        yield f"{key}={json.dumps(new)}"
