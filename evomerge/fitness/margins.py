"""Which objectives can have margins, known before any model is."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.fitness.measures import CHOICE_METRICS, reference_text
from evomerge.fitness.tasks import Column, LoadedTask, Part


def ungraded(column: Column, tasks: Sequence[LoadedTask]) -> str:
    """Return why an objective has no margins; empty where each of its items has one.

    Multiple choice has them, and generated answers where every item has a reference answer that
    is text (then they must be asked for: see ``LmEvalTasks.load``).

    Args:
        column: where its scores come from.
        tasks: that the column names.
    """
    reasons = (_reason(part, tasks[part.task]) for part in column.parts)
    return next((reason for reason in reasons if reason), "")


def _reason(part: Part, loaded: LoadedTask) -> str:
    kind = loaded.task.OUTPUT_TYPE
    if part.perplexity:
        return f"{part.metric} is a perplexity"
    if kind == "multiple_choice":
        if part.metric not in CHOICE_METRICS:
            return f"{part.metric} does not say which choice was right"
        if not loaded.choices:
            return "code of its own judges its choices, or an item has no right or no wrong one"
        return ""
    if kind != "generate_until" or part.own:
        return f"{part.metric} of {kind} is graded by nothing"
    for index, doc in enumerate(loaded.docs):
        if not reference_text(loaded.task, doc):
            return f"item '{part.prefix}{index}' has no reference answer (doc_to_target as text)"
    return ""
