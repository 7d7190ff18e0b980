"""What it costs to find one of the best merges: all items, racing, successive halving.

Reads a response matrix (see the README), lets the merges compete in brackets in an order by
chance, as the trials of a search do, and counts item evaluations. The rules are those of the
studies: the classes ``Racing`` and ``Halving``. Nothing is run on a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.halving import Halving, best_first
from evomerge.item_cache import Items
from evomerge.racing import Racing, run_job_items
from evomerge.recipe import ModelRef, Recipe
from evomerge.references import References
from evomerge.trial import Evaluation, Job, Objective, Score

Floats = NDArray[np.float64]
BOOTSTRAPS = 2000


@dataclass(frozen=True, slots=True)
class Found:
    """What one way found in one seed.

    Attributes:
        items: evaluations of the search, and of completing finalists that had stopped.
        regret: true value of the best candidate minus that of the choice, points.
    """

    items: int
    regret: float


class Field:
    """The candidates in the order in which they are asked, on the search items in one order.

    Args:
        scores: [n, I] of the candidates on the search items.
    """

    def __init__(self, scores: Floats) -> None:
        self.rows = [tuple(map(float, row)) for row in scores]
        self.ids: Items = (tuple(f"i{index}" for index in range(scores.shape[1])),)
        self.spent = 0
        self._known = [0] * len(self.rows)  # items that each was scored on

    def score(self, candidate: int, count: int) -> float:
        """Return the mean of the first items of a candidate; only unknown ones cost."""
        self.spent += max(0, count - self._known[candidate])
        self._known[candidate] = max(count, self._known[candidate])
        return sum(self.rows[candidate][:count]) / count

    def known(self, candidate: int) -> int:
        """Return the number of items that a candidate was scored on."""
        return self._known[candidate]

    @property
    def size(self) -> int:
        """Number of search items."""
        return len(self.ids[0])


def mean_all(field: Field) -> None:
    """Score every candidate on all items."""
    for candidate in range(len(field.rows)):
        field.score(candidate, field.size)


def mean_of(count: int) -> Callable[[Field], None]:
    """Return the rule that scores every candidate on the first items only."""

    def run(field: Field) -> None:
        for candidate in range(len(field.rows)):
            field.score(candidate, min(count, field.size))

    return run


def racing(rules: Racing) -> Callable[[Field], None]:
    """Return the rule that stops candidates which cannot reach the best one any more."""
    objectives = (Objective("score"),)
    model = ModelRef("base", "matrix", "0" * 8)
    recipe = Recipe("linear", model, (), "model", "matrix", ("w",), ((0.0,),))

    def run(field: Field) -> None:
        references = References(objectives, rules.references, rules.rungs[0])
        for candidate, row in enumerate(field.rows):
            rivals = references.rivals(field.ids)
            race = rules.race(objectives, field.ids, ((None,) * field.size,), rivals)

            def answer(asked: Items, row: tuple[float, ...] = row) -> Sequence[Score]:
                return [Score(0.0, 0.0, tuple(row[int(item[1:])] for item in asked[0]))]

            (done,) = run_job_items(Job(0, recipe, field.ids, race), answer)
            value = field.score(candidate, len(done.items))
            if len(done.items) == field.size:
                score = Score(value, 0.0, done.items)
                references.add(field.ids, Evaluation((score,), {}))

    return run


def halving(rules: Halving) -> Callable[[Field], None]:
    """Return the rule that halves brackets of candidates."""
    assert rules.bracket is not None
    size = rules.bracket

    def run(field: Field) -> None:
        for start in range(0, len(field.rows), size):
            runners = list(range(start, min(start + size, len(field.rows))))
            for rung in rules.stages(field.ids):
                losses = [(-field.score(candidate, rung),) for candidate in runners]
                best = best_first(losses, [0.0] * len(runners))[: rules.kept(len(runners))]
                runners = sorted(runners[row] for row in best)
            for candidate in runners:
                field.score(candidate, field.size)

    return run


@dataclass(frozen=True, slots=True)
class Way:
    """A way to spend item evaluations.

    Attributes:
        name: in the table.
        run: scores the candidates of a field.
        full: items of a candidate that is complete; None for all search items.
        tiers: whether candidates that went farther come first among the finalists.
    """

    name: str
    run: Callable[[Field], None]
    full: int | None = None
    tiers: bool = False


def finalists(field: Field, way: Way, count: int) -> list[int]:
    """Return the candidates that a study would score again; those that had stopped are completed.

    Completing one may show that another one belongs in its place.
    """
    full = way.full or field.size
    while True:
        order = sorted(
            range(len(field.rows)),
            key=lambda n: (-field.known(n) if way.tiers else 0, -field.score(n, field.known(n)), n),
        )[:count]
        stopped = [n for n in order if field.known(n) < full]
        if not stopped:
            return order
        for candidate in stopped:
            field.score(candidate, full)


def ways() -> tuple[Way, ...]:
    """Return what is compared."""

    def halved(eta: int, bracket: int, rungs: tuple[int, ...] = (10, 20, 50, 200)) -> Way:
        rule = halving(Halving(rungs, eta, bracket))
        shown = "/".join(map(str, rungs))
        return Way(f"halving {shown}, eta {eta}, brackets of {bracket}", rule, tiers=True)

    return (
        Way("mean of all items", mean_all),
        *(Way(f"mean of {n} items", mean_of(n), full=n) for n in (20, 60, 200)),
        Way("racing (rule front)", racing(Racing())),
        halved(2, 16), halved(2, 40), halved(4, 16), halved(4, 40),
        halved(2, 16, (50, 200)), halved(4, 16, (50, 200)),
    )  # fmt: skip


def trial(scores: Floats, way: Way, seed: int, arguments: argparse.Namespace) -> Found:
    """Let candidates drawn by a seed compete.

    Args:
        scores: [n, I] of all candidates on all items.
        way: how.
        seed: draws candidates, their order, and which items are for search and validation.
        arguments: numbers of them.
    """
    draw = np.random.default_rng(seed)
    rows = scores[draw.permutation(len(scores))[: arguments.trials]]
    items = draw.permutation(scores.shape[1])
    field = Field(rows[:, items[: arguments.search]])
    held_out = rows[:, items[arguments.search : arguments.search + arguments.validation]]
    way.run(field)
    chosen = max(finalists(field, way, arguments.finalists), key=lambda n: (held_out[n].mean(), -n))
    truth = rows.mean(axis=1)
    return Found(field.spent, 100 * float(truth.max() - truth[chosen]))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over the seeds and its 90 % bootstrap interval."""
    numbers = np.asarray(values, dtype=np.float64)
    draw = np.random.default_rng(0).integers(len(numbers), size=(BOOTSTRAPS, len(numbers)))
    low, high = np.quantile(numbers[draw].mean(axis=1), [0.05, 0.95])
    return float(numbers.mean()), float(low), float(high)


def table(found: dict[str, list[Found]]) -> str:
    """Return the comparison in Markdown."""
    first = next(iter(found.values()))
    lines = [
        "| way | item evaluations [90 %] | factor | regret, points [90 %] | within 1 point |",
        "|---|---|---|---|---|",
    ]
    for name, results in found.items():
        items, low, high = interval([one.items for one in results])
        factor = sum(one.items for one in first) / sum(one.items for one in results)
        regret, least, most = interval([one.regret for one in results])
        near = sum(one.regret <= 1 for one in results)
        lines.append(
            f"| {name} | {items:,.0f} [{low:,.0f}, {high:,.0f}] | {factor:.1f} "
            f"| {regret:.2f} [{least:.2f}, {most:.2f}] | {near} of {len(results)} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare all ways and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("matrix", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=160, help="candidates of a seed")
    parser.add_argument("--search", type=int, default=1020, help="search items")
    parser.add_argument("--validation", type=int, default=600, help="items that choose")
    parser.add_argument("--finalists", type=int, default=12)
    parser.add_argument("--elite", type=float, default=1.0, help="keep this share, the best")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    with np.load(given.matrix, allow_pickle=False) as matrix:
        merges = np.isin(matrix["roles"], ("merge", "bank", "candidate"))
        scores = np.asarray(matrix["scores"][merges], dtype=np.float64)
    best = np.argsort(-scores.mean(axis=1), kind="stable")
    scores = scores[best[: round(given.elite * len(scores))]]
    if len(scores) < given.trials or scores.shape[1] < given.search + given.validation:
        parser.error(
            f"the matrix has {scores.shape[0]} merges and {scores.shape[1]} items: too few"
        )
    found = {
        way.name: [trial(scores, way, seed, given) for seed in range(given.seeds)] for way in ways()
    }
    text = table(found)
    sys.stdout.write(text)
    if given.markdown:
        given.markdown.write_text(text)
    if given.json:
        data = {name: [asdict(one) for one in results] for name, results in found.items()}
        given.json.write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
