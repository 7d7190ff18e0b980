"""Run a prepared study: resolved file, journal, pool, tracking."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

from evomerge.config import StudyFile, load
from evomerge.economy import economy
from evomerge.errors import EvomergeError, InputError, NothingUsableError, StorageError
from evomerge.fitness.aggregate import MeanEstimator
from evomerge.interrupt import grace_seconds
from evomerge.journal import JOURNAL as JOURNAL_FILE
from evomerge.merge.masses import MASSES_FILE, store_masses
from evomerge.numerics import SEARCH_PACKAGES
from evomerge.pool import Pool
from evomerge.prepare import Prepared
from evomerge.presentation import STUDY_FILE, project
from evomerge.spool import SPOOL, Spool, SpoolingFactory
from evomerge.study import Phase, Progress, Study, StudyListener
from evomerge.study_record import Result, Split, library_versions
from evomerge.study_view import StudyState, StudyView
from evomerge.take_home import export_trial
from evomerge.tracking import Tracker, find, only_sender, sync
from evomerge.tracking_models import Logged, Which, log_models
from evomerge.tracking_target import Synced, Target, anchored_uri, tracking_target
from evomerge.trial import Trial, WorkerFactory

#: How long MLflow may take for what is left: at the end, and when the study is stopped. What it
#: lacks then is sent by the next run, or by ``evomerge sync``.
_END_SECONDS, _STOP_SECONDS = 30.0, 3.0
#: How long to wait for the tracker of a run that was killed: it may send for 20 s more.
_SENDER_SECONDS = 30.0


@dataclass(frozen=True)
class Finished:
    """A study that ran to its end.

    Attributes:
        view: what came out.
        target: where it is tracked, None when tracking is off.
        synced: its run in MLflow, None when MLflow was not reached.
        problem: why MLflow lacks something; empty when it holds everything.
    """

    view: StudyView
    target: Target | None
    synced: Synced | None
    problem: str


def run(
    prepared: Prepared,
    listeners: Sequence[StudyListener],
    starting: Callable[[], None] = lambda: None,
    sending: Callable[[float], None] = lambda seconds: None,
    restart: bool = False,
) -> Finished:
    """Run a study to its end, from wherever its journal stands.

    Args:
        prepared: checked study file.
        listeners: are told what happens.
        starting: is called before the workers start; a finished study needs none.
        sending: is called where MLflow lacks something at the end, with how many seconds that may
            take.
        restart: as of ``Study.run``.

    Raises:
        EvomergeError: as ``Study.run``.
    """

    def make_pool() -> Pool:
        starting()
        return prepared.make_pool(partial(_spooling, prepared))

    target = _target(prepared.file, prepared.directory, prepared.root)
    tracking = _Tracking(prepared, target)
    study = study_of(prepared, make_pool, [*listeners, tracking], lambda: _save_settings(prepared))
    try:
        view = study.run(restart)
    except BaseException:
        tracking.close(_STOP_SECONDS)
        raise
    tracking.close(_END_SECONDS, lambda: sending(_END_SECONDS))
    tracker = tracking.tracker
    if tracker is None or target is None:
        return Finished(view, target, None, "")
    synced, problem = tracker.synced, tracker.problem
    if synced is not None and not problem:
        problem = _model_problem(view, target, synced, prepared.file.tracking.log_model)
    return Finished(view, target, synced, problem)


def _model_problem(view: StudyView, target: Target, synced: Synced, which: Which) -> str:
    """Log models and mark those of before; return why that failed, or nothing."""
    try:
        _log_models(view, target, synced, which)
    except EvomergeError as error:
        return f"its models are not up to date: {error}"
    return ""


def _log_models(
    view: StudyView, target: Target, synced: Synced, which: Which
) -> tuple[Logged, ...]:
    return log_models(
        view, target, synced, which, lambda number, out: export_trial(view, trial=number, out=out)
    )


def study_of(
    prepared: Prepared,
    make_pool: Callable[[], Pool],
    listeners: Sequence[StudyListener] = (),
    on_open: Callable[[], None] = lambda: None,
) -> Study:
    """Return the study of a checked study file, as it is run and replayed."""
    parallel = prepared.parallel
    if (prepared.directory / JOURNAL_FILE).exists() and prepared.file.search.parallel is None:
        # The window is part of the replay contract; the number of workers may have changed.
        parallel = _recorded_parallel(prepared.directory) or parallel
    return Study(
        prepared.directory,
        identity=prepared.identity(),
        objectives=prepared.tasks.objectives,
        splits=prepared.splits,
        dimension=prepared.space.dimension,
        decode=prepared.space.decode,
        make_searcher=prepared.make_searcher,
        baselines=prepared.baselines,
        make_pool=make_pool,
        budget=prepared.file.search.trials,
        item_budget=prepared.file.search.items,
        estimator=MeanEstimator(prepared.tasks.aggregates),
        aggregates=prepared.tasks.aggregates,
        **economy(prepared.file, prepared.root, prepared.tasks),
        parallel=parallel,
        seed=prepared.file.seed,
        scalarise=prepared.scalarise,
        finalists=prepared.file.search.finalists,
        listeners=listeners,
        on_open=on_open,
        order=prepared.file.search.order,
        grace_seconds=grace_seconds(),
        spool=_spool(prepared),
    )


def with_recorded_batch(prepared: Prepared, factory: WorkerFactory) -> WorkerFactory:
    """Return a factory of workers with the batch size that was found when the study began.

    Another one can change the last bits of scores. Where it does not fit any more (another GPU, a
    fuller one) it shrinks as it would have at first. A study that has found none yet, or was
    given one, keeps the factory as it is.
    """
    from evomerge.worker import ModelWorkerFactory

    found = StudyView.load(prepared.directory).facts.get("batch_tokens", "")
    given = prepared.file.fitness.batch_tokens is not None
    if given or not found.isdigit() or not isinstance(factory, ModelWorkerFactory):
        return factory
    return replace(factory, batch_tokens=int(found), batch_found=True)


def _spooling(prepared: Prepared, factory: WorkerFactory) -> WorkerFactory:
    """Return a factory of workers that keep what they measured until it has arrived."""
    factory = with_recorded_batch(prepared, factory)
    spool = _spool(prepared)
    return factory if spool is None else SpoolingFactory(factory, spool.directory, spool.owner)


def _spool(prepared: Prepared) -> Spool | None:
    """Return where workers of their own processes leave evaluations; None for the serial pool."""
    if prepared.file.pool.kind == "serial":
        return None
    identity, versions = prepared.identity(), library_versions()
    # What only searchers compute with decides no score, and a restarted search may have others.
    scored = {key: value for key, value in identity.items() if key != "libraries"}
    kept = {name: found for name, found in versions.items() if name not in SEARCH_PACKAGES}
    former = _digest([identity, versions])
    return Spool(prepared.directory.resolve() / SPOOL, _digest([scored, kept]), former)


def _digest(facts: object) -> str:
    return blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _target(file: StudyFile, directory: Path, root: Path) -> Target | None:
    if not file.tracking.enabled:
        return None
    given = file.tracking.uri
    uri = anchored_uri(given, root) if given else os.environ.get("MLFLOW_TRACKING_URI") or None
    return tracking_target(uri, file.tracking.experiment, directory)


def _recorded_parallel(directory: Path) -> int | None:
    try:
        value = StudyView.load(directory).contract["parallel"]
    except StorageError:
        return None  # Study.run reports what is wrong with the journal
    return int(value)


def _save_settings(prepared: Prepared) -> None:
    """Write what the study was begun with into its directory."""
    save_resolved(prepared.file, prepared.directory, prepared.root)
    if prepared.masses is not None:
        store_masses(prepared.directory / MASSES_FILE, prepared.models, prepared.masses)


def save_resolved(file: StudyFile, directory: Path, root: Path) -> None:
    """Write the study file with its defaults into the study's directory, atomically.

    Raises:
        StorageError: it cannot be written.
    """
    update: dict[str, object] = {"directory": file.directory or f"studies/{file.name}"}
    if file.tracking.uri:
        # ``evomerge sync`` knows the study's directory, not where the user's file lies.
        uri = anchored_uri(file.tracking.uri, root)
        update["tracking"] = file.tracking.model_copy(update={"uri": uri})
    temporary = directory / f".{STUDY_FILE}.tmp"
    try:
        temporary.write_text(file.model_copy(update=update).to_yaml(), encoding="utf-8")
        temporary.replace(directory / STUDY_FILE)
    except OSError as error:
        raise StorageError(
            f"{directory / STUDY_FILE}: cannot be written: {error.strerror or error} (free some "
            "space or mend the directory, then run the same command again)"
        ) from error


def sync_study(
    directory: Path, log_model: Which | None = None
) -> tuple[Synced, tuple[Logged, ...]]:
    """Send to MLflow whatever it lacks of the study in ``directory``.

    Args:
        directory: of the study.
        log_model: merges that are to be logged as models; None for what the study file says,
            where the study is finished.

    Returns:
        Where it is shown, and the logged models.

    Raises:
        InputError: tracking is off in the study, or the study was never run.
        LockedError: its own run is sending.
        NothingUsableError: models are wanted of a study that is not finished.
        SetupError: MLflow cannot be reached.
    """
    target, view = _tracked(directory), StudyView.load(directory)
    with only_sender(directory, _SENDER_SECONDS):
        synced = sync(project(view), target)
        if log_model is None and view.state is StudyState.FINISHED:
            log_model = load(directory / STUDY_FILE).tracking.log_model
        return synced, _log_models(view, target, synced, log_model or "none")


def locate_study(view: StudyView) -> tuple[Target, Synced]:
    """Return where a study is shown in MLflow; one that is not running is brought up to date.

    Raises:
        InputError: tracking is off in the study.
        NothingUsableError: it is running and MLflow has nothing of it yet.
        SetupError: MLflow cannot be reached.
    """
    target, projection = _tracked(view.directory), project(view)
    if view.state is not StudyState.RUNNING:
        with only_sender(view.directory, _SENDER_SECONDS):
            return target, sync(projection, target)
    # Its own driver writes to MLflow.
    synced = find(projection.study, target)
    if synced is None:
        raise NothingUsableError(
            f"{view.directory}: MLflow has nothing of this study yet (it is running: try again "
            "in a moment)"
        )
    return target, synced


def _tracked(directory: Path) -> Target:
    path = directory / STUDY_FILE
    if not path.exists():
        raise InputError(f"{directory}: no {STUDY_FILE} there (evomerge run writes it)")
    target = _target(load(path), directory, directory)
    if target is None:
        raise InputError(f"{path}: tracking.enabled is false")
    return target


class _Tracking(StudyListener):
    """Starts the tracker when the study has begun."""

    def __init__(self, prepared: Prepared, target: Target | None) -> None:
        self.tracker: Tracker | None = None
        self._prepared = prepared
        self._target = target

    def on_phase(self, phase: Phase, total: int) -> None:
        self._notify()

    def on_workers(self, facts: Mapping[str, str]) -> None:
        self._notify()

    def on_progress(self, progress: Progress) -> None:
        self._notify()

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        self._notify()

    def on_score(self, trial: Trial, split: Split, result: Result) -> None:
        self._notify()

    def on_finish(self, view: StudyView) -> None:
        self._notify()

    def _notify(self) -> None:
        if self._target is None:
            return
        if self.tracker is None:
            self.tracker = Tracker(self._prepared.directory, self._target)

    def close(self, seconds: float, waiting: Callable[[], None] = lambda: None) -> None:
        if self.tracker is not None:
            self.tracker.close(seconds, waiting)
