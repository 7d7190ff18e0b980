"""Where the sources lie while merges are applied, and what fits where.

==========  ============================================================================
``device``  on the device, beside the live model: every merge reads them at its speed
``host``    in pinned memory of the machine, brought to the device piece by piece
``disk``    in their files, memory-mapped, brought through a pinned buffer piece by piece
==========  ============================================================================

Only the live model (the working copy) and two staging buffers must fit on the device. Where the
device is the CPU there is nothing to bring: ``disk`` reads the files in place, which workers of
one machine share; ``host`` reads them once into memory of the worker's own, which no other
program can push out; and ``device`` means the same as ``host``. The choice never changes a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from evomerge.checkpoint import ITEM_BYTES
from evomerge.errors import InputError
from evomerge.merge.factor_sources import stored_bytes
from evomerge.models import Models

#: One staging buffer: far above what hides the latency of a copy, far below any model.
STAGING_BYTES = 256 << 20
#: Part of a device that ``auto`` leaves to scoring: activations, caches, logits.
SCORING_SHARE = 0.2
#: Part of the machine's free memory that ``auto`` leaves to everything else.
HOST_SHARE = 0.2


class Residency(StrEnum):
    """Where the sources lie; see the module."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of one worker.

    Attributes:
        sources: base and experts, or base and factors of the adapters.
        working: the live model.
        staging: two buffers on the device; as much again in pinned memory for ``disk``.
    """

    sources: int
    working: int
    staging: int

    @staticmethod
    def of(models: Models, dtype: str) -> Needs:
        """Return the needs of a study.

        Args:
            models: that are merged.
            dtype: safetensors name of the live model's dtype.
        """
        sources = stored_bytes(models)
        working = models.layout.parameters * ITEM_BYTES[dtype]
        return Needs(sources, working, 2 * min(STAGING_BYTES, sources))


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are free before anything is loaded; None where that is not known.

    Attributes:
        on_gpu: the live model is on a GPU.
        device: of the GPU, for one worker; unused where the live model is on the CPU.
        host: of the machine.
        neighbours: workers that share the machine, this one included.
    """

    on_gpu: bool
    device: int | None
    host: int | None
    neighbours: int = 1

    @property
    def host_each(self) -> int | None:
        """What one worker can have of the machine's memory."""
        return None if self.host is None else self.host // self.neighbours


def use(needs: Needs, residency: Residency, on_gpu: bool) -> tuple[int, int]:
    """Return the bytes that a worker takes of the device and of the machine's own memory."""
    if not on_gpu:
        held = needs.sources if residency is not Residency.DISK else 0
        return 0, needs.working + held
    if residency is Residency.DEVICE:
        return needs.working + needs.sources, 0
    return needs.working + needs.staging, (
        needs.sources if residency is Residency.HOST else needs.staging
    )


def choose(wanted: str, needs: Needs, room: Room) -> Residency:
    """Return where the sources go.

    ``auto`` takes the fastest that fits and leaves a share of the memory to others; on the CPU
    that is always ``disk``, because there it is as fast and workers share it. What is not known
    counts as enough for an explicit choice, and as too little for ``auto``.

    Args:
        wanted: ``auto``, ``device``, ``host`` or ``disk``.
        needs: of one worker.
        room: what is free.

    Raises:
        InputError: an explicit choice cannot fit, or on a GPU nothing does.
    """
    if wanted != "auto":
        chosen = Residency(wanted)
        if not room.on_gpu and chosen is Residency.DEVICE:
            chosen = Residency.HOST
        _require_room(chosen, needs, room)
        return chosen
    if not room.on_gpu:
        return Residency.DISK
    for residency in (Residency.DEVICE, Residency.HOST):
        if _fits_well(residency, needs, room):
            return residency
    _require_room(Residency.DISK, needs, room)
    return Residency.DISK


def _fits_well(residency: Residency, needs: Needs, room: Room) -> bool:
    device, host = use(needs, residency, room.on_gpu)
    if room.device is None or device > room.device * (1 - SCORING_SHARE):
        return False
    return host == 0 or (room.host_each is not None and host <= room.host_each * (1 - HOST_SHARE))


def _require_room(residency: Residency, needs: Needs, room: Room) -> None:
    """Refuse what cannot fit.

    Raises:
        InputError: says what is needed and what is free.
    """
    device, host = use(needs, residency, room.on_gpu)
    if room.device is not None and device > room.device:
        held = "sources" if residency is Residency.DEVICE else "two staging buffers"
        remedy = (
            "use residency: auto, host or disk"
            if residency is Residency.DEVICE
            else "use a smaller space.dtype, or a larger GPU"
        )
        raise InputError(
            f"pool.residency: {residency} needs {gigabytes(device)} of GPU memory (live model "
            f"{gigabytes(needs.working)} and {held}), {gigabytes(room.device)} are free for a "
            f"worker ({remedy})"
        )
    each = room.host_each
    if each is not None and host > each:
        workers = f" x {room.neighbours} workers" if room.neighbours > 1 else ""
        remedy = (
            "use residency: auto or disk, or fewer workers"
            if residency is Residency.HOST
            else "use fewer workers, or a smaller space.dtype"
        )
        raise InputError(
            f"pool.residency: {residency} needs {gigabytes(host)}{workers} of memory, "
            f"{gigabytes(room.host or 0)} are available ({remedy})"
        )


def gigabytes(size: int) -> str:
    """Return a size for a reader."""
    return f"{size / 1e9:.2f} GB" if size >= 10**7 else f"{size / 1e6:.2f} MB"
