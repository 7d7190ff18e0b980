"""Open files: a few per model, whatever the number of tensors; 1,024 is a usual limit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lora_adapters import save_adapters

from evomerge.checkpoint import open_checkpoint
from evomerge.errors import ModelError
from evomerge.file_map import map_file
from evomerge.merge.sources import Sources
from evomerge.models import open_models
from evomerge.recipe import Recipe

#: Python, its libraries and the models may have so many; each model has 110 tensors.
LIMIT = 64
LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
"""
MERGE = LIMITED + "from evomerge.cli import main\nmain()"
READ = f"""{LIMITED}
from evomerge.errors import EvomergeError
from evomerge.merge.sources import Sources
from evomerge.models import open_models
base, *experts = sys.argv[1:]
try:
    models = open_models(base, [(f"e{{n}}", path) for n, path in enumerate(experts)])
    sources = Sources(models)
    sources.require_finite()
    print(sources.checksums())
except EvomergeError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
MAP = f"""{LIMITED}
from pathlib import Path
from evomerge.file_map import map_file
held = [map_file(path) for path in Path(sys.argv[1]).iterdir()]
"""
MODULES = {f"model.layers.{n}.mlp.up_proj": (24, 16) for n in range(12)}


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=280, cwd=Path(__file__).parent.parent,
    )  # fmt: skip


@pytest.fixture(scope="module")
def family(save_llama: Callable[..., Path]) -> list[Path]:
    base = save_llama("deep", 1, layers=12)
    return [base, *(save_llama(f"deep{k}", 2 + k, layers=12, base=base) for k in range(3))]


def test_a_merge_of_more_tensors_than_files_may_be_open(family: list[Path], tmp_path: Path) -> None:
    """Every tensor had a map, and every map a file of its own: "too many open files"."""
    names = ("one", "two", "three")
    models = open_models(str(family[0]), list(zip(names, map(str, family[1:]), strict=True)))
    base, experts = models.refs
    columns = tuple(f"weight.{name}" for name in names)
    recipe = Recipe(
        "task_arithmetic", base, experts, "model", models.layout.digest, columns, ((0.5,) * 3,)
    )
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    done = run(MERGE, "merge", tmp_path / "recipe.json", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_folded_adapters_share_one_file(family: list[Path], tmp_path: Path) -> None:
    adapters = save_adapters(tmp_path, [f"a{n}" for n in range(6)], modules=MODULES)
    done = run(READ, family[0], *(path for _, path in adapters))
    assert done.returncode == 0, done.stderr
    models = open_models(str(family[0]), adapters)
    assert done.stdout.strip() == str(Sources(models).checksums())


def test_more_files_than_may_be_open_is_said(tmp_path: Path) -> None:
    for n in range(LIMIT):
        (tmp_path / f"{n}").write_bytes(b"x")
    done = run(MAP, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "cannot be opened: Too many open files (raise the limit: ulimit -n 65536)"
    )


def test_a_file_is_open_as_long_as_somebody_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    first = map_file(path)[10:20]
    assert map_file(path) is first.base
    (tmp_path / "other").write_bytes(b"x" * 100)
    (tmp_path / "other").replace(path)
    assert map_file(path)[0] == ord("x")  # the name is another file's now
    assert first.tolist() == list(range(10, 20))
    assert not first.flags.writeable


def test_a_shard_that_became_shorter_is_said(save_llama: Callable[..., Path]) -> None:
    opened = open_checkpoint(str(save_llama("shrinks", 1)), "base", "base")
    entry = max(opened.tensors.values(), key=lambda one: one.stop)
    with entry.shard.open("rb+") as file:
        file.truncate(entry.stop - 4)
    with pytest.raises(ModelError, match=r"became shorter since it was opened \(start again\)"):
        entry.read()


def test_tensors_at_any_offset(tmp_path: Path) -> None:
    """Headers of odd length put tensors where no float lies by itself."""
    header = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"e":{"dtype":"F32",'
    header += b'"shape":[0],"data_offsets":[12,12]}}'
    header += b" " * (1 - len(header) % 2)
    values = np.array([1.5, -2.0, 3.25], np.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    (tmp_path / "config.json").write_text("{}")
    opened = open_checkpoint(str(tmp_path), "odd", "odd")
    assert opened.tensors["a"].start % 2 == 1
    assert opened.read("a").tolist() == values.tolist()
    assert opened.tensors["a"].values().tolist() == values.tolist()
    assert opened.read("e").size == 0
