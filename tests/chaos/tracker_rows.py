"""A real MLflow server that is killed in mid-search, and one that is not there for long."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from faults import in_process
from rows import Case, Row
from small_study import small_study

from evomerge.presentation import STUDY_FILE, project
from evomerge.study_listener import StudyListener
from evomerge.tracking import Tracker, sync
from evomerge.tracking_target import tracking_target
from evomerge.trial import Trial

_PAUSE_SECONDS = 0.3


def tracker_cases(long: bool) -> Mapping[str, Case]:
    """Return the row of the tracker; the short table has none, a server takes too long."""
    return {"mlflow": partial(mlflow_dies, 80)} if long else {}


def mlflow_dies(trials: int, folder: Path) -> Row:
    """Kill a server twice in mid-search, then for good, and send the rest later."""
    began = time.monotonic()
    report = folder / "report.json"
    code = in_process(_search, trials, folder, report, limit_seconds=500.0)
    if code != 0:
        return Row("MLflow dies", f"{trials} trials", f"exit {code}", False, 0.0)
    got: dict[str, Any] = json.loads(report.read_text())
    points, twice, kills = got["points"], got["twice"], got["kills"]
    found = (
        f"{kills} SIGKILLs of the server, the last for the rest of the search; then sync: "
        f"{got['children']} of {got['trials']} trials, {points} points of {got['expected']}, "
        f"{twice} twice; the search took {got['seconds']:.1f} s, {got['calm']:.1f} s without MLflow"
    )
    holds = (
        got["children"] == got["trials"] and points == got["expected"] and not twice and kills == 3
    )
    load = f"{trials} trials, a server on sqlite"
    return Row("MLflow killed twice and then down", load, found, holds, time.monotonic() - began)


class Server:
    """An MLflow server that can be killed and started again on the same data."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self._folder = folder
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = subprocess.Popen(
            [
                sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--host", "127.0.0.1",
                "--port", str(self._port), "--workers", "1",
                "--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db",
                "--artifacts-destination", str(self._folder / "artifacts"),
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"{self.url} did not start")

    def kill(self) -> None:
        """End all of its processes at once; idempotent."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class _Paced(StudyListener):
    """Gives every trial some length."""

    def __init__(self) -> None:
        self.done = 0

    def on_trial(self, trial: Trial, replayed: bool) -> None:
        self.done += 1
        time.sleep(_PAUSE_SECONDS)


def _search(trials: int, folder: Path, report: Path) -> None:
    import warnings

    warnings.simplefilter("ignore")
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
    server = Server(folder)
    server.start()
    kills = 0
    directory = folder / "study"
    directory.mkdir()
    (directory / STUDY_FILE).write_text("name: strings\nseed: 3\n")
    target = tracking_target(server.url, "chaos", directory)
    try:
        tracker = Tracker(directory, target)
        pace = _Paced()

        def harm() -> None:
            nonlocal kills
            for share in (0.2, 0.5, 0.8):
                while pace.done < share * trials:
                    time.sleep(0.02)
                server.kill()
                kills += 1
                if share < 0.8:
                    time.sleep(1.0)
                    server.start()

        villain = threading.Thread(target=harm, daemon=True)
        villain.start()
        began = time.monotonic()
        view = small_study(directory, budget=trials, listeners=(pace,)).run()
        seconds = time.monotonic() - began
        villain.join(200)
        tracker.close(2.0)
        began = time.monotonic()
        small_study(folder / "calm", budget=trials, listeners=(_Paced(),)).run()
        calm = time.monotonic() - began
        server.start()
        synced = sync(project(view), target)
        found = _count(target.uri, synced.experiment_id, synced.run_id)
        plain = tracking_target(None, "plain", folder)
        whole = sync(project(view), plain)
        expected = _count(plain.uri, whole.experiment_id, whole.run_id)["points"]
        facts = {
            **found, "expected": expected, "trials": len(view.trials), "kills": kills,
            "seconds": seconds, "calm": calm,
        }  # fmt: skip
        report.write_text(json.dumps(facts))
    finally:
        server.kill()


def _count(uri: str, experiment: str, parent: str) -> Mapping[str, int]:
    """Count the points of a study's runs in MLflow, and those that are there twice."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    children = client.search_runs(
        [experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=5000
    )
    points: Counter[tuple[str, str, int]] = Counter()
    values = {name for run in children for name in run.data.metrics}
    for run in (client.get_run(parent), *children):
        # Who is on the front, and what is recommended, changes as the search goes on.
        passing = values if run.info.run_id == parent else {"front"}
        for name in run.data.metrics.keys() - passing:
            for point in client.get_metric_history(run.info.run_id, name):
                points[run.info.run_id, name, point.step] += 1
    numbers = Counter(run.data.tags["evomerge.trial"] for run in children)
    twice = sum(count - 1 for count in (*points.values(), *numbers.values()))
    return {"points": sum(points.values()), "twice": twice, "children": len(children)}
