"""The rows of the table of faults: a short form of most, and the full sizes under a mark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster_rows import cluster_cases
from rows import LONG, SHORT, cases
from tracker_rows import tracker_cases

#: The default run is at its limit of minutes, so it takes one searcher for each fault.
_DEFAULT = replace(SHORT, every=70)
_DEFAULT_ROWS = (
    "workers nsga2", "both de", "completion", "points study", "full disk", "bad results", "all fail"
)  # fmt: skip


def _marked(name: str) -> Any:
    return pytest.param(name, marks=() if name in _DEFAULT_ROWS else pytest.mark.slow)


@pytest.mark.parametrize("name", [_marked(case) for case in cases(_DEFAULT)])
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    row = cases(_DEFAULT)[name](tmp_path)
    assert row.holds, row


@pytest.mark.slow
def test_an_export_that_dies_leaves_all_or_nothing(
    save_llama: Callable[..., Path], tmp_path: Path
) -> None:
    base = save_llama("chaos_base", 1)
    experts = tuple(str(save_llama(f"chaos{k}", 2 + k, base=base)) for k in range(3))
    row = cases(SHORT, str(base), experts)["points export"](tmp_path)
    assert row.holds, row


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*cases(LONG), *cluster_cases(True), *tracker_cases(True)])
def test_nothing_is_lost_for_long(name: str, tmp_path: Path) -> None:
    row = {**cases(LONG), **cluster_cases(True), **tracker_cases(True)}[name](tmp_path)
    assert row.holds, row
