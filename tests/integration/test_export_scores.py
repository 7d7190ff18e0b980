"""The lm_eval command that an export names gives exactly the scores that the study recorded."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from library_warnings import LIBRARY_WARNINGS
from small_study import Grid

from evomerge.export import choose, export
from evomerge.fitness.lm_eval import LmEvalTasks, TaskSpec
from evomerge.layout import partition
from evomerge.models import open_models
from evomerge.pool import SerialPool
from evomerge.recipe import Recipe
from evomerge.scoring import Scoring
from evomerge.study import Baseline, Study
from evomerge.worker import ModelWorkerFactory

sys.path.append(str(Path(__file__).parent.parent / "fitness"))
from local_tasks import make_zoo

pytestmark = LIBRARY_WARNINGS


@dataclass(frozen=True)
class Split:
    search: tuple[str, ...] = tuple(map(str, range(0, 8)))
    validation: tuple[str, ...] = tuple(map(str, range(8, 14)))
    test: tuple[str, ...] = tuple(map(str, range(14, 24)))


@pytest.mark.slow
def test_lm_eval_gives_the_recorded_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = make_zoo(tmp_path / "zoo")
    monkeypatch.chdir(zoo.root)
    base, expert = map(str, zoo.models)
    specs = (TaskSpec("gen_regex", filter="letter"), TaskSpec("choice", "acc"))
    models = open_models(base, [("two", expert)])
    first, others = models.refs

    def recipe(values: tuple[float, ...]) -> Recipe:
        return Recipe(
            method="task_arithmetic", base=first, experts=others, partition="layer",
            layout=models.layout.digest, columns=("weight.two",),
            table=tuple((value,) for value in values), dtype="F32",
        )  # fmt: skip

    rows = len(partition(models.layout, "layer").blocks)
    factory = ModelWorkerFactory(
        base=base, experts=(("two", expert),), dtype="F32", device="cpu", threads=1, tasks=specs,
        include_paths=(zoo.tasks,), data_root=zoo.root, allow_task_code=False, batch_size=4,
    )  # fmt: skip
    view = Study(
        zoo.root / "study",
        identity={"name": "scores"},
        objectives=LmEvalTasks.load(specs, (zoo.tasks,), zoo.root).objectives,
        splits=[Split(), Split()],
        dimension=rows,
        decode=recipe,
        make_searcher=Grid,
        baselines=[Baseline("base", None, recipe((0.0,) * rows))],
        make_pool=lambda: SerialPool(factory),
        budget=4,
        parallel=1,
        seed=1,
        scalarise=False,
    ).run()
    scoring = Scoring(("gen_regex", "choice"), (None, None), ("tasks",), 4, "cpu")
    result = export(view, choose(view), models, Path("merged"), scoring)
    assert result.split == "test"
    scores = json.loads(Path("merged/evomerge_scores.json").read_text())
    [command] = scores["reproduce"]["commands"]
    words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *words, "--output_path", "scored"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = Path("scored").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    assert {
        "gen_regex": found["gen_regex"]["exact_match,letter"],
        "choice": found["choice"]["acc,none"],
    } == scores["reproduce"]["expected"]
    assert any(0 < value < 1 for value in scores["reproduce"]["expected"].values())
    assert found["choice"]["sample_len"] == 10
