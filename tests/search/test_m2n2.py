"""M2N2: tables against weights, the plain genetic algorithm inside it, and what may join."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.search.m2n2 import M2N2Searcher
from evomerge.search.protocol import Candidate, SearchProblem, Told, WarmPoint
from evomerge.search.registry import check_arguments, make_searcher
from evomerge.testing import Judge, SearcherConformance, asked, drive, sphere

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

EXPERTS, SIZES = 3, (5, 40, 17, 3, 60, 25, 8, 30)
BLOCKS = len(SIZES)
LOW, HIGH = -1.0, 4.0


def columns(count: int = EXPERTS, blocks: int = BLOCKS) -> tuple[tuple[str, str], ...]:
    return tuple((f"weight.e{k}", f"block.{b}") for b in range(blocks) for k in range(count))


def build(problem: SearchProblem, **arguments: object) -> M2N2Searcher:
    return M2N2Searcher(problem, check_arguments("m2n2", arguments))


class Models:
    """Expert vectors, of which candidates are judged by how they answer 64 yes-or-no items."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.experts = rng.normal(size=(EXPERTS, sum(SIZES))).astype(np.float32)
        self.tests = rng.normal(size=(64, sum(SIZES))).astype(np.float32)

    def problem(self, budget: int) -> SearchProblem:
        pieces = np.split(self.experts.astype(np.float64), np.cumsum(SIZES)[:-1], axis=1)
        grams = tuple(tuple(map(tuple, (one @ one.T).tolist())) for one in pieces)
        warm = []
        for k in range(EXPERTS):
            dense = np.tile(np.eye(EXPERTS)[k], BLOCKS)
            x = tuple(((dense - LOW) / (HIGH - LOW)).tolist())
            warm.append(WarmPoint(x, (0.0,), f"expert:e{k}"))
        dimension = BLOCKS * EXPERTS
        return SearchProblem(
            dimension, 1, budget, 4, 11, tuple(warm), columns(),
            ranges=((LOW, HIGH),) * dimension, grams=grams,
        )  # fmt: skip

    def weights(self, x: tuple[float, ...]) -> F32:
        table = (LOW + np.array(x) * (HIGH - LOW)).reshape(BLOCKS, EXPERTS).astype(np.float32)
        dense = np.repeat(table, SIZES, axis=0)
        return np.asarray((dense * self.experts.T).sum(axis=1), np.float32)

    def items(self, weights: F32) -> tuple[tuple[float, ...], ...]:
        right = self.tests @ weights > 2.0
        return (tuple(map(float, right[:32])), tuple(map(float, right[32:])))

    def judge(self, candidate: Candidate) -> Told:
        items = self.items(self.weights(candidate.x))
        return Told(candidate.id, (-float(np.mean(items[0])),), items=items)


def slerp(one: F32, two: F32, t: float, angle: float) -> F32:
    if angle == 0.0:
        return np.asarray(np.float32(1 - t) * one + np.float32(t) * two, np.float32)
    p, q = np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)
    return np.asarray(np.float32(p) * one + np.float32(q) * two, np.float32)


def angle(one: F32, two: F32) -> float:
    if not one.size:
        return 0.0
    x, y = one.astype(np.float64), two.astype(np.float64)
    return float(np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1)))


@pytest.mark.parametrize("mixing", ["linear", "one_angle", "two_angles"])
def test_tables_equal_a_replay_of_the_genealogy_on_weights(mixing: str) -> None:
    """Float32 weights crossed generation by generation, angles taken from the weights."""
    models = Models(len(mixing))
    searcher = build(models.problem(200), mixing=mixing)
    calls = drive(searcher, models.judge, 200, 4, order=0)
    candidates = {one.id: one for one in asked(calls)}
    edges = np.concatenate([[0], np.cumsum(SIZES)])
    dense: dict[int, F32] = {k: models.experts[k] for k in range(EXPERTS)}
    depth = dict.fromkeys(dense, 0)
    for id_ in range(EXPERTS, 200):
        birth = searcher.lineage[id_]
        one, two = (dense[parent] for parent in birth.parents)
        depth[id_] = 1 + max(depth[parent] for parent in birth.parents)
        cut = edges[birth.split]
        whole = angle(one, two) if mixing == "one_angle" else 0.0
        sides = []
        for side, t in ((slice(0, cut), birth.weight), (slice(cut, None), 1 - birth.weight)):
            own = angle(one[side], two[side]) if mixing == "two_angles" else whole
            sides.append(slerp(one[side], two[side], t, own))
        dense[id_] = np.concatenate(sides)
        assert all(0.0 < value < 1.0 for value in candidates[id_].x)  # none was clipped
    assert max(depth.values()) >= 6
    assert {birth.split for birth in searcher.lineage.values()} == set(range(BLOCKS))
    for id_, candidate in candidates.items():
        scale = np.abs(dense[id_]).max()
        assert np.abs(models.weights(candidate.x) - dense[id_]).max() <= 1e-6 * max(scale, 1.0)


def plain_genetic_algorithm(
    models: Models, budget: int, size: int, seed: int, in_place: bool
) -> list[F64]:
    """Roulette by mean score, split crossover, the worst goes: nothing else."""
    rng = np.random.default_rng(seed)
    tables = [np.tile(np.eye(EXPERTS)[k], (BLOCKS, 1)) for k in range(EXPERTS)]
    scores = [np.mean([np.mean(task) for task in models.items(e)]) for e in models.experts]
    born = []
    for _ in range(budget):
        wheel = np.cumsum(scores)
        pair = [int(np.searchsorted(wheel, rng.random() * wheel[-1], "right")) for _ in range(2)]
        weight, split = rng.random(), int(rng.integers(BLOCKS))
        t = np.where(np.arange(BLOCKS) < split, weight, 1 - weight)[:, None]
        child = (1 - t) * tables[pair[0]] + t * tables[pair[1]]
        born.append(child)
        x = (child.reshape(-1) - LOW) / (HIGH - LOW)
        tables.append(child)
        scores.append(np.mean([np.mean(task) for task in models.items(models.weights(tuple(x)))]))
        if len(tables) > size:
            worst = int(np.argmin(scores))
            if in_place:
                tables[worst], scores[worst] = tables[-1], scores[-1]
                worst = size
            del tables[worst], scores[worst]
    return born


@pytest.mark.parametrize("ties", ["oldest", "place"])
def test_without_competition_and_attraction_it_is_a_plain_genetic_algorithm(ties: str) -> None:
    models = Models(5)
    plain = {"alpha": 0.0, "attraction": False, "archive": 12, "warmup": 0, "ties": ties}
    searcher = build(models.problem(300), **plain)
    calls = drive(searcher, models.judge, 300, 1, order=0)
    expected = plain_genetic_algorithm(models, 300 - EXPERTS, 12, 11, ties == "place")
    for candidate, table in zip(asked(calls)[EXPERTS:], expected, strict=True):
        coefficients = LOW + np.array(candidate.x) * (HIGH - LOW)
        assert coefficients == pytest.approx(table.reshape(-1), abs=1e-9)


def test_competition_and_attraction_change_what_is_born() -> None:
    models = Models(5)
    plain = build(models.problem(60), alpha=0.0, attraction=False)
    for change in ({"alpha": 0.0}, {"attraction": False}):
        other = build(models.problem(60), **change)
        assert drive(plain, models.judge, 60, 1, 0) != drive(other, models.judge, 60, 1, 0)
        plain = build(models.problem(60), alpha=0.0, attraction=False)


def test_niches_keep_members_that_together_solve_more() -> None:
    """Coverage of the archive, over five problems: the point of competing for items."""

    def coverage(alpha: float) -> float:
        found = []
        for seed in range(5):
            models = Models(seed)
            searcher = build(models.problem(300), alpha=alpha)
            drive(searcher, models.judge, 300, 4, order=0)
            rows = np.stack([member.row for member in searcher.archive])
            found.append(rows.max(axis=0).mean())
        return float(np.mean(found))

    assert coverage(1.0) > coverage(0.0)


def test_first_children_are_of_first_members_only() -> None:
    models = Models(2)
    searcher = build(models.problem(40), archive=15)
    drive(searcher, models.judge, 40, 1, order=0)
    parents = [searcher.lineage[id_].parents for id_ in range(40)]
    assert parents[:EXPERTS] == [()] * EXPERTS
    assert all(parent < EXPERTS for pair in parents[EXPERTS:15] for parent in pair)
    assert any(parent >= EXPERTS for pair in parents[15:] for parent in pair)


def test_no_split_mixes_all_blocks_alike() -> None:
    models = Models(2)
    searcher = build(models.problem(30), split=False)
    for candidate in asked(drive(searcher, models.judge, 30, 1, order=0)):
        rows = np.array(candidate.x).reshape(BLOCKS, EXPERTS)
        assert (rows == rows[0]).all()


def test_splits_lie_between_blocks() -> None:
    models = Models(2)
    searcher = build(models.problem(60))
    for candidate in asked(drive(searcher, models.judge, 60, 1, order=0)):
        rows = (LOW + np.array(candidate.x) * (HIGH - LOW)).reshape(BLOCKS, EXPERTS)
        assert rows.sum(axis=1) == pytest.approx(1.0)  # the parents' sums are 1 everywhere


def test_baselines_are_asked_first() -> None:
    models = Models(2)
    problem = models.problem(30)
    searcher = build(problem)
    first = searcher.ask(10)
    assert [one.x for one in first] == [point.x for point in problem.warm]
    assert searcher.ask(1) == ()  # it waits for two members
    searcher.tell([models.judge(one) for one in first])
    assert searcher.ask(1)[0].id == EXPERTS


def test_starts_from_experts_only_where_asked() -> None:
    models = Models(2)
    problem = models.problem(30)
    base = WarmPoint((0.2,) * problem.dimension, (0.0,), "base")
    problem = replace(problem, warm=(base, *problem.warm))
    assert build(problem).ask(9)[0].x == base.x
    only = build(problem, experts_only=True).ask(9)
    assert [one.x for one in only] == [point.x for point in problem.warm[1:]]


def test_failed_and_stopped_results_do_not_join() -> None:
    models = Models(2)
    searcher = build(models.problem(30))
    searcher.tell([models.judge(one) for one in searcher.ask(EXPERTS)])
    one, two, three, four = searcher.ask(4)
    good = models.judge(one)
    searcher.tell(
        [
            replace(good, failed=True),
            replace(models.judge(two), items=()),
            replace(models.judge(three), items=good.items[:1]),
            models.judge(four),
        ]
    )
    assert [member.id for member in searcher.archive] == [*range(EXPERTS), four.id]
    assert searcher.facts()["left out"].startswith("2 results")


def test_item_scores_replace_an_archive_without() -> None:
    models = Models(2)
    searcher = build(models.problem(30))
    one, two, three = searcher.ask(3)
    searcher.tell([replace(models.judge(one), items=())])
    searcher.tell([models.judge(two), models.judge(three)])
    assert [member.id for member in searcher.archive] == [two.id, three.id]


def test_costs_count_the_other_way_round() -> None:
    """Items where smaller is better: the archive keeps those with small ones."""

    def judge(candidate: Candidate) -> Told:
        cost = float(np.abs(np.array(candidate.x) - 0.4).mean())
        return Told(candidate.id, (cost,), items=((cost,) * 3,))

    problem = SearchProblem(4, 1, 200, 2, 0, item_weights=(-1.0,))
    searcher = build(problem)
    results = [
        result.losses[0] for call in drive(searcher, judge, 200, 2, 0) for result in call.told
    ]
    assert np.mean(results[-40:]) < 0.7 * np.mean(results[:10])
    assert max(-member.row[0] for member in searcher.archive) < np.median(results[:10])


def test_a_task_without_weight_does_not_count() -> None:
    def judge(candidate: Candidate) -> Told:
        return Told(candidate.id, (0.0,), items=((candidate.x[0],), (1 - candidate.x[0],)))

    for weights, better in (((1.0, 0.0), 1.0), ((0.0, 1.0), 0.0)):
        problem = SearchProblem(3, 1, 150, 1, 3, item_weights=weights)
        calls = drive(build(problem), judge, 150, 1, 0)
        late = np.mean([one.x[0] for one in asked(calls)[-40:]])
        assert abs(late - better) < 0.25


def test_mutation_leaves_the_span_of_the_parents() -> None:
    point = WarmPoint((0.5, 0.5), (0.0,))
    problem = SearchProblem(2, 1, 60, 1, 0, (point, point))
    judge: Judge = lambda one: Told(one.id, (0.0,), items=((1.0, 1.0),))  # noqa: E731
    still = asked(drive(build(problem), judge, 60, 1, 0))
    assert {one.x for one in still} == {(0.5, 0.5)}
    moved = np.array(
        [one.x for one in asked(drive(build(problem, mutation=0.01), judge, 60, 1, 0))]
    )
    assert 0.005 < moved[:, 0].std() < 0.1


def test_slerp_without_inner_products_says_what_to_do() -> None:
    with pytest.raises(
        InputError, match=r"mixing: one_angle needs inner products.*or use mixing: linear"
    ):
        make_searcher("m2n2", {"mixing": "one_angle"}, SearchProblem(2, 1, 10, 1, 0))


def test_shapes_of_the_geometry_are_checked() -> None:
    problem = Models(0).problem(10)
    with pytest.raises(ValueError, match=r"ranges: expected \[24, 2\]"):
        build(replace(problem, ranges=problem.ranges[1:]))
    with pytest.raises(ValueError, match=r"grams: expected \[8, 3, 3\]"):
        build(replace(problem, grams=problem.grams[1:]), mixing="one_angle")
    with pytest.raises(ValueError, match="3 tasks, item_weights of the problem are for 2"):
        weighted = build(replace(problem, item_weights=(1.0, 1.0)))
        weighted.tell([Told(weighted.ask(1)[0].id, (0.0,), items=((0.0,),) * 3)])
    searcher = build(problem)
    (one,) = searcher.ask(1)
    with pytest.raises(ValueError, match="item scores that are not finite"):
        searcher.tell([Told(one.id, (0.0,), items=((float("nan"),) * 32, (0.0,) * 32))])


def test_irregular_groups_are_cut_between_any_two_dimensions() -> None:
    groups = (("weight.a", "one"), ("weight.b", "one"), ("weight.a", "two"))
    problem = SearchProblem(3, 1, 40, 1, 0, groups=groups)
    searcher = build(problem)
    drive(searcher, sphere, 40, 1, 0)
    assert max(birth.split for birth in searcher.lineage.values()) == 2


def test_says_what_the_best_member_is_made_of() -> None:
    models = Models(1)
    searcher = make_searcher("m2n2", {}, models.problem(80))
    drive(searcher, models.judge, 80, 4, order=0)
    facts = searcher.facts()  # type: ignore[attr-defined]
    assert facts["archive"] == "10 of 10 members"
    assert "rows for 8 blocks" in facts["best member"]
    assert facts["its birth"].startswith("from candidate ")


def with_items(candidate: Candidate) -> Told:
    """Return ``sphere`` whose items are how near each coordinate is to the optimum."""
    items = tuple(1.0 - abs(value - 1 / 3) for value in candidate.x)
    return replace(sphere(candidate), items=(items, items[:1]))


class TestWithItemScores(SearcherConformance):
    def build(self, problem: SearchProblem) -> M2N2Searcher:
        return build(problem)

    @property
    def sphere(self) -> Judge:
        return with_items
