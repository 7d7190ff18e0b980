"""The study: what it is made of, and what must be the same when it is continued.

How it runs is in ``evomerge.study_run``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

from evomerge import numerics
from evomerge.comparison import aggregate_fields
from evomerge.contract import compared, differences
from evomerge.errors import InputError, ReplayError, SetupError
from evomerge.estimate import Estimation, Estimator
from evomerge.fitness.aggregate import Aggregate
from evomerge.halving import Halving
from evomerge.interrupt import StopSignals
from evomerge.item_cache import Items
from evomerge.items import Resampled
from evomerge.journal import Journal, Recorder
from evomerge.pool import Pool
from evomerge.racing import Racing
from evomerge.recipe import Recipe
from evomerge.restarting import (
    DRIFT,
    asked_with,
    explained,
    go_on,
    with_versions_of,
)
from evomerge.search.baselines import Baseline
from evomerge.search.protocol import Searcher, SearchProblem
from evomerge.spool import Spool
from evomerge.study_listener import Phase, Progress, StudyListener
from evomerge.study_record import (
    SCHEMA,
    SPLITS,
    History,
    Split,
    library_versions,
    objective_fields,
)
from evomerge.study_run import StudyRun
from evomerge.study_view import StudyView
from evomerge.trial import Objective

__all__ = [
    "Baseline",
    "ItemSplit",
    "Phase",
    "Progress",
    "Study",
    "StudyListener",
    "library_versions",
]


#: In which order a searcher is told of results.
Order = Literal["ask", "completion"]


class ItemSplit(Protocol):
    """The item ids of one objective; the three are disjoint."""

    @property
    def search(self) -> tuple[str, ...]:
        """Items that trials are scored on: all of them, or some that a policy chooses."""
        ...

    @property
    def validation(self) -> tuple[str, ...]:
        """Items that choose the reported front; may be empty."""
        ...

    @property
    def test(self) -> tuple[str, ...]:
        """Items that only the front and the baselines see; may be empty."""
        ...


class Study:
    """One search in one directory; ``run`` starts it or continues it.

    Args:
        directory: of the study; created if needed.
        identity: JSON-able facts that must not change when the study is continued: digests of
            configuration, fitness and space, searcher name and arguments. ``library_versions``
            is added under ``versions``.
        objectives: [m], m >= 1.
        splits: item ids, one per objective [m].
        dimension: d of the space.
        decode: space to recipe, pure.
        make_searcher: builds a fresh searcher.
        baselines: scored first; those with ``x`` warm-start the searcher.
        make_pool: builds the pool; called once, when the first job is ready.
        budget: trials of the search, baselines and calibration not counted; None where only
            ``item_budget`` ends it.
        parallel: candidates outstanding at a time; does not follow the number of workers.
        order: the searcher is told of results in the order of asking (``ask``), or of their
            arrival (``completion``): then no worker waits for a slow trial, and another run of
            the same search is another search.
        seed: of the searcher.
        scalarise: the searcher sees the weighted mean of the losses instead of all of them.
        finalists: how many trials are scored again on the validation items, beside baselines.
        listeners: told what happens.
        on_open: called when the journal is open and holds a study of these settings; what it
            raises ends the run.
        grace_seconds: how long a stop by signal waits for running trials.
        item_budget: item evaluations of the search, over all objectives: those that workers
            really did for its trials. Items that were known cost nothing, a failed trial all of
            its items. No trial is asked that could exceed it. None for no such limit.
        estimator: makes the values of item scores; None to take what the workers say.
        racing: stop trials early that cannot reach the front, or halve brackets of trials; None
            to score every trial on all its items.
        resampled: fresh search items for every generation; None for all of them, always.
        estimation: an estimated fitness; None for item scores as they are.
        aggregates: how values are made of item scores [m], written down for those who compare
            trials later; plain means where absent.
        spool: where workers leave evaluations until the journal has them.

    Raises:
        InputError: arguments that do not fit each other.
    """

    def __init__(
        self,
        directory: Path,
        *,
        identity: Mapping[str, Any],
        objectives: Sequence[Objective],
        splits: Sequence[ItemSplit],
        dimension: int,
        decode: Callable[[tuple[float, ...]], Recipe],
        make_searcher: Callable[[SearchProblem], Searcher],
        baselines: Sequence[Baseline],
        make_pool: Callable[[], Pool],
        budget: int | None,
        parallel: int,
        seed: int,
        scalarise: bool,
        finalists: int = 12,
        listeners: Sequence[StudyListener] = (),
        on_open: Callable[[], None] = lambda: None,
        grace_seconds: float = 60.0,
        item_budget: int | None = None,
        estimator: Estimator | None = None,
        racing: Racing | Halving | None = None,
        resampled: Resampled | None = None,
        estimation: Estimation | None = None,
        aggregates: Sequence[Aggregate] = (),
        order: Order = "ask",
        spool: Spool | None = None,
    ) -> None:
        if not objectives or len(splits) != len(objectives):
            raise InputError(
                f"study: expected one item split per objective, got {len(splits)} splits for "
                f"{len(objectives)} objectives"
            )
        limits = {
            "budget": budget, "parallel": parallel, "finalists": finalists,
            "item_budget": item_budget,
        }  # fmt: skip
        for name, value in limits.items():
            if value is not None and value < 1:
                raise InputError(f"study: {name} must be at least 1, got {value}")
        if budget is None and item_budget is None:
            raise InputError("study: budget or item_budget must be given, got neither")
        if isinstance(racing, Halving) and order != "ask":
            raise InputError(
                "study: halving compares the trials of a bracket, so that the searcher is told in "
                f"the order of asking; got order {order!r} (ask, or the racing rule front)"
            )
        if resampled is not None and estimation is not None:
            raise InputError(
                "study: resampled items and an estimator that chooses its own exclude each other"
            )
        if scalarise and sum(objective.weight for objective in objectives) <= 0:
            raise InputError("objectives: at least one weight must be above 0")
        self.directory = directory
        self.objectives = tuple(objectives)
        self.items: dict[Split, Items] = {
            "search": tuple(split.search for split in splits),
            "validation": tuple(split.validation for split in splits),
            "test": tuple(split.test for split in splits),
        }
        for split, ids in self.items.items():
            if any(ids) and not all(ids):
                raise InputError(f"study: some objectives have {split} items and some have none")
        if not all(self.items["search"]):
            raise InputError("study: expected search items for each objective, got none")
        self.dimension = dimension
        self.decode = decode
        self.make_searcher = make_searcher
        self.baselines = tuple(baselines)
        self.make_pool = make_pool
        self.budget = budget
        self.parallel = parallel
        self.seed = seed
        self.scalarise = scalarise
        self.finalists = finalists
        self.listeners = tuple(listeners)
        self.on_open = on_open
        self.grace_seconds = grace_seconds
        self.item_budget = item_budget
        self.estimator = estimator
        self.racing = racing
        self.resampled = resampled
        self.estimation = estimation
        self.aggregates = tuple(aggregates)
        self.order = order
        self.spool = spool
        self._identity = {"versions": library_versions(), **identity}

    def run(self, restart: bool = False) -> StudyView:
        """Run to the end, from wherever the journal stands.

        Args:
            restart: where the searcher does not repeat its recorded asks, go on with a fresh one
                that knows all results; its libraries may have changed.

        Raises:
            InputError: the study was begun with other settings; names each difference. Or it
                cannot go on with a fresh searcher.
            ReplayError: the searcher does not repeat its recorded asks; says what differs from
                when they were made, and what to do.
            NothingUsableError: every trial failed, or ten in a row did.
            Interrupted: stopped by a signal.
            LockedError: another driver works on this study.
            StorageError: the journal cannot be written or is damaged.
        """
        with StopSignals() as signals, Journal(self.directory) as journal:
            history = History.of(journal.records, str(self.directory))
            recorder = self._open(journal, history, restart)
            self.on_open()
            if self.spool is not None:
                self.spool.open()
            run = StudyRun(self, recorder, history, signals)
            try:
                run.all_phases()
                if self.spool is not None:
                    self.spool.clear()
            except ReplayError as error:
                raise ReplayError(explained(error, history, self), error.trial) from error
            except (InputError, SetupError) as error:
                recorder.append("stop", reason="error", message=str(error))
                raise
            finally:
                run.evaluations.close()
        view = StudyView.load(self.directory)
        run.notify("on_finish", view)
        return view

    @property
    def first(self) -> int:
        """Number of the first trial that a searcher asks: behind baselines and calibration."""
        calibration = 0 if self.estimation is None else self.estimation.calibration
        return len(self.baselines) + calibration

    @property
    def planned(self) -> int:
        """Trials of the search: the budget, or how many the item budget buys without a saving."""
        if self.budget is not None:
            return self.budget
        assert self.item_budget is not None
        sizes = [len(ids) for ids in self.items["search"]]
        if self.resampled is not None:
            sizes = [min(size, self.resampled.per_trial) for size in sizes]
        return max(1, self.item_budget // sum(sizes))

    def contract(self) -> dict[str, Any]:
        """Return everything that must be the same when the study is continued, as JSON data.

        What a study does not use is not there.
        """
        contract = {
            "identity": self._identity,
            "objectives": [objective_fields(objective) for objective in self.objectives],
            "items": {split: self.items[split] for split in SPLITS},
            "dimension": self.dimension,
            "budget": self.planned,
            "parallel": self.parallel,
            "seed": self.seed,
            "scalarise": self.scalarise,
            "finalists": self.finalists,
            "baselines": [baseline.label for baseline in self.baselines],
            **({"order": self.order} if self.order != "ask" else {}),
            **{key: value for key, value in self._economy().items() if value is not None},
        }
        plain: dict[str, Any] = json.loads(json.dumps(contract, allow_nan=False))
        return plain

    def _economy(self) -> dict[str, Any]:
        """Return how the study saves item evaluations; None for what it does not use."""
        estimation = self.estimation
        return {
            "open_ended": True if self.budget is None else None,
            "item_budget": self.item_budget,
            "racing": None if self.racing is None else asdict(self.racing),
            "resampled": None if self.resampled is None else asdict(self.resampled),
            "estimation": None if estimation is None else {
                "name": estimation.name,
                "full_every": estimation.full_every,
                "calibration": estimation.calibration,
                "settings": dict(estimation.settings),
                **({} if estimation.refresh is None else {"refresh": estimation.refresh}),
            },
        }  # fmt: skip

    def _open(self, journal: Journal, history: History, restart: bool) -> Recorder:
        """Begin or continue a journal; return where to write."""
        if history.opened is not None:
            self.require_same(history, restart)
            return go_on(self, journal, history, restart)
        aggregates = aggregate_fields(self.aggregates)
        more = {} if aggregates is None else {"aggregates": aggregates}
        here = dict(numerics.numerics())
        fields = {**self.contract(), **more, "numerics": here}
        history.add(journal.append("open", schema=SCHEMA, **fields))
        return journal

    def require_same(self, history: History, drift: bool = False) -> None:
        """Do nothing where a journal holds a study of these settings.

        Args:
            history: of the journal.
            drift: the versions of the libraries that searchers compute with may differ.

        Raises:
            InputError: it does not; names each difference.
        """
        assert history.opened is not None
        contract = dict.fromkeys(self._economy()) | self.contract() | {"order": self.order}
        recorded: dict[str, Any] = {key: history.opened.get(key) for key in contract}
        recorded["order"] = history.opened.get("order", "ask")
        states = [
            differences(compared({**recorded, "identity": identity}), compared(contract))
            for identity in asked_with(recorded["identity"], history)
        ]
        changed = states[0] if all(states) else []
        identity = with_versions_of(self.contract()["identity"], recorded["identity"])
        others = differences(compared(recorded), compared({**contract, "identity": identity}))
        if others or (changed and not drift):
            budgets = ("budget", "item_budget")
            more = any(recorded[key] != contract[key] for key in budgets)
            raise InputError(
                f"{self.directory}: this study was begun with other settings; restore them, or "
                "give the study file another `directory`:\n"
                + "\n".join(others if drift else changed)
                + ("\n  (a larger budget: leave the file, and use `evomerge extend`)" * more)
                + (f"\n  ({DRIFT})" if not others else "")
            )
