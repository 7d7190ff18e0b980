"""Partitions cover every row once; chunk and importance cut between rows, never inside."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.blocks import allot, cut_rows
from evomerge.config import load
from evomerge.errors import InputError, ModelError, StudyFileError
from evomerge.layout import (
    PARTITIONS,
    Layout,
    Slot,
    canonical,
    parse_spec,
    partition,
    resolve_partition,
    slot_kind,
    slot_layer,
)
from evomerge.merge.masses import MASSES_FILE, Progress, store_masses, task_vector_masses
from evomerge.merge.sources import Sources, to_float32
from evomerge.models import open_models
from evomerge.prepare import prepare

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]


def make_layout(layers: int, width: int, hidden: int, tied: bool = True) -> Layout:
    """A model of ``layers`` layers; rows are ``width`` or ``hidden`` elements long."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (3 * width + 1, width),
        "model.norm.weight": (width,),
    }
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.self_attn.q_proj.weight": (width, width),
            f"{stem}.self_attn.q_proj.bias": (width,),
            f"{stem}.mlp.up_proj.weight": (hidden, width),
            f"{stem}.mlp.down_proj.weight": (width, hidden),
            f"{stem}.input_layernorm.weight": (width,),
        }
    if not tied:
        shapes["lm_head.weight"] = (3 * width + 1, width)
    return canonical(
        Slot(name, shape, "F32", slot_kind(name, shape), slot_layer(name))
        for name, shape in shapes.items()
    )


layouts = st.builds(
    make_layout, st.integers(1, 4), st.integers(1, 9), st.integers(1, 17), st.booleans()
)


def part_rows(layout: Layout) -> dict[str, int]:
    """Rows of each block of ``layer``, in its order."""
    cut = partition(layout, "layer")
    rows = dict.fromkeys(cut.blocks, 0)
    for span in cut.spans:
        rows[cut.blocks[span.block]] += span.stop - span.start
    return rows


def require_cover(layout: Layout, spec: str) -> list[int]:
    """Check what holds for every partition; return the elements of each block."""
    cut = partition(layout, spec)
    assert len(set(cut.blocks)) == len(cut.blocks)
    order = [(span.slot, span.start) for span in cut.spans]
    assert order == sorted(order)
    sizes, rows = [0] * len(cut.blocks), [0] * len(layout.slots)
    seen: list[int] = []
    for span in cut.spans:
        slot = layout.slots[span.slot]
        assert span.start == rows[span.slot] < span.stop <= slot.rows
        rows[span.slot] = span.stop
        sizes[span.block] += (span.stop - span.start) * (slot.size // slot.rows)
        if span.block not in seen:
            seen.append(span.block)
    assert rows == [slot.rows for slot in layout.slots]
    assert sorted(seen) == list(range(len(cut.blocks)))
    return sizes


@given(
    layouts,
    st.sampled_from(["model", "layer", "layers(2)", "module", "tensor", "chunk(1)", "chunk(3)"]),
)
def test_every_row_lies_in_one_block(layout: Layout, spec: str) -> None:
    assert sum(require_cover(layout, spec)) == layout.parameters


@given(layouts, st.integers(1, 12))
def test_chunks_are_of_about_equal_size_and_in_order(layout: Layout, n: int) -> None:
    sizes = require_cover(layout, f"chunk({n})")
    cut, rows = partition(layout, f"chunk({n})"), part_rows(layout)
    expected = []
    for label, count in rows.items():
        m = min(n, count)
        expected += [f"{label}.chunk.{i}" for i in range(m)] if m > 1 else [label]
    assert list(cut.blocks) == expected
    blocks = [span.block for span in cut.spans]
    assert blocks == sorted(blocks)  # canonical order of rows is the order of blocks
    for label, count in rows.items():
        mine = [i for i, name in enumerate(cut.blocks) if name.split(".chunk.")[0] == label]
        total = sum(sizes[i] for i in mine)
        widest = max(
            slot.size // slot.rows
            for span in cut.spans
            if span.block in mine
            for slot in [layout.slots[span.slot]]
        )
        if widest * len(mine) <= total:
            assert all(abs(sizes[i] - total / len(mine)) <= widest for i in mine)
        assert len(mine) == min(n, count)


@given(layouts)
def test_one_chunk_is_the_layer_partition(layout: Layout) -> None:
    chunk, layer = partition(layout, "chunk(1)"), partition(layout, "layer")
    assert (chunk.blocks, chunk.spans) == (layer.blocks, layer.spans)


@given(layouts, st.data())
def test_importance_gives_exactly_n_blocks(layout: Layout, data: st.DataObject) -> None:
    rows = part_rows(layout)
    total = data.draw(st.integers(len(rows), sum(rows.values())))
    masses = {label: data.draw(st.floats(0, 1e6)) for label in rows}
    spec = resolve_partition(f"importance({total})", layout, lambda: masses)
    assert len(require_cover(layout, spec)) == total
    name, shares = parse_spec(spec)
    assert name == "allot"
    assert all(1 <= m <= count for m, count in zip(shares, rows.values(), strict=True))
    direct = partition(layout, f"importance({total})", masses)
    assert direct == partition(layout, spec)
    assert direct.spec == spec


@given(
    st.lists(st.floats(0, 1e9), min_size=1, max_size=8),
    st.integers(0, 40),
    st.floats(1e-3, 1e3),
)
def test_allotment_follows_the_masses(masses: list[float], extra: int, scale: float) -> None:
    total = len(masses) + extra
    limits = [total] * len(masses)
    counts = allot(masses, limits, total)
    assert sum(counts) == total
    assert min(counts) >= 1
    for i, mass in enumerate(masses):
        for j, other in enumerate(masses):
            if mass > other:
                assert counts[i] >= counts[j]
    powers = [mass * 2.0 for mass in masses]  # exact, so the proportions are the same
    assert allot(powers, limits, total) == counts


def test_allotment_by_hand() -> None:
    far = [99] * 5
    # Quotas 5, 3, 1 of 9: whole numbers stay.
    assert allot([5.0, 3.0, 1.0], far[:3], 9) == [5, 3, 1]
    # 1.43, 4.29, 4.29: the largest remainder gets the last block.
    assert allot([1.0, 3.0, 3.0], far[:3], 10) == [2, 4, 4]
    # Too little for one block is one block, and the rest is divided by mass again.
    assert allot([0.0, 1.0, 10.0, 10.0], far[:4], 12) == [1, 1, 5, 5]
    # Equal masses: ties to the first.
    assert allot([2.0, 2.0, 2.0], far[:3], 5) == [2, 2, 1]
    assert allot([0.0, 0.0, 0.0], far[:3], 7) == [3, 2, 2]
    # A part of two rows gives what it cannot use to the others.
    assert allot([100.0, 1.0, 1.0], [2, 9, 9], 10) == [2, 4, 4]


def test_a_chunk_may_span_slots_and_never_cuts_a_row() -> None:
    # 4 rows of 2, 1 row of 3, 5 rows of 1: 16 elements, cuts at 5.33 and 10.67.
    pieces = cut_rows([(4, 2), (1, 3), (5, 1)], 3)
    assert pieces == [[(0, 0, 3)], [(0, 3, 4), (1, 0, 1)], [(2, 0, 5)]]
    # Rows larger than the mean: every block still has one.
    assert cut_rows([(1, 1), (1, 100), (1, 1)], 3) == [[(0, 0, 1)], [(1, 0, 1)], [(2, 0, 1)]]
    assert cut_rows([(3, 100), (2, 1)], 4) == [
        [(0, 0, 1)], [(0, 1, 2)], [(0, 2, 3)], [(1, 0, 2)],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("chunk(0)", "chunk(n) takes whole numbers from 1, got '0' (such as chunk(4))"),
        ("chunk(x)", "chunk(n) takes whole numbers from 1, got 'x' (such as chunk(4))"),
        ("chunk(-1)", "chunk(n) takes whole numbers from 1, got '-1'"),
        ("chunk(2.5)", "chunk(n) takes whole numbers from 1, got '2.5'"),
        ("chunk", "chunk(n) takes whole numbers from 1, got none"),
        ("chunk(2,3)", "chunk(n) takes one number, got 'chunk(2,3)'"),
        ("importance(1,2)", "importance(n) takes one number"),
        ("allot()", "allot(i,j,...) takes whole numbers from 1, got ''"),
        ("layer(2)", "layer takes no number, got 'layer(2)' (write layer)"),
        ("chnk(3)", "unknown 'chnk(3)' (did you mean 'chunk(n)'?)"),
        ("importence(50)", "unknown 'importence(50)' (did you mean 'importance(n)'?)"),
        ("rows", "(choose from: allot(i,j,...), chunk(n), importance(n), layer, layers(n), model"),
    ],
)
def test_malformed_partitions_say_what_is_right(spec: str, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        partition(make_layout(2, 4, 6), spec)
    assert str(caught.value).startswith("partition: ")
    assert problem in str(caught.value)


def test_partitions_that_do_not_fit_the_layout() -> None:
    layout = make_layout(2, 4, 6)
    rows = sum(part_rows(layout).values())
    for total in (3, rows + 1):
        with pytest.raises(InputError) as caught:
            partition(layout, f"importance({total})", dict.fromkeys(part_rows(layout), 1.0))
        assert str(caught.value) == (
            f"partition: importance({total}): this model has 4 layers and others and {rows} rows "
            f"(choose from 4 to {rows} blocks)"
        )
    with pytest.raises(InputError, match=r"importance\(9\) depends on the weights"):
        partition(layout, "importance(9)")
    with pytest.raises(InputError, match=r"allot\(1,1\) has 2 numbers, this model has 4 layers"):
        partition(layout, "allot(1,1)")
    with pytest.raises(InputError, match=r"cuts final into 5 blocks, but it has 4 rows"):
        partition(layout, "allot(1,1,1,5)")


def test_blanks_and_zeros_in_a_spec_do_not_make_another_partition() -> None:
    layout = make_layout(2, 4, 6)
    assert partition(layout, " chunk( 03 ) ") == partition(layout, "chunk(3)")
    assert partition(layout, "allot(1, 2,1 ,1)").spec == "allot(1,2,1,1)"
    never: dict[str, float] = {}
    assert resolve_partition(" layer ", layout, lambda: never) == "layer"


def test_layers_go_together_with_their_ends() -> None:
    layout = make_layout(5, 4, 6, tied=False)
    cut = partition(layout, "layers(2)")
    assert cut.blocks == ("layers.0-1", "layers.2-3", "layers.4-4")
    found = {layout.slots[span.slot].name: cut.blocks[span.block] for span in cut.spans}
    assert found["model.embed_tokens.weight"] == "layers.0-1"
    assert found["model.norm.weight"] == found["lm_head.weight"] == "layers.4-4"
    for layer in range(5):
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"] == cut.blocks[layer // 2]


def test_the_catalogue_names_every_form() -> None:
    assert [name.partition("(")[0] for name in PARTITIONS] == [
        "model", "layer", "layers", "module", "tensor", "chunk", "importance", "allot",
    ]  # fmt: skip


def test_scalars_and_wide_rows() -> None:
    layout = Layout(
        tuple(
            Slot(name, shape, "F32", slot_kind(name, shape), slot_layer(name))
            for name, shape in (
                ("model.layers.0.scale", ()),
                ("model.layers.0.experts.w", (2, 3, 5)),
                ("model.layers.0.one.weight", (1,)),
            )
        )
    )
    assert require_cover(layout, "chunk(9)") == [1, 15, 15, 1]


def test_recipes_from_before_output_norms_counted_to_attention_are_refused() -> None:
    """Only models that have such norms get another digest."""
    stem = "model.layers.0"
    names = [f"{stem}.input_layernorm.weight", f"{stem}.post_attention_layernorm.weight"]

    def digest(names: list[str]) -> tuple[str, str]:
        slots = [Slot(name, (4,), "F32", slot_kind(name, (4,)), slot_layer(name)) for name in names]
        layout = canonical(slots)
        rows = [(slot.name, slot.shape) for slot in layout.slots]
        return layout.digest, hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    now, before = digest(names)
    assert now == before
    now, before = digest([*names, f"{stem}.post_feedforward_layernorm.weight"])
    assert now != before


# -- masses and the study file -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masses_are_the_l1_norms_of_the_task_vectors(llama_family: Family, dtype: str) -> None:
    base, experts = llama_family(dtype=dtype)
    sources = Sources(open_models(str(base), experts))
    masses = task_vector_masses(sources)
    cut = partition(sources.layout, "layer")
    assert list(masses) == list(cut.blocks)
    for block, label in enumerate(cut.blocks):
        expected = sum(
            float(
                abs(
                    to_float32(*sources.expert(span.slot, k)).astype("f8")
                    - to_float32(*sources.base(span.slot))
                ).sum()
            )
            for span in cut.spans
            if span.block == block
            for k in range(sources.experts)
        )
        assert masses[label] == pytest.approx(expected, rel=1e-12)
        assert (masses[label] > 0) == (label != "final")  # its norm is the same in all models


def damage(path: Path, number: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][3] = number
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_masses_of_damaged_weights_name_the_tensor(
    save_llama: Callable[..., Path], number: float
) -> None:
    base = save_llama("base", 1)
    expert = save_llama("expert", 2, base=base)
    damage(expert / "model.safetensors", number)
    sources = Sources(open_models(str(base), [("code", str(expert))]))
    with pytest.raises(ModelError, match=r"code: values of model\.norm\.weight are not finite"):
        task_vector_masses(sources)


TASK = """
task: pick
dataset_path: json
dataset_kwargs: {data_files: {test: pick.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
STUDY = """
models: {{base: {base}, experts: {{math: {math}, code: {code}}}}}
space: {{method: task_arithmetic, partition: "{spec}"}}
fitness: {{tasks: [pick], include_path: ., items: {{search: 6, validation: 6, test: 6}}}}
search: {{trials: 8}}
"""


@pytest.fixture
def study(llama_family: Family, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a study file with a partition."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    source, experts = llama_family()
    base = shutil.copytree(source, tmp_path / "base")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(base)
    (tmp_path / "pick.yaml").write_text(TASK)
    items = [{"text": f"{i} =", "choices": ["a", "b"], "label": i % 2} for i in range(20)]
    (tmp_path / "pick.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))

    def write(spec: str) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(STUDY.format(base=base, spec=spec, **dict(experts)))
        return path

    return write


def test_a_study_resolves_importance_into_its_recipes(study: Callable[[str], Path]) -> None:
    path = study("importance(11)")
    prepared = prepare(load(path), path)
    recipe = prepared.space.decode((0.5,) * prepared.space.dimension)
    name, shares = parse_spec(recipe.partition)
    assert name == "allot"
    assert sum(shares) == len(recipe.table) == len(prepared.space.blocks) == 11
    masses = task_vector_masses(Sources(prepared.models))
    assert (
        shares
        == parse_spec(resolve_partition("importance(11)", prepared.models.layout, lambda: masses))[
            1
        ]
    )
    # Written out, it is the same search space; the weights are not needed again.
    written = study(recipe.partition)
    assert prepare(load(written), written).space.digest == prepared.space.digest


def test_a_begun_study_does_not_read_the_weights_again(
    study: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study("importance(11)")
    seen: list[tuple[int, int]] = []
    first = prepare(load(path), path, lambda done, total: seen.append((done, total)))
    elements = first.models.layout.parameters * len(first.models.experts)
    assert seen[-1] == (4 * elements, 4 * elements)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not first.directory.exists()  # checking a file leaves nothing behind
    assert first.masses is not None
    first.directory.mkdir(parents=True)
    stored = first.directory / MASSES_FILE
    store_masses(stored, first.models, first.masses)
    calls: list[Sources] = []

    def counted(sources: Sources, progress: Progress) -> dict[str, float]:
        calls.append(sources)
        return task_vector_masses(sources, progress)

    monkeypatch.setattr("evomerge.examination.task_vector_masses", counted)
    assert prepare(load(path), path).space.digest == first.space.digest
    assert calls == []
    # Of other weights, or damaged, it is not believed.
    content = stored.read_text()
    for damaged in (content.replace(first.models.base.fingerprint, "x"), content[:40], "[]"):
        stored.write_text(damaged)
        assert prepare(load(path), path).space.digest == first.space.digest
    assert len(calls) == 3
    assert prepare(load(study("layer")), path).masses is None


def test_problems_of_a_partition_are_the_study_files(study: Callable[[str], Path]) -> None:
    for spec, problem in (
        ("chunk(0)", "space.partition: chunk(n) takes whole numbers from 1, got '0'"),
        ("importance(3)", "space.partition: importance(3): this model has 4 layers and others"),
        ("allot(1,1)", "space.partition: allot(1,1) has 2 numbers, this model has 4 layers"),
    ):
        path = study(spec)
        with pytest.raises(StudyFileError) as caught:
            prepare(load(path), path)
        assert len(caught.value.problems) == 1
        assert caught.value.problems[0].startswith(problem)
