"""Evolved merges know their parents: from the searcher through the journal to a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_study import small_study

from evomerge.journal import encode, read
from evomerge.lineage import lineage_html
from evomerge.presentation import project
from evomerge.search.registry import make_searcher
from evomerge.study import Study


def evolved(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    study = small_study(directory, objectives=1, budget=60)
    # Points of the space, so that M2N2 asks for the baselines again as its first members.
    places = [tuple(v for row in one.recipe.table for v in row) for one in study.baselines]
    baselines = [replace(one, x=x) for one, x in zip(study.baselines, places, strict=True)]
    monkeypatch.setattr(study, "baselines", tuple(baselines))
    monkeypatch.setattr(
        study, "make_searcher", lambda problem: make_searcher("m2n2", {"archive": 6}, problem)
    )
    return study


def test_trials_of_m2n2_have_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = evolved(tmp_path, monkeypatch).run()
    searched = [trial for trial in view.trials if trial.kind == "search"]
    children = [trial for trial in searched if trial.origin is not None]
    assert len(children) > 20
    first = searched[0].number
    for trial in children:
        assert trial.origin is not None
        assert len(trial.origin.parents) == 2
        assert all(first <= parent < trial.number for parent in trial.origin.parents)
        assert trial.origin.how.startswith("split before block ")
    assert all(trial.origin is None for trial in view.baselines)
    # What was written down is what is read, and a resumed study goes on with it.
    lines = read(tmp_path).records
    (tmp_path / "journal.jsonl").write_bytes(b"".join(map(encode, lines[: len(lines) // 2])))
    again = evolved(tmp_path, monkeypatch).run()
    assert [t.origin for t in again.trials] == [t.origin for t in view.trials]


def test_the_page_shows_ancestors_down_to_baselines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = evolved(tmp_path, monkeypatch).run()
    assert "lineage.html" in project(view).files
    number = max(trial.number for trial in view.trials if trial.origin is not None)
    view = replace(view, front=(*view.front, number))
    html = lineage_html("strings", view)
    section = html.partition(f"<h2>trial {number}</h2>")[2].partition("<h2>")[0]
    shown = {number}
    names = set()
    for ancestor in range(number, -1, -1):  # parents have smaller numbers
        digest = view.history.digests[ancestor]
        first = next(t for t in view.trials if view.history.digests[t.number] == digest)
        if ancestor not in shown or first.label:
            continue
        origin = view.trial(ancestor).origin
        assert origin is not None
        assert f"trial {first.number}</td><td>{origin.how}</td>" in section
        shown |= set(origin.parents)
    for ancestor in shown:
        digest = view.history.digests[ancestor]
        first = next(t for t in view.trials if view.history.digests[t.number] == digest)
        names.add(first.label or f"trial {first.number}")
    assert all(f"{name}</td>" in section for name in names)
    assert any(name.startswith(("expert:", "base", "uniform", "task")) for name in names)
    assert "<script" not in html


def test_a_study_without_parents_has_no_such_page(tmp_path: Path) -> None:
    view = small_study(tmp_path).run()
    assert "lineage.html" not in project(view).files
    assert all("origin" not in record for record in read(tmp_path).records)
