"""All problems of a study file at once, those of form and those of content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from library_warnings import LIBRARY_WARNINGS
from test_cli import call
from tiny_project import STUDY, tiny_project

from evomerge.partial_file import partial_file

pytestmark = LIBRARY_WARNINGS


@pytest.fixture(scope="module")
def project(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("partial"), save_llama)


ITEMS = "{search: 6, validation: 8, test: 10}"

Check = Callable[[str], list[str]]


@pytest.fixture
def check(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Check:
    """Return a function that checks a study file and returns its problems."""

    def problems(text: str) -> list[str]:
        path = project / "wrong.yaml"
        path.write_text(text)
        code, out, err = call(capsys, monkeypatch, "check", str(path))
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        return [line.removeprefix(f"error: {path}: ") for line in err.splitlines()]

    return problems


def test_problems_of_every_sort_come_together(check: Check) -> None:
    """A wrong kind hid a missing model, an unknown task, a wrong method and a wrong range."""
    found = check(
        """
models: {base: models/base, experts: {math: models/nowhere, code: models/code}}
space: {method: task_arithmetic, partition: layrs, parameters: {weight: {low: 2, high: 1}}}
fitness:
  tasks: [pick_a, {metric: acc}, {task: pick_c}, {task: pick_b, metrik: acc, min: 2, max: 1}]
  objectives:
    - {kind: kll, txt: texts.txt, tokens: -5}
    - {kind: distance, norm: l3}
    - {kind: python, function: fitness/none.py:score, items: none.jsonl}
    - {kind: kl, of: mth, text: texts.txt}
  include_path: fitness
search: {searcher: nsga, trials: many}
pool: {workers: 0}
"""
    )
    expected = (
        r"fitness\.tasks\[1\]\.task: is missing",
        r"fitness\.tasks\[3\]\.metrik: unknown key \(did you mean 'metric'\?\)",
        r"fitness\.objectives\[0\]\.kind: unknown 'kll' \(did you mean 'kl'\?\)",
        r"fitness\.objectives\[1\]\.norm: should be 'l1' or 'l2', got \"l3\"",
        r"search\.trials: should be a valid integer, got \"many\"",
        r"pool\.workers: should be greater than or equal to 1, got 0",
        # What the first of them hid, in the same entries and sections ...
        r"fitness\.objectives\[0\]\.text: is missing",
        r"fitness\.objectives\[0\]\.txt: unknown key \(did you mean 'text'\?\)",
        r"fitness\.objectives\[0\]\.tokens: should be greater than or equal to 2, got -5",
        r"fitness\.tasks\[3\]: min must not be larger than max",
        # ... and in the world, by the user's numbers.
        r"search\.searcher: unknown 'nsga' .*",
        r"space\.partition: unknown 'layrs' .*",
        r"space\.parameters\.weight: low 2 must be < high 1",
        r"models\.experts\.math: no such directory: .*models/nowhere",
        r"fitness\.tasks\[2\]: unknown task 'pick_c'.*",
        r"fitness\.objectives\[2\]\.function: .*fitness/none\.py: No such file or directory",
        r"fitness\.objectives\[3\]\.of: no model is named 'mth' \(did you mean 'math'\?\)",
    )
    for pattern in expected:
        assert any(re.fullmatch(pattern, line) for line in found), (pattern, found)
    assert len(found) == len(expected), found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "models: 3\nfitness: {tasks: [pick_a, pick_q], include_path: fitness}\n",
            ["models: must be a mapping, got 3", "fitness.tasks[1]: unknown task 'pick_q'"],
        ),
        (
            "models: {base: models/base, experts: {math: models/math}}\n",
            ["fitness: is missing"],
        ),
        (
            "models: {base: models/base, experts: {math: models/math, base: models/code}}\n"
            "space: {method: slerp, parameters: {weight.base: 1}}\n"
            "fitness: {objectives: [{kind: kl, of: code, text: t.txt}]}\n",
            [
                "models.experts.base: is the base's own name",
                # Neither what slerp takes nor that no model is named code: they may be the same.
            ],
        ),
        (
            "models: {base: models/base, experts: {math: models/math}}\n"
            "space: {method: 3, parameters: {t: {low: 0, high: 1}}}\n"
            f"fitness: {{tasks: [pick_a], include_path: fitness, items: {ITEMS}}}\n",
            ["space.method: should be a valid string, got 3"],
        ),
        (
            "models: {base: models/base, experts: {math: models/math}}\n"
            "fitness: {tasks: [pick_a], include_path: fitness, items: {search: a, test: 9000}}\n",
            ['fitness.items.search: should be a valid integer, got "a"'],
        ),
        (
            "models: {base: models/gone, experts: {math: 3, code: models/lost}}\n"
            f"fitness: {{tasks: [pick_a], include_path: fitness, items: {ITEMS}}}\n",
            [
                "models.experts.math: should be a valid string, got 3",
                "models.base: no such directory",
                "models.experts.code: no such directory",
            ],
        ),
        (  # a folder that is not there hid the method, and what is wrong in form
            "models: {base: models/gone, experts: nowhere}\n"
            "space: {method: tiess, partition: layrs, parameters: {weight: {low: 0, high: 1}}}\n"
            "baselines: {experts: [math]}\n"
            f"fitness: {{tasks: [pick_a], include_path: fitness, items: {ITEMS}}}\nbuget: 3\n",
            [
                "models.experts: no such folder: nowhere",
                "buget: unknown key",
                "space.method: unknown 'tiess'",
                "space.partition: unknown 'layrs'",
                "models.base: no such directory",
            ],
        ),
        (
            "models: {base: models/base, experts: {math: models/math}}\n"
            "search: {trials: null, x: 1}\n"
            f"fitness: {{tasks: [pick_a], include_path: fitness, items: {ITEMS}}}\n",
            ["search.x: unknown key", "search: needs trials, items, or both"],
        ),
    ],
)
def test_what_follows_from_another_problem_is_not_told(
    check: Check, text: str, expected: list[str]
) -> None:
    found = check(text)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)


def test_a_wrong_space_hid_behind_a_missing_task(check: Check) -> None:
    """The space needs the models and no task: it was looked at only where all else was right."""
    wrong = STUDY.replace("partition: model", "partition: importance(0)").replace("pick_b", "none")
    found = check(wrong)
    assert any(line.startswith("fitness.tasks[1]: unknown task 'none'") for line in found)
    assert any(line.startswith("space.partition: ") for line in found), found
    wrong = STUDY.replace("partition: model", "partition: 'allot(1,1)'").replace("pick_b", "none")
    found = check(wrong)
    assert [line.partition(":")[0] for line in found] == ["fitness.tasks[1]", "space.partition"]


def test_the_other_commands_say_the_same(
    project: Path, check: Check, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = STUDY.replace("base: models/base", "base: models/gone") + "buget: 7\n"
    found = check(text)
    assert len(found) == 2
    code, _, err = call(capsys, monkeypatch, "run", str(project / "wrong.yaml"))
    assert code == 2
    assert [line.partition(".yaml: ")[2] for line in err.splitlines()] == found


def test_any_file_in_yaml_is_mended_to_one_in_good_form(tmp_path: Path) -> None:
    """With every value of a whole study file replaced by others of every type."""
    import yaml

    whole = yaml.safe_load(STUDY)
    whole["fitness"]["objectives"] = [{"kind": "kl", "text": "a", "split": {"search": 3}}]
    whole["search"]["racing"] = {"rungs": [10, 20]}
    path = tmp_path / "study.yaml"

    def places(value: object, place: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        inside: list[tuple[object, object]] = []
        if isinstance(value, dict):
            inside = [*value.items()]
        elif isinstance(value, list):
            inside = [*enumerate(value)]
        return [place, *(one for key, part in inside for one in places(part, (*place, key)))]

    count = 0
    for place in places(whole)[1:]:
        others: tuple[object, ...] = (None, -1.5, "?", True, [], [[]], {}, {"a": {}})
        for other in others:
            data = json.loads(json.dumps(whole))
            inside = data
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = other
            path.write_text(yaml.safe_dump(data))
            partial = partial_file(path, [])
            assert partial is not None
            assert partial.validated(path) is not None, (place, other)
            count += 1
    assert count > 300
