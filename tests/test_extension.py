"""`evomerge extend`: more budget, before or after the end, and the same search either way."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from study_journals import cut, essence_of, events_of
from tiny_project import tiny_project
from toy_study import make, rounded, toy_study

from evomerge.cli import cli
from evomerge.config import load
from evomerge.errors import InputError, LockedError
from evomerge.extension import extend
from evomerge.facts import plan_facts, plan_lines, status_facts, status_lines
from evomerge.journal import JOURNAL, Journal, read
from evomerge.launch import run
from evomerge.prepare import Prepared, prepare
from evomerge.replay import verify
from evomerge.search.protocol import Candidate, SearchProblem, Told
from evomerge.search.registry import SEARCHERS
from evomerge.study_record import Limit
from evomerge.study_view import StudyState, StudyView


def test_a_finished_study_goes_on_and_chooses_anew(tmp_path: Path) -> None:
    first = toy_study(tmp_path / "s").run()
    assert first.state is StudyState.FINISHED
    extended = extend(tmp_path / "s", trials=15)
    assert (extended.before, extended.after) == (Limit(20, None), Limit(35, None))
    between = StudyView.load(tmp_path / "s")
    assert between.state is StudyState.INTERRUPTED
    assert between.counts.budget == 35

    view = toy_study(tmp_path / "s").run()
    assert view.state is StudyState.FINISHED
    assert len(view.trials) == 3 + 35
    assert len(events_of(tmp_path / "s", "done")) == 2
    assert view.trials[: len(first.trials)] == first.trials
    assert any(number >= 23 for number in view.front), "nothing new was found in 15 trials"
    assert set(view.validation) > set(view.front)


def test_when_it_was_extended_does_not_matter(tmp_path: Path) -> None:
    """Before the end, in the middle of the search, or from the end, by one or by two steps."""
    late = tmp_path / "late"
    toy_study(late, budget=12, decode=rounded).run()
    data = (late / JOURNAL).read_bytes()
    extend(late, trials=4)
    extend(late, trials=5)
    end = toy_study(late, budget=12, decode=rounded).run()
    for records in (5, 9, 14, 20, 26, 30):
        early = tmp_path / f"early{records}"
        early.mkdir()
        (early / JOURNAL).write_bytes(data)
        cut(early, records)
        extend(early, trials=4)
        extend(early, trials=5)
        view = toy_study(early, budget=12, decode=rounded).run()
        assert [trial.x for trial in view.trials] == [trial.x for trial in end.trials]
        # Finalists of the shorter search were scored again only where it had come to its end.
        assert {key: value for key, value in essence_of(late).items() if key[0] != "score"} == {
            key: value for key, value in essence_of(early).items() if key[0] != "score"
        }
        assert (view.front, view.knee) == (end.front, end.knee)


def test_an_extended_study_resumes_from_any_record_and_replays(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    toy_study(whole, budget=6, decode=rounded).run()
    extend(whole, trials=6)
    toy_study(whole, budget=6, decode=rounded).run()
    essence = essence_of(whole)
    data, total = (whole / JOURNAL).read_bytes(), len(read(whole).records)
    begin = next(r["seq"] for r in read(whole).records if r["ev"] == "extend") + 1
    assert verify(whole, toy_study(whole, budget=6, decode=rounded)).problems == ()
    for records in range(begin, total):
        directory = tmp_path / f"cut{records}"
        directory.mkdir()
        (directory / JOURNAL).write_bytes(data)
        cut(directory, records)
        toy_study(directory, budget=6, decode=rounded).run()
        assert essence_of(directory) == essence


def test_a_budget_in_items_is_extended_in_items(tmp_path: Path) -> None:
    toy_study(tmp_path / "s", budget=None, item_budget=60).run()
    with pytest.raises(InputError, match=r"trials does not end this study.*use --items"):
        extend(tmp_path / "s", trials=3)
    assert extend(tmp_path / "s", items=30).after == Limit(None, 90)
    view = toy_study(tmp_path / "s", budget=None, item_budget=60).run()
    assert view.counts.budget == 15
    assert view.spending.search == 90


def test_a_failed_study_repeats_its_failures_after_an_extension(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="10 trials in a row failed"):
        toy_study(tmp_path / "s", limit=-10.0).run()
    extend(tmp_path / "s", trials=2)
    view = toy_study(tmp_path / "s").run()
    assert (view.counts.failed, view.counts.done) == (0, 25)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "expected --trials N or --items N of at least 1"),
        ({"items": 5}, "search.items does not end this study, search.trials does; use --trials"),
    ],
)
def test_what_cannot_be_added_is_refused(
    tmp_path: Path, arguments: dict[str, Any], text: str
) -> None:
    toy_study(tmp_path / "s", budget=4).run()
    before = (tmp_path / "s" / JOURNAL).read_bytes()
    with pytest.raises(InputError, match=text):
        extend(tmp_path / "s", **arguments)
    assert (tmp_path / "s" / JOURNAL).read_bytes() == before
    with pytest.raises(InputError, match="has not been run yet"):
        extend(tmp_path, trials=1)
    assert not (tmp_path / JOURNAL).exists()


def test_a_running_study_is_not_extended(tmp_path: Path) -> None:
    toy_study(tmp_path / "s", budget=4).run()
    with Journal(tmp_path / "s"), pytest.raises(LockedError):
        extend(tmp_path / "s", trials=1)


def test_a_searcher_that_lays_out_all_its_points_is_refused(tmp_path: Path) -> None:
    arguments = {"optimizer": "ScrHammersleySearch"}
    identity = {"searcher": "nevergrad", "arguments": arguments}
    toy_study(tmp_path / "s", identity=identity, scalarise=True, budget=4).run()
    with pytest.raises(InputError, match=r"ScrHammersleySearch.*has none behind it"):
        extend(tmp_path / "s", trials=4)


@pytest.mark.parametrize("name", ["cma", "nsga2", "rvea", "evo_merging"])
def test_searchers_that_plan_by_the_budget_go_on_behind_it(tmp_path: Path, name: str) -> None:
    study = partial(
        toy_study, tmp_path / "s", budget=10, scalarise=not SEARCHERS[name].multi_objective,
        make_searcher=partial(make, name),
    )  # fmt: skip
    study().run()
    extend(tmp_path / "s", trials=10)
    assert len(study().run().trials) == 23
    assert verify(tmp_path / "s", study()).problems == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHERS)
def test_every_searcher_of_ours_goes_on_behind_its_budget(name: str) -> None:
    """Sound points and none of them twice in a row: no end of a plan makes it fall over."""
    objectives = 2 if SEARCHERS[name].multi_objective else 1
    groups = tuple((f"weight.{n % 3}", f"block.{n // 3}") for n in range(6))
    problem = SearchProblem(6, objectives, budget=30, parallel=4, seed=1, groups=groups)
    searcher = make(name, problem)
    outstanding: list[Candidate] = []
    asked: list[tuple[float, ...]] = []
    while len(asked) < 60:
        while len(outstanding) < 4:
            found = searcher.ask(1)
            if not found:
                break
            outstanding += found
            asked.append(found[0].x)
        assert outstanding, f"{name} ended after {len(asked)}"
        one = outstanding.pop(0)
        losses = [sum((value - target) ** 2 for value in one.x) for target in (0.3, 0.7)]
        items = tuple((loss, loss + 0.1) for loss in losses[:objectives])
        searcher.tell([Told(one.id, tuple(losses[:objectives]), items=items)])
    assert all(0.0 <= value <= 1.0 for x in asked for value in x)
    assert len(set(asked[30:])) > 15


def test_the_command_says_what_is_next(tmp_path: Path) -> None:
    toy_study(tmp_path / "s", budget=4).run()
    assert "reason" not in status_facts(StudyView.load(tmp_path / "s"))
    result = CliRunner().invoke(cli, ["extend", str(tmp_path / "s"), "--trials", "6"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "search.trials: 4 -> 10",
        "next: evomerge run STUDY.yaml (the study file, with the settings that the study began "
        "with)",
    ]
    facts = status_facts(StudyView.load(tmp_path / "s"))
    assert facts["state"] == "interrupted"
    lines = status_lines(facts)
    assert lines["state"] == "paused (extended, to be continued)"
    assert lines["planned"] == "13 (in all, baselines included)"
    assert lines["waiting"] == "0 (asked for, without a result yet)"


def test_a_study_whose_process_was_killed_says_so(tmp_path: Path) -> None:
    toy_study(tmp_path / "s", budget=4).run()
    cut(tmp_path / "s", 9)
    facts = status_facts(StudyView.load(tmp_path / "s"))
    assert facts["reason"] == "its process ended without a word"
    assert status_lines(facts)["state"] == "interrupted (its process ended without a word)"


def test_what_was_begun_with_other_settings_is_replayed_extended_and_continued(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    """The file says 6 trials; the commands that are printed are the ones that work."""
    file = tiny_project(tmp_path, save_llama) / "study.yaml"
    directory = tmp_path / "studies" / "tiny"
    runner = CliRunner()

    def call(*words: str) -> Result:
        return runner.invoke(cli, list(words))

    begun = ("--set", "search.trials=4", "--set", "fitness.items.search=5")
    assert call("run", str(file), *begun).exit_code == 0

    for name in (file, directory):
        sound = call("replay", str(name))
        assert sound.exit_code == 0, sound.output
        assert f"those that the study was run with ({directory}" in sound.output
        assert "verdict      sound" in sound.output
    assert call("replay", str(file), *begun).exit_code == 0
    other = call("replay", str(file), "--set", "search.trials=6")
    assert isinstance(other.exception, InputError)
    text = str(other.exception)
    assert text.startswith("different settings: ")
    assert "search.trials: 4 -> 6 (keep 4, e.g. --set search.trials=4; `evomerge extend`" in text
    assert "--repair" not in text
    assert "verdict" not in other.output
    assert "evomerge extend" in str(call("run", str(file)).exception)

    for name in (file, directory):
        extended = call("extend", str(name), "--trials", "1")
        assert extended.exit_code == 0, extended.output
        next_line = extended.output.splitlines()[-1]
        expected = f"evomerge run {file} " + " ".join(reversed_pairs(begun))
        assert next_line == f"next: {expected}"
        continued = call(*shlex.split(next_line)[2:])
        assert continued.exit_code == 0, continued.output
        assert StudyView.load(directory).state is StudyState.FINISHED
    assert StudyView.load(directory).counts.budget == 6
    assert call("replay", str(file)).exit_code == 0


def test_check_and_run_spoke_of_the_first_number_of_trials(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    path = tiny_project(tmp_path, save_llama) / "study.yaml"
    overrides = ["search.trials=3", "search.searcher=auto"]

    def plan() -> tuple[Prepared, dict[str, Any]]:
        made = prepare(load(path, overrides), path)
        return made, plan_lines(made)

    before, lines = plan()
    assert "search.trials: 3 trials for 2 coefficients is little" in before.warnings[0]
    assert ": 3 trials after" in lines["search"]
    assert "extended" not in before.choice
    run(before, [])
    extend(before.directory, trials=2)
    after, lines = plan()
    assert not any("is little" in one for one in after.warnings)
    assert ": 5 trials (extended from 3) after" in lines["search"]
    assert plan_facts(after)["search"]["trials"] == after.trials == 5
    # The searcher was chosen, and is built, for the first number.
    assert after.choice == f"{before.choice}; chosen before it was extended"
    assert run(after, []).view.counts.budget == 5
    assert StudyView.load(before.directory).state is StudyState.FINISHED


def test_check_spoke_of_the_first_number_of_item_evaluations(
    tmp_path: Path, save_llama: Callable[..., Path]
) -> None:
    path = tiny_project(tmp_path, save_llama) / "study.yaml"
    overrides = ["search.trials=null", "search.items=24"]
    made = prepare(load(path, overrides), path)
    assert ", at most 24 item evaluations" in plan_lines(made)["search"]
    run(made, [])
    extend(made.directory, items=36)
    line = plan_lines(prepare(load(path, overrides), path))["search"]
    assert ": 5 trials (extended from 2) after" in line
    assert ", at most 60 item evaluations" in line


def reversed_pairs(words: tuple[str, ...]) -> list[str]:
    """Return the overrides in the order of the sections of a study file."""
    return [*words[2:], *words[:2]]
