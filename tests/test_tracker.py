"""The tracker beside a running search: processes are killed, servers are mute, points stay one."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_study import small_study

from evomerge.errors import LockedError
from evomerge.journal import read
from evomerge.presentation import project
from evomerge.study_listener import StudyListener
from evomerge.study_view import StudyView
from evomerge.tracking import SENDER_LOCK, Tracker, only_sender, sync
from evomerge.tracking_client import file_system
from evomerge.tracking_target import Synced, Target, tracking_target
from evomerge.trial import Trial

pytestmark = [
    # MLflow's own models and its sqlite store, not our calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

#: How long the server is away; its retries are a minute apart after a few.
OUTAGE_SECONDS = float(os.environ.get("EVOMERGE_OUTAGE_SECONDS", "10"))
#: Its process imports MLflow with low priority: on a busy machine that takes a minute.
LONG = 300.0


def wait_until(true: Callable[[], Any], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def ended(process: int) -> bool:
    """Return whether a process is gone; it may have been inherited by init."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def counted(target: Target, synced: Synced) -> Counter[tuple[str, str, int]]:
    """Return how often each point of a study is there: trial or nothing, metric, step."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=target.uri)
    runs = client.search_runs(
        [synced.experiment_id], f"tags.`mlflow.parentRunId` = '{synced.run_id}'", max_results=5000
    )
    found: Counter[tuple[str, str, int]] = Counter()
    for run in (client.get_run(synced.run_id), *runs):
        trial = run.data.tags.get("evomerge.trial", "")
        found[trial, "", 0] += 1
        for name in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, name):
                found[trial, name, point.step] += 1
    return found


def assert_whole(view: StudyView, target: Target, synced: Synced, fresh: Path) -> None:
    """Assert that MLflow has every point of a study once, and those of a fresh store."""
    found = counted(target, synced)
    assert set(found.values()) == {1}
    plain = tracking_target(None, "plain", fresh)
    expected = counted(plain, sync(project(view), plain))
    # Who followed the search saw trials come to the front and leave it, and others recommended.
    passing = {"front", *(objective.name for objective in view.objectives)}
    assert expected.keys() - found.keys() <= {key for key in expected if key[1] in passing}
    more = found.keys() - expected.keys()
    assert all(name in passing and (trial == "" or name == "front") for trial, name, _ in more)


class Slow(StudyListener):
    """Gives every trial some length."""

    def __init__(self, seconds: float, done: Callable[[int], None] = lambda number: None) -> None:
        self._seconds = seconds
        self._done = done

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        time.sleep(self._seconds)
        self._done(trial.number)


@pytest.mark.slow
def test_a_tracker_that_was_killed_is_started_again(tmp_path: Path) -> None:
    target = tracking_target(None, "killed", tmp_path)
    tracker = Tracker(tmp_path, target)
    killed: list[int] = []

    def kill(number: int) -> None:
        if number == 12:
            wait_until(lambda: tracker.synced)
            assert tracker.process is not None
            killed.append(tracker.process)
            os.kill(tracker.process, signal.SIGKILL)

    view = small_study(tmp_path, budget=20, listeners=[Slow(0.1, kill)]).run()
    assert killed
    wait_until(lambda: tracker.process not in (None, killed[0]))
    assert tracker.close(LONG), tracker.problem
    assert tracker.synced is not None
    assert_whole(view, target, tracker.synced, tmp_path / "fresh")
    assert sync(project(view), target).trials == 0


_SEARCH = """
import sys, time
from pathlib import Path
from small_study import small_study
from evomerge.study_listener import StudyListener
from evomerge.tracking import Tracker
from evomerge.tracking_target import tracking_target

folder = Path(sys.argv[1])
tracker = Tracker(folder, tracking_target(None, "orphan", folder))

class Slow(StudyListener):
    def on_trial(self, trial, replayed):
        if trial.number == 12:
            while tracker.synced is None:
                time.sleep(0.05)
            print(tracker.process, flush=True)
            time.sleep(600)

small_study(folder, budget=20, listeners=[Slow()]).run()
"""


@pytest.mark.slow
def test_a_search_that_was_killed_leaves_a_tracker_that_ends(tmp_path: Path) -> None:
    """It sends what the journal has and ends; the next run and ``sync`` double nothing."""
    search = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SEARCH, str(tmp_path)],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )  # fmt: skip
    assert search.stdout is not None
    process = int(search.stdout.readline())
    assert os.getpgid(process) != os.getpgid(search.pid)  # Ctrl-C does not reach it
    search.kill()
    search.communicate()
    wait_until(lambda: ended(process), 60.0)
    target = tracking_target(None, "orphan", tmp_path)
    half = StudyView.load(tmp_path)
    synced = sync(project(half), target)
    assert synced.trials == 0
    from mlflow.tracking import MlflowClient

    run = MlflowClient(tracking_uri=target.uri).get_run(synced.run_id)
    assert run.info.status == "KILLED"
    view = small_study(tmp_path, budget=20).run()
    assert sync(project(view), target).trials > 0
    assert_whole(view, target, synced, tmp_path / "fresh")


class Server:
    """An MLflow server that can be killed and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--host", "127.0.0.1",
                "--port", str(self._port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{self._folder}/server.db",
                "--artifacts-destination", str(self._folder / "artifacts"),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def journaled(directory: Path) -> Counter[tuple[str, str, int]]:
    """Return every point that MLflow shall have by the records of a journal, once.

    Left out is what changes while it is followed: who is on the front, and what is recommended.
    """
    opened, *records = read(directory).records
    names = [objective["name"] for objective in opened["objectives"]]
    trials = [record["trial"] for record in records if record["ev"] == "ask"]
    told = {record["trial"]: record for record in records if record["ev"] == "tell"}
    points: Counter[tuple[str, str, int]] = Counter()
    points["", "", 0] += 1
    for trial in trials:
        points[str(trial), "", 0] += 1
        if told[trial]["status"] == "ok":
            metrics = [*names, *(f"standard_error/{name}" for name in names), "items"]
            metrics += [f"seconds/{phase}" for phase in told[trial]["seconds"]]
            points.update((str(trial), metric, 0) for metric in metrics)
    for record in records:
        if record["ev"] == "score" and record["status"] == "ok":
            points.update((str(record["trial"]), f"{record['split']}/{name}", 0) for name in names)
    arrived: list[int] = []
    good = 0
    for step, trial in enumerate(trials, start=1):
        good += told[trial]["status"] == "ok"
        arrived.append(max([int(told[trial]["t"] * 1000), *arrived[-1:]]))
        series = ["hypervolume", "items/scored", "trials/failed", "trials/finished"]
        series += [f"best/{name}" for name in names if good]
        series += ["trials/per hour"] * (arrived[-21:][0] < arrived[-1])  # of the last 20 trials
        points.update(("", name, step) for name in series)
    return points


@pytest.mark.slow
@pytest.mark.timeout(1500 + OUTAGE_SECONDS)
def test_a_server_that_was_killed_twice_and_stayed_away(tmp_path: Path) -> None:
    """Killed while it receives, back at once, killed again, and back only much later."""
    server = Server(tmp_path)
    server.start()
    target = tracking_target(server.url, "down", tmp_path)
    tracker = Tracker(tmp_path, target)
    pauses: list[float] = []

    def harm(number: int) -> None:
        began = time.monotonic()
        if number == 8:
            wait_until(lambda: tracker.synced)
        if number in (16, 32):
            server.kill()
            wait_until(lambda: tracker.problem)
        if number == 24:
            server.start()
            wait_until(lambda: not tracker.problem)
        pauses.append(time.monotonic() - began)

    try:
        view = small_study(tmp_path, budget=48, listeners=[Slow(0.05, harm)]).run()
        assert len(pauses) > 40
        time.sleep(OUTAGE_SECONDS)
        assert tracker.problem
        server.start()
        wait_until(lambda: not tracker.problem)
        assert tracker.close(LONG), tracker.problem
        assert tracker.synced is not None
        assert_whole(view, target, tracker.synced, tmp_path / "fresh")
        assert sync(project(view), target).trials == 0
        found = counted(target, tracker.synced)
        assert set(found.values()) == {1}
        objectives = [objective.name for objective in view.objectives]
        passing = {
            key for key in found if key[1] == "front" or (not key[0] and key[1] in objectives)
        }
        assert {key: n for key, n in found.items() if key not in passing} == journaled(tmp_path)
        done = {str(trial.number) for trial in view.trials if trial.evaluation is not None}
        assert {trial for trial, name, _ in passing if name == "front"} == done
        assert {name for trial, name, _ in passing if not trial} == set(objectives)
    finally:
        tracker.close(0.0)
        server.kill()


def test_an_unreachable_server_delays_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tracking_target(f"http://127.0.0.1:{free_port()}", "none", tmp_path)
    tracker = Tracker(tmp_path, target)
    start = time.monotonic()
    small_study(tmp_path).run()
    assert time.monotonic() - start < 30
    wait_until(lambda: tracker.problem)
    assert not tracker.close(LONG)
    assert "MlflowException: no answer" in tracker.problem
    assert tracker.process is None
    warnings = [r for r in caplog.records if r.name == "evomerge.tracking"]
    assert len(warnings) == 1
    assert "evomerge sync" in warnings[0].getMessage()


def test_a_server_that_never_answers_holds_nobody(tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        port = mute.getsockname()[1]
        target = tracking_target(f"http://127.0.0.1:{port}", "mute", tmp_path)
        tracker = Tracker(tmp_path, target)
        assert small_study(tmp_path).run().state == "finished"
        wait_until(lambda: tracker.process)
        process = tracker.process
        assert process is not None
        start = time.monotonic()
        assert not tracker.close(0.5)
        assert time.monotonic() - start < 10
        assert "not all was sent within" in tracker.problem
        assert ended(process)


def test_a_tracker_without_a_process_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    tracker = Tracker(tmp_path, tracking_target(None, "none", tmp_path))
    wait_until(lambda: tracker.problem)
    assert not tracker.close(5.0)
    assert "Resource temporarily unavailable" in tracker.problem


def test_only_one_sends(tmp_path: Path) -> None:
    with only_sender(tmp_path, 0.0):
        with (
            pytest.raises(LockedError, match="another process is sending this study"),
            only_sender(tmp_path, 0.2),
        ):
            pytest.fail("two at once")
        with (tmp_path / SENDER_LOCK).open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with only_sender(tmp_path, 0.0):
        pass


def test_a_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path}/home nfs4 rw 0 0\n")
    assert file_system(tmp_path, mounts) == "ext4"
    assert file_system(tmp_path / "home" / "me", mounts) == "nfs4"
    assert file_system(tmp_path, tmp_path / "none") == ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
