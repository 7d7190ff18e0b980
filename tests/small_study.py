"""A whole study in a second: a formula in the place of models, everything else real."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge.layout import partition
from evomerge.models import Models
from evomerge.pool import SerialPool
from evomerge.presentation import STUDY_FILE
from evomerge.recipe import ModelRef, Recipe
from evomerge.search.protocol import Candidate, SearchProblem, Told
from evomerge.study import Baseline, Study
from evomerge.study_listener import StudyListener
from evomerge.study_view import StudyView
from evomerge.trial import Direction, Evaluation, Job, Objective, Score

EXPERTS = ("one", "two", "three")
OBJECTIVES = (
    Objective("reverse"),
    Objective("sort"),
    Objective("nll", Direction.MINIMIZE, "nats"),
)


@dataclass(frozen=True)
class Split:
    search: tuple[str, ...] = ("0", "1", "2", "3")
    validation: tuple[str, ...] = ("4", "5", "6", "7", "8", "9")
    test: tuple[str, ...] = ("10", "11", "12")


class Formula:
    """Scores a recipe by its mean weights; items differ by a fixed amount."""

    def run(self, job: Job) -> Evaluation:
        means = [sum(column) / len(column) for column in zip(*job.recipe.table, strict=True)]
        if job.number == 10:
            raise ValueError("diverged on purpose")
        scores = []
        for number, items in enumerate(job.items):
            level = means[number % 3] * 1.4 - means[number % 3] ** 2 * 0.6 - 0.1 * sum(means)
            values = tuple(level + 0.01 * (int(item) % 3 - 1) for item in items)
            scores.append(Score(sum(values) / len(values), 0.02, values))
        return Evaluation(tuple(scores), {"merge": 0.001, "score": 0.002})

    def describe(self) -> Mapping[str, str]:
        return {"device": "none"}


class Grid:
    """A searcher that draws all its points at once."""

    def __init__(self, problem: SearchProblem) -> None:
        rng = random.Random(problem.seed)
        self._points = [
            tuple(rng.random() for _ in range(problem.dimension)) for _ in range(problem.budget)
        ]
        self._next = 0

    def ask(self, n: int) -> Sequence[Candidate]:
        first, self._next = self._next, min(self._next + n, len(self._points))
        return [Candidate(i, self._points[i]) for i in range(first, self._next)]

    def tell(self, results: Sequence[Told]) -> None:
        pass


BLOCKS = ("embed", "layer.0", "layer.1", "final")


def recipe(table: Sequence[Sequence[float]], models: Models | None = None) -> Recipe:
    if models is None:
        base = ModelRef("base", "models/base", "f0")
        experts = tuple(ModelRef(name, f"models/{name}", f"f-{name}") for name in EXPERTS)
    else:
        base, experts = models.refs
    return Recipe(
        method="task_arithmetic",
        base=base,
        experts=experts,
        partition="layer",
        layout="layout" if models is None else models.layout.digest,
        dtype="F32" if models is None else models.dtype,
        columns=tuple(f"weight.{name}" for name in EXPERTS),
        table=tuple(tuple(row) for row in table),
    )


def small_study(
    directory: Path,
    objectives: int = 2,
    budget: int = 12,
    listeners: Sequence[StudyListener] = (),
    name: str = "strings",
    models: Models | None = None,
) -> Study:
    """Return a study that is ready to run.

    Args:
        directory: of the study.
        objectives: 1 to 3.
        budget: trials.
        listeners: are told what happens.
        name: of the study.
        models: whose merges its recipes are; without them the recipes name models that are not.
    """
    blocks = BLOCKS if models is None else partition(models.layout, "layer").blocks
    rows = len(blocks)

    def decode(x: tuple[float, ...]) -> Recipe:
        return recipe([x[3 * row : 3 * row + 3] for row in range(rows)], models)

    def flat(*weights: float) -> Recipe:
        return recipe([weights] * rows, models)

    baselines = [
        Baseline("base", None, flat(0.0, 0.0, 0.0)),
        *(
            Baseline(f"expert:{name}", None, flat(*(0.9 * (name == other) for other in EXPERTS)))
            for name in EXPERTS
        ),
        Baseline("uniform", None, flat(1 / 3, 1 / 3, 1 / 3)),
        *(Baseline(f"task_arithmetic:{scale}", None, flat(scale, scale, scale))
          for scale in (0.4, 0.8)),
    ]  # fmt: skip
    return Study(
        directory,
        identity={"name": name, "blocks": list(blocks), "searcher": {"name": "grid"}},
        objectives=OBJECTIVES[:objectives],
        splits=[Split()] * objectives,
        dimension=3 * rows,
        decode=decode,
        make_searcher=Grid,
        baselines=baselines,
        make_pool=lambda: SerialPool(Formula),
        budget=budget,
        parallel=2,
        seed=3,
        scalarise=objectives == 1,
        finalists=6,
        listeners=listeners,
    )


def finished(
    directory: Path, objectives: int = 2, budget: int = 12, models: Models | None = None
) -> StudyView:
    """Run a study to its end and return its view."""
    view = small_study(directory, objectives, budget, models=models).run()
    (directory / STUDY_FILE).write_text("name: strings\nseed: 3\n")
    return view
