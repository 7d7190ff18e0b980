"""How long a pool waits for a job: some multiple of what others took."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Literal

from evomerge.trial import Evaluation, Job

#: A job may take so many times what the others took.
FACTOR = 3.0

#: And never less than so many seconds: the first job of a worker compiles and fills caches.
FLOOR_SECONDS = 120.0

#: Before so many jobs are done nothing is known.
LEAST = 5

#: What was long ago does not count.
_REMEMBERED = 100

Timeout = float | Literal["auto"] | None


class Patience:
    """The limit of the next job's seconds.

    A fixed limit is either wrong for another model or useless. This one follows the running
    median: of the jobs as a whole, for what does not depend on their size (the merge), and per
    item, because finalists are scored on more items than the trials before them. As nobody knows
    which objective took the time, each item is taken for as long as if its objective took it all.

    Args:
        timeout: seconds for every job, ``auto`` to follow the median, None for no limit.
    """

    def __init__(self, timeout: Timeout) -> None:
        self._timeout = timeout
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._per_item: dict[int, deque[float]] = {}  # by objective

    def limit(self, job: Job) -> float:
        """Return how many seconds a job may take."""
        if self._timeout is None:
            return float("inf")
        if self._timeout != "auto":
            return self._timeout
        if len(self._seconds) < LEAST:
            return float("inf")
        usual = median(self._seconds)
        for objective, ids in enumerate(job.items):
            known = self._per_item.get(objective, ())
            if ids and len(known) < LEAST:
                return float("inf")
            if ids:
                usual = max(usual, median(known) * len(ids))
        return max(FLOOR_SECONDS, FACTOR * usual)

    def observe(self, evaluation: Evaluation, seconds: float) -> None:
        """Learn what a job took that succeeded; a race may have scored a part of its items.

        An evaluation that lay in a worker's spool comes back at once, and says itself what it took.
        """
        seconds = max(seconds, sum(evaluation.seconds.values()))
        self._seconds.append(seconds)
        counts = [len(score.items) for score in evaluation.scores]
        for objective, count in enumerate(counts):
            if count or not any(counts):  # some workers give no scores of items
                known = self._per_item.setdefault(objective, deque(maxlen=_REMEMBERED))
                known.append(seconds / max(1, count))
