"""The engine: writes candidates into the live model, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from evomerge.errors import RecipeError
from evomerge.merge.binding import TORCH_DTYPES, Binding, bind
from evomerge.merge.merger import Merger
from evomerge.merge.plan import Plan
from evomerge.merge.residency import Residency
from evomerge.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from evomerge.merge.device_merger import DeviceMerger


class Engine:
    """Applies recipes to one live transformers model.

    Always from the base, never incrementally: a candidate's weights do not depend on what was
    applied before. Spans whose numbers did not change are left alone, because they are equal
    bit for bit.

    Args:
        merger: over the study's models.
        model: of the base's architecture; its parameters are overwritten.
        residency: where the sources lie between merges; the weights do not depend on it.

    Raises:
        ModelError: slots and parameters of the model do not cover each other.
        SetupError: there is not enough memory for the sources.

    Attributes:
        kernels: what the merge runs in, for the record: ``cpu``, ``triton`` or ``torch``.
    """

    def __init__(
        self, merger: Merger, model: torch.nn.Module, residency: Residency = Residency.DISK
    ) -> None:
        self._merger = merger
        self._binding = bind(merger.layout.slots, model)
        self._dtype = self._binding.dtype
        sizes = [slot.size for slot in merger.layout.slots]
        self._targets = [_target(self._binding, n, size) for n, size in enumerate(sizes)]
        self._last: tuple[str, Plan] | None = None
        device = self._targets[0].device
        self._on_device: DeviceMerger | None = None
        if device.type == "cpu":
            self._outputs = [_bits(target) for target in self._targets]
            if residency is not Residency.DISK:
                merger.sources.hold()
        else:
            from evomerge.merge.device_merger import DeviceMerger
            from evomerge.merge.device_sources import DeviceSources

            sources = DeviceSources(merger.sources, device, residency, threads=merger.threads)
            # The Triton kernel knows deltas only.
            triton = False if merger.sources.models.factored else None
            self._on_device = DeviceMerger(sources, self._targets, triton)
        self.kernels = "cpu" if self._on_device is None else self._on_device.kernels

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
        if self._on_device is None:
            self._merger.merge(plan, recipe.partition, self._outputs, self._dtype, spans)
        else:
            self._on_device.merge(plan, self._merger.partition(recipe.partition), spans)
        self._place(recipe.partition, spans)
        self._last = (recipe.partition, plan)
        return int(spans.sum())

    def forget(self) -> None:
        """Trust nothing that is in the live model: the next merge writes all of it."""
        self._last = None

    def checksum(self) -> int:
        """Return a sum over the bits of base and experts where they lie, modulo 2^64.

        Those that a device gets piece by piece are summed up in their files.
        """
        if self._on_device is not None and self._on_device.sources.held:
            import torch

            held = self._on_device.sources.held
            sums = [int(one.view(torch.int64).sum()) for one in held]  # sizes are aligned
            if self._merger.sources.models.factored:
                sums += self._merger.sources.factors.checksums()
        else:
            sums = self._merger.sources.checksums()
        return sum((number + 1) * value for number, value in enumerate(sums)) % 2**64

    def require_base(self) -> None:
        """Compare the live model with the base's weights, before anything is applied.

        Raises:
            ModelError: they differ, so slots would be written into wrong places.
        """
        self._binding.require_base(self._merger.layout.slots, self._merger.sources)

    def _place(self, partition: str, spans: npt.NDArray[np.bool_]) -> None:
        """Copy what was merged beside the model into its strided or wider live places."""
        cut = self._merger.partition(partition)
        touched = dict.fromkeys(cut.spans[number].slot for number in np.flatnonzero(spans))
        for slot in touched:
            if self._binding.direct(slot) is not None:
                continue
            shape = self._merger.layout.slots[slot].shape
            merged = self._targets[slot].view(shape)
            for piece in self._binding.pieces[slot]:
                piece.view.copy_(merged[piece.start : piece.stop] if shape else merged)


def _target(binding: Binding, slot: int, size: int) -> torch.Tensor:
    """Return the flat tensor that a slot is merged into: the live one, or one beside it.

    What cannot be written in place costs its size once more; no architecture of today needs
    it for more than a few tensors. A slot without a live place is merged beside the model too:
    it is in the exported file, and tensors like it are tiny.
    """
    import torch

    direct = binding.direct(slot)
    if direct is not None:
        return direct
    dtype = getattr(torch, TORCH_DTYPES[binding.dtype])
    device = next(piece.view.device for parts in binding.pieces for piece in parts)
    return torch.empty(size, dtype=dtype, device=device)


def _bits(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return a NumPy view of a flat CPU tensor's bits; writes go through."""
    import torch

    view = tensor if tensor.dtype is torch.float32 else tensor.view(torch.uint16)
    return view.numpy()
