"""Whether the workers of a study fit on this machine, judged before they start."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass

from evomerge.checkpoint import ITEM_BYTES
from evomerge.config import PoolSection
from evomerge.errors import InputError
from evomerge.memory import available_bytes, gpu_bytes, neighbours
from evomerge.merge.factor_sources import factor_bytes, stored_bytes
from evomerge.merge.residency import Needs, Residency, Room, choose, gigabytes
from evomerge.models import Models


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a worker will need, what is free here, and what follows.

    Attributes:
        wanted: the study file's ``pool.residency``.
        needs: of one worker.
        room: of this machine, measured now; None where the workers will be on other machines.
        choice: what a worker would take here; None without ``room``, or where a GPU's memory is
            not known.
    """

    wanted: str
    needs: Needs
    room: Room | None
    choice: Residency | None

    def facts(self) -> dict[str, object]:
        """Return it as plain data, in bytes."""
        room = self.room
        return {
            "sources": self.needs.sources,
            "working_copy": self.needs.working,
            "staging": self.needs.staging,
            "free_device": None if room is None or not room.on_gpu else room.device,
            "free_host": None if room is None else room.host,
            "workers_per_machine": None if room is None else room.neighbours,
            "residency": self.wanted,
            "choice": None if self.choice is None else str(self.choice),
        }

    def lines(self) -> list[str]:
        """Return it for a reader."""
        needs, room = self.needs, self.room
        lines = [
            f"sources {gigabytes(needs.sources)}, working copy {gigabytes(needs.working)} per "
            f"worker, staging {gigabytes(needs.staging)} where sources are brought to a GPU"
        ]
        if room is not None:
            host = "unknown" if room.host is None else gigabytes(room.host)
            gpu = "unknown" if room.device is None else gigabytes(room.device)
            device = f"{gpu} of GPU memory for a worker, " if room.on_gpu else ""
            machine = f"{room.neighbours} worker{'s' * (room.neighbours != 1)}"
            lines.append(f"free: {device}{host} of this machine's memory for {machine}")
        chosen = "decided by each worker" if self.choice is None else str(self.choice)
        why = {
            Residency.DEVICE: "on the GPU",
            Residency.HOST: "in memory of each worker",
            Residency.DISK: "memory-mapped; workers of a machine share them",
        }
        where = "" if self.choice is None else f" ({why[self.choice]})"
        lines.append(f"residency {self.wanted}: {chosen}{where}")
        return lines


def estimate_memory(pool: PoolSection, models: Models, dtype: str) -> MemoryEstimate:
    """Return where the sources would lie, judged from headers and what is free now.

    Args:
        pool: where trials run.
        models: that every worker opens.
        dtype: of the live model, as safetensors names it.

    Raises:
        InputError: an explicit residency cannot fit.
    """
    needs = Needs.of(models, dtype)
    if pool.kind == "ray" and os.environ.get("RAY_ADDRESS"):
        return MemoryEstimate(pool.residency, needs, None, None)
    # In this process `auto` takes a GPU that it sees; Ray shows workers only those asked for.
    asked = pool.gpus_per_worker > 0 if pool.kind == "ray" else True
    gpu = gpu_bytes() if pool.device == "cuda" or (pool.device == "auto" and asked) else None
    on_gpu = pool.device == "cuda" or gpu is not None
    share = min(pool.gpus_per_worker, 1.0) or 1.0
    room = Room(
        on_gpu=on_gpu,
        device=None if gpu is None else min(gpu[0], int(gpu[1] * share)),
        host=available_bytes(),
        neighbours=neighbours(pool.workers, pool.cpus_per_worker) if pool.kind == "ray" else 1,
    )
    if on_gpu and room.device is None:
        return MemoryEstimate(pool.residency, needs, room, None)
    return MemoryEstimate(pool.residency, needs, room, choose(pool.residency, needs, room))


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
    warnings = _gpu_warnings(pool, workers)
    wanted, there = workers * pool.cpus_per_worker, os.cpu_count()
    if there is not None and wanted > there:
        warnings.append(
            f"pool.workers: {workers} with {pool.cpus_per_worker} CPU each need {wanted} CPUs, "
            f"this machine has {there} (they would take turns; use fewer)"
        )
    on_gpu = pool.device == "cuda" or (pool.device == "auto" and pool.gpus_per_worker > 0)
    live = models.layout.parameters * ITEM_BYTES[dtype]
    sources = stored_bytes(models)
    available = available_bytes()
    if not on_gpu and available is not None and workers * live + sources > available:
        warnings.append(
            f"pool.workers: {workers} live {'model' if workers == 1 else 'models'} of "
            f"{live / 1e9:.2f} GB each and {sources / 1e9:.2f} GB of sources, "
            f"{available / 1e9:.2f} GB of memory are available "
            "(use fewer workers, or a smaller space.dtype)"
        )
    return warnings


def temporary_warnings(pool: PoolSection, models: Models, trims: bool) -> list[str]:
    """Return whether what workers write into temporary files fits this machine's disk.

    Args:
        pool: where trials run.
        models: that every worker opens.
        trims: adapters merged as factors are trimmed, for which their magnitudes are sorted.
    """
    if pool.kind == "ray" and os.environ.get("RAY_ADDRESS"):
        return []
    workers = pool.workers if pool.kind == "ray" else 1
    folds = [fold for expert in models.experts for fold in expert.folds.values()]
    if models.factored:
        what, each = "sorted magnitudes of the adapters", trims * factor_bytes(models, "a")
    else:
        what, each = "folded adapters", sum(4 * math.prod(fold.base.shape) for fold in folds)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if workers * each <= free:
        return []
    return [
        f"pool.workers: {workers} worker{'s' * (workers != 1)} will write {each / 1e9:.2f} GB each "
        f"({what}) to {folder}, where {free / 1e9:.2f} GB are free (set TMPDIR to a larger disk, "
        "or use fewer workers)"
    ]


def _gpu_warnings(pool: PoolSection, workers: int) -> list[str]:
    """Return whether this machine has fewer GPUs than are asked for; it asks only then."""
    asked = pool.device != "cpu" and pool.gpus_per_worker > 0 and pool.kind == "ray"
    if not asked and pool.device != "cuda":
        return []
    wanted = workers * pool.gpus_per_worker if asked else 1
    there = gpu_count()
    if wanted <= there:
        return []
    has = f"this machine has {there or 'none'} that torch can use"
    if asked:
        return [
            f"pool.gpus_per_worker: {workers} worker{'s' * (workers != 1)} with "
            f"{pool.gpus_per_worker:g} GPU each need {wanted:g}, {has}, and no more can "
            "join (use fewer workers, 0 to work on the CPU, or a cluster: RAY_ADDRESS, or evomerge "
            "submit)"
        ]
    return [f"pool.device: cuda needs a GPU, {has} (cpu, or auto, works without)"]


def require_gpus(pool: PoolSection) -> None:
    """Refuse GPUs that a Ray started here can never get; a cluster's nodes may still join.

    Raises:
        InputError: this machine has fewer than the workers ask for.
    """
    asked = pool.kind == "ray" and pool.gpus_per_worker > 0
    if asked and not os.environ.get("RAY_ADDRESS"):
        problems = _gpu_warnings(pool, pool.workers)
        if problems:
            raise InputError("\n".join(problems))


def gpu_count() -> int:
    """Return how many GPUs torch can use here; the count opens no context on any of them."""
    import torch

    return torch.cuda.device_count()
