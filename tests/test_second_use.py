"""More of what a newcomer ran into: bounds, budgets, machines, studies that an error stopped."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from small_study import finished, small_study
from test_cli import call
from tiny_project import tiny_project
from toy_study import OBJECTIVES, recipe, toy_study

from evomerge import capacity
from evomerge.config import PoolSection, load
from evomerge.errors import InputError, SetupError
from evomerge.estimate import Endpoint, Estimation, Estimator
from evomerge.facts import front_facts, plan_facts, plan_lines, status_facts, status_lines
from evomerge.front_page import front_html
from evomerge.front_table import front_markdown
from evomerge.gain import gains
from evomerge.item_cache import Items
from evomerge.prepare import Prepared, prepare
from evomerge.presentation import front_data
from evomerge.study_listener import Progress
from evomerge.study_view import StudyState, StudyView
from evomerge.template import study_template
from evomerge.terminal import LiveProgress, front_table, gains_table
from evomerge.trial import Direction, Evaluation, Objective, Score, Trial


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, save_llama: Callable[..., Path]) -> Path:
    return tiny_project(tmp_path_factory.mktemp("second"), save_llama)


def prepared(folder: Path, *overrides: str) -> Prepared:
    return prepare(load(folder / "study.yaml", overrides), folder / "study.yaml")


# -- the machine ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "there", "warning"),
    [
        ({"workers": 2, "gpus_per_worker": 1}, 1, "2 workers with 1 GPU each need 2, this machine"),
        ({"workers": 1, "gpus_per_worker": 0.5}, 0, "0.5, this machine has none that torch can"),
        ({"workers": 2, "gpus_per_worker": 0.5}, 1, ""),
        ({"kind": "serial", "device": "cuda"}, 0, "pool.device: cuda needs a GPU"),
        ({"kind": "serial", "device": "cuda"}, 1, ""),
        ({"kind": "serial", "gpus_per_worker": 1}, 0, ""),
        ({"workers": 2, "gpus_per_worker": 1, "device": "cpu"}, 0, ""),
    ],
)
def test_gpus_that_are_not_there_were_not_mentioned(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], there: int, warning: str
) -> None:
    monkeypatch.setattr(capacity, "gpu_count", lambda: there)
    pool = PoolSection.model_validate(settings)
    found = capacity._gpu_warnings(pool, pool.workers)
    assert [warning in line for line in found] == [True] * bool(warning)


def test_check_warns_of_missing_gpus_and_says_nothing_of_a_cluster(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("pool={kind: ray, workers: 1, gpus_per_worker: 1, device: auto}",)
    monkeypatch.setattr(capacity, "gpu_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert any(
        "pool.gpus_per_worker: 1 worker " in one for one in prepared(project, *asked).warnings
    )
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere")
    monkeypatch.setattr(capacity, "gpu_count", lambda: pytest.fail("a cluster's GPUs are not here"))
    assert not any("gpus_per_worker" in one for one in prepared(project, *asked).warnings)


def test_run_waited_for_ray_before_it_missed_the_gpus(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class JoinedError(Exception):
        """Instead of a Ray."""

    def started(*_: object, **__: object) -> None:
        raise JoinedError

    monkeypatch.setattr("evomerge.ray_pool.RayPool", started)
    monkeypatch.setattr(capacity, "gpu_count", lambda: 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    two = "pool={kind: ray, workers: 2, gpus_per_worker: 1}"
    code, _, err = call(
        capsys, monkeypatch, "run", str(project / "study.yaml"), "--set", two, "--set", "name=gpus"
    )
    assert code == 2
    assert "error: pool.gpus_per_worker: 2 workers with 1 GPU each need 2, this machine has 1" in (
        " ".join(err.split())
    )
    with pytest.raises(JoinedError):
        prepared(project, two.replace("2", "1")).make_pool()
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # its nodes may still join
    with pytest.raises(JoinedError):
        prepared(project, two).make_pool()


def test_gpus_are_only_counted_where_some_are_asked_for(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "gpu_count", lambda: pytest.fail("nobody asked for a GPU"))
    prepared(project)
    monkeypatch.undo()
    assert capacity.gpu_count() >= 0


def test_a_serial_pool_took_the_workers_that_it_does_not_have(project: Path) -> None:
    serial = prepared(project, "pool={kind: serial, workers: 8}")
    assert serial.parallel == 2
    assert any("pool.workers: 8, but kind: serial works alone" in one for one in serial.warnings)
    silent = prepared(project, "pool={kind: serial}")
    assert silent.parallel == 2, "the default of two workers is no wish"
    assert not any("pool.workers" in one for one in silent.warnings)
    initial = prepared(project, "pool={kind: serial, workers: 2}")
    assert not any("pool.workers" in one for one in initial.warnings), "init wrote the 2"
    assert "one at a time, 2 outstanding" in plan_lines(initial)["search"]
    on_ray = plan_lines(prepared(project, "pool={kind: ray, workers: 8}"))
    assert "8 at a time, 16 outstanding" in on_ray["search"]
    assert prepared(project, "pool={kind: ray, workers: 8}").parallel == 16
    assert prepared(project, "pool={kind: serial}", "search.parallel=5").parallel == 5


# -- budgets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (("search={searcher: random, items: 11}",), "11 item evaluations buy not one trial (a tr"),
        (("search={searcher: random, items: 12}",), ""),
        (
            ("search={searcher: nsga2, items: 100, arguments: {population: 20}}",),
            "100 item evaluations buy 8 trials (nsga2 learns after 20 trials of 12 items, 240 in",
        ),
        (("search={searcher: nsga2, items: 240, arguments: {population: 20}}",), ""),
        (("search={searcher: cma, items: 47}",), "buy 3 trials (cma learns after "),
        (("search={searcher: nsga2, items: 36}",), "(nsga2 learns after 4 trials of 12 items, 48"),
        (("search={searcher: nsga2, items: 600}",), ""),
        (
            ("search={searcher: random, items: 9}", "fitness.estimator={name: cells, items: 5}"),
            "(a trial takes 10;",
        ),
    ],
)
def test_a_budget_below_one_generation_was_not_mentioned(
    project: Path, overrides: tuple[str, ...], warning: str
) -> None:
    found = [one for one in prepared(project, *overrides).warnings if "search.items" in one]
    assert [warning in one for one in found] == [True] * bool(warning)


# -- bounds ---------------------------------------------------------------------------------

BOUNDED = "fitness.tasks=[{task: pick_a, min: 0.6, max: 0.9}, pick_b]"


def test_check_did_not_print_bounds(project: Path) -> None:
    study = prepared(project, BOUNDED)
    first, second = plan_lines(study)["objectives"]
    assert first.startswith("pick_a (maximize, min 0.6, max 0.9): 6 search")
    assert second.startswith("pick_b (maximize): 6 search")
    facts = plan_facts(study)["objectives"]
    assert (facts["pick_a"]["min"], facts["pick_a"]["max"]) == (0.6, 0.9)
    assert "min" not in facts["pick_b"]


def shown(view: StudyView) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(front_table(view))
    return stream.getvalue()


def test_values_outside_their_bounds_were_not_marked(tmp_path: Path) -> None:
    view = finished(tmp_path / "s")
    assert "!" not in shown(view)
    values = sorted({round(view.test[n].values[0], 3) for n in view.front})
    assert len(values) > 1, "the front must have members on both sides"
    bound = sum(values[-2:]) / 2
    bounded = replace(
        view, objectives=(replace(view.objectives[0], minimum=bound), *view.objectives[1:])
    )
    text = shown(bounded)
    marked = [line for line in text.splitlines() if re.search(r"±\d\.\d+ !", line)]
    broken = [n for n in view.test if view.test[n].values[0] < bound]
    assert 0 < len(marked) <= len(broken)
    for number in view.front:
        line = next(
            one
            for one in text.splitlines()
            if f"trial {number} " in one
            or (view.trial(number).label and view.trial(number).label in one)
        )
        assert (" !" in line) == (number in broken)
    assert f"! outside its bounds (reverse min {bound:g})" in text
    markdown = front_markdown(front_data(bounded))
    assert re.search(r"± \d\.\d+ ! \|", markdown)
    assert f"! outside its bounds (reverse min {bound:g})." in markdown
    page = front_html(front_data(bounded))
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page)[1])  # type: ignore[index]
    assert data["axes"][0]["min"] == bound
    assert "min" not in data["axes"][1]
    assert "!" not in front_markdown(front_data(view))


def test_the_best_so_far_was_one_that_nobody_may_take() -> None:
    objectives = (Objective("acc"), Objective("length", Direction.MINIMIZE, "tokens", maximum=50.0))
    live = LiveProgress(Console(file=io.StringIO()), objectives)

    def scored(*values: float) -> None:
        evaluation = Evaluation(tuple(Score(value, 0.0, (value,)) for value in values), {})
        live.on_trial(replace(trial, evaluation=evaluation), False)

    trial = small_trial()
    scored(0.9, 80.0)
    assert "no trial is within all bounds yet" in live._note(Progress("search", 1, 0, 9))
    scored(0.5, 40.0)
    scored(0.4, 30.0)
    note = live._note(Progress("search", 3, 0, 9))
    assert (
        "best so far of each objective within all bounds, search items: acc 0.500, length 30"
        in note
    )
    free = LiveProgress(Console(file=io.StringIO()), [Objective("acc")])
    assert "bounds" not in free._note(Progress("search", 3, 0, 9))


def small_trial() -> Trial:
    return Trial(0, "search", "", (0.5,), recipe([0.5]))


# -- gains ----------------------------------------------------------------------------------


def test_a_distance_was_said_to_be_no_gain(tmp_path: Path) -> None:
    study = small_study(tmp_path / "s")
    study.items["test"] = (study.items["test"][0], ("10",))  # the second has one item, as distance
    odd = study.run()
    rows = gains(odd)
    assert {gain.objective for gain in rows} == {"reverse", "sort"}, "no mean with a distance"
    table = gains_table(odd)
    assert table is not None
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    for row, gain in zip(cells, rows, strict=True):
        if gain.objective == "sort":
            assert row[2:] == ("–", "–")
        else:
            assert row[3] in ("yes", "no", "worse", "–")
    facts = json.loads(json.dumps(front_facts(odd)["gains"]))
    assert {fact["clear"] for fact in facts if fact["objective"] == "sort"} == {None}


# -- finding a study ------------------------------------------------------------------------


def test_a_study_that_was_run_under_another_name_was_not_found(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(project / "study.yaml")
    small_study(project / "studies/other").run()
    code, _, err = call(capsys, monkeypatch, "status", file)
    assert (code, "has not been run yet" in err) == (2, True)
    for command in ("status", "front"):
        code, out, _ = call(capsys, monkeypatch, command, file, "--set", "name=other", "--json")
        assert code == 0
        assert json.loads(out)["state"] == "finished"
    directory = str(project / "studies/other")
    for command in ("status", "front"):
        code, _, err = call(capsys, monkeypatch, command, directory, "--set", "name=x")
        assert code == 2
        assert "is the directory of one study, whose settings are fixed" in err
    code, _, err = call(capsys, monkeypatch, "bench", file, "--set", "models.base=nowhere")
    assert code == 2
    assert "models.base: no such directory" in err


# -- the file of evomerge init --------------------------------------------------------------


def test_the_template_did_not_show_how_to_save_items(tmp_path: Path) -> None:
    text = study_template(None, [], [])
    lines = text.splitlines()
    path = tmp_path / "study.yaml"

    def with_lines(*starts: str) -> str:
        return "\n".join(
            re.sub(r"^(\s*)# ", r"\1", line)
            if any(line.strip().startswith(f"# {start}") for start in starts)
            else line
            for line in lines
        )

    path.write_text(text)
    assert load(path).fitness.estimator == "auto"
    path.write_text(with_lines("estimator: none"))
    assert load(path).fitness.estimator == "none"
    path.write_text(with_lines("estimator: {", "items: 20000", "racing: {}"))
    study = load(path)
    assert study.fitness.estimated is not None
    assert study.fitness.estimated.name == "soft_reg"
    assert study.search.items == 20000
    assert study.search.racing is not None


# -- studies that an error stopped ----------------------------------------------------------


def broken(endpoints: Sequence[Endpoint], draw: int) -> tuple[Items, Estimator]:
    raise InputError("fitness.estimator: needs what is not there\n(a second line)")


def test_status_called_a_study_interrupted_that_an_error_had_stopped(tmp_path: Path) -> None:
    for _ in range(2):  # the same error again is the same state
        with pytest.raises(InputError, match="needs what is not there"):
            toy_study(tmp_path / "s", estimation=Estimation("broken", broken)).run()
        view = StudyView.load(tmp_path / "s")
        assert view.state is StudyState.FAILED
        lines = status_lines(status_facts(view))
        assert lines["state"] == "failed"
        assert lines["message"] == [
            "fitness.estimator: needs what is not there", "(a second line)"
        ]  # fmt: skip


def test_a_study_goes_on_once_the_cause_is_mended(tmp_path: Path) -> None:
    whole = toy_study(tmp_path / "whole").run()

    def no_pool() -> None:
        raise SetupError("no GPU (start it where there is one)")

    with pytest.raises(SetupError):
        toy_study(tmp_path / "s", make_pool=no_pool).run()
    stopped = StudyView.load(tmp_path / "s")
    assert (stopped.state, stopped.message) == (
        StudyState.FAILED, "no GPU (start it where there is one)"
    )  # fmt: skip
    view = toy_study(tmp_path / "s").run()
    assert (view.state, view.message, view.knee) == (StudyState.FINISHED, "", whole.knee)


def test_other_settings_do_not_touch_a_study(tmp_path: Path) -> None:
    toy_study(tmp_path / "s").run()
    before = (tmp_path / "s/journal.jsonl").read_bytes()
    with pytest.raises(InputError, match="begun with other settings"):
        toy_study(tmp_path / "s", objectives=(OBJECTIVES[0],)).run()
    assert (tmp_path / "s/journal.jsonl").read_bytes() == before
    shutil.rmtree(tmp_path / "s")
