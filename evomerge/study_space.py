"""From the study file to the space that is searched, and the baselines in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

from evomerge.config import ChoicesSection, RangeSection, StudyFile
from evomerge.errors import InputError, ModelError, suggest
from evomerge.layout import Partition, parse_spec, partition, resolve_partition
from evomerge.merge.methods import METHODS, Method, Scope
from evomerge.models import Models
from evomerge.search.baselines import Anchored, Baseline, baselines, chosen_experts
from evomerge.space import Choices, Range, Space

#: Of many adapters so many are scored alone: what a generation of Evo-Merging costs.
_ALONE = 20
#: Searchers that only combine what is known.
MIXING = ("m2n2", "nested_map")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def method_of(file: StudyFile) -> Method:
    """Return the method that a study file names.

    Raises:
        InputError: no such method.
    """
    name = file.space.method
    if name not in METHODS:
        raise InputError(f"space.method: unknown {name!r}{suggest(name, METHODS)}")
    return METHODS[name]


def require_space(file: StudyFile, known: bool) -> None:
    """Refuse what is wrong with the space whoever the experts are.

    Args:
        file: the study file.
        known: the method is the user's.

    Raises:
        InputError: every problem.
    """
    problems = _form_problems(file)
    try:
        if known:
            method = method_of(file)
            problems += [*_partition_problem(file, method), *_option_problems(file, method)]
    except InputError as error:
        problems.insert(0, str(error))
    if problems:
        raise InputError("\n".join(problems))


def columns_of(file: StudyFile) -> dict[str, float | Range]:
    """Return the columns of the table: searched ranges and fixed numbers.

    Raises:
        InputError: every problem of the space that shows without the models.
    """
    problems = _form_problems(file)
    try:
        method = method_of(file)
    except InputError as error:
        raise InputError("\n".join([str(error), *problems])) from error
    experts = tuple(file.models.experts)
    problems += _experts_problem(method, len(experts))
    problems += _partition_problem(file, method)
    problems += _baseline_problems(file, method)
    given = {
        name: value
        for name, value in file.space.parameters.items()
        if name not in {option.name for option in method.options}
    }
    columns: dict[str, float | Range] = {}
    refused = False  # a range was given, with a problem of its own
    for parameter in method.parameters:
        per_expert = parameter.scope is Scope.EXPERT
        names = [f"{parameter.name}.{expert}" for expert in experts] if per_expert else []
        for column in names or [parameter.name]:
            key = column if column in given else parameter.name
            value = given.get(key)
            if value is None:
                # An essential number is searched, any other keeps its default.
                low, high = parameter.search
                columns[column] = (
                    Range(low, high) if parameter.default is None else parameter.default
                )
                continue
            try:
                columns[column] = _column_value(key, value, parameter.low, parameter.high)
            except InputError as error:
                problems.append(str(error))
                refused = refused or isinstance(value, RangeSection)
        given = {name: value for name, value in given.items() if name not in names}
        given.pop(parameter.name, None)
    known = [*columns, *(p.name for p in method.parameters), *(o.name for o in method.options)]
    known = list(dict.fromkeys(known))  # a parameter of the whole merge is a column too
    problems += [
        f"space.parameters.{name}: {method.name} has no such parameter{suggest(name, known)}"
        for name in given
    ]
    problems += _option_problems(file, method)
    searched = [*columns.values(), *file.space.parameters.values()]
    if not refused and not any(isinstance(value, Range | ChoicesSection) for value in searched):
        problems.append("space.parameters: nothing is searched (give at least one {low, high})")
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return columns


def _form_problems(file: StudyFile) -> list[str]:
    """Return what is wrong with the space whatever the method is."""
    problems = []
    try:
        parse_spec(file.space.partition)
    except InputError as error:
        problems.append(f"space.{error}")
    for name, value in file.space.parameters.items():
        if isinstance(value, RangeSection):
            try:
                _require_order(name, value)
            except InputError as error:
                problems.append(str(error))
    return problems


def _require_order(name: str, value: RangeSection) -> None:
    if not value.low < value.high:
        raise InputError(
            f"space.parameters.{name}: low {value.low:g} must be < high {value.high:g}"
        )
    if value.integer and not (value.low.is_integer() and value.high.is_integer()):
        raise InputError(
            f"space.parameters.{name}: integer: true needs whole numbers, got low {value.low:g} "
            f"and high {value.high:g}"
        )


def _experts_problem(method: Method, count: int) -> list[str]:
    low, high = method.experts
    if count < low or (high is not None and count > high):
        most = f"{low} to {high}" if low != high else f"{low}"
        limit = f"at least {low}" if high is None else most
        some = "expert" if limit == "1" else "experts"
        return [f"models.experts: {method.name} takes {limit} {some}, got {count}"]
    return []


def _partition_problem(file: StudyFile, method: Method) -> list[str]:
    if not method.adapters or file.space.partition.strip() == "model":
        return []
    return [
        f"space.partition: {method.name} has one weight and density per adapter, for the whole "
        f"model; got {file.space.partition} (write partition: model)"
    ]


def _baseline_problems(file: StudyFile, method: Method) -> list[str]:
    wanted, experts = file.baselines.experts, file.models.experts
    problems = [
        f"baselines.experts: no expert is named {name!r}{suggest(name, experts)}"
        for name in (wanted if isinstance(wanted, list) else ())
        if name not in experts
    ]
    if method.adapters:
        problems += [
            f"baselines.task_arithmetic: {scale:g}: {method.name} adds the square of each weight, "
            "which no scale below 0 is (leave it out)"
            for scale in file.baselines.task_arithmetic
            if scale < 0
        ]
    return problems


def _column_value(column: str, value: object, low: float, high: float) -> float | Range:
    where = f"space.parameters.{column}"
    if isinstance(value, RangeSection):
        _require_order(column, value)
        if value.low < low or value.high > high:
            raise InputError(f"{where}: must lie in [{low:g}, {high:g}]")
        return Range(value.low, value.high, value.integer)
    if isinstance(value, ChoicesSection):
        raise InputError(f"{where}: is a number; choices are for options (give {{low, high}})")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: expected a number or {{low, high}}, got {value!r}")
    if not low <= value <= high:
        raise InputError(f"{where}: must be in [{low:g}, {high:g}], got {value:g}")
    return float(value)


def _option_problems(file: StudyFile, method: Method) -> list[str]:
    problems = []
    for option in method.options:
        value = file.space.parameters.get(option.name, option.default)
        where = f"space.parameters.{option.name}"
        given: list[object] = [value]
        if isinstance(value, ChoicesSection):
            where, given = f"{where}.choices", list(value.choices)
            if len(set(given)) < len(given):
                problems.append(f"{where}: each value once, got {given}")
        for one in given:
            if one not in option.choices or isinstance(one, bool) != isinstance(
                option.default, bool
            ):
                choices = ", ".join(str(choice).lower() for choice in option.choices)
                problems.append(f"{where}: choose from {choices}, got {one!r}")
    return problems


def _options(file: StudyFile, method: Method) -> dict[str, str | bool | Choices]:
    """Return the method's options, checked before, completed by their defaults."""
    options: dict[str, str | bool | Choices] = {}
    for option in method.options:
        value = file.space.parameters.get(option.name, option.default)
        assert isinstance(value, str | bool | ChoicesSection)
        if isinstance(value, ChoicesSection):
            options[option.name] = Choices(tuple(value.choices))
        else:
            options[option.name] = value
    return options


def partition_of(
    file: StudyFile, models: Models, masses: Callable[[], Mapping[str, float]]
) -> Partition:
    """Return the partition in the form that recipes hold: it never needs the weights again."""
    try:
        spec = resolve_partition(file.space.partition, models.layout, masses)
        return partition(models.layout, spec)
    except ModelError:
        raise
    except InputError as error:
        raise InputError(f"space.{error}") from error


def space_of(
    file: StudyFile,
    models: Models,
    columns: dict[str, float | Range],
    masses: Callable[[], Mapping[str, float]],
) -> Space:
    """Return the space of a checked study file.

    Args:
        file: the study file.
        models: its models, open.
        columns: see ``columns_of``.
        masses: of the task vectors; asked where the partition needs them.

    Raises:
        InputError: the partition does not fit the models.
    """
    base, experts = models.refs
    method = method_of(file)
    dtype = _DTYPES[file.space.dtype] if file.space.dtype else models.dtype
    return Space(
        method=method.name,
        base=base,
        experts=experts,
        partition=partition_of(file, models, masses),
        layout=models.layout.digest,
        columns=columns,
        options=_options(file, method),
        seed=file.seed,
        dtype=dtype,
        twins=method.twins,
    )


def baselines_of(file: StudyFile, space: Space) -> tuple[Baseline, ...]:
    """Return what the search is compared with, as points of the space where it has them."""
    method = method_of(file)
    experts = tuple(file.models.experts)
    options = _options(file, method)
    values = [item.values if isinstance(item, Choices) else (item,) for item in options.values()]

    def anchor(weights: tuple[float, ...]) -> Anchored | None:
        # Of options that are searched, the first that the merge can be said with.
        for chosen in product(*values):
            found = dict(zip(options, chosen, strict=True))
            columns = _anchor_columns(method, experts, weights, found)
            if columns is not None and (
                method.adapters or space.encode(columns, found) is not None
            ):
                return columns, found
        return None

    return baselines(
        space, experts, anchor, file.baselines.task_arithmetic,
        scored_alone(file), method.adapters,
    )  # fmt: skip


def scored_alone(file: StudyFile) -> tuple[str, ...]:
    """Return the experts that are baselines."""
    wanted, experts = file.baselines.experts, tuple(file.models.experts)
    if wanted == "auto":
        method = METHODS.get(file.space.method)
        many = method is not None and method.adapters and file.search.searcher not in MIXING
        wanted = _ALONE if many else "all"
    return chosen_experts(experts, wanted)


def baseline_warnings(file: StudyFile) -> list[str]:
    """Return what it costs that some experts are not scored alone."""
    experts, chosen = tuple(file.models.experts), scored_alone(file)
    if len(chosen) == len(experts):
        return []
    if file.search.searcher in MIXING:
        return [
            f"baselines.experts: {file.search.searcher} mixes the baselines, and "
            f"{len(experts) - len(chosen)} of {len(experts)} experts are not among them alone "
            "(all gives it each of them)"
        ]
    if isinstance(file.baselines.experts, list):
        return []
    shown = ", ".join(chosen[:3]) + (", ..." if len(chosen) > 3 else "")
    return [
        f"baselines.experts: {len(chosen)} of {len(experts)} experts are scored alone, evenly "
        f"spaced in their order ({shown or 'none'}); the best one may be among the others (all, "
        "or names, to choose)"
    ]


def _anchor_columns(
    method: Method, experts: tuple[str, ...], weights: tuple[float, ...],
    options: Mapping[str, object],
) -> dict[str, float] | None:  # fmt: skip
    """Return the columns at which a method with these options is a given task arithmetic."""
    values = method.anchor(weights, options)
    if values is None:
        return None
    columns: dict[str, float] = {}
    for parameter in method.parameters:
        if parameter.name not in values:
            continue
        if parameter.scope is Scope.EXPERT:
            for expert, value in zip(experts, values[parameter.name], strict=True):
                columns[f"{parameter.name}.{expert}"] = value
        else:
            columns[parameter.name] = values[parameter.name][0]
    return columns
