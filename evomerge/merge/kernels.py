"""The CPU kernels: one pass over memory, compiled by numba.

Plain torch was measured at 6-19 % of the memory bound for bfloat16 with fp32 accumulation,
because every step is a pass of its own; here a tile stays in the first-level cache from the
first read to the one rounding. Arithmetic is IEEE float32, multiply and add rounded separately
(numba does not contract them without ``fastmath``), in the order of the experts, so the result
does not depend on tiling or threads and equals the NumPy twin bit for bit.

Arrays reach the kernels as addresses because the number of experts and their dtypes are data,
not types: one compiled function serves all studies.
"""

# numba compiles these functions from their source; the annotations are for readers only.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

TILE = 2048  # elements; (K + 3) float32 tiles stay within a 32-48 KiB first-level cache

#: Codes of the dtypes in the kernels' tables.
CODES = {"F32": 0, "BF16": 1, "F16": 2}

_jit = numba.njit(nogil=True, cache=True, error_model="numpy", inline="never")


@intrinsic
def _pointer(typingctx, address):
    """Turn an integer address into a pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


def _half_table() -> np.ndarray:
    """Return the float32 value of every float16 bit pattern [65536]."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


HALF = _half_table()


@_jit
def _load(address, code, start, count, half, out, out_bits):
    """Decode ``count`` elements into the float32 tile ``out`` (``out_bits`` is its bit view)."""
    if code == 0:
        source = numba.carray(_pointer(address + 4 * start), count, np.float32)
        for i in range(count):
            out[i] = source[i]
    elif code == 1:
        source2 = numba.carray(_pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            out_bits[i] = np.uint32(source2[i]) << np.uint32(16)
    else:
        source3 = numba.carray(_pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            out[i] = half[source3[i]]


@_jit
def _bf16(bits):
    """Round float32 bits to bfloat16 bits, to nearest even; NaN stays a quiet NaN."""
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@_jit
def _store(address, code, start, count, tile, bits):
    """Round the tile once to the output dtype and write it; destroys the tile for float16."""
    if code == 0:
        target = numba.carray(_pointer(address + 4 * start), count, np.float32)
        for i in range(count):
            target[i] = tile[i]
    elif code == 1:
        target2 = numba.carray(_pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            target2[i] = _bf16(bits[i])
    else:
        target3 = numba.carray(_pointer(address + 2 * start), count, np.uint16)
        _store_half(target3, count, tile, bits)


@_jit
def _store_half(target, count, tile, bits):
    """Round float32 to float16, to nearest even, subnormals and overflow included."""
    for i in range(count):
        sign = np.uint16((bits[i] >> np.uint32(16)) & np.uint32(0x8000))
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        if magnitude >= np.uint32(0x47800000):  # 65536 and above: infinity, or NaN
            value = np.uint16(0x7E00 if magnitude > np.uint32(0x7F800000) else 0x7C00)
        elif magnitude < np.uint32(0x38800000):  # below the smallest normal half, 2^-14
            # Adding 0.5 puts the subnormal grid 2^-24 at the last bit, so the addition rounds.
            tile[i] = np.abs(tile[i]) + np.float32(0.5)
            value = np.uint16(bits[i] - np.uint32(0x3F000000))
        else:
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            value = np.uint16((magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
        target[i] = sign | value


@_jit
def mix(value):
    """Finalize 32 bits so that every input bit reaches every output bit (Appleby's fmix32).

    numba widens uint32 products and sums to 64 bits, so every step is cut back by hand.
    """
    value = np.uint32(value ^ (value >> np.uint32(16)))
    value = np.uint32(value * np.uint32(0x85EBCA6B))
    value = np.uint32(value ^ (value >> np.uint32(13)))
    value = np.uint32(value * np.uint32(0xC2B2AE35))
    return np.uint32(value ^ (value >> np.uint32(16)))


@_jit
def counter_hash(key, index):
    """Return 32 uniform bits of (key, 64-bit canonical element index)."""
    low = np.uint32(index & np.int64(0xFFFFFFFF))
    high = np.uint32(index >> np.int64(32))
    return mix(np.uint32(mix(np.uint32(low ^ key)) ^ np.uint32(high + np.uint32(0x9E3779B9))))


@_jit
def _scaled(total, origin, scale, count):
    """Set ``total`` to scale·origin."""
    for i in range(count):
        total[i] = scale * origin[i]


@_jit
def _add_delta(total, other, origin, weight, count):
    """Add weight·(other - origin) to ``total``; two roundings after the difference's."""
    for i in range(count):
        total[i] = total[i] + weight * (other[i] - origin[i])


@_jit
def merge_linear(work, out, out_code, base, base_code, experts, codes, c0, c, half):
    """Apply a linear plan to a list of tiles.

    Args:
        work: (span, first element, number of elements) [N, 3]; elements count from the
            beginning of the slot's data, as the addresses do.
        out: addresses of the outputs [S].
        out_code: dtype code of the outputs [S].
        base: addresses of the base [S].
        base_code: dtype codes [S].
        experts: addresses [S, K].
        codes: dtype codes [S, K].
        c0: base coefficients [S].
        c: expert coefficients [S, K].
        half: ``HALF``.
    """
    origin = np.empty(TILE, np.float32)
    other = np.empty(TILE, np.float32)
    total = np.empty(TILE, np.float32)
    origin_bits, other_bits = origin.view(np.uint32), other.view(np.uint32)
    total_bits = total.view(np.uint32)
    for n in range(len(work)):
        span, first, left = work[n, 0], work[n, 1], work[n, 2]
        while left > 0:
            count = min(left, TILE)
            _load(base[span], base_code[span], first, count, half, origin, origin_bits)
            _scaled(total, origin, c0[span], count)
            for k in range(experts.shape[1]):
                weight = c[span, k]
                if weight != np.float32(0.0):
                    _load(experts[span, k], codes[span, k], first, count, half, other, other_bits)
                    _add_delta(total, other, origin, weight, count)
            _store(out[span], out_code[span], first, count, total, total_bits)
            first += count
            left -= count


@_jit
def _subtract(delta, origin, count):
    """Turn weights into deltas."""
    for i in range(count):
        delta[i] = delta[i] - origin[i]


@_jit
def _trim_below(bits, cut, count):
    """Zero every value whose magnitude key is below ``cut``."""
    limit = np.uint32(cut) << np.uint32(16)
    for i in range(count):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        bits[i] = bits[i] if magnitude >= limit else np.uint32(0)


@_jit
def _draw_edge(bits, cut, part, key, index, count):
    """Keep a hashed share of the values whose key is ``cut``."""
    for i in range(count):
        if (bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16) == cut and np.int64(
            counter_hash(key, index + i)
        ) >= part:
            bits[i] = np.uint32(0)


@_jit
def _vote(vote, delta, weight, elect, count):
    """Add one expert's ballots; see ``Elect``."""
    if elect == 1:
        for i in range(count):
            vote[i] = vote[i] + weight * delta[i]
    elif elect == 2:
        for i in range(count):
            vote[i] = vote[i] + delta[i]
    else:
        for i in range(count):
            ballot = weight * delta[i]
            up = np.float32(1.0) if ballot > np.float32(0.0) else np.float32(0.0)
            down = np.float32(1.0) if ballot < np.float32(0.0) else np.float32(0.0)
            vote[i] = vote[i] + (up - down)


@_jit
def _combine(total, divisor, vote, delta, weight, elect, share, count):
    """Add one expert's deltas where they agree with the vote, and its share of the divisor."""
    sign = np.float32(1.0)
    if elect != 2 and weight < np.float32(0.0):
        sign = np.float32(-1.0)
    zero = np.float32(0.0)
    for i in range(count):
        ballot = sign * delta[i]
        agrees = (ballot > zero and vote[i] >= zero) or (ballot < zero and vote[i] < zero)
        total[i] = total[i] + (weight * delta[i] if agrees else zero)
        divisor[i] = divisor[i] + (share if agrees else zero)


@_jit
def _finish(total, divisor, vote, origin, scale, divide, plus, count):
    """Turn elected sums into weights."""
    zero, one = np.float32(0.0), np.float32(1.0)
    if divide:
        for i in range(count):
            total[i] = total[i] / (divisor[i] if divisor[i] != zero else one)
    if not plus:
        for i in range(count):
            total[i] = total[i] if vote[i] != zero else zero
    for i in range(count):
        total[i] = origin[i] + scale * total[i]


@_jit
def merge_elected(
    work, out, out_code, base, base_code, experts, codes, c, scale,
    edge, share, keys, canonical, elect, divisor, plus, half,
):  # fmt: skip
    """Apply an elected plan (TIES family) to a list of tiles.

    Args as in ``merge_linear``, and:
        scale: lambda [S].
        edge: magnitude key at the cut [S, K].
        share: share of the edge bin kept, times 2^32 [S, K].
        keys: hash key of each expert [K].
        canonical: canonical index of the first element of each span's slot [S].
        elect: an ``Elect`` other than NONE.
        divisor: a ``Divisor``.
        plus: a drawn election counts as positive, else the element keeps the base.
    """
    experts_count = experts.shape[1]
    origin = np.empty(TILE, np.float32)
    total = np.empty(TILE, np.float32)
    vote = np.empty(TILE, np.float32)
    sums = np.empty(TILE, np.float32)
    deltas = np.empty((experts_count, TILE), np.float32)
    origin_bits, total_bits = origin.view(np.uint32), total.view(np.uint32)
    one = np.float32(1.0)
    for n in range(len(work)):
        span, first, left = work[n, 0], work[n, 1], work[n, 2]
        while left > 0:
            count = min(left, TILE)
            _load(base[span], base_code[span], first, count, half, origin, origin_bits)
            vote[:], total[:], sums[:] = 0.0, 0.0, 0.0
            for k in range(experts_count):
                weight = c[span, k]
                if weight == np.float32(0.0):
                    continue
                delta = deltas[k]
                bits = delta.view(np.uint32)
                _load(experts[span, k], codes[span, k], first, count, half, delta, bits)
                _subtract(delta, origin, count)
                cut, part = edge[span, k], share[span, k]
                if cut > 0:
                    _trim_below(bits, cut, count)
                if part < np.int64(1) << np.int64(32):
                    index = canonical[span] + first
                    _draw_edge(bits, cut, part, keys[k], index, count)
                _vote(vote, delta, weight, elect, count)
            for k in range(experts_count):
                weight = c[span, k]
                if weight != np.float32(0.0):
                    part_of = weight if divisor == 1 else one
                    _combine(total, sums, vote, deltas[k], weight, elect, part_of, count)
            _finish(total, sums, vote, origin, scale[span], divisor != 0, plus, count)
            _store(out[span], out_code[span], first, count, total, total_bits)
            first += count
            left -= count


@_jit
def count_keys(base, base_code, expert, code, size, half, histogram):
    """Add the magnitude keys of one tensor's delta to ``histogram`` [KEYS, int64]."""
    origin = np.empty(TILE, np.float32)
    other = np.empty(TILE, np.float32)
    origin_bits, other_bits = origin.view(np.uint32), other.view(np.uint32)
    first = 0
    while first < size:
        count = min(size - first, TILE)
        _load(base, base_code, first, count, half, origin, origin_bits)
        _load(expert, code, first, count, half, other, other_bits)
        for i in range(count):
            other[i] = other[i] - origin[i]
        for i in range(count):
            histogram[(other_bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1
        first += count


@_jit
def count_not_finite(address, code, size, half):
    """Return how many elements are NaN or infinite."""
    tile = np.empty(TILE, np.float32)
    bits = tile.view(np.uint32)
    first, bad = 0, 0
    while first < size:
        count = min(size - first, TILE)
        _load(address, code, first, count, half, tile, bits)
        for i in range(count):
            if (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000):
                bad += 1
        first += count
    return bad
