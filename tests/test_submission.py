"""What travels with a submitted study: its small files; no weights, no secrets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge import submission
from evomerge.config import StudyFile, load
from evomerge.errors import InputError
from evomerge.submission import Package, Submitted, pack, submitted

STUDY = """
name: tiny
directory: /shared/studies/tiny
models: {base: models/base, experts: {math: org/math-7b, code: /shared/models/code}}
fitness:
  tasks: [pick_a]
  objectives:
    - {kind: python, function: "code/mine.py:score", items: data/mine.jsonl}
    - {kind: entropy, text: data/texts.txt}
  include_path: tasks
"""
TASK = """
task: pick_a
include: base/_shared.yaml
dataset_path: json
dataset_kwargs: {data_files: {test: data/pick_a.jsonl, train: "data/train-*.jsonl"}}
"""
FILES = (
    "code/mine.py", "code/beside.py", "data/mine.jsonl", "data/pick_a.jsonl", "data/texts.txt",
    "data/train-0.jsonl", "tasks/base/_shared.yaml", "tasks/other.yaml",
    "tasks/pick_a.yaml",
)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*submission._SECRETS, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "project"
    for name in (*FILES, "data/unused.jsonl", "models/base/model.safetensors", "tasks/.env"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}\n")
    (root / "tasks/other.yaml").write_text(
        TASK.replace("pick_a", "other").replace("include: base/_shared.yaml", "")
    )
    (root / "tasks/pick_a.yaml").write_text(TASK)
    (root / "study.yaml").write_text(STUDY)
    return root


def packed(project: Path, *overrides: str, to: str = "job") -> Package:
    folder = project.parent / to
    folder.mkdir(exist_ok=True)
    return pack(load(project / "study.yaml", overrides), project / "study.yaml", folder)


def inside(package: Package) -> set[str]:
    found = (one for one in package.folder.rglob("*") if one.is_file())
    return {str(one.relative_to(package.folder)) for one in found}


def test_everything_that_the_study_names_travels_and_nothing_else(project: Path) -> None:
    package = packed(project)
    assert inside(package) == {*FILES, "study.yaml"}
    assert package.files == len(FILES) + 1
    sent = load(package.folder / "study.yaml")
    assert sent.models.base == str(project / "models/base")
    assert sent.models.experts == {"math": "org/math-7b", "code": "/shared/models/code"}
    assert (sent.name, sent.directory) == ("tiny", "/shared/studies/tiny")
    here, elsewhere = package.notes
    assert f"{project / 'models/base'} must be there on every machine" in here
    assert "does not exist on this machine" not in here
    assert "models.experts.code: weights are not sent; /shared/models/code" in elsewhere
    assert "it does not exist on this machine" in elsewhere


def test_equal_studies_have_equal_digests_and_any_change_shows(project: Path) -> None:
    first = packed(project)
    assert packed(project, to="again").digest == first.digest
    assert packed(project, "seed=1", to="seed").digest != first.digest
    (project / "data/mine.jsonl").write_text("{} \n")
    assert packed(project, to="data").digest != first.digest


def test_a_study_is_its_name_and_its_directory(project: Path) -> None:
    key = packed(project).key
    assert packed(project, "search.trials=7", to="b").key == key
    assert packed(project, "directory=/shared/other", to="c").key.job != key.job
    assert key.job.startswith("evomerge-tiny-")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("directory=studies/tiny", "directory: a submitted study needs an absolute one, got"),
        ("directory=null", "needs an absolute one, got none: a folder on"),
        ("directory=null", "such as /shared/studies/tiny"),
        ("pool.kind=serial", "pool.kind: serial would score on the cluster's head"),
        ("fitness.include_path=../tasks", "fitness.include_path: no such directory"),
        ("fitness.include_path=../project/../outside", "lies outside of"),
        ("fitness.objectives=[{kind: entropy, text: no.txt}]", "no such file: "),
        ("search.arguments={start: models/base/model.safetensors}", "looks like weights"),
        ("tracking.uri=http://me:secret@ml/", "given with credentials"),
        ("tracking={enabled: false, uri: http://me:secret@ml/}", "given with credentials"),
        ("tracking.uri=sqlite:///ml.db", "would lie in the job's own folder and be lost"),
    ],
)
def test_what_cannot_work_there_is_refused_here(project: Path, override: str, message: str) -> None:
    (project.parent / "outside").mkdir()
    (project.parent / "outside/a.yaml").write_text("task: a\n")
    with pytest.raises(InputError) as caught:
        packed(project, override)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not any((project.parent / "job").iterdir())


def test_weights_among_the_tasks_are_refused_with_their_names(project: Path) -> None:
    (project / "tasks/adapter.safetensors").write_text("")
    with pytest.raises(InputError, match=r"tasks/adapter\.safetensors looks like weights"):
        packed(project)


def test_too_much_is_refused_with_the_largest_files(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "LIMIT_BYTES", 2 << 20)
    (project / "data/mine.jsonl").write_bytes(b"x" * (3 << 20))
    with pytest.raises(InputError) as caught:
        packed(project)
    lines = str(caught.value).splitlines()
    assert "are 3.0 MiB, and at most 2 MiB are sent" in lines[0]
    assert lines[1] == "  3.0 MiB data/mine.jsonl"
    assert len(lines) == 6


def test_secrets_of_this_machine_stay_here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in submission._SECRETS:
        monkeypatch.setenv(name, "canary-secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary-secret@ml/")
    package = packed(project)
    assert any("HF_TOKEN" in note and "not sent" in note for note in package.notes)
    assert any("MLFLOW_TRACKING_URI is set here but not sent" in note for note in package.notes)
    assert "canary" not in str(package)
    for name in inside(package):
        assert "canary" not in (package.folder / name).read_text()


def test_a_group_takes_its_tasks_along(project: Path) -> None:
    (project / "tasks/group.yaml").write_text("group: both\ntask: [{task: pick_a}, other]\n")
    (project / "data/other.jsonl").write_text("{}\n")
    assert "data/other.jsonl" not in inside(packed(project, to="a"))
    package = packed(project, "fitness.tasks=[both]", to="b")
    assert {"data/other.jsonl", "data/pick_a.jsonl"} <= inside(package)


def test_a_start_from_another_study_takes_its_journal_along(project: Path) -> None:
    journal = project / "studies/first/journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text("")
    package = packed(project, "search.arguments={start: 'studies/first:42'}")
    assert "studies/first/journal.jsonl" in inside(package)


def test_the_record_comes_back(project: Path) -> None:
    study = project / "study.yaml"
    assert submitted(study) is None
    record = Submitted("tiny", "/shared/studies/tiny", "http://h:1", "evomerge-tiny-0-1")
    record.save(study)
    assert submitted(study) == record
    record = replace(record, overrides=("directory=/x", "seed=1"))
    record.save(study)
    assert submitted(study) == record
    before = {"name": "tiny", "directory": "/x", "address": None, "job": "evomerge-tiny-0-1"}
    (project / "study.job.json").write_text(json.dumps(before))
    assert submitted(study) == Submitted(**before)  # type: ignore[arg-type]
    for damaged in ("[]", json.dumps(before | {"overrides": "a=b"}), "{}"):
        (project / "study.job.json").write_text(damaged)
        with pytest.raises(InputError, match="not a record of a submitted study"):
            submitted(study)


def test_the_address_is_kept_without_its_password() -> None:
    assert submission.bare_address("http://me:pw@host:8265/x") == "http://host:8265/x"
    assert submission.bare_address("http://host:8265") == "http://host:8265"
    assert submission.bare_address("me:pw@host:6379") == "host:6379"
    assert submission.bare_address(None) is None


def test_the_sent_file_is_complete(project: Path) -> None:
    sent = load(packed(project).folder / "study.yaml")
    assert isinstance(sent, StudyFile)
    assert sent.search.trials == load(project / "study.yaml").search.trials


def test_what_a_link_points_to_outside_is_outside(tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "tasks").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_text("key")
    (root / "tasks/data.json").symlink_to(secret)
    (root / "tasks/own.json").write_text("[]")
    (root / "tasks/again.json").symlink_to(root / "tasks/own.json")
    assert submission._inside(root / "tasks/data.json", root) == ""
    assert submission._inside(root / "tasks/again.json", root) == "tasks/again.json"
    assert submission._inside(root / "tasks/own.json", root) == "tasks/own.json"
