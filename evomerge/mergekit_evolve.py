"""Study files from mergekit-evolve's config files.

The same space, tasks and optimizer, as far as they exist here; what differs is said in the
file's first lines. mergekit-evolve (``mergekit/evo/config.py``, ``genome.py`` of 0.1.5): a weight
and, for ``ties`` and ``dare_ties``, a density per model and group of ``layer_granularity`` layers;
CMA-ES from equal weights with step 1/6; the weighted sum of the tasks' metrics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evomerge.errors import InputError
from evomerge.strict_yaml import dump, read_mapping

#: What mergekit-evolve searches for each method.
_SEARCHED = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
_GENOME = {
    "models", "merge_method", "base_model", "tokenizer_source", "layer_granularity", "normalize",
    "allow_negative_weights", "filters", "smooth",
}  # fmt: skip
_TOP = {
    "genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init", "apply_chat_template",
    "fewshot_as_multiturn",
}  # fmt: skip
#: Weights have no bounds there; the searches of its users stay within these.
_HIGH = 1.5
_LOWEST_DENSITY = 0.05


@dataclass(frozen=True, slots=True)
class Converted:
    """A study file and what it does otherwise.

    Attributes:
        text: the study file, the notes in its first lines.
        notes: what differs from mergekit-evolve, a sentence each.
    """

    text: str
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Reading:
    """The config while it is read."""

    source: str
    notes: list[str] = field(default_factory=list)

    def fail(self, key: str, expected: str) -> InputError:
        return InputError(f"{self.source}: {key}: {expected}")


def study_from_evolve(path: Path, trials: int = 100, include: Sequence[str] = ()) -> Converted:
    """Return the study file of a mergekit-evolve config.

    Args:
        path: of the config, YAML.
        trials: mergekit-evolve's ``--max-fevals``.
        include: folders with task files: mergekit-evolve's ``--task-search-path``.

    Raises:
        InputError: not such a config, or something in it has no counterpart; names the key.
    """
    config = read_mapping(path)
    read = _Reading(str(path))
    unknown = sorted(set(config) - _TOP)
    if unknown:
        raise read.fail(unknown[0], f"not a key of mergekit-evolve (known: {', '.join(_TOP)})")
    genome = config.get("genome")
    if not isinstance(genome, Mapping):
        raise read.fail("genome", "expected a mapping (is this a mergekit-evolve config?)")
    unknown = sorted(set(genome) - _GENOME)
    if unknown:
        raise read.fail(f"genome.{unknown[0]}", "not a key of mergekit-evolve")
    method = genome.get("merge_method")
    if method not in _SEARCHED:
        raise read.fail("genome.merge_method", f"expected one of {', '.join(_SEARCHED)}")
    base, experts = _models(read, genome, str(method))
    study = {
        "models": {"base": base, "experts": experts},
        "space": {
            "method": method,
            "partition": _partition(read, genome),
            "parameters": _parameters(read, genome, str(method)),
            "dtype": "bfloat16",
        },
        "fitness": {
            "tasks": _tasks(read, config),
            **({"include_path": list(include)} if include else {}),
            "items": _items(read, config),
        },
        "search": {
            "searcher": "cma",
            "arguments": {"sigma": round(1 / 6 / _width(genome, str(method)), 4)},
            "trials": trials,
        },
    }
    if config.get("apply_chat_template", True):
        read.notes.append("prompts are given as the tasks have them: no chat template is applied")
    if config.get("random_init"):
        read.notes.append("random_init: the search starts at the best of base, experts, averages")
    if genome.get("tokenizer_source") not in (None, "base"):
        read.notes.append("tokenizer_source: the base's tokenizer is kept")
    header = [f"# From {path.name} of mergekit-evolve.", *(f"# - {note}" for note in read.notes)]
    text = "\n".join(header) + "\n\n" + dump(study)
    return Converted(text, tuple(read.notes))


def _models(read: _Reading, genome: Mapping[str, Any], method: str) -> tuple[str, dict[str, str]]:
    models = genome.get("models")
    if not isinstance(models, Sequence) or isinstance(models, str) or not models:
        raise read.fail("genome.models", "expected a list of models")
    if not all(isinstance(model, str) for model in models):
        raise read.fail("genome.models", "expected paths or hub ids")
    base = genome.get("base_model")
    if base is None and method not in ("linear", "slerp"):
        raise read.fail("genome.base_model", f"{method} needs it")
    if base is None:
        base = models[0]
        read.notes.append(f"base: {base} (gives config and tokenizer; none was named)")
    if method == "slerp" and len(set(models) | {base}) != 2:
        raise read.fail("genome.models", "slerp needs two models, the base among them")
    kept = [model for model in models if model != base or method == "linear"]
    if len(kept) < len(models) and method != "slerp":
        read.notes.append(f"{base} is the base and no expert: its task vector is zero")
    if not kept:
        raise read.fail("genome.models", "expected a model beside the base")
    experts: dict[str, str] = {}
    for model in kept:
        whole, plus, adapter = model.partition("+")
        if plus and whole != base:
            raise read.fail("genome.models", f"{model}: an adapter of another model than the base")
        name = _name(adapter or model, experts)
        experts[name] = adapter or model
    return str(base), experts


def _name(source: str, taken: Mapping[str, str]) -> str:
    """Return a short name for a model that no other has."""
    last = re.sub(r"[^A-Za-z0-9_-]+", "-", source.rstrip("/").rpartition("/")[2]).strip("-_")
    stem = (last or "expert")[:50]
    if stem == "base":
        stem = "base-expert"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _partition(read: _Reading, genome: Mapping[str, Any]) -> str:
    size = genome.get("layer_granularity", 0)
    if not isinstance(size, int) or isinstance(size, bool):
        raise read.fail("genome.layer_granularity", f"expected a number of layers, got {size!r}")
    filters = genome.get("filters") or []
    if genome.get("smooth"):
        read.notes.append("smooth: groups of layers have values of their own, not interpolated")
    if not filters:
        return f"layers({size})" if size > 0 else "model"
    if not set(filters) <= {"self_attn", "mlp"}:
        raise read.fail(
            "genome.filters",
            f"{', '.join(map(str, filters))}: only self_attn and mlp have a counterpart "
            "(leave filters out, or use partition: tensor)",
        )
    shared = f", not of {size} layers together (layer_granularity)" if size != 1 else ""
    read.notes.append(
        f"filters: attention and MLP of each layer have values of their own{shared}: more "
        "coefficients than there"
    )
    return "module"


def _width(genome: Mapping[str, Any], method: str) -> float:
    """Return the width of the range of weights, or of t."""
    if method == "slerp":
        return 1.0
    return _HIGH * (2 if genome.get("allow_negative_weights") else 1)


def _parameters(read: _Reading, genome: Mapping[str, Any], method: str) -> dict[str, Any]:
    if method == "slerp":
        return {"t": {"low": 0.0, "high": 1.0}}
    low = -_HIGH if genome.get("allow_negative_weights") else 0.0
    found: dict[str, Any] = {"weight": {"low": low, "high": _HIGH}}
    read.notes.append(f"weights are searched from {low:g} to {_HIGH:g}; there they have no bounds")
    if "density" in _SEARCHED[method]:
        found["density"] = {"low": _LOWEST_DENSITY, "high": 1.0}
    normalize = genome.get("normalize")
    found["normalize"] = method != "task_arithmetic" if normalize is None else bool(normalize)
    return found


def _tasks(read: _Reading, config: Mapping[str, Any]) -> list[Any]:
    tasks = config.get("tasks")
    if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks:
        raise read.fail("tasks", "expected a list of lm-eval tasks")
    found = []
    for number, task in enumerate(tasks):
        entry = {"name": task} if isinstance(task, str) else task
        if not isinstance(entry, Mapping) or set(entry) - {"name", "weight", "metric"}:
            raise read.fail(f"tasks[{number}]", "expected a name, or name, weight and metric")
        if not isinstance(entry.get("name"), str):
            raise read.fail(f"tasks[{number}].name", "expected the name of an lm-eval task")
        metric, _, chosen = str(entry.get("metric", "acc,none")).partition(",")
        row: dict[str, Any] = {"task": entry["name"], "metric": metric}
        if chosen not in ("", "none"):
            row["filter"] = chosen
        if entry.get("weight", 1.0) != 1.0:
            row["weight"] = entry["weight"]
        if config.get("num_fewshot") is not None:
            row["num_fewshot"] = config["num_fewshot"]
        found.append(row)
    return found


def _items(read: _Reading, config: Mapping[str, Any]) -> dict[str, Any]:
    limit = config.get("limit")
    if limit is None:
        read.notes.append("a quarter of the items is for search, a quarter to choose, half to test")
        return {"search": 0.25, "validation": 0.25, "test": 0.5}
    read.notes.append("limit: that many items for search, and others to choose and to test")
    return {"search": limit, "validation": limit, "test": limit}
