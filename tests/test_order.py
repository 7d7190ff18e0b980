"""`order: completion`: told as results come, and still continued exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from study_journals import Shuffled, cut, essence_of, events_of
from toy_study import ToySearcher, ToyStudyFactory, make, rounded, toy_study

from evomerge.errors import InputError
from evomerge.journal import JOURNAL, read
from evomerge.replay import verify
from evomerge.search.protocol import SearchProblem, Told
from evomerge.study import Study
from evomerge.study_view import StudyView


def _study(directory: Path, **changes: Any) -> Study:
    factory = ToyStudyFactory(directory.parent / "log", changes.pop("limit", 10.0))
    pool = partial(Shuffled, factory, 4)
    return toy_study(
        directory, **{"order": "completion", "make_pool": pool, "parallel": 4, **changes}
    )


class Noting(ToySearcher):
    """Steady: asks without waiting for a generation; notes the order of telling."""

    order: list[int] = []  # noqa: RUF012 - of the last one that was built

    def __init__(self, problem: SearchProblem) -> None:
        super().__init__(problem)
        type(self).order = []
        self.most = 0

    def ask(self, n: int) -> Any:
        told, self.told = self.told, self.told + [Told(0, ())] * 6
        found = super().ask(n)
        self.told = told
        self.most = max(self.most, self.asked - len(self.told))
        return found

    def tell(self, results: Sequence[Told]) -> None:
        self.order.extend(told.id for told in results)
        super().tell(results)


def test_the_searcher_is_told_in_the_order_of_the_journal(tmp_path: Path) -> None:
    built: list[Noting] = []

    def build(problem: SearchProblem) -> Noting:
        built.append(Noting(problem))
        return built[-1]

    _study(tmp_path / "s", make_searcher=build).run()
    arrived = [r["trial"] - 3 for r in events_of(tmp_path / "s", "tell") if r["trial"] >= 3]
    assert Noting.order == arrived
    assert arrived != sorted(arrived), "the pool kept the order of asking"
    assert built[0].most == 4, "the window was not kept full"


@pytest.mark.parametrize("changes", [{}, {"decode": rounded}, {"limit": 1.2}])
def test_a_search_is_continued_exactly_from_any_record(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {"budget": 10, "make_searcher": Noting, **changes}
    whole = tmp_path / "whole"
    _study(whole, **changes).run()
    data, total = (whole / JOURNAL).read_bytes(), len(read(whole).records)
    assert verify(whole, _study(whole, **changes)).problems == ()
    for records in range(1, total, 2):
        directory = tmp_path / f"cut{records}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(data)
        cut(directory, records)
        known = essence_of(directory)
        _study(directory, **changes).run()
        assert known.items() <= essence_of(directory).items()
        assert verify(directory, _study(directory, **changes)).problems == ()


@pytest.mark.parametrize("searcher", ["cma", "nsga2"])
def test_generations_are_learned_in_ask_order_all_the_same(tmp_path: Path, searcher: str) -> None:
    changes = {
        "make_searcher": partial(make, searcher), "scalarise": searcher == "cma", "budget": 24,
    }  # fmt: skip
    for order in ("ask", "completion"):
        _study(tmp_path / order, order=order, **changes).run()
    views = [StudyView.load(tmp_path / order) for order in ("ask", "completion")]
    points = [[trial.x for trial in view.trials] for view in views]
    assert (points[0] == points[1]) is (searcher == "nsga2")


def test_the_order_is_part_of_the_contract(tmp_path: Path) -> None:
    _study(tmp_path / "s", budget=4).run()
    with pytest.raises(InputError, match=r'search\.order: "completion" -> "ask"'):
        _study(tmp_path / "s", budget=4, order="ask").run()
