"""Merges of a real study as MLflow models: they load, and are the merges that were scored."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_project import STUDY, tiny_project

pytestmark = [
    pytest.mark.slow,
    # MLflow's own models and its sqlite store, not our calls.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def evomerge(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "evomerge", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_models_load_and_equal_exports(tmp_path: Path, save_llama: Callable[..., Path]) -> None:
    study = STUDY.replace(
        "tracking: {enabled: false}", "tracking: {experiment: tiny, log_model: knee}"
    )
    folder = tiny_project(tmp_path, save_llama, study)
    evomerge(folder, "run", "study.yaml")
    found: dict[str, Any] = json.loads(evomerge(folder, "sync", "study.yaml", "--json"))
    assert len(found["models"]) == 1  # logged by the run
    again: dict[str, Any] = json.loads(
        evomerge(folder, "sync", "study.yaml", "--log-model", "front", "--json")
    )
    assert found["models"].items() <= again["models"].items()
    assert again["new_trials"] == 0

    import mlflow
    from transformers import AutoModelForCausalLM

    (database,) = folder.rglob("mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    for trial, model in again["models"].items():
        evomerge(folder, "export", "study.yaml", "--trial", trial, "--out", f"merged-{trial}")
        logged = Path(mlflow.artifacts.download_artifacts(f"models:/{model}"))
        weights = [
            hashlib.sha256((one / "model.safetensors").read_bytes()).hexdigest()
            for one in (logged, folder / f"merged-{trial}")
        ]
        assert weights[0] == weights[1]
        assert AutoModelForCausalLM.from_pretrained(logged).num_parameters() > 0
