"""The pages of a study that was really run on a Python function, without any lm-eval task."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_browser import OVERLAPS, Browser, drawn, free_port, marks, mlflow_page, started
from test_browser import browser as browser
from test_browser import driver as driver
from test_browser import pytestmark as pytestmark
from tiny_project import STUDY, tiny_project

from evomerge.launch import locate_study
from evomerge.report import save_report
from evomerge.study_view import StudyView
from evomerge.tracking_target import Synced, Target, pareto_url, studies_url, ui_url

CODE = """
import torch


def likely(model, tokenizer, items):
    found = []
    for item in items:
        ids = tokenizer(item["text"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append(-float(model(ids, labels=ids).loss))
    return found
"""
FITNESS = """
fitness:
  objectives:
    - {kind: python, function: fitness/mine.py:likely, items: fitness/mine.jsonl, name: front,
       direction: minimize, unit: nats, split: {search: 6, validation: 6, test: 6}}
    - {kind: distance, norm: l2}
"""

Shown = tuple[StudyView, Target, Synced, int]


@pytest.fixture(scope="module")
def shown(
    tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]
) -> Iterator[Shown]:
    """The study, and the port of a server on its own store."""
    before, rest = STUDY.split("fitness:\n")
    study = before + FITNESS.lstrip() + rest[rest.index("search: {searcher") :]
    study = study.replace("trials: 6, finalists: 2", "trials: 24, finalists: 6").replace(
        "tracking: {enabled: false}", "tracking: {experiment: python}"
    )
    folder = tiny_project(tmp_path_factory.mktemp("python"), save_llama, study)
    (folder / "fitness/mine.py").write_text(CODE)
    texts = ["abcdefgh"[k : k + 4] + "=" + "hgfedcba"[k % 5 :] for k in range(18)]
    (folder / "fitness/mine.jsonl").write_text("".join(f'{{"text": "{t}"}}\n' for t in texts))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "evomerge", "run", "study.yaml"],
        cwd=folder, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    view = StudyView.load(folder / "studies/tiny")
    target, synced = locate_study(view)
    port = free_port()
    command = [
        sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1", "--backend-store-uri", target.uri,
    ]  # fmt: skip
    for _ in started(command, f"http://127.0.0.1:{port}/health"):
        yield view, target, synced, port


def test_the_pareto_page(browser: Browser, shown: Shown) -> None:
    """The objective's name is that of a metric of ours: it has another one there."""
    view, target, synced, port = shown
    url = pareto_url(target, synced, port)
    mlflow_page(browser, url, "objective front vs. distance_l2", f"{len(view.trials)} matching")
    browser.wait(lambda: drawn(browser, "path.point") >= len(view.trials))
    browser.wait(lambda: drawn(browser, "canvas") > 0)
    browser.picture("python-pareto")
    fills = browser.run(
        "return [...document.querySelectorAll('path.point')].map(p => getComputedStyle(p).fill)"
    )
    front = sum(not view.trials[number].label for number in view.front)
    assert fills.count("rgb(194, 65, 12)") == front


def test_the_front_as_an_artifact(browser: Browser, shown: Shown) -> None:
    view, target, synced, port = shown
    mlflow_page(browser, ui_url(target, synced, port, "front.html"), "coefficients.html")
    browser.wait(lambda: drawn(browser, "iframe") > 0)
    browser.enter_frame()
    browser.wait(lambda: marks(browser) > 0)
    detail = browser.run("return document.getElementById('detail').innerText")
    assert f"--trial {view.knee} " in detail
    assert "distance_l2" in detail
    assert browser.run(OVERLAPS) == []
    browser.leave_frame()
    browser.picture("python-front")


def test_the_list_of_studies(browser: Browser, shown: Shown) -> None:
    _, target, synced, port = shown
    mlflow_page(
        browser, studies_url(target, synced, port), "tiny", "objective front", "distance_l2"
    )
    browser.picture("python-studies")


def test_the_report(browser: Browser, shown: Shown, tmp_path: Path) -> None:
    view = shown[0]
    save_report(view, tmp_path / "report.html")
    browser.resize(1300, 2400)
    browser.requests()
    browser.open((tmp_path / "report.html").as_uri())
    assert marks(browser) > 0
    own = ("file:", "data:", "chrome:", "chrome-untrusted:")
    outside = [url for url in browser.requests() if not url.startswith(own)]
    assert outside == []
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.picture("python-report")
