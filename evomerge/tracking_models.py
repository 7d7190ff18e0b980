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
from evomerge.metric_names import objective_metrics
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
    """Log merges of a finished study; those that are there already are not sent again.

    The tags ``front`` and ``knee`` of all that are there say what the study says now: one that
    was extended may have another front.

    Args:
        view: the study.
        target: where it is tracked.
        synced: its run, which must have all its trials.
        which: the recommended merge, the whole front, or ``none``.
        write: see ``Write``; one merge at a time lies beside the journal until it is sent.

    Raises:
        NothingUsableError: the study is not finished.
        SetupError: MLflow cannot be reached.
        EvomergeError: as ``write``.
    """
    if view.state is not StudyState.FINISHED or view.knee is None:
        if which == "none":
            return ()
        raise NothingUsableError(
            f"{view.directory}: the study is {view.state}, its front may change (models are "
            "logged of a finished study: run it to its end first)"
        )
    with setup_errors(
        f"MLflow at {target.uri} takes no models",
        "what is missing is logged by: evomerge sync STUDY --log-model ...",
    ):
        client = open_client(target)
        if which == "none" and not _has_models(client, synced):
            return ()
        models = _search(client, synced)
        for model in models:
            _mark(client, view, model)
        return () if which == "none" else tuple(_logged(client, view, synced, which, write, models))


def _has_models(client: MlflowClient, synced: Synced) -> bool:
    """Return whether a study has models; a server that has no such thing is asked for none."""
    outputs = getattr(client.get_run(synced.run_id), "outputs", None)
    return bool(outputs is not None and outputs.model_outputs)


def _tags(view: StudyView, number: int) -> dict[str, str]:
    """Return the tags that may change when a study is extended."""
    facts = {"front": number in view.front, "knee": number == view.knee}
    return {name: "true" if fact else "false" for name, fact in facts.items()}


def _mark(client: MlflowClient, view: StudyView, model: LoggedModel) -> None:
    tags = _tags(view, int(model.tags["evomerge.trial"]))
    if any(model.tags.get(name) != value for name, value in tags.items()):
        client.set_logged_model_tags(model.model_id, tags)


def _logged(
    client: MlflowClient,
    view: StudyView,
    synced: Synced,
    which: Which,
    write: Write,
    models: Sequence[LoggedModel],
) -> Iterator[Logged]:
    runs = {
        int(run.data.tags["evomerge.trial"]): run.info.run_id
        for run in client.search_runs(
            [synced.experiment_id],
            f"tags.`mlflow.parentRunId` = '{synced.run_id}' and tags.front = 'true'",
            max_results=5000,
        )
    }
    there = _there(client, models)
    for number in view.front if which == "front" else [view.knee]:
        assert number is not None
        if number in there:
            yield Logged(number, there[number], new=False)
            continue
        with tempfile.TemporaryDirectory(prefix=".model-", dir=view.directory) as folder:
            write(number, Path(folder) / "model")
            model = _log(client, view, synced, number, runs[number], Path(folder) / "model")
        yield Logged(number, model, new=True)


def _there(client: MlflowClient, models: Sequence[LoggedModel]) -> dict[int, str]:
    """Return the ids of a study's models by trial; half a model is deleted."""
    found: dict[int, str] = {}
    for model in models:
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
            **_tags(view, number),
        },
        params={
            name: f"{value:.6g}"
            for name, value in zip(objective_metrics(view.objectives), values, strict=False)
        },
        model_type="merge",
    )
    client.log_model_artifacts(model.model_id, str(folder))
    for one in (run, synced.run_id):
        link_model(client, one, model.model_id)
    client.finalize_logged_model(model.model_id, _READY)
    return str(model.model_id)
