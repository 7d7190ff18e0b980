"""Which recipes mergekit can express, and that its own rules give every tensor our value."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import yaml

from evomerge.layout import Layout, Slot, canonical, partition, slot_kind, slot_layer
from evomerge.merge.methods import METHODS
from evomerge.mergekit_yaml import mergekit_config
from evomerge.recipe import ModelRef, Recipe

SOURCES = {"base": "./base", "one": "./one", "two": "owner/two@main"}


def llama(layers: int = 3, tied: bool = True) -> Layout:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        names += [f"{stem}.self_attn.{name}_proj.weight" for name in "qkvo"]
        names += [f"{stem}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        names += [f"{stem}.input_layernorm.weight", f"{stem}.post_attention_layernorm.weight"]
    aliases = ("lm_head.weight",) if tied else ()
    if not tied:
        names.append("lm_head.weight")
    return canonical(
        Slot(
            name, (4,) if "norm" in name else (4, 4), "F32", slot_kind(name, (4, 4)),
            slot_layer(name), aliases if "embed" in name else (),
        )
        for name in names
    )  # fmt: skip


def recipe(
    layout: Layout,
    method: str,
    spec: str,
    experts: tuple[str, ...] = ("one", "two"),
    **options: Any,
) -> Recipe:
    columns = METHODS[method].columns(experts)
    columns = tuple(name for name in columns if not name.startswith("density."))
    rng = random.Random(f"{method}-{spec}")
    rows = len(partition(layout, spec).blocks)
    return Recipe(
        method=method, base=ModelRef("base", "", "b"),
        experts=tuple(ModelRef(name, "", name) for name in experts), partition=spec,
        layout=layout.digest, columns=columns,
        table=tuple(tuple(round(rng.random(), 3) for _ in columns) for _ in range(rows)),
        options=tuple(sorted(options.items())),
    )  # fmt: skip


def evaluate(setting: Any, name: str) -> float:
    """mergekit 0.1.5, ``config.evaluate_setting``, for numbers and filters."""
    if isinstance(setting, list):
        for entry in setting:
            if "filter" not in entry or entry["filter"] in name:
                return float(entry["value"])
        raise AssertionError(f"no value for {name}")
    return float(setting)


def value_in(config: dict[str, Any], parameter: str, model: str | None, name: str) -> float:
    """What mergekit gives a tensor: its layer's slice, else the first or the last."""
    top = config.get("parameters", {})
    if "models" in config:
        found: dict[str, Any] = next((m for m in config["models"] if m["model"] == model), {})
        sources = [found.get("parameters", {}), top]
    else:
        layer = slot_layer(name)
        if layer is None:
            layer = 0 if "embed" in name else len(config["slices"]) - 1
        piece = config["slices"][layer]
        assert all(s["layer_range"] == [layer, layer + 1] for s in piece["sources"])
        found = next((s for s in piece["sources"] if s["model"] == model), {})
        sources = [found.get("parameters", {}), piece.get("parameters", {}), top]
    return next(evaluate(s[parameter], name) for s in sources if parameter in s)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("spec", ["model", "layer", "module", "tensor"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_every_tensor_gets_its_own_coefficients(method: str, spec: str, tied: bool) -> None:
    layout = llama(tied=tied)
    made = recipe(layout, method, spec)
    found = mergekit_config(made, layout, SOURCES)
    assert found.text is not None, found.reason
    config = yaml.safe_load(found.text)
    for span in partition(layout, spec).spans:
        slot = layout.slots[span.slot]
        for name in (slot.name, *slot.aliases):
            for column, value in zip(made.columns, made.table[span.block], strict=True):
                parameter, _, model = column.partition(".")
                assert value_in(config, parameter, SOURCES.get(model), name) == value, name


def test_equal_rows_need_no_slices() -> None:
    layout = llama()
    made = recipe(layout, "task_arithmetic", "layer")
    flat = replace(made, table=(made.table[0],) * len(made.table))
    text = mergekit_config(flat, layout, SOURCES).text
    assert text is not None
    config = yaml.safe_load(text)
    assert "slices" not in config
    assert [model["model"] for model in config["models"]] == ["./base", "./one", "owner/two@main"]


def test_the_base_is_named_where_mergekit_needs_it() -> None:
    layout = llama()
    bases = {}
    for method, experts in (("linear", 2), ("task_arithmetic", 2), ("slerp", 1), ("slerp", 2)):
        made = recipe(layout, method, "layer", ("one", "two")[:experts])
        config = yaml.safe_load(mergekit_config(made, layout, SOURCES).text or "")
        models = [source["model"] for source in config["slices"][0]["sources"]]
        bases[method, experts] = (config.get("base_model"), models)
    assert bases == {
        ("linear", 2): (None, ["./one", "owner/two@main"]),
        ("task_arithmetic", 2): ("./base", ["./base", "./one", "owner/two@main"]),
        ("slerp", 1): ("./base", ["./base", "./one"]),
        ("slerp", 2): ("./one", ["./one", "owner/two@main"]),
    }


def test_deltas_are_computed_in_float32_and_rounded_once() -> None:
    layout = llama()
    made = replace(recipe(layout, "task_arithmetic", "model"), dtype="BF16")
    config = yaml.safe_load(mergekit_config(made, layout, SOURCES).text or "")
    assert (config["dtype"], config["out_dtype"]) == ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("options", "densities", "reason"),
    [
        ({}, 1.0, "drawn election"),
        ({"zero_sum": "plus", "elect": "count"}, 1.0, "weighted sum only"),
        ({"zero_sum": "plus", "divisor": "count"}, 1.0, "divides by the sum of weights"),
        ({"zero_sum": "plus"}, 0.5, "density cut"),
        ({"zero_sum": "plus"}, 1.0, ""),
        ({"zero_sum": "plus", "divisor": "count", "normalize": False}, 1.0, ""),
    ],
)
def test_ties_is_expressible_only_in_mergekits_flavour(
    options: dict[str, Any], densities: float, reason: str
) -> None:
    layout = llama()
    made = recipe(layout, "ties", "model", **options)
    made = replace(
        made,
        columns=(*made.columns, "density.one", "density.two"),
        table=tuple((*row, densities, densities) for row in made.table),
    )
    found = mergekit_config(made, layout, SOURCES)
    assert (found.text is None) == bool(reason)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("options", "values", "reason"),
    [
        ({}, {"lambda": 1.0}, "fallback: mergekit"),
        ({"fallback": "mergekit", "flavour": "fusechat"}, {"lambda": 1.0}, "flavour: mergekit"),
        ({"fallback": "mergekit"}, {"lambda": 0.9}, "lambda 1.0 built in"),
        ({"fallback": "mergekit"}, {"select_topk": 0.3}, "cut of select_topk"),
        ({"fallback": "mergekit"}, {"lambda": 1.0, "select_topk": 1.0}, ""),
    ],
)
def test_sce_is_expressible_only_where_mergekit_is_not_arbitrary(
    options: dict[str, Any], values: dict[str, float], reason: str
) -> None:
    layout = llama()
    made = replace(
        recipe(layout, "sce", "model", **options),
        columns=tuple(values), table=(tuple(values.values()),),
    )  # fmt: skip
    found = mergekit_config(made, layout, SOURCES)
    assert (found.text is None) == bool(reason), found
    assert reason in found.reason
    if found.text is not None:
        config = yaml.safe_load(found.text)
        assert config["parameters"] == {"select_topk": 1.0}
        assert config["base_model"] == "./base"


def test_arcee_fusion_is_written_in_double_precision_with_its_built_in_factor() -> None:
    layout = llama()
    columns, row = ("weight.one", "iqr_factor"), (1.0, 1.5)
    made = replace(recipe(layout, "arcee_fusion", "model", ("one",)), columns=columns, table=(row,))
    config = yaml.safe_load(mergekit_config(made, layout, SOURCES).text or "")
    assert (config["dtype"], config["out_dtype"]) == ("float64", "float32")
    assert config["models"] == [{"model": "./base"}, {"model": "./one"}]
    assert "parameters" not in config
    for other, reason in (((0.5, 1.5), "weight 1.0"), ((1.0, 2.0), "iqr_factor 1.5")):
        found = mergekit_config(replace(made, table=(other,)), layout, SOURCES)
        assert found.text is None
        assert reason in found.reason


def test_arcee_fusion_of_tensors_that_mergekit_samples_is_not_expressible() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    layout = canonical([Slot(name, (1024, 1024), "F32", slot_kind(name, (4, 4)), 0)])
    made = recipe(layout, "arcee_fusion", "model", ("one",))
    made = replace(made, columns=(), table=((),))
    found = mergekit_config(made, layout, SOURCES)
    assert found.text is None
    assert "random sample" in found.reason


def test_two_stacks_of_layers_cannot_be_sliced() -> None:
    names = [f"{tower}.layers.{i}.w.weight" for tower in ("vision", "text") for i in (0, 1)]
    layout = canonical(
        Slot(name, (4, 4), "F32", slot_kind(name, (4, 4)), slot_layer(name)) for name in names
    )
    found = mergekit_config(recipe(layout, "linear", "layer"), layout, SOURCES)
    assert found.text is None
    assert "several stacks" in found.reason


def test_an_unknown_method_is_a_reason_not_an_error() -> None:
    layout = llama()
    made = replace(recipe(layout, "linear", "model"), method="own_method")
    assert mergekit_config(made, layout, SOURCES).reason == "mergekit has no method 'own_method'"


@pytest.mark.parametrize(
    ("sources", "refused"),
    [
        ({"one": "./base+owner/two@main"}, ""),  # an adapter on the base
        ({"one": "./base+./one"}, ""),
        ({"one": "./code+math"}, "./code+math"),
        ({"one": "./base+math"}, "./base+math"),  # beside ./base, and no adapter on it
        ({"one": "./me@work/one"}, "./me@work/one"),
        ({"base": "./b+c"}, "./b+c"),
        ({"one": "./base+./a@b"}, "./base+./a@b"),
    ],
)
def test_a_directory_that_mergekit_takes_for_something_else(
    sources: dict[str, str], refused: str
) -> None:
    """``./code+math`` was written down: mergekit reads the model ./code with an adapter on it."""
    layout = llama()
    found = mergekit_config(recipe(layout, "linear", "model"), layout, {**SOURCES, **sources})
    assert (found.text is None) == bool(refused)
    assert f"follows + or @ in {refused} for" in found.reason or not refused
    # Without a folder to fold adapters into, mergekit stops at them.
    assert ("--lora-merge-cache" in (found.text or "")) == (not refused)


def test_models_without_adapters_need_no_folder_to_fold_them_into() -> None:
    layout = llama()
    found = mergekit_config(recipe(layout, "linear", "model"), layout, SOURCES)
    assert found.text is not None
    assert "--lora-merge-cache" not in found.text
