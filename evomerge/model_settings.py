"""What two config.json must agree on, because the shapes of the tensors would not show it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Compared where both have them.
_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "sliding_window",
    "rms_norm_eps", "num_experts_per_tok", "layer_norm_eps", "layer_norm_epsilon", "n_head",
    "num_heads",
)  # fmt: skip
#: Older names of one thing: `su` is longrope, `mrope` places text like the default does.
_ROPE_TYPES = {"su": "longrope", "mrope": "default"}


def setting_differences(
    mine: Mapping[str, Any], base: Mapping[str, Any]
) -> Iterator[tuple[str, object, object]]:
    """Yield (setting, value, the base's value) of what both say and say differently.

    Args:
        mine: config.json of an expert.
        base: that of the base; one of the two may be from transformers 4, the other from 5.
    """
    ours, theirs = _settings(mine), _settings(base)
    for name, value in ours.items():
        other = theirs.get(name)
        if value is not None and other is not None and value != other:
            yield name, value, other


def _settings(config: Mapping[str, Any]) -> dict[str, object]:
    settings: dict[str, object] = {key: config.get(key) for key in _KEYS}
    if config.get("hidden_activation") is not None:
        settings["hidden_act"] = None  # Gemma keeps both and uses the other
    if config.get("use_sliding_window") is False:
        settings["sliding_window"] = None  # Qwen writes a number that nothing reads
    return settings | _rope(config)


def _rope(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the settings of rotary positions under the names of transformers 4.

    transformers 5 keeps them in ``rope_parameters``, one mapping for the model or one for each
    type of layer.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and parameters:
        if all(isinstance(value, dict) for value in parameters.values()):
            return {
                f"{layers}.{name}": value
                for layers, group in parameters.items()
                for name, value in _rope_group(group, group).items()
            }
        return _rope_group(parameters, parameters)
    scaling = config.get("rope_scaling", {})
    scaling = {"rope_type": "default"} if scaling is None else scaling
    group = _rope_group(config, scaling if isinstance(scaling, dict) else {})
    local = config.get("rope_local_base_freq")
    if local is None:
        return group
    # Gemma 3: a base of its own where the window slides.
    settings: dict[str, object] = {f"full_attention.{name}": value for name, value in group.items()}
    return settings | {"sliding_attention.rope_theta": local}


def _rope_group(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, object]:
    plain = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", scaling.get("type"))
    factors = {
        f"rope_scaling.{name}": value
        for name, value in scaling.items()
        if name not in {"type", "rope_type", *plain}
    }
    kind = _ROPE_TYPES.get(kind, kind) if isinstance(kind, str) else None
    return {**plain, "rope_scaling.rope_type": kind, **factors}
