"""What task files say before lm-eval sees them, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.errors import TaskError
from evomerge.fitness.task_files import has_reference, resolve_data, tasks_in, unknown_task


def test_a_task_of_ones_own_got_a_guess_instead_of_advice(tmp_path: Path) -> None:
    # 0.71 alike, which was enough for a guess.
    assert unknown_task("my_regex", ["gen_regex"], []) == (
        "unknown task 'my_regex' (`lm_eval ls tasks` lists lm-eval's own); your own tasks need "
        "fitness.include_path: the folder of their YAML files"
    )
    assert unknown_task("gen_regx", ["gen_regex"], [tmp_path]) == (
        "unknown task 'gen_regx' (did you mean 'gen_regex'?); no task file in "
        f"fitness.include_path defines it: {tmp_path}"
    )


def test_which_tasks_have_reference_answers(tmp_path: Path) -> None:
    (tmp_path / "common").write_text("output_type: multiple_choice\ndoc_to_target: label\n")
    (tmp_path / "choice.yaml").write_text("include: common\ntask: choice\ntag: [both, mine]\n")
    (tmp_path / "free.yaml").write_text("task: free\ndoc_to_target: '{{answer}}'\n")
    (tmp_path / "none.yaml").write_text("task: none\n")
    (tmp_path / "book.yaml").write_text(
        "task: book\noutput_type: loglikelihood_rolling\ndoc_to_target: text\n"
    )
    (tmp_path / "all.yaml").write_text("group: all\ntask: [choice, free]\n")
    found = {name: has_reference(settings) for name, settings in tasks_in(tmp_path).items()}
    assert found == {
        "all": True, "book": False, "choice": True, "both": True, "mine": True, "free": True,
        "none": False,
    }  # fmt: skip


def test_data_that_lies_above_was_just_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fitness").mkdir()
    (tmp_path / "fitness/sort.jsonl").write_text("{}")
    (tmp_path / "sub/studies").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sub/studies")
    task = {"dataset_path": "json", "dataset_kwargs": {"data_files": "fitness/sort.jsonl"}}
    with pytest.raises(TaskError) as caught:
        resolve_data(task, [Path()])
    assert str(caught.value) == (
        f"data_files: 'fitness/sort.jsonl' not found (looked in {tmp_path / 'sub/studies'}; it is "
        f"in {tmp_path}: start evomerge there, or verify with --root {tmp_path})"
    )
    assert resolve_data(task, [Path(), tmp_path])[1]
