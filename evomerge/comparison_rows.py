"""A comparison of trials as rows of a table, in words, and as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomerge.item_comparison import Comparison, Pairing
from evomerge.paired_tests import LEVEL

#: Titles of ``comparison_rows``.
COMPARISON_HEADER = (
    "against", "objective", "items", "first", "other", "difference", "95 % interval",
    "better/worse", "p (Holm)",
)  # fmt: skip


def comparison_rows(found: Comparison) -> list[tuple[str, ...]]:
    """Return one row of texts per pairing, under ``COMPARISON_HEADER``."""
    rows: list[tuple[str, ...]] = []
    for one in found.pairings:
        error = "" if one.standard_error is None else f" ± {one.standard_error:.3f}"
        ends = "–" if one.interval is None else f"{one.interval[0]:+.3f} to {one.interval[1]:+.3f}"
        rows.append(
            (
                found.names[one.theirs], one.objective or "mean", f"{one.items:,} {one.split}",
                f"{one.values[0]:.3f}", f"{one.values[1]:.3f}", f"{one.difference:+.3f}{error}",
                ends, f"{one.better}/{one.worse}", _p_text(one),
            )
        )  # fmt: skip
    return rows


def overview_rows(found: Comparison) -> list[tuple[str, ...]]:
    """Return the rows of the means; all rows where objectives have no mean."""
    pairs = list(zip(comparison_rows(found), found.pairings, strict=True))
    means = [row for row, one in pairs if not one.objective]
    return means or [row for row, _ in pairs]


def _p_text(one: Pairing) -> str:
    if one.adjusted is None:
        return "–"
    mark = " *" if one.clear else ""
    return (f"{one.adjusted:.3f}" if one.adjusted >= 0.0005 else "<0.001") + mark


def comparison_note(found: Comparison) -> str:
    """Return what the table's columns are, and where its items flatter the front."""
    tests = sorted({one.test for one in found.pairings if one.p is not None})
    names = {"mcnemar": "McNemar's exact test where all scores are 0 or 1", "t": "Student's t"}
    tested = ", else ".join(names[test] for test in tests) or "nothing could be tested"
    count = sum(one.p is not None for one in found.pairings)
    corrected = f", corrected for {count} tests (Holm)" if count > 1 else ""
    known = {"search": "the search was led by", "validation": "the front was chosen by"}
    used = {one.split for one in found.pairings}
    flattering = "".join(
        f" {split.capitalize()} items flatter the front: {why} them."
        for split, why in known.items()
        if split in used
    )
    return (
        f"Positive differences: {found.names[found.first]} is better. ± is the standard error of "
        f"paired items, the interval a paired bootstrap's. p: {tested}{corrected}; * is below 0.05."
        f"{flattering}"
    )


def comparison_facts(
    found: Comparison, items: int, texts: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    """Return a comparison as data.

    Args:
        found: the comparison.
        items: how many changed items to list per objective.
        texts: what is asked, by objective and item; may be empty.
    """
    return {
        "first": {"trial": found.first, "name": found.names[found.first]},
        "level": LEVEL,
        "correction": "holm",
        "pairs": [_pairing_facts(found, one, items, texts) for one in found.pairings],
    }


def _pairing_facts(
    found: Comparison, one: Pairing, items: int, texts: Mapping[tuple[str, str], str]
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "against": {"trial": one.theirs, "name": found.names[one.theirs]},
        "objective": one.objective or None,
        "split": one.split,
        "items": one.items,
        "values": list(one.values),
        "difference": one.difference,
        "standard_error": one.standard_error,
        "interval": None if one.interval is None else list(one.interval),
        "better": one.better,
        "worse": one.worse,
        "test": one.test,
        "p": one.p,
        "p_holm": one.adjusted,
        "clear": one.clear,
    }
    if one.objective:
        facts["changed"] = [
            {
                "item": change.item,
                "ours": change.ours,
                "theirs": change.theirs,
                **({"text": asked} if (asked := texts.get((one.objective, change.item))) else {}),
            }
            for change in one.changes[:items]
        ]
    return facts
