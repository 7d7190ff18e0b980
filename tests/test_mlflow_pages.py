"""What MLflow is given to show: saved views, the film of the front, pages without scripts."""

from __future__ import annotations

import base64
import io
import json
import re
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from small_study import finished, small_study

from evomerge.cli import cli
from evomerge.coefficient_page import coefficient_html
from evomerge.coverage import Coverage, coverage, coverage_html
from evomerge.errors import SetupError
from evomerge.front_frames import FRAMES, frame, frame_steps
from evomerge.front_plot import front_picture
from evomerge.pareto_view import STUDIES, front_query, pareto_view, studies_view
from evomerge.presentation import front_data, project
from evomerge.projection import coefficient_params, study_metrics, trial_params
from evomerge.study_note import study_note
from evomerge.study_view import StudyView
from evomerge.trial import Score
from evomerge.ui_server import free_port, ui_server
from evomerge.waiting_line import waiting_line


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return finished(tmp_path_factory.mktemp("study") / "strings", 3, budget=60)


def state_of(value: str) -> dict[str, Any]:
    """Read a saved view as MLflow's user interface does."""
    envelope = json.loads(value)
    assert isinstance(envelope["createdAt"], int)
    packed = envelope["state"].removeprefix("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


class TestViews:
    def test_a_scatter_for_every_pair_and_parallel_coordinates(self) -> None:
        state = state_of(pareto_view("s", "abc", ["a", "b", "c"], ["weight.x"], 5))
        cards = state["compareRunCharts"]
        axes = {(c["xaxis"]["key"], c["yaxis"]["key"]) for c in cards if c["type"] == "SCATTER"}
        assert axes == {("a", "b"), ("a", "c"), ("b", "c")}
        [parallel] = [card for card in cards if card["type"] == "PARALLEL"]
        assert parallel["selectedMetrics"] == ["a", "b", "c"]
        assert parallel["selectedParams"] == ["weight.x"]
        sections = {one["uuid"]: one["display"] for one in state["compareRunSections"]}
        assert {card["metricSectionId"] for card in cards} == {
            uuid for uuid, display in sections.items() if display
        }
        assert "'abc'" in state["searchFilter"]

    def test_many_objectives_fit_a_tag(self) -> None:
        names = [f"a_rather_long_objective_name_{number}" for number in range(12)]
        value = pareto_view("study", "f" * 32, names, [f"weight.{name}" for name in names], 5)
        assert len(value) <= 5000

    def test_one_objective_has_bars(self) -> None:
        cards = state_of(pareto_view("s", "abc", ["a"], [], 5))["compareRunCharts"]
        assert [card["type"] for card in cards] == ["BAR", "PARALLEL"]

    def test_studies_have_their_objectives_as_columns(self) -> None:
        state = state_of(studies_view([["math", "code"], ["chat", "math"]], 5))
        columns = [one.removeprefix("metrics.`").rstrip("`") for one in state["selectedColumns"]]
        assert columns[:4] == ["math", "code", "chat", "hypervolume"]

    def test_many_studies_fit_a_tag(self) -> None:
        names = [[f"{chr(97 + n % 26) * 30} {n}" for n in range(k, k + 20)] for k in range(200)]
        assert len(studies_view(names, 5)) <= 5000


class TestFrames:
    def test_a_few_tens_whatever_the_size(self) -> None:
        assert len(frame_steps(10_000, 10_000, 1)) == FRAMES
        assert frame_steps(10_000, 10_000, 1)[-1] == 10_000
        assert frame_steps(4, 4, 1) == [1, 2, 3, 4]
        assert frame_steps(100, 50, 10) == [s for s in frame_steps(100, 100, 1) if 10 <= s <= 50]

    def test_a_frame_knows_nothing_of_later_trials(self, view: StudyView) -> None:
        data = front_data(view)
        shown = frame(data, 9)
        assert {point.number for point in shown.points} <= set(range(9))
        assert all(point.validation is None and point.test is None for point in shown.points)
        losses = {
            p.number: tuple(
                o.loss(v) for o, v in zip(data.objectives, p.search.values, strict=True)
            )
            for p in shown.points
            if p.search is not None
        }
        for point in shown.points:
            worse = [
                other
                for other in losses.values()
                if other != losses[point.number]
                and all(a <= b for a, b in zip(other, losses[point.number], strict=True))
            ]
            assert point.front == (not worse)
        assert shown.knee in {point.number for point in shown.points if point.front}

    def test_it_is_a_picture(self, view: StudyView) -> None:
        pixels = front_picture(frame(front_data(view), 12))
        assert pixels.shape[2] == 3
        assert pixels.std() > 5  # something is drawn


class TestParams:
    def test_whole_columns_and_halves_of_the_depth(self, view: StudyView) -> None:
        trial = view.trials[-1]
        params = trial_params(trial)
        assert len(params) <= 10
        column = trial.recipe.column("weight.one")
        half = len(column) // 2
        assert float(params["weight.one"]) == pytest.approx(sum(column) / len(column), abs=1e-4)
        upper = column[half:]
        assert float(params["weight.one upper half"]) == pytest.approx(
            sum(upper) / len(upper), abs=1e-4
        )
        assert coefficient_params(trial.recipe) == ("weight.one", "weight.two", "weight.three")

    def test_the_study_has_the_recommended_values(self, view: StudyView) -> None:
        assert view.knee is not None
        names = [objective.name for objective in view.objectives]
        expected = dict(zip(names, view.test[view.knee].values, strict=True))
        assert study_metrics(front_data(view)) == expected


def test_the_description_says_what_and_where(view: StudyView) -> None:
    note = study_note(project(view), "abc", "#/pareto")
    first = note.splitlines()[2]
    assert "](#/pareto)" in first  # MLflow shows the first lines only
    assert front_query("abc") in note
    assert f"evomerge export {view.directory} --trial {view.knee}" in note
    assert re.search(r"it gains [+-]\d\.\d{3} ± 0\.\d{3} in reverse over the best single exp", note)
    assert "the uniform average" in note
    assert "12 coefficients of `task_arithmetic`" in note


def test_the_series_have_the_rate(view: StudyView) -> None:
    steps = project(view).steps
    rates = [step.metrics["trials/per hour"] for step in steps if "trials/per hour" in step.metrics]
    assert len(rates) > len(steps) / 2
    assert all(rate > 0 for rate in rates)


class TestCoefficients:
    def test_a_heat_map_for_every_member(self, view: StudyView) -> None:
        page = coefficient_html(front_data(view))
        assert page.count("<svg") == len(view.front)
        assert "<script" not in page
        assert view.knee is not None
        value = view.trials[view.knee].recipe.table[0][0]
        assert f"weight.one, embed: {value:.3f}" in page


class TestCoverage:
    ONE = Coverage(
        "math",
        "test",
        ("i0", "i1", "i2", "i3"),
        ("expert:a", "expert:b", "trial 9 (recommended)"),
        (0, 1),
        (
            (True, True, False, False),
            (True, False, True, False),
            (True, True, False, False),
        ),
    )

    def test_alone(self) -> None:
        assert self.ONE.alone(0) == (1,)
        assert self.ONE.alone(1) == (2,)

    def test_the_page_counts(self) -> None:
        page = coverage_html("s", [self.ONE])
        assert "<td>expert:a</td><td>2</td><td>1</td><td>1</td><td>i1</td>" in page
        assert "<td>expert:b</td><td>2</td><td>1</td><td>0</td><td>i2</td>" in page
        assert "<td>no expert</td><td>1</td>" in page

    def test_graded_scores_have_none(self, view: StudyView) -> None:
        assert coverage(view) == ()

    def test_comes_from_the_held_out_items(self, view: StudyView) -> None:
        def solved(evaluation: Any, number: int) -> Any:
            scores = tuple(
                Score(0.5, 0.1, tuple(float((i + number) % 2) for i in range(len(score.items))))
                for score in evaluation.scores
            )
            return replace(evaluation, scores=scores)

        results = {
            key: replace(result, value=solved(result.value, key[1])) if key[0] == "test" else result
            for key, result in view.results.items()
        }
        found = coverage(replace(view, results=results))
        # The third objective is to be small: nothing is solved there.
        assert [one.objective for one in found] == ["reverse", "sort"]
        assert found[0].split == "test"
        assert found[0].items == ("10", "11", "12")
        assert [found[0].models[row] for row in found[0].experts] == [
            "expert:one", "expert:two", "expert:three",
        ]  # fmt: skip
        assert found[0].models[-1] == f"trial {view.knee} (recommended)"


class TestWaiting:
    def test_a_pipe_gets_a_line_now_and_then(self) -> None:
        said = io.StringIO()
        with waiting_line("the end", Console(file=said), 0.01):
            while said.getvalue().count("\n") < 3:
                time.sleep(0.01)
        lines = said.getvalue().splitlines()
        assert lines[:2] == ["waiting for the end ...", "still waiting for the end (0 s) ..."]
        count = len(lines)
        time.sleep(0.05)
        assert said.getvalue().count("\n") == count

    def test_a_terminal_gets_one_line_that_counts(self) -> None:
        said = io.StringIO()
        with waiting_line("the end", Console(file=said, force_terminal=True, width=60)):
            time.sleep(0.3)
        assert re.search(r"waiting for the end.*0:00:00", said.getvalue())


class TestUi:
    def test_a_taken_port_is_an_error(self, tmp_path: Path) -> None:
        import socket

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with (
                pytest.raises(SetupError, match=rf"port {port} is taken .*--port"),
                ui_server(f"sqlite:///{tmp_path}/mlflow.db", port),
            ):
                pass

    def test_a_study_on_a_server_starts_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from evomerge import launch
        from evomerge.tracking_target import Synced, tracking_target

        target = tracking_target("http://tracking:5000", "e", tmp_path)
        monkeypatch.setattr(launch, "locate_study", lambda view: (target, Synced("7", "abc", 0)))
        small_study(tmp_path / "s").run()
        for page, key, mode in (("pareto", "abc", "CHART"), ("studies", STUDIES, "TABLE")):
            done = CliRunner().invoke(
                cli, ["ui", str(tmp_path / "s"), "--no-browser", "--page", page]
            )
            assert done.stdout.startswith(
                f"http://tracking:5000/#/experiments/7/runs?viewStateShareKey={key}"
                f"&compareRunsMode={mode}"
            )
            assert done.stderr == "waiting for MLflow to hold all of the study ...\n"
        refused = CliRunner().invoke(cli, ["ui", str(tmp_path / "s"), "--port", str(free_port())])
        assert "nothing is started" in str(refused.exception)
