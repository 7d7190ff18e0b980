"""A study from Python, and the README's snippet."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from answered_study import answered

import evomerge
from evomerge.errors import InputError, NothingUsableError
from evomerge.gain import gains
from evomerge.study_view import StudyView

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return answered(tmp_path_factory.mktemp("opened") / "studies/strings")


@pytest.fixture(scope="module")
def study(view: StudyView) -> evomerge.Study:
    return evomerge.Study.open(view.directory)


def test_the_front_is_that_of_the_journal(study: evomerge.Study, view: StudyView) -> None:
    front = study.front()
    assert {merge.number for merge in front} == set(view.front)
    for merge in front:
        trial = view.trial(merge.number)
        assert merge.front
        assert merge.knee == (merge.number == view.knee)
        assert merge.recipe == trial.recipe
        assert merge.coefficients["weight.one"] == trial.recipe.column("weight.one")
        test = view.test[merge.number].scores[1]
        found = merge.score("sort")
        assert (found.value, found.standard_error, found.items) == (
            test.value,
            test.standard_error,
            60,
        )
        assert merge.score("sort", "search").value == trial.evaluation.values[1]  # type: ignore[union-attr]
    assert study.knee.number == view.knee
    assert study.pick("best:sort").number == view.best("sort")
    assert study.state == "finished"
    assert study.name == "strings"
    assert study.hypervolume == view.hypervolume
    assert "12 trials" in repr(study) or "18 of 19 trials done" in repr(study)


def test_trials_and_baselines(study: evomerge.Study, view: StudyView) -> None:
    trials = study.trials()
    assert [merge.number for merge in trials] == list(range(len(view.trials)))
    failed = trials[9]
    assert (failed.state, failed.scores) == ("failed", {})
    assert "diverged" in failed.error
    assert [merge.name for merge in study.baselines()] == [t.label for t in view.baselines]
    assert isinstance(trials[2:4], evomerge.Merges)
    assert repr(trials[:2]) == "<2 merges: base, expert:one>"


def test_frames_hold_scores_errors_and_coefficients(study: evomerge.Study) -> None:
    frame = study.trials().to_frame()
    assert frame.index.name == "trial"
    assert list(frame.columns[:5]) == ["name", "kind", "state", "front", "knee"]
    knee = study.knee
    row = frame.loc[knee.number]
    for split in ("search", "validation", "test"):
        assert row[f"{split}/sort"] == knee.scores[split]["sort"].value
        assert row[f"{split}/sort_se"] == knee.scores[split]["sort"].standard_error
    column = knee.recipe.column("weight.two")
    assert row["weight.two"] == pytest.approx(sum(column) / len(column))
    assert frame["test/sort"].isna().sum() > 0, "not every trial was scored on test items"
    assert frame.loc[9].isna()["search/sort"]
    assert len(study.front().to_frame()) == len(study.front())
    assert len(study.trials()[:0].to_frame()) == 0


def test_comparisons_take_merges_numbers_and_words(study: evomerge.Study, view: StudyView) -> None:
    found = study.compare(study.knee, 0, "uniform")
    assert list(found.names) == [view.knee, 0, 4]
    everything = study.compare("knee")
    expected = {gain.against: gain.difference.value for gain in gains(view)}
    means = {
        everything.names[p.theirs]: p.difference for p in everything.pairings if not p.objective
    }
    assert means == pytest.approx(expected)


def test_what_is_not_there_is_said(study: evomerge.Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a study file nor a study directory"):
        evomerge.Study.open(tmp_path)
    with pytest.raises(InputError, match=r"trial 8: no scores on tests items; it has them on test"):
        study.trial(8).score("sort", "tests")
    with pytest.raises(InputError, match=r"unknown 'srt' \(did you mean 'sort'"):
        study.knee.score("srt")
    with pytest.raises(InputError, match="trial 9: no scores on search items; it has them on none"):
        study.trial(9).score("sort")
    with pytest.raises(AttributeError, match="no attribute 'Stdy'"):
        evomerge.Stdy  # noqa: B018


def test_nothing_succeeded_yet(study: evomerge.Study) -> None:
    from dataclasses import replace

    with pytest.raises(NothingUsableError, match="no trial has succeeded"):
        _ = evomerge.Study(replace(study.view, knee=None, front=())).knee


def test_a_report_and_an_export_can_be_asked_for(study: evomerge.Study, tmp_path: Path) -> None:
    study.report(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size > 10_000
    with pytest.raises(InputError, match="trial 9: cannot be exported"):
        study.export(tmp_path / "out", 9)


def test_importing_stays_light() -> None:
    code = (
        "import sys, evomerge\n"
        "assert not {'evomerge.opened_study', 'numpy', 'pandas'} & set(sys.modules)\n"
        "evomerge.Study\n"
        "assert not {'pandas', 'torch', 'scipy', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_snippet_of_the_readme_runs(
    view: StudyView, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "evomerge.Study.open" in snippet
    code = snippet.replace("studies/my-study", str(view.directory)).replace('"my_task"', '"sort"')
    assert str(view.directory) in code
    exec(compile(code, "README.md", "exec"), {})
    assert "weight.one" in capsys.readouterr().out
