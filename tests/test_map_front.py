"""The script that compares MAP with the front of a grid: its figures where the truth is known."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "experiments/map_front/map_front.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("map_front", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Line:
    """Accuracies x and 1 - x, less what the second coordinate costs: a front of 0 to 1."""

    def __init__(self) -> None:
        self.scored = 0
        self.space = SimpleNamespace(decode=lambda x: SimpleNamespace(digest=str(x), x=x))

    def scores(self, recipe: Any, test: bool) -> tuple[None, np.ndarray[Any, np.dtype[np.float64]]]:
        self.scored += 1
        first, second = recipe.x
        return None, np.array([first, 1 - first]) * (1 - 0.5 * second)


def test_the_grid_is_level_with_itself_and_less_is_worse(script: Any, tmp_path: Path) -> None:
    judge = script.Judge(script.Truth(Line(), tmp_path / "line.npz"), 5, 2)
    assert len(judge.points) == 25
    assert len(judge.front) == 5
    whole = judge.judge(judge.points, judge.losses)
    assert (whole["gd"], whole["igd"], whole["volume"], whole["wins"]) == (0.0, 0.0, 1.0, 0.5)
    assert whole["heldout_r2"] == pytest.approx(1.0, abs=1e-6)
    assert (whole["predicted"], whole["kept"]) == pytest.approx((1.0, 1.0), abs=1e-3)
    worse = judge.points[:, 1] > 0
    part = judge.judge(judge.points[worse], judge.losses[worse])
    assert part["gd_plus"] > 0.05
    assert part["volume"] < 0.9
    ends = np.flatnonzero((judge.points[:, 1] == 0) & (np.abs(judge.points[:, 0] - 0.5) == 0.5))
    extreme = judge.judge(judge.points[ends], judge.losses[ends])
    assert (extreme["gd"], extreme["volume"]) == (0.0, 0.0)
    # Three members of the grid's front lie 1/4, 1/2 and 1/4 along it from the nearer end.
    assert extreme["igd"] == pytest.approx(np.sqrt(2) * (0.25 + 0.5 + 0.25) / 5)


def test_what_was_scored_is_not_scored_again(script: Any, tmp_path: Path) -> None:
    first, second = Line(), Line()
    points: Sequence[tuple[float, float]] = [(0.2, 0.0), (0.7, 0.5), (0.2, 0.0)]
    truth = script.Truth(first, tmp_path / "kept.npz")
    values = [truth(x) for x in points]
    truth.save()
    again = script.Truth(second, tmp_path / "kept.npz")
    assert np.array_equal([again(x) for x in points], values)
    assert (first.scored, second.scored) == (2, 0)
