"""What task files say before lm-eval sees them, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

from evomerge.fitness.task_files import unknown_task


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
