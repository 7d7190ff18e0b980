"""M2N2 on scikit-learn's digits: the paper's two experiments in what runs in minutes.

    python experiments/m2n2_digits/m2n2_digits.py --part pretrained --seeds 10
    python experiments/m2n2_digits/m2n2_digits.py --part scratch --seeds 5

Prints a table of test accuracies with 95 % intervals over the seeds; ``--out`` appends one JSON
line per run, and a run that is there is not repeated. Every searcher is the registered one; only
MAP-Elites, which evomerge does not have, is a loop in this file.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.search.protocol import SearchProblem, Told, WarmPoint
from evomerge.search.registry import make_searcher

Array = NDArray[np.float64]
F32 = NDArray[np.float32]

#: The paper's mutation and initial scale of random models.
NOISE = 0.01
#: Weights of models from scratch, and coefficients of merges, are searched between these.
WEIGHT, COEFFICIENT = (-2.0, 2.0), (-0.5, 2.5)

#: Test accuracy read off the paper's figure, in percent: scratch after 50,000 evaluations of
#: 19,210 weights; pre-trained after 10,000.
PUBLISHED = {
    "scratch": {"M2N2": "87", "CMA-ES": "86", "GA": "68", "MAP-Elites": "60"},
    "pretrained": {
        "M2N2": "68.3", "without attraction": "66.3", "MAP-Elites": "62.4",
        "without split": "57.8", "brute force": "57.8", "GA": "52",
    },
}  # fmt: skip


class Digits:
    """The task: 64-H-10 perceptrons as flat float32 vectors W1, b1, W2, b2.

    Attributes:
        size: number of weights.
        rows: weights of each row of each tensor, in order; together ``size``.
    """

    def __init__(self, hidden: int) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        cut = int(0.8 * len(x))  # the first 80 % in file order, as in the published code
        self.hidden = hidden
        self.train = x[:cut].astype(np.float32), y[:cut]
        self.test = x[cut:].astype(np.float32), y[cut:]
        self.rows = (*(hidden,) * 64, hidden, *(10,) * hidden, 10)
        self.size = sum(self.rows)

    def right(self, weights: Array | F32, data: tuple[F32, NDArray[np.int64]]) -> Array:
        """Return 1 for each image that is read rightly, else 0 [I]."""
        w = np.asarray(weights, np.float32)
        h, at = self.hidden, 64 * self.hidden
        hidden = np.maximum(data[0] @ w[:at].reshape(64, h) + w[at : at + h], 0.0)
        logits = hidden @ w[at + h : -10].reshape(h, 10) + w[-10:]
        return np.asarray(logits.argmax(axis=1) == data[1], np.float64)

    def expert(self, digits: range, seed: int) -> F32:
        """Return a model of some digits: ten full-batch steps of Adam from a random start."""
        import torch

        keep = np.isin(self.train[1], list(digits))
        x, y = (torch.from_numpy(part[keep]) for part in self.train)
        start = np.random.default_rng(seed).standard_normal(self.size) * NOISE
        w = torch.tensor(start, dtype=torch.float32, requires_grad=True)
        adam = torch.optim.Adam([w], lr=0.003)
        h, at = self.hidden, 64 * self.hidden
        for _ in range(10):
            hidden = torch.relu(x @ w[:at].reshape(64, h) + w[at : at + h])
            logits = hidden @ w[at + h : -10].reshape(h, 10) + w[-10:]
            adam.zero_grad()
            torch.nn.functional.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
            adam.step()
        return w.detach().numpy().copy()


@dataclass(frozen=True)
class Setting:
    """What is searched: a box, and the model at each of its points."""

    problem: SearchProblem
    weights: Callable[[Array], Array]


def box(values: Array, limits: tuple[float, float]) -> tuple[float, ...]:
    return tuple(((values - limits[0]) / (limits[1] - limits[0])).tolist())


def from_scratch(digits: Digits, evaluations: int, seed: int) -> tuple[Setting, list[Array]]:
    """Every weight is a dimension of its own; two random models to start from."""
    rng = np.random.default_rng([seed, 1])
    models = [rng.standard_normal(digits.size) * NOISE for _ in range(2)]
    low, high = WEIGHT
    problem = SearchProblem(
        digits.size, 1, evaluations, 1, seed,
        warm=tuple(WarmPoint(box(model, WEIGHT), (0.0,)) for model in models),
        ranges=(WEIGHT,) * digits.size, grams=(((1.0,),),) * digits.size,
    )  # fmt: skip
    return Setting(problem, lambda x: low + x * (high - low)), models


def pair_of(digits: Digits, seed: int) -> list[Array]:
    """Return an expert of the digits 0 to 4 and one of 5 to 9."""
    return [
        digits.expert(part, 1000 * seed + number).astype(np.float64)
        for number, part in enumerate((range(5), range(5, 10)))
    ]


def pretrained(
    digits: Digits, evaluations: int, seed: int, pair: list[Array] | None
) -> tuple[Setting, list[Array]]:
    """Two coefficients per row of a given pair of experts, or of a new pair for every seed."""
    models = pair or pair_of(digits, seed)
    return merged(digits, models, digits.rows, evaluations, seed), models


def read_pair(path: Path, size: int) -> list[Array]:
    """Return the two arrays [size] of an .npz file."""
    with np.load(path) as file:
        models = [np.asarray(file[name], np.float64) for name in sorted(file.files)]
    if [model.shape for model in models] != [(size,)] * 2:
        shapes = ", ".join(str(model.shape) for model in models)
        raise SystemExit(f"{path}: two arrays of {size} weights are wanted, here are {shapes}")
    return models


def merged(
    digits: Digits, models: list[Array], blocks: tuple[int, ...], evaluations: int, seed: int,
    limits: tuple[float, float] = COEFFICIENT,
) -> Setting:  # fmt: skip
    """Merges of two models with two coefficients in each block of weights."""
    pieces = np.split(np.stack(models), np.cumsum(blocks)[:-1], axis=1)
    grams = tuple(tuple(map(tuple, (piece @ piece.T).tolist())) for piece in pieces)
    low, high = limits
    warm = tuple(
        WarmPoint(box(np.tile(np.eye(2)[k], len(blocks)), limits), (0.0,), f"expert:{k}")
        for k in range(2)
    )
    problem = SearchProblem(
        2 * len(blocks), 1, evaluations, 1, seed, warm=warm,
        groups=tuple((f"weight.{k}", str(b)) for b in range(len(blocks)) for k in range(2)),
        ranges=(limits,) * (2 * len(blocks)), grams=grams,
    )  # fmt: skip

    def weights(x: Array) -> Array:
        table = np.repeat((low + x * (high - low)).reshape(-1, 2), blocks, axis=0)
        return np.asarray(table[:, 0] * models[0] + table[:, 1] * models[1])

    return Setting(problem, weights)


def search(digits: Digits, setting: Setting, name: str, arguments: dict[str, object]) -> Array:
    """Return the model with the best training accuracy of all that were tried."""
    searcher = make_searcher(name, arguments, setting.problem)
    best, model = -1.0, np.zeros(digits.size)
    for _ in range(setting.problem.budget):
        (candidate,) = searcher.ask(1)
        weights = setting.weights(np.array(candidate.x))
        right = digits.right(weights, digits.train)
        if right.mean() > best:
            best, model = float(right.mean()), weights
        items = (tuple(right.tolist()),)
        searcher.tell([Told(candidate.id, (-float(right.mean()),), items=items)])
    return model


def on_arc(one: Array, two: Array, t: Array | float) -> Array:
    """Slerp with one angle, as the published code has it."""
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    if np.sin(angle) <= 1e-6:
        return np.asarray((1.0 - t) * one + t * two)
    return np.asarray((np.sin((1.0 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle))


def map_elites(
    digits: Digits, models: list[Array], evaluations: int, seed: int, noise: float
) -> Array:
    """A 10 x 10 archive over the accuracies on odd and even digits, as the paper compares with."""
    rng = np.random.default_rng([seed, 2])
    odd = digits.train[1] % 2 == 1
    cells: dict[tuple[int, int], tuple[float, Array]] = {}

    def place(weights: Array) -> None:
        right = digits.right(weights, digits.train)
        cell = (int(right[odd].mean() * 10), int(right[~odd].mean() * 10))
        if cell not in cells or right.mean() > cells[cell][0]:
            cells[cell] = (float(right.mean()), weights)

    for model in models:
        place(model)
    for _ in range(evaluations - len(models)):
        members = list(cells.values())
        quality = np.array([accuracy for accuracy, _ in members])
        enough = np.count_nonzero(quality) >= 2
        pair = rng.choice(len(members), 2, replace=not enough, p=quality / quality.sum())
        w, split = rng.random(), rng.integers(digits.size)
        t = np.where(np.arange(digits.size) < split, w, 1.0 - w)
        child = on_arc(members[int(pair[0])][1], members[int(pair[1])][1], t)
        place(child + noise * rng.standard_normal(digits.size))
    return max(cells.values(), key=lambda member: member[0])[1]


def brute_force(digits: Digits, models: list[Array], evaluations: int) -> Array:
    """The best of an even grid of one t for all weights."""
    tried = [on_arc(models[0], models[1], t) for t in np.linspace(0.0, 1.0, evaluations)]
    return max(tried, key=lambda weights: digits.right(weights, digits.train).mean())


def contenders(
    part: str, evaluations: int, pair: list[Array] | None = None, ties: str = "oldest"
) -> dict[str, Callable[[Digits, int], Array]]:
    """Return what is compared, as functions of task and seed.

    Args:
        part: ``scratch`` or ``pretrained``.
        evaluations: of each search.
        pair: of experts, fixed; None for another one for every seed.
        ties: of M2N2: ``oldest`` or ``place``.
    """
    scratch = part == "scratch"

    def start(digits: Digits, evaluations: int, seed: int) -> tuple[Setting, list[Array]]:
        if scratch:
            return from_scratch(digits, evaluations, seed)
        return pretrained(digits, evaluations, seed, pair)

    width = WEIGHT[1] - WEIGHT[0]
    noise = NOISE if scratch else 0.0
    m2n2: dict[str, object] = {
        "archive": 20, "mixing": "one_angle", "mutation": noise / width, "warmup": 0,
        "ties": ties,
    }  # fmt: skip

    def registered(name: str, **arguments: object) -> Callable[[Digits, int], Array]:
        return lambda digits, seed: search(
            digits, start(digits, evaluations, seed)[0], name, arguments
        )

    def chunks(digits: Digits, seed: int) -> Array:
        even = np.diff(np.linspace(0, digits.size, 17).astype(int)).tolist()
        models = start(digits, evaluations, seed)[1]
        setting = merged(digits, models, tuple(even), evaluations, seed, (0.0, 1.0))
        # From the middle of the box, which is the average, not from one of the experts.
        middle = replace(setting.problem, warm=())
        return search(digits, replace(setting, problem=middle), "cma", {"population": 20})

    def elites(digits: Digits, seed: int) -> Array:
        models = start(digits, evaluations, seed)[1]
        return map_elites(digits, models, evaluations, seed, noise)

    shared = {
        "M2N2": registered("m2n2", **m2n2),
        "GA": registered("m2n2", **m2n2, alpha=0.0, attraction=False),
        "MAP-Elites": elites,
    }
    if scratch:
        sigma = NOISE / width
        return {**shared, "CMA-ES": registered("cma", sigma=sigma, population=20, diagonal=True)}
    return {
        **shared,
        "without attraction": registered("m2n2", **m2n2, attraction=False),
        "without split": registered("m2n2", **m2n2, split=False),
        "linear": registered("m2n2", **{**m2n2, "mixing": "linear"}),
        "two angles": registered("m2n2", **{**m2n2, "mixing": "two_angles"}),
        "brute force": lambda digits, seed: brute_force(
            digits, start(digits, evaluations, seed)[1], evaluations
        ),
        "CMA, 16 chunks": chunks,
    }


def interval(values: list[float]) -> str:
    """Return mean and 95 % interval (Student's t) in percent."""
    from scipy.stats import t

    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f}"
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.1f} ± {100 * float(half):.1f}"


@dataclass(frozen=True, slots=True)
class Run:
    """One search.

    Attributes:
        part: of the experiment.
        name: of the contender.
        seed: of models and searcher.
        evaluations: models that were tried.
        hidden: width of the perceptrons.
        train: accuracy of the best model, share.
        test: on the test images.
        seconds: that it took.
        pair: of experts: a file's name, or the seed of the one pair; empty for a pair per seed.
            Behind it which of level members went, where it was not the oldest.
    """

    part: str
    name: str
    seed: int
    evaluations: int
    hidden: int
    train: float
    test: float
    seconds: float
    pair: str = ""

    @property
    def key(self) -> tuple[str, str, int, int, int, str]:
        """What makes it another run."""
        return (self.part, self.name, self.seed, self.evaluations, self.hidden, self.pair)


def table(part: str, runs: list[Run]) -> str:
    """Return accuracies per contender, best first, and what M2N2 is ahead by, paired by seed."""
    found = {name: [run for run in runs if run.name == name] for name in {r.name: 0 for r in runs}}
    m2n2 = {run.seed: run for run in found.get("M2N2", [])}
    lines = [f"| {part} | seeds | train | test | M2N2 ahead, train | test | published test |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, own in sorted(found.items(), key=lambda one: -np.mean([run.test for run in one[1]])):
        pairs = [(m2n2[run.seed], run) for run in own if run.seed in m2n2 and name != "M2N2"]
        train = interval([one.train - other.train for one, other in pairs]) if pairs else ""
        test = interval([one.test - other.test for one, other in pairs]) if pairs else ""
        lines.append(
            f"| {name} | {len(own)} | {interval([run.train for run in own])} "
            f"| {interval([run.test for run in own])} | {train} | {test} "
            f"| {PUBLISHED[part].get(name, '–')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("scratch", "pretrained"), default="pretrained")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, help="default 5000 scratch, 2000 pretrained")
    parser.add_argument("--hidden", type=int, help="default 32 scratch, 256 pretrained")
    pairs = parser.add_mutually_exclusive_group()
    pairs.add_argument("--pair", type=int, metavar="SEED", help="one pair of experts for all seeds")
    pairs.add_argument("--experts", type=Path, help=".npz with the weights of two, for all seeds")
    parser.add_argument(
        "--ties", choices=("oldest", "place"), default="oldest",
        help="which of level members M2N2 drops; place: as in the published code",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", help="some contenders")
    parser.add_argument("--out", type=Path, help="append one JSON line per run; go on from there")
    given = parser.parse_args()
    scratch = given.part == "scratch"
    evaluations = given.evaluations or (5000 if scratch else 2000)
    digits = Digits(given.hidden or (32 if scratch else 256))
    pair, label = None, ""
    if given.experts:
        pair, label = read_pair(given.experts, digits.size), given.experts.name
    elif given.pair is not None:
        pair, label = pair_of(digits, given.pair), str(given.pair)
    if given.ties != "oldest":
        label += f" ties: {given.ties}"
    runs: list[Run] = []
    if given.out and given.out.exists():
        known = [Run(**json.loads(line)) for line in given.out.read_text().splitlines()]
        same = (given.part, evaluations, digits.hidden, label)
        runs = [run for run in known if (run.part, run.evaluations, run.hidden, run.pair) == same]
    done = {run.key for run in runs}
    choice = contenders(given.part, evaluations, pair, given.ties)
    # Seeds outermost, so that it may be stopped at any time.
    for seed in range(given.seeds):
        for name, search_model in choice.items():
            run_key = (given.part, name, seed, evaluations, digits.hidden, label)
            if run_key in done or (given.only and name not in given.only):
                continue
            began = time.perf_counter()
            model = search_model(digits, seed)
            seconds = round(time.perf_counter() - began, 1)
            train, test = (
                float(digits.right(model, data).mean()) for data in (digits.train, digits.test)
            )
            runs.append(Run(*run_key[:-1], train, test, seconds, label))
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(asdict(runs[-1])) + "\n")
    print(table(given.part, [run for run in runs if not given.only or run.name in given.only]))


if __name__ == "__main__":
    main()
