"""Values and standard errors from the scores of a sample of items."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.fitness.irt.population import Population, Rows, Sample
from evomerge.fitness.irt.predictors import (
    Predictor,
    ability_predictor,
    cell_predictor,
    margin_predictor,
    published_ability,
    published_weights,
    weights_predictor,
)

Floats = NDArray[np.float64]

#: Parts of a sample that are each predicted from the others in ``ppi``.
FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Estimates:
    """Values of one objective for n candidates, from the same items.

    Attributes:
        values: [n], in the objective's unit.
        standard_errors: of the values [n].
        facts: of the estimator, by name [n].
    """

    values: Floats
    standard_errors: Floats
    facts: Mapping[str, Floats] = field(default_factory=dict)


Run = Callable[[Sample], Estimates]


def mean(population: Population) -> Run:
    """Mean over the items, weighted as in the value; ``mean_of`` where all weights are equal.

    Of items that a design picked it is biased, and its error, that of drawn items, does not say so.
    """

    def run(sample: Sample) -> Estimates:
        weights = population.weights[sample.rows]
        return _mean(population, sample, weights / weights.sum(), _unknown(population, sample))

    return run


def _unknown(population: Population, sample: Sample) -> Floats:
    """Return the share of what each item stands for that has no score, all alike [s]."""
    count = len(sample.rows)
    return np.full(count, 1.0 - count / len(population))


def _mean(population: Population, sample: Sample, weights: Floats, unknown: Floats) -> Estimates:
    """Return the mean with some weights that sum to 1 [s]."""
    variance = _variance(population, sample.rows, sample.scores, weights, unknown)
    return Estimates(sample.scores @ weights, np.sqrt(variance))


def _variance(
    population: Population, rows: Rows, scores: Floats, weights: Floats, unknown: Floats
) -> Floats:
    """Return the variance of a weighted mean over the draws of its items [n].

    Items that were drawn within their groups differ from draw to draw within them only; the first
    ones of them, which a race looks at, are of any group by chance. Else it is that of the
    linearised ratio (Cochran 1977, 6.4) with a finite population correction for each item, which
    for unequal chances is Hajek's (1964) approximation. A single item has none.

    Args:
        population: of the items.
        rows: of the items [s].
        scores: or residuals of them [n, s].
        weights: summing to 1 [s].
        unknown: 1 - an item's chance to be drawn [s]; of groups it is their own.
    """
    if population.within_groups == len(rows):
        return _variance_within(population, rows, scores, weights)
    count = scores.shape[1]
    if count == 1:
        return np.zeros(len(scores))
    residuals = (scores - (scores @ weights)[:, None]) * weights
    return np.asarray((residuals**2 @ unknown) * count / (count - 1))


def stratified(population: Population) -> Run:
    """Mean per group of items; groups without an item are left out, and the fact is recorded."""
    group, sizes = population.grouping()
    mass = np.bincount(group, weights=population.weights) / population.weights.sum()

    def run(sample: Sample) -> Estimates:
        inside = group[sample.rows]
        own = population.weights[sample.rows]
        totals = np.bincount(inside, weights=own, minlength=len(sizes))
        covered = float(mass[totals > 0].sum())
        weights = own / totals[inside] * mass[inside] / covered
        variance = _variance_within(population, sample.rows, sample.scores, weights)
        facts = {"covered": np.full(len(sample.scores), covered)}
        return Estimates(sample.scores @ weights, np.sqrt(variance), facts)

    return run


def _variance_within(population: Population, rows: Rows, scores: Floats, weights: Floats) -> Floats:
    """Return the variance of a mean whose items were drawn within groups (Cochran 1977, 5.6) [n].

    A group of one item has no spread of its own; it is taken to spread as the others do.
    """
    group, sizes = population.grouping()
    inside = group[rows]
    counts = np.bincount(inside, minlength=len(sizes))
    unknown = 1.0 - counts / sizes
    variance = np.zeros(len(scores))
    parts = [np.flatnonzero(inside == number) for number in np.unique(inside)]
    pooled = _pooled_variance([scores[:, part] for part in parts])
    for part in parts:
        w, left, count = weights[part], unknown[inside[part[0]]], len(part)
        if count == 1:
            variance += w[0] ** 2 * left * pooled
            continue
        middle = scores[:, part] @ (w / w.sum())
        squares = (((scores[:, part] - middle[:, None]) * w) ** 2).sum(axis=1)
        variance += squares * left * count / (count - 1)
    return variance


def _pooled_variance(parts: Sequence[Floats]) -> Floats:
    """Return the variance within groups, over those with two items or more; else over all [n]."""
    freedom = sum(scores.shape[1] - 1 for scores in parts)
    if freedom == 0:
        every = np.hstack(parts)
        return every.var(axis=1, ddof=1) if every.shape[1] > 1 else np.zeros(len(every))
    squares = sum(((s - s.mean(axis=1, keepdims=True)) ** 2).sum(axis=1) for s in parts)
    return np.asarray(squares / freedom)


def weighted_mean(population: Population) -> Run:
    """Mean weighted by the design.

    An item that stands for the share W of the value and is the share w of it itself leaves
    1 - w / W unknown. Of drawn items w / W is their chance. Anchors are not drawn; each is taken
    to be one of its cluster, and clusters to differ as items do: they are at least as good.
    """

    def run(sample: Sample) -> Estimates:
        weights = _subset_weights(population, sample)
        unknown = _unknown(population, sample)
        if population.subset_weights:
            own = population.weights[sample.rows] / len(population)
            unknown = 1.0 - np.minimum(own / weights, 1.0)
        return _mean(population, sample, weights, unknown)

    return run


def _subset_weights(population: Population, sample: Sample) -> Floats:
    """Return the weights of the sampled items, summing to 1 [s]."""
    ids = [population.ids[row] for row in sample.rows]
    if not population.subset_weights:
        weights = population.weights[sample.rows]
        return np.asarray(weights / weights.sum())
    missing = [name for name in ids if name not in population.subset_weights]
    if missing:
        raise InputError(
            f"anchor: item {missing[0]!r} has no weight (estimate from the items of the design)"
        )
    chosen = np.array([population.subset_weights[name] for name in ids])
    return np.asarray(chosen / chosen.sum())


def filled_in(population: Population, predictor: Predictor, *, weighted: bool = False) -> Run:
    """Return what was seen as it is, and the rest as predicted.

    The variance is that of the parameters, of the unseen answers, and of the bank's own error on
    models that it had not seen, where that is known (fitness.md 2.6).
    """
    bank_error = population.bank.error if population.bank is not None else 0.0

    def run(sample: Sample) -> Estimates:
        share = population.weights / len(population)
        unseen = share.copy()
        unseen[sample.rows] = 0.0
        guess = predictor(sample, unseen)
        if weighted:  # MERGE^3: tau * W, with the design's weights
            seen = (
                len(sample.rows)
                / len(population)
                * (sample.scores @ _subset_weights(population, sample))
            )
        else:
            seen = sample.scores @ share[sample.rows]
        noise = (guess.p * (1.0 - guess.p)) @ unseen**2
        model = (bank_error * unseen.sum()) ** 2
        errors = np.sqrt(guess.variance + noise + model)
        return Estimates(seen + guess.p @ unseen, errors, guess.facts)

    return run


def published(population: Population, predictor: Predictor, *, weighted: bool = False) -> Run:
    """Return a published estimate, with an error of ours: it has none.

    Without a prior few answers are separated, the fit runs off and its curvature says that
    nothing is uncertain. So the error is at least that of the mean of the same items.
    """
    guess = filled_in(population, predictor, weighted=weighted)
    mean = weighted_mean(population)

    def run(sample: Sample) -> Estimates:
        found = guess(sample)
        errors = np.maximum(found.standard_errors, mean(sample).standard_errors)
        return Estimates(found.values, errors, found.facts)

    return run


def _mixed(mean: Run, guess: Run, weight: Callable[[int], float]) -> Run:
    """Return weight * mean + (1 - weight) * guess; the errors add up as if they went together."""

    def run(sample: Sample) -> Estimates:
        c = weight(len(sample.rows))
        plain, model = mean(sample), guess(sample)
        return Estimates(
            c * plain.values + (1.0 - c) * model.values,
            c * plain.standard_errors + (1.0 - c) * model.standard_errors,
            {**model.facts, "mix": np.full(len(plain.values), c)},
        )

    return run


def pirt(population: Population) -> Run:
    """p-IRT as published."""
    return published(population, published_ability(population))


def pirt_map(population: Population) -> Run:
    """p-IRT with a prior."""
    return filled_in(population, ability_predictor(population))


def mpirt(population: Population) -> Run:
    """mp-IRT as published: the items' balance weights are dropped, the design's are used."""
    return published(population, published_weights(population), weighted=True)


def gpirt(population: Population, kappa: float) -> Run:
    """gp-IRT: c = b^2 / (b^2 + v / (kappa n)), tinyBenchmarks."""
    bank = population.bank
    assert bank is not None
    bias, spread = bank.error**2, bank.variance

    def weight(n: int) -> float:
        return bias / (bias + spread / (kappa * n))

    guess = pirt(population)
    return _mixed(weighted_mean(population), guess, weight)


def gmpirt(population: Population, mix: float) -> Run:
    """gmp-IRT as published: a constant blend."""
    guess = mpirt(population)
    return _mixed(weighted_mean(population), guess, lambda n: mix)


def gmpirt_map(population: Population, prior_sd: float, off_span_sd: float, half: float) -> Run:
    """gmp-IRT with priors; the mean's share n / (n + half) is gp-IRT's, half = v / (kappa b^2)."""
    guess = mpirt_map(population, prior_sd, off_span_sd)
    return _mixed(weighted_mean(population), guess, lambda n: n / (n + half))


def ppi(
    population: Population,
    ridge: float,
    intercept_ridge: float,
    shift_sd: float,
    strength: float,
) -> Run:
    """Return the cross-fitted difference estimator (Angelopoulos 2023; Zrnic and Candes 2024).

    Each fold is predicted from the other items only. Given those, the fold is a random draw from
    the items that they leave, so the estimate is unbiased whatever the predictor.
    """
    ends = population.endpoints
    assert ends is not None
    if ends.margins is not None:
        predictor = margin_predictor(population, ridge, intercept_ridge, shift_sd)
    else:
        predictor = cell_predictor(population, strength)
    total, share = len(population), population.weights / len(population)

    def run(sample: Sample) -> Estimates:
        count = len(sample.rows)
        folds = min(FOLDS, count)
        place = _shuffled_places(population, sample)
        values = np.zeros(len(sample.scores))
        residuals = np.empty_like(sample.scores)
        for fold in range(folds):
            others, inside = np.flatnonzero(place % folds != fold), place % folds == fold
            rows = sample.rows[inside]
            rest = share.copy()
            rest[sample.rows[others]] = 0.0
            p = predictor(sample.part(others), rest).p
            weights = population.weights[rows]
            residuals[:, inside] = (sample.scores[:, inside] - p[:, rows]) * weights
            left = total - len(others)
            seen = sample.scores[:, others] @ share[sample.rows[others]]
            values += seen + p @ rest + residuals[:, inside].mean(axis=1) * left / total
        equal = np.full(count, 1.0 / count)
        variance = _variance(
            population, sample.rows, residuals, equal, _unknown(population, sample)
        )
        facts = {"residual": residuals.mean(axis=1)}
        return Estimates(values / folds, np.sqrt(variance), facts)

    return run


def _shuffled_places(population: Population, sample: Sample) -> Rows:
    """Return the items' places in a random order [s] that depends on the set of items only."""
    order = np.argsort(sample.rows)
    names = repr([population.ids[row] for row in sample.rows[order]]).encode()
    seed = int.from_bytes(hashlib.blake2b(names, digest_size=16).digest(), "big")
    places = np.empty(len(order), dtype=np.intp)
    places[order] = np.random.default_rng(seed).permutation(len(order))
    return places


def soft_reg(population: Population, ridge: float, intercept_ridge: float, shift_sd: float) -> Run:
    """Regression of the margins on the endpoints' margins."""
    return filled_in(population, margin_predictor(population, ridge, intercept_ridge, shift_sd))


def cells(population: Population, strength: float) -> Run:
    """Post-stratification by the endpoints that are right, shrunk (Gelman and Little 1997)."""
    return filled_in(population, cell_predictor(population, strength))


def mpirt_map(population: Population, prior_sd: float, off_span_sd: float) -> Run:
    """mp-IRT with a prior on the weights and an ability off their span."""
    return filled_in(population, weights_predictor(population, prior_sd, off_span_sd))
