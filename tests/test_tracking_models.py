"""Merges as MLflow logged models: whole, linked from their runs, each once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_study import finished
from toy_study import toy_study

from evomerge.errors import NothingUsableError, StorageError
from evomerge.extension import extend
from evomerge.presentation import project
from evomerge.study_view import StudyState, StudyView
from evomerge.tracking import sync
from evomerge.tracking_models import log_models
from evomerge.tracking_target import Synced, Target, tracking_target

pytestmark = [
    # MLflow's own models and its sqlite store, not our calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyView, Target, Synced]:
    view = finished(tmp_path_factory.mktemp("study") / "strings")
    target = tracking_target(None, "models", view.directory)
    return view, target, sync(project(view), target)


def write(number: int, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"trial": {number}}}')


def test_models_are_whole_linked_and_logged_once(
    shown: tuple[StudyView, Target, Synced],
) -> None:
    import mlflow
    from mlflow.tracking import MlflowClient

    view, target, synced = shown
    client = MlflowClient(tracking_uri=target.uri)

    def fails(number: int, folder: Path) -> None:
        raise StorageError("no space")

    with pytest.raises(StorageError):
        log_models(view, target, synced, "knee", fails)
    half = client.create_logged_model(
        synced.experiment_id, name="half",
        tags={"evomerge.study_run": synced.run_id, "evomerge.trial": str(view.knee)},
    )  # fmt: skip
    (knee,) = log_models(view, target, synced, "knee", write)
    assert (knee.trial, knee.new) == (view.knee, True)
    assert knee.model != half.model_id
    front = log_models(view, target, synced, "front", write)
    assert [one.trial for one in front] == list(view.front)
    assert [one.trial for one in front if not one.new] == [view.knee]
    assert not any(one.new for one in log_models(view, target, synced, "front", fails))
    assert len(front) > 1
    for one in front:
        model = client.get_logged_model(one.model)
        assert model.status == "READY"
        assert model.tags["knee"] == ("true" if one.trial == view.knee else "false")
        assert {"reverse", "sort"} <= set(model.params)
        run = client.get_run(model.source_run_id)
        assert run.data.tags["evomerge.trial"] == str(one.trial)
        assert [output.model_id for output in run.outputs.model_outputs] == [one.model]
        mlflow.set_tracking_uri(target.uri)
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{one.model}"))
        assert (folder / "config.json").read_text() == f'{{"trial": {one.trial}}}'
    outputs = client.get_run(synced.run_id).outputs.model_outputs
    assert {output.model_id for output in outputs} == {one.model for one in front}
    assert not list(view.directory.glob(".model-*"))


def test_models_of_a_study_that_goes_on_are_refused(
    shown: tuple[StudyView, Target, Synced],
) -> None:
    view, target, synced = shown
    going = replace(view, state=StudyState.INTERRUPTED)
    assert log_models(going, target, synced, "none", write) == ()
    with pytest.raises(NothingUsableError, match="is interrupted, its front may change"):
        log_models(going, target, synced, "knee", write)


def test_the_tags_of_models_and_runs_follow_the_front(tmp_path: Path) -> None:
    """After an extension the knee of before kept its tag, so that a study had two."""
    from mlflow.tracking import MlflowClient

    first = toy_study(tmp_path / "s", budget=4, seed=6).run()
    target = tracking_target(None, "extended", tmp_path)
    client = MlflowClient(tracking_uri=target.uri)

    def tagged(view: StudyView) -> tuple[Synced, dict[int, dict[str, str]]]:
        synced = sync(project(view), target)
        log_models(view, target, synced, "none", write)
        query = f"tags.`evomerge.study_run` = '{synced.run_id}'"
        models = client.search_logged_models([synced.experiment_id], query)
        return synced, {int(one.tags["evomerge.trial"]): one.tags for one in models}

    synced, models = tagged(first)
    assert models == {}
    assert len(log_models(first, target, synced, "front", write)) == len(first.front)
    extend(tmp_path / "s", trials=40)
    _, models = tagged(StudyView.load(tmp_path / "s"))
    assert {number for number, tags in models.items() if tags["knee"] == "true"} == {first.knee}
    view = toy_study(tmp_path / "s", budget=4, seed=6).run()
    assert view.knee not in first.front
    assert not set(first.front) <= set(view.front)
    synced, models = tagged(view)
    assert set(models) == set(first.front)
    assert {n for n, tags in models.items() if tags["knee"] == "true"} == set()
    log_models(view, target, synced, "knee", write)
    _, models = tagged(view)
    assert set(models) == {*first.front, view.knee}
    runs = client.search_runs(
        [synced.experiment_id], f"tags.`mlflow.parentRunId` = '{synced.run_id}'"
    )
    trials = {int(run.data.tags["evomerge.trial"]): run.data for run in runs}
    assert len(trials) == len(view.trials)
    for number, data in trials.items():
        for tags in (data.tags, models.get(number, data.tags)):
            assert tags["front"] == ("true" if number in view.front else "false")
            assert tags["knee"] == ("true" if number == view.knee else "false")
        assert data.metrics["front"] == float(number in view.front)
