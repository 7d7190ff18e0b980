"""What a study will need: measured with the user's own models on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.checkpoint import ITEM_BYTES
from evomerge.merge.factor_sources import stored_bytes
from evomerge.models import Models
from evomerge.prepare import Prepared
from evomerge.recipe import Recipe
from evomerge.worker import ModelWorker

if TYPE_CHECKING:
    import torch

#: Far beyond the caches of a CPU, so that the copy is one of memory.
_COPY_BYTES = 256 << 20
_PARTS = 4
#: A median of fewer says nothing about the spread.
_REPEATS = 3
#: More repetitions than these do not make a median better.
_MOST_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Sample:
    """Repeated measurements of one number.

    Attributes:
        median: of them.
        low, high: the extremes.
        repeats: how many.
    """

    median: float
    low: float
    high: float
    repeats: int

    @staticmethod
    def of(values: Sequence[float]) -> Sample:
        """Summarise measurements."""
        return Sample(median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class StudyNeeds:
    """What the whole study will take, extrapolated.

    Attributes:
        search_seconds: baselines and trials.
        validation_seconds: finalists and baselines.
        test_seconds: front and baselines, where every finalist is on the front.
        workers: at work at the same time; taken as if they did not slow each other.
    """

    search_seconds: float
    validation_seconds: float
    test_seconds: float
    workers: int


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """Memory of one worker in bytes.

    Attributes:
        own: anonymous memory of the process, or of the device where the model lives there;
            None where the system does not tell.
        sources: base and experts; with residency ``disk`` the workers of a machine share them.
        device: where ``own`` lies.
        residency: of the sources.
    """

    own: int | None
    sources: int
    device: str
    residency: str

    def line(self) -> str:
        """Return it for a reader."""
        own = "unknown" if self.own is None else f"{self.own / 1e9:.2f} GB"
        place = {
            "disk": "memory-mapped, shared by the workers of a machine",
            "host": "in memory of each worker",
            "device": "on the device, counted before",
        }[self.residency]
        return (
            f"{own} per worker ({self.device}), and {self.sources / 1e9:.2f} GB of models "
            f"(residency {self.residency}: {place})"
        )


@dataclass(frozen=True, slots=True)
class Bench:
    """The measurement.

    Attributes:
        bound_ratio: seconds that a plain copy needs for the bytes of one merge, over the
            seconds of the merge.
        apply_seconds: of one random merge of the space, statistics cached.
        copy_bytes_per_second: read and written by a plain copy with as many threads.
        apply_bytes: that a merge must move: base and experts read once, the result written.
        items_per_second: of the fitness.
        items: scored per repetition.
        start_seconds: loading, the first merge with its statistics, the first item.
        merge_share: part of a trial that the merge takes.
        trial_seconds: merge and search items of one trial.
        needs: of the study.
        memory: of a worker.
        threads: of a worker.
    """

    bound_ratio: float
    apply_seconds: Sample
    copy_bytes_per_second: Sample
    apply_bytes: int
    items_per_second: Sample
    items: int
    start_seconds: float
    merge_share: float
    trial_seconds: float
    needs: StudyNeeds
    memory: WorkerMemory
    threads: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)

    def lines(self) -> dict[str, str | list[str]]:
        """Return it for a reader, ratios first."""
        apply, copy, items = self.apply_seconds, self.copy_bytes_per_second, self.items_per_second
        needs, memory = self.needs, self.memory
        total = needs.search_seconds + needs.validation_seconds + needs.test_seconds
        return {
            "merge": [
                f"{self.bound_ratio:.0%} of the speed of a plain copy (median of {apply.repeats})",
                f"{_seconds(apply.median)} for {self.apply_bytes / 1e9:.3g} GB; "
                f"the copy moves {copy.median / 1e9:.1f} GB/s with {self.threads} threads",
            ],
            "items": f"{items.median:.3g} per second ({items.low:.3g} to {items.high:.3g}; "
            f"{items.repeats} times {self.items})",
            "trial": f"{_seconds(self.trial_seconds)}: {self.merge_share:.0%} merge, "
            f"{1 - self.merge_share:.0%} scoring",
            "start": f"{_seconds(self.start_seconds)} per worker, once",
            "study": [
                f"{_seconds(total)} with {needs.workers} "
                f"{'worker' if needs.workers == 1 else 'workers'} that do not slow each other",
                f"search {_seconds(needs.search_seconds)}, validation "
                f"{_seconds(needs.validation_seconds)}, held-out items up to "
                f"{_seconds(needs.test_seconds)}",
            ],
            "memory": memory.line(),
        }


class CopyProbe:
    """A plain copy, measured where and as the merge runs.

    Args:
        threads: that share the copy on the CPU.
        device: torch device; None for the CPU.
        size: bytes that are copied.
    """

    def __init__(
        self, threads: int, device: torch.device | None = None, size: int = _COPY_BYTES
    ) -> None:
        self._size = size
        self._device = device
        self._pool = ThreadPoolExecutor(threads)
        if device is None:
            source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
            # In several parts per thread, as the merge is: a thread that was held up by another
            # program leaves its parts to the others.
            parts = threads * _PARTS
            self._pairs = list(
                zip(np.array_split(target, parts), np.array_split(source, parts), strict=True)
            )
            return
        import torch

        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)

    def bytes_per_second(self) -> float:
        """Copy once; return the bytes read and written per second."""
        started = time.perf_counter()
        if self._device is None:
            for done in [self._pool.submit(np.copyto, *pair) for pair in self._pairs]:
                done.result()
        else:
            self._target.copy_(self._source)
            synchronize(self._device)
        return self.bytes / (time.perf_counter() - started)

    @property
    def bytes(self) -> int:
        """How much one copy reads and writes."""
        return 2 * self._size

    def close(self) -> None:
        """Let its threads end."""
        self._pool.shutdown()


def synchronize(device: torch.device) -> None:
    """Wait for what the device was told to do; nothing on the CPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def merge_bytes(models: Models, dtype: str) -> int:
    """Return the bytes that one merge must move: every source read once, the result written."""
    return models.layout.parameters * ITEM_BYTES[dtype] + stored_bytes(models)


def measure(prepared: Prepared, seconds: float) -> Bench:
    """Measure merge, copy and fitness with one worker, and extrapolate to the study.

    Every number is measured several times, also where that takes longer than asked.

    Args:
        prepared: the study.
        seconds: to spend after loading.

    Raises:
        EvomergeError: the worker cannot be built.
    """
    started = time.perf_counter()
    worker = _Worker(prepared.factory)
    rng = np.random.default_rng(prepared.file.seed)

    def recipe() -> Recipe:
        return prepared.space.decode(rng.random(prepared.space.dimension).tolist())

    worker.apply(recipe())
    search = [split.search for split in prepared.splits]
    first = [items[:1] for items in search]
    worker.score(first)
    start_seconds = time.perf_counter() - started
    items = _some_items(search, worker.score(first), seconds, prepared.file.fitness.batch_size)

    threads = prepared.factory.threads
    probe = CopyProbe(threads, None if worker.device.type == "cpu" else worker.device)
    probe.bytes_per_second()
    copies, applies = _repeat(seconds / 2, probe.bytes_per_second, lambda: worker.apply(recipe()))
    probe.close()
    count = sum(len(ids) for ids in items)
    [scored] = _repeat(seconds / 2, lambda: worker.score(items))
    copy, apply = Sample.of(copies), Sample.of(applies)
    rate = Sample.of([count / spent for spent in scored])
    moved = merge_bytes(prepared.models, prepared.space.dtype)
    per_trial = sum(len(ids) for ids in search)
    trial = apply.median + per_trial / rate.median
    return Bench(
        bound_ratio=moved / copy.median / apply.median,
        apply_seconds=apply,
        copy_bytes_per_second=copy,
        apply_bytes=moved,
        items_per_second=rate,
        items=count,
        start_seconds=start_seconds,
        merge_share=apply.median / trial,
        trial_seconds=trial,
        needs=study_needs(prepared, apply.median, rate.median),
        memory=worker.memory(prepared.models),
        threads=threads,
    )


def study_needs(prepared: Prepared, apply_seconds: float, items_per_second: float) -> StudyNeeds:
    """Return the time of the whole study from the time of a merge and of an item."""
    file = prepared.file
    workers = file.pool.workers if file.pool.kind == "ray" else 1
    baselines = len(prepared.baselines)

    def time_of(trials: int, items: int) -> float:
        return trials * (apply_seconds + items / items_per_second) / workers if items else 0.0

    def size(name: str) -> int:
        return sum(len(getattr(split, name)) for split in prepared.splits)

    again = min(file.search.finalists, prepared.trials) + baselines
    return StudyNeeds(
        search_seconds=time_of(prepared.trials + baselines, size("search")),
        validation_seconds=time_of(again, size("validation")),
        test_seconds=time_of(again, size("test")),
        workers=workers,
    )


class _Worker(ModelWorker):
    """A worker whose two halves are timed one by one."""

    @property
    def device(self) -> torch.device:
        return self._device

    def apply(self, recipe: Recipe) -> float:
        """Apply a merge; return the seconds."""
        synchronize(self._device)
        started = time.perf_counter()
        self._apply(recipe)
        synchronize(self._device)
        return time.perf_counter() - started

    def score(self, items: Sequence[Sequence[str]]) -> float:
        """Score some items; return the seconds."""
        started = time.perf_counter()
        self._fitness.score(items)
        return time.perf_counter() - started

    def memory(self, models: Models) -> WorkerMemory:
        """Return what this process holds now."""
        sources = stored_bytes(models)
        if self._device.type == "cuda":
            import torch

            own: int | None = int(torch.cuda.max_memory_allocated(self._device))
        else:
            own = anonymous_bytes()
        return WorkerMemory(own, sources, str(self._device), str(self._residency))


def anonymous_bytes() -> int | None:
    """Return the memory of this process that no file backs; None where the system hides it."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


def _some_items(
    search: Sequence[Sequence[str]], one: float, seconds: float, batch_size: int
) -> list[Sequence[str]]:
    """Return up to a batch of each objective, as many as repetitions leave time for."""
    fit = int(seconds / 2 / _REPEATS / max(one / len(search), 1e-9) / len(search))
    count = max(1, min(batch_size, fit))
    return [items[:count] for items in search]


def _repeat(seconds: float, *actions: Callable[[], float]) -> list[list[float]]:
    """Run the actions in turn until the time is over; return the results of each."""
    results: list[list[float]] = [[] for _ in actions]
    end = time.perf_counter() + seconds
    while len(results[0]) < _REPEATS or (
        time.perf_counter() < end and len(results[0]) < _MOST_REPEATS
    ):
        for action, found in zip(actions, results, strict=True):
            found.append(action())
    return results


def _seconds(value: float) -> str:
    """Return a duration for a reader."""
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
