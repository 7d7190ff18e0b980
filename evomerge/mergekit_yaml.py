"""Write a recipe as a mergekit configuration, where mergekit can express it exactly.

Written against mergekit 0.1.5 (``config.py``, ``plan.py``): a parameter is a number, or a list of
``{filter, value}`` of which the first whose filter is a substring of the tensor name counts.
Blocks become slices of one layer each, with filters inside. Tensors outside the layers take
the parameters of the first or the last slice, so their own values stand there as filters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from evomerge.errors import InputError
from evomerge.layout import Layout, partition
from evomerge.merge.methods import METHODS, Scope
from evomerge.recipe import Recipe

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: Methods that mergekit computes as we do, where the functions below do not refuse.
_SAME = {
    "linear", "task_arithmetic", "ties", "slerp", "nuslerp", "multislerp", "karcher",
    "model_stock", "passthrough", "sce", "arcee_fusion",
}  # fmt: skip

#: mergekit's arcee_fusion takes the quartiles of a random sample of larger tensors.
_SAMPLED = 1_000_000

Setting = float | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MergekitConfig:
    """A mergekit configuration, or the reason why there is none.

    Attributes:
        text: the YAML; None where mergekit cannot express the recipe.
        reason: why not; empty where ``text`` is given.
    """

    text: str | None
    reason: str = ""


class _InexpressibleError(Exception):
    """Carries the reason from where it is found."""


def mergekit_config(recipe: Recipe, layout: Layout, sources: Mapping[str, str]) -> MergekitConfig:
    """Return the recipe as mergekit YAML.

    Args:
        recipe: the merge.
        layout: the slots that its partition is about.
        sources: what to write for each model, by its name in the recipe: a hub id, or
            ``./directory`` (mergekit asks the hub about names that do not look like a path).
    """
    try:
        config = _config(recipe, layout, sources)
    except _InexpressibleError as error:
        return MergekitConfig(None, str(error))
    body = yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=100)
    adapters = any("+" in source for source in sources.values())
    return MergekitConfig(_HEADER + (_ADAPTERS if adapters else "") + body)


_HEADER = """\
# For mergekit 0.1.5 or newer:  mergekit-yaml mergekit_config.yml OUT
# Models that begin with ./ are directories: run it where they lie, or edit their paths.
"""
_ADAPTERS = """\
# Adapters stand behind a +: mergekit folds them into a folder of yours, --lora-merge-cache DIR.
"""


def _config(recipe: Recipe, layout: Layout, sources: Mapping[str, str]) -> dict[str, Any]:
    if recipe.method not in METHODS:
        raise _InexpressibleError(f"mergekit has no method {recipe.method!r}")
    if METHODS[recipe.method].adapters:
        raise _InexpressibleError(
            "mergekit merges weights; it has no sum of the factors of LoRA adapters"
        )
    if recipe.method not in _SAME:
        raise _InexpressibleError(f"mergekit's {recipe.method} differs, or it has none")
    _require_plain_names(sources, sources[recipe.base.name])
    if recipe.method == "ties":
        _require_plain_ties(recipe)
    if recipe.method == "sce":
        _require_plain_sce(recipe)
    if recipe.method == "arcee_fusion":
        _require_small(layout)
    models, base = _roles(recipe)
    tables = _geometry_tables(recipe, _values(recipe, layout))
    if recipe.method in _CONSTANTS:
        tables = _without_constants(recipe.method, tables)
    config: dict[str, Any] = {"merge_method": recipe.method}
    if base is not None:
        config["base_model"] = sources[base]
    if all(len(set(values.values())) == 1 for values in tables.values()):
        whole = _parameters(tables, models, list(next(iter(tables.values()), {})))
        config["models"] = [
            _entry({"model": sources[model]}, whole.per_model[model]) for model in models
        ]
        shared = whole.shared
    else:
        config["slices"] = _slices(layout, tables, models, sources)
        shared = {}
    method = METHODS[recipe.method]
    shared |= {
        option.name: recipe.option(option.name, option.default)
        for option in method.options
        if option.name in ("normalize", "normalize_weights")
    }
    shared |= _row_options(recipe)
    if shared:
        config["parameters"] = shared
    # Deltas and sums in float32 and one rounding at the end, as evomerge computes them.
    config["dtype"] = "float32"
    if recipe.method == "arcee_fusion":
        config["dtype"] = "float64"  # float32 is too coarse for its divergences, and changes masks
    if _DTYPES[recipe.dtype] != config["dtype"]:
        config["out_dtype"] = _DTYPES[recipe.dtype]
    return config


def _require_plain_names(sources: Mapping[str, str], base: str) -> None:
    """Refuse names in which mergekit would see an adapter or a revision that is none."""
    for source in sources.values():
        adapter = source.removeprefix(f"{base}+")
        for name in (source,) if adapter == source else (base, adapter):
            directory = name.startswith("./")
            if "+" in name or "/" not in name or (directory and "@" in name):
                raise _InexpressibleError(
                    f"mergekit takes what follows + or @ in {source} for an adapter or a revision"
                )


def _geometry_tables(
    recipe: Recipe, tables: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the tables without what mergekit's geometric methods do not take.

    Refuses values that they would need.
    """
    if recipe.method == "karcher":
        if recipe.option("with_base", False):
            raise _InexpressibleError("mergekit's karcher averages weights, not task vectors")
        shares = [tables.pop(name) for name in list(tables) if name.startswith("weight.")]
        if any(share != shares[0] for share in shares):
            raise _InexpressibleError("mergekit's karcher has no weights")
        if "max_iter" in tables:
            steps = tables["max_iter"].items()
            tables["max_iter"] = {name: int(value) for name, value in steps}
    if recipe.method == "model_stock":
        if any(value != 1.0 for value in tables.pop("lambda", {}).values()):
            raise _InexpressibleError("mergekit's model_stock has no lambda")
        if recipe.option("clamp", True):
            raise _InexpressibleError(
                "mergekit's model_stock steps away from task vectors that oppose (clamp: false)"
            )
    return tables


#: Parameters that mergekit has not, and the values that it has built in.
_CONSTANTS = {"sce": {"lambda": 1.0}, "arcee_fusion": {"weight": 1.0, "iqr_factor": 1.5}}


def _without_constants(
    method: str, tables: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Return the tables without parameters that mergekit has not.

    Refuses values other than those that it has built in.
    """
    rest = {}
    for column, values in tables.items():
        parameter = column.partition(".")[0]
        constant = _CONSTANTS[method].get(parameter)
        if constant is None:
            rest[column] = values
        elif any(value != constant for value in values.values()):
            raise _InexpressibleError(f"mergekit's {method} has {parameter} {constant} built in")
    return rest


def _require_plain_sce(recipe: Recipe) -> None:
    """Refuse flavours of SCE that mergekit has not."""
    if recipe.option("flavour", "mergekit") != "mergekit":
        raise _InexpressibleError("mergekit's sce merges only what it selects (flavour: mergekit)")
    if recipe.option("fallback", "zero") != "mergekit":
        raise _InexpressibleError(
            "mergekit's sce weighs experts the same where changes are small (fallback: mergekit)"
        )
    topk = recipe.column("select_topk") if "select_topk" in recipe.columns else ()
    if any(value not in (0.0, 1.0) for value in topk):
        raise _InexpressibleError(
            "mergekit breaks ties at the cut of select_topk by sort order, evomerge by a "
            "counter hash"
        )


def _require_small(layout: Layout) -> None:
    """Refuse tensors of which mergekit draws a sample."""
    for slot in layout.slots:
        if slot.size > _SAMPLED:
            raise _InexpressibleError(
                f"mergekit's arcee_fusion takes the quartiles of {slot.name} from a random sample "
                "of a million elements, evomerge from all"
            )


def _row_options(recipe: Recipe) -> dict[str, Any]:
    """Return the options that choose rows or columns, where they are chosen."""
    if recipe.method == "nuslerp" and recipe.option("nuslerp_row_wise", False):
        # mergekit looks at it only where it does not flatten.
        return {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    chosen = {"nuslerp": ("nuslerp_flatten", True), "model_stock": ("filter_wise", False)}
    if recipe.method not in chosen:
        return {}
    name, default = chosen[recipe.method]
    value = recipe.option(name, default)
    return {} if value == default else {name: value}


def _require_plain_ties(recipe: Recipe) -> None:
    """Refuse flavours of TIES that mergekit has not."""
    for name in recipe.columns:
        if name.startswith("density.") and any(value != 1.0 for value in recipe.column(name)):
            raise _InexpressibleError(
                "mergekit breaks ties at the density cut by sort order, evomerge by a counter hash"
            )
    if recipe.option("elect", "weighted") != "weighted":
        raise _InexpressibleError("mergekit's ties elects by the weighted sum only")
    if recipe.option("zero_sum", "drop") != "plus":
        raise _InexpressibleError("mergekit's ties counts a drawn election as plus")
    if recipe.option("normalize", True) and recipe.option("divisor", "weight") != "weight":
        raise _InexpressibleError("mergekit's ties divides by the sum of weights only")


def _roles(recipe: Recipe) -> tuple[list[str], str | None]:
    """Return the input models in mergekit's order, and which of them is its base."""
    experts = [expert.name for expert in recipe.experts]
    if recipe.method in ("linear", "karcher", "passthrough"):
        return experts, None  # a base would be one more input
    if recipe.method in ("nuslerp", "multislerp") and not recipe.option("with_base", True):
        return experts, None  # a base would turn weights into task vectors
    if recipe.method == "slerp" and len(experts) == 2:
        return experts, experts[0]
    return [recipe.base.name, *experts], recipe.base.name


def _values(recipe: Recipe, layout: Layout) -> dict[str, dict[str, float]]:
    """Return column → tensor name → value; aliases have the value of their slot."""
    try:
        blocks = partition(layout, recipe.partition)
    except InputError as error:
        raise _InexpressibleError(str(error)) from error
    if len(blocks.blocks) != len(recipe.table):
        raise _InexpressibleError("the recipe does not fit the layout")
    if len({span.slot for span in blocks.spans}) != len(blocks.spans):
        raise _InexpressibleError("mergekit has one value per tensor, this partition divides them")
    tables: dict[str, dict[str, float]] = {name: {} for name in recipe.columns}
    for span in blocks.spans:
        slot = layout.slots[span.slot]
        for index, column in enumerate(recipe.columns):
            for name in (slot.name, *slot.aliases):
                tables[column][name] = recipe.table[span.block][index]
    names = tuple(name for slot in layout.slots for name in (slot.name, *slot.aliases))
    for parameter in METHODS[recipe.method].parameters:
        if parameter.scope is Scope.EXPERT and parameter.default is not None:
            for expert in recipe.experts:  # mergekit has no default weight
                column = f"{parameter.name}.{expert.name}"
                tables.setdefault(column, dict.fromkeys(names, parameter.default))
    return tables


@dataclass(frozen=True, slots=True)
class _Parameters:
    per_model: dict[str, dict[str, Setting]]
    shared: dict[str, Any]


def _parameters(
    tables: Mapping[str, Mapping[str, float]], models: list[str], names: list[str]
) -> _Parameters:
    """Sort the columns into parameters of a model and parameters of the slice."""
    per_model: dict[str, dict[str, Setting]] = {model: {} for model in models}
    shared: dict[str, Any] = {}
    for column, values in tables.items():
        setting = _setting({name: values[name] for name in names})
        parameter, _, model = column.partition(".")
        if model:
            per_model[model][parameter] = setting
        else:
            shared[parameter] = setting
    return _Parameters(per_model, shared)


def _entry(entry: dict[str, Any], parameters: Mapping[str, Setting]) -> dict[str, Any]:
    return entry | ({"parameters": dict(parameters)} if parameters else {})


def _slices(
    layout: Layout,
    tables: Mapping[str, Mapping[str, float]],
    models: list[str],
    sources: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return one slice per layer."""
    inside: dict[int, list[str]] = {layer: [] for layer in layout.layers}
    outside: list[str] = []
    stems = set()
    for slot in layout.slots:
        if slot.layer is None:
            outside.extend((slot.name, *slot.aliases))
        else:
            inside[slot.layer].append(slot.name)
            stems.add(slot.name.split(f".{slot.layer}.", 1)[0])
    if len(stems) != 1 or layout.layers != tuple(range(len(layout.layers))):
        raise _InexpressibleError("mergekit cannot slice models with several stacks of layers")
    slices = []
    for layer in layout.layers:
        ends = outside if layer in (0, layout.layers[-1]) else []
        found = _parameters(tables, models, inside[layer] + ends)
        entries = [
            _entry(
                {"model": sources[model], "layer_range": [layer, layer + 1]},
                found.per_model[model],
            )
            for model in models
        ]
        slices.append(_entry({"sources": entries}, found.shared))
    return slices


def _setting(values: Mapping[str, float]) -> Setting:
    """Return a number, or filters that give each tensor name its value."""
    counts = Counter(values.values())
    if len(counts) == 1:
        return next(iter(counts))
    rest = counts.most_common(1)[0][0]
    setting: list[dict[str, Any]] = []
    for name, value in values.items():
        entry = {"filter": _filter(name, values), "value": value}
        if value != rest and entry not in setting:
            setting.append(entry)
    setting.append({"value": rest})
    for name, value in values.items():
        if _evaluated(name, setting) != value:
            raise _InexpressibleError(f"no substring tells {name} from the other tensors")
    return setting


def _filter(name: str, values: Mapping[str, float]) -> str:
    """Return the shortest piece of a tensor name that only tensors of the same value contain."""
    pieces = name.split(".")
    numbers = [index for index, piece in enumerate(pieces) if piece.isdigit()]
    tail = pieces[numbers[0] + 1 :] if numbers else pieces
    for piece in (tail[0] if numbers else name, ".".join(tail)):
        if all(value == values[name] for other, value in values.items() if piece in other):
            return piece
    return name


def _evaluated(name: str, setting: list[dict[str, Any]]) -> float:
    """Return the value that mergekit gives to a tensor."""
    for entry in setting:
        if "filter" not in entry or entry["filter"] in name:
            return float(entry["value"])
    raise AssertionError("a setting ends with a value for all")
