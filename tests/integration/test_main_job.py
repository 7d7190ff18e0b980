"""The main job through the command line: real models, Ray, lm-eval, MLflow, kill -9, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_project import tiny_project

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
name: tiny
seed: 7
models: {base: models/base, experts: {math: models/math, code: models/code}}
space: {method: task_arithmetic, partition: layer, parameters: {weight: {low: 0, high: 2}}}
fitness:
  tasks: [pick_a, pick_b]
  include_path: fitness
  items: {search: 30, validation: 40, test: 50}
  batch_size: 16
search: {searcher: nsga2, arguments: {population: 8}, trials: 24, finalists: 4}
baselines: {task_arithmetic: [0.5, 1.0]}
pool: {workers: 2}
tracking: {experiment: tiny}
"""


def run(
    project: Path, *arguments: str, module: str = "evomerge", expect: int = 0
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=project, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def project(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: three tiny checkpoints with a tokenizer, two tasks, a study file."""
    return tiny_project(tmp_path_factory.mktemp("project"), save_llama, STUDY, items=130)


def records(project: Path, study: str, kinds: set[str]) -> list[dict[str, Any]]:
    """Return the journal's records without what is physical: times, workers, order of tells."""
    journal = project / "studies" / study / "journal.jsonl"
    found = []
    for line in journal.read_text().splitlines():
        record = json.loads(line.split("\t")[0])
        if record["ev"] in kinds:
            for key in ("seq", "t", "seconds", "worker", "attempts", "epoch"):
                record.pop(key, None)
            found.append(record)
    return sorted(
        found, key=lambda record: (record["ev"], record["trial"], record.get("split", ""))
    )


@pytest.fixture(scope="session")
def finished(project: Path) -> dict[str, Any]:
    """The uninterrupted study's report."""
    report: dict[str, Any] = json.loads(run(project, "run", "study.yaml", "--json").stdout)
    return report


@pytest.mark.timeout(600)
def test_the_front_has_baselines_beside_it(project: Path, finished: dict[str, Any]) -> None:
    assert finished["state"] == "finished"
    assert finished["front_split"] == "validation"
    names = [merge["name"] for merge in finished["merges"]]
    assert {"base", "expert:math", "expert:code", "uniform"} <= set(names)
    for merge in finished["merges"]:
        assert merge["test"]["pick_a"]["items"] == 50
        assert 0 <= merge["test"]["pick_a"]["value"] <= 1
    assert finished["recommended"] in [m["trial"] for m in finished["merges"] if m["front"]]
    # Something was found that the models differ in: otherwise the rest of this file is empty.
    values = {m["search"]["pick_a"]["value"] for m in finished["merges"] if "search" in m}
    assert len(values) > 1


@pytest.mark.timeout(600)
def test_running_again_repeats_nothing(project: Path, finished: dict[str, Any]) -> None:
    journal = project / "studies/tiny/journal.jsonl"
    before = journal.read_bytes()
    again = json.loads(run(project, "run", "study.yaml", "--json").stdout)
    assert again == finished
    assert journal.read_bytes() == before


@pytest.mark.timeout(600)
def test_other_settings_are_refused_with_the_difference(
    project: Path, finished: dict[str, Any]
) -> None:
    done = run(project, "run", "study.yaml", "--set", "search.trials=25", expect=2)
    assert "begun with other settings" in done.stderr
    assert "search.trials: 24 -> 25" in done.stderr


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [(14,), pytest.param((9, 20), marks=pytest.mark.slow)])
def test_kill_9_and_the_same_command_give_the_same_study(
    project: Path, finished: dict[str, Any], kills: tuple[int, ...]
) -> None:
    study = f"killed-{len(kills)}"
    override = ["--set", f"directory=studies/{study}"]
    journal = project / "studies" / study / "journal.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for wanted in kills:  # tells in the journal when the driver is killed
        driver = subprocess.Popen(
            [sys.executable, "-m", "evomerge", "run", "study.yaml", *override],
            cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 200
        while not journal.exists() or journal.read_text().count('"ev":"tell"') < wanted:
            assert driver.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    done_before = {
        (record["trial"], record["values"][0]) for record in records(project, study, {"tell"})
    }
    run(project, "run", "study.yaml", *override)
    kinds = {"ask", "tell", "score"}
    ours, theirs = records(project, study, kinds), records(project, "tiny", kinds)
    assert ours == theirs
    tells = [record["trial"] for record in records(project, study, {"tell"})]
    assert len(tells) == len(set(tells)), "a finished evaluation was repeated"
    assert done_before <= {(r["trial"], r["values"][0]) for r in ours if r["ev"] == "tell"}


@pytest.mark.timeout(900)
def test_lm_eval_itself_gives_exactly_the_recorded_scores(
    project: Path, finished: dict[str, Any]
) -> None:
    # Not a baseline: a merge that only the search has made.
    chosen = next(m for m in finished["merges"] if m["kind"] == "search")
    number = str(chosen["trial"])
    facts = json.loads(
        run(project, "export", "study.yaml", "--trial", number, "--out", "merged", "--json").stdout
    )
    assert facts["trial"] == chosen["trial"]
    scores = json.loads((project / "merged/evomerge_scores.json").read_text())
    (command,) = scores["reproduce"]["commands"]
    words = command.split()
    assert words[0] == "lm_eval"
    done = run(project, *words[1:], "--output_path", "lm_eval_out", module="lm_eval")
    (output,) = sorted((project / "lm_eval_out").rglob("results_*.json"))
    results = json.loads(output.read_text())["results"]
    for task in ("pick_a", "pick_b"):
        assert results[task]["acc,none"] == chosen["test"][task]["value"], done.stdout
        assert results[task]["acc,none"] == scores["reproduce"]["expected"][task]


@pytest.mark.timeout(600)
def test_exporting_onto_something_is_refused_and_leaves_it(
    project: Path, finished: dict[str, Any]
) -> None:
    (project / "full").mkdir(exist_ok=True)
    (project / "full/keep.txt").write_text("mine")
    done = run(project, "export", "study.yaml", "--knee", "--out", "full", expect=2)
    assert "exists and is not empty" in done.stderr
    assert [path.name for path in (project / "full").iterdir()] == ["keep.txt"]
    done = run(project, "export", "study.yaml", "--trial", "999", "--out", "x", expect=2)
    assert "999" in done.stderr
    assert not (project / "x").exists()


@pytest.mark.timeout(600)
def test_mlflow_holds_every_trial_once(project: Path, finished: dict[str, Any]) -> None:
    code = f"""
import json, mlflow
mlflow.set_tracking_uri("sqlite:///{project}/studies/tiny/mlflow.db")
runs = mlflow.search_runs(experiment_names=["tiny"], max_results=500)
children = runs[runs["tags.mlflow.parentRunId"].notna()]
parent = runs[runs["tags.mlflow.parentRunId"].isna()]
client = mlflow.MlflowClient()
names = sorted(a.path for a in client.list_artifacts(parent["run_id"].iloc[0]))
print(json.dumps([len(parent), sorted(map(int, children["tags.evomerge.trial"])), names,
                  int((children["tags.front"] == "true").sum())]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=project
    )
    parents, trials, artifacts, front = json.loads(done.stdout.splitlines()[-1])
    assert parents == 1
    assert trials == list(range(6 + 24))
    assert {"front.html", "front.csv", "study.resolved.yaml", "recipes"} <= set(artifacts)
    assert front == sum(merge["front"] for merge in finished["merges"])
