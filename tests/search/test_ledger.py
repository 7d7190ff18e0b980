from __future__ import annotations

import math

import numpy as np
import pytest

from evomerge.errors import CallOrderError
from evomerge.search.ledger import Ledger, check_count
from evomerge.search.protocol import SearchProblem, Told


def ledger(dimension: int = 2, objectives: int = 1) -> Ledger:
    return Ledger(SearchProblem(dimension, objectives, budget=10, parallel=1, seed=0))


def test_issue_clips_and_numbers() -> None:
    book = ledger()
    first, second = book.issue(np.array([-0.5, 2.0])), book.issue([0.25, -0.0])
    assert (first.id, first.x) == (0, (0.0, 1.0))
    assert (second.id, second.x) == (1, (0.25, 0.0))
    assert math.copysign(1.0, second.x[1]) == 1.0
    assert list(book.outstanding) == [0, 1]


def test_settle_takes_all_or_none() -> None:
    book = ledger()
    book.issue([0.1, 0.2])
    book.issue([0.3, 0.4])
    with pytest.raises(CallOrderError, match=r"candidate 7 was never asked \(asked so far: 2\)"):
        book.settle([Told(0, (1.0,)), Told(7, (1.0,))])
    assert list(book.outstanding) == [0, 1]
    book.settle([Told(1, (1.0,))])
    assert list(book.outstanding) == [0]
    with pytest.raises(CallOrderError, match="candidate 1 was told already"):
        book.settle([Told(0, (1.0,)), Told(1, (1.0,))])


def test_messages_name_what_was_expected_and_what_came() -> None:
    book = ledger(objectives=2)
    book.issue([0.1, 0.2])
    with pytest.raises(ValueError, match=r"candidate 0 needs 2 losses \[m\], got 1: \(1.0,\)"):
        book.settle([Told(0, (1.0,))])
    with pytest.raises(ValueError, match=r"\(1.0, nan\).*finite penalty and set failed=True"):
        book.settle([Told(0, (1.0, math.nan))])


@pytest.mark.parametrize("x", [[0.1], [0.1, math.nan], [0.1, math.inf]])
def test_a_malformed_point_is_a_bug(x: list[float]) -> None:
    with pytest.raises(AssertionError, match="finite point"):
        ledger().issue(x)


def test_check_count() -> None:
    check_count(0)
    with pytest.raises(ValueError, match="got -3"):
        check_count(-3)
