"""The toy study with a searcher that asks otherwise elsewhere, killed in the middle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_journals import cut, events_of
from toy_study import ToySearcher, toy_study

from evomerge.search.protocol import Candidate, SearchProblem
from evomerge.study import Study

#: Trials before the cut, baselines included.
BEFORE = 12


class Moved(ToySearcher):
    """Rounds otherwise from its sixth candidate on, as on another CPU."""

    problems: list[SearchProblem] = []  # noqa: RUF012  emptied by every test that reads it

    def __init__(self, problem: SearchProblem) -> None:
        super().__init__(problem)
        self.problems.append(problem)

    def ask(self, n: int) -> Sequence[Candidate]:
        given = super().ask(n)
        return tuple(
            Candidate(one.id, (math.nextafter(one.x[0], 0.5), *one.x[1:])) if one.id >= 5 else one
            for one in given
        )


def begun(directory: Path, trials: int = BEFORE, **changes: Any) -> None:
    """Leave a study behind that was killed right after it had asked for so many trials."""
    toy_study(directory, **changes).run()
    asks = [record["seq"] for record in events_of(directory, "ask")]
    cut(directory, asks[trials - 1] + 1)


def moved(directory: Path, **changes: Any) -> Study:
    return toy_study(directory, **{"make_searcher": Moved, **changes})
