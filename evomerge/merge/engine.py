"""The engine: writes candidates into the live model, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evomerge.errors import ModelError, RecipeError
from evomerge.merge.merger import Merger
from evomerge.merge.plan import Plan
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from evomerge.layout import Slot


class Engine:
    """Applies recipes to one live transformers model.

    Always from the base, never incrementally: a candidate's weights do not depend on what was
    applied before. Spans whose numbers did not change are left alone, because they are equal
    bit for bit.

    Args:
        merger: over the study's models.
        model: of the base's architecture; its parameters are overwritten.

    Raises:
        ModelError: the model has parameters that the checkpoint does not name.
    """

    def __init__(self, merger: Merger, model: torch.nn.Module) -> None:
        self._merger = merger
        self._targets = _targets(merger.layout.slots, model)
        self._dtype = _dtype_name(self._targets[0])
        self._on_cpu = self._targets[0].device.type == "cpu"
        self._last: tuple[str, Plan] | None = None
        if self._on_cpu:
            self._outputs = [_bits(target) for target in self._targets]
        else:
            from evomerge.merge.device import DeviceSources

            self._sources = DeviceSources(merger.sources, self._targets[0].device)

    def apply(self, recipe: Recipe) -> int:
        """Overwrite the model's weights with a merge.

        Returns:
            The number of spans that were rewritten.

        Raises:
            RecipeError: made for other models or another dtype, or malformed.
        """
        if recipe.dtype != self._dtype:
            raise RecipeError(f"dtype: the recipe is {recipe.dtype}, the live model {self._dtype}")
        plan = self._merger.plan(recipe)
        last = self._last[1] if self._last and self._last[0] == recipe.partition else None
        spans = plan.changed(last)
        # A failure half-way leaves mixed weights: forget the last plan until this one is whole.
        self._last = None
        if self._on_cpu:
            self._merger.merge(plan, recipe.partition, self._outputs, self._dtype, spans)
        else:
            from evomerge.merge import device

            cut = self._merger.partition(recipe.partition)
            device.merge(plan, cut, self._sources, self._targets, spans)
        self._last = (recipe.partition, plan)
        return int(spans.sum())


def _targets(slots: tuple[Slot, ...], model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the flat live tensor of every slot; every parameter of the model is covered."""
    state = model.state_dict(keep_vars=True)
    names = {slot.name for slot in slots} | {alias for slot in slots for alias in slot.aliases}
    missing = sorted(slot.name for slot in slots if slot.name not in state)
    uncovered = sorted(name for name, _ in model.named_parameters() if name not in names)
    if missing or uncovered:
        example = (missing or uncovered)[0]
        raise ModelError(
            f"{type(model).__name__} names its tensors differently in memory and on disk "
            f"(e.g. {example}); this architecture is not supported yet"
        )
    targets = []
    for slot in slots:
        tensor = state[slot.name].detach()
        if tuple(tensor.shape) != slot.shape or not tensor.is_contiguous():
            raise ModelError(f"{slot.name}: the live tensor is not laid out as on disk")
        for alias in slot.aliases:
            if alias in state and state[alias].data_ptr() != tensor.data_ptr():
                raise ModelError(
                    f"{alias} should be tied to {slot.name}, but is a tensor of its own"
                )
        targets.append(tensor.view(-1))
    return targets


def _dtype_name(tensor: torch.Tensor) -> str:
    names = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    return names[str(tensor.dtype)]


def _bits(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return a NumPy view of a flat CPU tensor's bits; writes go through."""
    import torch

    view = tensor if tensor.dtype is torch.float32 else tensor.view(torch.uint16)
    return view.numpy()
