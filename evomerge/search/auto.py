"""``auto``: a searcher chosen by the size of the problem, and why.

The rule is data. Up to 201 coefficients it rests on ``experiments/searchers/real_pools.py``: all
searchers on real merges of two, three and five experts with 2 to 201 coefficients and one to four
objectives, 60 trials each, 4 at a time, and some of them with 240 trials (the tables stand in
docs/searchers.md). Beyond these sizes the figures are those of the prototype on merge-like surfaces
(map.md 4, search.md 2.4 and 7). Noise changes nothing: the searchers that are made for noisy
scores were not ahead on any pool, all of which are scored on 40 items per skill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from evomerge.search.protocol import Candidate, Searcher, SearchProblem, Told
from evomerge.trial import Origin


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table: where all limits hold, this searcher is taken.

    Attributes:
        searcher: its name.
        because: the reason, for the user.
        dimension: largest number of coefficients.
        objectives: fewest and most.
        budget: fewest and most trials.
        rounds: fewest trials per trial at a time: how often the searcher can learn.
    """

    searcher: str
    because: str
    dimension: float = inf
    objectives: tuple[float, float] = (1, inf)
    budget: tuple[float, float] = (1, inf)
    rounds: float = 0

    def fits(self, problem: SearchProblem) -> bool:
        """Return whether all limits hold."""
        return (
            problem.dimension <= self.dimension
            and self.objectives[0] <= problem.objectives <= self.objectives[1]
            and self.budget[0] <= problem.budget <= self.budget[1]
            and problem.budget >= self.rounds * problem.parallel
        )


#: The first rule that fits decides; the last three fit everything.
RULES: tuple[Rule, ...] = (
    Rule(
        "gp_rounds",
        "up to a dozen coefficients Gaussian processes were the best or level with it, on real "
        "pools at 60 and 240 trials and in the prototype at 60 and 120",
        dimension=12, budget=(8, 500), rounds=4,
    ),
    Rule(
        "gp_rounds",
        "on real pools with 39 to 201 coefficients Gaussian processes were the best or level with "
        "it at 60 and at 240 trials; more were not measured",
        dimension=201, budget=(8, 240), rounds=4,
    ),
    Rule(
        "oneplusone",
        "fewer trials than any population needs",
        objectives=(1, 1), budget=(1, 15),
    ),
    Rule(
        "cma",
        "one objective, and more trials or coefficients than surrogates were measured with: "
        "CMA-ES was the best of what is no surrogate at 240 trials, and ahead of M2N2 on chunks",
        objectives=(1, 1),
    ),
    Rule(
        "smsemoa",
        "more trials or coefficients than surrogates were measured with: on real pools with 200 "
        "coefficients and 240 trials SMS-EMOA was level with them, and it does not wait",
        objectives=(2, 3),
    ),
    Rule(
        "nsga3",
        "four objectives and more, where hypervolumes get dear and NSGA-II loses its direction",
    ),
)  # fmt: skip


def choose(problem: SearchProblem) -> Rule:
    """Return the first rule that fits; its searcher takes the problem's objectives."""
    return next(rule for rule in RULES if rule.fits(problem))


def explain(problem: SearchProblem) -> str:
    """Return what ``auto`` takes for ``problem`` and why, in one line."""
    rule = choose(problem)
    because = rule.because
    if rule is not choose(replace(problem, parallel=1)):
        # It is not the size that keeps the surrogate from being taken.
        because = (
            f"{problem.parallel} at a time leave fewer than four rounds of trials, in which no "
            "surrogate can learn: give more trials, or fewer outstanding"
        )
    noise = "" if problem.noise is None else f", standard errors up to {problem.noise:.2g}"
    several = "s" * (problem.objectives != 1)
    size = (
        f"{problem.dimension} coefficient{'s' * (problem.dimension != 1)}, {problem.budget} "
        f"trials, {problem.objectives} objective{several}, {problem.parallel} outstanding{noise}"
    )
    return f"{rule.searcher} ({size}: {because})"


class AutoSearcher:
    """The chosen searcher, which also says why it was chosen."""

    def __init__(self, inner: Searcher, reason: str) -> None:
        self._inner = inner
        self._reason = reason

    def ask(self, n: int) -> Sequence[Candidate]:
        """See ``Searcher.ask``."""
        return self._inner.ask(n)

    def tell(self, results: Sequence[Told]) -> None:
        """See ``Searcher.tell``."""
        self._inner.tell(results)

    @property
    def generation(self) -> int | None:
        """See ``Searcher``; None where the chosen searcher knows none."""
        generation: int | None = getattr(self._inner, "generation", None)
        return generation

    def origin(self, candidate: int) -> Origin | None:
        """See ``Searcher``; None where the chosen searcher does not say."""
        say: Callable[[int], Origin | None] = getattr(self._inner, "origin", lambda _: None)
        return say(candidate)

    def facts(self) -> Mapping[str, str]:
        """Return the choice and its reason, and what the chosen searcher says."""
        say = getattr(self._inner, "facts", dict)
        return {"auto": self._reason, **say()}


def auto(problem: SearchProblem, arguments: Mapping[str, Any]) -> AutoSearcher:
    """Return the searcher of the first rule that fits, with its default arguments."""
    from evomerge.search.registry import check_arguments, find_searcher

    name = choose(problem).searcher
    inner = find_searcher(name).build(problem, check_arguments(name, {}))
    return AutoSearcher(inner, explain(problem))
