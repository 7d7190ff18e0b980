"""All kinds of objectives from a study file to a worker, on tiny models."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from library_warnings import LIBRARY_WARNINGS
from safetensors.numpy import load_file
from tiny_project import STUDY, tiny_project

from evomerge import launch, take_home
from evomerge.config import load
from evomerge.errors import StudyFileError
from evomerge.merge.change import coefficient_norm
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS
from evomerge.prepare import Prepared, prepare
from evomerge.recipe import Recipe
from evomerge.trial import Evaluation, Job
from evomerge.worker import ModelWorker, ModelWorkerFactory

pytestmark = LIBRARY_WARNINGS

GOALS = """
  tasks: [{task: pick_a, min: 0.2}, {task: pick_a, metric: margin, name: margin, weight: 2}]
  objectives:
    - {kind: kl, text: texts.txt, of: math, split: {search: 3, validation: 2, test: 2}}
    - {kind: entropy, text: texts.txt, split: {search: 3, validation: 2, test: 2}, max: 3}
    - {kind: alignment, text: texts.txt, of: code, split: {search: 3, validation: 2, test: 2}}
    - {kind: distance}
    - {kind: distance, norm: l1}
    - {kind: python, function: mine.py:score, items: mine.jsonl, unit: sum, name: mine,
       split: {search: 1, validation: 1, test: 1}}
"""
NAMES = ("pick_a", "margin", "kl_math", "entropy", "alignment_code", "distance_l2", "distance_l1",
         "mine")  # fmt: skip


@pytest.fixture(scope="module")
def project(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = STUDY.replace("  tasks: [pick_a, pick_b]\n", GOALS.lstrip("\n"))
    folder = tiny_project(tmp_path_factory.mktemp("goals"), save_llama, text)
    (folder / "texts.txt").write_text("".join(f"abc=defgh{'a' * n}\n" for n in range(7)))
    (folder / "mine.py").write_text(
        "def score(model, tokenizer, items):\n"
        "    return [item * float(model.lm_head.weight.sum()) for item in items]\n"
    )
    (folder / "mine.jsonl").write_text("1\n2\n3\n")
    return folder


@pytest.fixture(scope="module")
def prepared(project: Path) -> Prepared:
    path = project / "study.yaml"
    return prepare(load(path), path)


@pytest.fixture(scope="module")
def worker(prepared: Prepared) -> ModelWorker:
    factory: ModelWorkerFactory = pickle.loads(pickle.dumps(prepared.factory))  # as to Ray
    return factory()


def problems(project: Path, *overrides: str) -> str:
    path = project / "study.yaml"
    with pytest.raises(StudyFileError) as caught:
        prepare(load(path, overrides), path)
    return str(caught.value)


def baseline(prepared: Prepared, label: str) -> Recipe:
    (recipe,) = [one.recipe for one in prepared.baselines if one.label == label]
    return recipe


def run(prepared: Prepared, worker: ModelWorker, recipe: Recipe) -> Mapping[str, float]:
    items = tuple(split.search for split in prepared.splits)
    evaluation = worker.run(Job(0, recipe, items))
    return dict(zip(NAMES, evaluation.values, strict=True))


def weights(project: Path, name: str) -> dict[str, npt.NDArray[np.float64]]:
    found = load_file(project / "models" / name / "model.safetensors")
    return {key: value.astype(np.float64) for key, value in found.items()}


def relative(project: Path, merged: dict[str, npt.NDArray[np.float64]]) -> float:
    base = weights(project, "base")
    apart = sum(((merged[name] - base[name]) ** 2).sum() for name in base)
    return float(np.sqrt(apart / sum((value**2).sum() for value in base.values())))


def test_objectives_of_a_study_file(prepared: Prepared) -> None:
    found = prepared.tasks.objectives
    assert tuple(one.name for one in found) == NAMES
    assert [str(one.direction) for one in found] == [
        "maximize", "maximize", "minimize", "minimize", "minimize", "minimize", "minimize",
        "maximize",
    ]  # fmt: skip
    assert [one.unit for one in found] == [
        "fraction", "nats", "nats", "nats", "distance", "fraction", "coefficients", "sum",
    ]  # fmt: skip
    assert (found[0].minimum, found[3].maximum, found[1].weight) == (0.2, 3.0, 2.0)


def test_objectives_of_one_source_have_the_same_items(prepared: Prepared) -> None:
    splits = prepared.splits
    assert splits[0] == splits[1]
    assert splits[2] == splits[3] == splits[4]
    assert len(splits[2].search) == 3
    assert not set(splits[2].search) & set(splits[2].test)
    assert splits[5].search == splits[5].validation == splits[5].test == ("0",)


def test_reference_is_at_no_distance_from_itself(prepared: Prepared, worker: ModelWorker) -> None:
    math = run(prepared, worker, baseline(prepared, "expert:math"))
    code = run(prepared, worker, baseline(prepared, "expert:code"))
    base = run(prepared, worker, baseline(prepared, "base"))
    assert math["kl_math"] == pytest.approx(0.0, abs=1e-6)
    assert code["alignment_code"] == pytest.approx(0.0, abs=1e-5)
    assert code["kl_math"] > 1e-3
    assert base["kl_math"] > 1e-3
    assert base["alignment_code"] > 1e-3
    assert len({math["entropy"], code["entropy"], base["entropy"]}) == 3


def test_distances_are_those_of_the_files(
    project: Path, prepared: Prepared, worker: ModelWorker
) -> None:
    base = run(prepared, worker, baseline(prepared, "base"))
    assert (base["distance_l1"], base["distance_l2"]) == (0.0, 0.0)
    math = run(prepared, worker, baseline(prepared, "expert:math"))
    assert math["distance_l1"] == 1.0
    assert math["distance_l2"] == pytest.approx(
        relative(project, weights(project, "math")), rel=1e-5
    )
    recipe = prepared.space.decode((0.2, 0.45))
    first, second = recipe.table[0][:2]
    start, one, two = (weights(project, name) for name in ("base", "math", "code"))
    merged = {
        key: start[key] + first * (one[key] - start[key]) + second * (two[key] - start[key])
        for key in start
    }
    found = run(prepared, worker, recipe)
    assert found["distance_l1"] == pytest.approx(first + second)
    assert found["distance_l2"] == pytest.approx(relative(project, merged), rel=1e-5)


def test_python_sees_the_merged_weights(
    project: Path, prepared: Prepared, worker: ModelWorker
) -> None:
    found = run(prepared, worker, baseline(prepared, "expert:code"))
    item = int(prepared.splits[-1].search[0]) + 1
    head = weights(project, "code")["model.embed_tokens.weight"]  # tied
    assert found["mine"] == pytest.approx(item * head.sum(), rel=1e-4)


def test_norm_of_coefficients_does_not_depend_on_the_partition(prepared: Prepared) -> None:
    merger = Merger(prepared.models)
    base, experts = prepared.models.refs

    def recipe(method: str, spec: str, values: tuple[float, ...], **options: bool) -> Recipe:
        columns = METHODS[method].columns(tuple(expert.name for expert in experts))
        count = len(merger.partition(spec).blocks)
        return Recipe(
            method, base, experts, spec, prepared.models.layout.digest, columns, (values,) * count,
            tuple(sorted(options.items())), dtype="F32",
        )  # fmt: skip

    def norm(*arguments: object, **options: bool) -> float:
        return coefficient_norm(merger, recipe(*arguments, **options))  # type: ignore[arg-type]

    for spec in ("model", "layer", "tensor", "chunk(3)"):
        assert norm("task_arithmetic", spec, (0.5, -0.25, 2.0)) == pytest.approx(1.5)
    # Without normalisation Σ w·W has the base at 1.2, and the experts at 0.9 and 0.3.
    linear = norm("linear", "tensor", (0.9, 0.3), normalize=False)
    assert linear == pytest.approx(0.2 + 1.2, rel=1e-6)
    # Spherical: coefficients of their own for every row, near those of the plain average.
    rows = norm("nuslerp", "tensor", (0.5, 0.5), nuslerp_row_wise=True)
    assert 0.9 < rows < 1.5


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("fitness.objectives=[{kind: kl, of: mth, text: texts.txt}]",
         "fitness.objectives[0].of: no model is named 'mth' (did you mean 'math'?)"),
        ("fitness.objectives=[{kind: entropy, text: gone.txt}]",
         "fitness.objectives[0].text: "),
        ("fitness.objectives=[{kind: entropy, text: texts.txt}]",
         "fitness.items: texts.txt: 6 search + 8 validation + 10 test = 24 items asked for"),
        ("fitness.objectives=[{kind: entropy, text: texts.txt, split: {search: 9}}]",
         "fitness.objectives[0].split: texts.txt: 9 search + 200 validation"),
        ("fitness.objectives=[{kind: distance, name: pick_a}]",
         "fitness.objectives: 'pick_a' is the name of two objectives"),
        ("fitness.objectives=[{kind: python, function: mine.py:scores, items: mine.jsonl}]",
         "fitness.objectives[0].function: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(project: Path, override: str, text: str) -> None:
    assert text in problems(project, override)


def test_identity_follows_the_objectives(project: Path, prepared: Prepared) -> None:
    path = project / "study.yaml"
    other = prepare(load(path, ["fitness.objectives=[{kind: distance}]"]), path)
    assert other.identity()["fitness"] != prepared.identity()["fitness"]


def test_study_without_tasks_runs_and_says_that_lm_eval_cannot_repeat_it(
    project: Path, tmp_path: Path
) -> None:
    path = project / "study.yaml"
    overrides = [
        "fitness.tasks=[]", "name=no_tasks", "search.trials=3",
        "fitness.objectives=[{kind: distance, norm: l1}, {kind: kl, text: texts.txt, "
        "split: {search: 3, validation: 2, test: 2}}]",
    ]  # fmt: skip
    finished = launch.run(prepare(load(path, overrides), path), ())
    view = finished.view
    assert [one.name for one in view.objectives] == ["distance_l1", "kl_base"]
    # The base forgets nothing and is nowhere: the whole front.
    (best,) = view.front
    assert view.trial(best).label == "base"
    scores = view.scores(best)
    assert isinstance(scores, Evaluation)
    assert scores.values == pytest.approx((0.0, 0.0), abs=1e-7)
    take_home.export_trial(view, best=None, trial=best, out=tmp_path / "out", shards="1GB")
    told = json.loads((tmp_path / "out" / "evomerge_scores.json").read_text())
    note = "lm_eval has no number for distance_l1, kl_base: `evomerge` alone computes it."
    assert note in told["reproduce"]["notes"]
    assert note in (tmp_path / "out" / "README.md").read_text()
