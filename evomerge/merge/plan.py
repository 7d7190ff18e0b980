"""A recipe in the form the kernels take: numbers per span and expert, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U32 = npt.NDArray[np.uint32]

#: Magnitude keys: the upper 15 bits of |delta| as float32 (sign dropped, 7 mantissa bits kept),
#: which sort as the magnitudes do. A threshold of KEYS keeps nothing.
KEYS = 1 << 15
KEY_SHIFT = 16
#: A share of 2^32 keeps the whole bin.
WHOLE = 1 << 32
#: Largest hash: every element passes.
ALWAYS = 0xFFFFFFFF


class Rule(IntEnum):
    """How the deltas of one element become its change."""

    LINEAR = 0  # Σ c·δ
    SUM = 1  # Σ c·select(δ)
    ELECT = 2  # TIES family: a sign is elected, deltas of that sign are combined
    NEARSWAP = 3  # clip(t/|δ|, 0, 1)·δ
    RAM = 4  # mean over the experts that changed the element
    CONSENSUS = 5  # Σ c·δ where enough experts agree that it is theirs


class Elect(IntEnum):
    """How the sign of an element is elected (operators.md B2)."""

    WEIGHTED = 1  # mergekit: sign of the sum of weighted deltas
    UNWEIGHTED = 2  # TIES paper, peft: sign of the sum of deltas
    COUNT = 3  # mergekit `count`: sign of the sum of signs


class Divisor(IntEnum):
    """What the elected sum is divided by."""

    ONE = 0
    WEIGHT = 1  # mergekit: sum of the weights that were kept
    COUNT = 2  # TIES paper, peft: number of experts that were kept


class ZeroSum(IntEnum):
    """What an element gets when the election ends in exactly zero."""

    DROP = 0
    PLUS = 1


@dataclass(frozen=True)
class Curves:
    """Keep probability and gain by magnitude key, where two cuts are not enough.

    Attributes:
        first: lowest key of each curve [S, K]; lower keys take its first value.
        start: where each curve begins in the arrays below [S, K].
        length: number of its keys [S, K]; higher keys take its last value.
        passing: largest hash that passes, by key, all curves in a row.
        gain: factor of the delta, by key, all curves in a row.
    """

    first: I32
    start: I64
    length: I64
    passing: U32
    gain: F32


@dataclass(frozen=True)
class Select:
    """Which elements of each delta stay, from their magnitude keys and the counter hash.

    An element stays when low <= key <= high and its hash is at most ``at_low`` on the lowest
    key, ``at_high`` on the highest, ``inside`` in between.

    Attributes:
        low, high: keys [S, K]; nothing stays where low is KEYS.
        at_low, at_high, inside: largest hash that passes [S, K].
        curves: instead of all these, where given.
    """

    low: U32
    high: U32
    at_low: U32
    at_high: U32
    inside: U32
    curves: Curves | None = None

    @staticmethod
    def everything(spans: int, experts: int) -> Select:
        """Return a selection that keeps all elements [S, K]."""
        shape = (spans, experts)
        return Select(
            low=np.zeros(shape, np.uint32),
            high=np.full(shape, KEYS, np.uint32),
            at_low=np.full(shape, ALWAYS, np.uint32),
            at_high=np.full(shape, ALWAYS, np.uint32),
            inside=np.full(shape, ALWAYS, np.uint32),
        )


@dataclass(frozen=True)
class Plan:
    """One candidate for the kernels; S spans, K experts.

    Linear:   W = c0·W0 + Σ_k c[k]·δ_k  with δ_k = W_k - W0.
    Sum:      W = W0 + Σ_k c[k]·select(δ_k).
    Elected:  W = W0 + scale·(Σ_k c[k]·x_k / divisor) over the experts whose x_k = select(δ_k)
              has the elected sign.
    The other rules are in ``Rule``; they give W = W0 + scale·change.
    Everywhere experts with c = 0 are skipped, and where all are the base stays as it is.

    Attributes:
        base: c0 [S]; only linear.
        weights: c [S, K].
        rule: what is done with the deltas.
        elect: the rule of election.
        divisor: what the sum is divided by; an empty divisor counts as one.
        zero_sum: the rule for a drawn election.
        scale: lambda [S]; linear and sum plans have it in ``weights``.
        shares: what each expert adds to the divisor [S, K].
        select: which elements stay; None for all.
        local: the parameters of NEARSWAP (t), RAM (epsilon), CONSENSUS (votes) [S], and the
            mask thresholds of CONSENSUS [S, K] in ``shares``.
        seed: of the counter hash.
    """

    base: F32
    weights: F32
    rule: Rule = Rule.LINEAR
    elect: Elect = Elect.WEIGHTED
    divisor: Divisor = Divisor.ONE
    zero_sum: ZeroSum = ZeroSum.DROP
    scale: F32 | None = None
    shares: F32 | None = None
    select: Select | None = None
    local: F32 | None = None
    seed: int = 0

    def changed(self, other: Plan | None) -> npt.NDArray[np.bool_]:
        """Return which spans differ from ``other`` [S]; the rest is equal bit for bit."""
        spans = len(self.base)
        if other is None or self._rules() != other._rules() or len(other.base) != spans:
            return np.ones(spans, dtype=np.bool_)
        result = np.zeros(spans, dtype=np.bool_)
        for mine, theirs in zip(self._arrays(), other._arrays(), strict=True):
            result |= (mine != theirs).reshape(spans, -1).any(axis=1)
        return result

    def _rules(self) -> tuple[object, ...]:
        curves = self.select.curves if self.select is not None else None
        given = tuple(getattr(self, field.name) is None for field in fields(self))
        # Curves are compared as a whole: they are few and small.
        tables = () if curves is None else tuple(
            getattr(curves, field.name).tobytes() for field in fields(curves)
        )  # fmt: skip
        return (self.rule, self.elect, self.divisor, self.zero_sum, self.seed, given, tables)

    def _arrays(self) -> list[npt.NDArray[np.generic]]:
        arrays = [self.base, self.weights, self.scale, self.shares, self.local]
        found: list[npt.NDArray[np.generic]] = [array for array in arrays if array is not None]
        if self.select is not None:
            chosen = self.select
            found += [chosen.low, chosen.high, chosen.at_low, chosen.at_high, chosen.inside]
        return found
