"""Which numbers of an lm-eval task make an objective, and what identifies them."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.errors import TaskError
from evomerge.trial import Direction, Objective

#: Metrics that count right answers; the value is a share of the items.
_FRACTIONS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """One lm-eval task as an objective; a few words, picklable.

    Attributes:
        task: name that lm-eval knows, its own or from an include path.
        metric: name of the metric; None when only one of the task's metrics is a mean over items.
        filter: name of the task's filter; None when it has only one.
        name: of the objective; None for the task's name.
        num_fewshot: worked examples in the prompt; None for what the task says.
        weight: share in the scalar that single-objective searchers see.
    """

    task: str
    metric: str | None = None
    filter: str | None = None
    name: str | None = None
    num_fewshot: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A loaded task and everything that is asked of a model about it.

    Attributes:
        task: lm-eval's task object.
        docs: one per item [I].
        requests: lm-eval instances of each item [I][requests]; never handed out, only copied.
        fresh_docs: ``process_results`` is the task's own code and may change the doc.
    """

    task: Any
    docs: tuple[dict[str, Any], ...]
    requests: tuple[tuple[Any, ...], ...]
    fresh_docs: bool


@dataclass(frozen=True, slots=True)
class Column:
    """Where the score of one objective comes from: task number, metric and filter."""

    task: int
    metric: str
    filter: str


def choose(
    task: Any, number: int, spec: TaskSpec, mean: Callable[..., Any]
) -> tuple[Column, Objective]:
    """Return where an objective's score comes from, and the objective.

    Args:
        task: lm-eval's task object.
        number: of the task among the loaded ones.
        spec: what the user asked for.
        mean: lm-eval's plain mean over items; other aggregations cannot be had from item scores.

    Raises:
        TaskError: no such metric or filter, none or several to choose from, or not a mean.
    """
    aggregations = task.aggregation()
    means = [metric for metric, function in aggregations.items() if function is mean]
    if spec.metric is None and len(means) > 1:
        raise TaskError(f"metric: {spec.task!r} has the metrics {', '.join(means)}; choose one")
    if spec.metric is None and not means:
        raise TaskError(
            f"metric: {spec.task!r} has no metric that is the mean of item scores "
            f"(it has {', '.join(aggregations) or 'none'}); choose another task"
        )
    metric = spec.metric if spec.metric is not None else means[0]
    if metric not in aggregations:
        raise TaskError(
            f"metric: {metric!r} not produced by {spec.task!r} (has {', '.join(aggregations)})"
        )
    if metric not in means:
        how = getattr(aggregations[metric], "__name__", "its own function")
        raise TaskError(
            f"metric: {metric!r} of {spec.task!r} is computed by {how} over all items together, "
            f"not as the mean of item scores (choose from: {', '.join(means) or 'none'})"
        )
    filters = list(filters_of(task))
    if spec.filter is None and len(filters) > 1:
        raise TaskError(f"filter: {spec.task!r} has the filters {', '.join(filters)}; choose one")
    chosen = filters[0] if spec.filter is None else spec.filter
    if chosen not in filters:
        raise TaskError(f"filter: {chosen!r} not in {spec.task!r} (has {', '.join(filters)})")
    return Column(number, metric, chosen), _objective(task, metric, spec)


def _objective(task: Any, metric: str, spec: TaskSpec) -> Objective:
    """Return the objective of a task and metric."""
    higher = task.higher_is_better().get(metric)
    if higher is None:
        raise TaskError(
            f"metric: {spec.task!r} does not say whether more {metric!r} is better "
            "(add higher_is_better to its metric_list)"
        )
    if spec.name is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", spec.name):
        raise TaskError(f"name: {spec.name!r} may hold letters, digits, '_', '-' and '.' only")
    return Objective(
        # MLflow refuses other characters in the name of a metric.
        name=spec.name or re.sub(r"[^A-Za-z0-9_.-]", "_", spec.task),
        direction=Direction.MAXIMIZE if higher else Direction.MINIMIZE,
        unit="fraction" if metric in _FRACTIONS else metric,
        weight=spec.weight,
    )


def filters_of(task: Any) -> dict[str, Any]:
    """Return the filter pipelines of a task by name."""
    return {ensemble.name: ensemble for ensemble in task._filters}


def digest_of(version: str, tasks: Sequence[LoadedTask], columns: Sequence[Column]) -> str:
    """Return the identity of what is asked and how it is scored.

    Args:
        version: of lm-eval, which holds the code of the metrics and filters.
        tasks: with every document and prompt.
        columns: metric and filter of each objective.
    """
    digest = hashlib.blake2b(digest_size=16)

    def add(thing: Any) -> None:
        digest.update(json.dumps(thing, sort_keys=True, default=_plain).encode() + b"\n")

    add({"lm_eval": version})
    for task in tasks:
        config = task.task.dump_config()
        metadata = config.pop("metadata", None) or {}
        for key in ("dataset_path", "dataset_kwargs"):  # where it lies; the documents follow
            config.pop(key, None)
        add({**config, "version": metadata.get("version")})
        for doc, requests in zip(task.docs, task.requests, strict=True):
            add([doc, [request.arguments for request in requests]])
    for column in columns:
        add([column.task, column.metric, column.filter])
    return digest.hexdigest()


def _plain(thing: Any) -> str:
    """Return a text for what JSON cannot say, the same in every process."""
    if callable(thing):
        try:
            return inspect.getsource(thing)
        except (OSError, TypeError):
            return getattr(thing, "__qualname__", type(thing).__qualname__)
    return str(thing)
