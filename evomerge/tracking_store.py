"""A study's place in MLflow: sends what is missing, in as few requests as MLflow allows.

Layout: one run per study (tag ``evomerge.study``) and one compact child run per finished trial
(tag ``evomerge.trial``). Anything long is an artifact: MLflow cuts off long parameters and tags.

Each point is there once, wherever a sender, the search or a server was killed: runs are found by
their tags before any is made, points carry the journal's times, of which MLflow keeps one each,
and what MLflow holds already is not sent. Two must not send at once, see ``evomerge.tracking``.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError
from evomerge.front_frames import frame, frame_steps
from evomerge.front_page import FrontPoint
from evomerge.front_plot import front_picture, save_front
from evomerge.metric_names import metric_name, objective_metrics, renamed
from evomerge.pareto_view import STUDIES, VIEW_TAG, pareto_view, studies_view
from evomerge.projection import (
    Projection,
    Step,
    artifact_texts,
    coefficient_params,
    study_metrics,
    trial_metrics,
    trial_params,
    trial_tags,
)
from evomerge.study_note import study_note
from evomerge.tracking_client import (
    Point,
    log_batch,
    log_pictures,
    logged_pictures,
    open_client,
    set_experiment_tags,
)
from evomerge.tracking_target import Synced, Target, pareto_page
from evomerge.trial import Trial, TrialState

if TYPE_CHECKING:
    from evomerge.tracking_client import Run

logger = logging.getLogger(__name__)

_METRICS_PER_REQUEST = 1000
_PARAM_CHARACTERS = 500
#: Names the chart of the front's film.
_FRAME_KEY = "front/over the trials"
#: Tag of a study's run: the metrics that are its objectives. None of their names has a comma.
_OBJECTIVES = "evomerge.objectives"
_STATUSES = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


def study_query(study: str) -> str:
    """Return the query that finds the run of a study by its identity."""
    return f"tags.`evomerge.study` = '{study}' and tags.`evomerge.kind` = 'study'"


def _objectives_of(study: Run) -> list[str]:
    """Return the metrics of a study's run that are objectives; of an old one in any order."""
    recorded = study.data.tags.get(_OBJECTIVES)
    if recorded:
        return str(recorded).split(", ")
    names = sorted(study.data.metrics)
    return [name.removeprefix("best/") for name in names if name.startswith("best/")]


def _now(projection: Projection, values: Mapping[str, float]) -> list[Point]:
    """Return values as points after as many steps as there are."""
    step = len(projection.steps)
    return [(name, value, projection.milliseconds, step) for name, value in values.items()]


@dataclass(slots=True)
class _Child:
    """What MLflow holds of a trial.

    Attributes:
        run: its id.
        tags, metrics: last values by name.
        params: whether it has its parameters.
        ended: whether its status is final: the last thing that is sent.
        shown: what the projection said of it when it was last compared.
    """

    run: str
    tags: dict[str, str]
    metrics: dict[str, float]
    params: bool = False
    ended: bool = False
    shown: tuple[object, ...] = ()


class Store:
    """Finds a study's runs once, then remembers what they hold.

    Args:
        target: where to send.

    Raises:
        InputError: the experiment was deleted.
        MlflowException: MLflow cannot be reached, here as in every method.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._client = open_client(target)
        self._experiment = self._find_experiment()
        self._run = ""
        self._children: dict[int, _Child] = {}  # by trial number
        self._metrics: dict[str, float] = {}  # of the study's run
        self._steps = 0
        self._sent = ""  # digest of the artifacts
        self._state = ""
        self._frames: set[int] = set()  # steps whose picture is there
        self._has_view = False

    def send(self, projection: Projection, pages: bool = True) -> Synced:
        """Send what is missing.

        Args:
            projection: of the study; without what only pages show where ``pages`` is false.
            pages: also artifacts, the description and pictures, which cost much more.
        """
        if not self._run:
            self._open(projection)
        points = {point.number: point for point in projection.front.points}
        new = 0
        for trial in projection.trials:
            if trial.state is not TrialState.ASKED:
                new += self._send_trial(trial, points.get(trial.number), projection)
        self._send_steps(projection.steps)
        self._send_view(projection)
        if pages:
            self._send_frames(projection)
            self._send_artifacts(projection)
        self._send_state(projection)
        return Synced(self._experiment, self._run, new)

    # -- what is there ---------------------------------------------------------------------------

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

    def _search(self, query: str) -> Iterator[Run]:
        """Yield the runs that match, oldest first."""
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], query, order_by=["attributes.start_time ASC"], page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _open(self, projection: Projection) -> None:
        """Find the study's run and its children, or create the run."""
        found = self._only(self._search(study_query(projection.study)))
        known: Mapping[str, str] = {}
        if found is None:
            tags = {"evomerge.study": projection.study, "evomerge.kind": "study"}
            # Of a study that is sent later it would begin after its end.
            created = self._client.create_run(
                self._experiment, projection.began or None, tags, projection.front.title
            )
            run = created.info.run_id
        else:
            run, known = found.info.run_id, found.data.params
            self._sent = found.data.tags.get("evomerge.artifacts", "")
            self._metrics = dict(found.data.metrics)
            self._steps = int(self._metrics.get("trials/finished", 0))
            self._find_children(run)
            self._frames = set(logged_pictures(self._client, run, _FRAME_KEY))
        missing = {
            key: value[:_PARAM_CHARACTERS]
            for key, value in projection.params.items()
            if key not in known
        }
        self._log(run, params=missing)
        self._run = run

    def _only(self, runs: Iterable[Run]) -> Run | None:
        """Return the oldest run; delete others, which a request that was sent twice has made."""
        first, *others = [*runs] or [None]
        for run in others:
            assert run is not None
            self._client.delete_run(run.info.run_id)
        return first

    def _find_children(self, parent: str) -> None:
        found: dict[int, list[Run]] = {}
        for run in self._search(f"tags.`mlflow.parentRunId` = '{parent}'"):
            if "evomerge.trial" in run.data.tags:
                found.setdefault(int(run.data.tags["evomerge.trial"]), []).append(run)
        for number, runs in found.items():
            only = self._only(sorted(runs, key=lambda run: run.info.status == "RUNNING"))
            assert only is not None
            data = only.data
            ended = only.info.status != "RUNNING"
            self._children[number] = _Child(
                only.info.run_id, dict(data.tags), dict(data.metrics), bool(data.params), ended
            )

    # -- trials ----------------------------------------------------------------------------------

    def _send_trial(self, trial: Trial, point: FrontPoint | None, projection: Projection) -> int:
        """Create or update the run of one trial; return 1 if it was new."""
        child = self._children.get(trial.number)
        recommended = trial.number == projection.front.knee
        shown = (
            trial.state, trial.evaluation, trial.recipe, recommended,
            point and (point.front, point.kind, point.validation, point.test),
        )  # fmt: skip
        if child is not None and child.shown == shown:
            return 0
        tags = trial_tags(trial, point, projection.front.knee)
        fixed = ("evomerge.state", "evomerge.recipe")
        if child is not None and any(child.tags.get(key, tags[key]) != tags[key] for key in fixed):
            # The trial had failed and was run again, perhaps as another merge: MLflow can change
            # neither parameters nor the end of a run.
            self._client.delete_run(child.run)
            child = None
        arrived = projection.arrived.get(trial.number, int(time.time() * 1000))
        new = child is None
        child = child or self._create(trial, tags, arrived)
        if tags["front"] == "true" and (new or child.tags.get("front") != "true"):
            self._client.log_text(child.run, trial.recipe.to_json(), "recipe.json")
        means = projection.subset_means.get(trial.number, ())
        metrics = trial_metrics(trial, point, projection.front, means)
        fresh = {name: value for name, value in metrics.items() if name not in child.metrics}
        changed = {
            name: value for name, value in metrics.items()
            if name not in fresh and value != child.metrics[name]
        }  # fmt: skip
        self._log(
            child.run,
            # A value that changes is a point of its own: how many trials had been finished.
            metrics=[
                *((name, value, arrived, 0) for name, value in fresh.items()),
                *_now(projection, changed),
            ],
            params={} if child.params else trial_params(trial),
            tags={key: value for key, value in tags.items() if child.tags.get(key) != value},
        )  # fmt: skip
        if not child.ended:
            done = trial.state is TrialState.DONE
            self._client.set_terminated(child.run, "FINISHED" if done else "FAILED", arrived)
        child.tags |= tags
        child.metrics |= metrics
        child.params = child.ended = True
        child.shown = shown
        return int(new)

    def _create(self, trial: Trial, tags: Mapping[str, str], arrived: int) -> _Child:
        """Create the run of a trial with its tags: the cheapest way to set them."""
        seconds = 0.0 if trial.evaluation is None else sum(trial.evaluation.seconds.values())
        identity = {"mlflow.parentRunId": self._run, "evomerge.trial": str(trial.number)}
        created = self._client.create_run(
            self._experiment,
            start_time=arrived - int(1000 * seconds),
            run_name=trial.label or f"trial {trial.number}",
            tags={**identity, **tags},
        )
        child = _Child(created.info.run_id, {**identity, **tags}, {})
        self._children[trial.number] = child
        return child

    # -- the study's run -------------------------------------------------------------------------

    def _send_steps(self, steps: Sequence[Step]) -> None:
        """Log the series of the study's run from the first step that it lacks."""
        batch: list[Point] = []
        for number, step in enumerate(steps[self._steps :], start=self._steps + 1):
            # "trials/finished" comes last: a step that has it is complete.
            entries = [*step.metrics.items(), ("trials/finished", float(number))]
            if len(batch) + len(entries) > _METRICS_PER_REQUEST:
                self._log(self._run, metrics=batch)
                batch = []
            batch += [(name, value, step.milliseconds, number) for name, value in entries]
        self._log(self._run, metrics=batch)
        self._steps = max(self._steps, len(steps))

    def _send_frames(self, projection: Projection) -> None:
        """Log the front as a picture now and then: MLflow shows them with a slider."""
        baselines = sum(trial.kind == "baseline" for trial in projection.trials)
        settled = len(projection.steps)
        new: dict[int, tuple[Any, int]] = {}
        steps = frame_steps(projection.planned, settled, max(1, baselines))
        # MLflow's slider begins at 0: there are the baselines alone.
        for step in [0, *steps] if settled >= max(1, baselines) else []:
            if step in self._frames:
                continue
            shown = frame(projection.front, step or baselines)
            if shown.points:
                milliseconds = projection.steps[(step or baselines) - 1].milliseconds
                new[step] = (front_picture(shown), milliseconds)
            self._frames.add(step)
        log_pictures(self._client, self._run, _FRAME_KEY, new)

    def _send_view(self, projection: Projection) -> None:
        """Save the Pareto page and the list of studies as views, once per process."""
        recipes = [trial.recipe for trial in projection.trials]
        if self._has_view or not recipes:
            return
        self._has_view = True
        began = int(self._client.get_run(self._run).info.start_time)
        objectives = objective_metrics(projection.front.objectives)
        self._log(self._run, tags={_OBJECTIVES: ", ".join(objectives)})
        studies = [*self._search("tags.`evomerge.kind` = 'study'")]
        first = min(int(run.info.start_time) for run in studies)
        params = [metric_name(name) for name in coefficient_params(recipes[-1])]
        views = {
            self._run: pareto_view(projection.front.title, self._run, objectives, params, began),
            STUDIES: studies_view([_objectives_of(run) for run in reversed(studies)], first),
        }
        tags = self._client.get_experiment(self._experiment).tags
        missing = {
            VIEW_TAG + key: view for key, view in views.items() if tags.get(VIEW_TAG + key) != view
        }
        problem = set_experiment_tags(self._client, self._experiment, missing)
        if problem:
            logger.warning(
                "MLflow took no saved view (%s): its Pareto page shows no charts, front.html does",
                problem,
            )

    def _send_artifacts(self, projection: Projection) -> None:
        texts = artifact_texts(projection)
        shown = [*sorted(texts.items()), *renamed(projection.front.objectives).items()]
        digest = blake2b(repr(shown).encode(), digest_size=16).hexdigest()
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
        best = study_metrics(projection.front)
        new = {name: value for name, value in best.items() if self._metrics.get(name) != value}
        self._log(
            self._run,
            metrics=_now(projection, new),
            tags={
                "mlflow.note.content": study_note(projection, self._run, link),
                "evomerge.artifacts": digest,
            },
        )
        self._metrics |= best
        self._sent = digest

    def _send_state(self, projection: Projection) -> None:
        if projection.state == self._state:
            return
        self._client.set_tag(self._run, "evomerge.state", projection.state)
        if projection.state == "running":
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._client.set_terminated(
                self._run, _STATUSES[projection.state], projection.milliseconds or None
            )
        self._state = projection.state

    def _log(
        self,
        run: str,
        *,
        metrics: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        named = {metric_name(name): value for name, value in (params or {}).items()}
        log_batch(self._client, run, metrics, named, tags)
