"""How many tokens fit into a forward pass: arithmetic, limits, and the probe with a fake meter."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evomerge.fitness.hot import batch_size
from evomerge.fitness.hot.batch_size import (
    CPU_TOKENS,
    DEVICE_TOKENS,
    LEAST_TOKENS,
    SHARE,
    Line,
    cpu_tokens,
    device_tokens,
)

GB = 1 << 30


def forward(width: int = 1000, hidden: int = 64, layers: int = 2) -> Any:
    """Stand in for a model of some size; remembers the passes that it ran."""
    config = SimpleNamespace(num_hidden_layers=layers, max_position_embeddings=512)
    config.get_text_config = lambda decoder: config
    weight = torch.empty(width, hidden, device="meta")
    model = SimpleNamespace(
        config=config,
        dtype=torch.float32,
        get_input_embeddings=lambda: SimpleNamespace(weight=weight),
    )
    passes: list[int] = []
    return SimpleNamespace(
        model=model,
        passes=passes,
        logits=lambda rows: passes.append(sum(len(row.tokens) for row in rows)),
    )


class FakeMeter:
    """A device on which a pass of t tokens takes ``fixed + slope·t`` bytes."""

    def __init__(self, model: Any, free: int, fixed: int, slope: int, limit: int = 1 << 60) -> None:
        self._model, self._free, self._fixed, self._slope = model, free, fixed, slope
        self._limit = limit
        self.whole, self.weights = free, 0

    def free(self) -> int:
        return self._free

    def total(self) -> int:
        return self.whole

    def taken(self) -> int:
        return self.weights

    def peak(self, work: Callable[[], None]) -> int:
        work()
        taken: int = self._fixed + self._slope * self._model.passes[-1]
        if taken > self._limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return taken


def test_the_line_goes_through_both_passes_and_gives_powers_of_two() -> None:
    line = Line.through((1000, 7_000), (4000, 22_000))
    assert (line.fixed, line.slope) == (2_000, 5)
    assert line.tokens(2_000 + 5 * 4096, 1 << 17) == 4096
    assert line.tokens(2_000 + 5 * 8191, 1 << 17) == 4096
    assert line.tokens(1e12, 1 << 17) == 1 << 17
    assert line.tokens(1e12, 5000) == 4096
    assert line.tokens(100.0, 1 << 17) == LEAST_TOKENS


def test_noise_that_lets_the_line_fall_is_no_slope() -> None:
    line = Line.through((1000, 9_000), (4000, 8_000))
    assert line.slope == 0
    assert line.tokens(10_000, 4096) == 4096
    assert line.tokens(8_000, 4096) == LEAST_TOKENS


@pytest.mark.parametrize("free", [2 * GB, 8 * GB, 100 * GB])
def test_what_is_found_on_a_device_fits_with_room_to_spare(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "LOGITS", 1 << 20)
    model, slope, fixed = forward(), 400_000, 10_000_000
    found = device_tokens(model, FakeMeter(model, free, fixed, slope))
    assert model.passes == [1024, 4096]
    assert fixed + slope * found <= SHARE * free
    assert found == DEVICE_TOKENS or fixed + slope * 2 * found > SHARE * free - 20_000_000


def test_a_probe_that_does_not_fit_halves_what_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model = forward()
    assert device_tokens(model, FakeMeter(model, GB, 0, 1, limit=2000)) == 512
    assert device_tokens(model, FakeMeter(model, GB, 0, 1, limit=1)) == 128


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("loaded", [0, 1, 3])
def test_workers_that_share_a_device_fit_beside_each_other(
    share: float, loaded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks when others have loaded or have not: what it finds is the same."""
    monkeypatch.setattr(batch_size, "LOGITS", 1 << 20)
    whole, weights, slope, fixed = 80 * GB, 4 * GB, 1_000_000, 10_000_000
    model = forward()
    meter = FakeMeter(
        model, whole - (1 + min(loaded, round(1 / share) - 1)) * weights, fixed, slope
    )
    meter.whole, meter.weights = whole, weights
    found = device_tokens(model, meter, share)
    assert found == device_tokens(
        model, FakeMeter(model, int(share * whole) - weights, fixed, slope)
    )
    assert (weights + fixed + slope * found) / share <= whole
    assert found < device_tokens(model, meter)


def test_a_share_that_others_have_filled_is_what_is_free() -> None:
    model = forward()
    meter = FakeMeter(model, 2 * GB, 0, 100_000)
    meter.whole, meter.weights = 80 * GB, GB
    assert device_tokens(model, meter, 0.5) == device_tokens(model, meter)
    meter.weights = 60 * GB  # more than its share already
    assert device_tokens(model, meter, 0.5) == LEAST_TOKENS


def test_the_share_of_a_worker_reaches_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_hot_path import lm_of, make

    from evomerge.fitness.hot import runner

    shares: list[float] = []

    def found(forward: Any, share: float) -> int:
        shares.append(share)
        return 512

    monkeypatch.setattr(runner, "found_tokens", found)
    assert runner.Runner(lm_of(make("llama")), share=0.5).budget == 512
    assert shares == [0.5]


def test_a_cpu_takes_a_fixed_size_unless_memory_is_short() -> None:
    assert cpu_tokens(forward(), 64 * GB) == CPU_TOKENS
    small = cpu_tokens(forward(hidden=2048, layers=48), GB)
    assert LEAST_TOKENS <= small < CPU_TOKENS
    assert cpu_tokens(forward(), 1000) == LEAST_TOKENS


@pytest.mark.gpu
def test_the_probe_measures_a_real_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from transformers import LlamaConfig, LlamaForCausalLM

    from evomerge.fitness.hot.batch_size import CudaMeter, found_tokens
    from evomerge.fitness.hot.forward import Forward

    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=8, max_position_embeddings=1024,
    )  # fmt: skip
    live = Forward(LlamaForCausalLM(config).to("cuda", torch.bfloat16))
    found = found_tokens(live)
    assert found == found_tokens(live)
    meter = CudaMeter(live.device)
    free = meter.free()
    assert meter.peak(lambda: batch_size._pass(live, found)) < free
