"""The hypervolume of a study's search scores as trials come in."""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.pareto import hypervolume, nondominated


def reference_point(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the reference point of a study's hypervolume [m], as losses.

    Per objective the worst of the rows plus a tenth of their spread (of 1 when they are all
    equal).

    Args:
        rows: losses of the baselines, or of the first successful trial alone [n][m], n >= 1.
    """
    columns = zip(*rows, strict=True)
    return tuple(max(c) + 0.1 * ((max(c) - min(c)) or 1.0) for c in columns)


class GrowingFront:
    """Nondominated losses, and the volume that they dominate.

    Args:
        reference: point that bounds the volume [m].
    """

    def __init__(self, reference: Sequence[float]) -> None:
        self._reference = tuple(reference)
        self._rows: list[tuple[float, ...]] = []
        self.volume = 0.0

    def add(self, losses: tuple[float, ...]) -> None:
        """Take in a point [m]."""
        # Dominated points and equal ones add nothing; most points are.
        if any(all(a <= b for a, b in zip(row, losses, strict=True)) for row in self._rows):
            return
        rows = [*self._rows, losses]
        self._rows = [rows[row] for row in nondominated(rows)]
        self.volume = hypervolume(self._rows, self._reference)
