"""The study's records in the journal, and their way back into trials and results.

============  ========================================================================
``open``      identity, objectives, item ids of each split, dimension, labels of baselines
``frame``     what many recipes share: a recipe without table and seed
``items``     a numbered set of search items that trials are scored on instead of all of them
``ask``       one trial: kind, label, x (hex), frame, table, seed, recipe digest, set of items
``tell``      result of a trial on the search items, written when it arrives
``score``     result of a finalist on the items of another split, or (``complete``) of one that a
              race had stopped, on all its search items
``part``      item scores of a trial on the first of its items, in a search that halves
``retry``     failures that are asked for again, see ``History.add``
``pool``      facts about the workers
``extend``    a larger budget: where the search ends from now on
``numerics``  libraries and CPU with which the next trials are asked, where they are other ones
``restart``   a fresh searcher, which knows all results, asks the next trials
``note``      for humans
``stop``      the study ended early: signal, failure, or error of input or setup
``done``      front and recommended trial; the study is finished
============  ========================================================================

A ``tell`` is written in order of arrival, so that no finished evaluation is ever lost. The
searcher is told in order of asking, which needs no record: it follows from the rules in
``evomerge.study``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from evomerge import __version__
from evomerge.errors import StorageError
from evomerge.item_cache import Items
from evomerge.journal import Record, hexes, unhexes
from evomerge.recipe import Recipe
from evomerge.restart_record import Provenance
from evomerge.trial import (
    Direction,
    Evaluation,
    Failure,
    Objective,
    Origin,
    Score,
    Trial,
    TrialState,
)

SCHEMA = 1

#: ``complete`` is the search items again, for what a race had stopped; ``part`` is the first of
#: them, up to a rung.
Split = Literal["search", "part", "complete", "validation", "test"]
SPLITS: tuple[Split, ...] = ("search", "validation", "test")

_SEARCH_PACKAGES = ("numpy", "nevergrad", "pymoo", "cma")
_SCORE_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval")


@dataclass(frozen=True, slots=True)
class Reading:
    """What another estimator makes of the same item scores.

    Attributes:
        values: of the objectives [m].
        errors: their standard errors [m].
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of scoring one trial on one split.

    Attributes:
        value: the evaluation, or why there is none.
        attempts: how many workers tried; 0 when it was reused.
        worker: which one gave the result.
        reused: trial with the same recipe whose item scores these are, all of them.
        replayed: it was in the journal when this run of the driver began.
        fresh: items that a worker scored for it, over all objectives; the others were known.
        rung: number of items per objective at which a race stopped it, or at which it failed;
            None if it ran through.
        beside: other readings of the item scores: ``subset mean`` beside an estimate, and
            ``estimate`` where an estimated study scored a trial in full.
    """

    value: Evaluation | Failure
    attempts: int
    worker: str
    reused: int | None = None
    replayed: bool = False
    fresh: int = 0
    rung: int | None = None
    beside: Mapping[str, Reading] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limit:
    """Where a search ends: both in all, from its beginning.

    Attributes:
        trials: of the search; None for no such limit.
        items: item evaluations; None for no such limit.
    """

    trials: int | None
    items: int | None


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
    bounds = {"min": objective.minimum, "max": objective.maximum}
    return {
        "name": objective.name,
        "direction": objective.direction.value,
        "unit": objective.unit,
        "weight": objective.weight,
        **{key: bound for key, bound in bounds.items() if bound is not None},
    }


def objective_from(fields: Mapping[str, Any]) -> Objective:
    """Return the objective that ``objective_fields`` wrote."""
    return Objective(
        fields["name"], Direction(fields["direction"]), fields["unit"], fields["weight"],
        fields.get("min"), fields.get("max"),
    )  # fmt: skip


def frame_fields(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe shares with its neighbours: all but table and seed."""
    fields = recipe.to_dict()
    del fields["table"], fields["seed"]
    return fields


def ask_fields(trial: Trial, frame: int, items: int | None = None) -> dict[str, Any]:
    """Return the fields of an ``ask`` record.

    The table is plain JSON: ``repr`` of a finite float restores it exactly.

    Args:
        trial: that is asked.
        frame: number of its frame.
        items: number of its set of items, None for all search items.
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
        **({} if items is None else {"set": items}),
        **({} if trial.origin is None else {"origin": asdict(trial.origin)}),
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
        if any(score.margins for score in scores):
            fields["margins"] = [hexes(score.margins) for score in scores]
    fields |= {"attempts": result.attempts, "worker": result.worker}
    if result.reused is not None:
        fields["reused"] = result.reused
    if result.fresh != _all_fresh(result.value, result.reused):
        fields["fresh"] = result.fresh
    if result.rung is not None:
        fields["rung"] = result.rung
    if result.beside:
        fields["beside"] = {
            name: {"values": hexes(reading.values), "errors": hexes(reading.errors)}
            for name, reading in result.beside.items()
        }
    return fields


def _all_fresh(value: Evaluation | Failure, reused: int | None) -> int:
    """Return how many items were scored for a result where nothing else is written."""
    if reused is not None or isinstance(value, Failure):
        return 0
    return sum(len(score.items) for score in value.scores)


def result_from(record: Record) -> Result:
    """Return the result that ``result_fields`` wrote, marked as replayed."""
    value: Evaluation | Failure
    if record["status"] == "ok":
        items = record["items"]
        columns = zip(
            unhexes(record["values"]),
            unhexes(record["errors"]),
            map(unhexes, items),
            map(unhexes, record.get("margins", [""] * len(items))),
            strict=True,
        )
        value = Evaluation(tuple(Score(*column) for column in columns), record["seconds"])
    else:
        value = Failure(record["status"], record["message"])
    reused = record.get("reused")
    return Result(
        value, record["attempts"], record["worker"], reused, replayed=True,
        fresh=record.get("fresh", _all_fresh(value, reused)),
        rung=record.get("rung"),
        beside={
            name: Reading(unhexes(reading["values"]), unhexes(reading["errors"]))
            for name, reading in record.get("beside", {}).items()
        },
    )  # fmt: skip


@dataclass
class History:
    """What a journal says, sorted.

    Attributes:
        opened: fields of the ``open`` record, None in a new study.
        frames: recipes with an empty table, by number.
        sets: of search items, by number [m][I].
        set_of: number of a trial's set; absent where it is scored on all search items.
        trials: asked trials by number; state, evaluation and failure are not filled in.
        digests: of the trials' recipes, as recorded when they were asked.
        results: by split and trial number.
        times: unix seconds of each ``tell``.
        facts: about the workers, as last recorded.
        searcher: what the searcher last said of its work.
        extensions: later ends of the search, in the order in which they were given.
        provenance: restarts of the search, and with what its trials were asked.
        stop: the last ``stop`` record that nothing followed.
        done: the ``done`` record.
        latest: unix seconds of the last record.
    """

    opened: Record | None = None
    frames: list[Recipe] = field(default_factory=list)
    sets: list[Items] = field(default_factory=list)
    set_of: dict[int, int] = field(default_factory=dict)
    trials: dict[int, Trial] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    results: dict[tuple[Split, int], Result] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    searcher: Mapping[str, str] = field(default_factory=dict)
    extensions: list[Limit] = field(default_factory=list)
    provenance: Provenance = field(default_factory=Provenance)
    stop: Record | None = None
    done: Record | None = None
    latest: float = 0.0
    _splits: dict[Split, Items] = field(default_factory=dict)

    @staticmethod
    def of(records: Iterable[Record], source: str) -> History:
        """Sort the records of a journal.

        Raises:
            StorageError: another schema, or a record that contradicts an earlier one.
        """
        history = History()
        history.extend(records, source)
        return history

    def extend(self, records: Iterable[Record], source: str) -> None:
        """Take in the next records of the journal.

        Raises:
            StorageError: another schema, or a record that contradicts an earlier one.
        """
        for record in records:
            try:
                self.add(record)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise StorageError(
                    f"{source}: record {record.get('seq')} ({record.get('ev')}) cannot be "
                    f"understood: {type(error).__name__}: {error} (use the evomerge that wrote it)"
                ) from error

    def add(self, record: Record) -> None:
        """Take in the next record.

        A ``retry`` record lists failed trials: their results are forgotten. On the search items
        so is every search trial after the first of them, because the searcher had been told of
        that failure, or could have been, when it asked for them. What a searcher asked that a
        restart replaced stays: nobody can ask for it again.
        """
        event = record["ev"]
        self.latest = record["t"]
        if event not in ("note", "extend", "restart"):  # behind a restart a retry may be due still
            self.stop = None
        match event:
            case "open":
                if record["schema"] != SCHEMA:
                    raise ValueError(f"schema {record['schema']} is not {SCHEMA}")
                self.opened = record
                self.provenance.take(record, 0)
            case "numerics" | "restart":
                self.provenance.take(record, len(self.trials))
            case "frame":
                self.frames.append(Recipe.from_dict({**record["recipe"], "table": [], "seed": 0}))
            case "items":
                self.sets.append(tuple(map(tuple, record["items"])))
            case "ask":
                self._add_trial(record)
            case "tell":
                self._add_result("search", record)
                self.times[record["trial"]] = record["t"]
            case "score":
                self._add_result(record["split"], record)
            case "part":
                self.add_part(record["trial"], result_from(record))
            case "retry":
                self._forget(record["split"], record["trials"])
            case "pool":
                self.facts = record["facts"]
            case "stop":
                self.stop = record
            case "extend":
                self.extensions.append(Limit(record.get("trials"), record.get("items")))
                self.done = None
            case "done":
                self.done = record
            case "note":
                self.searcher = record.get("searcher", self.searcher)
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
        x, origin = record["x"], record.get("origin")
        if "set" in record:
            if record["set"] not in range(len(self.sets)):
                raise ValueError(f"trial {number} has set {record['set']}, which is not there")
            self.set_of[number] = record["set"]
        self.digests[number] = record["digest"]
        self.trials[number] = Trial(
            number=number,
            kind=record["kind"],
            label=record["label"],
            x=None if x is None else unhexes(x),
            recipe=recipe,
            origin=Origin(tuple(origin["parents"]), origin["how"]) if origin else None,
        )

    def _add_result(self, split: Split, record: Record) -> None:
        number = record["trial"]
        if number not in self.trials or (split, number) in self.results:
            raise ValueError(f"trial {number} was not asked, or has a result already")
        self.results[split, number] = result_from(record)

    def add_part(self, number: int, part: Result) -> None:
        """Take in item scores of a trial up to a rung; it costs what all its parts cost."""
        if number not in self.trials:
            raise ValueError(f"trial {number} was not asked")
        before = self.results.get(("part", number))
        self.results["part", number] = part if before is None else joined(before, part)

    def _forget(self, split: Split, failed: Sequence[int]) -> None:
        for number in failed:
            del self.results[split, number]
        if split != "search":
            return
        restart = self.provenance.last
        after = min(failed) if restart is None else max(min(failed), restart.trial - 1)
        later = [n for n, t in self.trials.items() if n > after and t.kind == "search"]
        for number in (*failed, *later):
            self.times.pop(number, None)
        for number in later:
            self.results.pop(("search", number), None)
            self.results.pop(("part", number), None)
            self.set_of.pop(number, None)
            del self.trials[number], self.digests[number]
        self.provenance.forget(len(self.trials))

    def items_of(self, split: Split, number: int) -> Items:
        """Return the items that a trial is scored on, in the order of its item scores [m][I].

        A race may stop before their end.
        """
        assert self.opened is not None
        if split in ("search", "part", "complete"):
            if number in self.set_of:
                return self.sets[self.set_of[number]]
            split = "search"
        if split not in self._splits:
            self._splits[split] = tuple(map(tuple, self.opened["items"][split]))
        return self._splits[split]

    def limits(self, trials: int | None, items: int | None) -> list[Limit]:
        """Return where the search ends, one after the other; begun with these budgets."""
        return [Limit(trials, items), *self.extensions]

    def rung_of(self, number: int) -> int | None:
        """Return the number of items that a trial has scores on; None where it is all of them."""
        return None if ("complete", number) in self.results else self.results["search", number].rung

    def settled(self, trial: Trial) -> Trial:
        """Return ``trial`` with what its ``tell`` says, unchanged when there is none."""
        result = self.results.get(("search", trial.number))
        return trial if result is None else settle(trial, result)


def joined(before: Result, later: Result) -> Result:
    """Return a later part of a trial with what the earlier ones took: items, seconds, attempts."""
    assert isinstance(before.value, Evaluation)
    assert isinstance(later.value, Evaluation)
    seconds = dict(before.value.seconds)
    for phase, value in later.value.seconds.items():
        seconds[phase] = seconds.get(phase, 0.0) + value
    return replace(
        later,
        value=replace(later.value, seconds=seconds),
        fresh=before.fresh + later.fresh,
        attempts=before.attempts + later.attempts,
    )


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
