"""A disk that takes no more: one line, exit 6, and nothing left behind.

A limit on the size of files stands for the full disk: the system refuses the same calls.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge.models import open_models
from evomerge.recipe import Recipe

LIMIT_BYTES = 2_000_000
LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT_BYTES}, {LIMIT_BYTES}))
"""
MERGE = LIMITED + "from evomerge.cli import main\nmain()"
EXPORT = f"""{LIMITED}
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_study import EXPERTS, finished
from evomerge.errors import EvomergeError
from evomerge.export import choose, export
from evomerge.models import open_models
study, out, base, *experts = sys.argv[1:]
models = open_models(base, list(zip(EXPERTS, experts)))
view = finished(Path(study), models=models)
try:
    export(view, choose(view), models, Path(out))
except EvomergeError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
SPILL = f"""{LIMITED}
import numpy as np
from evomerge.errors import EvomergeError
from evomerge.merge.sources import Spill
try:
    Spill({{(1, 0): 4 * {LIMIT_BYTES}}}).keep((1, 0), np.zeros({LIMIT_BYTES}, np.float32))
except EvomergeError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def run(code: str, *arguments: object) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=280, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def family(save_llama: Callable[..., Path]) -> list[Path]:
    """A base and three experts, each in a file beyond the limit."""
    base = save_llama("large", 1, vocab=40_000)
    return [base, *(save_llama(f"large{k}", 2 + k, base=base) for k in range(3))]


@pytest.fixture
def recipe(family: list[Path], tmp_path: Path) -> Path:
    models = open_models(str(family[0]), [("one", str(family[1]))])
    base, experts = models.refs
    made = Recipe(
        "task_arithmetic", base, experts, "model", models.layout.digest, ("weight.one",), ((0.5,),)
    )
    path = tmp_path / "recipe.json"
    path.write_text(made.to_json())
    return path


def test_while_weights_are_written(recipe: Path, tmp_path: Path) -> None:
    code, error = run(MERGE, "merge", recipe, "--out", tmp_path / "out")
    assert code == 6, error
    assert len(error.splitlines()) == 1
    assert "a file is larger than this disk or process may write; nothing was left" in error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_in_the_mapped_file_of_a_large_tensor(recipe: Path, tmp_path: Path) -> None:
    code, error = run(
        MERGE, "merge", recipe, "--out", tmp_path / "out", "--max-memory", "1.5MB"
    )  # fmt: skip
    assert code == 6, error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_while_the_tokenizer_is_copied(recipe: Path, family: list[Path], tmp_path: Path) -> None:
    shutil.copytree(family[0], tmp_path / "base")
    (tmp_path / "base" / "merges.txt").write_bytes(b"x" * (LIMIT_BYTES + 1))
    code, error = run(
        MERGE, "merge", recipe, "--out", tmp_path / "out", "--base", tmp_path / "base",
        "--dtype", "float16", "--max-shard-size", "1.5MB",
    )  # fmt: skip
    assert code == 6, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "recipe.json"]


def test_while_a_trial_is_exported(family: list[Path], tmp_path: Path) -> None:
    """A full disk was a traceback: the library's own error is no OSError."""
    code, error = run(EXPORT, tmp_path / "study", tmp_path / "out", *family)
    assert code == 6, error
    assert "nothing was left behind" in error
    assert [path.name for path in tmp_path.iterdir()] == ["study"]


def test_while_an_adapter_is_folded() -> None:
    """The temporary file of the fold is named, not the directory that is written."""
    code, error = run(SPILL)
    assert code == 6, error
    assert error.endswith(
        ": a folded adapter does not fit: File too large "
        "(free some space, or set TMPDIR to another disk)\n"
    )
