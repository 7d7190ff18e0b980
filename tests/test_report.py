"""The report: everything is on it, nothing else is needed, nothing secret is told."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from answered_study import answered
from small_study import finished

from evomerge import cli
from evomerge.comparison_rows import comparison_rows
from evomerge.errors import InputError
from evomerge.report import report_html, save_report
from evomerge.report_charts import line_chart, ticks
from evomerge.report_summary import recommended_comparison, report_markdown
from evomerge.study_record import Reading
from evomerge.study_view import Audit, StudyView


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return answered(tmp_path_factory.mktemp("report") / "strings")


@pytest.fixture(scope="module")
def page(view: StudyView) -> str:
    return report_html(view)


class Outline(HTMLParser):
    """Headings and texts of a page; refuses tags that do not match."""

    _VOID = frozenset({"meta", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


def test_everything_is_on_it(page: str, view: StudyView) -> None:
    found = outline(page)
    assert found.headings == [
        f"What trial {view.knee} (knee) gains over the baselines", "Over the trials",
        "What the front is made of", "1 failed trial", "Go on", "Environment",
    ]  # fmt: skip
    text = " ".join(" ".join(found.text).split())
    comparison = recommended_comparison(view)
    assert comparison is not None
    for row in comparison_rows(comparison):
        assert " ".join(row) in text
    assert "Searched: 12 coefficients of task_arithmetic" in text
    assert "evomerge export" in text
    assert "evomerge verify merged" in text
    assert f"hypervolume, search items {view.state.value}" in text
    assert f"{view.hypervolume:.4g}" in text
    assert page.count("<figure>") == 3, "two objectives and the hypervolume"
    assert "evomerge 0.1.0" in text, "versions"
    assert "seed: 3" in text, "the study file"


def test_it_needs_nothing_but_itself(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:)[^"']+""", page)
    assert not re.findall(r"@import|url\(https?:", page)


def test_it_tells_no_secrets_and_escapes_what_users_write(page: str) -> None:
    assert "hf_abcdefghijklmnopqr" not in page
    assert "user:secret@" not in page
    assert "diverged on &lt;purpose&gt; &amp; https://host" in page
    assert "<purpose>" not in page


def test_audits_are_summed_up(view: StudyView) -> None:
    mean = Reading((0.4, 0.9), (0.1, 0.1))
    audits = tuple(
        Audit(n, (0.5, 0.5), Reading((0.5 + 0.1 * n, 0.5), (0.2, 0.2)), mean) for n in (0, 1)
    )
    other = replace(view)
    object.__setattr__(other, "audits", audits)  # a cached property of the frozen view
    text = " ".join(outline(report_html(other)).text)
    assert "How far off the estimates were" in text
    assert re.search(r"reverse\s+0\.0500\s+0\.1000", text)
    assert re.search(r"sort\s+0\.0000\s+0\.4000", text)


def test_one_objective_and_three_with_units(tmp_path: Path) -> None:
    for count in (1, 3):
        found = outline(report_html(finished(tmp_path / str(count), objectives=count)))
        assert found.headings[0].startswith("What ")
        assert "mean" not in [text.strip() for text in found.text]


def test_the_summary_is_short_markdown(view: StudyView) -> None:
    text = report_markdown(view)
    assert text.startswith("## strings\n")
    assert "| **trial" in text
    assert f"### What trial {view.knee} (knee) gains" in text
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum("| mean |" in line for line in tables) == len({t.label for t in view.baselines}) - 1
    assert "evomerge export" in text
    assert "Failed trials: 1;" in text
    assert str(view.directory.parent) not in text or "--out merged" in text


def test_a_file_that_cannot_be_written(view: StudyView, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--out: .*cannot be written: there is no folder .*now"):
        save_report(view, tmp_path / "nowhere/report.html")


def test_the_command_writes_both(
    view: StudyView, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evomerge", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        return capsys.readouterr().out

    assert call(view.directory) == "wrote report.html\n"
    assert call(view.directory, "--markdown", "s.md") == "wrote s.md\n"
    assert call(view.directory, "--markdown", "-") == report_markdown(view)
    assert (tmp_path / "s.md").read_text() == report_markdown(view)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "s.md"]
    call(view.directory, "--out", "a.html", "--markdown", "s.md")
    assert (tmp_path / "a.html").read_text() == (tmp_path / "report.html").read_text()


class TestChart:
    def test_ticks_are_round_and_inside(self) -> None:
        assert ticks(0.0, 1.0, 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
        assert ticks(0.13, 0.37, 4) == pytest.approx([0.2, 0.3])
        assert ticks(3, 170, 5) == [50, 100, 150]

    def test_steps_go_through_the_values(self) -> None:
        drawn = line_chart("best <b>", [None, 1.0, 1.0, 3.0], 0, 2)
        path = re.search(r'class="line" d="([^"]+)"', drawn)
        assert path is not None
        xs = [float(x) for x in re.findall(r"H([\d.]+)", path[1])]
        ys = [float(y) for y in re.findall(r"V([\d.]+)", path[1])]
        assert xs == sorted(xs)
        assert ys[0] > ys[-1], "larger is higher"
        assert "best &lt;b&gt;" in drawn
        assert "stroke-dasharray" in drawn
        assert "1 at trial 1, 3 at trial 3" in drawn

    def test_nothing_and_equal_values(self) -> None:
        assert line_chart("x", [None, None], 0, None) == ""
        assert "nan" not in line_chart("x", [0.0, 0.0], 0, None)


def test_a_bar_in_a_name_broke_the_tables_in_markdown(view: StudyView) -> None:
    names = [f"arc|{number}" for number in range(len(view.objectives))]
    pairs = zip(view.objectives, names, strict=True)
    renamed = replace(view, objectives=tuple(replace(one, name=name) for one, name in pairs))
    lines = report_markdown(renamed).splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("|---")]
    assert len(heads) == 2
    for head in heads:
        for line in lines[head - 1 :]:
            if not line.startswith("|"):
                break
            assert len(re.findall(r"(?<!\\)\|", line)) == lines[head].count("|"), line
