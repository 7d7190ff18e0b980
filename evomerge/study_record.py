"""The study's records in the journal, and their way back into trials and results.

==========  ==========================================================================
``open``    identity, objectives, item ids of each split, dimension, labels of baselines
``frame``   what many recipes share: a recipe without table and seed
``ask``     one trial: kind, label, x (hex), frame, table, seed, recipe digest
``tell``    result of a trial on the search items, written when it arrives
``score``   result of a finalist on the items of another split
``retry``   failures that are asked for again, see ``History.add``
``pool``    facts about the workers
``note``    for humans
``stop``    the study ended early: signal or failure
``done``    front and recommended trial; the study is finished
==========  ==========================================================================

A ``tell`` is written in order of arrival, so that no finished evaluation is ever lost. The
searcher is told in order of asking, which needs no record: it follows from the rules in
``evomerge.study``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any, Literal

from evomerge import __version__
from evomerge.errors import ReplayError, StorageError
from evomerge.journal import Record, hexes, unhexes
from evomerge.recipe import Recipe
from evomerge.trial import Direction, Evaluation, Failure, Objective, Score, Trial, TrialState

SCHEMA = 1

Split = Literal["search", "validation", "test"]
SPLITS: tuple[Split, ...] = ("search", "validation", "test")

_SEARCH_PACKAGES = ("numpy", "nevergrad", "pymoo", "cma")
_SCORE_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of scoring one trial on one split.

    Attributes:
        value: the evaluation, or why there is none.
        attempts: how many workers tried; 0 when it was reused.
        worker: which one gave the result.
        reused: trial with the same recipe whose evaluation this is.
        replayed: it was in the journal when this run of the driver began.
    """

    value: Evaluation | Failure
    attempts: int
    worker: str
    reused: int | None = None
    replayed: bool = False


def library_versions() -> dict[str, str]:
    """Return the versions that decide what a searcher asks and what a model scores."""
    versions = {"evomerge": __version__}
    for package in (*_SEARCH_PACKAGES, *_SCORE_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def objective_fields(objective: Objective) -> dict[str, Any]:
    """Return an objective as in the ``open`` record."""
    return {
        "name": objective.name,
        "direction": objective.direction.value,
        "unit": objective.unit,
        "weight": objective.weight,
    }


def objective_from(fields: Mapping[str, Any]) -> Objective:
    """Return the objective that ``objective_fields`` wrote."""
    return Objective(
        fields["name"], Direction(fields["direction"]), fields["unit"], fields["weight"]
    )


def frame_fields(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe shares with its neighbours: all but table and seed."""
    fields = recipe.to_dict()
    del fields["table"], fields["seed"]
    return fields


def ask_fields(trial: Trial, frame: int) -> dict[str, Any]:
    """Return the fields of an ``ask`` record.

    The table is plain JSON: ``repr`` of a finite float restores it exactly.
    """
    return {
        "trial": trial.number,
        "kind": trial.kind,
        "label": trial.label,
        "x": None if trial.x is None else hexes(trial.x),
        "digest": trial.recipe.digest,
        "frame": frame,
        "seed": trial.recipe.seed,
        "table": trial.recipe.table,
    }


def result_fields(number: int, result: Result) -> dict[str, Any]:
    """Return the fields of a ``tell`` or ``score`` record, without the split."""
    fields: dict[str, Any] = {"trial": number}
    if isinstance(result.value, Failure):
        fields |= {"status": result.value.kind, "message": result.value.message}
    else:
        scores = result.value.scores
        fields |= {
            "status": "ok",
            "values": hexes(score.value for score in scores),
            "errors": hexes(score.standard_error for score in scores),
            "items": [hexes(score.items) for score in scores],
            "seconds": dict(result.value.seconds),
        }
    fields |= {"attempts": result.attempts, "worker": result.worker}
    if result.reused is not None:
        fields["reused"] = result.reused
    return fields


def result_from(record: Record) -> Result:
    """Return the result that ``result_fields`` wrote, marked as replayed."""
    value: Evaluation | Failure
    if record["status"] == "ok":
        columns = zip(
            unhexes(record["values"]), unhexes(record["errors"]), record["items"], strict=True
        )
        scores = tuple(Score(value, error, unhexes(items)) for value, error, items in columns)
        value = Evaluation(scores, record["seconds"])
    else:
        value = Failure(record["status"], record["message"])
    return Result(value, record["attempts"], record["worker"], record.get("reused"), replayed=True)


@dataclass
class History:
    """What a journal says, sorted.

    Attributes:
        opened: fields of the ``open`` record, None in a new study.
        frames: recipes with an empty table, by number.
        trials: asked trials by number; state, evaluation and failure are not filled in.
        digests: of the trials' recipes, as recorded when they were asked.
        results: by split and trial number.
        times: unix seconds of each ``tell``.
        facts: about the workers, as last recorded.
        stop: the last ``stop`` record that nothing followed.
        done: the ``done`` record.
    """

    opened: Record | None = None
    frames: list[Recipe] = field(default_factory=list)
    trials: dict[int, Trial] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    results: dict[tuple[Split, int], Result] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    stop: Record | None = None
    done: Record | None = None

    @staticmethod
    def of(records: Iterable[Record], source: str) -> History:
        """Sort the records of a journal.

        Raises:
            StorageError: another schema, or a record that contradicts an earlier one.
        """
        history = History()
        for record in records:
            try:
                history.add(record)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise StorageError(
                    f"{source}: record {record.get('seq')} ({record.get('ev')}) cannot be "
                    f"understood: {type(error).__name__}: {error} (use the evomerge that wrote it)"
                ) from error
        return history

    def add(self, record: Record) -> None:
        """Take in the next record.

        A ``retry`` record lists failed trials: their results are forgotten. On the search items
        so is every search trial after the first of them, because the searcher had been told of
        that failure, or could have been, when it asked for them.
        """
        event = record["ev"]
        if event != "note":
            self.stop = None
        match event:
            case "open":
                if record["schema"] != SCHEMA:
                    raise ValueError(f"schema {record['schema']} is not {SCHEMA}")
                self.opened = record
            case "frame":
                self.frames.append(Recipe.from_dict({**record["recipe"], "table": [], "seed": 0}))
            case "ask":
                self._add_trial(record)
            case "tell":
                self._add_result("search", record)
                self.times[record["trial"]] = record["t"]
            case "score":
                self._add_result(record["split"], record)
            case "retry":
                self._forget(record["split"], record["trials"])
            case "pool":
                self.facts = record["facts"]
            case "stop":
                self.stop = record
            case "done":
                self.done = record
            case "note":
                pass
            case _:
                raise ValueError(f"unknown event {event!r}")

    def _add_trial(self, record: Record) -> None:
        number = record["trial"]
        if number != len(self.trials):
            raise ValueError(f"trial {number} follows trial {len(self.trials) - 1}")
        recipe = replace(
            self.frames[record["frame"]],
            table=tuple(map(tuple, record["table"])),
            seed=record["seed"],
        )
        x = record["x"]
        self.digests[number] = record["digest"]
        self.trials[number] = Trial(
            number=number,
            kind=record["kind"],
            label=record["label"],
            x=None if x is None else unhexes(x),
            recipe=recipe,
        )

    def _add_result(self, split: Split, record: Record) -> None:
        number = record["trial"]
        if number not in self.trials or (split, number) in self.results:
            raise ValueError(f"trial {number} was not asked, or has a result already")
        self.results[split, number] = result_from(record)

    def _forget(self, split: Split, failed: Sequence[int]) -> None:
        for number in failed:
            del self.results[split, number]
        if split != "search":
            return
        later = [n for n, t in self.trials.items() if n > min(failed) and t.kind == "search"]
        for number in (*failed, *later):
            self.times.pop(number, None)
        for number in later:
            self.results.pop(("search", number), None)
            del self.trials[number], self.digests[number]

    def settled(self, trial: Trial) -> Trial:
        """Return ``trial`` with what its ``tell`` says, unchanged when there is none."""
        result = self.results.get(("search", trial.number))
        return trial if result is None else settle(trial, result)


def settle(trial: Trial, result: Result) -> Trial:
    """Return ``trial`` with its result filled in."""
    if isinstance(result.value, Failure):
        return replace(
            trial, state=TrialState.FAILED, failure=result.value, attempts=result.attempts
        )
    return replace(trial, state=TrialState.DONE, evaluation=result.value, attempts=result.attempts)


def distinct(numbers: Iterable[int], digests: Mapping[int, str]) -> list[int]:
    """Return the first trial of each recipe, in the order given."""
    first: dict[str, int] = {}
    for number in numbers:
        first.setdefault(digests[number], number)
    return list(first.values())


def compared(contract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a contract that must be equal when a study is continued.

    The name is for display, and weights count only where the searcher sees a weighted mean.
    """
    fields = dict(contract)
    fields["identity"] = {k: v for k, v in contract["identity"].items() if k != "name"}
    if not contract["scalarise"]:
        fields["objectives"] = [
            {key: value for key, value in objective.items() if key != "weight"}
            for objective in contract["objectives"]
        ]
    return fields


#: What the study file calls a part of the contract, and what else decides it.
_KEYS = {
    "budget": "search.trials",
    "parallel": "search.parallel",
    "finalists": "search.finalists",
    "scalarise": "on the weighted mean of the objectives",
    "baselines": "baselines.task_arithmetic",
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
    "identity.device": "pool.device",
    "identity.versions": "installed",
}


def differences(old: Any, new: Any) -> list[str]:
    """Return one line per leaf that differs, in the words of the study file.

    Numbers and short texts come first; of lists and digests it only says that they differ.
    """
    changes = _changes(old, new, "")
    changes.sort(
        key=lambda one: (not all(map(_plain, one[1:])), one[0].startswith("identity.versions"))
    )
    return [f"  {_key(path)}: {_change(before, now)}" for path, before, now in changes]


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


def compare(recorded: Trial, digest: str, trial: Trial) -> None:
    """Raise ``ReplayError`` unless the ask equals the recorded one bit for bit."""
    remedy = "the searcher, the space or their libraries changed since the study began"
    if (recorded.kind, recorded.label) != (trial.kind, trial.label):
        raise ReplayError(
            f"trial {trial.number}: the journal has {recorded.kind} {recorded.label!r}, now asked "
            f"is {trial.kind} {trial.label!r}; {remedy}"
        )
    old, new = recorded.x or (), trial.x or ()
    if len(old) != len(new):
        raise ReplayError(
            f"trial {trial.number}: the journal has {len(old)} dimensions, now {len(new)}; {remedy}"
        )
    for dimension, (before, now) in enumerate(zip(old, new, strict=True)):
        if before.hex() != now.hex():
            raise ReplayError(
                f"trial {trial.number}: dimension {dimension}: the journal has {before!r}, the "
                f"searcher now asks {now!r}; {remedy}"
            )
    if digest != trial.recipe.digest:
        raise ReplayError(f"trial {trial.number}: the same x decodes to another recipe; {remedy}")
