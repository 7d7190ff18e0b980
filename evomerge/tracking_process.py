"""The process that sends a running study to MLflow, started by ``evomerge.tracking.Tracker``.

It reads orders from stdin (``close``; its end means that the search has ended), and writes a line
of JSON to stdout when MLflow was reached first, at every problem and when one is over.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from evomerge.errors import EvomergeError
from evomerge.journal_cursor import JournalCursor
from evomerge.presentation import project
from evomerge.study_series import Series
from evomerge.study_view import StudyView
from evomerge.tracking import only_sender
from evomerge.tracking_client import first_line
from evomerge.tracking_store import Store
from evomerge.tracking_target import Synced, Target

#: Weak enough to leave the processor to whoever computes, strong enough to get through.
_NICE = 10
#: Seconds between two looks at the journal.
_LOOK_SECONDS = 1.0
#: Reading and comparing grow with the study: so many times as long as they took, it rests.
_REST = 4.0
#: The same for pages and pictures, and the seconds between them at least.
_PAGES_REST, _PAGES_SECONDS = 20.0, 30.0
#: Seconds until an unreachable server is tried again; doubled up to the last.
_RETRY_SECONDS = (5.0, 60.0)
#: Seconds that are left for the rest when the search was killed.
_ORPHAN_SECONDS = 20.0
#: Seconds to wait for the tracker of a run that was killed, and a little more.
_LOCK_SECONDS = 2 * _ORPHAN_SECONDS


def main(order: str) -> int:
    """Follow a study to its end; return 0 when MLflow holds everything."""
    os.nice(_NICE)
    # A stop of the search is the search's business (Ray's reaches all its children): it says when.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but our own lines goes to the parent
    given = json.loads(order)
    closing = threading.Event()
    threading.Thread(target=_listen, args=(closing, given["of"]), daemon=True).start()
    directory, target = Path(given["directory"]), Target(**given["target"])
    try:
        with only_sender(directory, _LOCK_SECONDS):
            return int(not Follower(directory, target, channel).follow(closing))
    except (EvomergeError, OSError) as error:
        _say(channel, problem=first_line(error))
        return 1


def _listen(closing: threading.Event, parent: int) -> None:
    """Wait for the order to close, or for the end of the search."""
    reader = threading.Thread(target=_read, args=(closing,), daemon=True)
    reader.start()
    # Whoever inherited the other end of stdin keeps it open: the parent's end shows here too.
    while os.getppid() == parent and not closing.is_set() and reader.is_alive():
        reader.join(1.0)
    while os.getppid() == parent and closing.is_set():
        time.sleep(1.0)
    if os.getppid() == parent:
        time.sleep(1.0)  # the end of stdin: the parent is about to be gone, and its lock
    closing.set()
    time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


def _read(closing: threading.Event) -> None:
    for line in sys.stdin:
        if line.strip() == "close":
            closing.set()
            return


def _say(channel: TextIO, synced: Synced | None = None, problem: str = "") -> None:
    facts = {"problem": problem}
    if synced is not None:
        facts |= {"experiment": synced.experiment_id, "run": synced.run_id}
    with suppress(BrokenPipeError):  # the search has ended; the rest is sent all the same
        channel.write(json.dumps(facts) + "\n")
        channel.flush()


class Follower:
    """Sends what a journal says, as it grows.

    Args:
        directory: of the study.
        target: where to send.
        channel: takes a line after every attempt that changed something.
    """

    def __init__(self, directory: Path, target: Target, channel: TextIO) -> None:
        self._directory = directory
        self._target = target
        self._channel = channel
        self._cursor = JournalCursor(directory)
        self._series = Series()
        self._store: Store | None = None
        self._said: tuple[Synced | None, str] = (None, "")
        self._behind = self._pages_behind = False  # MLflow lacks something that was read
        self._pages_due = 0.0  # monotonic seconds
        self._rest = _LOOK_SECONDS

    def follow(self, closing: threading.Event) -> bool:
        """Send until told to stop, and then all that is left; return whether it was all sent."""
        retry = 0.0
        while True:
            # Read before the work, so that an order in between causes one more round.
            last = closing.is_set()
            try:
                self._round(last)
            except Exception as error:  # whatever it is may be over in a minute
                self._store, self._behind = None, True
                retry = min(2 * retry, _RETRY_SECONDS[1]) or _RETRY_SECONDS[0]
                self._report(None, f"{type(error).__name__}: {first_line(error)}")
            else:
                retry = 0.0
            if last:
                return retry == 0.0
            closing.wait(retry or self._rest)

    def _round(self, last: bool) -> None:
        """Read what is new and send what is missing, if there is any."""
        self._behind |= self._cursor.poll()
        began = time.monotonic()
        pages = last or (began >= self._pages_due and (self._behind or self._pages_behind))
        if self._cursor.history.opened is None or not (self._behind or pages):
            return
        view = StudyView.of(self._cursor.history, self._directory)
        projection = project(view, self._series, pages)
        reading = time.monotonic() - began
        self._rest = max(_LOOK_SECONDS, _REST * reading)
        self._store = self._store or Store(self._target)
        synced = self._store.send(projection, pages=False)
        self._behind, self._pages_behind = False, True
        self._report(synced, "")
        if pages:
            began = time.monotonic()
            self._store.send(projection)
            cost = reading + time.monotonic() - began
            self._pages_due = time.monotonic() + max(_PAGES_SECONDS, _PAGES_REST * cost)
            self._pages_behind = False

    def _report(self, synced: Synced | None, problem: str) -> None:
        synced = synced and replace(synced, trials=0)
        if (synced, problem) != self._said:
            _say(self._channel, synced, problem)
            self._said = synced, problem
