"""The study file: its schema, its defaults, and all its problems at once.

Only this module knows pydantic. Everything below takes plain arguments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    StrictBool,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from evomerge import strict_yaml
from evomerge.economy_sections import EstimatorSection, RacingSection, SearchItemsSection
from evomerge.errors import StudyFileError, suggest
from evomerge.expert_folder import list_experts
from evomerge.layout import PARTITIONS
from evomerge.objective_sections import GOALS, Goal, Section, TaskSection

#: Study names become directory, run and job names.
_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"
#: Expert names become column names such as ``weight.math``.
_EXPERT = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"


def _not_base(name: str) -> str:
    if name == "base":
        raise PydanticCustomError("base_name", "is the base's own name (choose another)")
    return name


Name = Annotated[str, StringConstraints(pattern=_NAME)]
ExpertName = Annotated[str, StringConstraints(pattern=_EXPERT), AfterValidator(_not_base)]


class ModelsSection(Section):
    """The models: what every merge starts from, and what is merged into it."""

    base: str = Field(min_length=1, description="directory or hub id (owner/name[@revision])")
    experts: dict[ExpertName, str] = Field(
        min_length=1,
        max_length=512,
        description="name: directory or hub id; order is kept. Names are letters, digits, '-' and "
        "'_', at most 63, starting with a letter or digit, and not `base`. Or the path of a folder "
        "that holds them: every subfolder is an expert of its name, in alphabetical order",
        json_schema_extra=lambda schema: schema.update(type=["object", "string"]),
    )


class RangeSection(Section):
    """A searched coefficient."""

    low: float
    high: float
    integer: bool = Field(False, description="search whole numbers only")


class ChoicesSection(Section):
    """A searched option of the method, one value for the whole merge."""

    choices: list[StrictBool | str] = Field(
        min_length=2, description="of the values that the option takes, at least two"
    )


class SpaceSection(Section):
    """What is searched."""

    method: str = Field("task_arithmetic", description="merge method; see `evomerge list methods`")
    partition: str = Field(
        "layer", description="which tensors share coefficients: " + ", ".join(PARTITIONS)
    )
    parameters: dict[str, RangeSection | ChoicesSection | float | int | bool | str] = Field(
        default_factory=dict,
        description="by the method's own names: {low, high} is searched, with `integer: true` in "
        "whole numbers; {choices: [...]} searches an option; a value is fixed; `weight.<expert>` "
        "overrides one expert",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the merged model, scored and exported; the base's where absent"
    )


class FitnessSection(Section):
    """What "good" means."""

    tasks: list[str | TaskSection] = Field(default_factory=list, max_length=64)
    objectives: list[Goal] = Field(
        default_factory=list, max_length=64, description="what is no lm-eval task, by `kind`"
    )
    include_path: list[str] | str = Field(
        default_factory=list, description="folders with your own task YAML files"
    )
    items: SearchItemsSection = SearchItemsSection()  # type: ignore[call-arg]
    estimator: EstimatorSection | Literal["auto", "none"] | None = Field(
        "auto",
        description="score few items of each trial and estimate the rest; auto: where it is known "
        "to pay, see docs/fitness.md; none (or null): score all search items",
    )
    batch_size: int = Field(
        64, ge=1, le=65536,
        description="prompts per forward pass of lm-eval's own code: in the command that repeats "
        "the scores, for encoder-decoders, and for unusual generation settings",
    )  # fmt: skip
    batch_tokens: int | None = Field(
        None, ge=64, le=1 << 24,
        description="tokens per forward pass; auto (or absent): found once by the free memory, and "
        "the same when the study is continued",
    )  # fmt: skip
    allow_task_code: bool = Field(False, description="let tasks run Python code")

    @field_validator("batch_tokens", mode="before")
    @classmethod
    def _found(cls, value: object) -> object:
        return None if value == "auto" else value

    @property
    def estimated(self) -> EstimatorSection | None:
        """The estimator that is named; None for none, and while ``auto`` is not decided."""
        return self.estimator if isinstance(self.estimator, EstimatorSection) else None

    @model_validator(mode="after")
    def _something(self) -> FitnessSection:
        if not self.tasks and not self.objectives:
            raise PydanticCustomError("no_objective", "needs an entry in tasks or in objectives")
        if self.estimated is not None and self.items.policy == "resampled":
            raise PydanticCustomError(
                "two_policies", "items.policy: resampled and an estimator exclude each other"
            )
        return self


class SearchSection(Section):
    """How the space is searched."""

    searcher: str = Field("auto", description="see `evomerge list searchers`")
    arguments: dict[str, bool | int | float | str] = Field(default_factory=dict)
    items: int | None = Field(
        None, ge=1,
        description="budget in item evaluations, over all objectives: what the trials of the "
        "search really cost (what is known is free); beside `trials`, or instead of it",
    )  # fmt: skip
    trials: int | None = Field(
        default_factory=lambda data: None if data.get("items") else 150,
        ge=1, le=1_000_000,
        description="beside the baselines; 150 where absent, no limit where `items` is given alone",
    )  # fmt: skip
    racing: RacingSection | None = Field(
        None,
        description="stop trials early that cannot reach the front (`{}` for the defaults), or "
        "halve generations: `{rule: halving, rungs: [10, 20, 50, 200], eta: 2}`",
    )
    parallel: int | None = Field(
        None, ge=1, le=4096, description="outstanding trials; twice the workers where absent"
    )
    order: Literal["ask", "completion"] = Field(
        "ask",
        description="in which the searcher is told of results; completion keeps workers busy where "
        "some trials take much longer than others, at the price that the search cannot be repeated",
    )
    finalists: int = Field(12, ge=1, le=1000, description="re-scored on the validation items")

    @model_validator(mode="after")
    def _bounded(self) -> SearchSection:
        if self.trials is None and self.items is None:
            raise PydanticCustomError("no_budget", "needs trials, items, or both")
        if self.racing and self.racing.rule == "halving" and self.order != "ask":
            raise PydanticCustomError("order", "racing.rule: halving needs order: ask")
        return self


class BaselinesSection(Section):
    """What the search is compared with, beside base and uniform average."""

    experts: Literal["auto", "all"] | Annotated[int, Field(ge=0)] | list[str] = Field(
        "auto",
        description="experts that are scored alone, each at the cost of one full evaluation: all, "
        "some by name, or at most so many, evenly spaced in their order; auto: all, but 20 of more "
        "that lora_factors merges, unless the searcher mixes baselines (m2n2, nested_map)",
    )
    task_arithmetic: list[float] = Field(
        default_factory=lambda: [0.3, 0.5, 0.7, 0.9, 1.1],
        max_length=100,
        description="scales at which all task vectors are added with one coefficient; with "
        "lora_factors each weight is the root of it, because it acts squared",
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _choice(cls, value: object) -> object:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        names = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not (number or names or value in ("auto", "all")):
            raise PydanticCustomError(
                "scored_alone", "must be auto, all, a list of names, or how many at most"
            )
        return value


class PoolSection(Section):
    """Where trials run."""

    kind: Literal["ray", "serial"] = "ray"
    workers: int = Field(2, ge=1, le=4096)
    cpus_per_worker: int = Field(1, ge=1, le=1024)
    gpus_per_worker: float = Field(0, ge=0, le=16)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    residency: Literal["auto", "device", "host", "disk"] = Field(
        "auto",
        description="where base and experts lie while merges are applied: on the device, in "
        "(pinned) memory of the machine, or memory-mapped on disk; auto takes what fits",
    )
    timeout: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="seconds per trial, then its worker is killed and the trial fails; auto: three "
        "times what trials take, and at least two minutes; null: no limit",
    )
    max_attempts: int = Field(3, ge=1, le=100, description="workers that one trial may kill")


class TrackingSection(Section):
    """Where MLflow records the study."""

    enabled: bool = True
    uri: str | None = Field(None, description="tracking URI; a local sqlite store where absent")
    experiment: str = Field("evomerge", min_length=1, max_length=200)
    log_model: Literal["none", "knee", "front"] = Field(
        "none",
        description="at the end log the recommended merge, or the whole front, as MLflow models: "
        "the directories of `evomerge export`, whole checkpoints, without a flavour",
    )


class StudyFile(Section):
    """One study: models, space, fitness, search."""

    name: Name | None = Field(
        None,
        description="lowercase letters, digits, '-' and '_', at most 63, starting with a letter or "
        "digit; the file's name where absent",
    )
    seed: int = Field(0, ge=0, le=4294967295)
    directory: str | None = Field(None, description="of journal and results; studies/<name>")
    models: ModelsSection
    space: SpaceSection = SpaceSection()  # type: ignore[call-arg]
    fitness: FitnessSection
    search: SearchSection = SearchSection()  # type: ignore[call-arg]
    baselines: BaselinesSection = BaselinesSection()  # type: ignore[call-arg]
    pool: PoolSection = PoolSection()  # type: ignore[call-arg]
    tracking: TrackingSection = TrackingSection()  # type: ignore[call-arg]

    def to_yaml(self) -> str:
        """Return the file with every default filled in."""
        return strict_yaml.dump(self.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of study files, for editors."""
    return StudyFile.model_json_schema()


def load(path: Path, overrides: Sequence[str] = ()) -> StudyFile:
    """Read a study file.

    Args:
        path: of the YAML file.
        overrides: ``dotted.key=value`` with the value in YAML.

    Raises:
        StudyFileError: every problem, with its dotted path.
    """
    data = read_data(path, overrides)
    problems = list_experts(data, path.resolve().parent)
    try:
        study = StudyFile.model_validate(data)
    except ValidationError as error:
        form = form_problems(error, data)
        if problems:  # a folder that cannot be used is still a text, which is the wrong type
            form = [line for line in form if not line.startswith("models.experts: ")]
        raise StudyFileError(str(path), [*problems, *form]) from error
    return named(study, path)


def load_place(path: Path, overrides: Sequence[str] = ()) -> StudyFile:
    """Read a study file for its name and directory: a folder of experts may be gone.

    Args:
        path: of the file.
        overrides: see ``load``.

    Raises:
        StudyFileError: every problem, with its dotted path.
    """
    data = read_data(path, overrides)
    models = data.get("models")
    if isinstance(models, dict) and isinstance(models.get("experts"), str):
        models["experts"] = {"expert": models["experts"]}
    try:
        return named(StudyFile.model_validate(data), path)
    except ValidationError as error:
        raise StudyFileError(str(path), form_problems(error, data)) from error


def named(study: StudyFile, path: Path) -> StudyFile:
    """Return a study with a name: its file's where it has none."""
    return study.model_copy(update={"name": study.name or _default_name(path)})


def read_data(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return what is written in a study file, overridden but not checked.

    Raises:
        StudyFileError: it is no mapping in YAML, or an override has no valid form.
    """
    data = strict_yaml.read_mapping(path)
    for override in overrides:
        _override(data, override)
    return data


def _default_name(path: Path) -> str:
    """Return a valid study name from a file's name (``study.yaml`` takes its folder's)."""
    stem = path.stem if path.stem != "study" else path.resolve().parent.name
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in stem.lower()).strip("-_")[:63]
    return name or "study"


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise StudyFileError("--set", [f"{override!r}: expected dotted.key=value"])
    value = strict_yaml.parse_mapping(f"value: {text}", "--set")["value"]
    *parents, leaf = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise StudyFileError("--set", [f"{key}: {parent} is not a mapping"])
    data[leaf] = value


def form_problems(error: ValidationError, data: dict[str, Any]) -> list[str]:
    """Return one line per problem: ``dotted.path: problem (remedy)``, each place once."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if in_other_form(item["loc"], data):
            continue
        kind = _kind_at(item["loc"])
        location = [
            part
            for place, part in enumerate(item["loc"])
            if not _is_union_branch(part) and place != kind
        ]
        path = _dotted(location)
        if item["type"] == "extra_forbidden":
            goal = GOALS[str(item["loc"][kind])] if kind and len(item["loc"]) == kind + 2 else None
            known = list(goal.model_fields) if goal else _keys_at(location[:-1])
            known = next((_FORMS[part] for part in item["loc"] if part in _FORMS), known)
            line = f"{path}: unknown key{suggest(str(location[-1]), known)}"
        elif item["type"] == "missing":
            line = f"{path}: is missing"
        elif item["type"] == "union_tag_not_found":
            line = f"{path}.kind: is missing{suggest('', GOALS)}"
        elif item["type"] == "union_tag_invalid":
            tag = str(item["ctx"]["tag"])
            line = f"{path}.kind: unknown {tag!r}{suggest(tag, GOALS)}"
        else:
            line = f"{path}: {_message(item)}"
        # A union reports each of its branches; the first line is the most useful one.
        if item["type"] == "empty_range":
            lines[path] = line
        lines.setdefault(path, line)
    # Where a mapping was given, what is wrong inside says more than "is not a number".
    outer = {
        path
        for path, line in lines.items()
        if line.endswith("got a mapping") and any(other.startswith(f"{path}.") for other in lines)
    }
    return [line for path, line in lines.items() if path not in outer]


#: Both forms of a searched parameter, and their keys.
_FORMS: dict[int | str, list[str]] = {
    section.__name__: list(section.model_fields) for section in (RangeSection, ChoicesSection)
}


def in_other_form(location: Sequence[int | str], data: dict[str, Any]) -> bool:
    """Return whether a problem is one of the form that a searched parameter was not given in."""
    form = next((part for part in location if part in _FORMS), None)
    if form is None:
        return False
    value: Any = data
    for part in location[: location.index(form)]:
        value = value[part]
    chosen = isinstance(value, dict) and "choices" in value
    return chosen != (form == "ChoicesSection")


def _kind_at(location: Sequence[int | str]) -> int | None:
    """Return where pydantic names the kind of an entry of ``fitness.objectives``, if it does."""
    inside = len(location) > 3 and location[:2] == ("fitness", "objectives")
    return 3 if inside else None


def _message(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Input ")
    if item["type"] == "string_pattern_mismatch":
        letters = "lowercase letters" if item["loc"] == ("name",) else "letters"
        message = (
            f"use {letters}, digits, '-' and '_' (at most 63, starting with a letter or digit)"
        )
    elif item["loc"][:2] == ("baselines", "experts") and item["type"] == "literal_error":
        message = "must be auto, all, how many of them (0 or more), or a list of their names"
    elif item["type"] in _NOT_A_MAPPING:
        message = _MAPPINGS.get(str(item.get("ctx", {}).get("class_name")), "must be a mapping")
    value = item.get("input")
    if item["type"] in _OF_SEVERAL_KEYS:
        return message
    if isinstance(value, str | int | float | bool) or value is None:
        hint = " (quote it)" if item["type"] == "string_type" and value is not None else ""
        return f"{message}, got {json.dumps(value)}{hint}"
    return f"{message}, got a {_KINDS.get(type(value), type(value).__name__)}"


#: Our own errors of a whole section: what was given there is no help.
_OF_SEVERAL_KEYS = (
    "no_objective", "empty_range", "two_policies", "no_budget", "per_trial", "rungs",
)  # fmt: skip
#: What pydantic says of them names its own classes.
_NOT_A_MAPPING = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
_MAPPINGS = {
    "RangeSection": "must be a number or {low, high}",
    "ChoicesSection": "must be a value or {choices: [...]}",
    "TaskSection": "must be the name of a task or a mapping",
    "EstimatorSection": "must be auto, none, or a mapping such as {name: soft_reg, items: 60}",
}
_KINDS: dict[type, str] = {dict: "mapping", list: "list"}


_BRANCHES = {
    "str", "int", "float", "bool", "RangeSection", "ChoicesSection", "TaskSection",
    "EstimatorSection", "[key]",
}  # fmt: skip
_BRANCH_KINDS = ("list[", "literal[", "constrained", "function-after[")


def _is_union_branch(part: int | str) -> bool:
    return isinstance(part, str) and (part in _BRANCHES or part.startswith(_BRANCH_KINDS))


def _dotted(location: Sequence[int | str]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".") or "study file"


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """Return the valid keys of the mapping at a location of the study file."""
    section: Any = StudyFile
    for part in location:
        if isinstance(part, int):
            continue
        fields: dict[str, FieldInfo] = getattr(section, "model_fields", {})
        if part in fields:
            section = _section_of(fields[part])
        elif section is None:
            return []
    return list(getattr(section, "model_fields", {}))


def _section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field holds, directly or inside a list, dict or union."""
    stack: list[Any] = [field.annotation]
    while stack:
        item = stack.pop()
        if isinstance(item, type) and issubclass(item, Section):
            return item
        stack.extend(getattr(item, "__args__", ()))
    return None
