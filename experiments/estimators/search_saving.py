"""Full search against estimated search: what is lost, what is saved.

The studies run as `evomerge run` runs them, on the models of a demo project: the base, three
experts, a coefficient per layer and expert, CMA-ES on the mean of the three skills. The full
search scores every trial on all search items; the others score few and estimate the rest. All
re-score the same number of finalists on validation items. What each chooses is compared on test
items that no search has seen. A study that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from evomerge import launch
from evomerge.config import load
from evomerge.fitness.irt.bank_fit import Responses, fit_bank
from evomerge.fitness.splits import ItemSplit, split_items
from evomerge.prepare import Prepared, prepare
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Job, Score
from evomerge.worker import ModelWorker, ModelWorkerFactory

SKILLS = ("reverse", "sort", "shift")
OBJECTIVE = "skills"
#: Of all three skills together.
SEARCH_ITEMS, VALIDATION_ITEMS = 1020, 600
#: Items of a skill from this one on are test items; the bank knows those before it.
FIRST_TEST_ITEM = 670
FINALISTS = 5
#: Random merges of the matrix that the bank is fitted to, beside base and experts.
BANK_MERGES = 100
#: Estimators by what they are called here: the study file's name and the items. ``default`` is the
#: study file's ``auto``, with the trials that it scores in full; it has 60 items, whatever --sizes.
VARIANTS: Mapping[str, tuple[str, str]] = {
    "mean": ("mean", "random"),
    "published": ("gmpirt", "random"),
    "ours": ("soft_reg", "stratified"),
    "ours-optimal": ("soft_reg", "value_optimal_margins"),
    "default": ("auto", "value_optimal_margins"),
}
DEFAULT_ITEMS = 60


@dataclass(frozen=True, slots=True)
class Run:
    """One finished study.

    Attributes:
        variant: ``full`` or one of ``VARIANTS``.
        items: of a trial.
        seed: of the study and of its split.
        test: score of the chosen merge on the test items, share.
        validation: on the validation items, share.
        search: item evaluations of the search itself.
        endpoints: of base, experts and their average on the search items.
        bank: of the item bank's random merges on the search items.
        finalists: of the finalists and baselines on the validation items.
        uniform: test score of the uniform average, share.
    """

    variant: str
    items: int
    seed: int
    test: float
    validation: float
    search: int
    endpoints: int
    bank: int
    finalists: int
    uniform: float

    @property
    def all(self) -> int:
        """Every item evaluation before the test."""
        return self.search + self.endpoints + self.bank + self.finalists


class Remembering:
    """A worker that is asked by all studies of this process and scores nothing twice.

    It changes what the experiment takes, not what the studies count: their journals know only
    what they asked for.
    """

    def __init__(self, factory: ModelWorkerFactory) -> None:
        self._worker = ModelWorker(factory)
        self._known: dict[str, tuple[dict[str, float], dict[str, float]]] = {}

    def describe(self) -> Mapping[str, str]:
        """Return the worker's own facts."""
        return self._worker.describe()

    def run(self, job: Job) -> Evaluation:
        """Return the scores of a job of one objective."""
        (ids,) = job.items
        scores, margins = self._known.setdefault(job.recipe.digest, ({}, {}))
        missing = tuple(item for item in ids if item not in scores)
        seconds: Mapping[str, float] = {}
        if missing:
            found = self._worker.run(replace(job, items=(missing,)))
            (fresh,) = found.scores
            scores.update(zip(missing, fresh.items, strict=True))
            margins.update(zip(missing, fresh.margins, strict=bool(fresh.margins)))
            seconds = found.seconds
        items = tuple(scores[item] for item in ids)
        graded = tuple(margins[item] for item in ids) if margins else ()
        return Evaluation((Score(float(np.mean(items)), 0.0, items, graded),), seconds)


@dataclass(frozen=True)
class Shared:
    """Gives all studies with the same models and tasks the same worker."""

    factory: ModelWorkerFactory
    workers: dict[ModelWorkerFactory, Remembering]

    def __call__(self) -> Remembering:
        """Return the worker, built when it is first needed."""
        if self.factory not in self.workers:
            self.workers[self.factory] = Remembering(self.factory)
        return self.workers[self.factory]


def study_text(name: str, variant: str, items: int, seed: int, trials: int, partition: str) -> str:
    """Return the study file of a run."""
    fitness: dict[str, Any] = {
        "tasks": [OBJECTIVE],
        "include_path": "fitness",
        "items": {"search": SEARCH_ITEMS, "validation": VALIDATION_ITEMS, "test": 1},
        "batch_size": 128,
        "estimator": "none",
    }
    if variant == "default":
        fitness["estimator"] = "auto"
    elif variant != "full":
        estimator, design = VARIANTS[variant]
        fitness["estimator"] = {
            "name": estimator, "design": design, "items": items, "full_every": None,
            "banks": {OBJECTIVE: "bank.npz"} if estimator == "gmpirt" else {},
        }  # fmt: skip
    return yaml.safe_dump(
        {
            "name": name,
            "seed": seed,
            "models": {
                "base": "models/base",
                "experts": {skill: f"models/{skill}" for skill in SKILLS},
            },
            "space": {
                "method": "task_arithmetic",
                "partition": partition,
                "parameters": {"weight": {"low": 0.0, "high": 1.5}},
            },
            "fitness": fitness,
            "search": {
                "searcher": "cma", "trials": trials, "finalists": FINALISTS, "parallel": 1
            },
            "baselines": {"task_arithmetic": []},
            "pool": {"kind": "serial", "workers": 1, "device": "cpu"},
            "tracking": {"enabled": False},
        },
        sort_keys=False,
    )  # fmt: skip


def split(ids: Sequence[str], seed: int) -> ItemSplit:
    """Return search and validation items of a seed, and the test items, which all seeds share."""
    early = [item for item in ids if int(item.rpartition("/")[2]) < FIRST_TEST_ITEM]
    drawn = split_items(early, SEARCH_ITEMS, VALIDATION_ITEMS, 0, seed, OBJECTIVE)
    return replace(drawn, test=tuple(item for item in ids if item not in set(early)))


def run(
    out: Path, variant: str, items: int, seed: int, trials: int, partition: str,
    workers: dict[ModelWorkerFactory, Remembering],
) -> Run:  # fmt: skip
    """Run one study, or read what it found if it is finished."""
    name = f"{variant}-{items}-seed{seed}"
    result = out / "results" / f"{name}.json"
    if result.exists():
        return Run(**json.loads(result.read_text()))
    path = out / f"{name}.yaml"
    path.write_text(study_text(name, variant, items, seed, trials, partition))
    prepared = prepare(load(path), path)
    (ids,) = prepared.tasks.item_ids
    prepared = replace(
        prepared,
        splits=(split(ids, seed),),
        factory=cast(Any, Shared(prepared.factory, workers)),  # it is only called
    )
    found = launch.run(prepared, [])
    row = summary(found.view, prepared, variant, items, seed)
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(asdict(row)) + "\n")
    return row


def summary(view: StudyView, prepared: Prepared, variant: str, items: int, seed: int) -> Run:
    """Return the figures of a finished study."""
    spent = view.spending
    assert view.knee is not None
    labels = {trial.label: trial.number for trial in view.baselines}
    held_out = sum(len(one.scores[0].items) for one in view.validation.values())
    banks = BANK_MERGES * SEARCH_ITEMS if variant == "published" else 0
    (uniform,) = [number for label, number in labels.items() if label.startswith("uniform")]
    return Run(
        variant, items, seed,
        view.test[view.knee].values[0], view.validation[view.knee].values[0],
        spent.search, spent.baselines, banks, held_out, view.test[uniform].values[0],
    )  # fmt: skip


def write_bank(matrix: Path, out: Path) -> None:
    """Fit the item bank of the published estimator to random merges of the matrix."""
    with np.load(matrix, allow_pickle=False) as file:
        scores, roles = file["scores"].astype(np.float64), file["roles"].astype(str)
        names, items = file["names"].astype(str), file["items"].astype(str)
    rows = [*np.flatnonzero(roles != "merge"), *np.flatnonzero(roles == "merge")[:BANK_MERGES]]
    ids = tuple(f"skills_{item}" for item in items.tolist())
    bank = fit_bank(Responses(tuple(names[rows].tolist()), ids, scores[rows]))
    bank.save(out)


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean and a 90 % bootstrap interval over the seeds."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (5000, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.05, 0.95])
    return float(values.mean()), float(low), float(high)


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each variant and size, compared with the full search of the same seeds."""
    full = {one.seed: one for one in runs if one.variant == "full"}
    rows = []
    for key in dict.fromkeys((one.variant, one.items) for one in runs):
        same = [one for one in runs if (one.variant, one.items) == key and one.seed in full]
        if not same:
            continue
        losses = np.array([100 * (full[one.seed].test - one.test) for one in same])
        searched = np.array([full[one.seed].search / one.search for one in same])
        whole = np.array([full[one.seed].all / one.all for one in same])
        rows.append(
            {
                "variant": key[0], "items": key[1], "seeds": len(same),
                "test": 100 * float(np.mean([one.test for one in same])),
                "loss": interval(losses),
                "search": float(np.mean([one.search for one in same])),
                "endpoints": float(np.mean([one.endpoints for one in same])),
                "bank": float(np.mean([one.bank for one in same])),
                "finalists": float(np.mean([one.finalists for one in same])),
                "factor": float(searched.mean()), "factor_all": float(whole.mean()),
                "uniform": 100 * float(np.mean([one.uniform for one in same])),
            }
        )  # fmt: skip
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "| search | items of a trial | seeds | test score | loss, points [90 %] | search items "
        "| endpoints | bank | finalists | factor, search | factor, all |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, low, high = row["loss"]
        # Of one seed there is no interval.
        spread = f" [{low:+.1f}, {high:+.1f}]" if row["seeds"] > 1 else ""
        loss = "" if row["variant"] == "full" else f"{mean:+.1f}{spread}"
        lines.append(
            f"| {row['variant']} | {row['items']} | {row['seeds']} | {row['test']:.1f} | {loss} "
            f"| {row['search']:,.0f} | {row['endpoints']:,.0f} | {row['bank']:,.0f} "
            f"| {row['finalists']:,.0f} | {row['factor']:.0f} | {row['factor_all']:.1f} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss against saving."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for number, name in enumerate(VARIANTS):
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["items"])
        if not own:
            continue
        loss = np.array([row["loss"] for row in own])
        factors = np.array([row["factor"] for row in own])
        spread = np.maximum(np.abs(loss[:, 1:].T - loss[:, 0]), 0.0)
        shifted = factors * (1 + 0.03 * (number - 1))  # so that intervals do not hide each other
        label = f"{name} ({', '.join(VARIANTS[name])})"
        axis.errorbar(shifted, loss[:, 0], spread, label=label, marker="o", capsize=3)
    axis.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
    axis.axvline(50.0, color="grey", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    axis.set_xlabel("times fewer item evaluations in the search")
    axis.set_ylabel("loss on test items, points (90 % interval over seeds)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def link(project: Path, out: Path) -> None:
    """Let the studies in ``out`` find models and tasks of the project, which is only read."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("models", "fitness"):
        if not (out / name).exists():
            (out / name).symlink_to((project / name).resolve(), target_is_directory=True)


def main() -> None:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("project", type=Path, help="folder of `evomerge demo`")
    parser.add_argument("--out", type=Path, default=Path("search-saving"), help="of all studies")
    parser.add_argument("--matrix", type=Path, help="of make_matrix.py, for the published bank")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--variants", nargs="+", default=["full", *VARIANTS])
    parser.add_argument("--sizes", type=int, nargs="+", default=[20], help="items of a trial")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--partition", default="layer", help="what has a coefficient per expert")
    parser.add_argument("--report", action="store_true", help="of finished studies; run nothing")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    unknown = sorted(set(given.variants) - {"full", *VARIANTS})
    if unknown:
        parser.error(f"--variants: choose from full, {', '.join(VARIANTS)}; got {unknown[0]}")
    link(given.project, given.out)
    bank = given.out / "bank.npz"
    if "published" in given.variants and not given.report and not bank.exists():
        if given.matrix is None:
            parser.error("--matrix: the published estimator needs random merges for its item bank")
        write_bank(given.matrix, bank)
    workers: dict[ModelWorkerFactory, Remembering] = {}
    for seed in () if given.report else given.seeds:
        for variant in given.variants:
            sizes = {"full": [SEARCH_ITEMS], "default": [DEFAULT_ITEMS]}
            for items in sizes.get(variant, given.sizes):
                one = run(given.out, variant, items, seed, given.trials, given.partition, workers)
                print(
                    f"seed {seed}: {variant} {items}: {100 * one.test:.1f}, {one.search} search "
                    "item evaluations",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    files = sorted((given.out / "results").glob("*.json"))
    runs = [Run(**json.loads(file.read_text())) for file in files]
    order = ["full", *VARIANTS]
    rows = table(sorted(runs, key=lambda one: (order.index(one.variant), one.items, one.seed)))
    print(markdown(rows))
    if given.markdown:
        given.markdown.write_text(markdown(rows) + "\n")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    if given.plot:
        draw(rows, given.plot)


if __name__ == "__main__":
    main()
