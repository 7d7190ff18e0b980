"""A study as a job on a real Ray head: submitted, attached to, followed, stopped, continued."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_head import Head, local_head
from tiny_project import tiny_project

from evomerge.journal import JOURNAL, read
from evomerge.study_view import StudyState, StudyView

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None, reason="needs ray[default]: its dashboard"
    ),
]

CANARY = "hf_canary_that_must_not_travel"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with local_head(cpus=3) as one:
        yield one


@pytest.fixture(scope="module")
def project(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("cluster"), save_llama)


def evomerge(head: Head, *arguments: object, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "evomerge", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env=head.environment | environment,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def tells(directory: Path) -> list[dict[str, Any]]:
    if not (directory / JOURNAL).exists():
        return []
    return [record for record in read(directory).records if record["ev"] == "tell"]


def essence(directory: Path) -> list[str]:
    """Return what was found for each trial; the order of completion is physical."""
    fields = ("trial", "status", "values", "errors")
    found = sorted(tells(directory), key=lambda one: int(one["trial"]))
    return [json.dumps([one.get(field) for field in fields]) for one in found]


def test_a_stopped_job_continues_and_repeats_nothing(
    head: Head, project: Path, tmp_path: Path
) -> None:
    study, directory = project / "study.yaml", tmp_path / "shared" / "tiny"
    settings = ("search.trials=200", "search.parallel=4")
    cluster = ("pool.kind=ray", "pool.workers=2", f"directory={directory}")
    submit = ["submit", study, "--address", head.url]
    for setting in (*settings, *cluster):
        submit += ["--set", setting]

    code, out, err = evomerge(head, *submit, HF_TOKEN=CANARY)
    assert code == 0, err
    assert out.startswith("submitted as evomerge-tiny-")
    assert "HF_TOKEN: not sent" in err
    code, out, _ = evomerge(head, *submit)
    assert (code, "is at work on this study already" in out) == (0, True)
    code, _, err = evomerge(head, *submit, "--set", "search.trials=201")
    assert code == 5, err
    assert "with other settings" in err

    code, out, _ = evomerge(head, "status", study)
    assert (code, "evomerge-tiny-" in out) == (0, True)
    deadline = time.monotonic() + 180
    while len(tells(directory)) < 8:
        assert time.monotonic() < deadline, evomerge(head, "logs", study)
        time.sleep(0.05)
    code, out, err = evomerge(head, "stop", study)
    assert code == 0, err
    assert "stopped; to continue: evomerge submit" in out
    view = StudyView.load(directory)
    assert view.state is StudyState.INTERRUPTED, evomerge(head, "logs", study)
    before = (directory / JOURNAL).read_bytes()
    stopped = len(tells(directory))
    assert 8 <= stopped < 200
    code, out, _ = evomerge(head, "status", study, "--json")
    facts = json.loads(out)
    assert (facts["state"], facts["job"]["status"]) == ("interrupted", "STOPPED")

    code, out, err = evomerge(head, *submit, "--follow")
    assert code == 0, out + err
    assert "results were taken from the journal" in out
    assert "Pareto front" in out
    assert "-2 (" in out
    assert "-1 (stopped" in out
    assert (directory / JOURNAL).read_bytes().startswith(before)
    assert StudyView.load(directory).state is StudyState.FINISHED
    assert set(Counter(one["trial"] for one in tells(directory)).values()) == {1}

    alone = tmp_path / "alone"
    run = ["run", study, "--set", f"directory={alone}"]
    for setting in settings:
        run += ["--set", setting]
    code, out, err = evomerge(head, *run, RAY_ADDRESS="")
    assert code == 0, err
    assert essence(directory) == essence(alone), "the cluster found other scores"
    for path in (directory, project):
        for one in path.rglob("*"):
            assert not one.is_file() or CANARY.encode() not in one.read_bytes(), one
    assert CANARY not in jobs_of(head)


def jobs_of(head: Head) -> str:
    """Return everything that Ray tells of its jobs to somebody with the token."""
    code = (
        "import sys; from evomerge.jobs import connect;"
        "print(connect(sys.argv[1])._client.list_jobs())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, head.url],
        capture_output=True, text=True, check=True, env=head.environment,
    )  # fmt: skip
    assert "evomerge-tiny-" in done.stdout
    return done.stdout


def test_what_the_driver_refuses_is_what_the_user_sees(
    head: Head, project: Path, tmp_path: Path
) -> None:
    study = project / "study.yaml"
    code, out, err = evomerge(
        head, "submit", study, "--address", head.url, "--follow",
        "--set", "pool.kind=ray", "--set", f"directory={tmp_path / 'x'}",
        "--set", "models.experts={math: /nowhere/math}",
    )  # fmt: skip
    assert code == 2, err
    assert "models.experts.math: no such directory: /nowhere/math" in out
    assert "/nowhere/math must be there on every machine" in err
    assert "it does not exist on this machine" in err


@pytest.mark.parametrize("token", ["", "0" * 32])
def test_without_the_token_nothing_is_done(
    head: Head, project: Path, tmp_path: Path, token: str
) -> None:
    path = tmp_path / "token"
    path.write_text(token)
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)} if token else {
        "RAY_AUTH_MODE": "disabled"
    }  # fmt: skip
    code, _, err = evomerge(
        head, "submit", project / "study.yaml", "--address", head.url,
        "--set", "pool.kind=ray", "--set", f"directory={tmp_path / 'x'}", **mode,
    )  # fmt: skip
    assert code == 4, err
    assert "wants a token, or another one (set RAY_AUTH_MODE=token" in err
    assert "Traceback" not in err
    assert [one.name for one in tmp_path.iterdir()] == ["token"]
