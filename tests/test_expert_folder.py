"""A folder of experts that cannot be used: what is said of it, and what it must not hide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evomerge.config import load, load_place
from evomerge.errors import StudyFileError
from evomerge.expert_folder import experts_in
from evomerge.study_location import directory_of

REST = "fitness: {objectives: [{kind: distance}]}\n"


def problems(path: Path, text: str, *overrides: str) -> tuple[str, ...]:
    path.write_text(text)
    with pytest.raises(StudyFileError) as caught:
        load(path, overrides)
    return caught.value.problems


def model(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_a_wrong_folder_hid_what_else_is_wrong_in_form(tmp_path: Path) -> None:
    found = problems(
        tmp_path / "study.yaml",
        f"models: {{base: 3, experts: nowhere}}\nsearch: {{trials: many}}\nserach: 1\n{REST}",
    )
    assert [line.partition(": ")[0] for line in found] == [
        "models.experts", "models.base", "search.trials", "serach",
    ]  # fmt: skip
    assert found[0].startswith("models.experts: no such folder: nowhere (")


@pytest.mark.parametrize(
    ("folder", "start"),
    [
        ("~nobody-of-this-name/x", "cannot be read: Could not determine home directory ("),
        ("a" * 300, "cannot be read: File name too long ("),
    ],
)
def test_a_path_that_no_folder_can_have_was_a_crash(
    tmp_path: Path, folder: str, start: str
) -> None:
    [line] = problems(tmp_path / "study.yaml", f"models: {{base: b, experts: {folder}}}\n{REST}")
    assert line.startswith(f"models.experts: {folder}: {start}")


def test_an_empty_path_was_the_study_files_own_folder(tmp_path: Path) -> None:
    """And its experts were looked for at the root of the disk."""
    model(tmp_path / "math")
    [line] = problems(tmp_path / "study.yaml", f"models: {{base: b, experts: ''}}\n{REST}")
    assert line.startswith("models.experts: no such folder: '' (")


def test_a_folder_without_models_was_one_line_per_subfolder(tmp_path: Path) -> None:
    for name in ("data", "docs", "tests"):
        (tmp_path / "pool" / name).mkdir(parents=True)
    text = f"models: {{base: b, experts: pool/}}\n{REST}"
    [line] = problems(tmp_path / "study.yaml", text)
    assert line.startswith("models.experts: no subfolder of pool/ is a model, such as pool/data: ")
    model(tmp_path / "pool" / "math")
    found = problems(tmp_path / "study.yaml", text)
    assert [line.split()[1] for line in found] == ["pool/data", "pool/docs", "pool/tests"]


def test_a_link_to_nowhere_is_no_file_that_is_passed_over(tmp_path: Path) -> None:
    """Its model was missing from the study, and nothing said so."""
    model(tmp_path / "pool" / "one")
    (tmp_path / "pool" / "two").symlink_to(tmp_path / "moved")
    found, wrong = experts_in("pool", tmp_path)
    assert list(found) == ["one"]
    assert len(wrong) == 1
    assert "pool/two is no model" in wrong[0]
    model(tmp_path / "moved")
    assert experts_in("pool", tmp_path)[1] == []


def test_a_study_can_be_looked_at_when_its_folder_of_experts_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"name: mine\nmodels: {{base: b, experts: nowhere}}\n{REST}")
    assert directory_of(str(path)) == tmp_path / "studies" / "mine"
    assert directory_of(str(path), ("directory=out",)) == tmp_path / "out"
    path.write_text(f"name: mine\nmodels: {{base: b, experts: nowhere, x: 1}}\n{REST}")
    with pytest.raises(StudyFileError, match=r"models\.x: unknown key"):
        load_place(path)


def test_a_folder_may_come_from_the_command_line(tmp_path: Path) -> None:
    model(tmp_path / "pool" / "math")
    (tmp_path / "linked").symlink_to(tmp_path / "pool")
    path = tmp_path / "study.yaml"
    path.write_text(f"models: {{base: b, experts: nowhere}}\n{REST}")
    assert load(path, ["models.experts=linked"]).models.experts == {"math": "linked/math"}
    given = json.dumps({"code": "models/code"})
    assert load(path, [f"models.experts={given}"]).models.experts == {"code": "models/code"}


@pytest.mark.parametrize("value", ["foo", "-1", "2.5", "[1]", "{a: 1}", "true", "null"])
def test_what_may_be_scored_alone_was_said_to_be_auto_or_all(tmp_path: Path, value: str) -> None:
    """Also to those who gave a number or names; a list of wrong ones was two problems."""
    model(tmp_path / "pool" / "math")
    text = f"models: {{base: b, experts: pool}}\nbaselines: {{experts: {value}}}\n{REST}"
    [line] = problems(tmp_path / "study.yaml", text)
    start = "baselines.experts: must be auto, all, a list of names, or how many at most, got "
    assert line.startswith(start)


@pytest.mark.parametrize("value", ["auto", "all", "0", "3", "[]", "[math]"])
def test_what_may_be_scored_alone(tmp_path: Path, value: str) -> None:
    model(tmp_path / "pool" / "math")
    path = tmp_path / "study.yaml"
    text = f"models: {{base: b, experts: pool}}\nbaselines: {{experts: {value}}}\n{REST}"
    path.write_text(text)
    assert str(load(path).baselines.experts).replace("'", "") == value
