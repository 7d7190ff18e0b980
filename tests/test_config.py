"""The study file: defaults, all problems at once, and their dotted paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.config import json_schema, load
from evomerge.errors import StudyFileError, suggest
from evomerge.template import study_template

MINIMAL = """
models: {base: models/base, experts: {math: models/math, code: org/code@v1}}
fitness: {tasks: [gsm8k]}
"""


def write(tmp_path: Path, text: str, name: str = "my study.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(StudyFileError) as caught:
        load(write(tmp_path, text))
    return caught.value.problems


def test_defaults(tmp_path: Path) -> None:
    study = load(write(tmp_path, MINIMAL))
    assert study.name == "my-study"
    assert list(study.models.experts) == ["math", "code"]
    assert (study.search.searcher, study.search.trials, study.pool.kind) == ("auto", 150, "ray")
    assert study.space.partition == "layer"


def test_study_yaml_is_named_after_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Long_run"
    folder.mkdir()
    assert load(write(folder, MINIMAL, "study.yaml")).name == "long_run"


def test_all_problems_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
seed: -1
models: {base: 3, expert: {a: b}}
space: {parameters: {weight: {low: 0, hig: 2}}}
fitness:
  tasks: [a, {task: b, metrik: acc}]
  items: {search: "100"}
search: {trials: 0, searchr: cma}
pool: {kind: rayy}
buget: 7
""",
    )
    assert found == (
        "seed: should be greater than or equal to 0, got -1",
        "models.base: should be a valid string, got 3 (quote it)",
        "models.experts: is missing",
        "models.expert: unknown key (did you mean 'experts'?)",
        "space.parameters.weight.high: is missing",
        "space.parameters.weight.hig: unknown key (did you mean 'high'?)",
        "fitness.tasks[1].metrik: unknown key (did you mean 'metric'?)",
        'fitness.items.search: should be a valid integer, got "100"',
        "search.trials: should be greater than or equal to 1, got 0",
        "search.searchr: unknown key (did you mean 'searcher'?)",
        "pool.kind: should be 'ray' or 'serial', got \"rayy\"",
        "buget: unknown key (choose from: baselines, directory, fitness, models, name, pool, "
        "search, seed, space, tracking)",
    )


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("seed: 5000000000", "seed: should be less than or equal to 4294967295, got 5000000000"),
        ("name: 'a/b; rm -rf'", "name: use lowercase letters, digits, '-' and '_'"),
        ("search: {trials: true}", "search.trials: should be a valid integer, got true"),
        ("search: {trials: .nan}", "search.trials: should be a valid integer"),
        ("pool: {workers: 0}", "pool.workers: should be greater than or equal to 1, got 0"),
        ("space: {dtype: int8}", "space.dtype: should be 'float32', 'bfloat16' or 'float16'"),
        ("fitness: {tasks: []}", "fitness: needs an entry in tasks or in objectives"),
        (
            "fitness: {objectives: [{kind: kll}]}",
            "fitness.objectives[0].kind: unknown 'kll' (did you mean 'kl'?)",
        ),
        (
            "fitness: {objectives: [{text: a}]}",
            "fitness.objectives[0].kind: is missing (choose from: alignment, distance, entropy, kl",
        ),
        (
            "fitness: {objectives: [{kind: kl, text: a, off: base}]}",
            "fitness.objectives[0].off: unknown key (did you mean 'of'?)",
        ),
        (
            "fitness: {objectives: [{kind: entropy, text: a, split: {serch: 3}}]}",
            "fitness.objectives[0].split.serch: unknown key (did you mean 'search'?)",
        ),
        ("fitness: {objectives: [3]}", "fitness.objectives[0]: must be a mapping, got 3"),
        (
            "fitness: {tasks: [{task: a, min: 2, max: 1}]}",
            "fitness.tasks[0]: min must not be larger than max",
        ),
        (
            "fitness: {tasks: [{task: a, min: 2, max: b}]}",
            'fitness.tasks[0].max: should be a valid number, got "b"',
        ),
    ],
)
def test_single_problems(tmp_path: Path, setting: str, problem: str) -> None:
    text = MINIMAL
    if setting.startswith("fitness"):
        text = text.replace("fitness: {tasks: [gsm8k]}", "")
    found = problems(tmp_path, f"{text}\n{setting}\n")
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_an_expert_called_base_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL.replace("math: models/math", "base: models/math"))
    assert found == ('models.experts.base: is the base\'s own name (choose another), got "base"',)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    study = load(path, ["search.trials=7", "models.base=other", "fitness.items.search=0.5"])
    assert (study.search.trials, study.models.base) == (7, "other")
    assert study.fitness.items.search == 0.5
    for bad in ("search.trials", "=3", "search.trials=0", "search.trails=3", "seed.x=1"):
        with pytest.raises(StudyFileError):
            load(path, [bad])


def test_resolved_file_loads_to_the_same_study(tmp_path: Path) -> None:
    study = load(write(tmp_path, MINIMAL))
    again = load(write(tmp_path, study.to_yaml(), "again.yaml"))
    assert again == study


def test_template_is_a_valid_study_file(tmp_path: Path) -> None:
    study = load(write(tmp_path, study_template(None, [], [])))
    assert list(study.models.experts) == ["math", "code"]
    named = study_template("org/base@main", [("it", "./a b"), ("no", "3")], ["x", "1e-3"])
    study = load(write(tmp_path, named))
    assert study.models.base == "org/base@main"
    assert study.models.experts == {"it": "./a b", "no": "3"}
    assert study.fitness.tasks == ["x", "1e-3"]


def test_a_template_of_adapters_had_accuracy_beside_terms_in_nats(tmp_path: Path) -> None:
    text = study_template("b", [], ["a-1", "book"], ("adapters", 3), ["own"], {"book"})
    (tmp_path / "adapters/x").mkdir(parents=True)
    (tmp_path / "adapters/x/adapter_config.json").write_text("{}")
    tasks = load(write(tmp_path, text)).fitness.tasks
    assert [one if isinstance(one, str) else (one.task, one.metric) for one in tasks] == [
        ("a-1", "reference_loglikelihood"), "book",
    ]  # fmt: skip
    assert "include_path: [own]" in text
    assert "reference_loglikelihood" not in study_template("b", [], ["a-1"])


def test_schema_accepts_what_load_accepts() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert {"models", "fitness", "space", "search", "pool"} <= set(schema["properties"])
    json.dumps(schema, allow_nan=False)


def test_of_hundreds_of_names_the_first_are_suggested() -> None:
    """The experts of a folder filled pages."""
    names = [f"a{number:03d}" for number in range(100)]
    few = suggest("zz", names[:60])
    assert few == f" (choose from: {', '.join(names[:60])})"
    assert suggest("zz", names) == f" (choose from: {', '.join(names[:20])} and 80 more)"
    assert suggest("a99", names).startswith(" (did you mean ")
