"""LoRA adapters as experts: folded once, exactly as written down, or refused by feature."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from evomerge.adapter import is_adapter
from evomerge.checkpoint import to_float32
from evomerge.errors import ModelError
from evomerge.layout import partition
from evomerge.merge.engine import Engine
from evomerge.merge.merger import Merger
from evomerge.merge.sources import Sources
from evomerge.merge.writer import write_checkpoint
from evomerge.models import Models, open_models
from evomerge.recipe import Recipe

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]
SaveAdapter = Callable[..., Path]

#: module → [out, in] of the tiny Llama in conftest.
LLAMA = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.1.self_attn.v_proj": (8, 16),
    "model.layers.1.mlp.down_proj": (16, 24),
}


@pytest.fixture
def save_adapter(tmp_path: Path) -> SaveAdapter:
    """Return a function that writes an adapter directory as peft does."""

    def save(
        name: str = "adapter",
        modules: Mapping[str, tuple[int, int]] = LLAMA,
        *,
        rank: int = 3,
        ranks: Mapping[str, int] | None = None,
        dtype: str = "float32",
        extra: Mapping[str, tuple[int, ...]] | None = None,
        seed: int = 0,
        **config: Any,
    ) -> Path:
        import torch

        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (out, columns) in modules.items():
            r = (ranks or {}).get(module, rank)
            for factor, shape in (("A", (r, columns)), ("B", (out, r))):
                value = 0.2 * torch.randn(shape, generator=generator)
                key = f"base_model.model.{module}.lora_{factor}.weight"
                tensors[key] = value.to(getattr(torch, dtype))
        tensors |= {key: torch.ones(shape) for key, shape in (extra or {}).items()}
        directory = tmp_path / name
        directory.mkdir()
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 7, "bias": "none",
            "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
            "fan_in_fan_out": False, "init_lora_weights": True, "use_rslora": False,
            "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
        } | config  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        return directory

    return save


def fold_by_hand(
    adapter: Path, module: str, base: np.ndarray[Any, Any], scaling: float, turned: bool = False
) -> np.ndarray[Any, Any]:
    """Return W0 + s·(B·A), one rank after the other, every step rounded to float32."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    a = tensors[f"base_model.model.{module}.lora_A.weight"].float().numpy()
    b = tensors[f"base_model.model.{module}.lora_B.weight"].float().numpy()
    product = np.zeros((len(b), a.shape[1]), np.float32)
    for rank in range(len(a)):
        product = product + np.outer(b[:, rank], a[rank]).astype(np.float32)
    change = np.float32(scaling) * product
    return base + (change.T if turned else change)


def values(sources: Sources, name: str, k: int | None) -> np.ndarray[Any, Any]:
    names = [slot.name for slot in sources.layout.slots]
    slot = names.index(name)
    bits, dtype = sources.base(slot) if k is None else sources.expert(slot, k)
    return to_float32(bits, dtype).reshape(sources.layout.slots[slot].shape)


def recipe_of(
    models: Models, weights: tuple[float, ...], method: str = "task_arithmetic"
) -> Recipe:
    base, experts = models.refs
    blocks = partition(models.layout, "layer").blocks
    return Recipe(
        method=method,
        base=base,
        experts=experts,
        partition="layer",
        layout=models.layout.digest,
        columns=(*(f"weight.{expert.name}" for expert in experts), "lambda"),
        table=tuple((*weights, 1.0) for _ in blocks),
        dtype=models.dtype,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_fold_equals_the_fold_by_hand_bit_for_bit(
    llama_family: Family, save_adapter: SaveAdapter, dtype: str, stored: str
) -> None:
    base, experts = llama_family(dtype=dtype)
    adapter = save_adapter(dtype=stored)
    models = open_models(str(base), [("lora", str(adapter)), experts[0]])
    sources = Sources(models)
    for number, slot in enumerate(models.layout.slots):
        bits, code = sources.expert(number, 0)
        module = slot.name.removesuffix(".weight")
        if module in LLAMA:
            expected = fold_by_hand(adapter, module, values(sources, slot.name, None), 7 / 3)
            assert code == "F32"
            np.testing.assert_array_equal(bits.reshape(slot.shape), expected)
            assert not np.array_equal(expected, values(sources, slot.name, None))
        else:
            own, own_code = sources.base(number)
            assert code == own_code
            np.testing.assert_array_equal(bits, own)
    assert sources.expert(1, 1)[1] == models.dtype  # the full checkpoint beside it


def test_scaling_follows_rslora_and_the_patterns(
    llama_family: Family, save_adapter: SaveAdapter
) -> None:
    base, _ = llama_family()
    q, v, down = LLAMA
    adapter = save_adapter(
        ranks={v: 5, q: 2},
        use_rslora=True,
        rank_pattern={"v_proj": 5, "layers.0.self_attn.q_proj": 2},
        alpha_pattern={r"model\.layers\.[01]\.mlp\.down_proj": 11},
    )
    sources = Sources(open_models(str(base), [("lora", str(adapter))]))
    for module, scaling in ((q, 7 / 2**0.5), (v, 7 / 5**0.5), (down, 11 / 3**0.5)):
        name = f"{module}.weight"
        expected = fold_by_hand(adapter, module, values(sources, name, None), scaling)
        np.testing.assert_array_equal(values(sources, name, 0), expected)


def test_an_adapter_with_a_config_of_its_base_is_one(
    llama_family: Family, save_adapter: SaveAdapter
) -> None:
    """It was opened as a checkpoint without weights, because trainers may save that file too."""
    base, _ = llama_family()
    adapter = save_adapter()
    plain = open_models(str(base), [("lora", str(adapter))]).experts[0]
    shutil.copyfile(base / "config.json", adapter / "config.json")
    assert open_models(str(base), [("lora", str(adapter))]).experts[0] == plain
    (adapter / "pytorch_model.bin").write_bytes(b"pickled")
    assert not is_adapter(adapter)  # what is meant is not clear any more
    with pytest.raises(ModelError, match="only pickled weights"):
        open_models(str(base), [("lora", str(adapter))])


@pytest.mark.parametrize("flag", [True, False])
def test_conv1d_is_folded_turned(save_adapter: SaveAdapter, tmp_path: Path, flag: bool) -> None:
    """GPT-2 stores [in, out]; a square matrix follows what the others show."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    modules = {
        "transformer.h.0.attn.c_attn": (48, 16),
        "transformer.h.1.attn.c_proj": (16, 16),
    }
    adapter = save_adapter(modules=modules, fan_in_fan_out=flag)
    sources = Sources(open_models(str(tmp_path / "base"), [("lora", str(adapter))]))
    for module in modules:
        name = f"{module}.weight"
        base = values(sources, name, None)
        expected = fold_by_hand(adapter, module, base, 7 / 3, turned=True)
        np.testing.assert_array_equal(values(sources, name, 0), expected)


def test_modules_match_a_base_without_the_prefix(
    llama_family: Family, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    """peft on a bare body names ``layers.0...``, the base's file ``model.layers.0...``."""
    base, _ = llama_family()
    bare = {module.removeprefix("model."): shape for module, shape in LLAMA.items()}
    adapter = save_adapter(modules=bare)
    models = open_models(str(base), [("lora", str(adapter))])
    assert set(models.experts[0].folds) == {f"{module}.weight" for module in LLAMA}


def test_fold_in_blocks_equals_the_whole(
    save_llama: Callable[..., Path], save_adapter: SaveAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evomerge.low_rank

    base = save_llama("base", 1)
    adapter = save_adapter()
    models = open_models(str(base), [("lora", str(adapter))])
    whole = {name: fold.fold() for name, fold in models.experts[0].folds.items()}
    monkeypatch.setattr(evomerge.low_rank, "_BLOCK", 50)
    for name, fold in models.experts[0].folds.items():
        np.testing.assert_array_equal(fold.fold(), whole[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_and_checkpoints_merge_together(
    llama_family: Family, save_adapter: SaveAdapter, tmp_path: Path, dtype: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base, experts = llama_family(dtype=dtype)
    models = open_models(str(base), [("lora", str(save_adapter())), experts[0]])
    recipe = recipe_of(models, (0.7, -0.3))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    Engine(Merger(models), model).apply(recipe)
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(recipe, models, out)
    sources = Sources(models)
    written = load_file(out / "model.safetensors")
    for slot in models.layout.slots:
        assert torch.equal(written[slot.name], model.state_dict()[slot.name])
        total = values(sources, slot.name, None)
        for k, weight in enumerate((0.7, -0.3)):
            delta = values(sources, slot.name, k) - values(sources, slot.name, None)
            total = total + np.float32(weight) * delta
        expected = torch.from_numpy(total).to(getattr(torch, dtype))
        assert torch.equal(written[slot.name], expected)


def test_an_adapter_at_weight_zero_is_the_base(
    llama_family: Family, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    base, _ = llama_family(dtype="bfloat16")
    models = open_models(str(base), [("lora", str(save_adapter()))])
    write_checkpoint(recipe_of(models, (0.0,)), models, tmp_path)
    written, origin = (load_file(d / "model.safetensors") for d in (tmp_path, base))
    assert all((written[name] == origin[name]).all() for name in origin)


def test_fingerprint_covers_weights_and_scaling(
    llama_family: Family, save_adapter: SaveAdapter
) -> None:
    base, _ = llama_family()

    def fingerprint(directory: Path) -> str:
        return open_models(str(base), [("lora", str(directory))]).experts[0].fingerprint

    first = save_adapter("first")
    assert fingerprint(first) == fingerprint(save_adapter("same"))
    assert fingerprint(first) != fingerprint(save_adapter("other", seed=1))
    assert fingerprint(first) != fingerprint(save_adapter("scaled", lora_alpha=8))
    path = first / "adapter_model.safetensors"
    before = fingerprint(first)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert fingerprint(first) != before
    second = save_adapter("twin", seed=3)
    with pytest.raises(ModelError, match="b has the same weights as a"):
        open_models(str(base), [("a", str(second)), ("b", str(shutil.copytree(
            second, second.parent / "copy")))])  # fmt: skip


class TestSavedModules:
    """``modules_to_save``: tensors that stand whole in an adapter."""

    NORM = "base_model.model.model.norm.weight"
    EMBED = "base_model.model.model.embed_tokens.weight"
    HEAD = "base_model.model.lm_head.weight"

    def test_they_replace_the_bases(self, llama_family: Family, save_adapter: SaveAdapter) -> None:
        base, _ = llama_family(tied=False)
        adapter = save_adapter(
            extra={self.NORM: (16,), self.HEAD: (32, 16)},
            modules_to_save=["model.norm", "lm_head"],
        )
        models = open_models(str(base), [("lora", str(adapter))])
        sources = Sources(models)
        assert (values(sources, "model.norm.weight", 0) == 1.0).all()
        assert (values(sources, "lm_head.weight", 0) == 1.0).all()
        name = "model.layers.0.self_attn.q_proj"
        expected = fold_by_hand(adapter, name, values(sources, f"{name}.weight", None), 7 / 3)
        np.testing.assert_array_equal(values(sources, f"{name}.weight", 0), expected)
        other = "model.embed_tokens.weight"
        np.testing.assert_array_equal(values(sources, other, 0), values(sources, other, None))

    def test_they_count_for_the_fingerprint(
        self, llama_family: Family, save_adapter: SaveAdapter
    ) -> None:
        base, _ = llama_family()
        norm = {self.NORM: (16,)}
        saved = save_adapter("a", extra=norm, modules_to_save=["norm"])
        plain = save_adapter("b")
        opened = open_models(str(base), [("a", str(saved)), ("b", str(plain))])
        assert opened.experts[0].fingerprint != opened.experts[1].fingerprint

    def test_a_tied_head_is_the_embeddings_copy(
        self, llama_family: Family, save_adapter: SaveAdapter
    ) -> None:
        base, _ = llama_family()
        both = {self.EMBED: (32, 16), self.HEAD: (32, 16)}
        names = ["embed_tokens", "lm_head"]
        adapter = save_adapter("a", extra=both, modules_to_save=names)
        sources = Sources(open_models(str(base), [("lora", str(adapter))]))
        assert (values(sources, "model.embed_tokens.weight", 0) == 1.0).all()
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file(tensors | {self.HEAD: 2 * tensors[self.HEAD]},
                  adapter / "adapter_model.safetensors")  # fmt: skip
        alone = save_adapter("b", extra={self.EMBED: (32, 16)}, modules_to_save=names[:1])
        for untied in (adapter, alone):
            with pytest.raises(ModelError, match="saves embedding and head as two, the base ties"):
                open_models(str(base), [("lora", str(untied))])

    @pytest.mark.parametrize(
        ("extra", "modules", "problem"),
        [
            ({}, ["lm_head"], "modules_to_save names lm_head, whose weights are not in"),
            ({NORM: (17,)}, ["norm"], r"model\.norm\.weight is F32 17, the base has 16"),
            ({"base_model.model.score.weight": (2, 16)}, ["score"],
             r"the adapter saves score\.weight, which the base does not have"),
            ({NORM: (16,)}, None, r"model\.norm\.weight is no factor of plain LoRA"),
            ({NORM: (16,)}, "norm", "modules_to_save is no list of names"),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_named(
        self, llama_family: Family, save_adapter: SaveAdapter,
        extra: dict[str, tuple[int, ...]], modules: Any, problem: str,
    ) -> None:  # fmt: skip
        base, _ = llama_family()
        adapter = save_adapter(extra=extra, modules_to_save=modules)
        with pytest.raises(ModelError, match=problem):
            open_models(str(base), [("lora", str(adapter))])


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"use_dora": True}, "uses DoRA"),
        ({"bias": "all"}, "uses trained biases"),
        ({"target_parameters": ["experts.w1"]}, "uses target_parameters"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights: pissa_niter_4"),
        ({"peft_type": "IA3"}, "uses peft_type 'IA3'"),
    ],
)
def test_other_features_are_refused_by_name(
    llama_family: Family, save_adapter: SaveAdapter, config: dict[str, Any], problem: str
) -> None:
    base, _ = llama_family()
    with pytest.raises(ModelError) as caught:
        open_models(str(base), [("lora", str(save_adapter(**config)))])
    assert str(caught.value).startswith(f"models.experts.lora: adapter {problem}")
    assert "merge_and_unload" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"extra": {"base_model.model.model.embed_tokens.lora_embedding_A": (3, 32)}},
            "LoRA of an embedding is not supported",
        ),
        (
            {"extra": {"base_model.model.model.x.lora_magnitude_vector": (16,)}},
            "lora_magnitude_vector is no factor of plain LoRA",
        ),
        ({"modules": {"model.layers.7.mlp.up": (24, 16)}}, "changes model.layers.7.mlp.up, which"),
        ({"modules": {"lm_head": (32, 16)}}, "changes lm_head, which has no tensor of its own"),
        (
            {"modules": {"model.layers.0.mlp.up_proj": (25, 16)}},
            "model.layers.0.mlp.up_proj: B·A is 25x16, model.layers.0.mlp.up_proj.weight is 24x16",
        ),
        ({"rank_pattern": {"q_proj": 9}}, "q_proj has rank 3, adapter_config.json says 9"),
        ({"alpha_pattern": {"(a+)+q_proj": 9}}, "is not allowed"),
        ({"lora_alpha": None}, "no valid r and lora_alpha"),
        ({"lora_alpha": float("nan")}, "no valid r and lora_alpha (lora_alpha is nan)"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "lora_alpha (lora_alpha is inf)"),
        ({"modules": {}}, "the adapter has no tensors"),
        (
            {"extra": {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (3, 16)}},
            "model.layers.0.mlp.up_proj has lora_A only",
        ),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(
    llama_family: Family, save_adapter: SaveAdapter, arguments: dict[str, Any], problem: str
) -> None:
    base, _ = llama_family()
    with pytest.raises(ModelError) as caught:
        open_models(str(base), [("lora", str(save_adapter(**arguments)))])
    assert problem in str(caught.value)


def test_pickled_and_linked_adapters_are_refused(
    llama_family: Family, save_adapter: SaveAdapter, tmp_path: Path
) -> None:
    base, _ = llama_family()
    adapter = save_adapter()
    weights = adapter / "adapter_model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ModelError, match="is a link that leaves adapter"):
        open_models(str(base), [("lora", str(adapter))])
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        open_models(str(base), [("lora", str(adapter))])


def test_an_adapter_is_no_base(save_adapter: SaveAdapter) -> None:
    with pytest.raises(ModelError, match=r"models.base: adapter is a LoRA adapter"):
        open_models(str(save_adapter()), [])


# peft reads an attribute that transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_peft_within_one_rounding(llama_family: Family, tmp_path: Path, kind: str) -> None:
    """peft's own adapter file, folded here and by merge_and_unload."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    if kind == "llama":
        base, _ = llama_family()
        targets = ["q_proj", "down_proj", "gate_proj"]
    else:
        base = tmp_path / "base"
        config = GPT2Config(
            vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(base)
        targets = ["c_attn", "c_proj"]
    lora = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, use_rslora=True, fan_in_fan_out=kind == "gpt2",
        rank_pattern={targets[0]: 6}, alpha_pattern={targets[1]: 3}, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    sources = Sources(open_models(str(base), [("lora", str(tmp_path / "lora"))]))
    merged = load_numpy(tmp_path / "merged" / "model.safetensors")
    factors = load_numpy(tmp_path / "lora" / "adapter_model.safetensors")
    changed = 0
    for slot in sources.layout.slots:
        ours, origin = values(sources, slot.name, 0), values(sources, slot.name, None)
        changed += not np.array_equal(ours, origin)
        if slot.name not in sources.models.experts[0].folds:
            np.testing.assert_array_equal(merged[slot.name], ours)
            continue
        # BLAS sums the ranks in another order, so both are within the forward error of a sum of
        # that many terms (Higham 2002, equation 3.5), and nearly all within one unit.
        stem = f"base_model.model.{slot.name.removesuffix('.weight')}.lora_"
        a, b = (np.abs(factors[f"{stem}{factor}.weight"]) for factor in "AB")
        terms = 6 * (b @ a)  # no module is scaled by more
        largest = np.abs(origin) + (terms.T if kind == "gpt2" else terms)
        apart = np.abs(merged[slot.name] - ours)
        assert (apart <= 2 * (len(a) + 2) * 2.0**-24 * largest).all(), slot.name
        assert (apart <= np.spacing(largest)).mean() > 0.98, slot.name
    assert changed == len(sources.models.experts[0].folds) > 0
