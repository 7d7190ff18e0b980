"""The front in characters: what stands where, and when it is drawn."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_study import finished

from evomerge import cli
from evomerge.errors import InputError
from evomerge.front_page import FrontData, FrontPoint, Kind, Measured
from evomerge.presentation import front_data
from evomerge.study_view import StudyView
from evomerge.terminal_plot import front_text, narrowed
from evomerge.trial import Direction, Objective


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return finished(tmp_path_factory.mktemp("plot") / "strings", objectives=3)


def point(
    number: int, x: float, y: float, kind: Kind = "search", label: str = "", front: bool = False
) -> FrontPoint:
    return FrontPoint(number, kind, label, front, Measured((x, y), (0.0, 0.0)))


DATA = FrontData(
    title="t", subtitle="", objectives=(Objective("acc"), Objective("loss", Direction.MINIMIZE)),
    blocks=(),
    points=(
        point(0, 0.0, 4.0, "base", "base"), point(1, 1.0, 3.0, "expert", "expert:math"),
        point(2, 0.4, 0.0, front=True), point(3, 0.8, 1.0, front=True), point(4, 0.5, 2.0),
    ),
    knee=3, command="",
)  # fmt: skip


def where(text: str, mark: str) -> tuple[int, int]:
    """Return row and column of a mark within the canvas, from the lower left."""
    rows = [line.split("│", 1)[1] for line in text.splitlines() if "│" in line]
    (found,) = [
        (len(rows) - 1 - number, row.index(mark)) for number, row in enumerate(rows) if mark in row
    ]
    return found


def test_better_is_right_and_up_also_where_less_is_better() -> None:
    text = front_text(DATA, 72).plain
    width = 72 - 11
    assert where(text, "■") == (0, 0), "the worst in both, lower left"
    assert where(text, "◆") == (4, width - 1), "loss 3 of 0 to 4, best accuracy"
    assert where(text, "●") == (15, round(0.4 * (width - 1)))
    assert where(text, "★") == (11, round(0.8 * (width - 1)))
    assert where(text, "·") == (8, round(0.5 * (width - 1)))
    assert "loss (less is better)" in text.splitlines()[0]
    assert "acc →" in text
    for name in ("base", "math", "3 (knee)"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 72


def test_a_picked_trial_is_marked() -> None:
    text = front_text(DATA, 72, picked=2).plain
    assert where(text, "◉")[0] == 15
    assert "picked" in text
    assert "picked" not in front_text(DATA, 72).plain


def test_ascii_terminals_get_ascii() -> None:
    text = front_text(DATA, 72, plain=True).plain
    assert text.isascii()
    assert "B base" in text
    assert "E expert" in text


def test_one_objective_is_drawn_over_the_trials() -> None:
    single = narrowed(DATA, ["acc"])
    text = front_text(single, 72).plain
    assert where(text, "■") == (0, 0)
    assert where(text, "◆") == (15, round(1 / 4 * 60))
    assert "trial →" in text


def test_one_point_alone_stands_in_the_middle() -> None:
    text = front_text(replace(DATA, points=DATA.points[:1], knee=None), 40).plain
    assert where(text, "■")[0] in (7, 8)


def test_each_point_is_placed_by_the_items_that_the_note_names() -> None:
    """As in the table: the front and baselines by test items; the cloud by search items."""
    assert front_text(DATA, 72).plain.splitlines()[-1].strip() == "scores on search items"
    held = Measured((0.9, 3.5), (0.0, 0.0))
    tested = [
        replace(one, validation=held, test=Measured((0.2, 0.5), (0.0, 0.0)))
        if one.number == 2
        else replace(one, validation=held)
        if one.number == 4
        else replace(one, test=one.search)
        for one in DATA.points
    ]
    text = front_text(replace(DATA, points=tuple(tested)), 72).plain
    assert where(text, "●")[1] == round(0.2 * 60)
    assert where(text, "·")[1] == round(0.5 * 60)
    note = text.splitlines()[-1].strip()
    assert note == "front and baselines by test items; other trials by search items"


def test_pairs_of_more_objectives_keep_the_front_of_all(view: StudyView) -> None:
    data = front_data(view)
    pair = narrowed(data, ["nll", "reverse"])
    assert [one.name for one in pair.objectives] == ["nll", "reverse"]
    for before, after in zip(data.points, pair.points, strict=True):
        assert (before.front, before.recipe) == (after.front, after.recipe)
        assert before.search is not None
        assert after.search is not None
        assert after.search.values == (before.search.values[2], before.search.values[0])
    with pytest.raises(InputError, match=r"--objectives: unknown 'srt' \(did you mean 'sort'"):
        narrowed(data, ["srt"])
    with pytest.raises(InputError, match="each one once"):
        narrowed(data, ["sort", "sort"])


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evomerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, output.out, output.err


class TestCommand:
    def test_no_picture_without_a_terminal_unless_asked(
        self, view: StudyView, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def drawn(*options: str) -> str:
            code, out, err = call(capsys, monkeypatch, "front", view.directory, *options)
            assert (code, err) == (0, "")
            return out

        assert "expert:one" in drawn()
        assert "sort →" not in drawn()
        both = drawn("--plot", "-")
        assert "↑ sort" in both
        assert "reverse →" in both
        assert "Other pairs: --objectives A,B of reverse, sort, nll" in both
        other = drawn("--objectives", "nll,sort")
        assert "nll (less is better) →" in other
        assert "Other pairs" not in other

    def test_plot_pick_and_objectives_work_together(
        self, view: StudyView, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        for name in ("front.html", "front.svg", "front.png"):
            path = tmp_path / name
            options = ("--plot", path, "--pick", "best:sort", "--objectives", "nll,sort")
            code, out, _ = call(capsys, monkeypatch, "front", view.directory, *options)
            assert code == 0
            assert f"best:sort picks trial {view.best('sort')}:" in out
            assert "◉" in out or path.suffix
            assert path.stat().st_size > 1000
        page = (tmp_path / "front.html").read_text()
        assert '"name":"nll"' in page
        assert '"name":"reverse"' not in page

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--plot", "x.jpg"), "use a name that ends in .html, .png or .svg, or -"),
            (("--plot", "-", "--objectives", "reverse,sort,nll"), "one or two can be drawn here"),
            (("--plot", "-", "--json"), "--json prints one document: give --plot a file"),
            (("--objectives", "sort", "--json"), "--objectives says what to draw"),
            (("--objectives", "x"), "--objectives: unknown 'x'"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(
        self, view: StudyView, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str,
    ) -> None:  # fmt: skip
        code, _, err = call(capsys, monkeypatch, "front", view.directory, *options)
        assert code == 2
        assert message in err
