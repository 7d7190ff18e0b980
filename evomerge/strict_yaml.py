"""Read YAML from people without surprises.

PyYAML's safe loader still expands aliases, lets the last of two equal keys win, and reads
``1e-3`` as text, ``no`` as false and ``010`` as 8. Here those are errors or YAML 1.2 values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import StudyFileError

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 numbers and booleans, unique keys and no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.get_mark()
        if self.check_event(yaml.AliasEvent):
            raise _ProblemError(mark, "aliases are not supported")
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML lacks it
        tag = getattr(event, "tag", None)
        if tag is not None:
            problem = f"tag {tag!r} is not allowed (write the value without it)"
            raise _ProblemError(event.start_mark, problem)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > _MAX_DEPTH:
            raise _ProblemError(mark, f"nesting deeper than {_MAX_DEPTH}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _ProblemError(key_node.start_mark, f"key {key!r} must be text (quote it)")
            if key in seen:
                raise _ProblemError(
                    key_node.start_mark, f"{key}: duplicate key (first at line {seen[key]})"
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class _ProblemError(Exception):
    """A problem at a place of the file."""

    def __init__(self, mark: yaml.Mark, text: str) -> None:
        super().__init__(f"{mark.line + 1}:{mark.column + 1} {text}")


_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z|[-+]?\.inf\Z|\.nan\Z")
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", re.compile(r"(true|false)\Z"), "tf"),
    ("tag:yaml.org,2002:null", re.compile(r"(null|~|)\Z"), "n~\0"),
    ("tag:yaml.org,2002:int", _INT, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+0123456789."),
):
    for _char in _first:
        _Loader.yaml_implicit_resolvers.setdefault(_char if _char != "\0" else "", []).append(
            (_tag, _pattern)
        )


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value)  # decimal even with a leading zero, as in YAML 1.2
    except ValueError as error:  # Python's limit on the digits of a number
        digits = len(node.value)
        raise _ProblemError(node.start_mark, f"number of {digits} digits is too long") from error


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the one mapping in a YAML file.

    Raises:
        StudyFileError: anything that is not exactly that, with line and column.
    """
    where = str(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StudyFileError(where, [f"cannot be read: {error.strerror}"]) from error
    if len(raw) > _MAX_BYTES:
        raise StudyFileError(where, ["file larger than 1 MiB"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyFileError(where, [f"byte {error.start} is not valid UTF-8"]) from error
    return parse_mapping(text, where)


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """Return the one mapping in a YAML text; see ``read_mapping``."""
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
    except _ProblemError as problem:
        raise StudyFileError(where, [str(problem)]) from problem
    except yaml.MarkedYAMLError as error:
        raise StudyFileError(where, [_explain(error)]) from error
    except yaml.YAMLError as error:
        raise StudyFileError(where, [str(error).splitlines()[0]]) from error
    except (ValueError, OverflowError) as error:  # PyYAML on "\\UFFFFFFFF" and %YAML 99…9.1
        raise StudyFileError(where, [f"not valid YAML: {error}"]) from error
    if not documents or documents == [None]:
        raise StudyFileError(where, ["file is empty (see 'evomerge init')"])
    if len(documents) > 1:
        raise StudyFileError(where, [f"expected one YAML document, found {len(documents)}"])
    if not isinstance(documents[0], dict):
        kind = type(documents[0]).__name__
        raise StudyFileError(where, [f"top level must be a mapping, got {kind}"])
    return documents[0]


def _explain(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    place = f"{mark.line + 1}:{mark.column + 1} " if mark else ""
    problem = error.problem or "not valid YAML"
    if "could not determine a constructor for the tag" in problem:
        problem = problem.replace("could not determine a constructor for the tag", "tag")
        problem += " is not allowed"
    if "\\t" in problem:
        problem = "tabs are not allowed for indentation"
    return place + problem


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    char: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(char, []),
        *_Loader.yaml_implicit_resolvers.get(char, []),
    ]
    for char in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def dump(data: dict[str, Any]) -> str:
    """Return YAML text in the order of ``data``; ``parse_mapping`` restores it."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    assert isinstance(text, str)
    return text
