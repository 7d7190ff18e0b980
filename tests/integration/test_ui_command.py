"""`evomerge ui` on a study that was really run: it serves, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tiny_project import STUDY, tiny_project

pytestmark = pytest.mark.slow


def test_it_serves_until_interrupted(tmp_path: Path, save_llama: Callable[..., Path]) -> None:
    study = STUDY.replace("tracking: {enabled: false}", "tracking: {experiment: tiny}")
    folder = tiny_project(tmp_path, save_llama, study)
    evomerge = [sys.executable, "-W", "ignore", "-m", "evomerge"]
    ran = subprocess.run(
        [*evomerge, "run", "study.yaml"], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    assert "evomerge ui " in ran.stdout
    assert "viewStateShareKey=" in ran.stdout  # the link to the Pareto page
    with subprocess.Popen(
        [*evomerge, "ui", "study.yaml", "--no-browser"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            # It was silent until MLflow answered, a minute on a busy machine.
            first = process.stderr.readline()
            assert first == "waiting for MLflow to hold all of the study ...\n"
            url = process.stdout.readline().strip()
            assert "compareRunsMode=CHART" in url
            root = f"http://{urlsplit(url).netloc}"
            with urllib.request.urlopen(f"{root}/health", timeout=10) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            said = process.stderr.read()
            port = urlsplit(url).port
            assert f"waiting for MLflow's user interface to answer on port {port} ..." in said
            assert said.endswith("Ctrl-C stops it\nstopped\n")
        finally:
            process.kill()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{root}/health", timeout=5)
