"""Merges of adapters as factors: one product of rank r per module, always from the base."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import ITEM_BYTES
from evomerge.layout import Partition
from evomerge.merge.factor_sources import F32, sides
from evomerge.merge.plan import Plan
from evomerge.merge.sources import Bits, Sources, address

#: Elements of a product per piece of work.
_WORK = 1 << 22


def merge(
    plan: Plan,
    cut: Partition,
    sources: Sources,
    outputs: Sequence[Bits | None],
    dtype: str,
    spans: npt.NDArray[np.bool_],
    threads: int,
) -> None:
    """Write merged bits; the result does not depend on the number of threads.

    Args:
        plan: of rule FACTORS.
        cut: its partition, ``model``: one span per slot.
        sources: of base and factors.
        outputs: one flat array of bits per slot, None for slots that are not wanted.
        dtype: safetensors name of the outputs' dtype.
        spans: which spans to write [S].
        threads: CPU threads.
    """
    wanted = [n for n in np.flatnonzero(spans).tolist() if outputs[cut.spans[n].slot] is not None]
    with ThreadPoolExecutor(threads) as pool:
        products = {
            number: pool.submit(product, plan, number, cut.spans[number].slot, sources)
            for number in wanted
            if plan.weights[number].any()
        }
        waiting: list[Future[None]] = []
        for number in wanted:
            slot = cut.spans[number].slot
            output = outputs[slot]
            assert output is not None
            base = sources.base(slot)
            if number not in products:
                waiting.append(pool.submit(_copy, base, output, dtype))
                continue
            left, right = products.pop(number).result()
            scaling = np.float32(sources.factors.forms[slot].scaling)
            rows = max(_WORK // max(right.shape[1], 1), 1)
            for first in range(0, len(left), rows):
                part = left[first : first + rows]
                waiting.append(pool.submit(_add, base, output, dtype, part, right, scaling, first))
        for done in waiting:
            done.result()


def product(plan: Plan, number: int, slot: int, sources: Sources) -> tuple[F32, F32]:
    """Return the merged factors [rows, r] and [r, columns] of a span, as its slot is stored."""
    assert plan.shares is not None
    factors = sources.factors
    a, b = factors.merged(slot, plan.weights[number], plan.shares[number])
    return sides(factors.forms[slot], a, b)


def _copy(base: tuple[Bits, str], output: Bits, dtype: str) -> None:
    """Write the base as it is."""
    from evomerge.merge import kernels

    bits, base_dtype = base
    kernels.copy_rounded(
        address(bits), kernels.CODES[base_dtype], address(output), kernels.CODES[dtype],
        bits.size, kernels.HALF,
    )  # fmt: skip


def _add(
    base: tuple[Bits, str], output: Bits, dtype: str, left: F32, right: F32, scaling: np.float32,
    first: int,
) -> None:  # fmt: skip
    """Write some rows of a slot, from row ``first``."""
    from evomerge.merge import kernels

    bits, base_dtype = base
    start = first * right.shape[1]
    kernels.add_product(
        address(bits) + start * ITEM_BYTES[base_dtype], kernels.CODES[base_dtype],
        address(output) + start * ITEM_BYTES[dtype], kernels.CODES[dtype],
        left, right, scaling, kernels.HALF,
    )  # fmt: skip
