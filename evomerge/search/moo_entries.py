"""What the registry lists of pymoo, without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.search.entry import (
    CMA_POPULATION,
    SIGMA,
    ArgumentSpec,
    SearcherEntry,
    builder,
    choice,
)

_POPULATION = ArgumentSpec(
    int, None, 4, 10_000, "members; default an eighth of the trials, 16 to 40, at most half of them"
)
_GENETIC: Mapping[str, ArgumentSpec] = MappingProxyType(
    {
        "population": _POPULATION,
        "crossover_eta": ArgumentSpec(
            float, 15.0, 0.0, 1000.0, "SBX distribution index; larger stays nearer the parents"
        ),
        "mutation_eta": ArgumentSpec(
            float, 20.0, 0.0, 1000.0, "polynomial mutation index; larger mutates less"
        ),
    }
)
#: The many-objective algorithms cross over less widely in their papers.
_NARROW: Mapping[str, ArgumentSpec] = MappingProxyType(
    {
        **_GENETIC,
        "crossover_eta": ArgumentSpec(
            float, 30.0, 0.0, 1000.0, "SBX distribution index; larger stays nearer the parents"
        ),
    }
)


def _steady(default: bool) -> Mapping[str, ArgumentSpec]:
    return {
        "steady": ArgumentSpec(
            bool, default, None, None, "one offspring per result instead of whole generations"
        )
    }


def _many(
    name: str,
    summary: str,
    arguments: Mapping[str, ArgumentSpec],
    function: str,
    *,
    generational: bool = True,
    single_objective: bool = True,
) -> SearcherEntry:
    """Return the entry of a searcher for several objectives."""
    return SearcherEntry(
        name, "pymoo", summary, multi_objective=True, generational=generational,
        arguments=arguments, build=builder("moo", function), single_objective=single_objective,
    )  # fmt: skip


def _one(
    name: str, summary: str, arguments: Mapping[str, ArgumentSpec], function: str
) -> SearcherEntry:
    """Return the entry of a searcher for one objective."""
    return SearcherEntry(
        name, "pymoo", summary, multi_objective=False, generational=True,
        arguments=arguments, build=builder("moo", function),
    )  # fmt: skip


_ENTRIES = (
    _many(
        "nsga2",
        "NSGA-II; several objectives, finds a Pareto front",
        {**_GENETIC, **_steady(False)},
        "nsga2",
    ),
    _many(
        "nsga3",
        "NSGA-III; reference directions, for four objectives and more",
        {**_NARROW, **_steady(False)},
        "nsga3",
    ),
    _many(
        "unsga3",
        "U-NSGA-III; NSGA-III with tournaments, for any number of objectives",
        {**_NARROW, **_steady(False)},
        "unsga3",
    ),
    _many(
        "smsemoa",
        "SMS-EMOA; drops the smallest hypervolume contribution, no waiting; up to 5 objectives",
        {**_GENETIC, **_steady(True)},
        "smsemoa",
        generational=False,
        single_objective=False,
    ),
    _many(
        "agemoea",
        "AGE-MOEA; estimates the shape of the front",
        {**_GENETIC, **_steady(False)},
        "agemoea",
        single_objective=False,
    ),
    _many(
        "moead",
        "MOEA/D; one weighted problem per member; objectives should have like scales",
        {
            **_GENETIC,
            "crossover_eta": ArgumentSpec(
                float, 20.0, 0.0, 1000.0, "SBX distribution index; larger stays nearer the parents"
            ),
            "neighbors": ArgumentSpec(
                int, 20, 2, 1000, "of each weighted problem, that it mates with; at most all"
            ),
        },
        "moead",
        single_objective=False,
    ),
    _many(
        "rvea",
        "RVEA; reference vectors, sharper the nearer the budget's end",
        {
            **_NARROW,
            "alpha": ArgumentSpec(float, 2.0, 0.0, 10.0, "how late the angles begin to count"),
        },
        "rvea",
        single_objective=False,
    ),
    _one(
        "ga",
        "elitist genetic algorithm; one objective",
        {**_GENETIC, **_steady(False)},
        "genetic",
    ),
    _one(
        "pymoo-de",
        "differential evolution generation by generation; the completion order does not matter",
        {
            "population": _POPULATION,
            "parent": choice("best", "what a difference is added to", "rand"),
            "differences": ArgumentSpec(int, 1, 1, 2, "how many are added"),
            "crossover": choice("bin", "binomial or exponential", "exp"),
            "rate": ArgumentSpec(float, 0.2, 0.0, 1.0, "crossover rate CR"),
            "weight": ArgumentSpec(float, 0.5, 0.01, 2.0, "differential weight F"),
        },
        "differential_evolution",
    ),
    _one(
        "pymoo-pso",
        "particle swarm generation by generation, adapting its weights",
        {
            "population": _POPULATION,
            "inertia": ArgumentSpec(float, 0.9, 0.0, 2.0, "w, at first where `adaptive`"),
            "own": ArgumentSpec(float, 2.0, 0.0, 4.0, "c1, at first where `adaptive`"),
            "swarm": ArgumentSpec(float, 2.0, 0.0, 4.0, "c2, at first where `adaptive`"),
            "adaptive": ArgumentSpec(
                bool, True, None, None, "w, c1 and c2 follow how far the swarm is spread"
            ),
            "velocity": ArgumentSpec(float, 0.2, 0.001, 1.0, "largest step along an axis"),
        },
        "particle_swarm",
    ),
    _one(
        "pymoo-cmaes",
        "CMA-ES generation by generation (SimpleCMAES); the completion order does not matter",
        {"sigma": SIGMA, "population": CMA_POPULATION},
        "cmaes",
    ),
)  # fmt: skip

PYMOO: Mapping[str, SearcherEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
