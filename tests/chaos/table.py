"""Run the chaos suite and print its table.

    python tests/chaos/table.py                   (a look, within minutes)
    python tests/chaos/table.py --long --seconds 3000 --results chaos.json

Rows that are in the results already are not run again, so a long table can be made in pieces.
The last line says how many rows are left. Exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from cluster_rows import cluster_cases  # noqa: E402
from rows import LONG, SHORT, Row, cases  # noqa: E402
from tracker_rows import tracker_cases  # noqa: E402


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| fault | load | found | holds | seconds |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.fault} | {row.load} | {row.found} | {'yes' if row.holds else '**no**'} | "
        f"{row.seconds:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _checkpoints(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Write a tiny base and three experts and return where they are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    paths = []
    for seed in range(4):
        torch.manual_seed(seed)
        paths.append(str(folder / f"model{seed}"))
        LlamaForCausalLM(config).save_pretrained(paths[-1])
    return paths[0], tuple(paths[1:])


def main() -> None:
    """Run what is left and print everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="the full sizes")
    parser.add_argument("--rows", nargs="*", help="names or their beginnings; all where absent")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row later")
    parser.add_argument("--results", type=Path, help="JSON file that keeps the rows")
    parser.add_argument("--folder", type=Path, help="for the studies; a temporary one where absent")
    options = parser.parse_args()
    began = time.monotonic()
    kept: dict[str, dict[str, object]] = {}
    if options.results is not None and options.results.exists():
        kept = json.loads(options.results.read_text())
    place = Path(tempfile.mkdtemp(prefix="evomerge-chaos-", dir=options.folder))
    size = LONG if options.long else SHORT
    found = {
        **cases(size, *_checkpoints(place)), **cluster_cases(options.long),
        **tracker_cases(options.long),
    }  # fmt: skip
    prefix = "long " if options.long else ""
    wanted = [
        name for name in found
        if options.rows is None or any(name.startswith(row) for row in options.rows)
    ]  # fmt: skip
    left = [name for name in wanted if prefix + name not in kept]
    while left and time.monotonic() - began < options.seconds:
        name = left.pop(0)
        folder = place / name.replace(" ", "-")
        folder.mkdir()
        row = found[name](folder)
        shutil.rmtree(folder)
        kept[prefix + name] = asdict(row)
        sys.stderr.write(f"{name}: {row.found} ({row.seconds:.0f} s)\n")
        if options.results is not None:
            options.results.write_text(json.dumps(kept, indent=1) + "\n")
    shutil.rmtree(place)
    rows = [Row(**kept[prefix + name]) for name in wanted if prefix + name in kept]  # type: ignore[arg-type]
    broken = sum(not row.holds for row in rows)
    sys.stdout.write(f"{table(rows)}\n\n{len(rows)} rows, {broken} broken, {len(left)} left\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
