"""Signals that stop a study: the first one cleanly, the second at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from evomerge.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: How long a stop waits for running trials where nobody said it.
GRACE_SECONDS = 60.0

#: So long after it asked a job to stop, Ray kills its driver; `evomerge submit --grace` sets it.
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


def grace_seconds() -> float:
    """Return how long a stop waits for running trials.

    In a job of Ray a tenth of what it gives, at most 10 s, is left for leaving.
    """
    text = os.environ.get(_STOP_WAIT, "")
    if not text.isdecimal():
        return GRACE_SECONDS
    seconds = int(text)
    return seconds - min(10.0, seconds / 10)


class StopSignals:
    """While entered, SIGINT and SIGTERM are remembered instead of killing the process.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Attributes:
        received: number of the first signal, None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Interrupted(
                "stopped at once by a second signal; run the same command again to continue", number
            )
        self.received = number
