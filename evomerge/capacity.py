"""Whether the workers of a study fit on this machine, judged before they start."""

from __future__ import annotations

import os
from pathlib import Path

from evomerge.checkpoint import ITEM_BYTES
from evomerge.config import PoolSection
from evomerge.models import Models

_MEMINFO = Path("/proc/meminfo")


def capacity_warnings(pool: PoolSection, models: Models, dtype: str) -> list[str]:
    """Return what a user should know of processors and memory.

    Nothing about a cluster, whose nodes are not known before Ray is asked.

    Args:
        pool: where trials run.
        models: that every worker maps.
        dtype: of the live model, as safetensors names it.
    """
    if pool.kind == "ray" and os.environ.get("RAY_ADDRESS"):
        return []
    workers = pool.workers if pool.kind == "ray" else 1
    warnings = []
    wanted, there = workers * pool.cpus_per_worker, os.cpu_count()
    if there is not None and wanted > there:
        warnings.append(
            f"pool.workers: {workers} with {pool.cpus_per_worker} CPU each need {wanted} CPUs, "
            f"this machine has {there} (they would take turns; use fewer)"
        )
    on_gpu = pool.device == "cuda" or (pool.device == "auto" and pool.gpus_per_worker > 0)
    live = models.layout.parameters * ITEM_BYTES[dtype]
    sources = sum(
        entry.stop - entry.start
        for model in (models.base, *models.experts)
        for entry in model.tensors.values()
    )
    available = available_bytes()
    if not on_gpu and available is not None and workers * live + sources > available:
        warnings.append(
            f"pool.workers: {workers} live {'model' if workers == 1 else 'models'} of "
            f"{live / 1e9:.2f} GB each and {sources / 1e9:.2f} GB of sources, "
            f"{available / 1e9:.2f} GB of memory are available "
            "(use fewer workers, or a smaller space.dtype)"
        )
    return warnings


def available_bytes() -> int | None:
    """Return the memory that programs can still have, None where the system does not say."""
    if not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
