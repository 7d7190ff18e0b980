"""The searchers that learn a surrogate, or are made of other searchers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.search.entry import CMA_POPULATION, ArgumentSpec, SearcherEntry, builder

_ROUNDS: Mapping[str, ArgumentSpec] = MappingProxyType(
    {"rounds": ArgumentSpec(int, 4, 1, 1000, "batches of the surrogates' front, each refitted")}
)
_EFFORT: Mapping[str, ArgumentSpec] = MappingProxyType(
    {
        "population": ArgumentSpec(
            int, 40, 8, 1000, "members of the genetic algorithm on the surrogates"
        ),
        "generations": ArgumentSpec(
            int, 25, 4, 1000, "of it; fewer above a hundred coefficients, where they get dear"
        ),
    }
)

#: By name, as in ``registry.SEARCHERS``.
SURROGATES: Mapping[str, SearcherEntry] = MappingProxyType(
    {
        "map": SearcherEntry(
            "map",
            "scipy",
            "MAP: quadratic surrogates with link functions; full ones up to a dozen coefficients",
            multi_objective=True,
            generational=True,
            arguments={**_ROUNDS, **_EFFORT},
            build=builder("map", "quadratic_map"),
        ),
        "bayesian_map": SearcherEntry(
            "bayesian_map",
            "scipy",
            "MAP whose first rounds go where the surrogates know least",
            multi_objective=True,
            generational=True,
            arguments={**_ROUNDS, **_EFFORT},
            build=builder("map", "bayesian"),
        ),
        "nested_map": SearcherEntry(
            "nested_map",
            "scipy",
            "MAP on a tree of merges of two; many experts",
            multi_objective=True,
            generational=True,
            arguments={**_ROUNDS, **_EFFORT},
            build=builder("nested", "nested"),
        ),
        "gp_rounds": SearcherEntry(
            "gp_rounds",
            "scikit-learn",
            "Gaussian process per objective, hypervolume batches; up to some 200 trials",
            multi_objective=True,
            generational=True,
            arguments={
                "batch": ArgumentSpec(
                    int, None, 1, 1000, "candidates per round; default 5, at least `parallel`"
                ),
                "optimism": ArgumentSpec(
                    float, 0.5, 0.0, 10.0, "standard deviations that a prediction is lowered by"
                ),
                **_EFFORT,
            },
            build=builder("gp", "gp_rounds"),
        ),
        "tied": SearcherEntry(
            "tied",
            "evomerge",
            "one coefficient per expert first, then per group of blocks, then all",
            multi_objective=True,
            generational=False,
            arguments={
                "groups": ArgumentSpec(
                    int, 4, 1, 1000, "runs of neighbouring blocks at the middle level"
                ),
                "patience": ArgumentSpec(
                    int, None, 2, 100_000,
                    "trials without a gain before untying; default a tenth of the trials, at least "
                    "10 and twice `parallel`",
                ),
                "share": ArgumentSpec(
                    float, 0.5, 0.0, 1.0, "of the trials, at most, for the levels before the last"
                ),
            },
            build=builder("tied", "tied"),
        ),
        "polish": SearcherEntry(
            "polish",
            "nevergrad",
            "CMA-ES in small steps around a recipe, or around the best baseline",
            multi_objective=False,
            generational=False,
            arguments={
                "start": ArgumentSpec(
                    str, None, None, None,
                    "recipe file, or study directory:trial; default the best baseline",
                ),
                "sigma": ArgumentSpec(
                    float, 0.05, 1e-4, 1.0, "initial standard deviation in the unit box"
                ),
                "population": CMA_POPULATION,
            },
            build=builder("polish", "polish"),
        ),
        "auto": SearcherEntry(
            "auto",
            "evomerge",
            "chosen by trials, coefficients, objectives and parallelism; says why",
            multi_objective=True,
            generational=False,
            arguments={},
            build=builder("auto", "auto"),
        ),
    }
)  # fmt: skip
