"""Where sources lie: the choice, and that no bit depends on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import TORCH_NAMES, make_recipe, merged_bits, open_family

from evomerge.errors import InputError
from evomerge.layout import Span
from evomerge.merge.device_merger import DeviceMerger
from evomerge.merge.device_sources import DeviceSources, cut_pieces
from evomerge.merge.engine import Engine
from evomerge.merge.merger import Merger
from evomerge.merge.methods import METHODS, OF_WEIGHTS
from evomerge.merge.residency import Needs, Residency, Room, choose, gigabytes, use
from evomerge.models import Models
from evomerge.recipe import Recipe

Family = Callable[..., tuple[Path, list[tuple[str, str]]]]
CPU = torch.device("cpu")
GB = 10**9
#: 7 B parameters in bfloat16 with three experts.
NEEDS = Needs(sources=56 * GB, working=14 * GB, staging=GB // 2)


def on_gpu(device: int | None, host: int | None = 500 * GB, neighbours: int = 1) -> Room:
    return Room(True, device, host, neighbours)


class TestChoice:
    @pytest.mark.parametrize(
        ("room", "chosen"),
        [
            (on_gpu(141 * GB), Residency.DEVICE),
            (on_gpu(80 * GB), Residency.HOST),  # fits, but leaves nothing for scoring
            (on_gpu(24 * GB), Residency.HOST),
            (on_gpu(24 * GB, 64 * GB), Residency.DISK),
            (on_gpu(24 * GB, neighbours=7), Residency.HOST),
            (on_gpu(24 * GB, neighbours=8), Residency.DISK),
            (on_gpu(24 * GB, None), Residency.DISK),
            (on_gpu(None), Residency.DISK),
            (Room(False, None, 500 * GB), Residency.DISK),
            (Room(False, None, None), Residency.DISK),
        ],
    )
    def test_auto_takes_the_fastest_that_fits(self, room: Room, chosen: Residency) -> None:
        assert choose("auto", NEEDS, room) is chosen

    def test_device_on_a_cpu_means_host(self) -> None:
        assert choose("device", NEEDS, Room(False, None, 100 * GB)) is Residency.HOST

    @pytest.mark.parametrize("wanted", ["device", "host", "disk"])
    def test_an_explicit_choice_needs_no_reserve(self, wanted: str) -> None:
        assert choose(wanted, NEEDS, on_gpu(70 * GB, 56 * GB)) == wanted
        assert choose(wanted, NEEDS, on_gpu(None, None)) == wanted

    @pytest.mark.parametrize(
        ("wanted", "room", "text"),
        [
            ("device", on_gpu(69 * GB), "device needs 70.00 GB of GPU memory .* 69.00 GB are free"),
            ("host", on_gpu(24 * GB, 55 * GB), "host needs 56.00 GB of memory, 55.00 GB are avail"),
            ("host", on_gpu(24 * GB, 100 * GB, 2), r"host needs 56.00 GB x 2 workers of memory"),
            ("disk", on_gpu(14 * GB), "disk needs 14.50 GB of GPU memory .*larger GPU"),
            ("auto", on_gpu(14 * GB), "disk needs 14.50 GB of GPU memory"),
            ("host", Room(False, None, 60 * GB), "host needs 70.00 GB of memory"),
            ("disk", Room(False, None, 60 * GB, 5), "disk needs 14.00 GB x 5 workers"),
        ],
    )
    def test_what_cannot_fit_is_refused(self, wanted: str, room: Room, text: str) -> None:
        with pytest.raises(InputError, match=f"pool.residency: {text}"):
            choose(wanted, NEEDS, room)

    def test_use(self) -> None:
        assert use(NEEDS, Residency.DEVICE, True) == (70 * GB, 0)
        assert use(NEEDS, Residency.HOST, True) == (14 * GB + GB // 2, 56 * GB)
        assert use(NEEDS, Residency.DISK, True) == (14 * GB + GB // 2, GB // 2)
        assert use(NEEDS, Residency.HOST, False) == (0, 70 * GB)
        assert use(NEEDS, Residency.DISK, False) == (0, 14 * GB)

    def test_needs_are_counted_from_headers(self, llama_family: Family) -> None:
        models = open_family(llama_family, "bfloat16", 3)
        parameters = models.layout.parameters
        assert Needs.of(models, "F32") == Needs(8 * parameters, 4 * parameters, 16 * parameters)

    def test_sizes_for_readers(self) -> None:
        assert [gigabytes(56 * GB), gigabytes(123456)] == ["56.00 GB", "0.12 MB"]


def recipe_of(models: Models, method: str, seed: int = 3) -> Recipe:
    rng = np.random.default_rng(seed)
    declared = {parameter.name: parameter for parameter in METHODS[method].parameters}

    def value(column: str, row: int) -> float:
        low, high = declared[column.split(".")[0]].search
        return float(rng.uniform(low, high))

    return make_recipe(models, method, "module", value)


def few(models: Models, method: str) -> Models:
    most = METHODS[method].experts[1] or len(models.experts)
    return Models(models.base, models.experts[:most], models.layout, models.buffers)


def targets_of(models: Models, dtype: str) -> list[torch.Tensor]:
    kind = getattr(torch, TORCH_NAMES[dtype])
    return [torch.zeros(slot.size, dtype=kind) for slot in models.layout.slots]


class TestStreaming:
    @pytest.mark.parametrize("method", sorted(OF_WEIGHTS))
    @pytest.mark.parametrize("residency", ["host", "disk"])
    def test_any_method_streamed_equals_the_kernels(
        self, llama_family: Family, method: str, residency: str
    ) -> None:
        """With buffers so small that tensors come in many pieces, cut inside of rows."""
        models = few(open_family(llama_family, "bfloat16", 3), method)
        recipe, merger = recipe_of(models, method), Merger(models)
        sources = DeviceSources(merger.sources, CPU, Residency(residency), 2000, threads=2)
        plan, cut = merger.plan(recipe), merger.partition("module")
        outputs = targets_of(models, "BF16")
        DeviceMerger(sources, outputs).merge(plan, cut, np.ones(len(cut.spans), np.bool_))
        for output, expected in zip(outputs, merged_bits(models, recipe), strict=True):
            np.testing.assert_array_equal(output.view(torch.uint16).numpy(), expected)
        assert sources.brought > 0

    @pytest.mark.parametrize("residency", ["host", "disk"])
    def test_batches_hold_what_was_asked(self, llama_family: Family, residency: str) -> None:
        models = open_family(llama_family, "float32", 2)
        merger = Merger(models)
        sources = DeviceSources(merger.sources, CPU, Residency(residency), 3000)
        cut = merger.partition("tensor")
        work = sources.pieces(cut, 1 << 20)
        needed = np.random.default_rng(0).random((len(work), 3)) < 0.7
        seen, batches = 0, 0
        for batch in sources.batches(work, needed):
            batches += 1
            for piece, (_, slot, first, count) in enumerate(batch.work.tolist()):
                for model in range(3):
                    asked = needed[seen + piece, model]
                    assert (batch.offsets[piece, model] >= 0) == asked
                    if asked:
                        bits = sources._stored(slot, model)[0][first : first + count]
                        np.testing.assert_array_equal(batch.values(piece, model).numpy(), bits)
                        address = batch.addresses()[piece, model]
                        assert address == batch.values(piece, model).data_ptr()
            np.testing.assert_array_equal(batch.work, work[seen : seen + len(batch.work)])
            seen += len(batch.work)
        assert seen == len(work)
        assert batches > 2
        sizes = np.where(needed, work[:, 3:4] * 4, 0)
        assert sources.brought == sizes.sum()

    def test_pieces_cover_spans_and_keep_the_upper_half_of_the_index(self) -> None:
        slots = [SimpleNamespace(size=70, rows=10), SimpleNamespace(size=40, rows=1)]
        layout: Any = SimpleNamespace(slots=slots, offsets=[2**32 - 33, 2**32 + 37])
        cut: Any = SimpleNamespace(spans=[Span(0, 0, 4, 0), Span(0, 4, 10, 1), Span(1, 0, 1, 2)])
        work = cut_pieces(cut, layout, 20)
        first = np.asarray(layout.offsets)[work[:, 1]] + work[:, 2]
        assert ((first >> 32) == (first + work[:, 3] - 1 >> 32)).all()
        assert work[:, 3].max() == 20
        for number, (slot, low, high) in enumerate([(0, 0, 28), (0, 28, 70), (1, 0, 40)]):
            mine = work[work[:, 0] == number]
            assert (mine[:, 1] == slot).all()
            assert mine[0, 2] == low
            assert mine[-1, 2] + mine[-1, 3] == high
            np.testing.assert_array_equal(mine[1:, 2], mine[:-1, 2] + mine[:-1, 3])


@pytest.mark.parametrize("where", ["cpu", "device", "host", "disk"])
def test_unchanged_blocks_are_skipped_in_every_mode(llama_family: Family, where: str) -> None:
    """Not only not written: not brought to the device either, and A, B, A gives A."""
    from transformers import AutoModelForCausalLM

    models = open_family(llama_family)
    model = AutoModelForCausalLM.from_pretrained(models.base.directory)
    engine = Engine(Merger(models), model)
    if where != "cpu":
        sources = DeviceSources(engine._merger.sources, CPU, Residency(where), 4096)
        engine._on_device = DeviceMerger(sources, engine._targets)
    first = make_recipe(models, "task_arithmetic", "layer", lambda column, row: 0.3)
    second = make_recipe(
        models, "task_arithmetic", "layer", lambda column, row: 0.9 if row == 1 else 0.3
    )
    everything = engine.apply(first)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    brought = 0
    if engine._on_device is not None:
        brought = engine._on_device.sources.brought
        assert (brought > 0) == (where != "device")
    assert engine.apply(first) == 0
    rewritten = engine.apply(second)
    assert 0 < rewritten < everything
    if engine._on_device is not None and where != "device":
        more = engine._on_device.sources.brought - brought
        assert 0 < more < brought / 2
    changed = model.state_dict()
    assert any((before[key] != changed[key]).any() for key in before)
    assert engine.apply(first) == rewritten
    assert all((before[key] == changed[key]).all() for key in before)


def test_what_is_held_is_no_file(llama_family: Family) -> None:
    from transformers import AutoModelForCausalLM

    models = open_family(llama_family)
    model = AutoModelForCausalLM.from_pretrained(models.base.directory)
    merger = Merger(models)
    maps = [merger.sources.base(slot)[0] for slot in range(len(models.layout.slots))]
    Engine(merger, model, Residency.HOST)
    for slot, mapped in enumerate(maps):
        held = merger.sources.base(slot)[0]
        assert isinstance(mapped, np.memmap)
        assert not isinstance(held, np.memmap)
        assert held.flags.owndata
        np.testing.assert_array_equal(held, mapped)


def test_without_triton_merges_run_in_torch(
    llama_family: Family, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from evomerge.merge import device_merger

    models = open_family(llama_family)
    sources = DeviceSources(Merger(models).sources, CPU)
    monkeypatch.setattr(device_merger, "find_spec", lambda name: None)
    assert not device_merger._triton_runs(sources, targets_of(models, "F32"))
    assert "triton is not installed: merges run in torch" in caplog.text


def test_triton_that_cannot_compile_is_left_alone(
    llama_family: Family, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from evomerge.merge import device_merger, triton_launch

    def fail(merge: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    models = open_family(llama_family)
    sources = DeviceSources(Merger(models).sources, CPU)
    monkeypatch.setattr(triton_launch.TritonMerge, "probe", fail)
    assert not device_merger._triton_runs(sources, targets_of(models, "F32"))
    assert "triton cannot be used here (Failed to find C compiler.): merges run" in caplog.text


def test_too_little_memory_is_said(llama_family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from evomerge.errors import SetupError

    def full(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory. Tried to allocate\nmore")

    merger = Merger(open_family(llama_family))
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(SetupError, match=r"residency: device: .*CUDA out of memory.*\(use resid"):
        DeviceSources(merger.sources, CPU, Residency.DEVICE)
