"""Where to cut rows into blocks, and how many blocks each part of a model gets; integers only."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def cut_rows(slots: Sequence[tuple[int, int]], blocks: int) -> list[list[tuple[int, int, int]]]:
    """Cut the rows of consecutive slots into blocks of about equal numbers of elements.

    Each cut is made at the row boundary nearest to its ideal place, so a block differs from the
    mean by at most one row, unless single rows are larger than the mean.

    Args:
        slots: (rows, elements per row) of each slot, in canonical order.
        blocks: how many, from 1 to the number of rows.

    Returns:
        For each block its pieces (index in ``slots``, first row, last row + 1); no piece is empty.
    """
    rows = sum(count for count, _ in slots)
    assert 1 <= blocks <= max(rows, 1)
    cuts, before = [0], 0
    for number in range(1, blocks):
        wanted = _nearest_row(slots, number, blocks)
        # Every block on both sides keeps at least one row.
        before = min(max(wanted, before + 1), rows - (blocks - number))
        cuts.append(before)
    cuts.append(rows)
    return [_pieces(slots, cuts[number], cuts[number + 1]) for number in range(blocks)]


def _nearest_row(slots: Sequence[tuple[int, int]], number: int, blocks: int) -> int:
    """Return the row boundary nearest to ``number/blocks`` of all elements; halves go up."""
    total = sum(count * width for count, width in slots)
    target = number * total  # in elements times ``blocks``, to stay in integers
    row = 0
    for count, width in slots:
        here = count * width * blocks
        if target <= here:
            step = width * blocks
            return row + ((2 * target + step) // (2 * step) if step else 0)
        target -= here
        row += count
    return row


def _pieces(slots: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int, int]]:
    """Return the pieces of slots between two rows, counted over all slots."""
    pieces, first = [], 0
    for index, (count, _) in enumerate(slots):
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            pieces.append((index, low, high))
        first += count
    return pieces


def allot(masses: Sequence[float], limits: Sequence[int], total: int) -> list[int]:
    """Divide ``total`` blocks over parts in proportion to their masses, by largest remainder.

    Expert Merging++ (operators.md B7) with at least one block for each part and exactly
    ``total`` in all. Exact rational arithmetic, ties to the earlier part: the result is the same
    everywhere.

    Args:
        masses: of each part [B], finite and not negative; all zero counts as all equal.
        limits: most blocks that each part can have [B], at least 1.
        total: from B to the sum of the limits.

    Returns:
        Blocks of each part [B].
    """
    assert len(masses) <= total <= sum(limits)
    shares = [Fraction(mass) for mass in masses]
    if not any(shares):
        shares = [Fraction(1)] * len(shares)
    quotas = _bounded_quotas(shares, limits, total)
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(counts)), key=lambda part: (counts[part] - quotas[part], part))
    for part in order[: total - sum(counts)]:
        counts[part] += 1
    return counts


def _bounded_quotas(
    shares: Sequence[Fraction], limits: Sequence[int], total: int
) -> list[Fraction]:
    """Return quotas between 1 and the limits, proportional to the shares wherever they are free.

    Parts that break a bound are fixed at it and the rest is divided again. Of the two kinds the
    one that moves the sum further goes first, so that no part is fixed too early.
    """
    quotas = [Fraction(0)] * len(shares)
    free = list(range(len(shares)))
    while free:
        left = total - sum(quotas, Fraction(0))
        mass = sum((shares[part] for part in free), Fraction(0))
        moves: dict[int, Fraction] = {}
        for part in free:
            wanted = left * shares[part] / mass if mass else left / len(free)
            bounded = min(max(wanted, Fraction(1)), Fraction(limits[part]))
            quotas[part], moves[part] = bounded, bounded - wanted
        moved = sum(moves.values(), Fraction(0))
        if moved == 0:
            break
        free = [part for part in free if moves[part] * moved <= 0]
        for part in free:
            quotas[part] = Fraction(0)
    return quotas
