"""Which trials are worth another look."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.feasibility import best_rows
from evomerge.pareto import spread


def finalists(
    losses: Sequence[tuple[float, ...]],
    violations: Sequence[float],
    limit: int,
    rungs: Sequence[int | None],
) -> list[int]:
    """Return the rows to score again: the front, and what stands behind it.

    The front is thinned to ``limit``. Where it has fewer members the next fronts behind it fill
    the rest: search scores are noisy, and with one objective the front is a single trial.

    Args:
        losses: [n, m].
        violations: of constraints [n]; what violates less comes first (Deb's rule).
        limit: number of rows at most.
        rungs: where a row counts for less than another one whatever its losses: at how many
            items it was left behind [n], None for not at all. Those that went farther come first.
    """
    chosen: list[int] = []
    far = [float("inf") if rung is None else rung for rung in rungs]
    for reached in sorted(set(far), reverse=True):
        rest = [row for row, rung in enumerate(far) if rung == reached]
        while rest and len(chosen) < limit:
            front = best_rows([losses[row] for row in rest], [violations[row] for row in rest])
            picked = spread([losses[rest[place]] for place in front], limit - len(chosen))
            chosen += [rest[front[place]] for place in picked]
            behind = set(range(len(rest))) - set(front)
            rest = [rest[place] for place in sorted(behind)]
    return chosen
