"""When a searcher does not repeat its asks: what to tell the user, and how to go on without it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge import numerics
from evomerge.errors import EvomergeError, InputError, ReplayError
from evomerge.journal import Journal, Record, Recorder, read
from evomerge.numerics import SEARCH_PACKAGES, differences, remedies
from evomerge.rerun import rerun
from evomerge.restart_record import Provenance, Restart, restart_note
from evomerge.restarted import restart_problem
from evomerge.study_record import History

if TYPE_CHECKING:
    from evomerge.study import Study

logger = logging.getLogger(__name__)

FLAG = "--restart-search"
_COMMAND = f"evomerge run STUDY.yaml {FLAG}"
_FINISHED = (
    "the study is finished, nothing is left to search (evomerge front, report and export read it "
    "as it is; evomerge extend adds to it)"
)
#: What helps a study of which only such versions differ.
DRIFT = (
    f"only libraries of searchers differ: install those versions, or go on with these: {_COMMAND}"
)


def explained(error: ReplayError, history: History, study: Study) -> str:
    """Return the text of an error with what differs between then and now, and both remedies.

    Args:
        error: from a replay.
        history: of the study, as it was before the replay, or after.
        study: that was replayed.
    """
    provenance = history.provenance
    lines = [str(error), *_then_and_now(error.trial, provenance)]
    problem = _obstacle(error, history, study)
    if not problem and study.estimation is not None:  # it may choose other items here
        records = read(study.directory).records
        history = History.of(records, str(study.directory))
        planned = [_restart(error, history, study), *_retry(history)]
        problem = _dead_end(study, [*records, *planned])
    if problem:
        lines.append(f"  {FLAG} cannot help here: {problem}")
    else:
        lines.append(
            f"  to go on from all that was measured, with a fresh searcher: {_COMMAND} (`evomerge "
            "submit` takes it too; then the search is no longer reproducible from its seed alone)"
        )
    return "\n".join(lines)


def _then_and_now(trial: int | None, provenance: Provenance) -> list[str]:
    """Return what differs from when a trial was asked, and how to go on as it was then."""
    if trial is None:
        return []
    then, now = provenance.of(trial), numerics.numerics()
    exact = "  to go on exactly as it began: run it"
    if then is None:
        return [
            f"  the journal does not say with which libraries and CPU trial {trial} was asked",
            f"{exact} where trial {trial} was asked, with the packages of then",
        ]
    changed = differences(then, now)
    if not changed:
        return [
            "  nothing that the journal notes (versions of the libraries, CPU) differs from when "
            f"trial {trial} was asked",
            f"{exact} with the code of the searcher and on the machine of then",
        ]
    remedy = " and ".join(remedies(then, now, f"on a CPU like that of trial {trial}"))
    return [f"  since trial {trial} was asked: {'; '.join(changed)}", f"{exact} {remedy}"]


def _obstacle(error: ReplayError, history: History, study: Study) -> str:
    """Return why another searcher would not mend an error; empty where it would."""
    if history.done is not None:
        return _FINISHED
    if error.trial is not None and error.trial < study.first:
        return f"trial {error.trial} is a baseline or a calibration, which no searcher asks"
    return restart_problem(study) or _other_merge(history, study)


def _other_merge(history: History, study: Study) -> str:
    """Return which point is another merge by now: then it is not the searcher that changed."""
    for number, trial in history.trials.items():
        if trial.kind == "baseline" or trial.x is None:
            continue
        if study.decode(trial.x).digest != history.digests[number]:
            return (
                f"trial {number}: the same point is another merge by now, so the space changed, "
                "and points and results of then do not belong together any more"
            )
    return ""


class Beginning:
    """A journal whose next records wait until another one follows them.

    A restart binds every machine. So it is written when there are workers, or a result: a run
    that ends before that leaves the journal as it was.

    Args:
        journal: of the study.
        held: the records that wait; the first one is the restart.
    """

    def __init__(self, journal: Journal, held: Sequence[Record]) -> None:
        self._journal = journal
        self._held = list(held)

    def append(self, event: str, **fields: Any) -> Record:
        """Write what waits and one more record; a ``stop`` is not worth it."""
        if self._held and event == "stop":
            return {"ev": event, "t": self._held[0]["t"], **fields}
        while self._held:
            written = _write(self._journal, self._held[0])
            del self._held[0]
            if written["ev"] == "restart":
                logger.warning("search restarted %s", restart_note([Restart.of(written)]))
        return self._journal.append(event, **fields)


def _write(journal: Journal, record: Record) -> Record:
    fields = {key: value for key, value in record.items() if key not in ("ev", "t")}
    return journal.append(record["ev"], **fields)


def go_on(study: Study, journal: Journal, history: History, restart: bool) -> Recorder:
    """Return where a recorded study goes on, after all that it needs for that is decided.

    Failures that ended it are asked for again (``retry``): by now their cause was mended. With
    ``restart`` a fresh searcher takes over where the recorded asks are not repeated. It does so
    before the retry, which then takes no trial back. Asks the searcher again; needs no workers.

    Args:
        study: with the settings of the journal.
        journal: of the study.
        history: what it holds; takes in what is written.
        restart: see above.

    Raises:
        InputError: the study cannot go on with another searcher, or is finished; says why.
        ReplayError: a retry would take trials back that the searcher does not repeat.
    """
    planned = _retry(history)
    if not planned and not restart:
        return journal
    records = [*journal.records, *planned]
    tried = History.of(records, str(study.directory))
    asked = len(tried.trials)
    found = rerun(study, tried)
    error = found.error
    if restart and error is None and found.missing:
        number = asked - found.missing
        error = ReplayError(
            f"trial {number}: the searcher does not ask for it as early as it did", number
        )
    if error is not None and not restart:
        raise ReplayError(explained(error, history, study), error.trial)
    if error is not None:
        planned = [_restart(error, history, study), *planned]
        problem = _obstacle(error, history, study)
        problem = problem or _dead_end(study, [*journal.records, *planned])
        if problem:
            raise InputError(f"{FLAG} cannot help here: {problem}\n  not repeated: {error}")
        history.extend(planned, str(study.directory))
        return Beginning(journal, planned)
    if restart:
        here = dict(numerics.numerics())
        if history.done is None and history.provenance.latest != here:
            planned.append({"ev": "numerics", "trial": asked, "numerics": here})
        logger.warning(
            "%s was not needed: the searcher repeats what the journal holds (%d asks), so it stays",
            FLAG, found.compared,
        )  # fmt: skip
    for record in planned:
        history.add(_write(journal, record))
    return journal


def _retry(history: History) -> list[Record]:
    """Return the record that lets failures which ended a study be asked for again, if any."""
    stop = history.stop
    if stop is None or stop["reason"] != "failure":
        return []
    fields = {"split": stop["split"], "trials": stop["trials"]}
    return [{"ev": "retry", "t": history.latest, **fields}]


def _restart(error: ReplayError, history: History, study: Study) -> Record:
    """Return the record with which a fresh searcher takes over."""
    return {
        "ev": "restart",
        "t": history.latest,
        "trial": len(history.trials),
        "limits": len(history.limits(study.budget, study.item_budget)),
        "reason": _reason(error, history.provenance),
        "replay": str(error),
        "numerics": dict(numerics.numerics()),
    }


def _dead_end(study: Study, records: Sequence[Record]) -> str:
    """Return why a study could not go on from a planned restart; empty where it could."""
    history = History.of(records, str(study.directory))
    try:
        error = rerun(study, history, build=True).error
    except EvomergeError as caught:  # from the fresh searcher
        return str(caught)
    return "" if error is None else str(error)


def _reason(error: ReplayError, provenance: Provenance) -> str:
    """Return why a search is restarted, in a few words."""
    then = None if error.trial is None else provenance.of(error.trial)
    changed = [] if then is None else differences(then, numerics.numerics())
    return f"trial {error.trial} was not repeated; " + ("; ".join(changed) or "no known cause")


# -- versions -----------------------------------------------------------------------------------


def asked_with(identity: Mapping[str, Any], history: History) -> list[dict[str, Any]]:
    """Return a recorded identity with the versions that belong to it, in all their states.

    First with those that the last trial was asked with, then with those that were noted for the
    next one: while nothing was asked with these, a study may go on with either.
    """
    assert history.opened is not None
    first = history.opened.get("numerics")
    began: Mapping[str, str] = {} if first is None else first["versions"]
    asked = history.provenance.of(len(history.trials) - 1)
    found = []
    for noted in (asked or first, history.provenance.latest):
        versions: Mapping[str, str] = began if noted is None else noted["versions"]
        moved = {
            name: versions.get(name, "absent")
            for name in SEARCH_PACKAGES
            if versions.get(name) != began.get(name)
        }
        found.append(_with_versions(identity, moved))
    return found


def with_versions_of(identity: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity with the search libraries of a recorded one: they may have changed."""
    versions = {
        name: old
        for key in ("versions", "libraries")
        for name, old in recorded.get(key, {}).items()
        if name in SEARCH_PACKAGES
    }
    return _with_versions(identity, versions)


def _with_versions(identity: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    found = dict(identity)
    for key in ("versions", "libraries"):
        if key in found:
            own = found[key]
            found[key] = {name: versions.get(name, own[name]) for name in own}
    return found
