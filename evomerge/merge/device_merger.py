"""Merges into a live model on a device: with the Triton kernel where it runs, else in torch."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch

from evomerge.layout import Partition
from evomerge.merge import device
from evomerge.merge.device_sources import DeviceSources
from evomerge.merge.plan import Plan, Rule

_LOG = logging.getLogger(__name__)


class DeviceMerger:
    """Writes plans into flat tensors on one device.

    Args:
        sources: base and experts, on the device or brought to it.
        outputs: flat tensor of each slot.
        triton: whether to use the kernel; None for where it can run: on CUDA, with triton.

    Attributes:
        kernels: ``triton`` or ``torch``, for the record; the bits are the same. Plans with parts
            that the Triton kernel does not know run in torch all the same.
    """

    def __init__(
        self, sources: DeviceSources, outputs: Sequence[torch.Tensor], triton: bool | None = None
    ) -> None:
        self.sources = sources
        self._outputs = outputs
        if triton is None:
            triton = sources.device.type == "cuda" and _triton_runs(sources, outputs)
        self.kernels = "triton" if triton else "torch"
        if triton:
            from evomerge.merge.triton_launch import TritonMerge

            self._triton = TritonMerge(sources, outputs)

    def kernels_of(self, plan: Plan) -> str:
        """Return what a plan runs in: the Triton kernel does not know all of them."""
        taken = self.kernels == "triton" and self._triton.takes(plan)
        return "triton" if taken else "torch"

    def merge(self, plan: Plan, cut: Partition, spans: npt.NDArray[np.bool_]) -> None:
        """Write the merged weights of some spans.

        Args:
            plan: of a recipe.
            cut: its partition; one object for all merges.
            spans: which spans to write [S].
        """
        if not spans.any():
            return
        if plan.rule is Rule.FACTORS:
            device.merge_factors(plan, cut, self.sources, self._outputs, spans)
        elif self.kernels_of(plan) == "triton":
            self._triton.merge(plan, cut, spans)
        else:
            device.merge(plan, cut, self.sources, self._outputs, spans)


def _triton_runs(sources: DeviceSources, outputs: Sequence[torch.Tensor]) -> bool:
    """Return whether the Triton kernel can be compiled and launched here, by doing so once.

    It needs the package and, for its launcher, a C compiler; some images have neither.
    """
    if find_spec("triton") is None:
        _LOG.warning(
            "triton is not installed: merges run in torch, with the same result but slower"
        )
        return False
    from evomerge.merge.triton_launch import TritonMerge

    try:
        TritonMerge(sources, outputs).probe()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        first = str(error).partition("\n")[0]
        _LOG.warning("triton cannot be used here (%s): merges run in torch, but slower", first)
        return False
    return True
