"""What the last bits of a searcher's asks depend on: versions, linear algebra, CPU.

A study is resumed by asking again. Another CPU rounds differently in BLAS and in numpy's loops,
and other versions have other algorithms. So the journal notes what was in use when trials were
asked, and an error can say what differs.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: Packages that searchers compute with.
SEARCH_PACKAGES = ("numpy", "scipy", "nevergrad", "pymoo", "cma", "scikit-learn")

#: How numbers are noted: plain JSON data.
Numerics = Mapping[str, Any]


@cache
def numerics() -> Numerics:
    """Return what asks depend on here, as JSON data.

    ``versions`` by package, those that are installed; ``blas``, the kernels of OpenBLAS in use;
    ``features``, the instruction sets that numpy's loops use, each list and word absent where it
    is not known; ``machine`` and ``libc``.
    """
    versions = {"python": platform.python_version()}
    for package in ("evomerge", *SEARCH_PACKAGES):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found = {
        "versions": versions,
        "blas": _blas(),
        "features": _features(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip(),
    }
    return {key: value for key, value in found.items() if value}


def _blas() -> str:
    """Return the architecture whose kernels numpy's OpenBLAS uses; empty for another BLAS."""
    import numpy as np  # so that its libraries are loaded
    from threadpoolctl import threadpool_info

    assert np.__version__
    libraries = [one for one in threadpool_info() if one["internal_api"] == "openblas"]
    own = [one for one in libraries if "numpy" in one["filepath"]] or libraries
    return ", ".join(sorted({str(one.get("architecture", "")) for one in own}))


def _features() -> list[str]:
    """Return the instruction sets that numpy has loops for and may use here."""
    import numpy as np

    config: Mapping[str, Any] = dict(np.show_config(mode="dicts"))
    return [str(name) for name in config.get("SIMD Extensions", {}).get("found", ())]


def differences(then: Numerics, now: Numerics) -> list[str]:
    """Return what differs, in words: ``numpy 1.26.4 -> 2.3.5``, ``OpenBLAS Haswell -> Zen``."""
    old, new = then.get("versions", {}), now.get("versions", {})
    lines = [
        f"{package} {old.get(package, 'absent')} -> {new.get(package, 'absent')}"
        for package in (*old, *(name for name in new if name not in old))
        if old.get(package) != new.get(package)
    ]
    words = {"machine": "machine", "libc": "C library", "blas": "OpenBLAS kernels"}
    for key, word in words.items():
        if then.get(key) != now.get(key):
            lines.append(f"{word} {then.get(key, 'unknown')} -> {now.get(key, 'unknown')}")
    had, has = then.get("features", []), now.get("features", [])
    for word, names in (
        ("without", [name for name in had if name not in has]),
        ("with", [name for name in has if name not in had]),
    ):
        if names:
            lines.append(f"a CPU now {word} {', '.join(names)} for numpy")
    return lines


def remedies(then: Numerics, now: Numerics, cpu: str) -> list[str]:
    """Return what it takes to compute as ``then``, one entry for each group that differs.

    Args:
        then: how trials were asked.
        now: how they are asked here.
        cpu: words for a machine with the CPU of then.
    """
    found = []
    if then.get("versions") != now.get("versions"):
        found.append("with those versions")
    if then.get("libc") != now.get("libc"):
        found.append("with that C library")
    if any(then.get(key) != now.get(key) for key in ("machine", "blas", "features")):
        variables = environment(then, now)
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        found.append(f"{cpu}, or here with: {words}" if words else cpu)
    return found


def environment(then: Numerics, now: Numerics) -> dict[str, str]:
    """Return the variables with which this CPU computes as that of ``then``; empty where none do.

    They do where it has everything that the other one had.
    """
    had, has = then.get("features", []), now.get("features", [])
    if then.get("machine") != now.get("machine") or not set(had) <= set(has):
        return {}
    variables = {}
    if then.get("blas") != now.get("blas"):
        if not then.get("blas"):
            return {}
        variables["OPENBLAS_CORETYPE"] = str(then["blas"])
    surplus = [name for name in has if name not in had]
    if surplus:
        variables["NPY_DISABLE_CPU_FEATURES"] = " ".join(surplus)
    return variables
