"""The tiled CPU kernels: any number of experts, mixed dtypes, every rule; compiled by numba.

A tile stays in the first-level cache from the first read to the one rounding. Arithmetic is IEEE
float32, multiply and add rounded separately (numba does not contract them without ``fastmath``),
in the order of the experts, so the result does not depend on tiling or threads and equals the
NumPy twin bit for bit. ``fused`` is faster and gives the same bits where it applies.

Arrays reach the kernels as addresses because the number of experts and their dtypes are data,
not types: one compiled function serves all studies.
"""

# numba compiles these functions from their source; the annotations are for readers only.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import numba
import numpy as np

from evomerge.merge.bits import bf16_of, bits_of, counter_of, draw, float_of, jit, pointer, scatter
from evomerge.merge.joint import keep_important, keep_joint
from evomerge.merge.plan import HASH_STEP

TILE = 2048  # elements; (K + 4) float32 tiles stay within the second-level cache

#: Columns of a product at a time: r + 2 rows of them stay within the first-level cache.
PRODUCT_TILE = 512

#: Codes of the dtypes in the kernels' tables.
CODES = {"F32": 0, "BF16": 1, "F16": 2}


def _half_table() -> np.ndarray:
    """Return the float32 value of every float16 bit pattern [65536]."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


HALF = _half_table()


@jit
def _load(address, code, start, count, half, out, out_bits):
    """Decode ``count`` elements into the float32 tile ``out`` (``out_bits`` is its bit view)."""
    if code == 0:
        source = numba.carray(pointer(address + 4 * start), count, np.float32)
        for i in range(count):
            out[i] = source[i]
    elif code == 1:
        source2 = numba.carray(pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            out_bits[i] = np.uint32(source2[i]) << np.uint32(16)
    else:
        source3 = numba.carray(pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            out[i] = half[source3[i]]


@jit
def _store(address, code, start, count, tile, bits):
    """Round the tile once to the output dtype and write it; destroys the tile for float16."""
    if code == 0:
        target = numba.carray(pointer(address + 4 * start), count, np.float32)
        for i in range(count):
            target[i] = tile[i]
    elif code == 1:
        target2 = numba.carray(pointer(address + 2 * start), count, np.uint16)
        for i in range(count):
            target2[i] = bf16_of(tile[i])
    else:
        target3 = numba.carray(pointer(address + 2 * start), count, np.uint16)
        _store_half(target3, count, tile, bits)


@jit
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


@jit
def run_linear(work, out, out_code, base, base_code, experts, codes, c0, c, half):
    """Apply a linear plan to pieces of work.

    Args:
        work: (span, slot, first element, number of elements) [N, 4]; elements count from the
            beginning of the slot's data, as the addresses do.
        out: address of each slot's output [slots].
        out_code: dtype code of all outputs.
        base: addresses of the base [slots].
        base_code: dtype codes [slots].
        experts: addresses [slots, K].
        codes: dtype codes [slots, K].
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
        span, slot, first, left = work[n, 0], work[n, 1], work[n, 2], work[n, 3]
        while left > 0:
            count = min(left, TILE)
            _load(base[slot], base_code[slot], first, count, half, origin, origin_bits)
            _scaled(total, origin, c0[span], count)
            for k in range(experts.shape[1]):
                weight = c[span, k]
                if weight != np.float32(0.0):
                    _load(experts[slot, k], codes[slot, k], first, count, half, other, other_bits)
                    _add_delta(total, other, origin, weight, count)
            _store(out[slot], out_code, first, count, total, total_bits)
            first += count
            left -= count


@jit
def _scaled(total, origin, scale, count):
    """Set ``total`` to scale·origin."""
    for i in range(count):
        total[i] = scale * origin[i]


@jit
def _add_delta(total, other, origin, weight, count):
    """Add weight·(other - origin) to ``total``; two roundings after the difference's."""
    for i in range(count):
        total[i] = total[i] + weight * (other[i] - origin[i])


@jit
def _scatter(scattered, index, count):
    """Fill ``scattered`` with what the experts' hashes share, for each element of the tile."""
    if index >> np.int64(32) == (index + count - 1) >> np.int64(32):
        counter = counter_of(index)
        for i in range(count):
            scattered[i] = scatter(counter)
            counter = np.uint32(counter + np.uint32(HASH_STEP))
    else:  # the tile crosses a multiple of 2^32
        for i in range(count):
            scattered[i] = scatter(counter_of(index + i))


@jit
def _draws(hashed, scattered, key, count):
    """Fill ``hashed`` with one expert's hash of each element of the tile."""
    for i in range(count):
        hashed[i] = draw(scattered[i], key)


@jit
def _select(bits, hashed, low, high, at_low, at_high, inside, count):
    """Zero what does not stay; see ``plan.Select``."""
    for i in range(count):
        mine = (bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)
        limit = at_high if mine == high else inside
        limit = at_low if mine == low else limit
        stays = (mine >= low) & (mine <= high) & (hashed[i] <= limit)
        bits[i] = bits[i] if stays else np.uint32(0)


@jit
def _curve(bits, hashed, first, passing, gain, count):
    """Keep and scale by the curve of the element's magnitude; see ``plan.Curves``."""
    last = np.int64(len(gain) - 1)
    for i in range(count):
        mine = np.int64((bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16))
        at = min(max(mine - first, np.int64(0)), last)
        value = float_of(bits[i]) * gain[at]
        bits[i] = bits_of(value) if hashed[i] <= passing[at] else np.uint32(0)


@jit
def _vote(vote, delta, weight, count_signs, count):
    """Add one expert's ballots."""
    zero, one = np.float32(0.0), np.float32(1.0)
    for i in range(count):
        ballot = weight * delta[i]
        if count_signs:
            ballot = (one if ballot > zero else zero) - (one if ballot < zero else zero)
        vote[i] = vote[i] + ballot


@jit
def _combine(total, divisor, vote, delta, weight, ballot_weight, share, summing, count):
    """Add one expert's deltas where they agree with the vote, and its share of the divisor."""
    zero = np.float32(0.0)
    for i in range(count):
        ballot = ballot_weight * delta[i]
        agrees = ((ballot != zero) & ((ballot > zero) == (vote[i] >= zero))) | summing
        total[i] = total[i] + (weight * delta[i] if agrees else zero)
        divisor[i] = divisor[i] + (share if agrees else zero)


@jit
def _finish(total, divisor, vote, origin, scale, plus, count):
    """Turn elected sums into weights."""
    zero, one = np.float32(0.0), np.float32(1.0)
    for i in range(count):
        change = total[i] / (divisor[i] if divisor[i] != zero else one)
        change = change if (vote[i] != zero) | plus else zero
        total[i] = origin[i] + scale * change


@jit
def _nearswap(total, deltas, t, count):
    """Move to the expert by clip(t/|δ|, 0, 1); differences below 1e-6 count as 1e-6."""
    for i in range(count):
        size = max(np.abs(deltas[0, i]), np.float32(1e-6))
        total[i] = min(t / size, np.float32(1.0)) * deltas[0, i]


@jit
def _ram(total, changed, deltas, c, epsilon, count):
    """Average the weighted deltas of the experts that changed the element."""
    zero, one = np.float32(0.0), np.float32(1.0)
    for k in range(len(c)):
        if c[k] != zero:
            delta, weight = deltas[k], c[k]
            for i in range(count):
                active = np.abs(delta[i]) > epsilon
                total[i] = total[i] + (weight * delta[i] if active else zero)
                changed[i] = changed[i] + (one if active else zero)
    for i in range(count):
        total[i] = total[i] / (changed[i] if changed[i] > one else one)
        changed[i] = zero  # the divisor has been used


@jit
def _consensus(total, claims, deltas, c, thresholds, votes, count):
    """Keep Σ c·δ where enough experts' masks claim the element (TALL masks)."""
    zero, one = np.float32(0.0), np.float32(1.0)
    for k in range(len(c)):
        if c[k] != zero:
            delta, weight = deltas[k], c[k]
            for i in range(count):
                total[i] = total[i] + weight * delta[i]
    for k in range(len(c)):
        if c[k] != zero:
            delta, threshold = deltas[k], thresholds[k]
            for i in range(count):
                mine = np.abs(delta[i]) > threshold * np.abs(total[i] - delta[i])
                claims[i] = claims[i] + (one if mine else zero)
    for i in range(count):
        total[i] = total[i] if claims[i] >= votes else zero
        claims[i] = zero  # no divisor


@jit
def _load_deltas(experts, codes, first, count, half, origin, deltas):
    """Decode the deltas of all experts into ``deltas`` [K, TILE]."""
    for k in range(len(experts)):
        delta = deltas[k]
        _load(experts[k], codes[k], first, count, half, delta, delta.view(np.uint32))
        for i in range(count):
            delta[i] = delta[i] - origin[i]


@jit
def run_rule(
    work, out, out_code, base, base_code, experts, codes, c, ballots, shares, low, high, at_low,
    at_high, inside, first_key, start_key, length, passing, gain, selecting, curved, keys,
    canonical, scale, local, rule, count_signs, plus, half, joint, joint_low, joint_at_low,
    important, rows, row_start, row_width, least,
):  # fmt: skip
    """Apply any plan but a linear one to pieces of work.

    Args as in ``run_linear`` and ``fused.run_select``, and:
        first_key, start_key, length, passing, gain: see ``plan.Curves``; used where ``curved``.
        selecting: some elements may not stay.
        local: see ``plan.Plan`` [S].
        rule: a ``plan.Rule`` but LINEAR.
        count_signs: ballots count only by their sign.
        joint: not all elements stay for all experts; where, see ``plan.Joint`` [S].
        important: not all elements are important enough; see ``plan.Importances`` (``least`` is
            its ``low``).
    """
    experts_count = experts.shape[1]
    origin = np.empty(TILE, np.float32)
    total = np.empty(TILE, np.float32)
    vote = np.empty(TILE, np.float32)
    sums = np.empty(TILE, np.float32)
    deltas = np.zeros((experts_count, TILE), np.float32)
    scattered = np.empty(TILE, np.uint32)
    hashed = np.empty(TILE, np.uint32)
    origin_bits, total_bits = origin.view(np.uint32), total.view(np.uint32)
    summing = rule == 1
    for n in range(len(work)):
        span, slot, first, left = work[n, 0], work[n, 1], work[n, 2], work[n, 3]
        while left > 0:
            count = min(left, TILE)
            _load(base[slot], base_code[slot], first, count, half, origin, origin_bits)
            if selecting or joint:
                _scatter(scattered, canonical[slot] + first, count)
            apart = joint and joint_low[span] > np.uint32(0)
            if apart:
                _load_deltas(experts[slot], codes[slot], first, count, half, origin, deltas)
                _draws(hashed, scattered, keys[0], count)
                keep_joint(deltas, hashed, vote, sums, joint_low[span], joint_at_low[span], count)
            vote[:], total[:], sums[:] = 0.0, 0.0, 0.0
            active = 0
            for k in range(experts_count):
                if c[span, k] == np.float32(0.0):
                    continue
                active += 1
                delta = deltas[k]
                bits = delta.view(np.uint32)
                if not apart:
                    _load(experts[slot, k], codes[slot, k], first, count, half, delta, bits)
                    for i in range(count):
                        delta[i] = delta[i] - origin[i]
                if important:
                    keep_important(
                        delta, rows, row_start[span], row_width[span], first, least[span], count
                    )
                if selecting:
                    _draws(hashed, scattered, keys[k], count)
                if curved:
                    begin = start_key[span, k]
                    end = begin + length[span, k]
                    first_of = np.int64(first_key[span, k])
                    _curve(bits, hashed, first_of, passing[begin:end], gain[begin:end], count)
                elif selecting:
                    _select(
                        bits, hashed, low[span, k], high[span, k], at_low[span, k],
                        at_high[span, k], inside[span, k], count,
                    )  # fmt: skip
                if rule <= 2:
                    _vote(vote, delta, ballots[span, k], count_signs, count)
            if active == 0:
                _store(out[slot], out_code, first, count, origin, origin_bits)
            else:
                if rule == 3:
                    _nearswap(total, deltas, local[span], count)
                elif rule == 4:
                    _ram(total, sums, deltas, c[span], local[span], count)
                elif rule == 5:
                    _consensus(total, sums, deltas, c[span], shares[span], local[span], count)
                else:
                    for k in range(experts_count):
                        if c[span, k] != np.float32(0.0):
                            _combine(
                                total, sums, vote, deltas[k], c[span, k], ballots[span, k],
                                shares[span, k], summing, count,
                            )  # fmt: skip
                _finish(total, sums, vote, origin, scale[span], plus or rule > 2, count)
                _store(out[slot], out_code, first, count, total, total_bits)
            first += count
            left -= count


@jit
def sum_factors(addresses, codes, weights, cuts, half, total):
    """Add weight·x of every adapter to ``total``, where |x| reaches the adapter's cut.

    Args:
        addresses: of one factor in each adapter [N].
        codes: dtype codes [N].
        weights: β [N]; adapters with 0 are left out.
        cuts: smallest magnitude that stays [N].
        half: ``HALF``.
        total: zeros, as many as the factor has elements.
    """
    tile = np.empty(TILE, np.float32)
    bits = tile.view(np.uint32)
    first = 0
    while first < len(total):
        count = min(len(total) - first, TILE)
        part = total[first : first + count]
        for k in range(len(weights)):
            weight, cut = weights[k], cuts[k]
            if weight != np.float32(0.0):
                _load(addresses[k], codes[k], first, count, half, tile, bits)
                for i in range(count):
                    kept = tile[i] if np.abs(tile[i]) >= cut else np.float32(0.0)
                    part[i] = part[i] + weight * kept
        first += count


@jit
def copy_rounded(base, base_code, out, out_code, size, half):
    """Write the base, rounded once where the output's dtype is another."""
    tile = np.empty(TILE, np.float32)
    bits = tile.view(np.uint32)
    first = 0
    while first < size:
        count = min(size - first, TILE)
        _load(base, base_code, first, count, half, tile, bits)
        _store(out, out_code, first, count, tile, bits)
        first += count


@jit
def add_product(base, base_code, out, out_code, left, right, scaling, half):
    """Write W0 + s·(left·right) for some rows of a slot: ``LowRank.fold``, and the one rounding.

    Args:
        base: address of the first of these rows in the base.
        base_code: its dtype code.
        out: address of the first of these rows in the output.
        out_code: its dtype code.
        left: of these rows [rows, r].
        right: [r, columns].
        scaling: s, float32.
        half: ``HALF``.
    """
    total = np.empty(PRODUCT_TILE, np.float32)
    origin = np.empty(PRODUCT_TILE, np.float32)
    bits, origin_bits = total.view(np.uint32), origin.view(np.uint32)
    columns = right.shape[1]
    first = 0
    while first < columns:
        count = min(columns - first, PRODUCT_TILE)
        for row in range(len(left)):
            total[:count] = np.float32(0.0)
            for rank in range(len(right)):
                factor, line = left[row, rank], right[rank, first : first + count]
                for i in range(count):
                    total[i] = total[i] + factor * line[i]
            at = row * columns + first
            _load(base, base_code, at, count, half, origin, origin_bits)
            for i in range(count):
                total[i] = origin[i] + scaling * total[i]
            _store(out, out_code, at, count, total, bits)
        first += count


@jit
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


@jit
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
