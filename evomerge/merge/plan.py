"""A recipe in the form the kernels take: numbers per span and expert, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

#: Magnitude keys: the upper 15 bits of |delta| as float32 (sign dropped, 7 mantissa bits kept),
#: which sort as the magnitudes do. A threshold of KEYS keeps nothing.
KEYS = 1 << 15
KEY_SHIFT = 16
#: An edge fraction of 2^32 keeps the whole edge bin.
WHOLE = 1 << 32


class Elect(IntEnum):
    """How the sign of an element is elected (operators.md B2)."""

    NONE = 0
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
class Plan:
    """One candidate for the kernels; S spans, K experts.

    Linear (``elect`` is NONE):  W = c0·W0 + Σ_k c[k]·(W_k - W0), experts with c = 0 skipped.

    Elected:  each delta is kept where its key is above ``edge``, or equal to it and the counter
    hash is below ``share``; the sign is elected; kept deltas of that sign are combined:
    W = W0 + scale·(Σ c[k]·δ_k / divisor).

    Attributes:
        base: c0 [S].
        weights: c [S, K].
        elect: the rule of election.
        divisor: what the sum is divided by; an empty divisor counts as one.
        zero_sum: the rule for a drawn election.
        scale: lambda [S]; only where elected (linear plans have it in ``weights``).
        edge: magnitude key at the cut [S, K].
        share: share of the edge bin that is kept, times 2^32 [S, K].
        seed: of the counter hash.
    """

    base: F32
    weights: F32
    elect: Elect = Elect.NONE
    divisor: Divisor = Divisor.ONE
    zero_sum: ZeroSum = ZeroSum.DROP
    scale: F32 | None = None
    edge: I32 | None = None
    share: I64 | None = None
    seed: int = 0

    def changed(self, other: Plan | None) -> npt.NDArray[np.bool_]:
        """Return which spans differ from ``other`` [S]; the rest is equal bit for bit."""
        spans = len(self.base)
        rules = (self.elect, self.divisor, self.zero_sum, self.seed)
        if other is None or rules != (other.elect, other.divisor, other.zero_sum, other.seed):
            return np.ones(spans, dtype=np.bool_)
        result: npt.NDArray[np.bool_] = (self.base != other.base) | (
            self.weights != other.weights
        ).any(axis=1)
        for mine, theirs in (
            (self.scale, other.scale),
            (self.edge, other.edge),
            (self.share, other.share),
        ):
            if mine is not None and theirs is not None:
                result |= (mine != theirs).reshape(spans, -1).any(axis=1)
        return result
