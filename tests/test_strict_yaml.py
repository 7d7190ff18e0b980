"""YAML from people: the YAML 1.2 values, and one clear line for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import StudyFileError
from evomerge.strict_yaml import dump, parse_mapping, read_mapping


def test_scalars_are_yaml_1_2() -> None:
    text = "a: 1e-3\nb: no\nc: 010\nd: 12:30:45\ne: 1.10\nf: true\ng:\nh: .inf\ni: -4\n"
    text += "j: '5'\nk: +1."
    assert parse_mapping(text, "f") == {
        "a": 0.001, "b": "no", "c": 10, "d": "12:30:45", "e": 1.1, "f": True, "g": None,
        "h": float("inf"), "i": -4, "j": "5", "k": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "file is empty (see 'evomerge init')"),
        ("# only a comment\n", "file is empty (see 'evomerge init')"),
        ("- 1", "top level must be a mapping, got list"),
        ("a: &x 1\nb: *x", "2:3 aliases are not supported"),
        ("a: 1\nb: 2\na: 3", "3:1 a: duplicate key (first at line 1)"),
        ("a:\n  b: 1\n  b: 2", "3:3 b: duplicate key (first at line 2)"),
        (
            "a: !!python/object/apply:os.system [x]",
            "1:4 tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed "
            "(write the value without it)",
        ),
        *(
            (
                f"a: {tag} {value}",
                f"1:4 tag 'tag:yaml.org,2002:{tag[2:]}' is not allowed "
                "(write the value without it)",
            )
            for tag, value in (
                ("!!int", '"abc"'),
                ("!!timestamp", "x"),
                ("!!float", "x"),
                ("!!bool", "x"),
                ("!!binary", "é"),
                ("!!omap", "3"),
                ("!!str", "5"),
                ("!!map", "{}"),
            )
        ),
        (
            "!!int x: 1",
            "1:1 tag 'tag:yaml.org,2002:int' is not allowed (write the value without it)",
        ),
        ("a: ! 5", "1:4 tag '!' is not allowed (write the value without it)"),
        ("a: [1, " + "9" * 5000 + "]", "1:8 number of 5000 digits is too long"),
        ('a: "\\UFFFFFFFF"', "not valid YAML: Python int too large to convert to C int"),
        ("a:\n\tb: 1", "2:1 tabs are not allowed for indentation"),
        ("a: 1\n---\nb: 2", "expected one YAML document, found 2"),
        ("a: [1", "1:6 expected ',' or ']', but got '<stream end>'"),
        ("1: 2", "1:1 key 1 must be text (quote it)"),
    ],
)
def test_one_line_with_the_place(text: str, problem: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        parse_mapping(text, "study.yaml")
    assert caught.value.problems == (problem,)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(StudyFileError, match="nesting deeper than 32"):
        parse_mapping("a: " + "[" * 3000, "f")


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    with pytest.raises(StudyFileError, match="cannot be read: No such file"):
        read_mapping(path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(StudyFileError, match="byte 3 is not valid UTF-8"):
        read_mapping(path)
    path.write_bytes(b"a: 1 # " + b"x" * (1 << 20))
    with pytest.raises(StudyFileError, match="larger than 1 MiB"):
        read_mapping(path)


def test_dump_is_read_back() -> None:
    data = {"b": 1, "a": [1.5, "no", None, True], "c": {"x": "1e-3", "y": 1e-7}}
    assert parse_mapping(dump(data), "f") == data
