"""All searchers on real merges, at equal budgets of item evaluations.

    python experiments/searchers/real_pools.py my-demo --work pools --markdown pools.md

The models are those of `evomerge demo`: a base and three experts, each good at one skill; a fourth
and a fifth, taught the first two skills once more with other batches, are trained here. Every
candidate is merged in place by evomerge's engine and scored on the same search items, so equal
trials are equal item evaluations. What a search measured as best after a quarter, half and all of
its trials is scored once more on test items that no search sees: with one objective the best trial,
else the front, of which the score is the hypervolume above zero accuracy. Finished searches are
kept, so it goes on where it stopped; seeds come outermost, so that it may be stopped at any time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from pool_report import SHARES, Run, plot, read, table

from evomerge import demo_pool
from evomerge.config import load
from evomerge.direction_grams import direction_grams
from evomerge.errors import EvomergeError
from evomerge.pareto import hypervolume, nondominated
from evomerge.prepare import prepare
from evomerge.search.protocol import SearchProblem, Told, WarmPoint
from evomerge.search.registry import find_searcher, make_searcher

if TYPE_CHECKING:
    import torch

    from evomerge.recipe import Recipe

Array = np.ndarray[Any, np.dtype[Any]]

EXPERTS = ("reverse", "sort", "shift", "reverse2", "sort2")
#: Coefficients are searched between these.
LOW, HIGH = 0.0, 1.5
#: Items of each skill: those of a trial, and those of the test.
SEARCH, TEST = slice(0, 40), slice(600, 700)
#: Candidates outstanding.
PARALLEL = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One problem.

    Attributes:
        experts: how many of ``EXPERTS``.
        partition: what has a coefficient per expert.
        objectives: 1 is the mean of the experts' skills; 2 and 3 are skills; the fourth is what is
            left of the base's own language.
    """

    experts: int
    partition: str
    objectives: int

    @property
    def name(self) -> str:
        """Names files and columns."""
        return f"{self.experts}x{self.partition}x{self.objectives}"


CASES = (
    Case(2, "model", 1), Case(2, "importance(20)", 2), Case(3, "model", 3),
    Case(3, "importance(13)", 1), Case(3, "importance(67)", 3),
    Case(5, "model", 4), Case(5, "importance(8)", 1), Case(5, "importance(40)", 2),
)  # fmt: skip

#: Searchers by what they are called here: name, arguments, and whether they know the baselines.
#: mergekit-evolve: CMA-ES from the uniform average, step 1/6 in units of the coefficient, pycma's
#: population, coefficients not bounded there (here clipped to the box). Mergenetic: NSGA-II or GA
#: from random points with the population of its examples.
ENTRIES: Mapping[str, tuple[str, dict[str, Any], bool]] = {
    "auto": ("auto", {}, True),
    "random": ("random", {}, True),
    "cma": ("cma", {}, True),
    "de": ("de", {}, True),
    "nevergrad": ("nevergrad", {}, True),
    "oneplusone": ("oneplusone", {}, True),
    "pso": ("pso", {}, True),
    "tbpsa": ("tbpsa", {}, True),
    "pymoo-de": ("pymoo-de", {}, True),
    "pymoo-pso": ("pymoo-pso", {}, True),
    "pymoo-cmaes": ("pymoo-cmaes", {}, True),
    "ga": ("ga", {}, True),
    "nsga2": ("nsga2", {}, True),
    "smsemoa": ("smsemoa", {}, True),
    "nsga3": ("nsga3", {}, True),
    "unsga3": ("unsga3", {}, True),
    "rvea": ("rvea", {}, True),
    "moead": ("moead", {}, True),
    "agemoea": ("agemoea", {}, True),
    "map": ("map", {}, True),
    "bayesian_map": ("bayesian_map", {}, True),
    "nested_map": ("nested_map", {}, True),
    "gp_rounds": ("gp_rounds", {}, True),
    "tied": ("tied", {}, True),
    "polish": ("polish", {}, True),
    "m2n2": ("m2n2", {}, True),
    "evo_merging": ("evo_merging", {}, True),
    "mergekit-evolve": ("cma", {"sigma": round(1 / 6 / (HIGH - LOW), 4)}, False),
    "mergenetic": ("nsga2", {"population": 8}, False),
    "mergenetic-1": ("ga", {"population": 8}, False),
}  # fmt: skip

#: Searchers that are drawn.
LINES = (
    "gp_rounds", "random", "cma", "ga", "nsga2", "smsemoa", "map", "mergekit-evolve", "mergenetic",
)  # fmt: skip


class Answers:
    """Scores a live model on the pool's items, all tokens of an answer at once.

    An answer counts where every token of it is the most likely one after the right ones before it:
    that is where greedy decoding gives the answer, so it equals the demo's exact match.
    """

    def __init__(self, model: torch.nn.Module, skills: int) -> None:
        self._model = model
        self._words = [self._rows(skill, skill) for skill in demo_pool.SKILLS[:skills]]
        self._symbols = [
            self._rows(skill, symbol)
            for skill, symbol in zip(demo_pool.SKILLS, ("<", "^", ">"), strict=True)
        ]

    @staticmethod
    def _rows(skill: str, head: str) -> torch.Tensor:
        import torch

        tokens = _tokenizer()
        texts = [
            f"{head} {item['letters']} = {item['answer']} <eos>"
            for item in demo_pool.skill_items(skill)
        ]
        return torch.tensor(tokens(texts)["input_ids"])

    def score(self, part: slice, symbols: bool) -> list[Array]:
        """Return 1 or 0 for each item of each skill, then of the base's language if asked."""
        found = [self._right(rows[part]) for rows in self._words]
        if symbols:
            third = slice(part.start, part.start + (part.stop - part.start) // 3)
            found.append(np.concatenate([self._right(rows[third]) for rows in self._symbols]))
        return found

    def _right(self, rows: torch.Tensor) -> Array:
        import torch

        with torch.inference_mode():
            logits = self._model(rows[:, :-1], use_cache=False).logits[:, 6:]
        right = (logits.argmax(-1) == rows[:, 7:]).all(dim=1)
        return np.asarray(right.numpy(), np.float64)


@cache
def _tokenizer() -> Any:
    return demo_pool.tokenizer()


class Pool:
    """The merges of one case.

    Args:
        case: experts, blocks, objectives.
        work: folder with ``models`` and ``fitness``.
    """

    def __init__(self, case: Case, work: Path) -> None:
        from transformers import AutoModelForCausalLM

        from evomerge.merge.engine import Engine
        from evomerge.merge.merger import Merger

        self.case = case
        path = work / f"{case.name}.yaml"
        path.write_text(_study(case))
        self.prepared = prepare(load(path), path)
        self.space = self.prepared.space
        model = AutoModelForCausalLM.from_pretrained(work / "models" / "base")
        self._engine = Engine(Merger(self.prepared.models, 1), model)
        self._answers = Answers(model.eval(), min(case.experts, len(demo_pool.SKILLS)))
        self._known: dict[tuple[str, bool], tuple[list[Array], Array]] = {}

    def scores(self, recipe: Recipe, test: bool) -> tuple[list[Array], Array]:
        """Return item scores and accuracies [m] of a merge."""
        key = (recipe.digest, test)
        if key not in self._known:
            self._engine.apply(recipe)
            items = self._answers.score(TEST if test else SEARCH, self.case.objectives == 4)
            means = np.array([row.mean() for row in items])
            one = self.case.objectives == 1
            values = means.mean(keepdims=True) if one else means[: self.case.objectives]
            self._known[key] = (items, values)
        return self._known[key]

    def problem(self, budget: int, seed: int, scalar: bool, informed: bool) -> SearchProblem:
        """Return what a searcher is given."""
        warm = []
        start: tuple[float, ...] | None = None
        for baseline in self.prepared.baselines:
            if baseline.x is None:
                continue
            _, values = self.scores(baseline.recipe, test=False)
            warm.append(WarmPoint(baseline.x, _losses(values, scalar), baseline.label))
            if baseline.label == "uniform":
                start = baseline.x
        objectives = 1 if scalar else self.case.objectives
        problem = SearchProblem(
            self.space.dimension, objectives, budget, PARALLEL, seed,
            groups=self.space.groups, ranges=self.space.ranges,
            noise=0.5 / (SEARCH.stop - SEARCH.start) ** 0.5,
        )  # fmt: skip
        if not informed:
            return replace(problem, start=start)
        return replace(problem, warm=tuple(warm))


def _losses(values: Array, scalar: bool) -> tuple[float, ...]:
    losses = -values
    return (float(losses.mean()),) if scalar else tuple(losses.tolist())


def _study(case: Case) -> str:
    skills = list(demo_pool.SKILLS[: min(case.experts, len(demo_pool.SKILLS))])
    return yaml.safe_dump(
        {
            "models": {
                "base": "models/base",
                "experts": {name: f"models/{name}" for name in EXPERTS[: case.experts]},
            },
            "space": {
                "method": "task_arithmetic",
                "partition": case.partition,
                "parameters": {"weight": {"low": LOW, "high": HIGH}},
            },
            "fitness": {
                "tasks": [f"skills_{skill}" for skill in skills],
                "include_path": "fitness",
                "items": {"search": 40, "validation": 40, "test": 1},
            },
            "search": {"trials": 10},
            "pool": {"kind": "serial", "workers": 1, "device": "cpu"},
        },
        sort_keys=False,
    )


def search(pool: Pool, entry: str, seed: int, budget: int) -> Run:
    """Run one search, told in ask order with ``PARALLEL`` candidates outstanding."""
    name, arguments, informed = ENTRIES[entry]
    case = pool.case
    scalar = case.objectives > 1 and not find_searcher(name).multi_objective
    problem = pool.problem(budget, seed, scalar, informed)
    if name == "m2n2":
        problem = replace(problem, grams=direction_grams(pool.space, pool.prepared.models))
    spent = time.perf_counter()
    searcher = make_searcher(name, arguments, problem)
    spent = time.perf_counter() - spent
    seen = [baseline.recipe for baseline in pool.prepared.baselines]
    known = len(seen)
    waiting: list[Any] = []
    told = 0
    while told < budget:
        begun = time.perf_counter()
        while len(waiting) < PARALLEL and told + len(waiting) < budget:
            asked = searcher.ask(1)
            if not asked:
                break
            waiting += asked
        spent += time.perf_counter() - begun
        if not waiting:
            break
        candidate = waiting.pop(0)
        recipe = pool.space.decode(candidate.x)
        items, values = pool.scores(recipe, test=False)
        seen.append(recipe)
        begun = time.perf_counter()
        rows = tuple(tuple(row.tolist()) for row in items)
        searcher.tell([Told(candidate.id, _losses(values, scalar), items=rows)])
        spent += time.perf_counter() - begun
        told += 1
    chosen = dict(getattr(searcher, "facts", dict)()).get("auto", "").partition(" ")[0]
    marks = [known + round(share * budget) for share in SHARES]
    scores = tuple(value(pool, seen[:mark]) for mark in marks)
    return Run(case.name, entry, seed, budget, scores, spent / max(1, told), chosen)


def value(pool: Pool, seen: Sequence[Recipe]) -> float:
    """Return the test score of what the search measured as best: share, or hypervolume."""
    measured = np.array([-pool.scores(recipe, test=False)[1] for recipe in seen])
    if measured.shape[1] == 1:
        best = seen[int(np.argmin(measured[:, 0]))]
        return float(pool.scores(best, test=True)[1][0])
    front = np.array([pool.scores(seen[n], test=True)[1] for n in nondominated(measured)])
    return hypervolume(-front, (0.0,) * front.shape[1])


def train_more(work: Path, demo: Path) -> None:
    """Link the demo's models and train the fourth and fifth expert."""
    models = work / "models"
    models.mkdir(parents=True, exist_ok=True)
    for name in ("base", *demo_pool.SKILLS):
        if not (models / name).exists():
            (models / name).symlink_to((demo / "models" / name).resolve())
    if not (work / "fitness").exists():
        (work / "fitness").symlink_to((demo / "fitness").resolve())
    more = work / "more"
    wanted = {"reverse2": "reverse", "sort2": "sort"}
    if not all((models / name).exists() for name in wanted):
        more.mkdir(exist_ok=True)
        if not (more / "base").exists():
            (more / "base").symlink_to((demo / "models" / "base").resolve())
        training = demo_pool.Training(seed=2, expert_steps=60)
        for name, skill in wanted.items():
            demo_pool.train_one(more, skill, training, lambda *_: None)
            (models / name).symlink_to((more / skill).resolve())


def fits(case: Case, entry: str) -> bool:
    """Return whether a searcher is for a case."""
    found = find_searcher(ENTRIES[entry][0])
    if case.objectives == 1:
        return found.single_objective and entry != "mergenetic"
    return entry != "mergenetic-1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, report everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("demo", type=Path, help="folder of `evomerge demo`")
    parser.add_argument("--work", type=Path, default=Path("real-pools"))
    parser.add_argument("--budget", type=int, default=60, help="trials of each search")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--searchers", nargs="+", choices=list(ENTRIES), default=list(ENTRIES))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--report", action="store_true", help="of finished searches; run nothing")
    parser.add_argument("--markdown", type=Path, help="write the table")
    parser.add_argument("--plot", type=Path, help="draw scores over trials (.png, .svg)")
    parser.add_argument("--lines", nargs="+", choices=list(ENTRIES), default=LINES, metavar="NAME",
                        help="searchers in the plot")  # fmt: skip
    given = parser.parse_args(arguments)
    results = given.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    train_more(given.work, given.demo)
    cases = [case for case in CASES if case.name in given.cases]
    pools: dict[str, Pool] = {}
    for seed in () if given.report else given.seeds:
        for case in cases:
            for entry in given.searchers:
                path = results / f"{case.name}-{entry}-{given.budget}-{seed}.json"
                if path.exists() or not fits(case, entry):
                    continue
                if case.name not in pools:
                    pools[case.name] = Pool(case, given.work)
                begun = time.perf_counter()
                try:
                    run = search(pools[case.name], entry, seed, given.budget)
                except EvomergeError as error:
                    print(f"{case.name}, {entry}: not compared: {error}", file=sys.stderr)
                    continue
                path.write_text(json.dumps(asdict(run)) + "\n")
                line = f"{case.name}, {entry}, seed {seed}: {run.score:.3f}"
                print(line, f"({time.perf_counter() - begun:.0f} s)", file=sys.stderr, flush=True)
    runs = [read(path) for path in sorted(results.glob(f"*-{given.budget}-*.json"))]
    runs = [run for run in runs if run.case in given.cases and run.budget == given.budget]
    if not runs:
        sys.exit(f"nothing was searched with {given.budget} trials yet")
    names = [case.name for case in CASES]
    text = table(runs, names, list(ENTRIES))
    print(text)
    if given.markdown is not None:
        given.markdown.write_text(text + "\n")
    if given.plot is not None:
        plot(runs, names, given.lines, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
