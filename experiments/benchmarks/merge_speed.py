"""How fast merges are: in place against a plain copy, to disk against mergekit.

    python experiments/benchmarks/merge_speed.py --parameters 100M --experts 3 --threads 2 \
        --mergekit /path/to/venv/bin/python

Everything of one table is measured in one run on checkpoints made from a seed, contenders in
turn, the best of each. Other programs on the machine disturb the result.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # evomerge, where not installed

from apply_speed import Applied, count_for, forget, measure_apply, measure_layout
from disk_speed import ToDisk, measure_disk
from synthetic_models import parse_count, save_models, shape_of

from evomerge.merge.methods import METHODS, OF_WEIGHTS

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command(help=__doc__.replace("\n", "\n\n", 1) if __doc__ else None)
@click.option("--parameters", default="100M", show_default=True, help="Of each model.")
@click.option("--experts", default=3, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--dtypes", default="bf16,fp32", show_default=True)
@click.option("--methods", default=None, help="Of evomerge in place; all where absent.")
@click.option("--disk-methods", default="task_arithmetic,ties", show_default=True)
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="In place.")
@click.option("--disk-repeats", default=3, show_default=True, type=click.IntRange(0))
@click.option("--mergekit", default=None, metavar="PYTHON", help="Of a venv with mergekit.")
@click.option("--layout-only", default=None, metavar="7B", help="Only what does not scale.")
@click.option("--folder", default=None, help="Where temporary models go.")
@click.option("--markdown", is_flag=True, help="Print ratios only, for a document.")
@click.option("--json", "as_json", is_flag=True)
def main(
    parameters: str, experts: int, threads: int, dtypes: str, methods: str | None,
    disk_methods: str, repeats: int, disk_repeats: int, mergekit: str | None,
    layout_only: str | None, folder: str | None, markdown: bool, as_json: bool,
) -> None:  # fmt: skip
    chosen = methods.split(",") if methods else list(OF_WEIGHTS)
    names = [name for name in chosen if count_for(METHODS[name], experts) is not None]
    facts: dict[str, Any] = {"machine": machine(mergekit), "threads": threads, "experts": experts}
    facts["left_out"] = [f"{name}: needs more experts" for name in chosen if name not in names]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        if layout_only:
            shape = shape_of(parse_count(layout_only))
            facts["parameters"] = shape.parameters
            facts["layout"] = measure_layout(work, shape, experts, repeats, names)
        else:
            facts["parameters"] = shape_of(parse_count(parameters)).parameters
            facts["in_place"], facts["to_disk"], facts["copy_bytes_per_second"] = [], [], {}
            if mergekit is None:
                facts["left_out"].append("mergekit: give --mergekit PYTHON")
            for dtype in dtypes.split(","):
                _measure(
                    facts, work, _DTYPES[dtype], names, repeats, disk_methods.split(","),
                    disk_repeats, mergekit,
                )  # fmt: skip
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    elif markdown:
        click.echo(_markdown(facts))
    else:
        _print(facts)


def _measure(
    facts: dict[str, Any], work: Path, dtype: str, names: list[str], repeats: int,
    disk_methods: list[str], disk_repeats: int, mergekit: str | None,
) -> None:  # fmt: skip
    """Measure one dtype; add the results to ``facts``."""
    models = work / dtype
    models.mkdir()
    save_models(models, shape_of(facts["parameters"]), facts["experts"], dtype)
    for path in sorted(models.glob("*/*.safetensors")):
        path.read_bytes()  # into the page cache: disks are not what is compared
    applied, copy = measure_apply(models, facts["experts"], facts["threads"], repeats, names)
    forget()
    facts["in_place"] += [asdict(one) for one in applied]
    facts["copy_bytes_per_second"][dtype] = copy
    if disk_repeats:
        written = work / f"{dtype}-out"
        written.mkdir()
        facts["to_disk"] += [
            asdict(one) for one in measure_disk(
                models, written, facts["experts"], facts["threads"], disk_repeats, disk_methods,
                mergekit,
            )
        ]  # fmt: skip


def machine(mergekit: str | None) -> dict[str, str]:
    """Return what a reader must know of the machine."""
    packages = ("numpy", "numba", "torch", "safetensors")
    facts = {
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "load at the start": f"{os.getloadavg()[0]:.1f}",
        "libraries": ", ".join(f"{name} {version(name)}" for name in packages),
    }
    if mergekit is not None:
        code = (
            "from importlib.metadata import version as v; "
            "print(f\"{v('mergekit')} with torch {v('torch')}\")"
        )
        found = subprocess.run([mergekit, "-c", code], capture_output=True, text=True, check=True)
        facts["mergekit"] = found.stdout.strip()
    return facts


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            flags = "AVX-512" if "avx512f" in Path("/proc/cpuinfo").read_text("utf-8") else "AVX2"
            return f"{name} ({flags})"
    return platform.processor()


def _rows(facts: dict[str, Any]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Return the rows of both tables as text: in place, and to disk."""
    applied = [Applied(**one) for one in facts["in_place"]]
    written = [ToDisk(**one) for one in facts["to_disk"]]
    dtypes = list(dict.fromkeys(one.dtype for one in applied))
    by_method: dict[str, dict[str, Applied]] = {}
    for one in applied:
        by_method.setdefault(one.method, {})[one.dtype] = one
    place = [
        (method, str(next(iter(found.values())).experts),
         *(f"{found[dtype].ratio:.0%}" for dtype in dtypes),
         *(f"{found[dtype].processor_ratio:.0%}" for dtype in dtypes))
        for method, found in by_method.items()
    ]  # fmt: skip
    seconds = {(one.method, one.dtype, one.contender): one.seconds for one in written}
    disk: list[tuple[str, ...]] = []
    for method, dtype in dict.fromkeys((one.method, one.dtype) for one in written):
        in_place = by_method[method][dtype].seconds if method in by_method else float("nan")
        for (m, d, contender), theirs in seconds.items():
            if (m, d) != (method, dtype) or not contender.startswith("mergekit API"):
                continue
            arithmetic = contender.rpartition(" ")[2]
            process = seconds[method, dtype, f"mergekit process, {arithmetic}"]
            disk.append(
                (method, dtype, arithmetic, f"{theirs / in_place:.0f}x",
                 f"{theirs / seconds[method, dtype, 'evomerge API']:.1f}x",
                 f"{process / seconds[method, dtype, 'evomerge process']:.1f}x")
            )  # fmt: skip
    return place, disk


_DISK_HEAD = (
    "method", "dtype", "mergekit computes in", "in place against its API",
    "to disk, API against API", "to disk, process against process",
)  # fmt: skip


def _place_head(facts: dict[str, Any]) -> tuple[str, ...]:
    dtypes = dict.fromkeys(one["dtype"] for one in facts["in_place"])
    return ("method", "experts", *dtypes, *(f"{dtype}, processor" for dtype in dtypes))


def _layout_rows(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, *(f"{times[part] * 1e3:.1f}" for part in ("decode", "plan", "tables", "total")))
        for name, times in facts["layout"].items()
    ]


_LAYOUT_HEAD = ("method", "decode, digest", "plan", "tables", "total")


def _tables(facts: dict[str, Any]) -> list[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    size = f"{facts['parameters'] / 1e6:,.0f} M parameters, {facts['experts']} experts"
    if "layout" in facts:
        return [(f"Milliseconds per candidate without the weights; {size}", _LAYOUT_HEAD,
                 _layout_rows(facts))]  # fmt: skip
    place, disk = _rows(facts)
    threads = facts["threads"]
    title = f"Speed in place, of the bound that a plain copy sets; {size}, {threads} threads"
    tables: list[tuple[str, Sequence[str], list[tuple[str, ...]]]] = [
        (title, _place_head(facts), place)
    ]
    if disk:
        tables.append(("Times that evomerge is faster than mergekit", _DISK_HEAD, disk))
    return tables


def _print(facts: dict[str, Any]) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for key, value in facts["machine"].items():
        console.print(f"{key:<18} {value}", highlight=False, markup=False)
    for title, head, rows in _tables(facts):
        table = Table(title=title)
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for one in facts.get("to_disk", []):
        console.print(
            f"{one['dtype']:<5} {one['method']:<16} {one['contender']:<28} {one['seconds']:.2f} s",
            highlight=False,
        )
    for reason in facts["left_out"]:
        console.print(f"left out: {reason}", markup=False)


def _markdown(facts: dict[str, Any]) -> str:
    lines = [f"- {key}: {value}" for key, value in facts["machine"].items()]
    for title, head, rows in _tables(facts):
        lines += ["", f"{title}:", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"Left out: {reason}." for reason in facts["left_out"])]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
