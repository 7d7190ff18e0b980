"""Settings that the shapes do not show, across what transformers 4 and 5 write."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.model_settings import setting_differences

NEW = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
OLD = {"rope_theta": 10000, "rope_scaling": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
GEMMA_NEW = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
GEMMA_OLD = {
    "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip


def names(mine: dict[str, Any], base: dict[str, Any]) -> list[str]:
    found = [name for name, _, _ in setting_differences(mine, base)]
    assert found == [name for name, _, _ in setting_differences(base, mine)]
    return found


@pytest.mark.parametrize(
    ("mine", "base"),
    [
        (NEW, OLD),
        (NEW, {"rope_theta": 10000.0}),
        (NEW, {}),
        (GEMMA_NEW, GEMMA_OLD),
        (
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original": 8192}},
            {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "su", "long_factor": [1.0, 2.0]}},
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0, 2.0]}},
        ),
        ({"use_sliding_window": False, "sliding_window": 32768}, {"sliding_window": 131072}),
        ({"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu"}, {"hidden_act": "silu"}),
        ({"rope_scaling": "odd", "rope_parameters": 3}, NEW),
        ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 10000}}, NEW),
    ],
)
def test_the_same_settings_written_differently(mine: dict[str, Any], base: dict[str, Any]) -> None:
    assert names(mine, base) == []


@pytest.mark.parametrize(
    ("mine", "base", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, NEW, ["rope_theta"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, OLD, ["rope_theta"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
            OLD,
            ["rope_scaling.rope_type"],
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "factor": 32.0}},
            {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
            ["rope_scaling.factor"],
        ),
        (
            {**GEMMA_OLD, "rope_local_base_freq": 2e4},
            GEMMA_NEW,
            ["sliding_attention.rope_theta"],
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_theta": 1e4},
            {"rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1e4}},
            ["partial_rotary_factor"],
        ),
        ({"head_dim": 64}, {"head_dim": 128}, ["head_dim"]),
        ({"hidden_act": "silu"}, {"hidden_act": "gelu"}, ["hidden_act"]),
        ({"sliding_window": 4096}, {"sliding_window": 8192}, ["sliding_window"]),
    ],
)
def test_settings_that_differ_are_named(
    mine: dict[str, Any], base: dict[str, Any], expected: list[str]
) -> None:
    assert names(mine, base) == expected


def test_configs_that_transformers_writes() -> None:
    """The rope base of a config from transformers 5 was not compared at all."""
    from transformers import LlamaConfig

    base = LlamaConfig().to_dict()
    assert names(LlamaConfig().to_dict(), base) == []
    other = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).to_dict()
    assert list(setting_differences(other, base)) == [("rope_theta", 1e6, 10000.0)]
