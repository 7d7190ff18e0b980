"""``fitness.estimator: auto``: when it estimates, what it says, and what a begun study keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_project import TASK, tiny_project

from evomerge import default_estimator, launch
from evomerge.config import load
from evomerge.errors import InputError, StudyFileError
from evomerge.facts import front_facts, plan_facts, plan_lines, status_facts, status_lines
from evomerge.prepare import Prepared, prepare
from evomerge.study_view import StudyState, StudyView

ENOUGH = "fitness.items={search: 200, validation: 8, test: 10}"
LONG = "search.trials=150"

GENERATED = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: fitness/pick_a.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}="
doc_to_target: "TARGET"
target_delimiter: ""
generation_kwargs: {max_gen_toks: 2, do_sample: false, until: ["="]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    folder = tiny_project(tmp_path_factory.mktemp("auto"), save_llama, items=230)
    for name in ("pick_a", "pick_b"):
        # The same items as tasks of one tag.
        text = TASK.format(name=name).replace(f"task: {name}", f"task: own_{name}\ntag: picks")
        (folder / f"fitness/own_{name}.yaml").write_text(text)
    (folder / "fitness/write.yaml").write_text(GENERATED.replace("TARGET", "{{choices[label]}}"))
    blank = GENERATED.replace("TARGET", "").replace("task: write", "task: write_blank")
    (folder / "fitness/write_blank.yaml").write_text(blank)
    (folder / "mine.py").write_text("def score(model, tokenizer, items):\n    return [0.5] * 230\n")
    (folder / "mine.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(230)))
    return folder


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "project"))


#: Of several experts; and a study with one.
OPTIMAL, ALONE = "value_optimal_margins", "models.experts={math: models/math}"


def prepared(folder: Path, *overrides: str) -> Prepared:
    return prepare(load(folder / "study.yaml", overrides), folder / "study.yaml")


@pytest.mark.parametrize(
    ("overrides", "design", "every"),
    [
        ((LONG,), OPTIMAL, 20),
        (("search.trials=25",), OPTIMAL, 5),
        ((LONG, "fitness.tasks=[picks]", "fitness.items.search=300"), OPTIMAL, 20),
        ((LONG, "fitness.tasks=[picks, pick_a]"), OPTIMAL, 20),
        ((LONG, "fitness.tasks=[write]"), OPTIMAL, 20),
        ((LONG, "fitness.objectives=[{kind: distance}]"), OPTIMAL, 20),
        (("search={items: 100000, searcher: random}",), OPTIMAL, 20),
        # 25 trials of two objectives, every 5th of them on all 200 + 200: 4,400 items.
        (("search={items: 4400, searcher: random}",), OPTIMAL, 5),
        (("search={items: 4400, trials: 150, searcher: random}",), OPTIMAL, 5),
        (("search={items: 100000, trials: 50, searcher: random}",), OPTIMAL, 10),
        ((LONG, ALONE), "random", 20),
        ((LONG, "baselines.experts=1"), "random", 20),
        ((LONG, ALONE, "fitness.tasks=[picks]", "fitness.items.search=300"), "stratified", 20),
    ],
)
def test_many_items_with_margins_are_estimated(
    project: Path, overrides: tuple[str, ...], design: str, every: int
) -> None:
    study = prepared(project, ENOUGH, *overrides)
    section = study.file.fitness.estimated
    assert section is not None
    assert (section.name, section.items) == ("soft_reg", 60)
    assert (section.design, section.full_every) == (design, every)
    assert study.factory.margins, "generated answers must be given margins"
    assert study.estimate.startswith("soft_reg on 60 items ")
    assert plan_lines(study)["estimator"] == study.estimate
    facts = plan_facts(study)["search"]
    assert facts["estimator"]["items"] == 60
    assert facts["estimator_choice"] == study.estimate


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("fitness.items.search=199",), "pick_a has 199 search items; an estimate pays from 200"),
        (("search.trials=24",), "24 trials; an estimate is taken from 25"),
        (
            ("search={items: 4399, searcher: random}",),
            "4,399 item evaluations buy fewer than 25 trials",
        ),
        (("search.racing={}",), "search.racing saves items already"),
        (
            ("fitness.items={search: 200, validation: 8, test: 10, policy: resampled, "
             "per_trial: 20}",),
            "resampled chooses them",
        ),
        (("search.searcher=m2n2",), "m2n2 learns from single items"),
        (("baselines.experts=0",), "no expert is scored alone (baselines.experts), of which it"),
        (
            ("fitness.objectives=[{kind: python, function: mine.py:score, items: mine.jsonl, "
             "unit: fraction}]",),
            "score has no margins: it is a Python function",
        ),
        (
            ("fitness.tasks=[pick_a, {task: write, metric: response_tokens, name: length}]",),
            "length is no share of right answers",
        ),
        (
            ("fitness.tasks=[write_blank]",),
            "write_blank has no margins: item '0' has no reference answer",
        ),
        (
            ("fitness={tasks: [], objectives: [{kind: distance}]}", "search.searcher=random"),
            "no objective has items to save",
        ),
    ],
)  # fmt: skip
def test_where_nothing_was_measured_all_items_are_scored(
    project: Path, overrides: tuple[str, ...], reason: str
) -> None:
    study = prepared(project, ENOUGH, LONG, *overrides)
    assert study.file.fitness.estimator is None
    assert study.estimate.startswith("none: the mean of all search items (")
    assert reason in study.estimate
    assert plan_lines(study)["estimator"] == study.estimate
    assert "estimator" not in plan_facts(study)["search"]


@pytest.mark.parametrize("given", ["none", "null", "{name: cells, items: 30}"])
def test_what_the_study_file_says_is_not_explained(project: Path, given: str) -> None:
    study = prepared(project, ENOUGH, LONG, f"fitness.estimator={given}")
    assert study.estimate == ""
    assert "estimator" not in plan_lines(study)
    assert (study.file.fitness.estimated is None) == (given != "{name: cells, items: 30}")
    assert "estimator" not in study.identity()


def test_an_estimator_with_nothing_to_learn_from_is_refused(project: Path) -> None:
    """All baselines were scored before it said that base and experts were expected."""
    nothing = (ENOUGH, LONG, "baselines.experts=[]")
    given = "fitness.estimator={name: cells, items: 30}"
    with pytest.raises(StudyFileError, match=r"fitness.estimator.name: cells learns from models t"):
        prepared(project, *nothing, given)
    assert prepared(project, *nothing, given, "fitness.estimator.calibration=4")


def test_a_wrong_estimator_is_told_what_there_is(project: Path) -> None:
    with pytest.raises(StudyFileError) as caught:
        load(project / "study.yaml", ["fitness.estimator=soft_reg"])
    assert str(caught.value).splitlines() == [
        f"{project / 'study.yaml'}: fitness.estimator: must be auto, none, or a mapping such as "
        '{name: soft_reg, items: 60}, got "soft_reg"'
    ]
    with pytest.raises(StudyFileError) as caught:
        load(project / "study.yaml", ["fitness.estimator={name: soft_reg, item: 60}"])
    assert [problem.partition("(")[0] for problem in caught.value.problems] == [
        "fitness.estimator.items: is missing",
        "fitness.estimator.item: unknown key ",
    ]


ONE = (ENOUGH, "search.trials=25", "fitness.tasks=[pick_a]")


def test_a_study_says_what_it_estimates_and_keeps_it(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = prepared(copy, *ONE)
    view = launch.run(study, []).view
    assert view.state is StudyState.FINISHED
    assert view.contract["identity"]["estimator"] == study.estimate
    assert view.contract["estimation"]["settings"]["items"] == 60
    sizes = [len(view.items_of("search", t.number)[0]) for t in view.trials if t.kind == "search"]
    assert sizes == ([60] * 4 + [200]) * 5
    assert len(view.audits) == 5, "the study must be able to judge its estimator"
    status = json.loads(json.dumps(status_facts(view)))
    assert status["estimator_choice"] == study.estimate
    assert status["estimator"]["pick_a"]["trusted"] in (True, False)
    assert status_lines(status)["estimator"] == study.estimate
    assert "estimate of pick_a" in status_lines(status)
    json.dumps(front_facts(view))
    # The file that lies beside the journal says it without `auto`.
    resolved = load(view.directory / "study.resolved.yaml")
    assert resolved.fitness.estimated == study.file.fitness.estimated
    # Another version may have another rule and other words: the study goes on as it was begun.
    monkeypatch.setattr(default_estimator, "ITEMS", 30)
    again = prepared(copy, *ONE)
    assert again.file.fitness.estimated == study.file.fitness.estimated
    assert again.estimate == study.estimate
    assert launch.run(again, []).view.knee == view.knee
    with pytest.raises(InputError, match=r"fitness\.estimator"):
        launch.run(prepared(copy, *ONE, "fitness.estimator=none"), [])


def test_a_study_that_was_begun_without_estimator_goes_on_without(copy: Path) -> None:
    begun = launch.run(prepared(copy, *ONE, "fitness.estimator=none"), []).view
    assert "estimation" not in begun.contract
    assert "estimator" not in begun.contract["identity"]
    again = prepared(copy, *ONE)
    assert again.estimate == "none: the mean of all search items (this study was begun so)"
    assert launch.run(again, []).view.knee == begun.knee
    # And one with an estimator of its own goes on with that.
    name = ("name=own", *ONE)
    launch.run(prepared(copy, *name, "fitness.estimator={name: cells, items: 30}"), [])
    kept = prepared(copy, *name)
    assert kept.file.fitness.estimated is not None
    assert kept.estimate == "cells (this study was begun so)"
    assert StudyView.load(kept.directory).contract["estimation"]["name"] == "cells"
    launch.run(kept, [])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("fitness.tasks=[pick_a, write_blank]", "fitness.estimator={name: soft_reg, items: 9}"),
            "fitness.estimator.name: soft_reg needs margins, write_blank has none: item '0' has no "
            "reference answer (doc_to_target as text)",
        ),
        (
            (
                "fitness.tasks=[write_blank]",
                "fitness.estimator={name: cells, items: 9, design: d_optimal_margins}",
            ),
            "fitness.estimator.design: d_optimal_margins needs margins, write_blank has none",
        ),
        (
            (
                "fitness={tasks: [], objectives: [{kind: python, function: mine.py:score, items: "
                "mine.jsonl}]}",
                "fitness.estimator={name: soft_reg, items: 9}",
            ),
            "fitness.estimator.name: soft_reg needs margins, which no objective has",
        ),
        (
            ("fitness.estimator={name: cells, items: 9, design: stratified}",),
            "fitness.estimator.design: stratified draws by task, but no objective has several",
        ),
    ],
)
def test_missing_margins_were_found_after_all_endpoints_were_scored(
    project: Path, overrides: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(StudyFileError) as caught:
        prepared(project, ENOUGH, *overrides)
    assert problem in str(caught.value)


def test_objectives_without_margins_beside_others_are_left_to_the_mean(copy: Path) -> None:
    objectives = "fitness.objectives=[{kind: python, function: mine.py:score, items: mine.jsonl}]"
    (copy / "mine.py").write_text(
        "def score(model, tokenizer, items):\n    return [(item['n'] % 7) / 7 for item in items]\n"
    )
    study = prepared(
        copy, *ONE, objectives, "fitness.estimator={name: soft_reg, items: 20}", "search.trials=3"
    )
    view = launch.run(study, []).view
    assert view.state is StudyState.FINISHED
    trial = next(t for t in view.trials if t.kind == "search")
    evaluation = view.told(trial.number)
    assert evaluation.scores[1].value == pytest.approx(sum(evaluation.scores[1].items) / 20)
