"""Compares the Triton kernel with the CPU kernels; run by ``test_triton`` in Triton's interpreter.

A process of its own, because triton decides when it is imported whether it interprets. Reads
checkpoint directories as JSON from stdin, writes {case: what is wrong, or ""} as JSON to stdout.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from test_engine import TORCH_NAMES, make_recipe, merged_bits

from evomerge.merge.device_merger import DeviceMerger
from evomerge.merge.device_sources import DeviceSources
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, OF_WEIGHTS
from evomerge.merge.plan import Elect, Plan, Rule, ZeroSum
from evomerge.merge.residency import Residency
from evomerge.merge.triton_launch import TritonMerge
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe

CPU = torch.device("cpu")


def recipe_of(models: Models, method: str, dtype: str, seed: int = 3, **options: Any) -> Recipe:
    rng = np.random.default_rng(seed)
    declared = {parameter.name: parameter for parameter in METHODS[method].parameters}

    def value(column: str, row: int) -> float:
        low, high = declared[column.split(".")[0]].search
        # Some zeros, because experts without a coefficient have their own branch.
        drawn = float(rng.uniform(low, high))
        return 0.0 if low <= 0.0 <= high and rng.random() < 0.2 else drawn

    return make_recipe(models, method, "module", value, dtype, **options)


def merge(
    models: Models, plan: Plan, dtype: str, sources: DeviceSources, triton: bool
) -> tuple[list[np.ndarray[Any, Any]], DeviceMerger]:
    """Return the bits of all slots as the kernel or torch writes them on the CPU."""
    tool = Merger(models)
    outputs = [
        torch.zeros(slot.size, dtype=getattr(torch, TORCH_NAMES[dtype]))
        for slot in models.layout.slots
    ]
    merger = DeviceMerger(sources, outputs, triton)
    if triton:
        merger._triton.probe()
        merger._triton.launches = 0
    cut = tool.partition("module")
    merger.merge(plan, cut, chosen_spans(len(cut.spans)))
    views = [output if dtype == "F32" else output.view(torch.uint16) for output in outputs]
    return [view.numpy() for view in views], merger


def chosen_spans(count: int) -> np.ndarray[Any, Any]:
    """Return every third span: norms, attention, MLP and embedding are among them."""
    chosen: np.ndarray[Any, Any] = np.arange(count) % 3 == 0
    return chosen


def chosen_slots(tool: Merger) -> list[int]:
    """Return the slots of the chosen spans; the partition cuts none."""
    spans = tool.partition("module").spans
    return [spans[number].slot for number in np.flatnonzero(chosen_spans(len(spans)))]


def difference(ours: list[np.ndarray[Any, Any]], theirs: list[np.ndarray[Any, Any]]) -> str:
    wrong = sum(
        int((a.view(np.uint8) != b.view(np.uint8)).sum()) for a, b in zip(ours, theirs, strict=True)
    )
    return f"{wrong} bytes differ" if wrong else ""


def against_kernels(
    models: Models, method: str, dtype: str, residency: Residency, **options: Any
) -> str:
    most = METHODS[method].experts[1] or len(models.experts)
    chosen = Models(models.base, models.experts[:most], models.layout, models.buffers)
    recipe = recipe_of(chosen, method, dtype, **options)
    tool = Merger(chosen)
    plan = tool.plan(recipe)
    if not TritonMerge.takes(plan):
        return "torch"
    sources = DeviceSources(tool.sources, CPU, residency, staging_bytes=4096)
    ours, merger = merge(chosen, plan, dtype, sources, True)
    if not merger._triton.launches:
        return "the kernel was not launched"
    slots = chosen_slots(tool)
    expected = merged_bits(chosen, recipe)
    rest = sum(int(output.any()) for slot, output in enumerate(ours) if slot not in slots)
    if rest:
        return "spans that were not asked for were written"
    return difference([ours[slot] for slot in slots], [expected[slot] for slot in slots])


def far_indices(models: Models) -> str:
    """The hash where the canonical index crosses 2^32, against torch."""
    tool = Merger(models)
    plan = tool.plan(recipe_of(models, "dare_ties", "F32"))
    found = []
    for triton in (True, False):
        sources = DeviceSources(tool.sources, CPU)
        offsets = [offset + 2**32 - 1000 for offset in models.layout.offsets]
        sources.layout = SimpleNamespace(slots=models.layout.slots, offsets=offsets)  # type: ignore[assignment]
        found.append(merge(models, plan, "F32", sources, triton)[0])
    near = merge(models, plan, "F32", DeviceSources(tool.sources, CPU), True)[0]
    return difference(*found) or ("" if difference(found[0], near) else "the upper half is unused")


def elections(models: Models) -> str:
    """Every rule of election with ties and empty divisors, from plans made by hand."""
    tool = Merger(models)
    template = tool.plan(recipe_of(models, "ties", "F32"))
    problems = []
    divisors = (None, np.zeros_like(template.weights), template.weights)
    for number, (elect, zero_sum) in enumerate(product(Elect, ZeroSum)):
        plan = replace(template, elect=elect, zero_sum=zero_sum, shares=divisors[number % 3])
        both = [
            merge(models, plan, "F32", DeviceSources(tool.sources, CPU), triton)[0]
            for triton in (True, False)
        ]
        problems.append(difference(*both))
    return "; ".join(filter(None, problems))


def negative_zeros(models: Models) -> str:
    """A base that is multiplied by -0 keeps the sign of its zeros without active experts."""
    tool = Merger(models)
    template = tool.plan(recipe_of(models, "task_arithmetic", "F32"))
    plan = Plan(
        base=np.full_like(template.base, -0.0), weights=np.zeros_like(template.weights),
        rule=Rule.LINEAR,
    )  # fmt: skip
    outputs = [np.ones(slot.size, np.float32) for slot in models.layout.slots]
    tool.merge(plan, "module", outputs, "F32")
    ours = merge(models, plan, "F32", DeviceSources(tool.sources, CPU), True)[0]
    slots = chosen_slots(tool)
    if not any(np.signbit(outputs[slot]).any() for slot in slots):
        return "there is no negative zero to keep"
    return difference([ours[slot] for slot in slots], [outputs[slot] for slot in slots])


def main() -> None:
    families = {
        name: open_models(base, [tuple(pair) for pair in experts])
        for name, (base, experts) in json.load(sys.stdin).items()
    }
    found: dict[str, str] = {}
    dtypes = list(TORCH_NAMES)
    for number, method in enumerate(sorted(OF_WEIGHTS)):
        # The interpreter is slow: dtypes take turns, unless all are asked for.
        for dtype in dtypes if "--all" in sys.argv else [dtypes[number % 3]]:
            found[f"{method}/{dtype}"] = against_kernels(
                families[TORCH_NAMES[dtype]], method, dtype, Residency.DEVICE
            )
    for residency in Residency:
        found[f"{residency}/mixed"] = against_kernels(
            families["bfloat16"], "ties", "F32", residency
        )
    found["device/half"] = against_kernels(
        families["float32"], "dare_linear", "F16", Residency.DEVICE
    )
    found["elections"] = elections(families["float32"])
    found["far indices"] = far_indices(families["float32"])
    found["negative zeros"] = negative_zeros(families["float32"])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
