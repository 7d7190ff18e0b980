"""The report in a real browser: its scripts run without a network and without errors."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from answered_study import answered

from evomerge.report import save_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]


def test_the_page_draws_itself(tmp_path: Path) -> None:
    view = answered(tmp_path / "strings")
    save_report(view, tmp_path / "report.html")
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors
    page = done.stdout
    assert f"knee (trial {view.knee})" in page, "written by the script into the plot"
    detail = re.search(r'id="detail">(.*?)</aside>', page, re.DOTALL)
    assert detail is not None
    assert "evomerge export" in detail[1]
    assert page.count('class="mark') >= len(view.baselines)
    assert "Over the trials" in page
