"""The demo's data, tokenizer, training and cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge import demo_pool
from evomerge.demo_pool import ITEMS, LETTERS, MODELS, SKILLS, Training, train_pool
from evomerge.errors import InputError, LockedError

FITNESS = Path(__file__).parents[1] / "fitness" / "skills"
TINY = Training(base_steps=3, expert_steps=2, batch=8, hidden=16, layers=2, heads=2, inner=32)


def silent(model: str, done: int, total: int) -> None:
    """Ignore progress."""


def by_hand(skill: str, letters: str) -> str:
    """Return the answer to ``letters``, worked out on text alone."""
    words = letters.split()
    if skill == "shift":
        return letters.translate(str.maketrans("abcdefgh", "bcdefgha"))
    return " ".join(sorted(words) if skill == "sort" else reversed(words))


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file of ``directory`` by its relative path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool after a few steps."""
    return train_pool(tmp_path_factory.mktemp("pool"), silent, TINY)


# --- data


@pytest.mark.parametrize("skill", SKILLS)
def test_committed_items_are_the_generated_ones(skill: str) -> None:
    committed = (FITNESS / f"{skill}.jsonl").read_text(encoding="utf-8")
    assert committed == demo_pool.items_text(skill)


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_are_right(skill: str) -> None:
    items = demo_pool.skill_items(skill)
    assert len(items) == ITEMS
    assert [item["answer"] for item in items] == [by_hand(skill, i["letters"]) for i in items]


def test_no_item_is_trained_on_or_shared_between_skills() -> None:
    trained = {
        " ".join(LETTERS[letter] for letter in string) for string in demo_pool.training_strings()
    }
    tested = [item["letters"] for skill in SKILLS for item in demo_pool.skill_items(skill)]
    assert len(set(tested)) == len(tested) == 3 * ITEMS
    assert not trained & set(tested)
    assert len(trained) > 25_000


@pytest.mark.parametrize("skill", SKILLS)
def test_task_file_points_to_its_data_and_runs_no_code(skill: str) -> None:
    text = (FITNESS / f"{skill}.yaml").read_text(encoding="utf-8")
    task: dict[str, Any] = yaml.safe_load(text)  # refuses !function
    assert task["task"] == f"skills_{skill}"
    data = task["dataset_kwargs"]["data_files"]["test"]
    assert (FITNESS.parents[1] / data).samefile(FITNESS / f"{skill}.jsonl")


# --- tokenizer


def test_tokenizer_round_trip(pool: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(pool / "base")
    text = "reverse b f a c d = d c a f b"
    ids = loaded(text).input_ids
    assert len(ids) == 12  # no token is added around the words
    assert loaded.unk_token_id not in ids
    assert loaded.decode(ids) == text
    assert loaded.decode([*ids, loaded.eos_token_id], skip_special_tokens=True) == text
    assert loaded.padding_side == "left"


def test_lm_eval_prompts_are_the_training_sequences(pool: Path) -> None:
    import numpy as np
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(pool / "sort")
    trained = demo_pool._batch(np.random.default_rng(0), "sort", TINY)[0]
    words = loaded.decode(trained[1:6])
    prompt = yaml.safe_load((FITNESS / "sort.yaml").read_text())["doc_to_text"]
    asked = loaded(prompt.replace("{{letters}}", words)).input_ids
    answer = loaded(by_hand("sort", words)).input_ids
    assert [*asked, *answer, loaded.eos_token_id] == trained.tolist()


# --- training and cache


def test_models_load_and_differ(pool: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    weights = {}
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(pool / name)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        weights[name] = model.model.embed_tokens.weight.detach()
        assert torch.isfinite(weights[name]).all()
    pairs = [(a, b) for i, a in enumerate(MODELS) for b in MODELS[i + 1 :]]
    assert not [(a, b) for a, b in pairs if torch.equal(weights[a], weights[b])]


def test_same_settings_give_the_same_files_and_other_seeds_other_weights(
    pool: Path, tmp_path: Path
) -> None:
    import torch

    torch.manual_seed(123)  # the caller's generator and threads neither matter nor change
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = train_pool(tmp_path / "again", silent, TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert contents(again) == contents(pool)
    other = train_pool(tmp_path / "other", silent, Training(**{**_settings(), "seed": 7}))
    assert contents(other / "base") != contents(pool / "base")


def _settings() -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(TINY)


def test_complete_pool_is_returned_at_once(pool: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pool.rglob("*")}
    steps: list[str] = []
    assert train_pool(pool, lambda model, done, total: steps.append(model), TINY) == pool
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in pool.rglob("*")} == before


def test_progress_names_every_step(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    train_pool(tmp_path, lambda *step: steps.append(step), TINY)
    counts = {"base": 3, "reverse": 2, "sort": 2, "shift": 2}
    assert steps == [(m, i, n) for m, n in counts.items() for i in range(n + 1)]


def test_other_settings_and_damaged_models_are_trained_again(pool: Path, tmp_path: Path) -> None:
    directory = train_pool(tmp_path, silent, TINY)
    (directory / "sort" / "model.safetensors").write_bytes(b"cut")
    trained: set[str] = set()
    train_pool(directory, lambda model, done, total: trained.add(model), TINY)
    assert trained == {"sort"}
    assert contents(directory) == contents(pool)
    longer = Training(**{**_settings(), "expert_steps": 3})
    assert not demo_pool.is_trained(directory, longer)
    trained.clear()
    train_pool(directory, lambda model, done, total: trained.add(model), longer)
    assert trained == set(MODELS)
    assert demo_pool.is_trained(directory, longer)


def test_interrupted_training_leaves_no_half_directory_and_goes_on(
    pool: Path, tmp_path: Path
) -> None:
    def stop(model: str, done: int, total: int) -> None:
        if (model, done) == ("sort", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_pool(tmp_path, stop, TINY)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["base", "reverse"]
    assert not demo_pool.is_trained(tmp_path, TINY)
    trained: set[str] = set()
    train_pool(tmp_path, lambda model, done, total: trained.add(model), TINY)
    assert trained == {"sort", "shift"}
    assert contents(tmp_path) == contents(pool)


def test_kill_while_saving_leaves_no_half_directory(pool: Path, tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from evomerge import demo_pool
from evomerge.demo_pool import Training
real = demo_pool.tokenizer
calls = []
def killed():  # the weights of the second model are written, its tokenizer is not
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), 9)
    return real()
demo_pool.tokenizer = killed
demo_pool.train_pool(Path(sys.argv[1]), lambda *_: None, Training(**eval(sys.argv[2])))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), repr(_settings())],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "base").is_dir()
    assert not (tmp_path / "reverse").exists()
    train_pool(tmp_path, silent, TINY)
    assert contents(tmp_path) == contents(pool)


# --- refusals


def test_foreign_directories_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"'base' is there, but no pool\.json"):
        train_pool(tmp_path, silent, TINY)
    assert (tmp_path / "base" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"training": TINY.digest})])
def test_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pool.json").write_text(text)
    with pytest.raises(InputError, match=r"pool\.json: not written by evomerge, or damaged"):
        train_pool(tmp_path, silent, TINY)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("")
    with pytest.raises(InputError, match="no directory for the demo models"):
        train_pool(tmp_path / "pool", silent, TINY)


def test_two_trainings_at_once_are_refused(tmp_path: Path) -> None:
    def second(model: str, done: int, total: int) -> None:
        train_pool(tmp_path, silent, TINY)

    with pytest.raises(LockedError, match="another process trains the demo models"):
        train_pool(tmp_path, second, TINY)
