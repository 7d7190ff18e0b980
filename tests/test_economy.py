"""A study file that saves item evaluations, on real tiny models."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_project import tiny_project

from evomerge import launch
from evomerge.config import load
from evomerge.errors import InputError, StudyFileError
from evomerge.facts import front_facts, plan_facts, plan_lines, status_facts, status_lines
from evomerge.journal import Journal
from evomerge.prepare import Prepared, prepare
from evomerge.study_view import StudyState, StudyView
from evomerge.worker import ModelWorker

ITEMS = "fitness.items={search: 40, validation: 8, test: 10}"
RESAMPLED = "fitness.items={search: 40, validation: 8, test: 10, policy: resampled, per_trial: 12}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    return tiny_project(tmp_path_factory.mktemp("economy"), save_llama, items=60)


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "project"))


def prepared(folder: Path, *overrides: str) -> Prepared:
    return prepare(load(folder / "study.yaml", overrides), folder / "study.yaml")


def problems(folder: Path, *overrides: str) -> str:
    with pytest.raises(StudyFileError) as caught:
        prepared(folder, *overrides)
    return str(caught.value)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int, str]]:
    """How often each (recipe, objective, item) was scored by a real model."""
    counts: Counter[tuple[str, int, str]] = Counter()
    run = ModelWorker.run

    def counting(self: ModelWorker, job: Any) -> Any:
        score = self._fitness.score

        class Counting:
            def score(self, items: Sequence[Sequence[str]]) -> Any:
                for objective, ids in enumerate(items):
                    counts.update((job.recipe.digest, objective, item) for item in ids)
                return score(items)

        fitness, self._fitness = self._fitness, Counting()  # type: ignore[assignment]
        try:
            return run(self, job)
        finally:
            self._fitness = fitness

    monkeypatch.setattr(ModelWorker, "run", counting)
    return counts


def run(folder: Path, *overrides: str) -> StudyView:
    return launch.run(prepared(folder, *overrides), []).view


def test_racing_and_a_budget_in_items(copy: Path, scored: Counter[tuple[str, int, str]]) -> None:
    settings = (ITEMS, "search.racing={rungs: [10, 20]}", "search.items=700")
    plan = prepared(copy, *settings)
    assert plan_facts(plan)["search"]["items"] == 700
    assert "at most 700 item evaluations, races after 10, 20 items" in plan_lines(plan)["search"]
    view = run(copy, *settings, "search.trials=12")
    assert view.state is StudyState.FINISHED
    assert set(scored.values()) == {1}, "an item was scored twice"
    assert view.spending.scored == scored.total()
    searched = [t.number for t in view.trials if t.kind == "search"]
    assert sum(view.results["search", number].fresh for number in searched) <= 700
    facts = status_facts(view)
    assert facts["items"]["scored"] == scored.total()
    assert facts.get("stopped_early", 0) == view.spending.stops
    assert f"{scored.total():,} (" in status_lines(facts)["items scored"]
    assert front_facts(view)["feasible"] is True
    scored.clear()
    assert run(copy, *settings, "search.trials=12").front == view.front
    assert not scored


def test_halving_from_the_study_file(copy: Path, scored: Counter[tuple[str, int, str]]) -> None:
    halving = "search.racing={rule: halving, rungs: [10, 20], eta: 4}"
    settings = (ITEMS, halving, "search.searcher=nsga2", "search.trials=16")
    lines = plan_lines(prepared(copy, *settings))["search"]
    assert "the best 1/4 go on after 10, 20 items" in lines
    assert plan_facts(prepared(copy, *settings))["search"]["racing"] == {
        "rule": "halving", "rungs": [10, 20], "eta": 4, "bracket": 16,
    }  # fmt: skip
    view = run(copy, *settings)
    rungs = Counter(view.results["search", t.number].rung for t in view.trials if not t.label)
    assert rungs[10] == 12, "a generation of 16, of which 4 go on"
    assert rungs[20] + rungs[None] == 4, "and then 1; others may be known in full, as baselines"
    assert rungs[20] and rungs[None]
    assert set(scored.values()) == {1}, "an item was scored twice"
    assert view.spending.scored == scored.total()
    assert len(view.validation) > 5, "finalists that were left behind have been completed"
    scored.clear()
    assert run(copy, *settings).front == view.front
    assert not scored


def test_fresh_items_for_every_generation(copy: Path, scored: Counter[Any]) -> None:
    view = run(copy, RESAMPLED, "search.searcher=nsga2", "search.trials=16")
    sets = Counter(view.items_of("search", t.number) for t in view.trials if t.kind == "search")
    assert len(sets) >= 2
    assert all(len(ids) == 12 for items in sets for ids in items)
    assert set(scored.values()) == {1}


def test_an_estimated_search_scores_few_items_and_audits_itself(
    copy: Path, scored: Counter[Any]
) -> None:
    settings = (
        ITEMS, "fitness.estimator={name: cells, items: 10, full_every: 3, calibration: 3}",
    )  # fmt: skip
    view = run(copy, *settings, "search.trials=9")
    sizes = [len(view.items_of("search", t.number)[0]) for t in view.trials if t.kind == "search"]
    assert sizes == [40] * 3 + [10, 10, 40] * 3
    assert len(view.audits) == 3
    facts = status_facts(view)["estimator"]
    assert facts["name"] == "cells"
    for name in ("pick_a", "pick_b"):
        found = facts[name]
        assert found["audits"] == 3
        assert 0 <= found["error"] < 1
        assert "mean error" in status_lines(status_facts(view))[f"estimate of {name}"]
    for audit in view.audits:
        assert audit.estimate.values != audit.mean.values, "the estimator did nothing"
    assert set(scored.values()) == {1}
    assert view.spending.calibration == 3 * 80


def test_an_estimator_with_fresh_items_for_every_generation(
    copy: Path, scored: Counter[Any]
) -> None:
    settings = (
        ITEMS, "fitness.estimator={name: cells, items: 10, full_every: null, refresh: generation}",
        "search.searcher=nsga2", "search.trials=16",
    )  # fmt: skip
    plan = plan_lines(prepared(copy, *settings))["search"]
    assert "cells from 10 items (random, fresh per generation)" in plan
    view = run(copy, *settings)
    sets = Counter(view.items_of("search", t.number) for t in view.trials if t.kind == "search")
    del sets[view.items_of("search", 0)]  # baselines
    assert len(sets) >= 2
    assert all(len(ids) == 10 for items in sets for ids in items)
    assert set(scored.values()) == {1}
    scored.clear()
    assert run(copy, *settings).front == view.front
    assert not scored
    with pytest.raises(InputError, match=r"fitness.estimator.refresh: \"generation\" -> 4"):
        run(copy, *settings, "fitness.estimator.refresh=4")


def test_the_values_are_those_of_the_worker_by_default(copy: Path) -> None:
    view = run(copy, ITEMS)
    for (_, number), result in view.results.items():
        assert number < len(view.trials)
        for score in getattr(result.value, "scores", ()):
            assert score.value == sum(score.items) / len(score.items)
            assert len(score.margins) == len(score.items)


def test_constraints_come_from_the_study_file(copy: Path) -> None:
    tasks = "fitness.tasks=[{task: pick_a, min: 2.0}, {task: pick_b}]"
    view = run(copy, tasks)
    assert not view.feasible
    facts = status_facts(view)
    assert facts["violation"] > 0
    assert "no merge keeps all of them" in status_lines(facts)["constraints"]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("search.items=0",), "search.items: should be greater than or equal to 1"),
        (("search.trials=null",), "search: needs trials, items, or both"),
        (("search.racing={rungs: [20, 10]}",), "search.racing: rungs must ascend from 10 or more"),
        (("search.racing={rungs: [5]}",), "search.racing: rungs must ascend from 10 or more"),
        (("search.racing={rung: [20]}",), "search.racing.rung: unknown key (did you mean 'rungs'"),
        (("search.racing={eta: 3}",), "search.racing: eta means nothing to rule: front"),
        (
            ("search.racing={rule: halving, z: 2}",),
            "search.racing: z means nothing to rule: halving",
        ),
        (
            ("search.racing={rule: halving}", "search.order=completion"),
            "search: racing.rule: halving needs order: ask",
        ),
        (("fitness.items.policy=resampled",), "policy: resampled needs per_trial"),
        (("fitness.items.per_trial=5",), "per_trial and every need policy: resampled"),
        (
            ("fitness.estimator={name: cels, items: 5}",),
            "fitness.estimator.name: unknown 'cels' (did you mean 'cells'",
        ),
        (
            ("fitness.estimator={name: cells, items: 5, design: rand}",),
            "fitness.estimator.design: unknown 'rand'",
        ),
        (
            ("fitness.estimator={name: cells, items: 5, design: anchor, refresh: generation}",),
            "fitness.estimator.refresh: generation: anchor items are not drawn, so that another",
        ),
        (
            ("fitness.estimator={name: cells, items: 5, refresh: 0}",),
            "fitness.estimator.refresh: must be never, generation, or a number of trials of at "
            "least 1, got 0",
        ),
        (
            ("fitness.estimator={name: cells, items: 5, refresh: sometimes}",),
            'least 1, got "sometimes"',
        ),
        (
            (
                "search.searcher=m2n2",
                "fitness.estimator={name: cells, items: 5, refresh: 4}",
            ),
            "fitness.estimator.refresh: 4: m2n2 compares merges item by item, so that all must",
        ),
        (
            ("fitness.estimator={name: mpirt, items: 5}",),
            "fitness.estimator.banks: mpirt needs an item bank of at least one objective",
        ),
        (
            ("fitness.estimator={name: cells, items: 5, banks: {pick_c: x.npz}}",),
            "fitness.estimator.banks.pick_c: no such objective",
        ),
        (
            ("fitness.estimator={name: cells, items: 5000}",),
            "fitness.estimator.items: 5000 items for each trial, but there are at most",
        ),
        (
            (RESAMPLED, "fitness.items.per_trial=5000"),
            "fitness.items.per_trial: 5000 items for each trial, but there are at most",
        ),
        (
            (RESAMPLED, "fitness.estimator={name: cells, items: 5}"),
            "items.policy: resampled and an estimator exclude each other",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_path(
    project: Path, overrides: tuple[str, ...], text: str
) -> None:
    assert text in problems(project, *overrides)


def test_a_budget_in_items_alone_lifts_the_limit_on_trials(project: Path) -> None:
    text = (project / "study.yaml").read_text().replace("trials: 6", "items: 600")
    path = project / "items.yaml"
    path.write_text(text)
    file = load(path)
    assert file.search.trials is None
    assert prepare(file, path).trials == 600 // 12
    path.write_text(file.to_yaml())
    assert load(path).search == file.search, "the resolved file means something else"


def test_margins_of_generated_answers_are_asked_for_only_where_an_estimator_uses_them(
    project: Path,
) -> None:
    def asked(estimator: str) -> bool:
        return prepared(project, ITEMS, f"fitness.estimator={estimator}").factory.margins

    assert not prepared(project, ITEMS).factory.margins
    assert not asked("{name: mean, items: 5}")
    assert not asked("{name: cells, items: 5}")
    assert asked("{name: soft_reg, items: 5}")
    assert asked("{name: ppi, items: 5}")
    assert asked("{name: mean, items: 5, design: d_optimal_margins}")


def test_a_study_goes_on_with_the_batch_size_that_it_began_with(copy: Path) -> None:
    plan = prepared(copy, ITEMS, "fitness.batch_tokens=auto", "search.trials=1")
    assert plan.file.fitness.batch_tokens is None
    launch.run(plan, [])
    with Journal(plan.directory) as journal:
        journal.append("pool", facts={"batch_tokens": "2048"})
    assert launch.with_recorded_batch(plan, plan.factory) == replace(
        plan.factory, batch_tokens=2048, batch_found=True
    )
    given = prepared(copy, ITEMS, "fitness.batch_tokens=512", "search.trials=1")
    assert launch.with_recorded_batch(given, given.factory) is given.factory
