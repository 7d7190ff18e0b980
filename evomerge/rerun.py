"""Ask a searcher everything again, without workers and without writing: does it repeat itself?"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evomerge.errors import NothingUsableError, ReplayError
from evomerge.interrupt import StopSignals
from evomerge.journal import Record
from evomerge.study_record import History
from evomerge.study_run import StudyRun
from evomerge.trial import Job, Outcome

if TYPE_CHECKING:
    from evomerge.study import Study


@dataclass(frozen=True, slots=True)
class Rerun:
    """What came of asking again.

    Attributes:
        compared: asks that were repeated bit for bit.
        missing: asks that could not be compared.
        error: what was not repeated; None where everything was.
        end: the ``done`` record that the results lead to, None where they lead to none.
    """

    compared: int
    missing: int
    error: ReplayError | None
    end: Record | None


class _WorkerNeededError(Exception):
    """Only a worker could tell how it goes on."""


class _NoWorkers:
    """A pool that takes every job and finishes none."""

    workers = 2**31

    def submit(self, job: Job) -> None:
        """Forget the job."""

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Give up."""
        raise _WorkerNeededError

    def describe(self) -> Mapping[str, str]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""


class _Dry:
    """Stands for a journal that is only read: what would be written is forgotten."""

    def append(self, event: str, **fields: Any) -> Record:
        """Return the record that would be written."""
        return {"ev": event, "t": round(time.time(), 3), **fields}


def rerun(study: Study, history: History, build: bool = False) -> Rerun:
    """Ask a fresh searcher everything that a history holds.

    Args:
        study: with the settings of the history.
        history: what is asked beyond it is added, so it is of no use afterwards.
        build: build the searcher of its last restart even where workers have to finish trials
            before that.

    Raises:
        EvomergeError: from the searcher or an estimator.
    """
    restart = history.provenance.last
    asked = len(history.trials)
    if restart is not None:
        asked -= restart.trial - study.first  # those stand as they are
    recorded, history.done = history.done, None
    quiet = copy.copy(study)
    quiet.make_pool, quiet.listeners, quiet.spool = _NoWorkers, (), None
    run = StudyRun(quiet, _Dry(), history, StopSignals())
    end = error = None
    try:
        run.all_phases()
        end = history.done
    except _WorkerNeededError:
        results = history.results
        if build and restart and any(("search", n) not in results for n in range(restart.trial)):
            run.build_fresh()
    except NothingUsableError:
        pass
    except ReplayError as caught:
        error = caught
    compared, history.done = run.asks.compared, recorded
    return Rerun(compared, asked - compared, error, end)
