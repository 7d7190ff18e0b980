"""Merges as MLflow logged models: the directories that ``evomerge export`` writes.

Plain artifacts and no flavour: MLflow's transformers flavour would load the model, guess its
requirements and write its weights a second time. What is logged here was verified when it was
written, and loads by ``AutoModelForCausalLM.from_pretrained`` from where
``mlflow.artifacts.download_artifacts("models:/<id>")`` puts it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evomerge.errors import NothingUsableError
from evomerge.study_view import StudyState, StudyView
from evomerge.tracking_client import link_model, open_client, setup_errors
from evomerge.tracking_target import Synced, Target

if TYPE_CHECKING:
    from evomerge.tracking_client import LoggedModel, MlflowClient

_READY: Literal["READY"] = "READY"
Which = Literal["none", "knee", "front"]
#: Writes a trial as a checkpoint into a directory that is not there yet.
Write = Callable[[int, Path], object]


@dataclass(frozen=True, slots=True)
class Logged:
    """A merge in MLflow.

    Attributes:
        trial: its number.
        model: id of the logged model.
        new: whether it was logged now.
    """

    trial: int
    model: str
    new: bool


def log_models(
    view: StudyView, target: Target, synced: Synced, which: Which, write: Write
) -> tuple[Logged, ...]:
    """Log merges of a finished study; those that are there already are left alone.

    Args:
        view: the study.
        target: where it is tracked.
        synced: its run, which must have all its trials.
        which: the recommended merge, or the whole front.
        write: see ``Write``; one merge at a time lies beside the journal until it is sent.

    Raises:
        NothingUsableError: the study is not finished.
        SetupError: MLflow cannot be reached.
        EvomergeError: as ``write``.
    """
    if which == "none":
        return ()
    if view.state is not StudyState.FINISHED or view.knee is None:
        raise NothingUsableError(
            f"{view.directory}: the study is {view.state}, its front may change (models are "
            "logged of a finished study: run it to its end first)"
        )
    with setup_errors(
        f"MLflow at {target.uri} takes no models",
        "what is missing is logged by: evomerge sync STUDY --log-model ...",
    ):
        return tuple(_logged(view, target, synced, which, write))


def _logged(
    view: StudyView, target: Target, synced: Synced, which: Which, write: Write
) -> Iterator[Logged]:
    client = open_client(target)
    runs = {
        int(run.data.tags["evomerge.trial"]): run.info.run_id
        for run in client.search_runs(
            [synced.experiment_id],
            f"tags.`mlflow.parentRunId` = '{synced.run_id}' and tags.front = 'true'",
            max_results=5000,
        )
    }
    there = _there(client, synced)
    for number in view.front if which == "front" else [view.knee]:
        assert number is not None
        if number in there:
            yield Logged(number, there[number], new=False)
            continue
        with tempfile.TemporaryDirectory(prefix=".model-", dir=view.directory) as folder:
            write(number, Path(folder) / "model")
            model = _log(client, view, synced, number, runs[number], Path(folder) / "model")
        yield Logged(number, model, new=True)


def _there(client: MlflowClient, synced: Synced) -> dict[int, str]:
    """Return the ids of the study's models by trial; half a model is deleted."""
    found: dict[int, str] = {}
    for model in _search(client, synced):
        number = int(model.tags["evomerge.trial"])
        if model.status != _READY or number in found:
            client.delete_logged_model(model.model_id)
        else:
            found[number] = model.model_id
    return found


def _search(client: MlflowClient, synced: Synced) -> Sequence[LoggedModel]:
    query = f"tags.`evomerge.study_run` = '{synced.run_id}'"
    models: list[LoggedModel] = []
    token = None
    while True:
        page = client.search_logged_models([synced.experiment_id], query, page_token=token)
        models += page
        token = page.token
        if not token:
            return models


def _log(
    client: MlflowClient, view: StudyView, synced: Synced, number: int, run: str, folder: Path
) -> str:
    """Log a directory as a model; only at the end it counts as there."""
    evaluation = view.test.get(number) or view.scores(number)
    values = () if evaluation is None else evaluation.values
    model = client.create_logged_model(
        synced.experiment_id,
        name=f"trial-{number}",
        source_run_id=run,
        tags={
            "evomerge.study_run": synced.run_id,
            "evomerge.trial": str(number),
            "evomerge.recipe": view.trial(number).recipe.digest,
            "knee": "true" if number == view.knee else "false",
        },
        params={
            objective.name: f"{value:.6g}"
            for objective, value in zip(view.objectives, values, strict=False)
        },
        model_type="merge",
    )
    client.log_model_artifacts(model.model_id, str(folder))
    for one in (run, synced.run_id):
        link_model(client, one, model.model_id)
    client.finalize_logged_model(model.model_id, _READY)
    return str(model.model_id)
