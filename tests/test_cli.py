"""The command line: help that teaches, one clear error, documented exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evomerge import cli
from evomerge.cli_arguments import directory_of
from evomerge.config import load
from evomerge.journal import JOURNAL
from evomerge.presentation import STUDY_FILE

ROOT = Path(__file__).resolve().parents[1]


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evomerge", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, output.out, output.err


VERBS = (
    "demo", "init", "check", "run", "submit", "logs", "stop", "front", "compare", "report",
    "export", "merge", "directions", "bench", "calibrate", "status", "list", "schema", "sync",
)  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    code, out, _ = call(capsys, monkeypatch, verb, "--help")
    assert code == 0
    assert len(out.split()) > 15
    assert verb in call(capsys, monkeypatch, "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], "no such command 'chek' (did you mean 'check'?)"),
        (["check"], "error: Missing argument 'FILE'"),
        (["check"], "Usage: evomerge check [OPTIONS] FILE"),
        (["export", "x"], "error: Missing option '--out'"),
        (["run", "."], ".: a directory, not a study file (give the study file"),
        (["run", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["front", "nowhere"], "nowhere: neither a study file nor a study directory"),
        (
            ["export", "x", "--out", "y"],
            "choose exactly one of --pick HOW, --knee, --best OBJECTIVE, --trial",
        ),
        (["export", "x", "--knee", "--trial", "3", "--out", "y"], "choose exactly one of"),
        (["list", "method"], "Invalid value for"),
        (["list", "studies", "--under", "nowhere"], "nowhere: no such directory"),
        (["init", "--expert", "math", "x.yaml"], "--expert: expected NAME=MODEL, got 'math'"),
    ],
)
def test_bad_usage_is_one_clear_error_and_exit_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, monkeypatch, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_init_writes_a_file_that_loads_and_never_overwrites(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "s.yaml"
    arguments = ["init", str(path), "--base", "org/b", "--expert", "math=./m", "--task", "gsm8k"]
    assert call(capsys, monkeypatch, *arguments)[0] == 0
    study = load(path)
    assert (study.models.base, study.models.experts) == ("org/b", {"math": "./m"})
    before = path.read_text()
    code, _, err = call(capsys, monkeypatch, *arguments)
    assert (code, path.read_text()) == (2, before)
    assert "exists already" in err


def test_init_takes_folders_of_own_tasks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def written(name: str, *more: str) -> tuple[list[str] | str, str]:
        code, out, _ = call(capsys, monkeypatch, "init", str(tmp_path / name), *more)
        assert code == 0
        return load(tmp_path / name).fitness.include_path, out

    (tmp_path / "own tasks").mkdir()
    (tmp_path / "fitness/skills").mkdir(parents=True)
    (tmp_path / "fitness/skills/broken.yaml").write_text("task: [")
    (tmp_path / "fitness/skills/sort.yaml").write_text("include: tags\ntask: my_sort\n")
    (tmp_path / "fitness/skills/tags").write_text("tag: skills\ntask: hidden\n")
    assert written("a.yaml", "--task", "gsm8k") == ([], written("b.yaml")[1].replace("b.", "a."))
    for number, task in enumerate(("my_sort", "skills")):
        found, out = written(f"c{number}.yaml", "--task", "gsm8k", "--task", task)
        assert found == ["fitness"]
        assert "note: fitness.include_path is fitness/" in out
    given = ["--include-path", "own tasks", "--include-path", "fitness", "--task", "my_sort"]
    found, out = written("d.yaml", *given)
    assert (found, "note" in out) == (["own tasks", "fitness"], False)
    code, _, err = call(
        capsys, monkeypatch, "init", str(tmp_path / "e.yaml"), "--include-path", "nowhere"
    )
    assert (code, (tmp_path / "e.yaml").exists()) == (2, False)
    assert f"--include-path: no such folder: {tmp_path / 'nowhere'} (give the folder" in err


@pytest.mark.parametrize("what", ["methods", "searchers", "partitions"])
def test_list_speaks_to_people_and_programs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    rows = json.loads(call(capsys, monkeypatch, "list", what, "--json")[1])
    text = call(capsys, monkeypatch, "list", what)[1]
    assert len(rows) >= 4
    for row in rows:
        assert next(iter(row.values())) in text


def test_check_reports_everything_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        """
models: {base: ./nowhere, experts: {math: ./math}}
space: {method: tie, partition: layers, parameters: {weight: {low: 2, high: 1}}}
fitness: {tasks: [no_such_task], include_path: tasks}
search: {searcher: cmaa}
"""
    )
    code, _, err = call(capsys, monkeypatch, "check", str(path))
    assert code == 2
    for text in (
        "searcher: unknown 'cmaa'",
        "space.method: unknown 'tie' (did you mean 'ties'?)",
        "models.base: no such directory",
        "fitness.include_path: no such directory",
    ):
        assert text in err
    assert [p.name for p in tmp_path.iterdir()] == ["study.yaml"]


def test_the_resolved_file_was_not_usable_as_study(tmp_path: Path) -> None:
    directory = tmp_path / "studies/tiny"
    directory.mkdir(parents=True)
    text = "name: tiny\ndirectory: studies/tiny\nmodels: {base: b, experts: {a: a}}\n"
    for path in (tmp_path / "study.yaml", directory / STUDY_FILE):
        path.write_text(text + "fitness: {tasks: [t]}\n")
    (directory / JOURNAL).touch()
    for path in (tmp_path / "study.yaml", directory / STUDY_FILE, directory):
        assert directory_of(str(path)).resolve() == directory.resolve()


@pytest.mark.parametrize("verb", ["check", "run", "bench", "submit"])
def test_a_directory_is_no_study_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "study.yaml").touch()
    code, _, err = call(capsys, monkeypatch, verb, str(tmp_path))
    assert (code, f"give {tmp_path / 'study.yaml'})" in err) == (2, True)
    (tmp_path / STUDY_FILE).touch()
    code, _, err = call(capsys, monkeypatch, verb, str(tmp_path))
    assert (code, f"give the study file; {tmp_path / STUDY_FILE} holds" in err) == (2, True)


def test_schema_is_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = json.loads(call(capsys, monkeypatch, "schema")[1])
    assert "models" in schema["properties"]


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "evomerge", "--version"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("evomerge, version ")
    wrong = subprocess.run(
        [sys.executable, "-m", "evomerge", "export"], capture_output=True, text=True, cwd=ROOT,
        check=False,
    )  # fmt: skip
    assert wrong.stderr.startswith("Usage: evomerge export [OPTIONS]")


def test_list_explains_the_arguments_of_one_searcher(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, monkeypatch, "list", "searchers", "cma")
    assert code == 0
    assert "initial standard deviation in the unit box; default 0.1667; float in [0.001, 1]" in out
    _, out, _ = call(capsys, monkeypatch, "list", "searchers", "cma", "--json")
    (one,) = json.loads(out)
    assert one["arguments"]["sigma"]["expected"] == "float in [0.001, 1]"
    code, _, error = call(capsys, monkeypatch, "list", "searchers", "cmaa")
    assert code == 2
    assert "did you mean 'cma'" in error
    assert call(capsys, monkeypatch, "list", "methods", "ties")[0] == 2
