"""The front page in a real browser: from a file, and inside MLflow's artifact viewer.

Drives chromium through chromedriver's own HTTP protocol, so that no package is needed for it.
``EVOMERGE_SCREENSHOTS=folder`` keeps the pictures.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from small_study import finished

from evomerge.front_page import front_html
from evomerge.pareto_view import children_query, front_query
from evomerge.presentation import front_data, project
from evomerge.study_view import StudyView
from evomerge.tracking import sync
from evomerge.tracking_target import (
    Synced,
    Target,
    pareto_url,
    studies_url,
    tracking_target,
    ui_url,
)

CHROMEDRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMEDRIVER is None,
        reason="needs chromedriver: apt-get install chromium chromium-driver",
    ),
    # MLflow's own models and its sqlite store, not our calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--window-size=1200,800", "--hide-scrollbars",
]  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A WebDriver session."""

    def __init__(self, driver: str, profile: Path) -> None:
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"performance": "ALL"}}
        self._driver = driver
        self._session = ""
        answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": always}})
        self._session = f"/session/{answer['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._driver}{self._session}{path}", data, method=method
        )
        with urllib.request.urlopen(request, timeout=90) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def resize(self, width: int, height: int) -> None:
        self._call("POST", "/window/rect", {"width": width, "height": height})

    def run(self, script: str, *args: Any) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def dark(self, yes: bool) -> None:
        value = "dark" if yes else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        params = {"features": features}
        body = {"cmd": "Emulation.setEmulatedMedia", "params": params}
        self._call("POST", "/goog/cdp/execute", body)

    def enter_frame(self) -> None:
        frame = self._call("POST", "/element", {"using": "css selector", "value": "iframe"})
        self._call("POST", "/frame", {"id": {_ELEMENT: frame[_ELEMENT]}})

    def leave_frame(self) -> None:
        self._call("POST", "/frame", {"id": None})

    def click(self, css: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": css})
        self._call("POST", f"/element/{found[_ELEMENT]}/click", {})

    def requests(self) -> list[str]:
        """Return the addresses that pages asked for since the last call."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def wait(self, condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.run("return document.body.innerText")
            time.sleep(0.3)

    def picture(self, name: str) -> bytes:
        data = base64.b64decode(self._call("GET", "/screenshot"))
        folder = os.environ.get("EVOMERGE_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.png").write_bytes(data)
        return data

    def close(self) -> None:
        self._call("DELETE", "")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(command: list[str], url: str) -> Iterator[str]:
    """Run a server until the test is over."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    with urllib.request.urlopen(url, timeout=2):
                        break
                except OSError:
                    assert time.monotonic() < deadline, f"{url} did not start"
                    time.sleep(0.3)
            yield url
        finally:
            os.killpg(process.pid, 15)
            process.wait(60)


@pytest.fixture(scope="module")
def driver() -> Iterator[str]:
    port = free_port()
    assert CHROMEDRIVER is not None
    for url in started([CHROMEDRIVER, f"--port={port}"], f"http://127.0.0.1:{port}/status"):
        yield url.removesuffix("/status")


@pytest.fixture
def browser(driver: str, tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(driver, tmp_path / "profile")
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> dict[int, StudyView]:
    root = tmp_path_factory.mktemp("studies")
    return {m: finished(root / f"strings-{m}", m, budget=40) for m in (1, 2, 3)}


def marks(browser: Browser) -> int:
    return int(browser.run("return document.querySelectorAll('.mark').length"))


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_opens_from_a_file_without_a_network(
    browser: Browser, views: dict[int, StudyView], tmp_path: Path, objectives: int, dark: bool
) -> None:
    view = views[objectives]
    page = tmp_path / "front.html"
    page.write_text(front_html(front_data(view)), encoding="utf-8")
    browser.dark(dark)
    browser.requests()
    browser.open(page.as_uri())
    assert len(browser.picture(f"front-{objectives}-{'dark' if dark else 'light'}")) > 20_000
    # What the browser itself shows in a new tab is no request of the page.
    own = ("file:", "data:", "chrome:", "chrome-untrusted:")
    outside = [url for url in browser.requests() if not url.startswith(own)]
    assert outside == []
    panels = {1: 1, 2: 1, 3: 3}[objectives]
    points = front_data(view).points
    shown = sum(point.front or point.kind not in ("search", "grid") for point in points)
    assert marks(browser) == panels * shown
    rows = browser.run("return document.querySelectorAll('#table tbody tr').length")
    assert rows == shown
    # The recommended merge is explained without a click.
    detail = browser.run("return document.getElementById('detail').innerText")
    assert f"--trial {view.knee} " in detail
    assert "weight.one" in detail
    wide = browser.run("return document.documentElement.scrollWidth")
    assert wide <= 1200
    # Nothing is drawn outside its chart, and no label covers another.
    assert browser.run(OVERLAPS) == []


OVERLAPS = """
const named = [...document.querySelectorAll('#chart text.halo')].filter(t => !t.matches('.tick'));
const boxes = named.map(t => [t.textContent, t.getBoundingClientRect()]), found = [];
for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
  const [a, b] = [boxes[i][1], boxes[j][1]];
  const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (x > 2 && y > 4) found.push([boxes[i][0], boxes[j][0]]);
}
return found;
"""


def test_a_click_shows_the_merge_and_its_export_command(
    browser: Browser, views: dict[int, StudyView], tmp_path: Path
) -> None:
    view = views[2]
    page = tmp_path / "front.html"
    page.write_text(front_html(front_data(view)), encoding="utf-8")
    browser.open(page.as_uri())
    other = next(number for number in view.front if number != view.knee)
    browser.click(f"#table tr[data-n='{other}']")
    detail = browser.run("return document.getElementById('detail').innerText")
    assert f"--trial {other} --out strings-{other}" in detail
    assert browser.run(f"return document.querySelector('.mark.on').dataset.n === '{other}'")
    everything = browser.run("return document.querySelectorAll('#chart [data-n]').length")
    browser.click("#zoom")
    browser.picture("front-2-zoomed")
    assert browser.run("return document.querySelectorAll('#chart [data-n]').length") <= everything
    assert (
        browser.run("return document.getElementById('zoom').getAttribute('aria-pressed')") == "true"
    )


@pytest.fixture(scope="module")
def tracked(
    views: dict[int, StudyView], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[StudyView, Target, Synced, int]]:
    """A study in a store of its own, and the port of a server on it."""
    target = tracking_target(None, "evomerge", tmp_path_factory.mktemp("store"))
    synced = sync(project(views[3]), target)
    port = free_port()
    command = [
        sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1", "--backend-store-uri", target.uri,
    ]  # fmt: skip
    for _ in started(command, f"http://127.0.0.1:{port}/health"):
        yield views[3], target, synced, port


def mlflow_page(browser: Browser, url: str, *texts: str, height: int = 1100) -> None:
    """Open a page of MLflow and wait until it says all of ``texts``."""
    browser.resize(1700, height)
    browser.open("about:blank")  # addresses that differ behind the hash alone load nothing
    browser.open(url)

    def body() -> str:
        return str(browser.run("return document.body.innerText"))

    browser.wait(lambda: all(text in body() for text in texts), 150)
    # MLflow's assistant takes a quarter of the first page that anybody opens.
    close = '[data-component-id="mlflow.assistant.chat_panel.close"]'
    browser.run(f"document.querySelector('{close}')?.click()")


def drawn(browser: Browser, css: str) -> int:
    return int(browser.run(f"return document.querySelectorAll('{css}').length"))


class TestInsideMLflow:
    def test_the_front_as_an_artifact(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        view, target, synced, port = tracked
        mlflow_page(browser, ui_url(target, synced, port, "front.html"), "coefficients.html")
        browser.wait(lambda: drawn(browser, "iframe") > 0)
        browser.enter_frame()
        browser.wait(lambda: marks(browser) > 0)
        # Seen without any click beyond opening the artifact.
        detail = browser.run("return document.getElementById('detail').innerText")
        assert f"--trial {view.knee} " in detail
        browser.leave_frame()
        browser.picture("mlflow-front")
        browser.enter_frame()
        other = next(number for number in view.front if number != view.knee)
        browser.click(f"#table tr[data-n='{other}']")
        detail = browser.run("return document.getElementById('detail').innerText")
        assert f"--trial {other} " in detail
        browser.leave_frame()

    def test_the_coefficients_as_an_artifact(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        view, target, synced, port = tracked
        mlflow_page(browser, ui_url(target, synced, port, "coefficients.html"), "front.csv")
        browser.wait(lambda: drawn(browser, "iframe") > 0)
        browser.enter_frame()
        browser.wait(lambda: drawn(browser, "svg") == len(view.front))
        browser.leave_frame()
        browser.picture("mlflow-coefficients")

    def test_the_description_leads_to_the_pareto_page(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        _, target, synced, port = tracked
        mlflow_page(browser, ui_url(target, synced, port), "Take it home", "Open the Pareto page")
        browser.picture("mlflow-overview")
        link = browser.run(
            "return [...document.links].find(a => a.innerText.includes('Pareto page')).href"
        )
        assert link == pareto_url(target, synced, port)

    def test_the_pareto_page(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        view, target, synced, port = tracked
        url = pareto_url(target, synced, port)
        mlflow_page(browser, url, "Pareto front", "sort vs. nll", "47 matching", height=1500)
        points = "path.point"
        done = sum(trial.evaluation is not None for trial in view.trials)
        browser.wait(lambda: drawn(browser, points) >= 3 * done)
        time.sleep(2)  # charts grow into the place of the assistant
        browser.picture("mlflow-pareto")
        browser.wait(lambda: drawn(browser, "canvas") > 0)  # of the parallel coordinates
        fills = browser.run(
            f"return [...document.querySelectorAll('{points}')].map(p => getComputedStyle(p).fill)"
        )
        front = sum(n in view.front and not view.trials[n].label for n in view.front)
        assert fills.count("rgb(194, 65, 12)") == 3 * front
        assert fills.count("rgb(140, 149, 159)") == 3 * sum(
            not t.label and t.evaluation is not None and t.number not in view.front
            for t in view.trials
        )

    def test_the_chart_page(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        _, target, synced, port = tracked
        url = ui_url(target, synced, port).replace("?", "/model-metrics?")
        # Tall: what is below the window is not drawn.
        mlflow_page(
            browser, url, "(best/nll)", "over the trials", "(trials/per hour)",
            "(trials/failed)", "(hypervolume)", height=2600,
        )  # fmt: skip
        assert "No image" not in browser.run("return document.body.innerText")
        browser.picture("mlflow-charts")

    def test_the_list_of_studies_has_their_objectives(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        _, target, synced, port = tracked
        mlflow_page(
            browser, studies_url(target, synced, port), "strings", "reverse", "sort", "nll",
            "hypervolume",
        )  # fmt: skip
        browser.picture("mlflow-studies")

    def test_the_front_members_by_the_query_of_the_description(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        view, _, synced, port = tracked
        query = quote(front_query(synced.run_id))
        mlflow_page(
            browser,
            f"http://127.0.0.1:{port}/#/experiments/{synced.experiment_id}/runs"
            f"?workflowType=machine_learning&searchFilter={query}"
            "&orderByKey=metrics.%60front%60&orderByAsc=false",
            f"{len(view.front)} matching runs",
        )
        browser.picture("mlflow-runs")

    def test_compare(
        self, browser: Browser, tracked: tuple[StudyView, Target, Synced, int]
    ) -> None:
        view, target, synced, port = tracked
        runs = child_runs(target, synced)
        chosen = [runs[number] for number in view.front]
        url = (
            f"http://127.0.0.1:{port}/#/compare-runs?runs={quote(json.dumps(chosen))}"
            f"&experiments={quote(json.dumps([synced.experiment_id]))}"
        )
        mlflow_page(browser, url, f"Comparing {len(chosen)} Runs", "weight.one", "reverse")
        browser.wait(lambda: drawn(browser, ".js-plotly-plot") > 0)
        browser.picture("mlflow-compare")


def child_runs(target: Target, synced: Synced) -> dict[int, str]:
    """Return the id of each trial's run."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=target.uri)
    found = client.search_runs([synced.experiment_id], children_query(synced.run_id))
    return {int(run.data.tags["evomerge.trial"]): run.info.run_id for run in found}
