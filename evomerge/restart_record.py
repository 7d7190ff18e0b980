"""Where a search was restarted: what the journal says of it, and what follows from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from evomerge.numerics import Numerics

#: What the label of a warm point begins with that is a search trial; its number follows.
EARLIER = "trial "


@dataclass(frozen=True, slots=True)
class Restart:
    """A fresh searcher took over.

    Attributes:
        trial: the first one that it asks; those before it are taken from the journal.
        limits: how many ends the search had been given then, the first one counted.
        reason: why, in words.
    """

    trial: int
    limits: int
    reason: str

    @staticmethod
    def of(record: Mapping[str, Any]) -> Restart:
        """Return what a ``restart`` record says."""
        return Restart(record["trial"], record["limits"], record["reason"])

    def seed(self, study: int) -> int:
        """Return the seed of the searcher from that of the study."""
        text = f"{study} restart {self.trial}".encode()
        return int.from_bytes(blake2b(text, digest_size=4).digest()) & 0x7FFFFFFF


@dataclass
class Provenance:
    """By whom the trials of a study were asked.

    Attributes:
        restarts: of the search, in their order.
        noted: the first trial that was asked with some numerics, and these, in their order.
    """

    restarts: list[Restart] = field(default_factory=list)
    noted: list[tuple[int, Numerics]] = field(default_factory=list)

    def take(self, record: Mapping[str, Any], trials: int) -> None:
        """Take in an ``open``, ``numerics`` or ``restart`` record.

        Args:
            record: of the journal.
            trials: asked so far.

        Raises:
            ValueError: it is about another trial than the next one.
        """
        if record.get("trial", trials) != trials:
            raise ValueError(f"it is about trial {record['trial']}, the next one is {trials}")
        if "numerics" in record:
            self.noted.append((trials, record["numerics"]))
        if record["ev"] == "restart":
            self.restarts.append(Restart.of(record))

    def forget(self, trials: int) -> None:
        """Take back trials, so that the next one is number ``trials``."""
        self.noted = [(min(first, trials), numerics) for first, numerics in self.noted]

    @property
    def last(self) -> Restart | None:
        """The restart that counts; None in a search that had none."""
        return self.restarts[-1] if self.restarts else None

    @property
    def latest(self) -> Numerics | None:
        """The numerics of the trials that were asked last; None where the journal is too old."""
        return self.noted[-1][1] if self.noted else None

    def of(self, trial: int) -> Numerics | None:
        """Return the numerics with which a trial was asked; None where nobody noted them."""
        found = [numerics for first, numerics in self.noted if first <= trial]
        return found[-1] if found else None


def restart_note(restarts: Sequence[Restart]) -> str:
    """Return what a reader of the study should know; empty for a search without restarts."""
    if not restarts:
        return ""
    where = ", ".join(f"before trial {one.trial} ({one.reason})" for one in restarts)
    return (
        f"{where}, with a fresh searcher that knew all results; no longer reproducible from the "
        "seed alone"
    )
