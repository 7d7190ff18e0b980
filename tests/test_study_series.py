"""What a study's run shows over the trials is never taken back: MLflow can change no point."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_study import Formula, small_study

from evomerge.errors import NothingUsableError
from evomerge.pool import SerialPool
from evomerge.study_listener import StudyListener
from evomerge.study_record import Result
from evomerge.study_series import Series
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Job, Trial


class Broken(Formula):
    """Fails from a trial on, but for one in seven."""

    def __init__(self, first: int) -> None:
        self._first = first

    def run(self, job: Job) -> Evaluation:
        if job.number >= self._first and job.number != self._first + 7:
            raise ValueError("no disk")
        return super().run(job)


class Watching(StudyListener):
    """Remembers how many steps there were after every result."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: list[tuple[object, ...]] = []

    def on_result(self, trial: Trial, result: Result) -> None:
        self.seen.append(Series().steps(StudyView.load(self.directory)))


@pytest.mark.parametrize("first", [0, 6, 9])
def test_trials_that_were_run_again_left_the_points_of_their_failures(
    tmp_path: Path, first: int
) -> None:
    """A study that stopped had no best values and no hypervolume at those steps, for good."""
    broken = small_study(
        tmp_path / "s", budget=30, listeners=[watching := Watching(tmp_path / "s")]
    )
    broken.make_pool = lambda: SerialPool(lambda: Broken(first))
    with pytest.raises(NothingUsableError, match="10 trials in a row failed"):
        broken.run()
    stopped = Series().steps(StudyView.load(tmp_path / "s"))
    whole = Series().steps(small_study(tmp_path / "s", budget=30).run())
    assert len(whole) == 37
    times = [step.milliseconds for step in whole]
    assert times == sorted(times)
    for steps in (*watching.seen, stopped):
        assert steps == whole[: len(steps)]
    assert len(stopped) == (first + 8 if first + 8 > 7 else 0)


def test_a_finished_study_shows_its_last_failures(tmp_path: Path) -> None:
    study = small_study(tmp_path / "s")
    study.make_pool = lambda: SerialPool(lambda: Broken(15))
    view = study.run()
    steps = Series().steps(view)
    assert len(steps) == len(view.trials)
    assert steps[-1].metrics["trials/failed"] == view.counts.failed > 3
