"""LoRA adapters (peft format) as experts: low-rank changes folded once into full directions.

    W_k = W0 + s·(B·A)      with A [r, in], B [out, r], s = alpha / r  (alpha / √r with rsLoRA)

Hu et al. 2022, equation 3; Kalajdzievski 2023 for √r. The fold is float32 in one fixed order, so
that it gives the same bits on every machine, which a BLAS product does not: the sum over the
ranks runs upwards from zero, every product and every sum is rounded, then s multiplies the sum,
then W0 is added. Slots that the adapter does not touch are the base's own, bit for bit; modules
that it saves whole (``modules_to_save``) are its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.checkpoint import (
    MERGEABLE,
    Checkpoint,
    TensorEntry,
    inside,
    read_header,
    read_json_mapping,
)
from evomerge.errors import ModelError
from evomerge.low_rank import LowRank

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight\Z")
#: A quantified group can take exponential time on a name; peft's own patterns never have one.
_UNSAFE_PATTERN = re.compile(r"\)[*+?{]")
_REMEDY = "merge it into its base with peft's merge_and_unload, and give the merged checkpoint"
#: Initialisations that leave the base's weights as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def is_adapter(directory: Path) -> bool:
    """Tell whether a directory holds a peft adapter and no full checkpoint.

    A ``config.json`` beside the weights of an adapter alone is a trainer's copy of the base's.
    """
    if not (directory / _CONFIG).exists():
        return False
    if any(any(directory.glob(names)) for names in ("model*.safetensors*", "pytorch_model*")):
        return False
    return (directory / _WEIGHTS).exists() or not (directory / "config.json").exists()


def made_for(directory: Path, where: str) -> tuple[str, str]:
    """Return the base that an adapter names, and its revision; empty where it names none.

    Raises:
        ModelError: its config cannot be read.
    """
    config = read_json_mapping(directory / _CONFIG, where)
    return str(config.get("base_model_name_or_path") or ""), str(config.get("revision") or "")


def open_adapter(
    source: str, directory: Path, name: str, base: Checkpoint, where: str
) -> Checkpoint:
    """Return a LoRA adapter as an expert: the base's tensors, some of them folded.

    Args:
        source: as the user wrote it.
        directory: where it lies.
        name: short name in the study.
        base: what the adapter is folded into.
        where: dotted path in the study file, for messages.

    Raises:
        ModelError: every feature and tensor that cannot be folded, one per line.
    """
    config, weights = _read_config(directory, where)
    entries, _ = read_header(weights, where)
    saved = _saved(config, dict(entries), base, where)
    rest = [(tensor, entry) for tensor, entry in entries if tensor not in saved]
    factors = _factors(rest, where) if rest or not saved else {}
    changes = _changes(config, factors, base, where)
    whole = {slot: entry for slot, entry in saved.values() if slot}
    return Checkpoint(
        name=name,
        source=source,
        directory=directory,
        config=base.config,
        tensors=dict(base.tensors)
        | {slot: _folded_entry(directory, change.base) for slot, change in changes.items()}
        | whole,
        fingerprint=_fingerprint(weights, changes, sorted(whole)),
        folds=changes,
    )


def require_readable(directory: Path, where: str) -> None:
    """Check what can be of an adapter without its base.

    Raises:
        ModelError: its config or the header of its weights cannot be used.
    """
    _, weights = _read_config(directory, where)
    read_header(weights, where)


def _read_config(directory: Path, where: str) -> tuple[Mapping[str, Any], Path]:
    """Return the config of an adapter of plain LoRA, and its file of weights."""
    config = read_json_mapping(directory / _CONFIG, where)
    problems = [
        f"{where}: {directory.name} uses {feature} ({_REMEDY})" for feature in _unsupported(config)
    ]
    if problems:
        raise ModelError("\n".join(problems))
    if not (directory / _WEIGHTS).exists() and any(directory.glob("adapter_model.*")):
        raise ModelError(
            f"{where}: {directory.name}: only pickled weights, which can run code on loading "
            "(save the adapter again with safe_serialization=True)"
        )
    weights = inside(directory, _WEIGHTS, where)
    return config, weights


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the features that are no plain sum W0 + s·(B·A)."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type {config.get('peft_type')!r}, only 'LORA' can be folded"
    if config.get("use_dora"):
        yield "DoRA (use_dora)"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield f"trained biases (bias: {config.get('bias')})"
    for key in (
        "trainable_token_indices", "target_parameters", "layer_replication",
        "megatron_config", "use_bdlora", "use_qalora", "alora_invocation_tokens", "arrow_config",
        "kasa_config", "monteclora_config", "velora_config",
    ):  # fmt: skip
        if config.get(key):
            yield key
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        yield f"init_lora_weights: {start}, which changes the base's weights too"


def _saved(
    config: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    base: Checkpoint,
    where: str,
) -> dict[str, tuple[str, TensorEntry]]:
    """Return the tensors that stand whole in an adapter (``modules_to_save``), with their slots.

    The copy of a tied head is the embedding's once more; it has the empty slot.

    Raises:
        ModelError: a tensor that the base does not have, or of another shape, one per line.
    """
    modules = config.get("modules_to_save") or ()
    if not isinstance(modules, list) or not all(isinstance(one, str) for one in modules):
        if modules:
            raise ModelError(f"{where}: {_CONFIG}: modules_to_save is no list of names")
        return {}
    prefixes = sorted({name.partition(".")[0] for name in base.tensors})
    found: dict[str, tuple[str, TensorEntry]] = {}
    problems = []
    for name, entry in sorted(entries.items()):
        plain = name.removeprefix("base_model.model.")
        module = plain.rpartition(".")[0]
        if ".lora_" in name or not any(
            module == one or module.endswith(f".{one}") for one in modules
        ):
            continue
        if plain == "lm_head.weight" and base.tied:
            found[name] = ("", entry)
            continue
        names = (plain, plain.partition(".")[2], *(f"{prefix}.{plain}" for prefix in prefixes))
        slot = next((one for one in names if one in base.tensors), None)
        if slot is None:
            problems.append(f"{where}: the adapter saves {plain}, which the base does not have")
        elif entry.dtype not in MERGEABLE or entry.shape != base.tensors[slot].shape:
            shapes = f"{_by(entry.shape)}, the base has {_by(base.tensors[slot].shape)}"
            problems.append(f"{where}: {plain} is {entry.dtype} {shapes} (use its own base)")
        else:
            found[name] = (slot, entry)
    plain_names = [name.removeprefix("base_model.model.").rpartition(".")[0] for name in found]
    problems += [
        f"{where}: modules_to_save names {one}, whose weights are not in {_WEIGHTS}"
        for one in modules
        if not any(name == one or name.endswith(f".{one}") for name in plain_names)
    ]
    if problems:
        raise ModelError("\n".join(problems))
    if base.tied:
        _require_tied(found, where)
    return found


def _require_tied(found: Mapping[str, tuple[str, TensorEntry]], where: str) -> None:
    """Refuse a head that is not the embedding any more: the base's tensor is both.

    Raises:
        ModelError: the adapter unties them.
    """
    heads = [entry for slot, entry in found.values() if not slot]
    tables = [
        entry
        for slot, entry in found.values()
        if re.search(r"(^|\.)(embed_tokens|wte|shared)\.weight\Z", slot)
    ]
    if bool(heads) != bool(tables) or any(
        not np.array_equal(one.values(), two.values()) for one in heads for two in tables[:1]
    ):
        raise ModelError(
            f"{where}: the adapter saves embedding and head as two, the base ties them ({_REMEDY})"
        )


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one module.

    Attributes:
        a: A [r, in].
        b: B [out, r].
        scaling: s.
    """

    a: TensorEntry
    b: TensorEntry
    scaling: float


def read_factors(directory: Path, where: str) -> tuple[Mapping[str, Any], dict[str, Factors]]:
    """Return the config of an adapter and its factors by module, without a base model.

    Args:
        directory: where the adapter lies.
        where: what to call it in messages.

    Raises:
        ModelError: every feature and tensor that is not plain LoRA, one per line.
    """
    config, weights = _read_config(directory, where)
    if config.get("modules_to_save"):
        raise ModelError(f"{where}: {directory.name} uses modules_to_save ({_REMEDY})")
    entries, _ = read_header(weights, where)
    factors = {}
    for module, pair in sorted(_factors(entries, where).items()):
        a, b = pair["A"], pair["B"]
        if a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{where}: {module}: A is {_by(a.shape)} and B is {_by(b.shape)}, their ranks "
                "differ (the adapter is damaged: save it again)"
            )
        factors[module] = Factors(a, b, _scaling(config, module, a.shape[0], where))
    return config, factors


def _factors(
    entries: list[tuple[str, TensorEntry]], where: str
) -> dict[str, dict[str, TensorEntry]]:
    """Return module → {"A": entry, "B": entry}."""
    factors: dict[str, dict[str, TensorEntry]] = {}
    problems = []
    for name, entry in sorted(entries):
        match = _FACTOR.match(name)
        if match and len(entry.shape) == 2 and entry.dtype in MERGEABLE:
            factors.setdefault(match["module"], {})[match["factor"]] = entry
        elif "lora_embedding" in name:
            problems.append(f"{where}: {name}: LoRA of an embedding is not supported ({_REMEDY})")
        elif match:
            shape = "x".join(map(str, entry.shape))
            problems.append(f"{where}: {name} is {entry.dtype} {shape}, no matrix ({_REMEDY})")
        else:
            problems.append(f"{where}: {name} is no factor of plain LoRA ({_REMEDY})")
    problems += [
        f"{where}: {module} has lora_{next(iter(pair))} only (the adapter is incomplete)"
        for module, pair in factors.items()
        if len(pair) != 2
    ]
    if not factors and not problems:
        problems.append(f"{where}: the adapter has no tensors")
    if problems:
        raise ModelError("\n".join(problems))
    return factors


def _changes(
    config: Mapping[str, Any],
    factors: Mapping[str, Mapping[str, TensorEntry]],
    base: Checkpoint,
    where: str,
) -> dict[str, LowRank]:
    """Match the modules of an adapter with the base's tensors and check all shapes."""
    problems: list[str] = []
    matched: dict[str, tuple[str, Mapping[str, TensorEntry]]] = {}
    prefixes = sorted({name.partition(".")[0] for name in base.tensors})
    for module, pair in factors.items():
        slot = _slot(module, base, prefixes)
        if slot is None:
            problems.append(
                f"{where}: the adapter changes {module}, which has no tensor of its own in the "
                f"base (use the adapter's own base, or {_REMEDY})"
            )
        elif slot in matched:
            problems.append(f"{where}: {module} and {matched[slot][0]} are both {slot}")
        else:
            matched[slot] = module, pair
            problems.extend(_shape_problems(module, slot, pair, base.tensors[slot], where))
    if problems:
        raise ModelError("\n".join(problems))
    # peft sets fan_in_fan_out on loading where it meets a Conv1D, whatever the file says.
    conv = bool(config.get("fan_in_fan_out")) or any(
        not _fits(base.tensors[slot], pair, transposed=False) for slot, (_, pair) in matched.items()
    )
    return {
        slot: LowRank(
            base=base.tensors[slot],
            a=pair["A"],
            b=pair["B"],
            scaling=_scaling(config, module, pair["A"].shape[0], where),
            transposed=conv and _fits(base.tensors[slot], pair, transposed=True),
            module=module,
        )
        for slot, (module, pair) in sorted(matched.items())
    }


def _slot(module: str, base: Checkpoint, prefixes: Sequence[str]) -> str | None:
    """Return the base's tensor of a module; one of the two may lack the model's prefix."""
    name = f"{module}.weight"
    names = [name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in prefixes)]
    found = next((candidate for candidate in names if candidate in base.tensors), None)
    return None if found == "lm_head.weight" and base.tied else found


def _fits(slot: TensorEntry, pair: Mapping[str, TensorEntry], *, transposed: bool) -> bool:
    shape = (pair["B"].shape[0], pair["A"].shape[1])
    return slot.shape == (shape[::-1] if transposed else shape)


def _shape_problems(
    module: str, name: str, pair: Mapping[str, TensorEntry], slot: TensorEntry, where: str
) -> Iterator[str]:
    a, b = pair["A"].shape, pair["B"].shape
    if a[0] != b[1]:
        yield f"{where}: {module}: A is {_by(a)} and B is {_by(b)}, their ranks differ"
    elif slot.dtype not in MERGEABLE:
        yield f"{where}: {module}: {name} is {slot.dtype} in the base, which cannot be merged"
    elif not any(_fits(slot, pair, transposed=way) for way in (False, True)):
        yield (
            f"{where}: {module}: B·A is {_by((b[0], a[1]))}, {name} is {_by(slot.shape)} in the "
            "base (use the adapter's own base)"
        )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _scaling(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Return s of one module; patterns as in peft: the first that ends the module's name."""
    try:
        expected = int(_pattern_value(config.get("rank_pattern"), module, config["r"]))
        alpha = float(_pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"]))
        if not isfinite(alpha):  # JSON in Python has NaN and Infinity
            raise ValueError(f"lora_alpha is {alpha}")
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise ModelError(f"{where}: {_CONFIG}: no valid r and lora_alpha ({error})") from error
    if expected != rank or rank == 0:
        raise ModelError(
            f"{where}: {module} has rank {rank}, {_CONFIG} says {expected} (the adapter's files "
            "do not belong together)"
        )
    return alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern_value(patterns: Mapping[str, Any] | None, module: str, default: object) -> Any:
    for pattern, value in (patterns or {}).items():
        if _UNSAFE_PATTERN.search(pattern) or len(pattern) > 256:
            raise ValueError(f"pattern {pattern[:60]!r} is not allowed")
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _folded_entry(directory: Path, base: TensorEntry) -> TensorEntry:
    """Return the entry of a computed tensor; its shard does not exist, so nobody reads it raw."""
    size = 4 * prod(base.shape)
    return TensorEntry(directory / f"(folded from {_WEIGHTS})", "F32", base.shape, 0, size)


def _fingerprint(weights: Path, changes: Mapping[str, LowRank], saved: Sequence[str] = ()) -> str:
    """Return a digest of all of the weights, and of how they are applied."""
    rows: list[object] = [
        (slot, change.scaling, change.transposed) for slot, change in changes.items()
    ]
    rows += saved
    digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16)
    with weights.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
