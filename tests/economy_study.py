"""Studies that save items in every way there is, on the toy study's formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from study_journals import Shuffled
from toy_study import (
    OBJECTIVES,
    ToyStudyFactory,
    rounded,
    toy_splits,
    toy_study,
)

from evomerge.estimate import Answers, Endpoint, Estimate, Estimation
from evomerge.halving import Halving
from evomerge.item_cache import Items
from evomerge.items import Resampled
from evomerge.racing import Racing
from evomerge.study import Study


class Shrunk:
    """An estimator for tests: the mean of the margins, which are ten times the scores.

    The plain mean of the same items is what it should be compared with.
    """

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        assert len(answers.margins) == len(answers.ids)
        return Estimate(fmean(answers.margins) / 10 + 0.001, 0.5, {})


class Own(Shrunk):
    """An estimator that knows the items of its own draw only, as weights of a design do."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        assert answers.ids == self._items[objective][: len(answers.ids)]
        return super().estimate(objective, answers)


def prepare(endpoints: Sequence[Endpoint], draw: int, n: int = 4) -> tuple[Items, Shrunk]:
    """Choose the items on which the endpoints differ most; later draws begin farther down."""
    design = []
    for objective in range(len(endpoints[0].answers)):
        rows = [one.answers[objective] for one in endpoints]
        spread = {
            item: max(row.scores[i] for row in rows) - min(row.scores[i] for row in rows)
            for i, item in enumerate(rows[0].ids)
        }
        best = sorted(spread, key=lambda item: (-spread[item], item))
        design.append(tuple(best[3 * draw :] + best[: 3 * draw])[:n])
    return tuple(design), Own(tuple(design))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "racing": {"racing": Racing((10, 20))},
    "resampled": {"resampled": Resampled(7)},
    "every": {"resampled": Resampled(7, every=4)},
    "raced": {"resampled": Resampled(25), "racing": Racing((10,))},
    "budget": {"budget": None, "item_budget": 300, "racing": Racing((10, 20))},
    "estimated": {
        "estimation": Estimation("shrunk", prepare, full_every=3, calibration=2), "graded": True,
    },
    "estimated race": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4),
        "racing": Racing((10, 15)),
        "graded": True,
    },
    "constrained": {
        "objectives": (replace(OBJECTIVES[0], minimum=-0.2), OBJECTIVES[1]),
        "racing": Racing((10, 20)),
    },
    "halving": {"racing": Halving((10, 20))},
    "halved brackets": {"racing": Halving((5, 10), 3, bracket=4), "resampled": Resampled(15)},
    "halved budget": {"budget": None, "item_budget": 600, "racing": Halving((5, 10))},
    "estimated halving": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4),
        "racing": Halving((10, 15)),
        "graded": True,
    },
    "refreshed": {
        "estimation": Estimation("shrunk", prepare, full_every=5, refresh="generation"),
        "graded": True,
    },
    "refreshed race": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4, refresh=3),
        "racing": Racing((10, 15)),
        "graded": True,
    },
    "refreshed halving": {
        "estimation": Estimation("shrunk", partial(prepare, n=20), full_every=4, refresh=5),
        "racing": Halving((10, 15), bracket=6),
        "graded": True,
    },
    "infeasible": {"objectives": (OBJECTIVES[0], replace(OBJECTIVES[1], maximum=-1.0))},
}  # fmt: skip


def study(directory: Path, feature: str, **changes: Any) -> Study:
    """Return a study of 30 search items; its candidates repeat, so that there is much to reuse."""
    arguments = {
        "splits": toy_splits(2, 30), "budget": 12, "decode": rounded, **FEATURES[feature], **changes
    }  # fmt: skip
    return toy_study(directory, **arguments)


def pooled(directory: Path, feature: str, workers: int) -> Study:
    graded = FEATURES[feature].get("graded", False)
    factory = ToyStudyFactory(directory.parent / f"{directory.name}.log", graded=graded)
    return study(directory, feature, make_pool=lambda: Shuffled(factory, workers))


def scored(log: Path) -> Counter[tuple[str, str]]:
    """Return how often each (recipe, item) was scored."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in log.read_text().splitlines() if log.exists() else ():
        digest, *items = line.split()
        counts.update((digest, item) for item in items)
    return counts


def toy_decode(x: tuple[float, ...]) -> Any:
    from toy_study import decode

    return decode(x)
