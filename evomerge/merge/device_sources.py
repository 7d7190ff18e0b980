"""Base and experts for merges on a device: held there, or brought piece by piece.

A streamed merge has two staging buffers. While the pieces of one are merged, a second stream
copies the next ones into the other; events keep the two apart, so nothing waits that need not.
On the CPU the same code runs with plain memory and without streams.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evomerge.checkpoint import ITEM_BYTES
from evomerge.errors import SetupError
from evomerge.layout import Layout, Partition
from evomerge.merge.residency import STAGING_BYTES, Residency
from evomerge.merge.sources import Sources

I64 = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

#: Sources begin at multiples of this in every buffer, so that vectors can be loaded.
_ALIGN = 256
#: Elements of a streamed piece: the copy takes long against what it costs to ask for it.
_PIECE = 1 << 21
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Batch:
    """Pieces of work whose sources lie on the device.

    Attributes:
        work: (span, slot, first element in the slot, elements) [N, 4].
        buffers: bytes that hold the sources, one tensor per model [K + 1]; the base is first.
        offsets: where each piece begins in them, in bytes [N, K + 1]; -1 where it was not asked.
        dtypes: safetensors names by slot and model.
        lasting: the same buffers serve every merge, at the same addresses.
    """

    work: I64
    buffers: tuple[torch.Tensor, ...]
    offsets: I64
    dtypes: list[tuple[str, ...]]
    lasting: bool

    def values(self, piece: int, model: int) -> torch.Tensor:
        """Return the elements of a piece in one model, as stored."""
        slot, count = int(self.work[piece, 1]), int(self.work[piece, 3])
        dtype = self.dtypes[slot][model]
        start = int(self.offsets[piece, model])
        return self.buffers[model][start : start + count * ITEM_BYTES[dtype]].view(_TYPES[dtype])

    def items(self) -> I64:
        """Return the bytes of the elements of every piece in every model [N, K + 1]."""
        table = np.asarray([[ITEM_BYTES[name] for name in names] for names in self.dtypes])
        result: I64 = table[self.work[:, 1]].astype(np.int64)
        return result

    def addresses(self) -> I64:
        """Return the address of every piece in every model [N, K + 1]."""
        starts = np.asarray([buffer.data_ptr() for buffer in self.buffers], np.int64)
        return np.where(self.offsets >= 0, starts + self.offsets, 0)


def cut_pieces(cut: Partition, layout: Layout, most: int) -> I64:
    """Return the spans of a partition in pieces (span, slot, first, elements) [N, 4].

    Args:
        cut: the partition.
        layout: its slots.
        most: elements of a piece. No piece crosses a multiple of 2^32 of canonical indices, so
            that the upper half of the index is one number for the counter hash.
    """
    slots, offsets = layout.slots, layout.offsets
    rows = []
    for number, span in enumerate(cut.spans):
        slot = slots[span.slot]
        width = slot.size // max(slot.rows, 1)
        first, stop, offset = span.start * width, span.stop * width, offsets[span.slot]
        crossing = ((offset + first >> 32) + 1 << 32) - offset
        for low, high in ((first, min(stop, crossing)), (crossing, stop)):
            at = np.arange(low, high, most, dtype=np.int64)
            row = np.empty((len(at), 4), np.int64)
            row[:, 0], row[:, 1], row[:, 2] = number, span.slot, at
            row[:, 3] = np.minimum(high - at, most)
            rows.append(row)
    return np.concatenate(rows) if rows else np.empty((0, 4), np.int64)


class DeviceSources:
    """Base and experts of one study for merges on a device.

    Args:
        sources: memory-mapped weights.
        device: where merges run, e.g. ``cuda:0``.
        residency: where the sources lie between merges.
        staging_bytes: of each of the two buffers, where they are brought.
        threads: that fill the pinned buffer from the files.

    Raises:
        SetupError: there is not enough memory.

    Attributes:
        brought: bytes brought to the device since the beginning.
        threads: as given.
    """

    def __init__(
        self,
        sources: Sources,
        device: torch.device,
        residency: Residency = Residency.DEVICE,
        staging_bytes: int = STAGING_BYTES,
        threads: int = 1,
    ) -> None:
        self.layout = sources.layout
        self.experts = sources.experts
        self.device = device
        self.residency = residency
        self.brought = 0
        #: Elements in one index of the first axis of each slot.
        self.widths = [slot.size // max(slot.rows, 1) for slot in sources.layout.slots]
        self._pieces: dict[tuple[int, int], tuple[Partition, I64]] = {}
        self._sources = sources
        self.threads = threads
        slots = range(len(sources.layout.slots))
        self._models = range(sources.experts + 1)
        self.dtypes = [tuple(self._stored(slot, m)[1] for m in self._models) for slot in slots]
        self._items = np.asarray(
            [[ITEM_BYTES[dtype] for dtype in names] for names in self.dtypes], np.int64
        ).reshape(-1, sources.experts + 1)
        sizes = np.asarray([slot.size for slot in sources.layout.slots], np.int64)
        spaced = -(-self._items * sizes[:, None] // _ALIGN) * _ALIGN
        self._starts = np.cumsum(spaced, axis=0) - spaced  # [slots, K + 1]
        self._held: tuple[torch.Tensor, ...] = ()
        try:
            if residency is not Residency.DISK:
                self._held = tuple(self._load(m, int(spaced[:, m].sum())) for m in self._models)
            if residency is not Residency.DEVICE:
                # A piece must fit whatever the experts are; a model need not fill the buffer.
                least = (_ALIGN + 4) * len(self._models)
                self._size = max(min(staging_bytes, int(spaced.sum())), least)
                self._stages = [_Stage(self._size, device, residency) for _ in range(2)]
        except (MemoryError, RuntimeError) as error:  # torch's out-of-memory is a RuntimeError
            raise SetupError(
                f"pool.residency: {residency}: the sources do not fit: "
                f"{str(error).splitlines()[0]} (use residency: host or disk)"
            ) from error

    @property
    def on_host(self) -> Sources:
        """The memory-mapped weights behind it; factors of adapters lie there only."""
        return self._sources

    @property
    def held(self) -> tuple[torch.Tensor, ...]:
        """The buffers that hold base and experts between merges [K + 1]; none for ``disk``."""
        return self._held

    def _stored(self, slot: int, model: int) -> tuple[npt.NDArray[Any], str]:
        """Return the stored bits and the dtype of a slot; model 0 is the base."""
        if model == 0:
            return self._sources.base(slot)
        return self._sources.expert(slot, model - 1)

    def _load(self, model: int, size: int) -> torch.Tensor:
        """Return one buffer with all slots of a model."""
        on_device = self.residency is Residency.DEVICE
        held = torch.empty(size, dtype=torch.uint8, device=self.device if on_device else "cpu")
        if not on_device and self.device.type == "cuda":
            _pin(held)
        for slot in range(len(self.layout.slots)):
            bits = self._stored(slot, model)[0].view(np.uint8)
            start = int(self._starts[slot, model])
            part = held[start : start + len(bits)]
            if on_device:
                part.copy_(torch.from_numpy(np.array(bits)))
            else:
                np.copyto(part.numpy(), bits)
        return held

    def pieces(self, cut: Partition, most: int) -> I64:
        """Return the spans of a partition in pieces, see ``cut_pieces``; cut once.

        Args:
            cut: the partition; one object for all merges.
            most: elements of a piece; fewer where they must fit a buffer.
        """
        if self.residency is not Residency.DEVICE:
            fitting = (self._size // len(self._models) - _ALIGN) // 4
            most = max(min(most, _PIECE, fitting), 1)
        key = (id(cut), most)
        if key not in self._pieces:
            # The partition is kept beside its pieces, so that no other gets its identity.
            self._pieces[key] = cut, cut_pieces(cut, self.layout, most)
        return self._pieces[key][1]

    def batches(self, work: I64, needed: Flags) -> Iterator[Batch]:
        """Yield the work with its sources on the device, in order.

        Merges of a batch must be launched before the next one is asked for.

        Args:
            work: some of ``pieces`` [N, 4].
            needed: which models each piece reads [N, K + 1].
        """
        offsets = self._starts[work[:, 1]] + work[:, 2:3] * self._items[work[:, 1]]
        if self.residency is Residency.DEVICE:
            yield Batch(work, self._held, np.where(needed, offsets, -1), self.dtypes, True)
            return
        with ThreadPoolExecutor(self.threads) as threads:
            ready: Batch | None = None
            # The next batch is under way before the one that is ready is merged.
            for number, (part, places) in enumerate(self._packed(work, needed)):
                stage = self._stages[number % 2]
                stage.begin()
                self._bring(stage, work[part], offsets[part], places, threads)
                if ready is not None:
                    yield from self._merging(ready, self._stages[(number + 1) % 2])
                buffers = (stage.buffer,) * len(self._models)
                ready = Batch(work[part], buffers, places, self.dtypes, False)
                last = stage
            if ready is not None:
                yield from self._merging(ready, last)

    def _merging(self, batch: Batch, stage: _Stage) -> Iterator[Batch]:
        stage.await_copy()
        try:
            yield batch
        finally:
            stage.end()

    def _packed(self, work: I64, needed: Flags) -> Iterator[tuple[slice, I64]]:
        """Yield runs of pieces that fit one buffer, and their places in it [n, K + 1]."""
        sizes = np.where(needed, -(-work[:, 3:4] * self._items[work[:, 1]] // _ALIGN) * _ALIGN, 0)
        each = sizes.sum(axis=1)
        first, total = 0, 0
        for piece in range(len(work) + 1):
            if piece == len(work) or total + each[piece] > self._size:
                part = slice(first, piece)
                ends = np.cumsum(sizes[part].reshape(-1)).reshape(-1, len(self._models))
                if piece > first:
                    yield part, np.where(needed[part], ends - sizes[part], -1)
                first, total = piece, 0
            if piece < len(work):
                total += int(each[piece])

    def _bring(
        self, stage: _Stage, work: I64, offsets: I64, places: I64, threads: ThreadPoolExecutor
    ) -> None:
        """Copy the pieces' sources into a stage's buffer."""
        items = self._items[work[:, 1]]
        moves = [
            (piece, model, int(places[piece, model]), int(work[piece, 3] * items[piece, model]))
            for piece, model in np.argwhere(places >= 0).tolist()
        ]
        self.brought += sum(size for _, _, _, size in moves)
        if self.residency is Residency.HOST:
            with stage.copying():
                for piece, model, place, size in moves:
                    start = int(offsets[piece, model])
                    part = self._held[model][start : start + size]
                    stage.buffer[place : place + size].copy_(part, non_blocking=True)
            return
        pinned = stage.pinned_array()

        def read(move: tuple[int, int, int, int]) -> None:
            piece, model, place, size = move
            slot, first, count = work[piece, 1:].tolist()
            stored = self._stored(slot, model)[0][first : first + count]
            np.copyto(pinned[place : place + size], stored.view(np.uint8))

        # list() raises what went wrong in a thread.
        list(threads.map(read, moves))
        stop = max((place + size for _, _, place, size in moves), default=0)
        with stage.copying():
            stage.buffer[:stop].copy_(stage.pinned[:stop], non_blocking=True)


class _Stage:
    """One staging buffer: filled on a copy stream, read by merges on the current stream.

    Args:
        size: in bytes.
        device: of the buffer.
        residency: a pinned buffer is filled first where the sources are on disk.
    """

    def __init__(self, size: int, device: torch.device, residency: Residency) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._cuda = device.type == "cuda"
        self.pinned = torch.empty(size if residency is Residency.DISK else 0, dtype=torch.uint8)
        if self._cuda:
            _pin(self.pinned)
            # torch's own annotations are missing here and below.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._merged = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Let copies wait until the merges of what the buffer held are done."""
        if self._cuda:
            self._stream.wait_event(self._merged)

    def pinned_array(self) -> npt.NDArray[np.uint8]:
        """Return the pinned buffer once the last copy out of it is done."""
        if self._cuda:
            self._copied.synchronize()
        array: npt.NDArray[np.uint8] = self.pinned.numpy()
        return array

    def copying(self) -> _Copying:
        """Return a context in which copies run beside the merges."""
        return _Copying(self._stream, self._copied) if self._cuda else _Copying(None, None)

    def await_copy(self) -> None:
        """Let merges wait until the buffer is filled."""
        if self._cuda:
            torch.cuda.current_stream(self.buffer.device).wait_event(self._copied)

    def end(self) -> None:
        """Note that the merges of the buffer are launched."""
        if self._cuda:
            self._merged.record(torch.cuda.current_stream(self.buffer.device))


class _Copying:
    """A context on the copy stream; its end is an event. Nothing without a stream."""

    def __init__(self, stream: Any, event: Any) -> None:
        self._context = None if stream is None else torch.cuda.stream(stream)
        self._stream, self._event = stream, event

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        if self._context is not None:
            self._event.record(self._stream)
            self._context.__exit__(*error)


def _pin(tensor: torch.Tensor) -> None:
    """Lock a tensor's memory, so that copies to the device can run beside other work.

    torch's own ``pin_memory`` rounds sizes up to a power of two, which can double them.
    """
    if tensor.numel():
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = tensor.data_ptr()
        torch.cuda.check_error(runtime.cudaHostRegister(address, tensor.numel(), 0))
        # At the end of the process the driver unlocks everything by itself.
        weakref.finalize(tensor, runtime.cudaHostUnregister, address).atexit = False
