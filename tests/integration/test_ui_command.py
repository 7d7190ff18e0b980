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
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert "compareRunsMode=CHART" in url
            root = f"http://{urlsplit(url).netloc}"
            with urllib.request.urlopen(f"{root}/health", timeout=10) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{root}/health", timeout=5)
