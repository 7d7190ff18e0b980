"""MLflow for real: a sqlite store, a server process, and a server that is not there."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_study import finished, small_study

from evomerge import metric_names
from evomerge.errors import InputError, SetupError
from evomerge.metric_names import metric_name
from evomerge.pareto_view import STUDIES, VIEW_TAG
from evomerge.presentation import STUDY_FILE, project
from evomerge.projection import trial_params, trial_tags
from evomerge.redaction import redacted
from evomerge.study_view import StudyView
from evomerge.tracking import Tracker, sync
from evomerge.tracking_target import (
    Synced,
    Target,
    anchored_uri,
    tracking_target,
    ui_command,
    ui_url,
)
from evomerge.trial import Failure, TrialState

pytestmark = [
    # MLflow's own models and its sqlite store, not our calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return finished(tmp_path_factory.mktemp("study") / "strings")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose database exists; making one takes most of the time of a test."""
    return tmp_path_factory.mktemp("store")


def client(target: Target) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=target.uri)


def children(target: Target, synced: Synced) -> list[Any]:
    found = client(target).search_runs(
        [synced.experiment_id], f"tags.`mlflow.parentRunId` = '{synced.run_id}'"
    )
    return sorted(found, key=lambda run: int(run.data.tags["evomerge.trial"]))


def artifacts(target: Target, run: str) -> dict[str, str]:
    """Return the text of every artifact of a run, pictures as their size."""
    mlflow = client(target)
    texts: dict[str, str] = {}
    folders = [""]
    while folders:
        for entry in mlflow.list_artifacts(run, folders.pop() or None):
            if entry.is_dir:
                folders.append(entry.path)
            else:
                path = Path(mlflow.download_artifacts(run, entry.path))
                binary = path.suffix in (".png", ".webp")
                texts[entry.path] = str(path.stat().st_size) if binary else path.read_text()
    return texts


class TestSync:
    def test_projects_the_whole_study(self, view: StudyView, store: Path) -> None:
        target = tracking_target(None, "whole", store)
        synced = sync(project(view), target)
        assert synced.trials == len(view.trials)
        parent = client(target).get_run(synced.run_id)
        assert parent.info.status == "FINISHED"
        assert parent.data.params["seed"] == "3"
        times = sorted(view.times.values())
        assert parent.info.start_time <= 1000 * times[0]
        assert parent.info.end_time >= 1000 * times[-1] - 1
        assert parent.data.metrics["hypervolume"] == pytest.approx(view.hypervolume)
        assert parent.data.metrics["trials/failed"] == view.counts.failed
        assert "evomerge export" in parent.data.tags["mlflow.note.content"]
        done = [t for t in view.trials if t.evaluation is not None]
        best = max(t.evaluation.values[0] for t in done if t.evaluation is not None)
        assert parent.data.metrics["best/reverse"] == best
        history = client(target).get_metric_history(synced.run_id, "best/reverse")
        assert [point.step for point in history] == list(range(1, len(view.trials) + 1))

    def test_every_trial_is_a_child_with_its_scores(self, view: StudyView, store: Path) -> None:
        target = tracking_target(None, "whole", store)
        runs = children(target, sync(project(view), target))
        assert [int(run.data.tags["evomerge.trial"]) for run in runs] == list(
            range(len(view.trials))
        )
        for run, trial in zip(runs, view.trials, strict=True):
            front = "true" if trial.number in view.front else "false"
            assert run.data.tags["front"] == front
            assert run.data.tags["knee"] == ("true" if trial.number == view.knee else "false")
            assert run.data.tags["baseline"] == ("true" if trial.label else "false")
            assert run.data.tags.get("evomerge.label", "") == trial.label
            if trial.evaluation is None:
                assert run.info.status == "FAILED"
                assert "diverged on purpose" in run.data.tags["evomerge.failure"]
                continue
            assert run.info.status == "FINISHED"
            assert run.data.metrics["sort"] == trial.evaluation.values[1]
            assert run.data.metrics["standard_error/sort"] == 0.02
            assert len(run.data.params) <= 10
        assert any(run.info.status == "FAILED" for run in runs)

    def test_artifacts_of_the_study_and_of_the_front(self, view: StudyView, store: Path) -> None:
        target = tracking_target(None, "whole", store)
        synced = sync(project(view), target)
        found = artifacts(target, synced.run_id)
        members = {f"recipes/{number}.json" for number in view.front}
        pictures = {name for name in found if name.startswith("images/")}
        assert set(found) - pictures == {
            "front.html", "front.csv", "front.png", "coefficients.html", STUDY_FILE, *members,
        }  # fmt: skip
        assert int(found["front.png"]) > 10_000
        mlflow = client(target)
        steps = [re.split("[%+]", picture)[2] for picture in pictures]
        # Of each step one as it is, and one that is shown: it was too small to be read.
        assert Counter(steps) == dict.fromkeys(steps, 2)
        assert len(set(steps)) > 5
        for picture in pictures:
            with Image.open(mlflow.download_artifacts(synced.run_id, picture)) as image:
                assert image.size == (960, 648)
        for number in view.front:
            recipe = json.loads(found[f"recipes/{number}.json"])
            assert recipe == view.trials[number].recipe.to_dict()
        member = children(target, synced)[view.front[0]]
        assert set(artifacts(target, member.info.run_id)) == {"recipe.json"}

    def test_repeating_it_doubles_nothing(self, view: StudyView, store: Path) -> None:
        target = tracking_target(None, "whole", store)
        first = sync(project(view), target)
        before = artifacts(target, first.run_id)
        second = sync(project(view), target)
        assert artifacts(target, second.run_id) == before
        assert (second.experiment_id, second.run_id) == (first.experiment_id, first.run_id)
        assert second.trials == 0
        assert len(children(target, first)) == len(view.trials)
        steps = client(target).get_metric_history(first.run_id, "hypervolume")
        assert len(steps) == len(view.trials)

    def test_an_interrupted_sync_is_completed(self, view: StudyView, store: Path) -> None:
        """A child without its metrics, as a kill between two calls leaves it, is sent again."""
        whole = project(view)
        front = replace(whole.front, points=whole.front.points[:4], knee=None)
        part = replace(
            whole, trials=whole.trials[:4], steps=whole.steps[:4], front=front, state="running"
        )
        target = tracking_target(None, "interrupted", store)
        synced = sync(part, target)
        tags = {"mlflow.parentRunId": synced.run_id, "evomerge.trial": "4"}
        torn = client(target).create_run(synced.experiment_id, run_name="torn", tags=tags)
        assert client(target).get_run(synced.run_id).info.status == "RUNNING"
        assert sync(whole, target).trials == len(view.trials) - 5
        runs = children(target, synced)
        assert len(runs) == len(view.trials)
        assert runs[4].info.run_id == torn.info.run_id
        assert runs[4].info.status == "FINISHED"
        evaluation = view.trials[4].evaluation
        assert evaluation is not None
        assert runs[4].data.metrics["sort"] == evaluation.values[1]
        history = client(target).get_metric_history(synced.run_id, "hypervolume")
        assert [point.step for point in history] == list(range(1, len(view.trials) + 1))

    def test_a_trial_that_leaves_the_front_is_told_so(self, view: StudyView, store: Path) -> None:
        target = tracking_target(None, "leaves", store)
        whole = project(view)
        number = view.front[0]
        synced = sync(whole, target)
        points = tuple(
            replace(point, front=False) if point.number == number else point
            for point in whole.front.points
        )
        sync(replace(whole, front=replace(whole.front, points=points)), target)
        run = children(target, synced)[number]
        assert run.data.tags["front"] == "false"
        assert run.data.metrics["front"] == 0.0

    def test_every_study_is_in_the_list_of_the_experiment(
        self, view: StudyView, store: Path, tmp_path: Path
    ) -> None:
        """The list had the objectives of the study that was sent last."""
        target = tracking_target(None, "several", store)
        views = [view, *(finished(tmp_path / str(m), m, budget=2) for m in (3, 1))]

        def columns() -> list[str]:
            experiment = client(target).get_experiment_by_name("several")
            value = json.loads(experiment.tags[VIEW_TAG + STUDIES])["state"]
            packed = base64.b64decode(value.removeprefix("deflate;"))
            found = json.loads(zlib.decompress(packed))["selectedColumns"]
            return [name.removeprefix("metrics.`").rstrip("`") for name in found]

        for one in views:
            sync(project(one), target)
        assert columns()[:3] == ["reverse", "sort", "nll"]
        before = client(target).get_experiment_by_name("several").tags
        assert len([name for name in before if name.startswith(VIEW_TAG)]) == 1 + len(views)
        for one in views:
            sync(project(one), target)
        assert client(target).get_experiment_by_name("several").tags == before

    def test_an_objective_named_like_a_metric_of_ours(
        self, view: StudyView, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """``front`` was 0 or 1, ``trials/finished`` the score: the series began anew each time."""
        names = ("front", "trials/finished")
        objectives = [replace(o, name=n) for o, n in zip(view.objectives, names, strict=True)]
        named = replace(view, objectives=tuple(objectives))
        target = tracking_target(None, "names", store)
        with monkeypatch.context() as before:
            before.setattr(metric_names, "_distinct", lambda own: own)
            sync(project(named), target)
        synced = sync(project(named), target)
        assert synced.trials == 0
        for run, trial in zip(children(target, synced), view.trials, strict=True):
            if trial.evaluation is None:
                continue
            assert run.data.metrics["front"] == float(trial.number in view.front)
            values = [run.data.metrics[f"objective {name}"] for name in names]
            assert tuple(values) == trial.evaluation.values
        parent = client(target).get_run(synced.run_id)
        assert view.knee is not None
        values = [parent.data.metrics[f"objective {name}"] for name in names]
        assert tuple(values) == view.test[view.knee].values
        history = client(target).get_metric_history(synced.run_id, "hypervolume")
        assert [point.step for point in history] == list(range(1, len(view.trials) + 1))

    @pytest.mark.slow
    def test_a_failed_trial_that_was_run_again_is_replaced(
        self, view: StudyView, store: Path
    ) -> None:
        target = tracking_target(None, "again", store)
        good = project(view)
        number = next(trial.number for trial in view.trials if trial.evaluation and not trial.label)
        failed = replace(
            view.trials[number], evaluation=None, state=TrialState.FAILED,
            failure=Failure("error", "no data"), recipe=view.trials[0].recipe,
        )  # fmt: skip
        trials = [failed if t.number == number else t for t in view.trials]
        synced = sync(replace(good, trials=tuple(trials)), target)
        assert sync(good, target).trials == 1
        runs = children(target, synced)
        assert len(runs) == len(view.trials)
        assert runs[number].info.status == "FINISHED"
        assert "evomerge.failure" not in runs[number].data.tags
        assert runs[number].data.params == trial_params(view.trials[number])
        assert sync(good, target).trials == 0

    def test_a_deleted_experiment_is_named(self, view: StudyView, store: Path) -> None:
        target = tracking_target(None, "deleted", store)
        sync(project(view), target)
        mlflow = client(target)
        mlflow.delete_experiment(mlflow.get_experiment_by_name("deleted").experiment_id)
        with pytest.raises(InputError, match="'deleted' was deleted in MLflow"):
            sync(project(view), target)

    def test_an_unreachable_server_is_a_setup_error(self, view: StudyView) -> None:
        target = tracking_target(f"http://127.0.0.1:{free_port()}", "none", Path())
        with pytest.raises(SetupError, match=r"cannot be updated.*nothing is lost"):
            sync(project(view), target)

    @pytest.mark.slow
    def test_nothing_is_printed(
        self, view: StudyView, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """In a process of its own: MLflow talks when it is imported and when it makes a store."""
        code = (
            "import sys; from pathlib import Path; from evomerge.study_view import StudyView; "
            "from evomerge.presentation import project; from evomerge.tracking import sync; "
            "from evomerge.tracking_target import tracking_target; "
            "sync(project(StudyView.load(Path(sys.argv[1]))), "
            "tracking_target(None, 'quiet', Path(sys.argv[2])))"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(view.directory), str(tmp_path)],
            capture_output=True, text=True, timeout=120,
            env={k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert done.stderr == ""


class TestTracker:
    def test_follows_a_running_search(self, store: Path, tmp_path: Path) -> None:
        target = tracking_target(None, "running", store)
        tracker = Tracker(tmp_path, target)
        view = small_study(tmp_path).run()
        assert tracker.close(120), tracker.problem
        assert tracker.synced is not None
        runs = children(target, tracker.synced)
        assert len(runs) == len(view.trials)
        assert client(target).get_run(tracker.synced.run_id).info.status == "FINISHED"
        assert sync(project(view), target).trials == 0


class TestServer:
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        folder, port = tmp_path_factory.mktemp("server"), free_port()
        with subprocess.Popen(
            [
                sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--host", "127.0.0.1",
                "--port", str(port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
                "--artifacts-destination", str(folder / "artifacts"),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                yield wait_for(f"http://127.0.0.1:{port}")
            finally:
                os.killpg(process.pid, 15)
                process.wait(20)

    def test_projects_through_a_server(self, view: StudyView, server: str) -> None:
        target = tracking_target(server, "remote", view.directory)
        synced = sync(project(view), target)
        assert len(children(target, synced)) == len(view.trials)
        assert "front.html" in artifacts(target, synced.run_id)
        assert sync(project(view), target).trials == 0
        url = ui_url(target, synced, page="front.html")
        assert url.startswith(f"{server}/#/experiments/{synced.experiment_id}/runs/")
        assert ui_command(target) == ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str) -> str:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return url
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"{url} did not start")


class TestTarget:
    def test_the_default_lies_in_the_study(self, tmp_path: Path) -> None:
        target = tracking_target(None, "evomerge", tmp_path)
        assert target.uri == f"sqlite:///{tmp_path}/mlflow.db"
        assert target.artifacts == f"file://{tmp_path}/mlartifacts"

    def test_artifacts_lie_beside_a_named_database(self, tmp_path: Path) -> None:
        target = tracking_target(f"sqlite:///{tmp_path}/all/ml.db", "evomerge", Path("study"))
        assert target.artifacts == f"file://{tmp_path}/all/mlartifacts"

    @pytest.mark.parametrize(
        "uri",
        [
            "http://me:CANARY@host:5000",
            "https://CANARY@host",
            "postgresql://me:CANARY@host/db",
        ],
    )
    def test_credentials_are_refused_and_not_repeated(self, uri: str) -> None:
        with pytest.raises(InputError, match="given with credentials") as caught:
            tracking_target(uri, "evomerge", Path())
        assert "CANARY" not in str(caught.value)
        assert "MLFLOW_TRACKING_USERNAME" in str(caught.value)

    def test_a_relative_database_is_anchored(self) -> None:
        root = Path("/home/me/project")
        assert anchored_uri("sqlite:///ml.db", root) == "sqlite:////home/me/project/ml.db"
        for uri in ("sqlite:////data/ml.db", "http://host:5000", "postgresql://host/db"):
            assert anchored_uri(uri, root) == uri
        with pytest.raises(InputError, match="names no file"):
            tracking_target(anchored_uri("sqlite:///", root), "evomerge", Path())

    @pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "ftp://host", ""])
    def test_other_stores_are_refused(self, uri: str) -> None:
        with pytest.raises(InputError, match="cannot be used"):
            tracking_target(uri, "evomerge", Path())

    def test_a_sqlite_uri_without_a_file_is_refused(self) -> None:
        with pytest.raises(InputError, match="names no file"):
            tracking_target("sqlite://", "evomerge", Path())

    def test_the_command_and_the_address_to_open(self, tmp_path: Path) -> None:
        target = tracking_target(None, "evomerge", tmp_path / "with space")
        command = ui_command(target, 5001)
        assert command.startswith("mlflow ui --backend-store-uri 'sqlite:////")
        assert command.endswith("with space/mlflow.db' --port 5001")
        url = ui_url(target, Synced("1", "abc", 0), 5001, page="front.html")
        assert url == (
            "http://127.0.0.1:5001/#/experiments/1/runs/abc/artifacts/front.html"
            "?workflowType=machine_learning"
        )


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("acc,none", "acc_none"),
        ("best/a.b-c", "best/a.b-c"),
        ("/x", "x"),
        ("a..b", "a.b"),
        ("läng@e", "l_ng_e"),
        ("a//b/./c", "a/b/c"),
        ("", "_"),
    ],
)
def test_metric_names_are_made_acceptable(name: str, clean: str) -> None:
    assert metric_name(name) == clean


def test_secrets_do_not_reach_mlflow() -> None:
    text = "uri: postgresql://me:CANARY1@host/db\nhub: hf_CANARY2aaaaaaaaaaaaaa\napi_key: CANARY3\n"
    assert "CANARY" not in redacted(text)
    plain = "task: reverse\nseed: 3\nbatch_tokens: 512\ntokenizer: base\n"
    assert redacted(plain) == plain


@pytest.mark.parametrize(
    "text",
    [
        "options:\n  - api_key: CANARY 1\n", "'password': CANARY a, b", "{token: CANARY, seed: 3}",
        '{"api_key": "CANARY \\" CANARY", "seed": 3}', "at http://h/?api-key=CANARY&seed=3",
    ],
)  # fmt: skip
def test_secrets_are_found_inside_lines(text: str) -> None:
    assert "CANARY" not in redacted(text)
    assert ("seed" in text) == ("seed" in redacted(text))


def test_errors_reach_mlflow_without_secrets(tmp_path: Path) -> None:
    trial = finished(tmp_path).trials[0]
    failed = replace(trial, failure=Failure("error", "no answer from http://me:CANARY@host/"))
    tags = trial_tags(failed, None, None)
    assert tags["evomerge.failure"] == "error: no answer from http://host/"
