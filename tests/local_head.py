"""A real Ray cluster on this machine, with the door for jobs, that a test starts and ends.

Run as a program it is the cluster: it prints where it is, and lives until its stdin is closed.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Head:
    """Where it is.

    Attributes:
        url: of the door for jobs, on loopback.
        environment: with its token; what a user would have set.
    """

    url: str
    environment: dict[str, str]


@contextlib.contextmanager
def local_head(cpus: int) -> Iterator[Head]:
    """Run a cluster with token authentication."""
    # Ray's sockets lie below it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="em", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    # PATH and PYTHONPATH stand for an installed evomerge.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    code = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": path,
        "PYTHONPATH": code, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    log = folder / "head.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__, str(cpus), str(folder / "ray")],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Head(json.loads(line)["url"], environment)
    finally:
        process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _main(cpus: int, folder: str) -> None:
    from ray.cluster_utils import Cluster

    port = _free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus, "include_dashboard": True, "dashboard_host": "127.0.0.1",
            "dashboard_port": port, "temp_dir": folder, "object_store_memory": 80 * 2**20,
        },
    )  # fmt: skip
    try:
        url = cluster.head_node.address_info["webui_url"]
        print(json.dumps({"url": f"http://{url}"}), flush=True)
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
