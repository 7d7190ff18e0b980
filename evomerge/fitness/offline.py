"""Keeping the datasets library quiet, and from waiting for a hub that is not there."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


@contextmanager
def hub_or_offline(local: bool, answers: Callable[[str], bool]) -> Iterator[bool]:
    """Switch the hub clients to offline mode when the hub does not answer; yields whether it is.

    Args:
        local: the data is on this machine, so the hub is not asked.
        answers: says whether an address can be reached.
    """
    import datasets.config
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    offline = not local and (any(before) or not answers(constants.ENDPOINT))
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield offline
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def silent_datasets() -> Iterator[None]:
    """Keep datasets from drawing progress bars."""
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Say whether the host of ``url``, or the proxy that leads to it, accepts connections.

    The ``datasets`` library waits half a minute to several minutes for a hub that is not there.
    """
    proxy = urllib.request.getproxies().get(urlsplit(url).scheme)
    target = urlsplit(proxy or url)
    port = target.port or (443 if target.scheme == "https" else 80)
    answered = threading.Event()

    def probe() -> None:
        try:
            with socket.create_connection((target.hostname or "", port), timeout=seconds):
                answered.set()
        except OSError:
            return

    # In a thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
