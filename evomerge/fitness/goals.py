"""Objectives that are no lm-eval tasks: the entries of ``fitness.objectives``.

Known here without any model: names, items, digests. What they cost a model is in
``text_scores`` and ``python_scores``.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import InputError, TaskError, suggest
from evomerge.fitness.aggregate import Aggregate
from evomerge.fitness.composite import Composite
from evomerge.fitness.lm_eval import LmEvalTasks
from evomerge.fitness.protocol import NOTHING, Fitness, Live, Scorer
from evomerge.fitness.tasks import TaskSpec
from evomerge.trial import Objective, Score

#: What each kind is, for tables.
KINDS: Mapping[str, str] = {
    "python": "item scores from a function of yours: score(model, tokenizer, items)",
    "kl": "mean KL divergence per token from the base or an expert, on calibration text",
    "entropy": "mean entropy of the predictions on unlabeled text (AdaMerging's proxy)",
    "distance": "distance from the base: of the coefficients (l1) or of the weights (l2)",
    "alignment": "distance of hidden states and logits from those of an expert, on its "
    "calibration text (Expert Merging's proxy)",
}


@dataclass(frozen=True, slots=True)
class PythonSpec:
    """A function of the user's.

    Attributes:
        objective: that it gives.
        function: ``file.py:name``; the file is relative to the study file.
        items: JSON lines, one item per line; relative to the study file.
    """

    objective: Objective
    function: str
    items: str


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Something about a model's predictions on text.

    Attributes:
        objective: that it gives.
        kind: what is computed.
        text: one text per line, or JSON lines; relative to the study file.
        field: of the text in JSON lines.
        tokens: of a text that are read, at most.
        of: ``base`` or the name of an expert; empty for entropy.
        top: the reference's likeliest tokens that are kept at each place; all others count as
            one token. 0 keeps all.
        hidden: how hidden states are compared; only for alignment.
    """

    objective: Objective
    kind: Literal["kl", "entropy", "alignment"]
    text: str
    field: str = "text"
    tokens: int = 256
    of: str = ""
    top: int = 128
    hidden: Literal["cosine", "mse"] = "cosine"


@dataclass(frozen=True, slots=True)
class DistanceSpec:
    """How far a merge is from the base.

    Attributes:
        objective: that it gives.
        norm: ``l1`` of the coefficients or ``l2`` of the change of the weights.
    """

    objective: Objective
    norm: Literal["l1", "l2"]


GoalSpec = PythonSpec | TextSpec | DistanceSpec


def load_fitness(
    tasks: Sequence[TaskSpec], goals: Sequence[GoalSpec], folders: Sequence[Path],
    root: Path, allow_task_code: bool, models: Collection[str], margins: bool = False,
) -> Composite:  # fmt: skip
    """Load tasks and other objectives as one fitness, without any model.

    Args:
        tasks: come first.
        goals: come after them.
        folders: with task files.
        root: folder that relative paths start from.
        allow_task_code: let task files run Python.
        models: ``base`` and the names of the experts.
        margins: of generated answers too; see ``LmEvalTasks.load``.

    Raises:
        InputError: every problem, by its place in the study file.
    """
    parts: list[Fitness] = []
    problems: list[str] = []
    try:
        if tasks:
            parts.append(LmEvalTasks.load(tasks, folders, root, allow_task_code, margins=margins))
    except InputError as error:
        problems += str(error).splitlines()
    try:
        if goals:
            parts += load_goals(goals, root, models)
        whole = Composite(parts)
    except InputError as error:
        problems += str(error).splitlines()
    if problems:
        raise InputError("\n".join(f"fitness.{line}" for line in problems))
    return whole


def load_goals(specs: Sequence[GoalSpec], root: Path, models: Collection[str]) -> list[Fitness]:
    """Read the items of some objectives; no model, no code of the user's is run.

    Args:
        specs: one per objective.
        root: folder that relative paths start from.
        models: ``base`` and the names of the experts.

    Raises:
        TaskError: one line per problem.
    """
    problems: list[str] = []
    parts: list[Fitness] = []
    for number, spec in enumerate(specs):
        try:
            parts.append(_goal(spec, root, models))
        except TaskError as error:
            problems += [f"objectives[{number}].{line}" for line in str(error).splitlines()]
    if problems:
        raise TaskError("\n".join(problems))
    return _joined(parts)


def _goal(spec: GoalSpec, root: Path, models: Collection[str]) -> Fitness:
    if isinstance(spec, PythonSpec):
        return _python(spec, root)
    if isinstance(spec, DistanceSpec):
        return DistanceGoal(spec)
    if spec.of and spec.of not in models:
        raise TaskError(f"of: no model is named {spec.of!r}{suggest(spec.of, models)}")
    return TextGoals((spec,), read_texts(root / spec.text, spec.field))


def _joined(parts: Sequence[Fitness]) -> list[Fitness]:
    """Put neighbours that read the same text together, so that the model reads it once."""
    joined: list[Fitness] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, TextGoals) and isinstance(last, TextGoals) and last.reads == part.reads:
            joined[-1] = replace(last, specs=(*last.specs, *part.specs))
        else:
            joined.append(part)
    return joined


def read_texts(path: Path, field: str) -> tuple[str, ...]:
    """Return the texts of a file: one per line, or one per JSON line.

    Raises:
        TaskError: missing, empty, or a line without the field.
    """
    if path.suffix != ".jsonl":
        texts = tuple(line for line in _read(path, "text").splitlines() if line.strip())
        if not texts:
            raise TaskError(f"text: {path} has no text")
        return texts
    items = read_items(path, "text")
    texts = tuple(item.get(field, "") if isinstance(item, dict) else "" for item in items)
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise TaskError(f"field: item {number} of {path} has no text in {field!r}")
    return texts


def read_items(path: Path, key: str) -> tuple[Any, ...]:
    """Return the items of a file of JSON lines.

    Args:
        path: of the file.
        key: of the study file that names it.

    Raises:
        TaskError: missing, empty, or a line is no JSON.
    """
    items = []
    for number, line in enumerate(_read(path, key).splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except ValueError as error:
            raise TaskError(f"{key}: {path}, line {number} is not JSON: {error}") from error
    if not items:
        raise TaskError(f"{key}: {path} has no items")
    return tuple(items)


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise TaskError(f"{key}: {path}: {reason}") from error


def _python(spec: PythonSpec, root: Path) -> PythonGoal:
    """Return a Python objective, its file parsed but not run."""
    name, colon, function = spec.function.rpartition(":")
    if not colon or not name.endswith(".py") or not function.isidentifier():
        raise TaskError(
            f"function: expected file.py:name such as fitness/mine.py:score, got {spec.function!r}"
        )
    path = root / name
    code = _read(path, "function")
    try:
        tree = ast.parse(code, str(path))
    except SyntaxError as error:
        raise TaskError(f"function: {path}:{error.lineno}: {error.msg}") from error
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in names:
        raise TaskError(
            f"function: {path} defines no {function!r} (it defines {', '.join(names) or 'none'})"
        )
    return PythonGoal(spec, path, function, code, read_items(root / spec.items, "items"))


def _digest(*things: Any) -> str:
    text = json.dumps(things, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


@dataclass(frozen=True, slots=True)
class PythonGoal:
    """An objective whose item scores come from a function of the user's."""

    spec: PythonSpec
    path: Path
    function: str
    code: str
    items: tuple[Any, ...]

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The one objective."""
        return (self.spec.objective,)

    @property
    def item_ids(self) -> tuple[tuple[str, ...], ...]:
        """Numbers of the lines of the file with the items, empty ones not counted."""
        return (_numbers(len(self.items)),)

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """The mean."""
        return (Aggregate(),)

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The file with the items."""
        return (self.spec.items,)

    @property
    def ungraded(self) -> tuple[str, ...]:
        """A function returns item scores and nothing else."""
        return ("it is a Python function",)

    @property
    def digest(self) -> str:
        """Identity: the code of the file, and the items."""
        return _digest("python", self.function, self.code, self.items)

    def attach(self, live: Live) -> Scorer:
        """Return what calls the function."""
        from evomerge.fitness.python_scores import PythonScores

        return PythonScores(self.path, self.function, self.items, live, self.spec.objective)


@dataclass(frozen=True, slots=True)
class TextGoals:
    """Objectives on the predictions for one set of texts.

    Attributes:
        specs: of one file, field and length.
        texts: one per item [I].
    """

    specs: tuple[TextSpec, ...]
    texts: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, str, int]:
        """What the model is given to read."""
        return (self.specs[0].text, self.specs[0].field, self.specs[0].tokens)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """[m]."""
        return tuple(spec.objective for spec in self.specs)

    @property
    def item_ids(self) -> tuple[tuple[str, ...], ...]:
        """Numbers of the texts [m][I]."""
        return (_numbers(len(self.texts)),) * len(self.specs)

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """Means [m]: every text counts the same."""
        return (Aggregate(),) * len(self.specs)

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The file with the texts [m]."""
        return (self.specs[0].text,) * len(self.specs)

    @property
    def ungraded(self) -> tuple[str, ...]:
        """Nothing on plain text is right or wrong [m]."""
        return ("it is measured on plain text",) * len(self.specs)

    @property
    def digest(self) -> str:
        """Identity: what is computed, and the texts."""
        settings = [
            [one.kind, one.tokens, one.of, one.top if one.of else None]
            + ([one.hidden] if one.kind == "alignment" else [])
            for one in self.specs
        ]
        return _digest("text", settings, self.texts)

    def attach(self, live: Live) -> Scorer:
        """Return what reads the texts; the references' predictions are computed now."""
        from evomerge.fitness.text_scores import TextScores

        return TextScores(self.specs, self.texts, live)


@dataclass(frozen=True, slots=True)
class DistanceGoal:
    """How far a merge is from the base."""

    spec: DistanceSpec

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The one objective."""
        return (self.spec.objective,)

    @property
    def item_ids(self) -> tuple[tuple[str, ...], ...]:
        """The model is the one item."""
        return (("0",),)

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """The value itself."""
        return (Aggregate(),)

    @property
    def sources(self) -> tuple[str | None, ...]:
        """Nothing is drawn."""
        return (None,)

    @property
    def ungraded(self) -> tuple[str, ...]:
        """It has no items."""
        return ("it is a property of the weights",)

    @property
    def digest(self) -> str:
        """Identity: the norm."""
        return _digest("distance", self.spec.norm)

    def attach(self, live: Live) -> Scorer:
        """Return what measures it."""
        return _Distance(self.spec.norm, live)


class _Distance:
    """Measures one distance; exact, so that it has no standard error."""

    def __init__(self, norm: str, live: Live) -> None:
        self._norm = norm
        self._live = live

    def score(self, items: Sequence[Sequence[str]]) -> tuple[Score, ...]:
        """Return the distance of the model as it is now."""
        (ids,) = items
        if not ids:
            return (NOTHING,)
        if list(ids) != ["0"]:
            raise TaskError(f"items: a distance has the one item '0', got {items!r}")
        value = self._live.distance(self._norm)
        return (Score(value, 0.0, (value,)),)

    def facts(self) -> Mapping[str, str]:
        """Return nothing: it is the same everywhere."""
        return {}
