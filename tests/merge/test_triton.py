"""The Triton kernel in Triton's interpreter, and as it is compiled; no GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from evomerge.merge.methods import OF_WEIGHTS

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)


@pytest.fixture(scope="module")
def found(llama_family: Family) -> dict[str, str]:
    """What ``triton_cases`` says of every case, each method with one dtype."""
    return run_cases(llama_family)


def run_cases(llama_family: Family, *arguments: str) -> dict[str, str]:
    families = {}
    for dtype in ("float32", "bfloat16", "float16"):
        base, experts = llama_family(dtype=dtype, experts=3)
        families[dtype] = (str(base), experts)
    root = HERE.parent.parent
    paths = [str(root), str(HERE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(HERE / "triton_cases.py"), *arguments],
        input=json.dumps(families),
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, str] = json.loads(done.stdout)
    return result


#: Their plans have parts that the kernel does not know; they take the torch path.
IN_TORCH = {"arcee_fusion", "sce", "widen"}


@pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
def test_kernel_equals_the_cpu_kernels(found: dict[str, str], method: str) -> None:
    [outcome] = [value for case, value in found.items() if case.startswith(f"{method}/")]
    assert outcome == ("torch" if method in IN_TORCH else "")


@pytest.mark.slow
def test_kernel_equals_the_cpu_kernels_in_every_dtype(llama_family: Family) -> None:
    found = run_cases(llama_family, "--all")
    assert len(found) > 3 * len(OF_WEIGHTS)
    assert {case: value for case, value in found.items() if value not in ("", "torch")} == {}


@pytest.mark.parametrize(
    "case",
    [
        "device/mixed",
        "host/mixed",
        "disk/mixed",
        "device/half",
        "elections",
        "far indices",
        "negative zeros",
    ],
)
def test_special_cases(found: dict[str, str], case: str) -> None:
    assert found[case] == ""


@pytest.mark.parametrize(("rule", "select"), [(0, 0), (1, 1), (2, 1), (2, 2), (4, 0), (5, 0)])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_compiled_kernel_rounds_every_step_and_reads_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: int, select: int, dtype: str
) -> None:
    """What the compiler makes for compute capability 9.0, without such a device.

    No fused multiply-add, no approximate division, no flush of subnormals; 16 bytes per load
    where addresses are aligned.
    """
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from evomerge.merge import triton_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    experts, code = 3, {"F32": 0, "BF16": 1}[dtype]
    constants = {
        "K": experts, "CODES": sum(code * 3**place for place in range(experts + 2)), "RULE": rule,
        "SELECT": select, "COUNT_SIGNS": False, "PLUS": False, "DIVIDE": rule == 2,
        "WORK": kernels.WORK_COLUMNS + experts, "SPAN": kernels.SPAN_COLUMNS,
        "COLUMNS": kernels.EXPERT_COLUMNS, "BLOCK": kernels.BLOCK,
    }  # fmt: skip
    types = {"work": "*i64", "coefficients": "*i32", "passing": "*i32", "gain": "*fp32"}
    source = ASTSource(
        fn=kernels.merge_rows,
        signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    made = build(
        source,
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": False, "num_warps": kernels.WARPS},
    )
    code_text = made.asm["ptx"]
    used = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp)\.[\w.]*f32\b", code_text))
    assert used <= {"mul.rn.f32", "add.rn.f32", "sub.rn.f32", "div.rn.f32"}
    assert "mul.rn.f32" in used
    # Three experts and the base; a block of float32 takes two loads of each thread.
    vectors = 8 if dtype == "F32" else 4
    assert code_text.count("ld.global.v4.b32") >= vectors
    assert code_text.count("st.global.v4.b32") == vectors // 4
