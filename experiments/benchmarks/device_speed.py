"""How fast merges on a GPU are against plain copies, method by method.

    python experiments/benchmarks/device_speed.py --parameters 1B --experts 3

With residency `device` the bound is a plain copy on the device that moves as many bytes: sources
read once, the result written once. With `host` and `disk` it is a copy of the sources' bytes from
pinned memory. Copies and merges take turns, the best of each counts; the plan is not included,
because it runs on the CPU beside the device. Every block is rewritten.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # evomerge, where not installed

from apply_speed import count_for, open_set, random_recipes, space_of
from synthetic_models import parse_count, save_models, shape_of

from evomerge.bench import synchronize
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, OF_WEIGHTS
from evomerge.merge.residency import Residency

if TYPE_CHECKING:
    import torch

    from evomerge.merge.device_merger import DeviceMerger

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class OnDevice:
    """One method on the device.

    Attributes:
        method: its name.
        dtype: of sources and result.
        residency: where the sources lie between merges.
        kernels: ``triton`` or ``torch``, for this method's plans.
        experts: K.
        ratio: seconds of the plain copy that is the bound, over the best merge.
        seconds: of the best merge.
        bytes: that the bound counts.
    """

    method: str
    dtype: str
    residency: str
    kernels: str
    experts: int
    ratio: float
    seconds: float
    bytes: int


def copy_speed(device: torch.device, size: int, from_host: bool) -> Callable[[], float]:
    """Return a function that copies once and returns the bytes that moved per second.

    On the device a byte counts twice, read and written; from the host once.
    """
    import torch

    target = torch.zeros(size, dtype=torch.uint8, device=device)
    source = torch.ones(size, dtype=torch.uint8, device="cpu" if from_host else device)
    if from_host and device.type == "cuda":
        source = source.pin_memory()

    def run() -> float:
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source, non_blocking=True)
        synchronize(device)
        return (1 if from_host else 2) * size / (time.perf_counter() - started)

    return run


def measure(
    folder: Path, device: torch.device, dtype: str, residency: Residency, experts: int,
    repeats: int, names: list[str], copy_bytes: int = _COPY_BYTES,
) -> tuple[list[OnDevice], float]:  # fmt: skip
    """Measure methods and the copy in turn.

    Returns:
        the methods, and the best copy in bytes per second.
    """
    import torch

    from evomerge.merge.device_merger import DeviceMerger
    from evomerge.merge.device_sources import DeviceSources

    copy = copy_speed(device, copy_bytes, residency is not Residency.DEVICE)
    copy()
    found, copies = [], []
    made: dict[int, tuple[Merger, DeviceMerger]] = {}
    for name in names:
        count = count_for(METHODS[name], experts)
        assert count is not None
        if count not in made:
            made.clear()  # two sets of sources may not fit
            models = open_set(folder, count)
            merger = Merger(models)
            sources = DeviceSources(merger.sources, device, residency)
            outputs = [
                torch.zeros(slot.size, dtype=getattr(torch, dtype), device=device)
                for slot in models.layout.slots
            ]
            made[count] = merger, DeviceMerger(sources, outputs)
        merger, on_device = made[count]
        models = open_set(folder, count)
        recipes = random_recipes(space_of(models, METHODS[name]), name, 2)
        plans = [merger.plan(recipe) for recipe in recipes]
        cut = merger.partition(recipes[0].partition)
        everything = np.ones(len(cut.spans), np.bool_)
        times, before = [], 0
        for turn in range(repeats + 1):
            copies.append(copy())
            before = on_device.sources.brought
            synchronize(device)
            started = time.perf_counter()
            on_device.merge(plans[turn % 2], cut, everything)
            synchronize(device)
            times.append(time.perf_counter() - started)
        item = 4 if dtype == "float32" else 2
        moved = on_device.sources.brought - before
        if residency is Residency.DEVICE:
            moved = models.layout.parameters * item * (count + 2)
        best = min(times[1:])  # the first one compiles
        kernels = on_device.kernels_of(plans[0])
        found.append(
            OnDevice(name, dtype, str(residency), kernels, count, moved / best, best, moved)
        )
    bound = max(copies)
    return [_over(one, bound) for one in found], bound


def _over(one: OnDevice, bound: float) -> OnDevice:
    """Return the measurement with its speed as part of the bound."""
    fields = asdict(one)
    return OnDevice(**{**fields, "ratio": one.ratio / bound})


@click.command(help=__doc__.replace("\n", "\n\n", 1) if __doc__ else None)
@click.option("--parameters", default="1B", show_default=True, help="Of each model.")
@click.option("--experts", default=3, show_default=True, type=click.IntRange(1))
@click.option("--dtypes", default="bf16,fp32", show_default=True)
@click.option("--residencies", default="device", show_default=True, help="Such as device,host.")
@click.option("--methods", default=None, help="All where absent.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1))
@click.option("--folder", default=None, help="Where temporary models go.")
@click.option("--json", "as_json", is_flag=True)
def main(
    parameters: str, experts: int, dtypes: str, residencies: str, methods: str | None,
    repeats: int, folder: str | None, as_json: bool,
) -> None:  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError(
            "no CUDA device is visible (this measures merges on a GPU; for the CPU use "
            "merge_speed.py)"
        )
    device = torch.device("cuda")
    chosen = methods.split(",") if methods else list(OF_WEIGHTS)
    names = [name for name in chosen if count_for(METHODS[name], experts) is not None]
    shape = shape_of(parse_count(parameters))
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "parameters": shape.parameters,
        "experts": experts,
        "left_out": [f"{name}: needs more experts" for name in chosen if name not in names],
        "copy_bytes_per_second": {},
        "methods": [],
    }
    for dtype in dtypes.split(","):
        with tempfile.TemporaryDirectory(dir=folder) as work:
            save_models(Path(work), shape, experts, _DTYPES[dtype])
            for residency in residencies.split(","):
                rows, copy = measure(
                    Path(work), device, _DTYPES[dtype], Residency(residency), experts, repeats,
                    names,
                )  # fmt: skip
                facts["methods"] += [asdict(row) for row in rows]
                facts["copy_bytes_per_second"][f"{dtype}/{residency}"] = copy
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    table = Table(title=f"{facts['device']}, {shape.parameters / 1e6:.0f} M parameters")
    for column in ("method", "dtype", "residency", "kernels", "experts", "of the bound"):
        table.add_column(column)
    for row in facts["methods"]:
        table.add_row(
            row["method"], row["dtype"], row["residency"], row["kernels"], str(row["experts"]),
            f"{row['ratio']:.0%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
