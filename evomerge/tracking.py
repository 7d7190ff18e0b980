"""MLflow shows a study; the journal is the truth.

What MLflow holds is a projection: ``sync`` compares it with a snapshot of the study and sends
what is missing, so it can be repeated, interrupted and done later. ``Tracker`` does the same
beside a running search, in a thread of its own, and never blocks or fails it.

Layout: one run per study (tag ``evomerge.study``) and one compact child run per finished trial
(tag ``evomerge.trial``). Anything long is an artifact: MLflow cuts off long parameters and tags.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError, SetupError
from evomerge.front_frames import frame, frame_steps
from evomerge.front_page import FrontData, FrontPoint
from evomerge.front_plot import front_picture, save_front
from evomerge.pareto_view import STUDIES, VIEW_TAG, pareto_view, studies_view
from evomerge.projection import (
    Projection,
    Step,
    artifact_texts,
    coefficient_params,
    metric_name,
    study_metrics,
    trial_metrics,
    trial_params,
    trial_tags,
)
from evomerge.study_note import study_note
from evomerge.tracking_target import Synced, Target, is_absent, pareto_page
from evomerge.trial import Trial, TrialState

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

#: Short limits: by default MLflow retries an unreachable server for 246 s per call.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
#: Seconds between two updates at least.
_PAUSE_SECONDS = 2.0
#: Share of the time that reading the journal may take: it grows with the journal, and while it
#: runs the search, in another thread of this process, stands still.
_SHARE = 0.05
#: Seconds until an unreachable server is tried again; doubled up to the last.
_RETRY_SECONDS = (5.0, 60.0)
_METRICS_PER_REQUEST = 1000
_PARAM_CHARACTERS = 500
#: Names the chart; MLflow writes the slash as a hash into the names of files.
_FRAME_KEY = "front/over the trials"
_STATUSES = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


def sync(projection: Projection, target: Target) -> Synced:
    """Send to MLflow whatever it lacks of a study; repeating it changes nothing.

    Raises:
        SetupError: the server refused or cannot be reached, the store cannot be written.
        InputError: the experiment was deleted.
    """
    _limit_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        return _Store(target).send(projection)
    except (MlflowException, OSError) as error:
        raise SetupError(
            f"MLflow at {target.uri} cannot be updated: {_first_line(error)} (start the server or "
            "mend the URI; nothing is lost, what is missing is sent next time)"
        ) from error


def find(study: str, target: Target) -> Synced | None:
    """Return where MLflow shows a study, None where it does not; writes nothing.

    Args:
        study: identity of the study, as in its projection.
        target: where it is tracked.

    Raises:
        SetupError: MLflow cannot be reached.
    """
    if is_absent(target):
        return None
    client = _client(target.uri)
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(target.experiment)
        if found is None:
            return None
        runs = client.search_runs([found.experiment_id], _study_query(study), max_results=1)
    except (MlflowException, OSError) as error:
        raise SetupError(f"MLflow at {target.uri} cannot be read: {_first_line(error)}") from error
    return Synced(str(found.experiment_id), runs[0].info.run_id, 0) if runs else None


def _study_query(study: str) -> str:
    return f"tags.`evomerge.study` = '{study}' and tags.`evomerge.kind` = 'study'"


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    # MLflow quotes the whole report of urllib3; its end says what happened.
    _, failed, report = text.partition(" failed with exception ")
    if failed:
        text = "no answer: " + report.rpartition(": ")[2].strip("\"')")
    return text[:300]


class _Store:
    """One study's place in MLflow: finds its runs once, then remembers what they hold."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._client = _client(target.uri)
        self._experiment = self._find_experiment()
        self._run = ""
        self._children: dict[int, dict[str, str]] = {}  # trial number → run id and tags
        self._steps = 0
        self._sent = ""  # digest of the artifacts
        self._state = ""
        self._frames: set[int] = set()  # steps whose picture is there
        self._has_view = False

    def send(self, projection: Projection) -> Synced:
        if not self._run:
            self._open(projection)
        points = {point.number: point for point in projection.front.points}
        new = 0
        for trial in projection.trials:
            if trial.state is not TrialState.ASKED:
                new += self._send_trial(trial, points.get(trial.number), projection.front)
        self._send_steps(projection.steps)
        self._send_frames(projection)
        self._send_artifacts(projection)
        self._send_view(projection)
        self._send_state(projection)
        return Synced(self._experiment, self._run, new)

    def _find_experiment(self) -> str:
        found = self._client.get_experiment_by_name(self._target.experiment)
        if found is None:
            return str(
                self._client.create_experiment(
                    self._target.experiment, artifact_location=self._target.artifacts
                )
            )
        if found.lifecycle_stage != "active":
            raise InputError(
                f"tracking.experiment: {self._target.experiment!r} was deleted in MLflow "
                "(restore it there, or use another name)"
            )
        return str(found.experiment_id)

    def _search(self, query: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs([self._experiment], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _open(self, projection: Projection) -> None:
        """Find the study's run and its children, or create the run."""
        found = next(self._search(_study_query(projection.study)), None)
        if found is None:
            tags = {"evomerge.study": projection.study, "evomerge.kind": "study"}
            created = self._client.create_run(
                self._experiment, run_name=projection.front.title, tags=tags
            )
            self._run = created.info.run_id
        else:
            self._run = found.info.run_id
            self._sent = found.data.tags.get("evomerge.artifacts", "")
            last = self._client.get_metric_history(self._run, "trials/finished")
            self._steps = max((int(metric.step) for metric in last), default=0)
            for child in self._search(f"tags.`mlflow.parentRunId` = '{self._run}'"):
                tags = dict(child.data.tags)
                if "evomerge.trial" in tags:
                    tags["run_id"] = child.info.run_id
                    self._children[int(tags["evomerge.trial"])] = tags
            for picture in self._client.list_artifacts(self._run, "images"):
                key, _, rest = Path(picture.path).name.partition("%step%")
                if key == _FRAME_KEY.replace("/", "#"):
                    self._frames.add(int(rest.partition("%")[0]))
        known = {} if found is None else dict(found.data.params)
        self._log(
            self._run,
            params={
                k: v[:_PARAM_CHARACTERS] for k, v in projection.params.items() if k not in known
            },
        )

    def _send_trial(self, trial: Trial, point: FrontPoint | None, front: FrontData) -> int:
        """Create or update the run of one trial; return 1 if it was new."""
        tags, metrics = trial_tags(trial, point, front.knee), trial_metrics(trial, point, front)
        digest = blake2b(repr(sorted(metrics.items())).encode(), digest_size=8).hexdigest()
        # Written last, so that a run without it was interrupted and is sent again.
        tags["evomerge.digest"] = digest
        known = self._children.get(trial.number)
        fixed = ("evomerge.state", "evomerge.recipe")
        if known is not None and any(known.get(key, tags[key]) != tags[key] for key in fixed):
            # The trial had failed and was run again, perhaps as another merge: MLflow can change
            # neither parameters nor the end of a run.
            self._client.delete_run(known["run_id"])
            known = None
        if known is not None and all(known.get(key) == value for key, value in tags.items()):
            return 0
        if known is None:
            identity = {"mlflow.parentRunId": self._run, "evomerge.trial": str(trial.number)}
            name = trial.label or f"trial {trial.number}"
            created = self._client.create_run(self._experiment, run_name=name, tags=identity)
            run = created.info.run_id
        else:
            run = known["run_id"]
        if tags["front"] == "true" and (known or {}).get("front") != "true":
            self._client.log_text(run, trial.recipe.to_json(), "recipe.json")
        params = {} if known and "evomerge.digest" in known else trial_params(trial)
        self._log(run, metrics=metrics, params=params, tags=tags)
        if known is None or "evomerge.digest" not in known:
            done = trial.state is TrialState.DONE
            self._client.set_terminated(run, "FINISHED" if done else "FAILED")
        self._children[trial.number] = {**tags, "run_id": run}
        return int(known is None)

    def _send_steps(self, steps: Sequence[Step]) -> None:
        """Log the series of the study's run from the first step that it lacks."""
        from mlflow.entities import Metric

        batch: list[Any] = []
        for number, step in enumerate(steps[self._steps :], start=self._steps + 1):
            # "trials/finished" comes last: a step that has it is complete.
            entries = [*step.metrics.items(), ("trials/finished", float(number))]
            if len(batch) + len(entries) > _METRICS_PER_REQUEST:
                self._client.log_batch(self._run, metrics=batch)
                batch = []
            batch += [
                Metric(metric_name(name), value, step.milliseconds, number)
                for name, value in entries
            ]
        if batch:
            self._client.log_batch(self._run, metrics=batch)
        self._steps = max(self._steps, len(steps))

    def _send_frames(self, projection: Projection) -> None:
        """Log the front as a picture now and then: MLflow shows them with a slider."""
        baselines = sum(trial.kind == "baseline" for trial in projection.trials)
        settled = len(projection.steps)
        steps = frame_steps(projection.planned, settled, max(1, baselines))
        # MLflow's slider begins at 0: there are the baselines alone.
        for step in [0, *steps] if settled >= max(1, baselines) else []:
            if step in self._frames:
                continue
            shown = frame(projection.front, step or baselines)
            if shown.points:
                milliseconds = projection.steps[(step or baselines) - 1].milliseconds
                self._client.log_image(
                    self._run, front_picture(shown), key=_FRAME_KEY, step=step,
                    timestamp=milliseconds, synchronous=True,
                )  # fmt: skip
            self._frames.add(step)

    def _send_view(self, projection: Projection) -> None:
        """Save the Pareto page and the list of studies as views, once per process."""
        from mlflow.exceptions import MlflowException

        recipes = [trial.recipe for trial in projection.trials]
        if self._has_view or not recipes:
            return
        self._has_view = True
        began = int(self._client.get_run(self._run).info.start_time)
        objectives = [metric_name(objective.name) for objective in projection.front.objectives]
        params = [metric_name(name) for name in coefficient_params(recipes[-1])]
        views = {
            self._run: pareto_view(projection.front.title, self._run, objectives, params, began),
            STUDIES: studies_view(objectives, began),
        }
        tags = self._client.get_experiment(self._experiment).tags
        try:
            for key, view in views.items():
                if tags.get(VIEW_TAG + key) != view:
                    self._client.set_experiment_tag(self._experiment, VIEW_TAG + key, view)
        except MlflowException as error:  # not allowed to, or too long for this server
            logger.warning(
                "MLflow took no saved view (%s): its Pareto page shows no charts, front.html does",
                _first_line(error),
            )

    def _send_artifacts(self, projection: Projection) -> None:
        texts = artifact_texts(projection)
        digest = blake2b(repr(sorted(texts.items())).encode(), digest_size=16).hexdigest()
        if digest == self._sent:
            return
        with tempfile.TemporaryDirectory(prefix="evomerge-") as name:
            folder = Path(name)
            for path, text in texts.items():
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_text(text, encoding="utf-8")
            if projection.state != "running" and any(
                point.front for point in projection.front.points
            ):
                save_front(projection.front, folder / "front.png")
            self._client.log_artifacts(self._run, name)
        link = pareto_page(Synced(self._experiment, self._run, 0))
        tags = {
            "mlflow.note.content": study_note(projection, self._run, link),
            "evomerge.artifacts": digest,
        }
        self._log(self._run, metrics=study_metrics(projection.front), tags=tags)
        self._sent = digest

    def _send_state(self, projection: Projection) -> None:
        if projection.state == self._state:
            return
        self._client.set_tag(self._run, "evomerge.state", projection.state)
        if projection.state == "running":
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._client.set_terminated(self._run, _STATUSES[projection.state])
        self._state = projection.state

    def _log(
        self,
        run: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            run,
            [Metric(metric_name(k), v, now, 0) for k, v in (metrics or {}).items()],
            [Param(metric_name(k), v) for k, v in (params or {}).items()],
            [RunTag(k, v) for k, v in (tags or {}).items()],
        )


def _limit_mlflow() -> None:
    """Set what MLflow reads from the environment when it is imported; the user's values stay."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It announces every retry in paragraphs; what comes of them is said once, by ``Tracker``.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def _client(uri: str) -> MlflowClient:
    _limit_mlflow()
    from mlflow.tracking import MlflowClient

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def pause_seconds(work: float) -> float:
    """Return how long to rest after reading the journal for ``work`` seconds."""
    return max(_PAUSE_SECONDS, work * (1 / _SHARE - 1))


class Tracker:
    """Keeps MLflow up to date beside a running search.

    Args:
        load: returns the projection of the study as its journal stands; called in the thread.
        target: where to track.
    """

    def __init__(self, load: Callable[[], Projection], target: Target) -> None:
        self._load = load
        self._target = target
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._synced: Synced | None = None
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="evomerge-mlflow", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why the last attempt failed; empty when MLflow is up to date or being updated."""
        with self._lock:
            return self._problem

    @property
    def synced(self) -> Synced | None:
        """Where the study is shown; None until MLflow was reached."""
        with self._lock:
            return self._synced

    def notify(self) -> None:
        """Say that the journal has grown; returns at once."""
        self._wake.set()

    def close(self, seconds: float = 30.0) -> bool:
        """Send what is left and stop.

        Args:
            seconds: how long to wait; after it the thread is left to end with the process.

        Returns:
            whether MLflow holds everything; if not, ``evomerge sync`` sends the rest later.
        """
        self._closing.set()
        self._wake.set()
        self._thread.join(seconds)
        return not self._thread.is_alive() and not self.problem

    def _run(self) -> None:
        store: _Store | None = None
        retry = pause = 0.0
        while True:
            self._wake.wait()
            self._wake.clear()
            # Read before the work, so that a close in between causes one more round.
            closing = self._closing.is_set()
            try:
                store = store or _Store(self._target)
                began = time.monotonic()
                projection = self._load()
                pause = pause_seconds(time.monotonic() - began)
                synced = store.send(projection)
            except Exception as error:  # the search must not fail because its display does
                store = None
                retry = min(retry * 2, _RETRY_SECONDS[1]) or _RETRY_SECONDS[0]
                self._failed(error)
                self._wake.set()
            else:
                retry = 0.0
                with self._lock:
                    self._synced, self._problem = synced, ""
            if closing:
                return
            self._closing.wait(retry or pause)

    def _failed(self, error: Exception) -> None:
        first = not self.problem
        with self._lock:
            self._problem = f"{type(error).__name__}: {_first_line(error)}"
        if first:
            logger.warning(
                "MLflow at %s cannot be updated (%s). The search goes on and its results are "
                "kept; `evomerge sync` sends them later.",
                self._target.uri,
                self._problem,
            )
