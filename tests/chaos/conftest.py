"""Drivers and workers of the chaos suite are new interpreters that must find its modules."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="session")
def importable() -> Iterator[None]:
    """Name the suite's folders to the processes that it starts."""
    before = os.environ.get("PYTHONPATH")
    folders = [str(_HERE), str(_HERE.parent), str(_HERE.parents[1]), *filter(None, [before])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
