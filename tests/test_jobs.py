"""Jobs against a cluster that is not there, or a stand-in for its client."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evomerge import cli, jobs
from evomerge.errors import InputError, LockedError, SetupError
from evomerge.jobs import Jobs
from evomerge.submission import Package, StudyKey

KEY = StudyKey("tiny", "/shared/studies/tiny")


class Cluster:
    """Keeps what was submitted, as Ray's client would show it."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.sent: list[dict[str, Any]] = []
        self.rival = False  # whether somebody else submits the same study first
        self.breaks = 0  # connections that break while a log is followed
        self.log = "Running entrypoint\nsearch: 3/40\n"

    def list_jobs(self) -> list[Any]:
        return list(self.jobs)

    def add(self, name: str, digest: str, status: str = "RUNNING", code: int | None = None) -> None:
        self.jobs.append(
            SimpleNamespace(
                submission_id=name, status=SimpleNamespace(value=status), message="",
                driver_exit_code=code, metadata={"digest": digest}, start_time=1000, end_time=None,
            )
        )  # fmt: skip

    def submit_job(self, **arguments: Any) -> str:
        name = arguments["submission_id"]
        if self.rival:
            self.rival = False
            self.add(name, arguments["metadata"]["digest"])
        if any(one.submission_id == name for one in self.jobs):
            raise RuntimeError(f"Request failed with status code 500: {name} already exists")
        self.sent.append(arguments)
        self.add(name, arguments["metadata"]["digest"])
        return str(name)

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self.breaks:
            self.breaks -= 1
            yield self.log[:25]
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield self.log
        self.end("SUCCEEDED", 0)

    def stop_job(self, job_id: str) -> bool:
        self.end("STOPPED", None)
        return True

    def end(self, status: str, code: int | None) -> None:
        self.jobs[-1].status = SimpleNamespace(value=status)
        self.jobs[-1].driver_exit_code = code


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def package(digest: str = "d1") -> Package:
    return Package(KEY, Path("folder"), digest, 1, 1, ())


def test_a_study_is_submitted_once_while_it_runs(cluster: Cluster) -> None:
    first = Jobs(cluster).submit(package())
    assert (first.job, first.attempt, first.attached) == (f"{KEY.job}-1", 1, False)
    again = Jobs(cluster).submit(package())
    assert (again.job, again.attached) == (first.job, True)
    assert len(cluster.sent) == 1


def test_other_settings_do_not_join_a_running_job(cluster: Cluster) -> None:
    Jobs(cluster).submit(package())
    with pytest.raises(LockedError, match="with other settings or files"):
        Jobs(cluster).submit(package("d2"))


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_after_its_end_a_study_is_continued(cluster: Cluster, status: str) -> None:
    Jobs(cluster).submit(package())
    cluster.end(status, 1)
    next_one = Jobs(cluster).submit(package("d2"))
    assert (next_one.job, next_one.attached) == (f"{KEY.job}-2", False)
    assert next_one.before is not None
    assert next_one.before.status == status


def test_of_two_submitters_at_once_one_starts_it(cluster: Cluster) -> None:
    cluster.rival = True
    found = Jobs(cluster).submit(package())
    assert (found.job, found.attached) == (f"{KEY.job}-1", True)
    assert cluster.sent == []


def test_a_head_that_is_still_starting_is_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, refusals = (
        cluster.submit_job,
        ["No available agent to submit job, please try again"] * 2,
    )

    def starting(**arguments: Any) -> str:
        if refusals:
            raise RuntimeError(f"Request failed with status code 500: {refusals.pop()}")
        return submit(**arguments)

    monkeypatch.setattr(cluster, "submit_job", starting)
    assert Jobs(cluster).submit(package()).job == f"{KEY.job}-1"
    assert not refusals


def test_attempts_are_counted_not_sorted_as_text(cluster: Cluster) -> None:
    for number in (1, 2, 10, 9):
        cluster.add(f"{KEY.job}-{number}", "d1", "FAILED", 1)
    for other in ("raysubmit_x", None, f"{KEY.job}0-11", f"{KEY.job}-x", KEY.job):
        cluster.add(other, "d1")  # type: ignore[arg-type]  # Ray has None for other drivers
    assert Jobs(cluster).submit(package()).attempt == 11


def test_what_is_sent_holds_no_secret_and_no_shell_words(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    Jobs(cluster).submit(package(), grace=77)
    (sent,) = cluster.sent
    assert sent["entrypoint"] == "exec python -m evomerge run study.yaml"
    assert sent["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "77"}
    assert set(sent["runtime_env"]) == {"working_dir", "env_vars"}
    assert "canary" not in json.dumps(sent)


def test_options_of_the_run_travel_with_the_job(cluster: Cluster) -> None:
    Jobs(cluster).submit(package(), options=["--restart-search"])
    (sent,) = cluster.sent
    assert sent["entrypoint"] == "exec python -m evomerge run study.yaml --restart-search"


def test_a_log_is_followed_over_a_broken_connection(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    Jobs(cluster).submit(package())
    cluster.breaks = 2
    shown: list[str] = []
    job = Jobs(cluster).follow(KEY, shown.append)
    assert "".join(shown) == cluster.log
    assert (job.status, job.exit_code, job.over, job.lost) == ("SUCCEEDED", 0, True, False)


def test_a_job_whose_driver_was_killed_is_lost(cluster: Cluster) -> None:
    for code in (None, -9):
        cluster.add(f"{KEY.job}-1", "d1", "FAILED", code)
        assert Jobs(cluster).last(KEY).lost
    cluster.end("FAILED", 2)
    assert not Jobs(cluster).last(KEY).lost


def test_stop_waits_for_the_end(cluster: Cluster) -> None:
    Jobs(cluster).submit(package())
    assert Jobs(cluster).stop(Jobs(cluster).last(KEY), None).status == "STOPPED"


@pytest.mark.parametrize("command", ["follow", "stop"])
def test_a_cluster_that_was_restarted_has_forgotten_the_job(
    cluster: Cluster, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    Jobs(cluster).submit(package())
    monkeypatch.setattr(cluster, "end", lambda *_: cluster.jobs.clear())
    with pytest.raises(SetupError, match=f"has forgotten the job {KEY.job}-1 .*it continues"):
        if command == "follow":
            Jobs(cluster).follow(KEY, shown.append)
        else:
            Jobs(cluster).stop(Jobs(cluster).last(KEY), None)


def test_a_study_without_jobs_says_what_to_do(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="submit the study again: it continues"):
        Jobs(cluster).last(KEY)


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        yield taken.getsockname()[1]


@pytest.mark.parametrize(
    "form", ["http://me:secret@127.0.0.1:{}", "127.0.0.1:{}", "ray://127.0.0.1:{}"]
)
def test_no_cluster_there(form: str, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in jobs.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SetupError) as caught:
        jobs.connect(jobs.cluster_address(form.format(closed_port)))
    text = str(caught.value)
    assert f"127.0.0.1:{closed_port} within 10 s: Connection refused (start the cluster" in text
    assert "secret" not in text
    monkeypatch.setenv("RAY_ADDRESS", form.format(closed_port))
    with pytest.raises(SetupError, match=str(closed_port)):
        jobs.connect(jobs.cluster_address(None, "http://127.0.0.1:1"))


def test_which_cluster_is_meant_is_never_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in jobs.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert jobs.cluster_address(None) == "http://127.0.0.1:8265"
    assert jobs.cluster_address(None, "http://r:1") == "http://r:1"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert jobs.cluster_address(None, "http://r:1") == "http://r:1"
    assert jobs.cluster_address(None, "auto") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://v:1")
    assert jobs.cluster_address(None, "http://r:1") == "http://v:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://w:1")
    assert jobs.cluster_address(None, "http://r:1") == "http://w:1"
    assert jobs.cluster_address("http://g:1", "http://r:1") == "http://g:1"
    with pytest.raises(InputError, match="--address: expected the address of one cluster"):
        jobs.cluster_address("auto")


def test_the_given_address_wins_over_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "a:1")
    with jobs._only_address():
        assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_ADDRESS"] == "a:1"


class TestCommands:
    """The command line over the stand-in."""

    @pytest.fixture(autouse=True)
    def here(self, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in jobs.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        self.asked: list[str] = []

        def connect(address: str) -> Jobs:
            self.asked.append(address)
            return Jobs(cluster)

        monkeypatch.setattr(jobs, "connect", connect)
        text = "directory: /nowhere/tiny\nmodels: {base: org/b, experts: {a: org/a}}\n"
        Path("study.yaml").write_text("name: tiny\nfitness: {tasks: [t]}\n" + text)

    def call(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
    ) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["evomerge", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    def test_submit_status_logs_stop(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cluster: Cluster
    ) -> None:
        code, out, _ = self.call(capsys, monkeypatch, "submit", "study.yaml")
        assert (code, out.startswith("submitted as evomerge-tiny-")) == (0, True)
        code, out, _ = self.call(capsys, monkeypatch, "status", "study.yaml")
        assert (code, "RUNNING since 1970" in out, "search: 3/40" in out) == (0, True, True)
        code, out, _ = self.call(capsys, monkeypatch, "logs", "study.yaml")
        assert (code, out) == (0, cluster.log)
        code, out, _ = self.call(capsys, monkeypatch, "stop", "study.yaml")
        assert (code, "stopped; to continue: evomerge submit study.yaml" in out) == (0, True)
        code, out, _ = self.call(capsys, monkeypatch, "stop", "study.yaml")
        assert (code, "is not running: stopped" in out) == (0, True)
        code, out, _ = self.call(capsys, monkeypatch, "submit", "study.yaml", "--json")
        assert json.loads(out)["attempt"] == 2

    def test_the_address_is_kept_and_the_command_to_continue_is_complete(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.call(capsys, monkeypatch, "submit", "study.yaml", "--address", "http://me:pw@h:1")
        for words in (
            ("submit", "study.yaml", "--set", "directory=/x"), ("status", "study.yaml"),
            ("logs", "study.yaml"),
        ):  # fmt: skip
            code, _, err = self.call(capsys, monkeypatch, *words)
            assert (code, err) == (0, ""), words
        record = json.loads(Path("study.job.json").read_text())
        assert (record["address"], record["directory"]) == ("http://h:1", "/x")
        code, out, _ = self.call(capsys, monkeypatch, "stop", "study.yaml")
        assert self.asked == ["http://me:pw@h:1", *["http://h:1"] * 4]
        command = out.partition("to continue: ")[2].split()
        assert command[2:] == ["study.yaml", "--address", "http://h:1", "--set", "directory=/x"]
        code, out, err = self.call(capsys, monkeypatch, *command[1:])
        assert (code, "continues after evomerge-tiny-" in out) == (0, True), err

    def test_without_evomerge_on_the_cluster_it_says_so(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cluster: Cluster
    ) -> None:
        self.call(capsys, monkeypatch, "submit", "study.yaml")
        cluster.log = "Running entrypoint\n/opt/bin/python: No module named evomerge\n"
        needed = "evomerge must be installed on every machine of the cluster"
        assert needed not in self.call(capsys, monkeypatch, "status", "study.yaml")[1]
        cluster.end("FAILED", 1)
        assert needed in self.call(capsys, monkeypatch, "status", "study.yaml")[1]
        monkeypatch.setattr(cluster, "end", lambda *_: None)
        code, _, err = self.call(capsys, monkeypatch, "logs", "study.yaml", "--follow")
        assert (code, needed in err) == (1, True)
        cluster.log = "No module named 'evomerge_extras'\n"
        assert needed not in self.call(capsys, monkeypatch, "status", "study.yaml")[1]

    @pytest.mark.parametrize(
        ("status", "exit_code", "expected"),
        [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 6, 6), ("FAILED", -9, 4),
         ("FAILED", None, 4), ("STOPPED", None, 143)],
    )  # fmt: skip
    def test_following_ends_as_the_job_does(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        cluster: Cluster, status: str, exit_code: int | None, expected: int,
    ) -> None:  # fmt: skip
        end = cluster.end
        monkeypatch.setattr(cluster, "end", lambda *_: end(status, exit_code))
        code, out, err = self.call(capsys, monkeypatch, "submit", "study.yaml", "--follow")
        assert code == expected, err
        assert "search: 3/40" in out

    def test_a_cluster_that_is_gone_is_a_clear_error(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.call(capsys, monkeypatch, "submit", "study.yaml")

        def gone(address: str | None) -> Jobs:
            raise SetupError("ray: cannot reach it")

        monkeypatch.setattr(jobs, "connect", gone)
        for verb in ("status", "logs", "stop", "submit"):
            code, _, err = self.call(capsys, monkeypatch, verb, "study.yaml")
            assert (code, "cannot reach it" in err) == (4, True), verb
