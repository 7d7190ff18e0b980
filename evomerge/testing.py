"""Behaviour that every searcher must show, as a test class that anybody can subclass.

    class TestMine(SearcherConformance):
        def build(self, problem: SearchProblem) -> Searcher:
            return MySearcher(problem)

Needs pytest. Pools have their suite in ``evomerge.testing_pool``.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from evomerge.errors import CallOrderError
from evomerge.pareto import hypervolume
from evomerge.search.kinds import snap
from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told, WarmPoint
from evomerge.space import REAL, Kind

Build = Callable[[SearchProblem], Searcher]
Judge = Callable[[Candidate], Told]

#: What ``FAILED_LOSS`` trials get: worse than every value of ``sphere``.
FAILED_LOSS = 1e3

#: A front of ``sphere`` that lacks less hypervolume than this is as good as the true one.
SOLVED = 5e-3


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a searcher and what it gave.

    Attributes:
        n: argument of ``ask``; None for a ``tell``.
        asked: candidates that ``ask`` returned.
        told: argument of ``tell``.
    """

    n: int | None
    asked: tuple[Candidate, ...] = ()
    told: tuple[Told, ...] = ()


def sphere(candidate: Candidate, objectives: int = 1) -> Told:
    """Return mean squared distances to ``objectives`` points on a diagonal of the box.

    The optimum of objective j is at (j + 1) / (objectives + 2) in every coordinate, away from
    the centre, the faces and each other, so the front is the segment between them.
    """
    x = np.array(candidate.x)
    goals = (np.arange(objectives) + 1) / (objectives + 2)
    return Told(candidate.id, tuple(float(((x - goal) ** 2).mean()) for goal in goals))


def drive(searcher: Searcher, judge: Judge, budget: int, window: int, order: int) -> list[Call]:
    """Run ``searcher`` with up to ``window`` candidates outstanding and return the calls.

    Args:
        searcher: fresh or replayed, with nothing outstanding.
        judge: gives a candidate its losses.
        budget: candidates to ask at most.
        window: how many may be outstanding.
        order: seed of the completion order.
    """
    rng = np.random.default_rng(order)
    calls: list[Call] = []
    outstanding: list[Candidate] = []
    asked = 0
    while True:
        wanted = min(window - len(outstanding), budget - asked)
        if wanted:
            got = tuple(searcher.ask(wanted))
            calls.append(Call(wanted, asked=got))
            outstanding.extend(got)
            asked += len(got)
        if not outstanding:
            return calls
        done = [outstanding.pop(int(rng.integers(len(outstanding))))]
        if outstanding and rng.random() < 0.3:
            done.append(outstanding.pop(int(rng.integers(len(outstanding)))))
        results = tuple(judge(candidate) for candidate in done)
        searcher.tell(results)
        calls.append(Call(None, told=results))


def replay(searcher: Searcher, calls: Sequence[Call]) -> None:
    """Repeat ``calls`` and assert that every ask gives the same candidates, bit for bit."""
    for number, call in enumerate(calls):
        if call.n is None:
            searcher.tell(call.told)
        else:
            got = tuple(searcher.ask(call.n))
            assert got == call.asked, f"call {number}: asked {got}, recorded {call.asked}"


def asked(calls: Sequence[Call]) -> list[Candidate]:
    """Return all candidates in the order of asking."""
    return [candidate for call in calls for candidate in call.asked]


def told(calls: Sequence[Call]) -> list[Told]:
    """Return all results in the order of asking."""
    return sorted((result for call in calls for result in call.told), key=lambda told: told.id)


def _failing(candidate: Candidate, objectives: int) -> Told:
    """Return ``sphere``, or a penalty in a third of the box."""
    if candidate.x[0] > 2 / 3:
        return Told(candidate.id, (FAILED_LOSS,) * objectives, failed=True)
    return sphere(candidate, objectives)


def _always_failing(candidate: Candidate, objectives: int) -> Told:
    """Return a penalty."""
    return Told(candidate.id, (FAILED_LOSS,) * objectives, failed=True)


def _solved(objectives: int) -> float:
    """Return the hypervolume of the true front of ``sphere``, whatever the dimension."""
    goals = (np.arange(objectives) + 1) / (objectives + 2)
    along = np.linspace(goals[0], goals[-1], 201)[:, None]
    return hypervolume((along - goals) ** 2, (1.0,) * objectives)


class SearcherConformance:
    """The contract of ``evomerge.search.protocol.Searcher``; subclass and give ``build``.

    Attributes:
        objectives: number of losses m to test with.
        generational: whether candidates must not depend on the completion order.
        learns: whether later candidates must be better than early ones.
        prefix_step: every how many calls a recorded search is cut off and continued.
    """

    prefix_step: int = 1
    objectives: int = 1
    generational: bool = False
    learns: bool = True

    def build(self, problem: SearchProblem) -> Searcher:
        """Return a fresh searcher for ``problem``; subclasses must give this."""
        raise NotImplementedError

    def remote_build(self) -> Build | None:
        """Return a picklable function that builds the same searcher in another process.

        None skips the tests across processes.
        """
        return None

    def problem(
        self, dimension: int = 4, budget: int = 60, parallel: int = 4, warm: bool = True
    ) -> SearchProblem:
        """Return a problem with three warm points, judged by ``sphere``, or with none."""
        places = ((0.5,) * dimension, (0.0,) * dimension, (1.0,) + (0.0,) * (dimension - 1))
        points = (
            WarmPoint(x, sphere(Candidate(0, x), self.objectives).losses)
            for x in (places if warm else ())
        )
        return SearchProblem(
            dimension, self.objectives, budget, parallel, seed=7, warm=tuple(points)
        )

    @property
    def sphere(self) -> Judge:
        """The test function with this suite's number of objectives."""
        return partial(sphere, objectives=self.objectives)

    def run(self, problem: SearchProblem, judge: Judge | None = None, order: int = 0) -> list[Call]:
        """Return the calls of a whole search with a fresh searcher."""
        return drive(
            self.build(problem), judge or self.sphere, problem.budget, problem.parallel, order
        )

    @pytest.mark.parametrize("warm", [False, True])
    @pytest.mark.parametrize(("dimension", "budget"), [(1, 25), (2, 3), (4, 1), (4, 60), (40, 50)])
    def test_candidates_are_finite_points_of_the_box_numbered_in_order(
        self, dimension: int, budget: int, warm: bool
    ) -> None:
        candidates = asked(self.run(self.problem(dimension, budget, warm=warm)))
        assert [candidate.id for candidate in candidates] == list(range(budget))
        points = np.array([candidate.x for candidate in candidates])
        assert points.shape == (budget, dimension)
        assert ((points >= 0.0) & (points <= 1.0)).all()
        assert all(type(value) is float for candidate in candidates for value in candidate.x)

    def test_asks_only_for_the_middles_of_levels(self) -> None:
        kinds = (REAL, Kind("integer", 5), Kind("choice", 3))
        places = np.array([[0.5, 0.5, 0.5], [0.0, 0.1, 1 / 6]])
        warm = tuple(
            WarmPoint(tuple(x), sphere(Candidate(0, tuple(x)), self.objectives).losses)
            for x in places.tolist()
        )
        problem = replace(self.problem(dimension=3, budget=24), warm=warm, kinds=kinds)
        calls = self.run(problem)
        points = np.array([candidate.x for candidate in asked(calls)])
        assert np.array_equal(points, snap(points, kinds))
        assert len(np.unique(points[:, 0])) > 3, "the real dimension is not searched"
        replay(self.build(problem), calls)

    @pytest.mark.parametrize("dimension", [1, 2, 6, 40, 400])
    def test_takes_a_hundred_results_at_every_size(self, dimension: int) -> None:
        results = told(self.run(self.problem(dimension, budget=100)))
        assert [result.id for result in results] == list(range(100))
        assert len({result.losses for result in results}) > 1, "every candidate is the same"

    def test_asks_for_nothing_and_for_less_than_nothing(self) -> None:
        searcher = self.build(self.problem())
        assert list(searcher.ask(0)) == []
        with pytest.raises(ValueError, match="n >= 0"):
            searcher.ask(-1)
        assert searcher.ask(1)[0].id == 0

    def test_never_returns_more_than_asked_for(self) -> None:
        for call in self.run(self.problem()):
            assert call.n is None or len(call.asked) <= call.n

    def test_proposes_something_whenever_nothing_is_outstanding(self) -> None:
        searcher = self.build(self.problem())
        for number in range(40):
            (candidate,) = searcher.ask(1)
            assert candidate.id == number
            searcher.tell([self.sphere(candidate)])

    def test_can_go_on_beyond_its_budget(self) -> None:
        problem = self.problem(budget=10)
        calls = drive(self.build(problem), self.sphere, 30, problem.parallel, order=0)
        assert len(asked(calls)) == 30

    @pytest.mark.parametrize("dimension", [1, 4, 40])
    def test_is_deterministic_whatever_the_global_generators(self, dimension: int) -> None:
        problem = self.problem(dimension)
        states = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            runs = []
            for seed in (1, 2):
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - the global generator is what is tested
                runs.append(self.run(problem))
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
        assert runs[0] == runs[1]

    def test_leaves_the_global_generators_alone(self) -> None:
        before = random.getstate(), np.random.get_state()  # noqa: NPY002
        self.run(self.problem())
        after = random.getstate(), np.random.get_state()  # noqa: NPY002
        assert before[0] == after[0]
        assert all(np.array_equal(one, two) for one, two in zip(before[1], after[1], strict=True))

    def test_another_seed_gives_other_candidates(self) -> None:
        problem = self.problem()
        other = replace(problem, seed=problem.seed + 1)
        assert asked(self.run(problem)) != asked(self.run(other))

    def test_two_searchers_in_one_process_do_not_meet(self) -> None:
        problem = self.problem(budget=40)
        alone = self.run(problem)
        one, two = self.build(problem), self.build(replace(problem, seed=99))
        other = iter(drive(self.build(replace(problem, seed=99)), self.sphere, 40, 4, order=1))
        for call in alone:
            replay(one, [call])
            step = next(other, None)
            if step is not None:
                replay(two, [step])

    def test_replays_in_another_process(self) -> None:
        build = self.remote_build()
        if build is None:
            pytest.skip("remote_build gives no picklable builder")
        problem = self.problem(dimension=6, budget=50)
        own = os.environ.get("PYTHONHASHSEED")
        hash_seed = "4242" if own != "4242" else "1"
        work = pickle.dumps((build, problem, self.run(problem)))
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-W", "ignore", "-m", "evomerge.testing", hash_seed],
            input=work,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == "50 candidates replayed\n"

    def test_replays_from_every_prefix_to_the_same_future(self) -> None:
        problem = self.problem(budget=40)
        calls = self.run(problem)
        for length in range(0, len(calls), self.prefix_step):
            futures = []
            for _ in range(2):
                searcher = self.build(problem)
                replay(searcher, calls[:length])
                known = {told.id for call in calls[:length] for told in call.told}
                pending = [one for one in asked(calls[:length]) if one.id not in known]
                searcher.tell([self.sphere(one) for one in reversed(pending)])
                futures.append(drive(searcher, self.sphere, 20, problem.parallel, order=length))
            assert futures[0] == futures[1], f"after {length} calls"
        replay(self.build(problem), calls)

    @pytest.mark.parametrize("parallel", [1, 7, 32])
    def test_accepts_every_completion_order(self, parallel: int) -> None:
        problem = self.problem(budget=70, parallel=parallel)
        for order in range(3):
            assert len(asked(self.run(problem, order=order))) == 70

    def test_generations_do_not_depend_on_completion_order_or_window(self) -> None:
        if not self.generational:
            pytest.skip("does not wait for generations")
        problem = self.problem(budget=70)
        runs = [asked(self.run(problem, order=order)) for order in range(3)]
        runs.append(asked(drive(self.build(problem), self.sphere, 70, 1, order=0)))
        assert all(run == runs[0] for run in runs)

    def test_a_waiting_generation_gives_nothing(self) -> None:
        if not self.generational:
            pytest.skip("does not wait for generations")
        searcher = self.build(self.problem())
        first = list(searcher.ask(10_000))
        assert 0 < len(first) < 10_000
        assert list(searcher.ask(1)) == []
        searcher.tell([self.sphere(one) for one in reversed(first[1:])])
        assert list(searcher.ask(1)) == []
        searcher.tell([self.sphere(first[0])])
        assert searcher.ask(1)[0].id == len(first)

    def test_refuses_unknown_and_repeated_ids(self) -> None:
        searcher = self.build(self.problem())
        one, two = searcher.ask(2)
        for unknown in (-1, 2, 99):
            with pytest.raises(CallOrderError, match="never asked"):
                searcher.tell([replace(self.sphere(one), id=unknown)])
        with pytest.raises(CallOrderError, match="told already"):
            searcher.tell([self.sphere(one), self.sphere(one)])
        searcher.tell([self.sphere(one)])
        with pytest.raises(CallOrderError, match="told already"):
            searcher.tell([self.sphere(one)])
        searcher.tell([self.sphere(two)])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_refuses_losses_that_are_not_finite(self, bad: float) -> None:
        searcher = self.build(self.problem())
        (candidate,) = searcher.ask(1)
        good = self.sphere(candidate)
        with pytest.raises(ValueError, match="finite"):
            searcher.tell([replace(good, losses=(*good.losses[:-1], bad))])

    def test_refuses_the_wrong_number_of_losses(self) -> None:
        searcher = self.build(self.problem())
        (candidate,) = searcher.ask(1)
        for count in (0, self.objectives + 1):
            with pytest.raises(ValueError, match=f"{self.objectives} losses"):
                searcher.tell([Told(candidate.id, (0.5,) * count)])

    def test_a_refused_tell_changes_nothing(self) -> None:
        problem = self.problem()
        calls = self.run(problem)
        searcher = self.build(problem)
        for call in calls:
            if call.n is None:
                with pytest.raises(CallOrderError):
                    searcher.tell([*call.told, replace(call.told[0], id=10_000)])
                with pytest.raises(ValueError, match="finite"):
                    searcher.tell([replace(call.told[0], losses=(float("nan"),) * self.objectives)])
            replay(searcher, [call])

    def test_survives_failures_and_still_finds_better_points(self) -> None:
        problem = self.problem(budget=120)
        judge = partial(_failing, objectives=self.objectives)
        results = told(self.run(problem, judge))
        assert len(results) == 120
        best = min(results, key=lambda result: sum(result.losses))
        assert not best.failed
        if self.learns:
            failed = [result.failed for result in results]
            assert sum(failed[80:]) <= max(4, sum(failed[:40]))
            alive = [sum(result.losses) for result in results if not result.failed]
            assert np.mean(alive[-20:]) < np.mean(alive[:20])

    @pytest.mark.parametrize("loss", [FAILED_LOSS, 0.0, -1e300, 1e300])
    def test_survives_when_all_losses_are_equal(self, loss: float) -> None:
        def judge(candidate: Candidate) -> Told:
            return Told(candidate.id, (loss,) * self.objectives, failed=loss == FAILED_LOSS)

        assert len(asked(self.run(self.problem(budget=100), judge))) == 100

    def test_does_not_change_its_inputs(self) -> None:
        problem = self.problem()
        before = copy.deepcopy(problem)
        searcher = self.build(problem)
        candidates = tuple(searcher.ask(3))
        results = [self.sphere(candidate) for candidate in candidates]
        kept = copy.deepcopy(results)
        searcher.tell(results)
        assert results == kept
        assert problem == before

    def test_leaves_no_thread_behind_and_prints_nothing(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        before = set(threading.enumerate())
        self.run(self.problem())
        assert set(threading.enumerate()) == before
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("dimension", [1, 4])
    def test_later_candidates_are_better(self, dimension: int) -> None:
        problem = self.problem(dimension, budget=160, warm=False)
        losses = np.array([result.losses for result in told(self.run(problem))])  # [n, m]
        corner = (1.0,) * self.objectives
        early, late = losses[:40], losses[-40:]
        # A surrogate can solve this in its first batch; then nothing later can be better.
        solved = _solved(self.objectives) - SOLVED
        begun = hypervolume(losses[:10], corner)
        assert hypervolume(losses, corner) > min(begun, solved)
        if self.learns:
            assert late.mean() < early.mean()
            assert hypervolume(late, corner) >= min(hypervolume(early, corner), solved)


def _main() -> None:
    """Replay what ``test_replays_in_another_process`` sends, and say how much that was."""
    seed = int(sys.argv[1])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is what is tested
    # The parent process wrote this; it holds the builder, the problem and the recorded calls.
    build, problem, calls = pickle.load(sys.stdin.buffer)  # noqa: S301
    replay(build(problem), calls)
    sys.stdout.write(f"{len(asked(calls))} candidates replayed\n")


if __name__ == "__main__":
    _main()
