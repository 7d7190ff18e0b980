"""The front page, its table and its picture, from real studies; browsers are tested elsewhere."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_study import BLOCKS, finished, recipe, small_study

from evomerge.front_page import MAX_BLOCKS, FrontData, front_html, summary
from evomerge.front_plot import save_front
from evomerge.front_table import front_csv, front_markdown
from evomerge.presentation import export_command, front_data, verify_command
from evomerge.recipe import ModelRef
from evomerge.study_view import StudyView


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return finished(tmp_path_factory.mktemp("study") / "strings", 2, budget=40)


@pytest.fixture(scope="module")
def data(view: StudyView) -> FrontData:
    return front_data(view)


def embedded(page: str) -> dict[str, Any]:
    """Return the data that the page's script reads."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    content: dict[str, Any] = json.loads(found.group(1))
    return content


class TestData:
    def test_front_and_knee_are_those_of_the_study(self, data: FrontData, view: StudyView) -> None:
        assert tuple(p.number for p in data.points if p.front) == view.front
        assert data.knee == view.knee
        assert data.blocks == BLOCKS

    def test_every_trial_with_a_score_is_a_point(self, data: FrontData, view: StudyView) -> None:
        done = [trial.number for trial in view.trials if trial.evaluation is not None]
        assert [point.number for point in data.points] == done
        assert len(done) == len(view.trials) - 1  # one fails on purpose

    def test_baselines_have_their_kinds_and_one_grid_point_is_the_best(
        self, data: FrontData, view: StudyView
    ) -> None:
        kinds = {point.label: point.kind for point in data.points if point.label}
        best = kinds.pop("task_arithmetic:0.8")
        other = kinds.pop("task_arithmetic:0.4")
        assert kinds == {
            "base": "base", "expert:one": "expert", "expert:two": "expert",
            "expert:three": "expert", "uniform": "uniform",
        }  # fmt: skip
        means = {trial.label: sum(view.validation[trial.number].values) for trial in view.baselines}
        if means["task_arithmetic:0.8"] < means["task_arithmetic:0.4"]:
            best, other = other, best
        assert (best, other) == ("task_arithmetic", "grid")

    def test_a_running_study_shows_search_scores(self, view: StudyView) -> None:
        early = replace(view, results={k: v for k, v in view.results.items() if k[0] == "search"})
        points = front_data(early).points
        assert all(point.validation is None for point in points)
        assert all(point.shown == point.search for point in points)

    def test_a_study_without_results_has_an_empty_page(self, view: StudyView) -> None:
        empty = replace(view, trials=(), results={}, times={}, front=(), knee=None)
        page = front_html(front_data(empty))
        assert embedded(page)["points"] == []

    def test_the_command_is_relative_below_the_current_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = small_study(tmp_path / "studies" / "my study", budget=2).run()
        absolute = f"'{tmp_path}/studies/my study'"
        assert (
            export_command(made, "--knee", "out") == f"evomerge export {absolute} --knee --out out"
        )
        monkeypatch.chdir(tmp_path)
        assert export_command(made, "--knee", "out") == (
            "evomerge export 'studies/my study' --knee --out out"
        )

    def test_merged_factors_are_taken_home_as_an_adapter(
        self, view: StudyView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They were advised to be written as a whole checkpoint."""
        factors = tuple(
            replace(trial, recipe=replace(trial.recipe, method="lora_factors"))
            for trial in view.trials
        )
        made = replace(view, trials=factors)
        assert export_command(made, "--knee", "out").endswith(" --knee --lora --out out")
        assert export_command(view, "--knee", "out").endswith(" --knee --out out")
        # The base of an adapter is not in the export.
        (tmp_path / "base").mkdir()
        monkeypatch.chdir(tmp_path)
        base = ModelRef("base", str(tmp_path / "base"), "f0")
        local = [replace(one, recipe=replace(one.recipe, base=base)) for one in factors]
        assert verify_command(replace(made, trials=tuple(local)), "out") == (
            "evomerge verify out --base base"
        )
        hub = replace(base, source="org/base@main")
        remote = [replace(one, recipe=replace(one.recipe, base=hub)) for one in factors]
        assert verify_command(replace(made, trials=tuple(remote)), "out") == "evomerge verify out"
        assert verify_command(view, "out") == "evomerge verify out"


class TestPage:
    def test_asks_for_nothing_outside_itself(self, data: FrontData) -> None:
        page = front_html(data)
        addresses = set(re.findall(r"""(?:https?:)?//[\w.-]+\.[a-z]{2,}[^"'\s]*""", page))
        assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG, never fetched
        assert re.findall(r"<(?:link|script|img)[^>]*(?:src|href)=(?!\"data:)", page) == []
        assert "default-src 'none'" in page

    def test_is_small(self, data: FrontData) -> None:
        assert len(front_html(data)) < 45_000

    def test_it_did_not_say_that_it_shows_other_items_than_the_pictures(
        self, data: FrontData
    ) -> None:
        assert embedded(front_html(data))["items"] == (
            "Drawn: front and baselines by validation items; other trials by search or validation "
            "items. The table below has test scores too; PNG and terminal plots are drawn by those."
        )
        early = [replace(point, validation=None, test=None) for point in data.points]
        page = front_html(replace(data, points=tuple(early)))
        assert embedded(page)["items"] == "Drawn: scores on search items."
        assert page.count('$("items").textContent') == page.count('id="items"') == 1

    def test_carries_all_splits(self, data: FrontData, view: StudyView) -> None:
        page = embedded(front_html(data))
        assert view.knee is not None
        knee = next(point for point in page["points"] if point["n"] == view.knee)
        for key, evaluation in (
            ("s", view.trials[view.knee].evaluation),
            ("v", view.validation[view.knee]),
            ("t", view.test[view.knee]),
        ):
            assert evaluation is not None
            assert knee[key] == pytest.approx(evaluation.values, abs=1e-6)
        assert knee["se"] == [0.02, 0.02]
        assert len(knee["w"]) == len(BLOCKS)

    def test_names_cannot_break_out_of_the_script(self, data: FrontData) -> None:
        evil = "</script><script>alert(1)</script><!--"
        page = front_html(replace(data, title=evil))
        assert page.count("</script>") == 2
        assert embedded(page)["title"] == evil

    def test_minimised_objectives_say_so(self, tmp_path: Path) -> None:
        page = embedded(front_html(front_data(finished(tmp_path, 3))))
        assert [axis["maximize"] for axis in page["axes"]] == [True, True, False]
        assert page["axes"][2]["unit"] == "nats"

    def test_many_blocks_are_averaged_in_groups(self, data: FrontData) -> None:
        rows = 3 * MAX_BLOCKS + 1
        table = [(float(row), 0.0, 0.0) for row in range(rows)]
        point = replace(data.points[0], recipe=recipe(table))
        blocks = tuple(f"t{row}" for row in range(rows))
        page = embedded(front_html(replace(data, blocks=blocks, points=(point,))))
        averaged = page["points"][0]["w"]
        assert len(averaged) == len(page["blocks"]) <= MAX_BLOCKS
        assert averaged[0] == [1.5, 0.0, 0.0]  # rows 0 to 3
        assert page["block_count"] == rows


def test_the_summary_of_many_columns_names_the_largest() -> None:
    columns = tuple(f"{kind}.e{k:02d}" for kind in ("weight", "density") for k in range(30))
    row = tuple([0.01 * k * (-1) ** k for k in range(30)] + [0.5] * 30)
    many = replace(recipe([(0.0, 0.0, 0.0)]), columns=columns, table=(row,))
    assert summary(many).endswith(
        ": e29 -0.29, e28 0.28, e27 -0.27, e26 0.26, e25 -0.25, e24 0.24, e23 -0.23, e22 0.22, and "
        "52 smaller or other numbers"
    )


def test_the_summary_gives_means_and_ranges() -> None:
    assert summary(recipe([(0.2, 0.5, 0.0), (0.4, 0.5, 0.0)])) == (
        "task_arithmetic: one 0.30 (0.20 to 0.40), two 0.50, three 0.00"
    )


class TestTable:
    def test_csv_restores_the_numbers(self, data: FrontData, view: StudyView) -> None:
        rows = list(csv.DictReader(io.StringIO(front_csv(data))))
        shown = [p for p in data.points if p.front or p.kind not in ("search", "grid")]
        assert {int(row["trial"]) for row in rows} == {point.number for point in shown}
        for row in rows:
            number = int(row["trial"])
            assert float(row["validation/sort"]) == view.validation[number].values[1]
            assert float(row["test/reverse_se"]) == 0.02
            assert (row["front"] == "True") == (number in view.front)
        assert [int(row["trial"]) for row in rows if row["knee"] == "True"] == [view.knee]

    def test_markdown_shows_test_scores_and_marks_the_front(
        self, data: FrontData, view: StudyView
    ) -> None:
        text = front_markdown(data)
        assert "held-out test items" in text
        assert view.knee is not None
        value = view.test[view.knee].values[0]
        [line] = [line for line in text.splitlines() if "(knee)" in line]
        assert line.startswith("| **")
        assert f"| {view.knee} | {value:.3f} ± 0.020 |" in line


class TestPicture:
    @pytest.mark.parametrize("objectives", [1, 2, 3])
    def test_draws_png_and_svg(self, tmp_path: Path, objectives: int) -> None:
        made = front_data(finished(tmp_path / "study", objectives))
        save_front(made, tmp_path / "front.png")
        save_front(made, tmp_path / "front.svg")
        assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "front.png").stat().st_size > 15_000
        assert "expert one" in comments(tmp_path / "front.svg")
        note = "front and baselines by test items; other trials by search items"
        assert note in comments(tmp_path / "front.svg")


def test_importing_the_picture_module_loads_nothing_heavy() -> None:
    code = (
        "import sys, evomerge.front_plot; "
        "assert not {'matplotlib', 'mlflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def comments(path: Path) -> str:
    """Return the texts of an SVG, which matplotlib writes as comments beside their outlines."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text()))
