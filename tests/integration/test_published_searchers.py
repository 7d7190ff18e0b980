"""M2N2 and Evo-Merging in whole studies: what they need of a study reaches them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_project import STUDY, tiny_project

from evomerge import launch
from evomerge.config import load
from evomerge.direction_grams import direction_grams
from evomerge.merge.sources import Sources, to_float32
from evomerge.prepare import prepare

M2N2 = STUDY.replace("partition: model", "partition: layer").replace(
    "searcher: random, trials: 6",
    "searcher: m2n2, arguments: {mixing: two_angles}, parallel: 2, trials: 14",
)
EVO = STUDY.replace(
    "task_arithmetic, partition: model, parameters: {weight: {low: 0, high: 2}}",
    "breadcrumbs, partition: model, parameters: {weight: {low: -1.5, high: 1.5}, "
    "density: {low: 0, high: 1}, gamma: 0}",
).replace(
    "searcher: random, trials: 6", "searcher: evo_merging, arguments: {population: 4}, trials: 9"
)


@pytest.mark.slow
def test_m2n2_mixes_on_arcs_in_a_study_and_continues(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    folder = tiny_project(tmp_path, save_llama, M2N2)
    prepared = prepare(load(folder / "study.yaml"), folder / "study.yaml")
    finished = launch.run(prepared, ())
    trials = [trial for trial in finished.view.trials if trial.kind == "search"]
    assert len(trials) == 14
    baselines = [trial for trial in finished.view.trials if trial.kind == "baseline"]
    assert [trial.x for trial in trials[: len(baselines)]] == [trial.x for trial in baselines]
    crossed = [np.array(trial.recipe.table) for trial in trials[len(baselines) :]]
    assert any(np.ptp(table, axis=0).max() > 0.1 for table in crossed)
    again = launch.run(prepare(load(folder / "study.yaml"), folder / "study.yaml"), ())
    assert [trial.x for trial in again.view.trials] == [trial.x for trial in finished.view.trials]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_inner_products_are_those_of_what_the_weights_multiply(
    tmp_path: Path, save_llama: Callable[..., Path], method: str
) -> None:
    study = M2N2.replace("task_arithmetic, partition", f"{method}, partition")
    study = study.replace("parameters: {", "parameters: {normalize: false, ")
    folder = tiny_project(tmp_path, save_llama, study)
    prepared = prepare(load(folder / "study.yaml"), folder / "study.yaml")
    grams = np.array(direction_grams(prepared.space, prepared.models))
    assert grams.shape == (len(prepared.space.blocks), 2, 2)
    sources, total = Sources(prepared.models), np.zeros((2, 2))
    for slot in range(len(prepared.models.layout.slots)):
        base = to_float32(*sources.base(slot)).astype(np.float64)
        full = np.stack([to_float32(*sources.expert(slot, k)).astype(np.float64) for k in (0, 1)])
        vectors = full if method == "linear" else full - base
        total += vectors @ vectors.T
    assert grams.sum(axis=0) == pytest.approx(total, rel=1e-9)


def test_other_spaces_have_no_inner_products(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    folder = tiny_project(tmp_path, save_llama, M2N2)
    for override in (
        "space.parameters.normalize=true",
        "space.parameters.lambda={low: 0, high: 1}",
        "space.method=breadcrumbs_ties",
    ):
        prepared = prepare(load(folder / "study.yaml", [override]), folder / "study.yaml")
        assert direction_grams(prepared.space, prepared.models) == ()


@pytest.mark.slow
def test_evo_merging_trims_and_weighs_task_vectors(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    folder = tiny_project(tmp_path, save_llama, EVO)
    finished = launch.run(prepare(load(folder / "study.yaml"), folder / "study.yaml"), ())
    recipes = [trial.recipe for trial in finished.view.trials if trial.kind == "search"]
    assert len(recipes) == 9
    for recipe in recipes[:4]:  # the first stage, by equal weights
        assert recipe.column("weight.math") == pytest.approx((0.5,))
        assert recipe.column("density.math")[0] > 0.7
    assert recipes[8].column("density.math") == recipes[7].column("density.math")
    assert recipes[8].column("weight.math") != recipes[7].column("weight.math")
