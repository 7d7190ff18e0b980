"""Workers of one machine load in turn, and fetch a hub model once."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from evomerge import worker
from evomerge.loading import loading_turn

ROOT = Path(__file__).resolve().parents[1]

HOLD = """
import sys, time
from evomerge.loading import loading_turn
with loading_turn():
    print(time.monotonic(), flush=True)
    time.sleep(float(sys.argv[1]))
    print(time.monotonic(), flush=True)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def start(code: str, tmp_path: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)} | more
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def test_three_processes_take_turns(tmp_path: Path) -> None:
    spans = [
        tuple(map(float, finish(one).split()))
        for one in [start(HOLD, tmp_path, "0.2") for _ in range(3)]
    ]
    ordered = sorted(spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ordered))


def test_the_turn_of_a_killed_worker_is_free(tmp_path: Path) -> None:
    process = start(HOLD, tmp_path, "60")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    began = time.monotonic()
    with loading_turn():
        assert time.monotonic() - began < 5


def test_a_folder_that_others_can_write_is_not_trusted(
    own_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = own_folder / f"evomerge-{os.getuid()}"
    folder.symlink_to("/nowhere")
    with caplog.at_level(logging.WARNING), loading_turn():
        pass
    assert "all at once" in caplog.text
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o777)
    with loading_turn():
        assert list(folder.iterdir()) == []


def test_a_worker_loads_in_its_turn(
    llama_family: Callable[..., tuple[Path, list[tuple[str, str]]]],
    own_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, experts = llama_family()
    turn = own_folder / f"evomerge-{os.getuid()}" / "loading.lock"
    held: list[bool] = []

    class SeenError(Exception):
        pass

    def merger(*arguments: object) -> None:
        """Reads weights, in the real one."""
        with turn.open("rb") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(False)
            except BlockingIOError:
                held.append(True)
        raise SeenError

    monkeypatch.setattr(worker, "Merger", merger)
    factory = worker.ModelWorkerFactory(
        base=str(base), experts=tuple(experts), dtype="F32", device="cpu", threads=1, tasks=(),
        include_paths=(), data_root=own_folder, allow_task_code=False, batch_size=1,
    )  # fmt: skip
    with pytest.raises(SeenError):
        factory()
    assert held == [True]
    with loading_turn():  # and it was given back
        pass


class Hub(BaseHTTPRequestHandler):
    """The hub with one model; slow enough that all who fetch meet."""

    sent: ClassVar[Counter[str]] = Counter()
    files = ("config.json", "model.safetensors")

    def do_HEAD(self) -> None:
        self._answer(b"x" * 1000, body=False)

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            entries = [
                {"type": "file", "path": name, "size": 1000, "oid": "b" * 40} for name in self.files
            ]
            self._answer(json.dumps(entries).encode(), body=True)
            return
        if self.path.startswith("/api/"):
            listed = [{"rfilename": name} for name in self.files]
            about = {"id": "org/m", "modelId": "org/m", "sha": "a" * 40, "siblings": listed}
            self._answer(json.dumps(about).encode(), body=True)
            return
        self.sent[self.path.rpartition("/")[2]] += 1
        time.sleep(0.5)
        self._answer(b"x" * 1000, body=True)

    def _answer(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"e"' if "config" in self.path else '"f"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.sent.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_workers_of_one_machine_fetch_a_hub_model_once(hub: str, tmp_path: Path) -> None:
    code = "from evomerge.checkpoint import locate; print(locate('org/m', 'models.base'))"
    settings = {
        "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", "NO_PROXY": "*",
    }  # fmt: skip
    found = {finish(one).strip() for one in [start(code, tmp_path, **settings) for _ in range(3)]}
    assert len(found) == 1
    assert (Path(found.pop()) / "model.safetensors").read_bytes() == b"x" * 1000
    assert Hub.sent == {"config.json": 1, "model.safetensors": 1}
