"""A merge as a LoRA adapter of its base: the best approximation of each matrix of a given rank.

    W − W0 ≈ B·A      with B = U_r·√Σ_r, A = √Σ_r·V_rᵀ of the singular value decomposition

No B·A of that rank is nearer in the Frobenius norm (Eckart & Young 1936). W is the merge as it
would be exported, rounded to its dtype. What is no matrix of a linear layer cannot be held by LoRA:
changed norms and embeddings are saved whole (peft's ``modules_to_save``), changed biases of linear
layers are left out and told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from evomerge.checkpoint import MERGEABLE
from evomerge.errors import InputError, RecipeError
from evomerge.layout import Slot, SlotKind
from evomerge.merge.merger import Merger
from evomerge.merge.plan import Rule
from evomerge.merge.sources import to_float32
from evomerge.models import Models
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    import torch

F32 = npt.NDArray[np.float32]

#: A decomposition by random projection is as good as the full one where it keeps this share of the
#: ranks or less, and many times faster; above, the full one is taken.
_FEW = 4
#: Extra directions and power iterations of the projection (Halko et al. 2011, section 4).
_OVERSAMPLED, _ITERATIONS = 16, 6
#: Architectures whose linear layers are transformers' Conv1D, stored as [in, out].
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True, slots=True)
class Kept:
    """What an adapter keeps of the change W − W0, measured on what was written.

    Attributes:
        rank: of the adapter.
        share: of the squared Frobenius norm of the change over all tensors, in [0, 1].
        error: Frobenius norm of what is missing over that of the change.
        worst: name of the tensor with the largest relative error.
        worst_error: that error.
        saved: modules that are saved whole; layers are ``*``.
        lost: changed tensors that are not in the adapter; layers are ``*``.
        exact: the adapter is the merge itself: its factors were merged, not the weights.
    """

    rank: int
    share: float
    error: float
    worst: str
    worst_error: float
    saved: tuple[str, ...]
    lost: tuple[str, ...]
    exact: bool = False

    def facts(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "rank": self.rank,
            "exact": self.exact,
            "kept_share_of_squared_change": self.share,
            "relative_error": self.error,
            "worst_tensor": self.worst,
            "worst_relative_error": self.worst_error,
            "saved_whole": list(self.saved),
            "lost": list(self.lost),
        }


def lora_bytes(models: Models, rank: int) -> int:
    """Return the bytes of an adapter at most."""
    total = 0
    for slot in models.layout.slots:
        if _is_matrix(slot):
            total += 4 * rank * sum(slot.shape)
        elif slot.kind is not SlotKind.EXPERTS:
            total += 4 * slot.size * (1 + len(slot.aliases))
    return total


def write_lora(recipe: Recipe, models: Models, rank: int, folder: Path) -> Kept:
    """Write a merge as ``adapter_model.safetensors`` and ``adapter_config.json`` in peft's format.

    Weights of base and merge stream through memory tensor by tensor; the adapter is held whole.

    Args:
        recipe: the merge, with sources that can be shown.
        models: what it is made from.
        rank: of every matrix; smaller matrices are exact and padded with zeros.
        folder: an existing directory; making the whole atomic is the caller's business.

    Raises:
        InputError: a rank below 1; or experts of a mixture change, which peft keeps in one
            parameter that LoRA cannot reach; or nothing changes.
        RecipeError: the recipe does not fit the models, or the merge is not finite.
    """
    from safetensors.numpy import save_file

    if rank < 1:
        raise InputError(f"--lora: expected a rank >= 1, got {rank}")
    writer = _Writer(recipe, models, rank)
    for number in range(len(models.layout.slots)):
        writer.add(number)
    if not writer.tensors:
        raise InputError("--lora: the merge does not differ from the base, there is no adapter")
    save_file(writer.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(writer.config(), indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return writer.kept()


def named_base(recipe: Recipe) -> dict[str, str | None]:
    """Return the keys by which peft finds the base of an adapter.

    Args:
        recipe: with sources that can be shown: an ``@`` in a directory's name is no revision.
    """
    source = recipe.base.source
    base, _, revision = (source, "", "") if source[:1] in "./~" else source.partition("@")
    return {"base_model_name_or_path": base, "revision": revision or None}


class _Writer:
    """Collects the factors of an adapter, tensor by tensor."""

    def __init__(self, recipe: Recipe, models: Models, rank: int) -> None:
        self.tensors: dict[str, F32] = {}
        self._recipe, self._models, self._rank = recipe, models, rank
        self._slots = models.layout.slots
        self._merger = Merger.of(recipe, models)
        self._plan = self._merger.plan(recipe)
        if self._plan.rule is not Rule.LINEAR or self._plan.cells is not None:
            self._merger.sources.require_finite()
        self._turned = models.base.config.get("model_type") in _CONV1D
        self._targets: list[str] = []
        self._saved: dict[str, None] = {}
        self._lost: list[str] = []
        self._apart: dict[str, tuple[float, float]] = {}

    def add(self, number: int) -> None:
        """Put one tensor into the adapter, or note that it is not there."""
        slot = self._slots[number]
        origin, merged = self._weights(number)
        delta = merged - origin
        module = slot.name.rpartition(".")[0]
        whole = float(np.square(delta, dtype=np.float64).sum())
        if self._saved_whole(slot) and (whole > 0 or module in self._saved):
            self._save(slot, merged)
            self._apart[slot.name] = (0.0, whole)
        elif whole == 0.0:
            return
        elif slot.kind is SlotKind.EXPERTS:
            raise InputError(
                f"--lora: the merge changes {slot.name}, and weights of a mixture's experts cannot "
                "be held by a peft adapter (export the merge itself)"
            )
        elif _is_matrix(slot):
            self._apart[slot.name] = (self._factorise(module, delta), whole)
        else:
            self._lost.append(slot.name)
            self._apart[slot.name] = (whole, whole)

    def _weights(self, number: int) -> tuple[F32, F32]:
        """Return a tensor of the base and of the merge, in float32."""
        slot, dtype = self._slots[number], self._recipe.dtype
        bits = np.empty(slot.size, MERGEABLE[dtype])
        outputs: list[npt.NDArray[Any] | None] = [None] * len(self._slots)
        outputs[number] = bits
        self._merger.merge(self._plan, self._recipe.partition, outputs, dtype)
        merged = to_float32(bits, dtype)
        if not np.isfinite(merged).all():
            raise RecipeError(
                f"merge: {slot.name} is not finite in {dtype} (use a wider dtype or smaller "
                "coefficients; or a source holds NaN or infinity)"
            )
        origin = to_float32(*self._merger.sources.base(number))
        return origin.reshape(slot.shape), merged.reshape(slot.shape)

    def _saved_whole(self, slot: Slot) -> bool:
        """Tell whether a tensor is a part of a norm or an embedding."""
        if slot.kind is SlotKind.BIAS:
            weight = f"{slot.name.rpartition('.')[0]}.weight"
            slot = next((one for one in self._slots if one.name == weight), slot)
        return slot.kind in (SlotKind.NORM, SlotKind.EMBED) and slot.name.endswith(".weight")

    def _save(self, slot: Slot, merged: F32) -> None:
        """Keep a tensor whole, and the other tensors of its module with it."""
        # A tied head is a module of its own for peft: without its copy it would stay the base's.
        for name in (slot.name, *slot.aliases):
            module = name.rpartition(".")[0]
            if module not in self._saved:
                self._saved[module] = None
                for number, other in enumerate(self._slots):
                    if other.name.startswith(f"{module}.") and other.name != slot.name:
                        self.tensors[f"base_model.model.{other.name}"] = self._weights(number)[1]
            self.tensors[f"base_model.model.{name}"] = merged.copy()

    def _factorise(self, module: str, delta: F32) -> float:
        """Keep the factors of a matrix; return the squared Frobenius norm of what is missing."""
        matrix = np.ascontiguousarray(delta.T if self._turned else delta)  # [out, in]
        a, b = factors(matrix, self._rank)
        self._targets.append(module)
        self.tensors[f"base_model.model.{module}.lora_A.weight"] = a
        self.tensors[f"base_model.model.{module}.lora_B.weight"] = b
        return float(np.square(matrix - b @ a, dtype=np.float64).sum())

    def config(self) -> dict[str, Any]:
        """Return the adapter's config as peft writes it; alpha = rank, so that s = 1."""
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
            **named_base(self._recipe),
            "r": self._rank, "lora_alpha": self._rank, "lora_dropout": 0.0, "bias": "none",
            "target_modules": sorted(self._targets), "fan_in_fan_out": self._turned,
            "init_lora_weights": True, "use_rslora": False, "use_dora": False,
            "modules_to_save": sorted(self._saved) or None, "rank_pattern": {},
            "alpha_pattern": {},
        }  # fmt: skip

    def kept(self) -> Kept:
        """Return what the adapter keeps of the change."""
        missing, whole = map(sum, zip(*self._apart.values(), strict=True))
        relative = {
            name: (part / all_ if all_ > 0 else 0.0) for name, (part, all_) in self._apart.items()
        }
        worst = max(relative, key=lambda name: relative[name])
        share = missing / whole if whole > 0 else 0.0
        return Kept(
            rank=self._rank,
            share=1.0 - share,
            error=share**0.5,
            worst=worst,
            worst_error=relative[worst] ** 0.5,
            saved=_without_layers(self._saved),
            lost=_without_layers(dict.fromkeys(self._lost)),
        )


def factors(matrix: F32, rank: int) -> tuple[F32, F32]:
    """Return A [rank, in] and B [out, rank] with B·A nearest to ``matrix`` [out, in].

    Few ranks of a large matrix come from a seeded random projection, whose error is near the
    smallest possible one; beyond the matrix's own rank there are zeros.
    """
    import torch

    full = torch.from_numpy(matrix)
    size = min(matrix.shape)
    with torch.no_grad():
        if _FEW * (rank + _OVERSAMPLED) >= size:
            u, s, vt = torch.linalg.svd(full, full_matrices=False)
        else:
            u, s, vt = _projected(full, rank)
    kept = min(rank, size)
    root = s[:kept].clamp_min(0).sqrt()
    a = np.zeros((rank, matrix.shape[1]), np.float32)
    b = np.zeros((matrix.shape[0], rank), np.float32)
    a[:kept] = (root[:, None] * vt[:kept]).numpy()
    b[:, :kept] = (u[:, :kept] * root).numpy()
    return a, b


def _projected(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first singular triples of a matrix by randomised subspace iteration."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLED, niter=_ITERATIONS)
    return u, s, v.T


def _is_matrix(slot: Slot) -> bool:
    """Tell whether a tensor is the weight of a linear layer."""
    kinds = (SlotKind.LINEAR, SlotKind.HEAD, SlotKind.ROUTER)
    return slot.kind in kinds and len(slot.shape) == 2 and slot.name.endswith(".weight")


def _without_layers(names: Mapping[str, None]) -> tuple[str, ...]:
    """Return names with ``*`` for every layer, each once."""
    return tuple(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
