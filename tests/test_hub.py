"""Uploading an export: what the Hub is sent, checked by a server that stands for it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import InputError, SetupError
from evomerge.hub import require_hub

TOKEN = "hf_" + "x" * 30


@dataclass
class Hub:
    """What the server was sent, and how it shall answer."""

    address: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    created: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    present: tuple[str, ...] = (".gitattributes",)
    fail: str = ""


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, data: Any, code: int = 200) -> None:
            body = json.dumps(data).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            state.requests.append((self.command, path))
            if not path.startswith("/blob/"):  # uploads go to addresses with their own rights
                state.tokens.add(self.headers.get("Authorization"))
            if state.fail and state.fail in path:
                self.answer({"error": "out of order"}, 403)
            elif path == "/api/repos/create":
                state.created = json.loads(body)
                self.answer({"url": f"{state.address}/me/merge", "name": "me/merge"})
            elif path.startswith("/api/validate-yaml"):
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in json.loads(body)["files"]
                ]
                self.answer({"files": files, "commitOid": "0" * 40})
            elif path.endswith("/objects/batch"):
                objects = [
                    {**one, "actions": {"upload": {"href": f"{state.address}/blob/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                self.answer({"objects": objects, "transfer": "basic"})
            elif path.startswith("/blob/"):
                state.blobs[path.removeprefix("/blob/")] = body
                self.answer({})
            elif "/commit/" in path:
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        state.stored[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        state.stored[value["path"]] = state.blobs[value["oid"]]
                self.answer(
                    {
                        "commitUrl": f"{state.address}/me/merge/commit/{'1' * 40}",
                        "commitOid": "1" * 40,
                    }
                )
            elif path.startswith("/api/models/me/merge/tree/"):
                self.answer(
                    [
                        {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
                        for name in state.present
                    ]
                )
            elif path.startswith("/api/models/"):
                siblings = [{"rfilename": name} for name in state.present]
                self.answer({"id": "me/merge", "sha": "0" * 40, "siblings": siblings})
            else:
                self.answer({"error": f"not known here: {path}"}, 404)

    for method in ("GET", "POST", "PUT", "HEAD"):
        setattr(Handler, f"do_{method}", Handler.handle_one)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "README.md").write_text("---\nlicense: mit\n---\n# merged\n")
    (tmp_path / "merged" / "config.json").write_text("{}")
    (tmp_path / "merged" / "model.safetensors").write_bytes(os.urandom(5000))
    return tmp_path / "merged"


def push(hub: Hub, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Push in a process of its own: huggingface_hub reads its settings when it is imported."""
    code = (
        "import sys; from pathlib import Path; from evomerge.errors import EvomergeError;"
        "from evomerge.hub import push, require_hub\n"
        "try:\n"
        "    require_hub('me/merge'); print(push(Path(sys.argv[1]), 'me/merge'))\n"
        "except EvomergeError as error:\n"
        "    print(error, file=sys.stderr); sys.exit(error.exit_code)\n"
    )
    known = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(folder.parent / "hf"), **environment,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=known, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_files_arrive_in_a_private_repository(hub: Hub, folder: Path) -> None:
    done = push(hub, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/merge"
    assert hub.stored == contents(folder)
    name = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert list(hub.blobs) == [name]
    assert hub.created["name"] == "merge"
    assert hub.created["organization"] == "me"
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert [path for _, path in hub.requests].count("/api/models/me/merge/commit/main") == 1


@pytest.mark.parametrize("where", ["/blob/", "/commit/"])
def test_a_failure_half_way_loses_nothing(hub: Hub, folder: Path, where: str) -> None:
    hub.fail = where
    before = contents(folder)
    done = push(hub, folder)
    assert done.returncode == SetupError.exit_code
    assert "me/merge is not complete on the Hub: " in done.stderr
    assert f"(the export in {folder} is whole; to try again: hf upload me/merge " in done.stderr
    assert TOKEN not in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.stored == {}
    assert contents(folder) == before


def test_other_files_in_the_repository_are_not_mixed_with_ours(hub: Hub, folder: Path) -> None:
    hub.present = (".gitattributes", "README.md", "model-00001-of-00002.safetensors")
    done = push(hub, folder)
    assert done.returncode == InputError.exit_code
    assert "me/merge holds files (README.md, model-00001-of-00002.safetensors)" in done.stderr
    assert hub.stored == {}


def test_a_model_with_files_of_the_same_names_is_not_replaced(hub: Hub, folder: Path) -> None:
    hub.present = (".gitattributes", "config.json", "model.safetensors")
    done = push(hub, folder)
    assert done.returncode == InputError.exit_code
    assert "me/merge holds files (config.json, model.safetensors)" in done.stderr
    assert hub.stored == {}


def test_a_hub_that_cannot_be_reached(hub: Hub, folder: Path) -> None:
    done = push(hub, folder, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == SetupError.exit_code
    assert "is not complete on the Hub" in done.stderr
    assert "Traceback" not in done.stderr


class TestBefore:
    """What cannot work is refused before a merge is written."""

    @pytest.mark.parametrize("name", ["merge", "a/b/c", "me/mer ge", "me/..", ""])
    def test_names(self, name: str) -> None:
        with pytest.raises(InputError, match="expected owner/name, got"):
            require_hub(name)

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
        with pytest.raises(SetupError, match="HF_HUB_OFFLINE is set"):
            require_hub("me/merge")

    def test_nobody_is_logged_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(SetupError, match=r"not logged in to the Hub \(run `hf auth login`"):
            require_hub("me/merge")
