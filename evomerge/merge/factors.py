"""LoRA adapters merged as factors: one adapter of the same rank out of many.

Evo-Merging's merge, per module (its published code; LoraHub's with all densities 1, Huang et
al. 2023, arXiv 2307.13269):

    A_m = Σ_k β_k·S(A_k; α_k)        B_m = Σ_k β_k·B_k        ΔW = s·B_m·A_m

S keeps the α_k largest magnitudes of A_k and zeroes the rest; nothing is rescaled, and B is left
whole ("asymmetric"). This is not a sum of task vectors: ΔW has the cross terms β_i·β_j·B_i·A_j,
it is quadratic near β = 0, and β and -β give the same model. Hence an engine of its own, whose
result is one peft adapter. This one needs no base and holds everything in memory; studies merge
by ``factor_sources`` and ``factor_merge``.

Axes: ``N`` adapters, ``r`` rank. All sums run over the adapters upwards, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.adapter import read_factors
from evomerge.atomic_directory import atomic_directory, require_free, require_space
from evomerge.errors import ModelError

F32 = npt.NDArray[np.float32]

#: A and B of each module.
Pairs = Mapping[str, tuple[F32, F32]]


@dataclass(frozen=True, slots=True)
class Factor:
    """One module of all adapters.

    Attributes:
        a: A [N, r, in].
        b: B [N, out, r].
        scaling: s, the same for all of them.
        sorted: magnitudes of each A, ascending [N, r·in].
    """

    a: F32
    b: F32
    scaling: float
    sorted: F32


@dataclass(frozen=True, slots=True)
class Repository:
    """Adapters of one base with equal ranks and modules, in memory.

    Attributes:
        names: [N].
        modules: by name.
        config: of the first adapter.
    """

    names: tuple[str, ...]
    modules: Mapping[str, Factor]
    config: Mapping[str, Any]


def open_repository(adapters: Sequence[tuple[str, Path]]) -> Repository:
    """Read adapters that can be merged as factors.

    Args:
        adapters: name and directory of each; order is data.

    Raises:
        ModelError: none given, an adapter is not plain LoRA, or it has other modules, shapes or
            scalings than the first; names the adapter and the module.
    """
    if not adapters:
        raise ModelError("adapters: none given (name at least one)")
    read = [(name, *read_factors(directory, name)) for name, directory in adapters]
    first, config, expected = read[0]
    for name, _, found in read[1:]:
        if list(found) != list(expected):
            odd = sorted(set(found) ^ set(expected))
            raise ModelError(
                f"{name}: has other modules than {first}: {', '.join(odd[:4])} (merge adapters of "
                "one base with the same target_modules)"
            )
        for module, pair in found.items():
            own, wanted = (
                (one.a.shape, one.b.shape, one.scaling) for one in (pair, expected[module])
            )
            if own != wanted:
                raise ModelError(
                    f"{name}: {module}: A, B and scaling are {own}, those of {first} are {wanted} "
                    "(factors can only be added when rank, shapes and lora_alpha are equal)"
                )
    modules = {}
    for module in expected:
        a = np.stack([found[module].a.values() for _, _, found in read])
        b = np.stack([found[module].b.values() for _, _, found in read])
        modules[module] = Factor(a, b, expected[module].scaling, sorted_magnitudes(a))
    return Repository(tuple(name for name, _ in adapters), modules, config)


def sorted_magnitudes(a: F32) -> F32:
    """Return |A| of each adapter, ascending: [N, r, in] to [N, r·in].

    Sorted once, so that a threshold for any density is one look-up.
    """
    return np.sort(np.abs(a).reshape(len(a), -1), axis=1)


def merge_factors(
    repository: Repository, weights: Sequence[float], densities: Sequence[float] | None = None
) -> dict[str, tuple[F32, F32]]:
    """Return A_m [r, in] and B_m [out, r] of every module.

    Args:
        repository: the adapters.
        weights: β [N].
        densities: α [N] in [0, 1]; None keeps all of every adapter (LoraHub).

    Raises:
        ValueError: not one number per adapter, or a density outside [0, 1].
    """
    count = len(repository.names)
    densities = (1.0,) * count if densities is None else densities
    if len(weights) != count or len(densities) != count:
        raise ValueError(
            f"expected {count} weights and densities [N], got {len(weights)} and {len(densities)}"
        )
    if not all(0.0 <= density <= 1.0 for density in densities):
        raise ValueError(f"expected densities in [0, 1], got {min(densities)} to {max(densities)}")
    share = np.array(weights, np.float32)[:, None, None]
    merged = {}
    for module, factor in repository.modules.items():
        cuts = [
            threshold(row, density) for row, density in zip(factor.sorted, densities, strict=True)
        ]
        kept = np.abs(factor.a) >= np.array(cuts, np.float32)[:, None, None]
        # Sums over the first axis add one adapter after the other.
        a = (share * np.where(kept, factor.a, np.float32(0.0))).sum(axis=0)
        b = (share * factor.b).sum(axis=0)
        merged[module] = (a, b)
    return merged


def threshold(magnitudes: F32, density: float) -> float:
    """Return the smallest magnitude that stays when ``density`` of all does.

    round(α·n) entries stay, at least one for α > 0, none for α = 0; all that equal the last one
    stay with it, as in the published code.

    Args:
        magnitudes: ascending [n].
        density: α.
    """
    if density == 0.0:
        return float("inf")
    count = max(round(density * len(magnitudes)), 1)
    return float(magnitudes[len(magnitudes) - count])


def with_fixed_sign(weights: Sequence[float]) -> tuple[float, ...]:
    """Return β or -β, whichever has its largest magnitude positive: both are the same model.

    Weights must have one sign before they are shown, averaged or modelled.
    """
    largest = max(weights, key=abs)
    sign = -1.0 if largest < 0.0 else 1.0
    return tuple(sign * weight + 0.0 for weight in weights)  # no -0.0: it has another digest


def change(repository: Repository, merged: Pairs, module: str) -> F32:
    """Return ΔW = s·B_m·A_m [out, in] of one module."""
    a, b = merged[module]
    return np.asarray(np.float32(repository.modules[module].scaling) * (b @ a), np.float32)


def write_adapter(repository: Repository, merged: Pairs, out: Path) -> None:
    """Write the merged factors as one peft adapter, whole or not at all.

    The config is that of the first adapter, for inference; weights are float32.

    Raises:
        InputError: ``out`` is taken or cannot be written.
        StorageError: the disk is full.
    """
    from safetensors.numpy import save_file

    out = out.absolute()
    require_free(out)
    tensors = {
        f"base_model.model.{module}.lora_{factor}.weight": np.ascontiguousarray(matrix)
        for module, pair in merged.items()
        for factor, matrix in zip("AB", pair, strict=True)
    }
    require_space(out, sum(tensor.nbytes for tensor in tensors.values()))
    with atomic_directory(out) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps({**repository.config, "inference_mode": True}, indent=2)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
