"""What searchers say of their work: in the journal, in status and front, never in a replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_project import tiny_project
from toy_study import ToySearcher, toy_study

from evomerge.config import load
from evomerge.facts import front_facts, status_facts, status_lines
from evomerge.journal import read
from evomerge.prepare import prepare


class Says(ToySearcher):
    """Says how many results it was told."""

    def facts(self) -> dict[str, str]:
        return {"told": str(len(self.told))}


def test_what_a_searcher_says_is_in_the_record_and_changes_no_replay(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s", make_searcher=Says).run()
    assert view.searcher == {"told": "20"}
    records = read(tmp_path / "s").records
    again = toy_study(tmp_path / "s", make_searcher=Says).run()
    assert again.searcher == {"told": "20"}
    assert read(tmp_path / "s").records == records
    assert status_lines(status_facts(view))["told"] == "20"
    assert front_facts(view)["searcher"] == {"told": "20"}


def test_what_a_searcher_says_survives_a_resume_at_every_record(tmp_path: Path) -> None:
    """Notes of the first run must not be written again by replaying asks."""

    toy_study(tmp_path / "whole", make_searcher=Says, budget=45).run()
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    notes = [number for number, line in enumerate(lines) if b'"ev":"note"' in line]
    assert len(notes) == 3
    for number in notes:
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "journal.jsonl").write_bytes(b"".join(lines[: number + 1]))
        view = toy_study(directory, make_searcher=Says, budget=45).run()
        assert view.searcher == {"told": "45"}
        events = [record["ev"] for record in read(directory).records]
        assert events.count("note") == 3


@pytest.mark.parametrize(
    ("searcher", "enough", "words"),
    [
        ("m2n2", 5, "leave it little to mix (give it 10 or more)"),
        ("nested_map", 6, "may end before the last step (give it 6 or more)"),
        ("evo_merging", 60, "less than three generations of 20"),
        ("random", 1, ""),
    ],
)
def test_check_says_what_too_few_trials_do_to_a_searcher(
    tmp_path: Path, save_llama: Callable[..., Path], searcher: str, enough: int, words: str
) -> None:
    folder = tiny_project(tmp_path, save_llama)

    def warnings(trials: int) -> str:
        settings = [f"search.searcher={searcher}", f"search.trials={trials}"]
        return "\n".join(prepare(load(folder / "study.yaml", settings), folder / "s").warnings)

    assert words in warnings(max(1, enough - 1))
    assert "search.trials: " + searcher not in warnings(enough)
    assert not words or words not in warnings(enough)


class Names(ToySearcher):
    """Names its fourth candidate by its own number."""

    def facts(self) -> dict[str, str]:
        return {"best": "candidate 3, from candidate 0", "size": "12 members"}


def test_candidates_are_named_by_their_trials(tmp_path: Path) -> None:
    view = toy_study(tmp_path / "s", make_searcher=Names).run()
    search = [one.number for one in view.trials if one.kind == "search"]
    assert search[0] > 0  # behind the baselines
    assert view.searcher["best"] == f"trial {search[3]}, from trial {search[0]}"
    assert view.searcher["size"] == "12 members"
