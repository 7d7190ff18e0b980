"""Choosing the items that every candidate is scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError, suggest
from evomerge.fitness.irt.anchors import anchors, bank_features
from evomerge.fitness.irt.optimal_design import (
    d_optimal_ability,
    d_optimal_margins,
    d_optimal_weights,
    value_optimal_margins,
)
from evomerge.fitness.irt.population import Design, Population

Floats = NDArray[np.float64]


def random_items(population: Population, n: int, seed: int, name: str) -> Design:
    """Draw items with equal chances, by a hash as splits are drawn.

    Args:
        population: whose items to choose from.
        n: how many.
        seed: of the draw; the same in every process.
        name: of the objective, so that two are drawn independently.
    """
    population.check_size(n)
    rank = _ranks(population, seed, name)
    return population.choice("random", np.argsort(rank)[:n], random=True)


def stratified_items(population: Population, n: int, seed: int, name: str) -> Design:
    """Draw items from every group in proportion to its size, the remainder to the largest rests.

    Raises:
        InputError: the population has no groups, or fewer items are asked for than groups.
    """
    population.check_size(n)
    groups = sorted(set(population.groups))
    if not groups or n < len(groups):
        raise InputError(
            f"design: stratified: expected at least one item for each of {len(groups)} groups "
            f"(at least 1), got {n}"
        )
    group = np.array([groups.index(label) for label in population.groups])
    sizes = np.bincount(group)
    exact = np.maximum(n * sizes / len(population), 1.0)
    counts = np.minimum(np.floor(exact).astype(int), sizes)
    while counts.sum() != n:
        step = 1 if counts.sum() < n else -1
        open_ = counts < sizes if step > 0 else counts > 1
        counts[np.argmax(np.where(open_, step * (exact - counts), -np.inf))] += step
    rank = _ranks(population, seed, name)
    chosen = [
        row
        for number, count in enumerate(counts)
        for row in sorted(np.flatnonzero(group == number), key=lambda row: rank[row])[:count]
    ]
    # Unequal shares after rounding are undone by weights, so that the weighted mean stays unbiased.
    mass = np.bincount(group, weights=population.weights)
    drawn = np.bincount(group[chosen], weights=population.weights[chosen], minlength=len(groups))
    weights = population.weights[chosen] * (mass / drawn)[group[chosen]]
    # Equal chances only where every group got its exact share.
    proportional = bool(np.allclose(counts * len(population), n * sizes))
    return population.choice("stratified", np.array(chosen), weights, random=proportional)


def disagreement_items(population: Population, n: int, seed: int, name: str) -> Design:
    """Draw items on which the endpoints disagree more often, with weights that undo it.

    An item's chance grows with the spread of the endpoints' scores; systematic sampling in a
    random order has exactly these chances (Madow 1949), and the weights are their inverses
    (Hajek), so that the weighted mean stays nearly unbiased.
    """
    population.check_size(n)
    spread = population.scored_endpoints("design: disagreement").scores.var(axis=0)
    # A share for items on which all agree: they are most of the value. With a tenth of the mean
    # their weights are so large that the weighted mean is worse than that of random items.
    want = spread + spread.mean() if spread.any() else np.ones(len(population))
    chance = _inclusion(want, n)
    order = np.argsort(_ranks(population, seed, name))
    start = _unit(seed, name, "start")
    # 1e-12: the chances add up to n only up to rounding.
    ticks = np.floor(np.cumsum(chance[order]) - start + 1.0 + 1e-12)
    chosen = order[np.diff(ticks, prepend=np.floor(1.0 - start)) > 0]
    assert len(chosen) == n
    return population.choice("disagreement", chosen, population.weights[chosen] / chance[chosen])


def _inclusion(want: Floats, n: int) -> Floats:
    """Return chances in proportion to ``want``, at most 1, that add up to n [I]."""
    chance = np.zeros(len(want))
    certain = np.zeros(len(want), dtype=bool)
    while True:
        left = want[~certain]
        chance[certain] = 1.0
        chance[~certain] = (n - certain.sum()) * left / left.sum() if len(left) else 0.0
        if chance.max() <= 1.0 + 1e-12:
            return np.minimum(chance, 1.0)
        certain |= chance >= 1.0


def _unit(seed: int, name: str, item: str) -> float:
    """Return a uniform number in [0, 1) from a hash."""
    digest = hashlib.blake2b(repr((seed, "subset", name, item)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _ranks(population: Population, seed: int, name: str) -> Floats:
    """Return a uniform number per item [I], from (seed, name, id)."""
    return np.array([_unit(seed, name, item) for item in population.ids])


def _by_scores(population: Population, n: int, seed: int, name: str) -> Design:
    """Return anchors by what models scored: those of the bank, else the endpoints."""
    models = population.training
    if models is None:
        models = population.scored_endpoints("design: anchor").scores
    return anchors(population, n, seed, models.T, "anchor")


def _by_bank(population: Population, n: int, seed: int, name: str) -> Design:
    return anchors(population, n, seed, bank_features(population), "anchor_irt")


Choose = Callable[[Population, int, int, str], Design]


def _optimal(choose: Callable[[Population, int, int], Design]) -> Choose:
    """Return a design whose draws need no objective's name: its items differ anyway."""
    return lambda population, n, seed, name: choose(population, n, seed)


#: Ways to choose items by name: (population, n, seed, objective's name) -> design.
DESIGNS: Mapping[str, Choose] = {
    "random": random_items,
    "stratified": stratified_items,
    "anchor": _by_scores,
    "anchor_irt": _by_bank,
    "disagreement": disagreement_items,
    "d_optimal_weights": _optimal(d_optimal_weights),
    "d_optimal_ability": _optimal(d_optimal_ability),
    "d_optimal_margins": _optimal(d_optimal_margins),
    "value_optimal_margins": _optimal(value_optimal_margins),
}


#: Designs whose items are picked, not drawn: another seed gives nearly the same ones.
ANCHORS = frozenset({"anchor", "anchor_irt"})


def choose_items(design: str, population: Population, n: int, seed: int, name: str) -> Design:
    """Choose items by the name of a design.

    Args:
        design: one of ``DESIGNS``.
        population: whose items to choose from.
        n: how many.
        seed: of the choice.
        name: of the objective.

    Raises:
        InputError: an unknown design, one that lacks what it needs, or too many items.
    """
    if design not in DESIGNS:
        raise InputError(f"design: unknown {design!r}{suggest(design, DESIGNS)}")
    return DESIGNS[design](population, n, seed, name)
