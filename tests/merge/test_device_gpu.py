"""The merge in torch on a CUDA device; run with ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_engine import require_device_equals_kernels

from evomerge.merge.methods import METHODS

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]


@pytest.mark.gpu
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_cuda_equals_the_cpu_kernels(llama_family: Family, method: str, dtype: str) -> None:
    """The same arithmetic in the same order: equal bits, not close values."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    require_device_equals_kernels(llama_family, method, dtype, "cuda:0")
