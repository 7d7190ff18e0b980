"""What a newcomer ran into: permissions, advice that leads nowhere, text that nobody can paste."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_study import finished
from test_cli import call

from evomerge import capacity, demo
from evomerge.config import PoolSection, load
from evomerge.contract import differences
from evomerge.errors import InputError, Interrupted, ModelError, StudyFileError
from evomerge.export import Exported
from evomerge.facts import export_facts, export_lines, status_facts, status_lines
from evomerge.gain import front_rows
from evomerge.launch import Finished
from evomerge.memory import available_bytes
from evomerge.models import open_models
from evomerge.ray_pool import RayPool
from evomerge.study_listener import Progress
from evomerge.study_space import columns_of
from evomerge.template import study_template
from evomerge.terminal import LiveProgress, activation, front_table, print_finished
from evomerge.tracking_client import first_line
from evomerge.trial import Objective

FORM = "models: {base: b, experts: {math: m, code: c}}\nfitness: {tasks: [t]}\n"


def study_file(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_study_of_somebody_else_was_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refused)  # root, who may run this, reads everything
    code, _, err = call(capsys, monkeypatch, "front", str(tmp_path / "theirs"))
    assert (code, err) == (2, f"error: {tmp_path / 'theirs'}: Permission denied\n")


def test_a_demo_folder_that_is_not_writable_was_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out: .*file/demo: cannot be written: Not a directory"):
        demo._lay_out(tmp_path / "file/demo")


def test_more_workers_than_processors_were_not_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layout:
        parameters = 10**9
        slots = ()

    class Some:
        layout = Layout()
        base = type("Base", (), {"tensors": {}})()
        experts = ()
        factored = False

    models: Any = Some()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(capacity, "available_bytes", lambda: 7 * 10**9)
    pool = PoolSection(workers=64)  # type: ignore[call-arg]
    processors, memory = capacity.capacity_warnings(pool, models, "F32")
    assert "64 with 1 CPU each need 64 CPUs, this machine has 2" in processors
    assert "64 live models of 4.00 GB each" in memory
    assert "7.00 GB of memory are available" in memory
    one = PoolSection(workers=1)  # type: ignore[call-arg]
    assert capacity.capacity_warnings(one, models, "F32") == []
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert capacity.capacity_warnings(pool, models, "F32") == []


def test_available_memory_is_a_number_or_unknown() -> None:
    found = available_bytes()
    assert found is None or found > 0


def test_a_second_signal_inside_of_ray_was_a_system_error() -> None:
    class Ray:
        def wait(self, refs: object, num_returns: int, timeout: float) -> None:
            try:
                raise Interrupted("stopped at once", 2)
            except Interrupted as signalled:
                raise SystemError("wait returned a result with an exception set") from signalled

    pool = RayPool.__new__(RayPool)
    pool._ray = Ray()
    with pytest.raises(Interrupted):
        pool._ready([], 1, 0.0)

    class Broken:
        def wait(self, refs: object, num_returns: int, timeout: float) -> None:
            raise SystemError("a bug")

    pool._ray = Broken()
    with pytest.raises(SystemError):
        pool._ready([], 1, 0.0)


def test_printed_commands_were_not_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert activation() == ""  # nothing is installed there
    for name in ("evomerge", "activate"):
        (folder / name).write_text("")
        (folder / name).chmod(0o755)
    assert activation() == "source .venv/bin/activate"
    monkeypatch.setenv("PATH", str(folder))
    assert activation() == ""


def test_the_template_named_tasks_that_need_code_or_a_choice(tmp_path: Path) -> None:
    text = study_template(None, [], [])
    tasks = load(study_file(tmp_path, text)).fitness.tasks
    assert [(task.task, task.metric) for task in tasks if not isinstance(task, str)] == [
        ("gsm8k", "exact_match"),
        ("arc_challenge", "acc_norm"),
    ]
    assert "allow_task_code" in text
    assert "{task: gsm8k, metric" in study_template("b", [], ["gsm8k", "own"])


def test_a_broken_base_hid_broken_experts(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_models(str(tmp_path / "b"), [("x", str(tmp_path / "x")), ("y", str(tmp_path / "y"))])
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "models.base",
        "models.experts.x",
        "models.experts.y",
    ]


def test_an_unknown_method_hid_the_partition_and_ranges(tmp_path: Path) -> None:
    space = "space: {method: tie, partition: layers, parameters: {weight: {low: 2, high: 1}}}\n"
    with pytest.raises(InputError) as caught:
        columns_of(load(study_file(tmp_path, FORM + space)))
    method, partition, weight = str(caught.value).splitlines()
    assert method.startswith("space.method: unknown 'tie'")
    assert partition.startswith("space.partition: ")
    assert weight == "space.parameters.weight: low 2 must be < high 1"


def test_an_inverted_range_was_reported_per_expert_and_as_nothing_searched(tmp_path: Path) -> None:
    space = "space: {method: task_arithmetic, parameters: {weight: {low: 2, high: 1}}}\n"
    with pytest.raises(InputError) as caught:
        columns_of(load(study_file(tmp_path, FORM + space)))
    assert str(caught.value) == "space.parameters.weight: low 2 must be < high 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FORM + "space: 3\n", "space: must be a mapping, got 3"),
        (FORM + "space: {parameters: {weight: [1]}}\n", "must be a number or {low, high}, got a"),
    ],
)
def test_pydantic_spoke_of_its_own_classes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(StudyFileError) as caught:
        load(study_file(tmp_path, text))
    assert message in str(caught.value)
    assert "Section" not in str(caught.value)


@pytest.mark.parametrize("width", [80, 140])
def test_long_notes_pushed_the_bar_out_of_80_columns(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    objectives = [Objective(f"a_rather_long_objective_name_{n}") for n in range(5)]
    with LiveProgress(console, objectives) as live:
        live.on_phase("validation", 150)
        live._best = [0.5] * 5
        live._phase = "search"
        live.on_progress(Progress("search", 42, 2, 150))
        assert live._bar is not None
        live._bar.refresh()
    lines = [line for line in stream.getvalue().splitlines() if "42/150" in line]
    assert lines
    assert "elapsed" in lines[-1]
    assert "left" in lines[-1]
    assert "finalists, validation items" in lines[-1]
    shown = " ".join(stream.getvalue().split())
    assert "best so far of each objective, search items: a_rather_long" in shown
    assert "name_4 0.500" in shown


def exported(tmp_path: Path) -> Exported:
    return Exported(
        tmp_path / "out", 3, ("a", "b"), 10**6, False, "no", ("lm_eval --x",), (),
        {"math": 1 / 3}, "test",
    )  # fmt: skip


def test_the_command_that_repeats_scores_worked_in_one_folder_only(tmp_path: Path) -> None:
    root = tmp_path / "my project"
    facts = export_facts(exported(tmp_path), root)
    assert facts["repeat"] == [f"cd '{root}' && lm_eval --x"]
    assert facts["scores"] == {"math": 1 / 3}
    assert export_lines(facts)["scores"] == "math 0.3333 (test items)"
    assert export_facts(exported(tmp_path), None)["repeat"] == ["lm_eval --x"]


def test_status_did_not_say_on_which_items_the_best_was_best(tmp_path: Path) -> None:
    view = finished(tmp_path / "s")
    facts = json.loads(json.dumps(status_facts(view)))
    best = facts["best"]["reverse"]
    assert best["items"] == "validation"
    assert best["value"] == view.validation[best["trial"]].values[0]
    assert "validation items)" in status_lines(facts)["best reverse"]
    assert isinstance(facts["hypervolume"], float)


def test_a_baseline_was_offered_and_described_as_a_find_of_the_search(tmp_path: Path) -> None:
    view = finished(tmp_path / "s")
    assert any(view.trial(number).kind == "baseline" for number in view.front)
    stream = io.StringIO()
    print_finished(Console(file=stream, width=200), Finished(view, None, None, ""))
    offered = re.search(r"--trial (\d+) ", stream.getvalue())
    assert offered is not None
    assert view.trial(int(offered[1])).kind == "search"
    assert int(offered[1]) in view.front
    chosen = replace(view, knee=next(n for n in view.front if view.trial(n).kind == "baseline"))
    assert "is a baseline: the search found no better" in str(front_table(chosen).caption)


def test_a_space_in_the_path_broke_the_command_that_sends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = finished(tmp_path / "my studies" / "s")
    for here in (tmp_path, tmp_path.parent):
        shown = f"'{view.directory.relative_to(here)}'"
        monkeypatch.chdir(here)
        stream = io.StringIO()
        print_finished(Console(file=stream, width=200), Finished(view, None, None, "no server"))
        for verb in ("sync", "report", "compare", "export"):
            assert f"evomerge {verb} {shown}" in stream.getvalue()


def test_ctrl_c_while_training_said_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_pool", stopped)
    with pytest.raises(Interrupted, match=r"stopped while training; .* finished models are kept"):
        demo._train(Console(file=io.StringIO()), tmp_path, quick=True)


def test_the_front_was_not_told_from_baselines_without_colour(tmp_path: Path) -> None:
    view = finished(tmp_path / "s")
    table = front_table(view)
    sections = [row.end_section for row in table.rows]
    assert sections.count(True) == 1
    assert sections.index(True) == len(view.front) - 1
    assert "best mean first" in str(table.caption)
    means = [
        sum(view.test[t.number].values) / 2 for t in front_rows(view, view.test)[: len(view.front)]
    ]
    assert means == sorted(means, reverse=True)


def test_changed_settings_were_told_in_words_that_no_file_has() -> None:
    old = {
        "identity": {"fitness": "a" * 32, "models": ["f" * 32, "e" * 32]},
        "items": {"search": [["1", "2"], ["1", "2"]]},
        "budget": 8,
    }
    new = {
        "identity": {"fitness": "b" * 32, "models": ["f" * 32, "d" * 32]},
        "items": {"search": [["1"], ["2"]]},
        "budget": 12,
    }
    assert differences(old, new) == [
        "  search.trials: 8 -> 12 "
        "(keep 8, e.g. --set search.trials=8; `evomerge extend` adds to it)",
        "  questions and prompts of the tasks: other ones",
        "  models (their weights): other ones",
        "  fitness.items.search: 2 + 2 -> 1 + 1",
    ]


def test_an_unreachable_mlflow_was_a_paragraph() -> None:
    error = Exception(
        "API request to http://x:9/api/2.0/y failed with exception HTTPConnectionPool(host='x', "
        'port=9): Max retries exceeded with url: /y (Caused by NewConnectionError("HTTPConnection('
        "host='x', port=9): Failed to connect: [Errno 111] Connection refused\"))"
    )
    assert first_line(error) == "no answer: [Errno 111] Connection refused"


def test_hints_named_a_command_that_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, _, err = call(capsys, monkeypatch, "status", str(tmp_path / "nowhere"))
    assert "(see `evomerge list studies`)" in err


def test_list_methods_did_not_explain_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = call(capsys, monkeypatch, "list", "methods")[1]
    assert re.search(r"elect: sign of .*; weighted \(or ", text)
    rows = json.loads(call(capsys, monkeypatch, "list", "methods", "--json")[1])
    ties = next(row for row in rows if row["method"] == "ties")
    assert isinstance(ties["parameters"][0]["low"], float)
    assert "sigma=0.1667," in call(capsys, monkeypatch, "list", "searchers")[1]


def test_a_mode_of_what_is_exported_follows_the_umask(tmp_path: Path) -> None:
    from evomerge.atomic_directory import atomic_directory

    with atomic_directory(tmp_path / "out") as folder:
        (folder / "model.safetensors").write_bytes(b"")
    umask = os.umask(0)
    os.umask(umask)
    mode = stat.S_IMODE((tmp_path / "out/model.safetensors").stat().st_mode)
    assert mode == 0o666 & ~umask
