"""The searchers that were published for model merging: M2N2 and Evo-Merging."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.search.entry import ArgumentSpec, SearcherEntry, builder, choice

#: By name, as in ``registry.SEARCHERS``.
MERGING: Mapping[str, SearcherEntry] = MappingProxyType(
    {
        "m2n2": SearcherEntry(
            "m2n2",
            "numpy",
            "M2N2: crossover at split points, competition for items, attraction; sees item scores",
            multi_objective=False,
            generational=False,
            arguments={
                "archive": ArgumentSpec(
                    int, None, 2, 10_000, "members; default 5 and one per 100 trials, 10 to 20"
                ),
                "alpha": ArgumentSpec(
                    float, 1.0, 0.0, 10.0, "competition for items; 0 is a plain genetic algorithm"
                ),
                "attraction": ArgumentSpec(
                    bool, True, None, None, "second parents by what the first one lacks"
                ),
                "split": ArgumentSpec(
                    bool, True, None, None, "mix differently before and after a block by chance"
                ),
                "mixing": choice(
                    "linear",
                    "on a line, on one arc, or on one arc each side of the split",
                    "one_angle",
                    "two_angles",
                ),
                "mutation": ArgumentSpec(
                    float, 0.0, 0.0, 1.0, "standard deviation in the unit box, of every child"
                ),
                "warmup": ArgumentSpec(
                    int, None, 0, 10_000, "first children, of baselines only; default fills up"
                ),
                "relative": ArgumentSpec(
                    bool, False, None, None, "score items above the worst member's score"
                ),
                "experts_only": ArgumentSpec(
                    bool, False, None, None, "start from the experts, without other baselines"
                ),
                "ties": choice(
                    "oldest",
                    "who goes of members that earn alike: the oldest, or as in the published code "
                    "the one at the first place, which the new one takes",
                    "place",
                ),
            },
            build=builder("m2n2", "m2n2"),
        ),
        "evo_merging": SearcherEntry(
            "evo_merging",
            "pycma",
            "Evo-Merging: CMA-ES on densities, then on signed weights; for lora_factors",
            multi_objective=False,
            generational=True,
            arguments={
                "stages": choice(
                    "both",
                    "densities then weights, both together, or one of them alone",
                    "joint",
                    "denoise",
                    "scale",
                ),
                "population": ArgumentSpec(int, 20, 4, 10_000, "candidates per generation"),
                "sigma": ArgumentSpec(
                    float, 0.05, 1e-3, 1.0, "initial standard deviation, of the coefficients"
                ),
                "denoise_share": ArgumentSpec(
                    float, 1 / 3, 0.01, 0.99, "part of the budget for the first of both stages"
                ),
                "density_l1": ArgumentSpec(
                    float, 0.05, 0.0, 100.0, "added to the loss per mean density"
                ),
                "weight_l1": ArgumentSpec(
                    float, 0.05, 0.0, 100.0, "added to the loss per mean |weight|"
                ),
            },
            build=builder("evo_merging", "evo_merging"),
        ),
    }
)
