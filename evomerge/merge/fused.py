"""The fast CPU kernels: up to four experts of one dtype, everything in registers.

Measured against plain copies of the same arrays, tiles that are loaded, combined and stored one
after the other reach a third of the memory bound, because the processor cannot overlap the
loading of one tile with the arithmetic of the other; plain torch 6-19 %, because every step is
a pass of its own. One loop over all streams overlaps both and vectorises. Hence one function per
number of experts, written out; five and more experts, mixed dtypes and float16 take the tiled
kernels in ``tiled``, which give the same bits.

``base`` and the experts are float32 values or uint16 bfloat16 patterns; ``out`` alike.
"""

# numba compiles these functions from their source; the annotations are for readers only.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import overload

from evomerge.merge.bits import bf16_of, bits_of, draw, float_of, jit, offset_of, pointer

MOST_EXPERTS = 4


def _value(stored):
    raise NotImplementedError


@overload(_value)
def _value_overload(stored):
    """Return the float behind a stored element."""
    if stored is types.float32:
        return lambda stored: stored
    return lambda stored: float_of(np.uint32(np.uint32(stored) << np.uint32(16)))


def _stored(out, value):
    raise NotImplementedError


@overload(_stored)
def _stored_overload(out, value):
    """Round a float to the elements of ``out``."""
    if out.dtype is types.float32:
        return lambda out, value: value
    return lambda out, value: bf16_of(value)


# -- linear -----------------------------------------------------------------------------------


@jit
def _linear0(out, base, c0):
    for i in range(len(out)):
        out[i] = _stored(out, c0 * _value(base[i]))


@jit
def _linear1(out, base, a, c0, ca):
    for i in range(len(out)):
        w = _value(base[i])
        out[i] = _stored(out, c0 * w + ca * (_value(a[i]) - w))


@jit
def _linear2(out, base, a, b, c0, ca, cb):
    for i in range(len(out)):
        w = _value(base[i])
        total = c0 * w + ca * (_value(a[i]) - w)
        out[i] = _stored(out, total + cb * (_value(b[i]) - w))


@jit
def _linear3(out, base, a, b, c, c0, ca, cb, cc):
    for i in range(len(out)):
        w = _value(base[i])
        total = c0 * w + ca * (_value(a[i]) - w)
        total = total + cb * (_value(b[i]) - w)
        out[i] = _stored(out, total + cc * (_value(c[i]) - w))


@jit
def _linear4(out, base, a, b, c, d, c0, ca, cb, cc, cd):
    for i in range(len(out)):
        w = _value(base[i])
        total = c0 * w + ca * (_value(a[i]) - w)
        total = total + cb * (_value(b[i]) - w)
        total = total + cc * (_value(c[i]) - w)
        out[i] = _stored(out, total + cd * (_value(d[i]) - w))


@jit
def run_linear(work, out, base, experts, c0, c, dtype, width):
    """Apply a linear plan to pieces of work.

    Args:
        work: (span, slot, first element, number of elements) [N, 4].
        out: address of each slot's output [slots].
        base: address of the base's slot [slots].
        experts: addresses [slots, K], K <= 4.
        c0: base coefficients [S].
        c: expert coefficients [S, K].
        dtype: NumPy type of all elements; float32, or uint16 for bfloat16.
        width: bytes of an element.
    """
    active = np.empty(MOST_EXPERTS, np.int64)
    for n in range(len(work)):
        span, slot, first, count = work[n, 0], work[n, 1], work[n, 2], work[n, 3]
        at = first * width
        o = numba.carray(pointer(out[slot] + at), count, dtype)
        w = numba.carray(pointer(base[slot] + at), count, dtype)
        found = 0
        for k in range(c.shape[1]):
            if c[span, k] != np.float32(0.0):
                active[found] = k
                found += 1
        if found == 0:
            _linear0(o, w, c0[span])
            continue
        i = active[0]
        a, ca = numba.carray(pointer(experts[slot, i] + at), count, dtype), c[span, i]
        if found == 1:
            _linear1(o, w, a, c0[span], ca)
            continue
        i = active[1]
        b, cb = numba.carray(pointer(experts[slot, i] + at), count, dtype), c[span, i]
        if found == 2:
            _linear2(o, w, a, b, c0[span], ca, cb)
            continue
        i = active[2]
        d, cd = numba.carray(pointer(experts[slot, i] + at), count, dtype), c[span, i]
        if found == 3:
            _linear3(o, w, a, b, d, c0[span], ca, cb, cd)
            continue
        i = active[3]
        e, ce = numba.carray(pointer(experts[slot, i] + at), count, dtype), c[span, i]
        _linear4(o, w, a, b, d, e, c0[span], ca, cb, cd, ce)


# -- selected and elected -----------------------------------------------------------------------
#
# Two, three and four experts; one expert has the base beside it with coefficient 0, which neither
# votes nor adds. Per expert three floats (coefficient, ballot weight, share of the divisor) and
# seven integers (low, high, at_low, at_high, inside, factor and offset of the hash).


@jit
def _kept(delta, u, x, hashing):
    """Return the delta where it stays, else zero; see ``plan.Select``.

    ``hashing`` is the same for a whole loop, which the compiler then writes twice.
    """
    key = (bits_of(delta) & np.uint32(0x7FFFFFFF)) >> np.uint32(16)
    limit = u[3] if key == u[1] else u[4]
    limit = u[2] if key == u[0] else limit
    hashed = draw(x, u[5], u[6]) if hashing else np.uint32(0)
    stays = (key >= u[0]) & (key <= u[1]) & (hashed <= limit)
    return delta if stays else np.float32(0.0)


@jit
def _finished(w, total, divisor, vote, scale, plus):
    """Return the merged weight of one element."""
    divisor = divisor if divisor != np.float32(0.0) else np.float32(1.0)
    change = total / divisor
    change = change if (vote != np.float32(0.0)) | plus else np.float32(0.0)
    return w + scale * change


@jit
def _agrees(ballot, positive, summing):
    """Return whether an expert's delta counts."""
    return ((ballot != np.float32(0.0)) & ((ballot > np.float32(0.0)) == positive)) | summing


@jit
def _select2(out, base, a, b, fa, fb, ua, ub, start, scale, summing, plus, hashing):
    zero = np.float32(0.0)
    for i in range(len(out)):
        w = _value(base[i])
        x = np.uint32(start + np.uint32(i))
        xa = _kept(_value(a[i]) - w, ua, x, hashing)
        xb = _kept(_value(b[i]) - w, ub, x, hashing)
        ba = fa[1] * xa
        bb = fb[1] * xb
        vote = zero + ba + bb
        up = vote >= zero
        ga = _agrees(ba, up, summing)
        gb = _agrees(bb, up, summing)
        total = zero + (fa[0] * xa if ga else zero) + (fb[0] * xb if gb else zero)
        share = zero + (fa[2] if ga else zero)
        share = share + (fb[2] if gb else zero)
        out[i] = _stored(out, _finished(w, total, share, vote, scale, plus))


@jit
def _select3(out, base, a, b, d, fa, fb, fd, ua, ub, ud, start, scale, summing, plus, hashing):
    zero = np.float32(0.0)
    for i in range(len(out)):
        w = _value(base[i])
        x = np.uint32(start + np.uint32(i))
        xa = _kept(_value(a[i]) - w, ua, x, hashing)
        xb = _kept(_value(b[i]) - w, ub, x, hashing)
        xd = _kept(_value(d[i]) - w, ud, x, hashing)
        ba = fa[1] * xa
        bb = fb[1] * xb
        bd = fd[1] * xd
        vote = zero + ba + bb + bd
        up = vote >= zero
        ga = _agrees(ba, up, summing)
        gb = _agrees(bb, up, summing)
        gd = _agrees(bd, up, summing)
        total = zero + (fa[0] * xa if ga else zero)
        total = total + (fb[0] * xb if gb else zero)
        total = total + (fd[0] * xd if gd else zero)
        share = zero + (fa[2] if ga else zero)
        share = share + (fb[2] if gb else zero)
        share = share + (fd[2] if gd else zero)
        out[i] = _stored(out, _finished(w, total, share, vote, scale, plus))


@jit
def _select4(
    out, base, a, b, d, e, fa, fb, fd, fe, ua, ub, ud, ue, start, scale, summing, plus, hashing
):
    zero = np.float32(0.0)
    for i in range(len(out)):
        w = _value(base[i])
        x = np.uint32(start + np.uint32(i))
        xa = _kept(_value(a[i]) - w, ua, x, hashing)
        xb = _kept(_value(b[i]) - w, ub, x, hashing)
        xd = _kept(_value(d[i]) - w, ud, x, hashing)
        xe = _kept(_value(e[i]) - w, ue, x, hashing)
        ba = fa[1] * xa
        bb = fb[1] * xb
        bd = fd[1] * xd
        be = fe[1] * xe
        vote = zero + ba + bb + bd + be
        up = vote >= zero
        ga = _agrees(ba, up, summing)
        gb = _agrees(bb, up, summing)
        gd = _agrees(bd, up, summing)
        ge = _agrees(be, up, summing)
        total = zero + (fa[0] * xa if ga else zero)
        total = total + (fb[0] * xb if gb else zero)
        total = total + (fd[0] * xd if gd else zero)
        total = total + (fe[0] * xe if ge else zero)
        share = zero + (fa[2] if ga else zero)
        share = share + (fb[2] if gb else zero)
        share = share + (fd[2] if gd else zero)
        share = share + (fe[2] if ge else zero)
        out[i] = _stored(out, _finished(w, total, share, vote, scale, plus))


@jit
def _floats(span, k, c, ballots, shares):
    return (c[span, k], ballots[span, k], shares[span, k])


@jit
def _words(span, k, low, high, at_low, at_high, inside, factor, offset):
    return (
        low[span, k], high[span, k], at_low[span, k], at_high[span, k], inside[span, k],
        factor, offset,
    )  # fmt: skip


@jit
def run_select(
    work, out, base, experts, c, ballots, shares, low, high, at_low, at_high, inside,
    keys, canonical, scale, summing, plus, dtype, width,
):  # fmt: skip
    """Apply a sum or elected plan to pieces of work.

    Args as in ``run_linear``, and:
        ballots: weight of each expert's vote [S, K].
        shares: what it adds to the divisor where it agrees [S, K].
        low, high, at_low, at_high, inside: see ``plan.Select`` [S, K].
        keys: hash key of each expert [K].
        canonical: canonical index of each slot's first element [slots].
        scale: lambda [S].
        summing: no election, every delta counts.
        plus: a drawn election counts as positive.
    """
    active = np.empty(MOST_EXPERTS, np.int64)
    nobody = (np.float32(0.0), np.float32(0.0), np.float32(0.0))
    for n in range(len(work)):
        span, slot, begin, left = work[n, 0], work[n, 1], work[n, 2], work[n, 3]
        found, hashing = 0, False
        for k in range(c.shape[1]):
            if c[span, k] != np.float32(0.0):
                active[found] = k
                found += 1
                chance = min(at_low[span, k], at_high[span, k], inside[span, k])
                hashing = hashing or chance != np.uint32(0xFFFFFFFF)
        while left > 0:
            index = canonical[slot] + begin
            # The hash takes the upper half of the index once per stretch.
            count = min(left, (np.int64(1) << np.int64(32)) - (index & np.int64(0xFFFFFFFF)))
            at, start = begin * width, np.uint32(index & np.int64(0xFFFFFFFF))
            begin += count
            left -= count
            o = numba.carray(pointer(out[slot] + at), count, dtype)
            w = numba.carray(pointer(base[slot] + at), count, dtype)
            if found == 0:
                _linear0(o, w, np.float32(1.0))
                continue
            i = active[0]
            a = numba.carray(pointer(experts[slot, i] + at), count, dtype)
            fa = _floats(span, i, c, ballots, shares)
            ua = _words(
                span, i, low, high, at_low, at_high, inside,
                np.uint32(keys[i] | np.uint32(1)), offset_of(keys[i], index),
            )  # fmt: skip
            if found == 1:
                _select2(o, w, a, w, fa, nobody, ua, ua, start, scale[span], summing, plus, hashing)
                continue
            i = active[1]
            b = numba.carray(pointer(experts[slot, i] + at), count, dtype)
            fb = _floats(span, i, c, ballots, shares)
            ub = _words(
                span, i, low, high, at_low, at_high, inside,
                np.uint32(keys[i] | np.uint32(1)), offset_of(keys[i], index),
            )  # fmt: skip
            if found == 2:
                _select2(o, w, a, b, fa, fb, ua, ub, start, scale[span], summing, plus, hashing)
                continue
            i = active[2]
            d = numba.carray(pointer(experts[slot, i] + at), count, dtype)
            fd = _floats(span, i, c, ballots, shares)
            ud = _words(
                span, i, low, high, at_low, at_high, inside,
                np.uint32(keys[i] | np.uint32(1)), offset_of(keys[i], index),
            )  # fmt: skip
            if found == 3:
                _select3(
                    o,
                    w,
                    a,
                    b,
                    d,
                    fa,
                    fb,
                    fd,
                    ua,
                    ub,
                    ud,
                    start,
                    scale[span],
                    summing,
                    plus,
                    hashing,
                )
                continue
            i = active[3]
            e = numba.carray(pointer(experts[slot, i] + at), count, dtype)
            fe = _floats(span, i, c, ballots, shares)
            ue = _words(
                span, i, low, high, at_low, at_high, inside,
                np.uint32(keys[i] | np.uint32(1)), offset_of(keys[i], index),
            )  # fmt: skip
            _select4(
                o, w, a, b, d, e, fa, fb, fd, fe, ua, ub, ud, ue, start, scale[span], summing,
                plus, hashing,
            )  # fmt: skip
