"""What the registry lists of nevergrad, without importing it.

Left out, each for a fault seen with nevergrad 1.0.12: ``NGOpt*``, ``NgIoh*``, ``Wiz``, ``Carola*``
and the ``MetaModel`` family (break with numpy 2.4 in small dimensions, warn with 2.3, leave
threads behind); ``Cobyla``, ``Powell``, ``NelderMead``, ``SQPCMA`` and ``Shiwa`` (an optimizer in
a thread that takes one candidate at a time, or choose one); ``BO`` (seconds per candidate);
``EDA``, ``cGA`` and ``NoisySplit`` (25 to 100 ms per candidate already at 400 dimensions);
the registered names of CMA-ES (``cma`` is it, with the step size really meant; one search in one
dimension makes all later ones of these ask for another package); ``SPSA`` (one candidate at a
time, and its fixed learning rate of 1e-5 does not move in the unit box). ``NoisyDE``,
``NaiveTBPSA`` and ``OnePlusLambda`` ask what ``DE``, ``TBPSA`` and ``OnePlusOne`` ask: they
differ in what they recommend at the end, which a study decides on held-out items.

nevergrad's own handling of several objectives is not offered: all but differential evolution
reduce them to a hypervolume whose reference is unknown for the first 15 results, and that one
picks a member from an unordered set of random names. The study gives one weighted loss instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

from evomerge.search.entry import (
    CMA_POPULATION,
    SIGMA,
    ArgumentSpec,
    SearcherEntry,
    builder,
    choice,
)


class Start(Enum):
    """How an optimizer of nevergrad uses the warm points."""

    LOCAL = "starts at the best one"
    POPULATION = "takes all of them into its population"
    SAMPLING = "makes no use of them"
    SEQUENCE = "makes no use of them, and ends with the budget"


_START = {
    Start.POPULATION: (
        *("DE", "TwoPointsDE", "OnePointDE", "RotatedTwoPointsDE", "ParametrizationDE"),
        *("LhsDE", "QrDE", "QODE", "QOTPDE", "SODE", "MiniDE", "DiscreteDE", "GeneticDE"),
        *("AlmostRotationInvariantDE", "RotationInvariantDE"),
        *("PSO", "RealSpacePSO", "QOPSO", "QORealSpacePSO", "SQOPSO", "SOPSO"),
    ),
    Start.LOCAL: (
        *("OnePlusOne", "CauchyOnePlusOne", "NoisyOnePlusOne", "OptimisticNoisyOnePlusOne"),
        *("DiscreteOnePlusOne", "PortfolioDiscreteOnePlusOne", "DiscreteLenglerOnePlusOne"),
        *("FastGADiscreteOnePlusOne", "DoubleFastGADiscreteOnePlusOne"),
        *("AdaptiveDiscreteOnePlusOne", "LognormalDiscreteOnePlusOne"),
        *("OptimisticDiscreteOnePlusOne", "NoisyDiscreteOnePlusOne"),
        *("RecombiningPortfolioOptimisticNoisyDiscreteOnePlusOne",),
        *("TBPSA", "IsoEMNA", "AnisoEMNA", "IsoEMNATBPSA"),
    ),
    Start.SAMPLING: (
        *("ES", "RecES", "MixES", "RecMixES", "MutDE", "RecMutDE"),
        *("RandomSearch", "QORandomSearch", "ORandomSearch"),
    ),
    Start.SEQUENCE: (
        *("HaltonSearch", "ScrHaltonSearch", "HammersleySearch", "ScrHammersleySearch"),
        *("QOScrHammersleySearch", "ScrHammersleySearchPlusMiddlePoint", "LHSSearch"),
    ),
}

#: How each optimizer that is offered under nevergrad's own name starts.
OPTIMIZERS: Mapping[str, Start] = MappingProxyType(
    {name: start for start, names in _START.items() for name in names}
)

_DEFAULT = "TwoPointsDE"

_POPULATION = "default an eighth of the budget, 8 to 30, at least `parallel`"

NEVERGRAD: Mapping[str, SearcherEntry] = MappingProxyType(
    {
        "cma": SearcherEntry(
            "cma",
            "nevergrad",
            "CMA-ES; one objective, any number of workers without waiting",
            multi_objective=False,
            generational=False,
            arguments={
                "sigma": SIGMA,
                "population": CMA_POPULATION,
                "diagonal": ArgumentSpec(
                    bool, None, None, None, "diagonal covariance; default above 1000 dimensions"
                ),
                "elitist": ArgumentSpec(
                    bool, False, None, None, "the best of all generations stays a parent"
                ),
            },
            build=builder("ng", "cma"),
        ),
        "de": SearcherEntry(
            "de",
            "nevergrad",
            "differential evolution with two-point crossover; baselines join its population",
            multi_objective=False,
            generational=False,
            arguments={
                "population": ArgumentSpec(int, None, 4, 10_000, f"members; {_POPULATION}"),
                "weight": ArgumentSpec(float, 0.8, 0.0, 2.0, "differential weights F1 and F2"),
                "crossover": choice(
                    "twopoints",
                    "how parent and donor mix; `uniform` takes half of each",
                    *("onepoint", "rotated_twopoints", "uniform", "dimension", "random"),
                ),
                "initialization": choice(
                    "uniform",
                    "of the population: independent, a latin hypercube, a scrambled "
                    "Hammersley sequence, or that with its (quasi, special) opposites",
                    *("LHS", "QR", "QO", "SO"),
                ),
            },
            build=builder("ng", "differential_evolution"),
        ),
        "pso": SearcherEntry(
            "pso",
            "nevergrad",
            "particle swarm without waiting; baselines join the swarm",
            multi_objective=False,
            generational=False,
            arguments={
                "population": ArgumentSpec(int, None, 4, 10_000, f"particles; {_POPULATION}"),
                "inertia": ArgumentSpec(float, 0.7213475, 0.0, 2.0, "omega of SPSO 2011"),
                "own": ArgumentSpec(float, 1.1931472, 0.0, 4.0, "pull of a particle's own best"),
                "swarm": ArgumentSpec(float, 1.1931472, 0.0, 4.0, "pull of the swarm's best"),
            },
            build=builder("ng", "particle_swarm"),
        ),
        "oneplusone": SearcherEntry(
            "oneplusone",
            "nevergrad",
            "(1+1)-ES; for very small budgets",
            multi_objective=False,
            generational=False,
            arguments={
                "sigma": SIGMA,
                "mutation": choice("gaussian", "distribution of a step", "cauchy"),
                "noise": choice(
                    "none",
                    "how good points are asked again: for scores that differ each time",
                    *("random", "optimistic"),
                ),
            },
            build=builder("ng", "one_plus_one"),
        ),
        "tbpsa": SearcherEntry(
            "tbpsa",
            "nevergrad",
            "test-based population-size adaptation; for noisy scores, grows its population",
            multi_objective=False,
            generational=False,
            arguments={
                "sigma": SIGMA,
                "population": ArgumentSpec(
                    int,
                    None,
                    4,
                    10_000,
                    "candidates per step at first; default 4 d, at most an "
                    "eighth of the budget, at least 8",
                ),
            },
            build=builder("ng", "tbpsa"),
        ),
        "random": SearcherEntry(
            "random",
            "nevergrad",
            "uniform random search; the control that others must beat",
            multi_objective=False,
            generational=False,
            arguments={},
            build=builder("ng", "random"),
        ),
        "nevergrad": SearcherEntry(
            "nevergrad",
            "nevergrad",
            "any replayable optimizer of nevergrad by its name there, at nevergrad's settings",
            multi_objective=False,
            generational=False,
            arguments={
                "optimizer": choice(
                    _DEFAULT,
                    "as nevergrad names it",
                    *(name for name in OPTIMIZERS if name != _DEFAULT),
                )
            },
            build=builder("ng", "by_name"),
            ends=lambda arguments: OPTIMIZERS[str(arguments["optimizer"])] is Start.SEQUENCE,
        ),
    }
)
