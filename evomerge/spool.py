"""Finished evaluations on disk, until the journal has them.

A worker writes what it has measured before it returns it. Where the driver dies, freezes or
cannot write in that moment, the evaluation is found when the study goes on and is not made again.
An entry is one file, named by the job that it answers: the recipe, the items and the race. So an
answer cannot be taken for another one, and taking one twice changes nothing.

The place is the folder ``spool`` of the study where a worker sees it, else the cache of the
worker's user on its own disk. What lies there is found by the next worker on that machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import Any

from evomerge.errors import StorageError
from evomerge.journal import decode, encode, hexes, unhexes
from evomerge.trial import Evaluation, Job, Race, Score, Worker, WorkerFactory

logger = logging.getLogger(__name__)

SPOOL = "spool"
_OWNER = "owner"
_SUFFIX = ".json"

#: Entries that a worker keeps on its own disk, where no driver removes them.
_KEPT_LOCALLY = 64

#: Nobody writes one entry for so long.
_ABANDONED_SECONDS = 3600.0


def job_key(job: Job) -> str:
    """Return 32 hexadecimal digits of what decides the evaluation of a job; not its number."""
    race = None if job.race is None else asdict(job.race)
    return _digest([job.recipe.digest, job.items, race])


def _work_key(job: Job) -> str:
    """Return the same for jobs that only differ in their race."""
    return _digest([job.recipe.digest, job.items])


def _digest(facts: object) -> str:
    text = json.dumps(facts, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()


class Spool:
    """One folder of evaluations.

    Args:
        directory: of the entries; made by ``open``.
        owner: digest of everything else that decides a score: models, fitness, versions.
        former: what an earlier evomerge called the same owner; empty for nothing.
    """

    def __init__(self, directory: Path, owner: str, former: str = "") -> None:
        self.directory = directory
        self.owner = owner
        self._former = former

    def open(self) -> None:
        """Make the folder; remove what was measured for another owner.

        Raises:
            StorageError: it cannot be made; a full disk is the usual cause.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.mine():
                if not self._former or not self._is_of(self._former):
                    self.clear()
                _write(self.directory / _OWNER, self.owner.encode())
        except OSError as error:
            raise StorageError(
                f"{self.directory}: cannot be written: {error.strerror or error} (free some "
                "space, then run the same command again to continue)"
            ) from error

    def mine(self) -> bool:
        """Return whether the folder can be seen from here and is this study's."""
        return self._is_of(self.owner)

    def _is_of(self, owner: str) -> bool:
        try:
            return (self.directory / _OWNER).read_bytes() == owner.encode()
        except OSError:
            return False

    def put(self, job: Job, evaluation: Evaluation) -> None:
        """Keep an evaluation. A disk that takes nothing costs only the safety that it gives.

        One that is not finite is not kept: it becomes a failed trial, which may be tried again.
        """
        if not all(math.isfinite(n) for s in evaluation.scores for n in (s.value, *s.items)):
            return
        record: dict[str, Any] = {
            "job": job_key(job),
            "seconds": dict(evaluation.seconds),
            "scores": [
                [hexes((score.value, score.standard_error)), hexes(score.items),
                 hexes(score.margins)]
                for score in evaluation.scores
            ],
        }  # fmt: skip
        if job.race is not None:  # see ``raced``
            record |= {"work": _work_key(job), "race": asdict(job.race)}
        try:
            _write(self._path(job), encode(record))
        except (OSError, ValueError) as error:
            logger.warning("job %d is not spooled in %s: %s", job.number, self.directory, error)

    def get(self, job: Job) -> Evaluation | None:
        """Return the evaluation of a job, None where there is none or its file is damaged."""
        path = self._path(job)
        record = _read(path)
        if record is None:
            return None
        if record.get("job") != job_key(job):
            logger.warning("%s is damaged; the job runs again", path)
            return None
        return _evaluation(record)

    def raced(self, job: Job) -> tuple[Job, Evaluation] | None:
        """Return what was measured of a job while it raced, and the job with that race.

        Args:
            job: without a race; on the same items as it had then.
        """
        for path in self.entries():
            record = _read(path)
            if record is None or record.get("work") != _work_key(job):
                continue
            then = replace(job, race=_race(record["race"]))
            if job_key(then) == record["job"]:
                return then, _evaluation(record)
        return None

    def drop(self, job: Job) -> None:
        """Remove the entry of a job, whose evaluation is in the journal by now."""
        with contextlib.suppress(OSError):  # most often: there is none
            self._path(job).unlink()

    def entries(self) -> list[Path]:
        """Return all entries, the oldest first."""
        return _oldest_first(self.directory.glob(f"*{_SUFFIX}"))

    def clear(self, kept: int = 0) -> None:
        """Remove all entries but the youngest ``kept``, and what a kill left half written.

        Where some are kept, others write here, and what is half written may be theirs.
        """
        entries, parts = self.entries(), _oldest_first(self.directory.glob(".*.part"))
        if kept:
            entries = entries[: max(0, len(entries) - kept)]
            parts = [path for path in parts if _age(path) > _ABANDONED_SECONDS]
        for path in (*entries, *parts):
            path.unlink(missing_ok=True)

    def _path(self, job: Job) -> Path:
        return self.directory / f"{job_key(job)}{_SUFFIX}"


def _read(path: Path) -> dict[str, Any] | None:
    """Return what an entry holds: None where there is none, nothing where it is damaged."""
    try:
        line = path.read_bytes()
    except OSError:
        return None
    return (decode(line[:-1]) if line.endswith(b"\n") else None) or {}


def _evaluation(record: Mapping[str, Any]) -> Evaluation:
    scores = []
    for pair, items, margins in record["scores"]:
        value, error = unhexes(pair)
        scores.append(Score(value, error, unhexes(items), unhexes(margins)))
    return Evaluation(tuple(scores), record["seconds"])


def _race(fields: Mapping[str, Any]) -> Race:
    """Return the race that ``asdict`` and JSON made lists of."""
    return Race(
        items=tuple(map(tuple, fields["items"])),
        known=tuple(map(tuple, fields["known"])),
        rungs=tuple(fields["rungs"]),
        rivals=tuple(tuple(map(tuple, rival)) for rival in fields["rivals"]),
        signs=tuple(fields["signs"]),
        z=fields["z"],
        least=fields["least"],
    )


def _oldest_first(paths: Iterable[Path]) -> list[Path]:
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # another process has removed it just now
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # by now it is whole
        return 0.0


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, durably."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.part")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class SpoolingWorker:
    """Keeps every evaluation of another worker until it is known to have arrived.

    Args:
        worker: that measures.
        spool: of this machine or of the study.
        local: nobody else removes entries.
    """

    def __init__(self, worker: Worker, spool: Spool, local: bool) -> None:
        self._worker = worker
        self._spool = spool
        self._local = local

    def run(self, job: Job) -> Evaluation:
        """Return what was measured before, else measure it and keep it."""
        known = self._spool.get(job)
        if known is not None:
            return known
        evaluation = self._worker.run(job)
        self._spool.put(job, evaluation)
        if self._local:
            self._spool.clear(kept=_KEPT_LOCALLY)
        return evaluation

    def describe(self) -> Mapping[str, str]:
        """Return what the worker says of itself."""
        return self._worker.describe()


@dataclass(frozen=True, slots=True)
class SpoolingFactory:
    """Builds a worker that spools.

    Attributes:
        factory: builds the worker.
        directory: the spool of the study, as the driver sees it.
        owner: see ``Spool``.
    """

    factory: WorkerFactory
    directory: Path
    owner: str

    def __call__(self) -> Worker:
        """Build the worker; find out whether it shares the study's disk."""
        worker = self.factory()
        shared = Spool(self.directory, self.owner)
        if shared.mine():
            return SpoolingWorker(worker, shared, local=False)
        local = Spool(_cache() / self.owner, self.owner)
        try:
            local.open()
        except StorageError as error:
            logger.warning("no spool: %s", error)
            return worker
        return SpoolingWorker(worker, local, local=True)


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "evomerge" / SPOOL
