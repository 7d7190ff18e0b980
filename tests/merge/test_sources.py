"""Sources are kept by place, not by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import RecipeError
from evomerge.merge.sources import Sources
from evomerge.models import open_models
from evomerge.recipe import ModelRef, Recipe

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]


def test_an_expert_called_base_keeps_its_weights(llama_family: Family) -> None:
    """It was replaced by the base, because both had one key in the cache."""
    base, experts = llama_family()
    renamed = [("base", experts[0][1]), ("base", experts[1][1])]
    models = open_models(str(base), renamed)
    sources = Sources(models)
    for slot, record in enumerate(models.layout.slots):
        sources.base(slot)
        for k, expert in enumerate(models.experts):
            np.testing.assert_array_equal(sources.expert(slot, k)[0], expert.read(record.name))


def test_a_recipe_with_two_models_of_one_name_is_refused() -> None:
    base, expert = ModelRef("base", "a", "1"), ModelRef("base", "b", "2")
    with pytest.raises(RecipeError, match=r"two models are named 'base' \(rename one\)"):
        Recipe("linear", base, (expert,), "model", "", ("weight.base",), ((1.0,),))


def test_every_nan_becomes_one_half_precision_nan() -> None:
    """The twin kept what NumPy keeps of the payload, the kernels do not."""
    from evomerge.merge import reference

    patterns = np.array([0x7FC00000, 0x7F800001, 0x7FFFE000, 0xFFC12345, 0x7F800000], np.uint32)
    halves = reference.round_to(patterns.view(np.float32), "F16")
    assert halves.tolist() == [0x7E00, 0x7E00, 0x7E00, 0xFE00, 0x7C00]
    assert halves.dtype == np.uint16
