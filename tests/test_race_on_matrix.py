"""The script that compares racing and halving on a response matrix."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments/estimators/race_on_matrix.py"


def test_what_each_way_costs_and_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("race_on_matrix", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    draw = np.random.default_rng(0)
    ability = np.linspace(0.05, 0.95, 40)
    scores = (draw.random((40, 400)) < ability[:, None]).astype(np.float32)
    matrix = tmp_path / "matrix.npz"
    np.savez(matrix, scores=scores, roles=np.array(["merge"] * 40))
    module.main(
        [str(matrix), "--seeds", "2", "--trials", "32", "--search", "300", "--validation", "50",
         "--finalists", "2", "--json", str(tmp_path / "found.json")]
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["items"] for one in found["mean of all items"]] == [32 * 300] * 2
    assert [one["items"] for one in found["mean of 20 items"]] == [32 * 20] * 2
    # Two brackets of 16: 16 x 10, 8 x 10, 4 x 30, 2 x 150, 1 x 100 more; finalists are complete.
    halved = found["halving 10/20/50/200, eta 2, brackets of 16"]
    assert [one["items"] for one in halved] == [2 * (160 + 80 + 120 + 300 + 100)] * 2
    raced = found["racing (rule front)"]
    assert all(32 * 10 < one["items"] < 32 * 300 / 2 for one in raced)
    assert all(one["regret"] <= 5 for one in (*halved, *raced))
    assert "| mean of all items | 9,600 [9,600, 9,600] | 1.0 |" in capsys.readouterr().out
