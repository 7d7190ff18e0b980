"""A recipe in the form the kernels take: numbers per span and expert, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from evomerge.merge.cells import Cells

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
#: Step between the hash counters of two elements: odd, near 2^32 over the golden ratio.
HASH_STEP = 0x9E3779B1
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
    FACTORS = 6  # s·(Σ c·B)(Σ c·S(A)) of LoRA adapters; never in the kernels of deltas


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
        start: where each curve begins in the entries [S, K].
        length: number of its keys [S, K]; higher keys take its last value.
        entries: by key, all curves in a row [entries, 2]; the bits of the delta's factor, then
            the largest hash that passes. Side by side because a look-up is what costs.
        made_from: numbers that each curve follows from, given the sources [S, K, any].
    """

    first: I32
    start: I64
    length: I64
    entries: U32
    made_from: F64

    @property
    def passing(self) -> U32:
        """Largest hash that passes, by key, all curves in a row."""
        return self.entries[:, 1]

    @property
    def gain(self) -> F32:
        """Factor of the delta, by key, all curves in a row."""
        return self.entries[:, 0].view(np.float32)


#: Edges between the steps of one expert; the fused kernels write them out.
STEPS = 8


@dataclass(frozen=True)
class Steps:
    """A gain that changes at few magnitude keys; everything stays.

    Attributes:
        edges: lowest key of each step but the first, rising [S, K, STEPS]; KEYS where unused.
        gain: factor of the delta [S, K, STEPS + 1].
    """

    edges: U32
    gain: F32

    def curves(self) -> Curves:
        """Return the same as curves."""
        spans, experts, steps = self.edges.shape
        edges, gain = self.edges.reshape(-1, steps), self.gain.reshape(-1, steps + 1)
        used = edges < KEYS
        last = np.where(used, edges, 0).max(axis=1).astype(np.int64)
        first = np.maximum(np.where(used, edges, KEYS).min(axis=1).astype(np.int64) - 1, 0)
        first = np.minimum(first, last)
        length = last - first + 1
        start = np.concatenate([[0], np.cumsum(length)])
        entries = np.empty((start[-1], 2), np.uint32)
        entries[:, 1] = ALWAYS
        for n in range(len(edges)):
            keys = np.arange(first[n], last[n] + 1)
            step = np.searchsorted(edges[n], keys, side="right")
            entries[start[n] : start[n + 1], 0] = gain[n, step].view(np.uint32)
        shape = (spans, experts)
        return Curves(
            first=first.reshape(shape).astype(np.int32),
            start=start[:-1].reshape(shape),
            length=length.reshape(shape),
            entries=entries,
            made_from=self.gain.astype(np.float64),
        )


@dataclass(frozen=True)
class Select:
    """Which elements of each delta stay, from their magnitude keys and the counter hash.

    An element stays when low <= key <= high and its hash is at most ``at_low`` on the lowest
    key, ``at_high`` on the highest, ``inside`` in between.

    Attributes:
        low, high: keys [S, K]; nothing stays where low is KEYS.
        at_low, at_high, inside: largest hash that passes [S, K].
        tables: curves instead of all these, where given.
        steps: likewise.
    """

    low: U32
    high: U32
    at_low: U32
    at_high: U32
    inside: U32
    tables: Curves | None = None
    steps: Steps | None = None

    @cached_property
    def curves(self) -> Curves | None:
        """Curves instead of two cuts, or steps written as such."""
        return self.steps.curves() if self.steps is not None else self.tables

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
class Joint:
    """Which elements stay for all experts at once, by how far the experts lie apart there.

    The key of an element is that of Σ_k (δ_k - mean)², K times the variance over all experts,
    those with c = 0 too. It stays where key > low, or where key == low and its hash (one for
    all experts: that of the first) is at most ``at_low``.

    Attributes:
        low: keys [S]; 0 keeps everything.
        at_low: largest hash that passes on that key [S].
    """

    low: U32
    at_low: U32


@dataclass(frozen=True)
class Importances:
    """Which elements of a single expert stay: those with |δ|·rows >= low.

    The factors are float32, so that the product is exact in float64: in a row with few different
    changes many elements lie exactly at the threshold, and mergekit keeps these.

    Attributes:
        rows: factor of each row of the last axis, all slots after each other; the same object
            for every plan over the same models.
        first: canonical index of the first element of the span's slot [S].
        start: where the rows of that slot begin [S].
        width: elements of a row [S].
        low: smallest importance that stays [S].
    """

    rows: F32
    first: I64
    start: I64
    width: I64
    low: F64


@dataclass(frozen=True)
class Plan:
    """One candidate for the kernels; S spans, K experts.

    Linear:   W = c0·W0 + Σ_k c[k]·δ_k  with δ_k = W_k - W0.
    Sum:      W = W0 + Σ_k c[k]·select(δ_k).
    Elected:  W = W0 + scale·(Σ_k c[k]·x_k / divisor) over the experts whose x_k = select(δ_k)
              has the elected sign.
    Factors:  W = W0 + s·(Σ_k c[k]·B_k)·(Σ_k c[k]·A_k[|A_k| >= shares[k]]), one span per slot.
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
        shares: what each expert adds to the divisor [S, K]; of FACTORS the smallest |A| that
            stays.
        select: which elements stay; None for all.
        joint: which stay for all experts at once; before ``select``, None for all.
        important: which stay by importance, of a single expert; None for all.
        local: the parameters of NEARSWAP (t), RAM (epsilon), CONSENSUS (votes) [S], and the
            mask thresholds of CONSENSUS [S, K] in ``shares``.
        seed: of the counter hash.
        cells: where given, ``base`` [R] and ``weights`` [R, K] are per cell; only linear.
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
    joint: Joint | None = None
    important: Importances | None = None
    cells: Cells | None = None

    @property
    def spans(self) -> int:
        """S."""
        return len(self.base) if self.cells is None else len(self.cells.width)

    def changed(self, other: Plan | None) -> npt.NDArray[np.bool_]:
        """Return which spans differ from ``other`` [S]; the rest is equal bit for bit."""
        entries = len(self.base)
        if (
            other is None
            or self._rules() != other._rules()
            or self.cells is not other.cells
            or len(other.base) != entries
        ):
            return np.ones(self.spans, dtype=np.bool_)
        result = np.zeros(entries, dtype=np.bool_)
        for mine, theirs in zip(self._arrays(), other._arrays(), strict=True):
            # As bits: the base times -0.0 has other zeros than times 0.0.
            other_bits = mine.view(f"u{mine.itemsize}") != theirs.view(f"u{theirs.itemsize}")
            # One expert after the other: ``any`` over so short an axis takes longer.
            for column in other_bits.reshape(entries, -1).T:
                result |= column
        return result if self.cells is None else self.cells.any_of(result)

    def _rules(self) -> tuple[object, ...]:
        given = tuple(getattr(self, field.name) is None for field in fields(self))
        kinds = None if self.select is None else (
            self.select.tables is None, self.select.steps is None
        )  # fmt: skip
        # Both plans are alive here, so equal identities mean the same array.
        rows = id(self.important.rows) if self.important is not None else None
        return (self.rule, self.elect, self.divisor, self.zero_sum, self.seed, given, kinds, rows)

    def _arrays(self) -> list[npt.NDArray[np.generic]]:
        arrays = [self.base, self.weights, self.scale, self.shares, self.local]
        found: list[npt.NDArray[np.generic]] = [array for array in arrays if array is not None]
        if self.select is not None:
            chosen = self.select
            found += [chosen.low, chosen.high, chosen.at_low, chosen.at_high, chosen.inside]
            if chosen.tables is not None:
                found += [chosen.tables.made_from]
            if chosen.steps is not None:
                found += [chosen.steps.edges, chosen.steps.gain]
        if self.joint is not None:
            found += [self.joint.low, self.joint.at_low]
        if self.important is not None:
            found += [self.important.start, self.important.width, self.important.low]
        return found
