"""Merges to disk: evomerge and mergekit, each as a whole process and from Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apply_speed import open_set
from synthetic_models import model_names

from evomerge.layout import partition
from evomerge.merge.methods import METHODS
from evomerge.one_shot import MergeSettings, merge_recipe
from evomerge.recipe import Recipe

WEIGHT, DENSITY = 0.4, 0.5
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

#: One merge in a fresh interpreter; the imports are not counted, the first merge warms up.
_API = """
import json, shutil, sys, time, warnings, yaml
warnings.simplefilter("ignore")
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
config = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
options = MergeOptions(copy_tokenizer=False, quiet=True, num_threads=int(sys.argv[3]))
options.apply_global_options()
seconds = []
for _ in range(2):
    started = time.perf_counter()
    run_merge(config, sys.argv[2], options)
    seconds.append(time.perf_counter() - started)
    shutil.rmtree(sys.argv[2])
print(json.dumps(min(seconds)))
"""


@dataclass(frozen=True, slots=True)
class ToDisk:
    """Best seconds of one way to write one merge."""

    method: str
    dtype: str
    contender: str
    seconds: float


def measure_disk(
    folder: Path, work: Path, experts: int, threads: int, repeats: int, methods: list[str],
    mergekit: str | None,
) -> list[ToDisk]:  # fmt: skip
    """Measure every contender in turn.

    Args:
        folder: of the models.
        work: an empty folder for what is written.
        experts: K.
        threads: CPU threads.
        repeats: of everything; the best counts.
        methods: that mergekit has, too.
        mergekit: the interpreter of an environment with mergekit; None to leave it out.
    """
    found = []
    for method in methods:
        recipe = _recipe(folder, experts, method)
        path = work / f"{method}.json"
        path.write_text(recipe.to_json(), encoding="utf-8")
        contenders: dict[str, Callable[[], float]] = {
            "evomerge process": lambda path=path: _process(  # type: ignore[misc]
                [sys.executable, "-m", "evomerge", "merge", str(path), "--out", str(work / "out"),
                 "--threads", str(threads)], work / "out", threads,
            ),
            "evomerge API": lambda path=path: _ours(path, work / "out", threads),  # type: ignore[misc]
        }  # fmt: skip
        if mergekit is not None:
            for label, config in _mergekit_configs(folder, experts, recipe).items():
                text = work / f"{method}-{label}.yml"
                text.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
                contenders[f"mergekit process, {label}"] = lambda text=text: _process(  # type: ignore[misc]
                    [str(Path(mergekit).parent / "mergekit-yaml"), str(text), str(work / "out"),
                     "--no-copy-tokenizer", "--quiet", "-j", str(threads)], work / "out", threads,
                )  # fmt: skip
                contenders[f"mergekit API, {label}"] = lambda text=text: float(  # type: ignore[misc]
                    _output([mergekit, "-c", _API, str(text), str(work / "out"), str(threads)],
                            threads)
                )  # fmt: skip
        best: dict[str, float] = {}
        for _ in range(repeats):
            for name, run in contenders.items():
                best[name] = min(best.get(name, float("inf")), run())
        found += [ToDisk(method, recipe.dtype, name, seconds) for name, seconds in best.items()]
    return found


def _recipe(folder: Path, experts: int, method: str) -> Recipe:
    """Return a merge that mergekit can do, too: one weight and one density for all."""
    models = open_set(folder, experts)
    base, refs = models.refs
    columns = METHODS[method].columns(tuple(ref.name for ref in refs))
    values = {"weight": WEIGHT, "density": DENSITY}
    chosen = tuple(column for column in columns if column.partition(".")[0] in values)
    row = tuple(values[column.partition(".")[0]] for column in chosen)
    return Recipe(
        method=method, base=base, experts=refs, partition="model", layout=models.layout.digest,
        columns=chosen, table=(row,) * len(partition(models.layout, "model").blocks),
        dtype=models.dtype,
    )  # fmt: skip


def _mergekit_configs(folder: Path, experts: int, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return mergekit's configuration with our arithmetic, and with its usual one."""
    base, *names = model_names(experts)
    parameters = {"weight": WEIGHT}
    if any(column.startswith("density.") for column in recipe.columns):
        parameters["density"] = DENSITY
    models = [{"model": str(folder / name), "parameters": parameters} for name in names]
    config: dict[str, Any] = {
        "merge_method": recipe.method, "base_model": str(folder / base), "models": models,
    }  # fmt: skip
    dtype = _NAMES[recipe.dtype]
    found = {"float32": config | {"dtype": "float32", "out_dtype": dtype}}
    if dtype != "float32":
        found[dtype] = config | {"dtype": dtype}
    return found


def _ours(path: Path, out: Path, threads: int) -> float:
    started = time.perf_counter()
    merge_recipe(path, out, {}, settings=MergeSettings(threads=threads))
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def _process(command: list[str], out: Path, threads: int) -> float:
    started = time.perf_counter()
    _output(command, threads)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def _output(command: list[str], threads: int) -> str:
    root = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return done.stdout
