"""What is shown while a study runs: the same numbers that its journal gives afterwards."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from small_study import small_study
from toy_study import toy_splits, toy_study

from evomerge.growing_front import GrowingFront, reference_point
from evomerge.live_progress import LiveProgress, _Speed
from evomerge.racing import Racing
from evomerge.study_listener import Progress, StudyListener
from evomerge.trial import Objective

RACING = Racing(rungs=(5, 10, 20), z=0.5, least=3)


class Clock:
    """Half a minute between any two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 30.0
        return self.now


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_plain_lines_say_all_of_it(tmp_path: Path) -> None:
    stream = io.StringIO()
    study = small_study(tmp_path / "s", objectives=2)
    live = LiveProgress(Console(file=stream, width=300), study.objectives, Clock())
    study.listeners = (live,)
    view = study.run()
    found = [line for line in lines(stream.getvalue()) if line.startswith("search: ")]
    assert found[0] == "search: 12 trials"
    middle = found[len(found) // 2]
    for words in (
        "about 0:",
        " left ",
        " running; ",
        "items scored (",
        " a second); ",
        "hypervolume 0.",
    ):
        assert words in middle, middle
    last = found[-1]
    assert last.startswith("search: 12/12 ")
    assert "1 failed" in last
    assert "left" not in last
    assert f"hypervolume {view.hypervolume:.4g};" in last
    for name, column in (("reverse", 0), ("sort", 1)):
        best = max(t.evaluation.values[column] for t in view.trials if t.evaluation)
        assert f"{name} {best:.3f}" in last
    assert "trial 10 failed (error): ValueError: diverged on purpose" in stream.getvalue()


def test_a_terminal_gets_a_table(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    study = small_study(tmp_path / "s", objectives=3)

    class Look(StudyListener):
        """Draws once in the middle of the search."""

        shown = ""

        def on_progress(self, progress: Progress) -> None:
            if progress.phase == "search" and progress.done == 8:
                assert live._bar is not None
                # Elsewhere: the bars are drawn again and again by a thread.
                page = Console(file=io.StringIO(), width=100)
                with page.capture() as captured:
                    page.print(*live._bar.get_renderables(), sep="\n")
                self.shown = captured.get()

    look = Look()
    live = LiveProgress(console, study.objectives, Clock())
    study.listeners = (live, look)
    with live:
        view = study.run()
    shown = lines(look.shown)
    (counts,) = [line for line in shown if line.startswith("8 done; ")]
    assert "1 failed" in " ".join(shown)
    assert counts.split("; ")[1].endswith(" running")
    place = next(k for k, line in enumerate(shown) if line.startswith("best so far of each"))
    base = view.trials[0].evaluation
    assert base is not None
    for row, objective in enumerate(view.objectives):
        line = shown[place + 1 + row]
        assert line.startswith(f"{objective.name} ")
        assert f" base {base.values[row]:.3f}" in line
        assert line.endswith("less is better") == (objective.name == "nll")


def test_the_volume_is_that_of_the_journal_also_after_a_stop(tmp_path: Path) -> None:
    def volume(directory: Path) -> float:
        study = toy_study(directory, splits=toy_splits(2, 40), racing=RACING)
        live = LiveProgress(Console(file=io.StringIO()), study.objectives)
        study.listeners = (live,)
        view = study.run()
        assert live._front is not None
        assert live._front.volume == pytest.approx(view.hypervolume, rel=1e-12)
        assert view.spending.stops > 0, "the race must leave trials out"
        return live._front.volume

    first = volume(tmp_path / "s")
    assert volume(tmp_path / "s") == first, "told again from the journal"


def test_more_objectives_than_fit_are_counted() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    live = LiveProgress(console, [Objective(f"o{k}") for k in range(11)])
    live._best = [0.5] * 11
    shown = live._below(Progress("search", 1, 1, 2))
    with console.capture() as captured:
        for part in shown:
            console.print(part)
    assert "and 3 more" in captured.get()
    assert "o8" not in captured.get()


def test_speed_is_that_of_the_last_minutes_and_begins_anew() -> None:
    speed = _Speed()
    assert speed.per_second == 0.0
    for now, count in ((0.0, 0), (100.0, 1000), (200.0, 1100), (300.0, 1200)):
        speed.see(now, count)
    assert speed.per_second == pytest.approx(1.0)
    speed.see(310.0, 5)
    assert speed.per_second == 0.0
    speed.see(311.0, 8)
    assert speed.per_second == pytest.approx(3.0)


def test_a_growing_front_by_hand() -> None:
    assert reference_point([(0.0, 1.0), (1.0, 1.0)]) == pytest.approx((1.1, 1.1))
    front = GrowingFront((1.0, 1.0))
    volumes = []
    for point in ((0.5, 0.5), (0.6, 0.6), (0.25, 0.75), (2.0, 0.0), (0.0, 0.0)):
        front.add(point)
        volumes.append(front.volume)
    assert volumes == pytest.approx([0.25, 0.25, 0.3125, 0.3125, 1.0])
