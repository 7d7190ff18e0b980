"""Scoring the weights that a live model holds now, item by item."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from evomerge.errors import EvaluationError, TaskError
from evomerge.fitness.tasks import Column, LoadedTask, filters_of
from evomerge.trial import Objective, Score


class LmEvalFitness:
    """Scores the weights that a live model holds now."""

    def __init__(
        self,
        objectives: tuple[Objective, ...],
        columns: Sequence[Column],
        tasks: Sequence[LoadedTask],
        lm: Any,
        session: Callable[[int], AbstractContextManager[None]],
    ) -> None:
        self._objectives = objectives
        self._columns = columns
        self._tasks = tasks
        self._lm = lm
        self._session = session
        self._warned = False

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """One per score [m]."""
        return self._objectives

    def score(self, items: Sequence[Sequence[str]]) -> tuple[Score, ...]:
        """Score the model as it is now.

        Answers depend on the items and weights only, up to the last bits of a log-likelihood,
        which depend on the other prompts of a batch.

        Args:
            items: ids to score for each objective [m][I], I >= 1, each id once.

        Returns:
            one score per objective [m]: the mean of the item scores, and the sample standard
            deviation over the root of I (0.0 for a single item, which has none).

        Raises:
            TaskError: ids that the task does not have, or a metric that it does not return.
            EvaluationError: an answer of the model is not a number.
        """
        rows = self._rows(items)
        wanted: dict[int, set[int]] = {}
        for column, indices in zip(self._columns, rows, strict=True):
            wanted.setdefault(column.task, set()).update(indices)
        # lm-eval warns about cut prompts and the like at every call; once is enough.
        level = logging.ERROR if self._warned else logging.WARNING
        with self._session(level):
            answers = self._ask({task: sorted(indices) for task, indices in wanted.items()})
            scores = tuple(
                self._score(position, indices, answers) for position, indices in enumerate(rows)
            )
        self._warned = True
        return scores

    def _rows(self, items: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return the document indices of the asked ids [m][I]."""
        if len(items) != len(self._objectives):
            raise TaskError(
                f"items: expected one list per objective [m={len(self._objectives)}], "
                f"got {len(items)}"
            )
        rows = []
        for objective, column, ids in zip(self._objectives, self._columns, items, strict=True):
            index = {str(number): number for number in range(len(self._tasks[column.task].docs))}
            unknown = [name for name in ids if name not in index]
            if unknown:
                raise TaskError(
                    f"{objective.name}: item {unknown[0]!r} not in task "
                    f"(it has {len(index)} items, '0' to '{len(index) - 1}')"
                )
            if not ids or len(set(ids)) != len(ids):
                raise TaskError(
                    f"{objective.name}: expected item ids [I >= 1], each once, got {len(ids)} "
                    f"with {len(set(ids))} different"
                )
            rows.append([index[name] for name in ids])
        return rows

    def _ask(self, wanted: Mapping[int, Sequence[int]]) -> dict[int, dict[int, list[Any]]]:
        """Return answered copies of the requests: task number, document index, requests."""
        copies: dict[int, dict[int, list[Any]]] = {}
        by_kind: dict[str, list[Any]] = {}
        for number, indices in wanted.items():
            task = self._tasks[number]
            copies[number] = {
                index: [_blank(request) for request in task.requests[index]] for index in indices
            }
            for requests in copies[number].values():
                for request in requests:
                    by_kind.setdefault(request.request_type, []).append(request)
        # All tasks together, as lm-eval does it: fuller batches, and the same ones.
        for kind, requests in by_kind.items():
            repeated = [request for request in requests for _ in range(request.repeats or 1)]
            responses = getattr(self._lm, kind)(repeated, disable_tqdm=True)
            for request, response in zip(repeated, responses, strict=True):
                if kind != "generate_until":
                    _check_number(response, request.task_name, request.doc_id)
                request.resps.append(response)
        return copies

    def _score(
        self, position: int, indices: Sequence[int], answers: Mapping[int, dict[int, list[Any]]]
    ) -> Score:
        """Return the score of one objective from the answered requests."""
        column = self._columns[position]
        loaded = self._tasks[column.task]
        answered = answers[column.task]
        ensemble = filters_of(loaded.task)[column.filter]
        if any(column.filter not in request.filtered_resps for request in answered[indices[0]]):
            ensemble.apply([request for requests in answered.values() for request in requests])
        by_index = {}
        for index in sorted(indices):  # the order of the documents, so that sums are lm-eval's
            doc = loaded.docs[index]
            results = loaded.task.process_results(
                copy.deepcopy(doc) if loaded.fresh_docs else doc,
                [request.filtered_resps[column.filter] for request in answered[index]],
            )
            by_index[index] = self._value(results, column, position, index)
        values = list(by_index.values())
        mean = sum(values) / len(values)
        spread = sum((value - mean) ** 2 for value in values)
        n = len(values)
        return Score(
            value=mean,
            standard_error=math.sqrt(spread / (n - 1)) / math.sqrt(n) if n > 1 else 0.0,
            items=tuple(by_index[index] for index in indices),
        )

    def _value(
        self, results: Mapping[str, Any], column: Column, position: int, index: int
    ) -> float:
        """Return one item's score as a finite number."""
        name = self._objectives[position].name
        if column.metric not in results:
            raise TaskError(
                f"{name}: item '{index}': the task returned no {column.metric!r} "
                f"(it returned {', '.join(results) or 'nothing'})"
            )
        raw = results[column.metric]
        try:
            value = float(raw)
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"{name}: item '{index}': the score of {column.metric!r} is a "
                f"{type(raw).__name__}, not a number (choose another metric)"
            ) from error
        if not math.isfinite(value):
            raise EvaluationError(f"{name}: item '{index}': the score is {value}")
        return value


def _blank(request: Any) -> Any:
    """Return a copy of a request that has not been answered; lm-eval appends to its lists."""
    blank = copy.copy(request)
    blank.resps = []
    blank.filtered_resps = {}
    return blank


def _check_number(response: Any, task: str, index: int) -> None:
    """Refuse a log-likelihood that is not a number: comparing it would still pick an answer."""
    value = response[0] if isinstance(response, tuple) else response
    if math.isnan(value):
        raise EvaluationError(f"{task}: item '{index}': the model's log-likelihood is nan")
