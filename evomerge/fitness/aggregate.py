"""From item scores to the value of an objective, as lm-eval aggregates them.

Plain data and arithmetic: the driver can compute the value again from item scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from evomerge.errors import EvaluationError
from evomerge.estimate import Answers, Estimate

#: What is done with the mean of the item scores: nothing, its exponential (perplexity), or its
#: value in bits instead of nats.
Link = Literal["mean", "exp", "bits"]

_NOTHING: Mapping[str, float] = {}
_ONE: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Aggregate:
    """How the item scores of one objective become its value.

    The value is link(Σ w·score / Σ w). Scores of perplexities are negative log-likelihoods in
    nats per unit (word, byte or text), and w is the number of units of the item. With strata the
    value is the plain mean of the values of the strata: lm-eval's groups whose tasks count the
    same whatever their size.

    Attributes:
        link: see ``Link``.
        weights: w by item id; empty where all are 1.
        strata: task of each item by item id; empty where there is one.
    """

    link: Link = "mean"
    weights: Mapping[str, float] = field(default_factory=lambda: _NOTHING)
    strata: Mapping[str, str] = field(default_factory=lambda: _ONE)

    def estimate(
        self, ids: Sequence[str], scores: Sequence[float], pool: Sequence[str] | None = None
    ) -> tuple[float, float]:
        """Return the value and its standard error.

        The error of the weighted mean is that of a ratio (Cochran 1977, eq. 2.45), which for
        equal weights is the sample standard deviation over the root of n; through the link it
        goes by the delta method. A stratum with a single item is taken to spread as the others
        do. Of the n items of a pool of N, or of a stratum of it, the share 1 - n / N is unknown,
        and the variance is that much smaller (Cochran 1977, eq. 2.20).

        Args:
            ids: of the items [n], n >= 1; any order, it changes nothing.
            scores: of the items [n].
            pool: items that the n were drawn from [N]; None where they stand for more.

        Raises:
            EvaluationError: the value is too large to be a number.
        """
        unknown = self._unknown(ids, pool)
        if not self.strata:
            mean, spread = self._moments(ids, scores)
            value, slope = self._linked(mean)
            return value, slope * math.sqrt((spread or 0.0) * unknown[""])
        groups: dict[str, list[tuple[str, float]]] = {}
        for item, score in zip(ids, scores, strict=True):
            groups.setdefault(self.strata[item], []).append((item, score))
        values, variances = [], []
        single: list[float] = []  # unknown shares of the strata that have one item
        known: list[float] = []  # variances of single items, of the strata that have one
        for name in sorted(groups):
            own, numbers = zip(*groups[name], strict=True)
            mean, spread = self._moments(own, numbers)
            value, slope = self._linked(mean)
            values.append(value)
            if spread is None:
                single.append(unknown[name])
            else:
                variances.append(slope**2 * spread * unknown[name])
                known.append(slope**2 * spread * len(own))
        total = math.fsum(variances)
        if single and known:
            total += math.fsum(single) * math.fsum(known) / len(known)
        elif len(single) > 1:  # single items everywhere
            middle = math.fsum(values) / len(single)
            spread = math.fsum((v - middle) ** 2 for v in values) / (len(single) - 1)
            total = math.fsum(single) * spread
        return math.fsum(values) / len(values), math.sqrt(total) / len(values)

    def _unknown(self, ids: Sequence[str], pool: Sequence[str] | None) -> dict[str, float]:
        """Return which share of each stratum has no score; all of it where there is no pool."""
        names = [self.strata[item] if self.strata else "" for item in ids]
        if pool is None:
            return dict.fromkeys(names, 1.0)
        sizes = Counter(self.strata[item] if self.strata else "" for item in pool)
        return {name: 1.0 - count / sizes[name] for name, count in Counter(names).items()}

    def effects(self, ids: Sequence[str], scores: Sequence[float]) -> tuple[float, ...]:
        """Return by how much each item moves the value, to first order [n].

        The sum of their squares is the squared standard error of ``estimate`` without a finite
        population, but for strata with a single item, whose effect is 0. They are linear: the
        effects of a difference of two values on the same items are the differences of the effects
        (the delta method for paired samples; infinitesimal jackknife, Jaeckel 1972).

        Args:
            ids: of the items [n], n >= 1.
            scores: of the items [n].

        Raises:
            EvaluationError: the value is too large to be a number.
        """
        groups: dict[str, list[int]] = {}
        for place, item in enumerate(ids):
            groups.setdefault(self.strata[item] if self.strata else "", []).append(place)
        effects = [0.0] * len(scores)
        values = {}
        for name, places in groups.items():
            own = [scores[place] for place in places]
            w = [self.weights[ids[place]] if self.weights else 1.0 for place in places]
            total, n = math.fsum(w), len(own)
            mean = math.fsum(a * b for a, b in zip(w, own, strict=True)) / total
            values[name], slope = self._linked(mean)
            scale = slope * math.sqrt(n / (n - 1)) / total / len(groups) if n > 1 else 0.0
            for place, weight, score in zip(places, w, own, strict=True):
                effects[place] = scale * weight * (score - mean)
        if 1 < len(groups) == len(ids):  # single items everywhere: the strata are the sample
            middle = math.fsum(values.values()) / len(groups)
            scale = 1 / math.sqrt(len(groups) * (len(groups) - 1))
            for name, places in groups.items():
                effects[places[0]] = scale * (values[name] - middle)
        return tuple(effects)

    def of_single_items(self, ids: Sequence[str], effects: Sequence[float]) -> float:
        """Return the variance that strata with a single item add to the squares of effects.

        They are taken to spread as the items of the other strata do; see ``estimate``.

        Args:
            ids: of the items [n].
            effects: of the items [n], or differences of such.
        """
        groups: dict[str, list[float]] = {}
        for item, effect in zip(ids, effects, strict=True):
            groups.setdefault(self.strata[item] if self.strata else "", []).append(effect)
        known = [len(own) * math.fsum(e**2 for e in own) for own in groups.values() if len(own) > 1]
        return (len(groups) - len(known)) * math.fsum(known) / len(known) if known else 0.0

    def _moments(self, ids: Sequence[str], scores: Sequence[float]) -> tuple[float, float | None]:
        """Return the weighted mean and its variance, None for a single item, which has none."""
        n = len(scores)
        # fsum rounds once, so that the order of the items cannot be seen.
        if not self.weights:
            mean = math.fsum(scores) / n
            if n == 1:
                return mean, None
            return mean, math.fsum((score - mean) ** 2 for score in scores) / (n - 1) / n
        w = [self.weights[item] for item in ids]
        total = math.fsum(w)
        mean = math.fsum(a * b for a, b in zip(w, scores, strict=True)) / total
        if n == 1:
            return mean, None
        spread = math.fsum((a * (b - mean)) ** 2 for a, b in zip(w, scores, strict=True))
        return mean, spread * n / (n - 1) / total**2

    def _linked(self, mean: float) -> tuple[float, float]:
        """Return the link's value and slope."""
        if self.link == "mean":
            return mean, 1.0
        if self.link == "bits":
            return mean / math.log(2), 1 / math.log(2)
        try:
            value = math.exp(mean)
        except OverflowError as error:
            raise EvaluationError(
                f"the mean negative log-likelihood is {mean:.4g} nats per unit: the perplexity "
                "is too large to be a number"
            ) from error
        return value, value


class MeanEstimator:
    """The aggregate of what was scored; knows nothing of what was not.

    Args:
        aggregates: of the objectives [m].
        pools: what the scored items of an objective are drawn from [m]; None where they stand
            for more than the split that they are from.
    """

    def __init__(
        self,
        aggregates: Sequence[Aggregate],
        pools: Sequence[Sequence[str] | None] | None = None,
    ) -> None:
        self._aggregates = tuple(aggregates)
        self._pools = tuple(pools or [None] * len(self._aggregates))

    def estimate(self, objective: int, answers: Answers) -> Estimate:
        """Return the estimate of one objective; see ``Estimator``."""
        value, error = self._aggregates[objective].estimate(
            answers.ids, answers.scores, self._pools[objective]
        )
        return Estimate(value, error, {"items": float(len(answers.ids))})
