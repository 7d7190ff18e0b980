"""What must be the same when a study is continued, and how a user is told what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from typing import Any


def compared(contract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a contract that must be equal when a study is continued.

    The name, and why an estimator was taken, are for display; weights count only where the
    searcher sees a weighted mean.
    """
    fields = dict(contract)
    shown = ("name", "estimator")
    fields["identity"] = {k: v for k, v in contract["identity"].items() if k not in shown}
    if not contract["scalarise"]:
        fields["objectives"] = [
            {key: value for key, value in objective.items() if key != "weight"}
            for objective in contract["objectives"]
        ]
    return fields


_BUDGETS = ("budget", "item_budget")

#: What the study file calls a part of the contract, and what else decides it.
_KEYS = {
    "budget": "search.trials",
    "item_budget": "search.items",
    "open_ended": "no search.trials",
    "racing": "search.racing",
    "resampled": "fitness.items",
    "estimation": "fitness.estimator",
    "parallel": "search.parallel",
    "order": "search.order",
    "finalists": "search.finalists",
    "scalarise": "on the weighted mean of the objectives",
    "baselines": "baselines",
    "items": "fitness.items",
    "objectives": "fitness.tasks",
    "dimension": "searched coefficients",
    "identity.searcher": "search.searcher",
    "identity.arguments": "search.arguments",
    "identity.blocks": "space.partition",
    "identity.space": "space, or what it is made of",
    "identity.fitness": "questions and prompts of the tasks",
    "identity.models": "models (their weights)",
    "identity.base_files": "models.base",
    "identity.batch_size": "fitness.batch_size",
    "identity.batch_tokens": "fitness.batch_tokens",
    "identity.device": "pool.device",
    "identity.versions": "installed",
    "identity.libraries": "installed",
}


def differences(old: Any, new: Any) -> list[str]:
    """Return one line per leaf that differs, in the words of the study file.

    Numbers and short texts come first; of lists and digests it only says that they differ. What
    begins with another budget is told how to keep the one that the study was begun with.
    """
    # Of a search that only items end, the number of trials is a consequence.
    ends = ["item_budget"] if "open_ended" in (*_given(old), *_given(new)) else list(_BUDGETS)
    changes = _changes(old, new, "")
    changes.sort(
        key=lambda one: (not all(map(_plain, one[1:])), one[0].startswith("identity.versions"))
    )
    return [
        f"  {_key(path)}: {_change(before, now)}{_kept(path, before) if path in ends else ''}"
        for path, before, now in changes
    ]


def _given(contract: Any) -> list[str]:
    """Return the keys of a contract that have a value."""
    if not isinstance(contract, dict):
        return []
    return [key for key, value in contract.items() if value is not None]


def _kept(path: str, before: Any) -> str:
    return (
        f" (keep {json.dumps(before)}, e.g. --set {_KEYS[path]}={json.dumps(before)}; `evomerge "
        "extend` adds to it)"
    )


def _changes(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        nested = [
            _changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            for key in keys
        ]
        return list(chain.from_iterable(nested))
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if lists and all(isinstance(value, dict) for value in (*old, *new)):
        pairs = enumerate(zip(old, new, strict=True))
        inside = [_changes(before, now, f"{path}[{i}]") for i, (before, now) in pairs]
        return list(chain.from_iterable(inside))
    return [] if old == new else [(path, old, new)]


def _key(path: str) -> str:
    known = next(
        (key for key in _KEYS if path == key or path.startswith((f"{key}.", f"{key}["))), None
    )
    return path if known is None else _KEYS[known] + path[len(known) :]


def _plain(value: Any) -> bool:
    """Return whether a person can compare it with another: no collection, no digest."""
    return not isinstance(value, list | dict) and not (isinstance(value, str) and len(value) >= 16)


def _change(old: Any, new: Any) -> str:
    if _plain(old) and _plain(new):
        return f"{json.dumps(old)} -> {json.dumps(new)}"
    before, now = _sizes(old), _sizes(new)
    return "other ones" if before == now else f"{before} -> {now}"


def _sizes(value: Any) -> str:
    """Return how much there is of a list, or of each of its lists."""
    if not isinstance(value, list):
        return json.dumps(value) if value is None or _plain(value) else "others"
    if value and all(isinstance(part, list) for part in value):
        return " + ".join(str(len(part)) for part in value)
    return f"{len(value)} of them"
