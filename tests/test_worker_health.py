"""A worker that lives for days: memory that runs out, and memory that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_project import tiny_project

from evomerge import resident
from evomerge.config import load
from evomerge.pool import run_job
from evomerge.prepare import Prepared, prepare
from evomerge.resident import bit_sum
from evomerge.trial import Evaluation, Failure, Job, Score
from evomerge.worker import ModelWorker


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    return tiny_project(tmp_path_factory.mktemp("project"), save_llama) / "study.yaml"


@pytest.fixture(scope="module")
def prepared(study: Path) -> Prepared:
    return prepare(load(study, ["pool.residency=host", "pool.device=cpu"]), study)


def _job(prepared: Prepared, level: float) -> Job:
    recipe = prepared.space.decode([level] * prepared.space.dimension)
    return Job(0, recipe, tuple(split.search for split in prepared.splits))


def _worker(prepared: Prepared) -> ModelWorker:
    made = prepared.factory()
    assert isinstance(made, ModelWorker)
    return made


def _scores(worker: ModelWorker, job: Job) -> tuple[Score, ...]:
    found = worker.run(job)
    assert isinstance(found, Evaluation)
    return found.scores


@pytest.fixture(scope="module")
def expected(prepared: Prepared) -> dict[float, tuple[Score, ...]]:
    worker = _worker(prepared)
    return {level: _scores(worker, _job(prepared, level)) for level in (0.3, 0.7)}


def _damage(worker: ModelWorker, at: int = 0) -> None:
    """Change one byte of every parameter of the live model."""
    import torch

    for one in worker._model.parameters():
        one.detach().view(-1).view(torch.uint8)[at] ^= 0x41


def test_workers_of_half_a_gpu_found_batches_for_a_whole_one(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def found(forward: Any, share: float) -> int:
        shares.append(share)
        return 256

    monkeypatch.setattr("evomerge.fitness.hot.runner.found_tokens", found)
    for gpus in ("0.5", "1", "0"):
        file = load(study, [f"pool.gpus_per_worker={gpus}", "pool.device=cpu"])
        prepare(file, study).factory()
    assert shares == [0.5, 1.0, 1.0]


def test_any_changed_bit_changes_the_sum() -> None:
    import torch

    for count in (1, 9, 17):
        tensor = torch.arange(count, dtype=torch.float32).to(torch.bfloat16)
        before = bit_sum(tensor)
        raw = tensor.view(torch.uint8)
        for position in range(len(raw)):
            for bit in range(8):
                raw[position] ^= 1 << bit
                assert bit_sum(tensor) != before
                raw[position] ^= 1 << bit
        assert bit_sum(tensor) == before


def test_weights_that_changed_between_trials_are_made_anew(
    prepared: Prepared, expected: dict[float, Any], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(resident, "PARTS", 1)
    worker = _worker(prepared)
    assert _scores(worker, _job(prepared, 0.3)) == expected[0.3]
    _damage(worker)
    assert _scores(worker, _job(prepared, 0.3)) == expected[0.3], "it scored damaged weights"
    assert "changed between two trials" in caplog.text


def test_a_part_is_compared_each_time_and_every_part_in_turn(prepared: Prepared) -> None:
    worker = _worker(prepared)
    job = _job(prepared, 0.3)
    worker.run(job)
    guard = worker._guard
    _damage(worker, at=-1)  # the last byte is in the last part
    seen = []
    for _ in range(resident.PARTS):
        seen.append(guard.intact())
        digest = guard._digest
        guard.mark()
        assert digest != guard._digest or not seen[-1]
    assert seen[0], "the first part does not hold the last byte"


def test_the_complete_check_finds_what_no_sample_saw(
    prepared: Prepared, expected: dict[float, Any], caplog: pytest.LogCaptureFixture
) -> None:
    worker = _worker(prepared)
    worker.run(_job(prepared, 0.3))
    worker._guard._full_every = 1
    _damage(worker, at=-1)
    assert worker._guard.intact(), "the sample saw it"
    assert _scores(worker, _job(prepared, 0.3)) == expected[0.3]
    assert "was not what its recipe says" in caplog.text


def test_sources_that_changed_in_memory_are_loaded_again(
    prepared: Prepared, expected: dict[float, Any], caplog: pytest.LogCaptureFixture
) -> None:
    worker = _worker(prepared)
    worker.run(_job(prepared, 0.3))
    worker._guard._full_every = 1
    held = next(bits for (model, _), bits in worker._merger.sources._maps.items() if model == 1)
    held.view("uint8")[5] ^= 0x10
    assert _scores(worker, _job(prepared, 0.7)) == expected[0.7]
    assert "the models are loaded again" in caplog.text


class Meddling:
    """Does something before some of the scorings of another scorer."""

    def __init__(self, scorer: Any, meddle: Callable[[int], None]) -> None:
        self._scorer, self._meddle, self.calls = scorer, meddle, 0

    def score(self, items: Sequence[Sequence[str]]) -> tuple[Score, ...]:
        self.calls += 1
        self._meddle(self.calls)
        scores: tuple[Score, ...] = self._scorer.score(items)
        return scores

    def facts(self) -> Mapping[str, str]:
        facts: Mapping[str, str] = self._scorer.facts()
        return facts


def test_weights_that_change_while_they_are_scored_cost_the_result(
    prepared: Prepared, expected: dict[float, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "PARTS", 1)
    worker = _worker(prepared)
    once = Meddling(worker._fitness, lambda call: _damage(worker) if call == 1 else None)
    worker._fitness = once
    assert _scores(worker, _job(prepared, 0.3)) == expected[0.3]
    assert once.calls == 2
    worker._fitness = Meddling(once, lambda call: _damage(worker))
    failed = run_job(worker, _job(prepared, 0.7))
    assert isinstance(failed, Failure)
    assert failed.message.startswith("EvaluationError: the weights in memory changed while")


def _no_memory(call: int) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def test_out_of_memory_is_tried_once_more_with_half_the_batch(
    prepared: Prepared, expected: dict[float, Any], caplog: pytest.LogCaptureFixture
) -> None:
    worker = _worker(prepared)
    asked: list[tuple[int, int | None]] = []
    attached = worker._attached

    def attach(batch_size: int, batch_tokens: int | None) -> Any:
        asked.append((batch_size, batch_tokens))
        return attached(batch_size, batch_tokens)

    setattr(worker, "_attached", attach)  # noqa: B010 - mypy refuses a method here
    whole, worker._fitness = worker._fitness, Meddling(worker._fitness, _no_memory)
    with caplog.at_level(logging.WARNING):
        halved = _scores(worker, _job(prepared, 0.3))
    assert "job 0: out of memory; once more with half the batch" in caplog.text
    assert asked == [(prepared.file.fitness.batch_size // 2, 2048)]
    for one, other in zip(halved, expected[0.3], strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-3)
    worker.run(_job(prepared, 0.7))
    assert len(asked) == 1, "the small batch is made once"
    worker._fitness = whole
    assert _scores(worker, _job(prepared, 0.7)) == expected[0.7], "the whole batch is back"


def test_out_of_memory_with_half_the_batch_is_a_failed_trial(prepared: Prepared) -> None:
    worker = _worker(prepared)
    worker._fitness = Meddling(worker._fitness, _no_memory)
    halved = worker._halved = Meddling(worker._fitness, _no_memory)
    failed = run_job(worker, _job(prepared, 0.3))
    assert isinstance(failed, Failure)
    assert (failed.kind, failed.message[:16]) == ("oom", "OutOfMemoryError")
    assert halved.calls == 1

    class Full:
        def run(self, job: Job) -> Evaluation:
            raise MemoryError

        def describe(self) -> dict[str, str]:
            return {}

    assert run_job(Full(), _job(prepared, 0.3)) == Failure("oom", "MemoryError")
