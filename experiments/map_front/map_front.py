"""MAP, Bayesian MAP and Nested MAP against the front that brute force finds, on real merges.

    evomerge demo my-demo
    python experiments/map_front/map_front.py my-demo --work fronts

Two experts with two objectives and three with three, one coefficient per expert: few enough that a
grid over the box is a front to measure others by. Grid and searches score the same fixed items, so
no noise lies between them; the searches are not bound to the grid and may find what it missed.
Every merge that was scored is kept in the work folder, so a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "searchers"))

from real_pools import Case, Pool

from evomerge.pareto import hypervolume, nondominated
from evomerge.search.protocol import Told
from evomerge.search.quadratic import fit
from evomerge.search.registry import find_searcher, make_searcher

Array = np.ndarray[Any, np.dtype[np.float64]]

#: Cases, and levels of the grid in each coefficient.
CASES: Mapping[str, tuple[Case, int]] = {
    "2": (Case(2, "model", 2), 21),
    "3": (Case(3, "model", 3), 9),
}
SEARCHERS = ("map", "bayesian_map", "nested_map", "random", "nsga2")
#: Merges between two savings.
SAVE_EVERY = 50


class Truth:
    """The accuracies of merges, kept in a file.

    Args:
        pool: merges and scores.
        path: of the file (npz).
    """

    def __init__(self, pool: Pool, path: Path) -> None:
        self._pool, self._path = pool, path
        self._known: dict[str, Array] = {}
        if path.exists():
            with np.load(path) as kept:
                pairs = zip(kept["digests"].tolist(), kept["values"], strict=True)
                self._known = dict(pairs)
        self._saved = len(self._known)

    def __call__(self, x: Sequence[float]) -> Array:
        """Return the accuracies [m] of the merge at ``x`` [d] in the unit box."""
        recipe = self._pool.space.decode(x)
        if recipe.digest not in self._known:
            self._known[recipe.digest] = self._pool.scores(recipe, test=False)[1]
            if len(self._known) >= self._saved + SAVE_EVERY:
                self.save()
        return self._known[recipe.digest]

    def save(self) -> None:
        """Write what is known, at once or not at all."""
        part = self._path.with_suffix(".part.npz")
        np.savez(part, digests=list(self._known), values=np.array(list(self._known.values())))
        part.replace(self._path)
        self._saved = len(self._known)


@dataclass(frozen=True, slots=True)
class Result:
    """One search beside the grid. Accuracies are in [0, 1], so are the distances.

    Attributes:
        case: of ``CASES``.
        searcher: its name; ``baselines`` is what every search knows before it begins.
        budget: merges scored, baselines not counted.
        seed: of the searcher.
        gd: mean distance from the front found to the grid's (generational distance).
        igd: mean distance from the grid's front to the one found (inverted).
        gd_plus: as ``gd``, counting only where the front found is worse.
        igd_plus: as ``igd``, likewise.
        volume: hypervolume above zero accuracy, as a share of the grid's.
        wins: how often a member of the front found beats one of the grid's in a task, ties half
            (the MAP paper's win rate, over all pairs instead of 100 drawn ones).
        heldout_rms: of quadratics fitted to what was measured, on the grid, mean over objectives.
        heldout_r2: likewise; the smallest of the objectives.
        predicted: hypervolume that the quadratics promise on the grid, as a share of the grid's.
        kept: what those grid points really reach.
    """

    case: str
    searcher: str
    budget: int
    seed: int
    gd: float
    igd: float
    gd_plus: float
    igd_plus: float
    volume: float
    wins: float
    heldout_rms: float
    heldout_r2: float
    predicted: float
    kept: float


class Judge:
    """Measures fronts by the grid's.

    Args:
        truth: of the merges.
        levels: of each coefficient.
        dimension: d.
    """

    def __init__(self, truth: Truth, levels: int, dimension: int) -> None:
        ticks = np.linspace(0.0, 1.0, levels).tolist()
        self.points = np.array(list(product(ticks, repeat=dimension)))  # [g, d]
        self.losses = -np.array([truth(tuple(x)) for x in self.points.tolist()])  # [g, m]
        truth.save()
        self.front = np.unique(self.losses[list(nondominated(self.losses))], axis=0)
        self.volume = _volume(self.front)

    def judge(self, points: Array, losses: Array) -> dict[str, float]:
        """Return what ``Result`` says of measured points [n, d] and their losses [n, m]."""
        from pymoo.indicators.gd import GD
        from pymoo.indicators.gd_plus import GDPlus
        from pymoo.indicators.igd import IGD
        from pymoo.indicators.igd_plus import IGDPlus

        front = np.unique(losses[list(nondominated(losses))], axis=0)
        better = front[:, None, :] < self.front[None, :, :]
        equal = front[:, None, :] == self.front[None, :, :]
        surrogates = [fit(points, column) for column in losses.T]
        expected = np.stack([one(self.points) for one in surrogates], axis=1)  # [g, m]
        errors = expected - self.losses
        promised = list(nondominated(expected))
        return {
            "gd": float(GD(self.front)(front)),
            "igd": float(IGD(self.front)(front)),
            "gd_plus": float(GDPlus(self.front)(front)),
            "igd_plus": float(IGDPlus(self.front)(front)),
            "volume": _volume(front) / self.volume,
            "wins": float((better + 0.5 * equal).mean()),
            "heldout_rms": float(np.sqrt((errors**2).mean(axis=0)).mean()),
            "heldout_r2": float((1 - (errors**2).mean(axis=0) / self.losses.var(axis=0)).min()),
            "predicted": _volume(expected[promised]) / self.volume,
            "kept": _volume(self.losses[promised]) / self.volume,
        }


def _volume(losses: Array) -> float:
    return hypervolume(losses, (0.0,) * losses.shape[1])


def search(pool: Pool, truth: Truth, name: str, budget: int, seed: int) -> tuple[Array, Array]:
    """Return the points [n, d] that one search knows in the end, and their losses [n, m]."""
    problem = pool.problem(budget, seed, scalar=False, informed=True)
    points = [point.x for point in problem.warm]
    losses = [point.losses for point in problem.warm]
    # As in a study, searchers of one objective get the mean of the losses.
    scalar = not find_searcher(name).multi_objective
    told = pool.problem(budget, seed, scalar=True, informed=True) if scalar else problem
    searcher = make_searcher(name, {}, told)
    asked = 0
    while asked < budget:
        batch = searcher.ask(min(problem.parallel, budget - asked))
        if not batch:
            break
        for candidate in batch:
            loss = tuple((-truth(candidate.x)).tolist())
            points.append(candidate.x)
            losses.append(loss)
            mean = (sum(loss) / len(loss),)
            searcher.tell([Told(candidate.id, mean if scalar else loss)])
        asked += len(batch)
    return np.array(points), np.array(losses)


def link(work: Path, demo: Path) -> None:
    """Make the demo's models and tasks visible in the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    for name in ("models", "fitness"):
        if not (work / name).exists():
            (work / name).symlink_to((demo / name).resolve())


def run(given: argparse.Namespace, say: Callable[[str], None]) -> tuple[list[Result], list[str]]:
    """Return the results of all searches, and a line about the grid of each case."""
    results, lines = [], []
    for name in given.cases:
        case, levels = CASES[name]
        levels = given.levels or levels
        pool = Pool(case, given.work)
        truth = Truth(pool, given.work / f"{case.name}.npz")
        judge = Judge(truth, levels, pool.space.dimension)
        baselines = pool.problem(1, 0, scalar=False, informed=True).warm
        lines.append(
            f"{case.experts} experts, {case.objectives} objectives: grid of {len(judge.points)} "
            f"merges, {len(judge.front)} different scores on its front, hypervolume "
            f"{judge.volume:.4f}; every search begins with {len(baselines)} baselines"
        )
        say(lines[-1])
        known = (np.array([b.x for b in baselines]), np.array([b.losses for b in baselines]))
        results.append(Result(name, "baselines", 0, 0, **judge.judge(*known)))
        for budget, searcher, seed in product(given.budgets, given.searchers, range(given.seeds)):
            figures = judge.judge(*search(pool, truth, searcher, budget, seed))
            results.append(Result(name, searcher, budget, seed, **figures))
            say(f"{case.name}, {searcher}, {budget} merges, seed {seed}: {figures['volume']:.3f}")
        truth.save()
    return results, lines


FRONTS = {
    "GD": "gd", "IGD": "igd", "GD+": "gd_plus", "IGD+": "igd_plus", "hypervolume": "volume",
    "win rate": "wins",
}  # fmt: skip
SURROGATES = {
    "rms on the grid": "heldout_rms", "R2, worst objective": "heldout_r2",
    "front promised": "predicted", "what it is": "kept",
}  # fmt: skip


def table(results: Sequence[Result], case: str, columns: Mapping[str, str]) -> str:
    """Return mean and 95 % half-width over seeds, a row per searcher and budget."""
    lines = ["| searcher | merges | " + " | ".join(columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    own = [one for one in results if one.case == case]
    for searcher, budget in dict.fromkeys((one.searcher, one.budget) for one in own):
        rows = [one for one in own if (one.searcher, one.budget) == (searcher, budget)]
        cells = [_spread(np.array([getattr(one, key) for one in rows])) for key in columns.values()]
        lines.append(f"| {searcher} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Array) -> str:
    from scipy.stats import t

    if len(values) < 2:
        return f"{values.mean():.3f}"
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("demo", type=Path, help="folder of `evomerge demo`")
    parser.add_argument("--work", type=Path, default=Path("map-front"))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["2"])
    parser.add_argument("--levels", type=int, help="of the grid in each coefficient")
    parser.add_argument("--budgets", type=int, nargs="+", default=[30])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args(arguments)
    link(given.work, given.demo)
    results, lines = run(given, lambda line: print(line, file=sys.stderr, flush=True))
    parts = []
    for name, line in zip(given.cases, lines, strict=True):
        parts += [line + ".", table(results, name, FRONTS), table(results, name, SURROGATES)]
    text = "\n\n".join(parts)
    print(text)
    if given.markdown is not None:
        given.markdown.write_text(text + "\n")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
