"""Whole numbers and options beside real numbers: in a space, a study file, a search, a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_journals import cut, essence_of
from tiny_project import STUDY, tiny_project

from evomerge import launch
from evomerge.config import json_schema, load
from evomerge.direction_grams import direction_grams
from evomerge.errors import InputError, StudyFileError
from evomerge.facts import plan_lines
from evomerge.front_page import summary
from evomerge.journal import JOURNAL, read
from evomerge.layout import Partition
from evomerge.prepare import Prepared, prepare
from evomerge.projection import trial_params
from evomerge.recipe import ModelRef
from evomerge.search.kinds import snap
from evomerge.search.protocol import Candidate, SearchProblem, Told
from evomerge.search.registry import make_searcher
from evomerge.search.tied import levels
from evomerge.space import REAL, Choices, Kind, OptionValue, Range, Space
from evomerge.study_space import columns_of
from evomerge.testing import drive

MIXED: dict[str, OptionValue] = {
    "elect": Choices(("weighted", "unweighted", "count")), "normalize": Choices((True, False)),
}  # fmt: skip


def space(
    low: float = 1.0, high: float = 5.0, options: dict[str, OptionValue] | None = None
) -> Space:
    return Space(
        method="ties",
        base=ModelRef("base", "b", "f0"),
        experts=[ModelRef("math", "m", "f1")],
        partition=Partition("layer", ("embed", "layer.0"), ()),
        layout="l",
        columns={"weight.math": Range(0.0, 2.0), "bands": Range(low, high, integer=True)},
        options={**(options or MIXED), "divisor": "weight"},
        seed=0,
        dtype="F32",
    )


def test_options_come_last_and_have_no_block() -> None:
    box = space()
    assert box.dimension == 6
    assert box.names == (
        "embed/weight.math", "embed/bands", "layer.0/weight.math", "layer.0/bands",
        "elect", "normalize",
    )  # fmt: skip
    whole = Kind("integer", 5)
    assert box.kinds == (REAL, whole, REAL, whole, Kind("choice", 3), Kind("choice", 2))
    assert box.groups[-1] == ("normalize", "")
    assert box.ranges[1:] == ((1.0, 5.0), (0.0, 2.0), (1.0, 5.0), (0.0, 1.0), (0.0, 1.0))


def test_decode_gives_every_level_an_equal_share() -> None:
    box, ticks = space(), np.linspace(0.0, 1.0, 6001)[:-1] + 1 / 12000
    recipes = [box.decode((0.5, x, 0.5, x, x, x)) for x in ticks.tolist()]
    assert (
        np.unique([one.table[0][1] for one in recipes], return_counts=True)[1].tolist()
        == [1200] * 5
    )
    assert {one.table[0][1] for one in recipes} == {1.0, 2.0, 3.0, 4.0, 5.0}
    for name, values in (
        ("elect", ("weighted", "unweighted", "count")),
        ("normalize", (True, False)),
    ):
        found = [one.option(name, "") for one in recipes]
        assert [found.count(value) for value in values] == [6000 // len(values)] * len(values)
    last = box.decode((1.0,) * 6)
    assert (last.table[0], dict(last.options)["elect"]) == ((2.0, 5.0), "count")
    assert dict(last.options)["divisor"] == "weight"


@settings(deadline=None)  # a shared machine stands still for longer than that
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_a_bin_is_one_recipe_and_its_middle_comes_back(x: list[float]) -> None:
    box = space()
    middle = tuple(snap(np.array(x), box.kinds).tolist())
    recipe = box.decode(x)
    assert box.decode(middle).digest == recipe.digest
    rows = [dict(zip(recipe.columns, row, strict=True)) for row in recipe.table]
    again = box.encode_rows(rows, dict(recipe.options))
    assert again == pytest.approx(middle, abs=1e-12)
    assert again[1::2] == middle[1::2]  # whole numbers and the last option: exactly


def test_encode_knows_what_is_no_level() -> None:
    box, chosen = space(), {"elect": "unweighted", "normalize": False}
    x = box.encode({"weight.math": 1.0, "bands": 4.0}, chosen)
    assert x == (0.5, 0.7, 0.5, 0.7, 0.5, 0.75)
    assert box.encode({"weight.math": 1.0, "bands": 4.5}, chosen) is None
    assert box.encode({"weight.math": 1.0, "bands": 4.0}) is None  # the options are searched
    assert box.encode({"weight.math": 1.0, "bands": 4.0}, {**chosen, "normalize": 0}) is None
    assert box.encode({"weight.math": 1.0, "bands": 4.0}, {**chosen, "divisor": "count"}) is None
    with pytest.raises(
        InputError, match=r"bands is 1\.5 in embed, the study searches whole numbers"
    ):
        box.encode_rows([{"weight.math": 1.0, "bands": 1.5}] * 2, chosen)
    with pytest.raises(InputError, match=r"its options are \{'elect': 'x'\}, the study searches"):
        box.encode_rows([{"weight.math": 1.0, "bands": 1.0}] * 2, {"elect": "x"})


def test_the_digest_knows_what_is_searched() -> None:
    fewer: dict[str, OptionValue] = {**MIXED, "elect": Choices(("weighted", "count"))}
    fixed: dict[str, OptionValue] = {**MIXED, "elect": "weighted"}
    digests = {space().digest, space(options=fewer).digest, space(options=fixed).digest}
    digests |= {space(high=6.0).digest}
    assert len(digests) == 4


def test_kinds_must_be_as_many_as_dimensions() -> None:
    with pytest.raises(ValueError, match=r"kinds: expected none or \[3\], got \[1\]"):
        make_searcher("random", {}, SearchProblem(3, 1, 10, 1, 0, kinds=(REAL,)))


def test_tying_leaves_options_alone() -> None:
    box = space()
    problem = SearchProblem(box.dimension, 1, 10, 1, 0, groups=box.groups, kinds=box.kinds)
    assert [tying.tolist() for tying in levels(problem, 2)] == [
        [0, 1, 0, 1, 2, 3], [0, 2, 1, 3, 4, 5],
    ]  # fmt: skip


#: Two real dimensions, and eight options of six values each, one of which is right.
KINDS = (REAL, REAL, *(Kind("choice", 6),) * 8)
RIGHT = (4, 4, 0, 4, 2, 3, 3, 0)


def wrong_options(candidate: Candidate) -> Told:
    x = np.array(candidate.x)
    wrong = (np.floor(x[2:] * 6) != RIGHT).mean()
    return Told(candidate.id, (float(wrong + ((x[:2] - 0.3) ** 2).sum()),))


def found(name: str, seed: int) -> float:
    problem = SearchProblem(len(KINDS), 1, 240, 4, seed, kinds=KINDS)
    calls = drive(make_searcher(name, {}, problem), wrong_options, 240, window=4, order=0)
    return min(told.losses[0] for call in calls for told in call.told)


@pytest.mark.parametrize("name", ["ga", "nsga2", "unsga3"])
def test_genetic_algorithms_find_the_options_that_matter(name: str) -> None:
    assert np.mean([found(name, seed) for seed in range(4)]) < 0.25  # two wrong ones of eight


def test_chance_does_not_find_them() -> None:
    points = np.random.default_rng(0).random((4, 240, len(KINDS)))
    losses = [
        min(wrong_options(Candidate(0, tuple(x))).losses[0] for x in rows.tolist())
        for rows in points
    ]
    assert np.mean(losses) > 0.35


def test_whole_numbers_move_to_neighbours_and_choices_anywhere() -> None:
    from evomerge.search.mixed import _moved

    random_state = np.random.default_rng(0)
    points = np.full((4000, 2), 0.5 / 10)  # the first of ten levels
    moved = _moved(points, np.array([10, 10]), np.array([True, False]), random_state)
    levels_found = np.floor(moved * 10).astype(int)
    assert levels_found.min() == 1  # never stays
    assert levels_found.max() == 9
    whole, choice = (np.bincount(column, minlength=10) for column in levels_found.T)
    assert whole[1] > 3 * whole[2:].max()
    assert choice[1:].max() < 1.3 * choice[1:].min()


# -- the study file ------------------------------------------------------------------------

FORM = """
models: {base: b, experts: {math: m, code: c}}
fitness: {tasks: [t]}
"""


def study_file(folder: Path, parameters: str, method: str = "ties") -> Path:
    path = folder / "study.yaml"
    path.write_text(f"{FORM}space: {{method: {method}, parameters: {{{parameters}}}}}\n")
    return path


def test_the_file_says_what_is_searched(tmp_path: Path) -> None:
    text = "weight: {low: 0, high: 3, integer: true}, elect: {choices: [unweighted, count]}"
    columns = columns_of(load(study_file(tmp_path, text)))
    assert columns["weight.code"] == Range(0.0, 3.0, integer=True)
    assert columns_of(load(study_file(tmp_path, "weight: 1, normalize: {choices: [true, false]}")))
    assert "choices" in json.dumps(json_schema())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight: {low: 0.5, high: 3, integer: true}", "needs whole numbers, got low 0.5"),
        ("weight: {choices: [true, false]}", "weight: is a number; choices are for options"),
        (
            "weight: 1, elect: {choices: [unweighted, most]}",
            "elect.choices: choose from weighted, unweighted, count, got 'most'",
        ),
        ("weight: 1, elect: {choices: [count, count]}", "elect.choices: each value once"),
        (
            "weight: 1, normalize: {choices: [true, 'false']}",
            "normalize.choices: choose from true, false, got 'false'",
        ),
        ("weight: 1, density: 1", "nothing is searched"),
    ],
)  # fmt: skip
def test_what_the_method_does_not_take_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        columns_of(load(study_file(tmp_path, text)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("elect: {choices: [count]}", "elect.choices: List should have at least 2 items"),
        ("elect: {choices: [unweighted, count], low: 1}", "parameters.elect.low: unknown key"),
        ("weight: {low: 0, hihg: 1}", "weight.hihg: unknown key (did you mean 'high'"),
        ("weight: [0, 1]", "space.parameters.weight: must be a number or {low, high}"),
    ],
)  # fmt: skip
def test_a_malformed_parameter_is_named_once(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        load(study_file(tmp_path, text))
    assert message in str(caught.value)
    assert "ChoicesSection" not in str(caught.value)
    assert "RangeSection" not in str(caught.value)


# -- a study -------------------------------------------------------------------------------

PROJECT = STUDY.replace(
    "task_arithmetic, partition: model, parameters: {weight: {low: 0, high: 2}}",
    "linear, partition: model, parameters: {weight: {low: 0, high: 2, integer: true}, "
    "normalize: {choices: [true, false]}}",
).replace("searcher: random, trials: 6", "searcher: nsga2, parallel: 2, trials: 12")


def project(folder: Path, *overrides: str) -> Prepared:
    return prepare(load(folder / "study.yaml", list(overrides)), folder / "study.yaml")


def test_a_study_searches_options_and_continues(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    folder = tiny_project(tmp_path, save_llama, PROJECT)
    prepared = project(folder)
    assert prepared.space.dimension == 3
    lines = str(plan_lines(prepared))
    assert "whole numbers: weight.code, weight.math; normalize: true or false" in lines
    assert direction_grams(prepared.space, prepared.models) == ()
    points = {one.label: one for one in prepared.baselines}
    assert points["base"].x is None  # weights of zero have no average
    assert points["expert:math"].x == (1.5 / 3, 0.5 / 3, 0.5 / 2)
    assert points["uniform"].x is None  # halves are no whole numbers
    view = launch.run(prepared, ()).view
    trials = [trial for trial in view.trials if trial.kind == "search"]
    assert {dict(trial.recipe.options)["normalize"] for trial in trials} == {True, False}
    assert all(weight in (0, 1, 2) for one in trials for weight in one.recipe.table[0])
    switched = next(one for one in trials if not dict(one.recipe.options)["normalize"])
    assert trial_params(switched)["normalize"] == "false"
    assert summary(switched.recipe).endswith(", normalize false")
    usual = next(one for one in trials if dict(one.recipe.options)["normalize"])
    assert "normalize" not in trial_params(usual)

    essence = essence_of(prepared.directory)
    whole = (prepared.directory / JOURNAL).read_bytes()
    cut(prepared.directory, len(read(prepared.directory).records) // 2)
    assert (prepared.directory / JOURNAL).stat().st_size < len(whole)
    launch.run(project(folder), ())
    assert essence_of(prepared.directory) == essence


def test_equal_merges_are_scored_once(tmp_path: Path, save_llama: Callable[..., Path]) -> None:
    folder = tiny_project(tmp_path, save_llama, PROJECT)
    # 3 x 3 x 2 merges, of which more are asked for.
    view = launch.run(project(folder, "search.searcher=random", "search.trials=40"), ()).view
    scored: dict[str, list[bool]] = {}
    for record in read(view.directory).records:
        if record["ev"] == "tell" and record["status"] == "done":
            digest = view.trial(record["trial"]).recipe.digest
            scored.setdefault(digest, []).append("reused" in record)
    assert len(scored) < 40
    assert all(not reused[0] and all(reused[1:]) for reused in scored.values())


def test_check_warns_where_a_searcher_only_mixes(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    folder = tiny_project(tmp_path, save_llama, PROJECT)
    prepared = project(folder, "search.searcher=m2n2")
    assert any("m2n2 mixes the baselines" in line for line in prepared.warnings)
    assert not any("mixes" in line for line in project(folder).warnings)
