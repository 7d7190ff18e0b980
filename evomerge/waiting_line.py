"""What a command waits for: a line that counts on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: Without a terminal, one line every so many seconds.
_LINE_SECONDS = 10.0


@contextmanager
def waiting_line(
    what: str, console: Console, line_seconds: float = _LINE_SECONDS
) -> Iterator[None]:
    """Say what is being waited for while the context is open.

    Args:
        what: such as ``MLflow to answer``.
        console: where to.
        line_seconds: between two lines where ``console`` is no terminal.
    """
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(f"waiting for {what}", total=None)
            yield
        return
    over = threading.Event()
    began = time.monotonic()

    def repeat() -> None:
        while not over.wait(line_seconds):
            say(f"still waiting for {what} ({time.monotonic() - began:.0f} s) ...")

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"waiting for {what} ...")
    thread = threading.Thread(target=repeat, name="evomerge-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
