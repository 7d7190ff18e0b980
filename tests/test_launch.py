"""From a study file to a study and back home: settings, resolved file, moved projects."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from library_warnings import LIBRARY_WARNINGS
from tiny_project import tiny_project

from evomerge import launch, take_home
from evomerge.config import load
from evomerge.errors import InputError, Interrupted, StorageError, StudyFileError
from evomerge.journal import JOURNAL, read
from evomerge.prepare import Prepared, prepare
from evomerge.presentation import STUDY_FILE
from evomerge.study_view import StudyView

pytestmark = LIBRARY_WARNINGS


@pytest.fixture(scope="module")
def project(save_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_project(tmp_path_factory.mktemp("launch"), save_llama)


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """A project of its own for a test that changes or runs it."""
    return Path(shutil.copytree(project, tmp_path / "project"))


def prepared(project: Path, *overrides: str) -> Prepared:
    path = project / "study.yaml"
    return prepare(load(path, overrides), path)


def problems(project: Path, *overrides: str) -> str:
    with pytest.raises(StudyFileError) as caught:
        prepared(project, *overrides)
    return str(caught.value)


def test_a_name_that_mlflow_needs_is_pointed_out(project: Path) -> None:
    def warned(*overrides: str) -> list[str]:
        return [one for one in prepared(project, *overrides).warnings if "MLflow" in one]

    tasks = "fitness.tasks=[{task: pick_a, name: items}, {task: pick_b, name: b.none}]"
    [warning] = warned(tasks, "tracking.enabled=true")
    assert warning.startswith("fitness: MLflow shows the objective 'items' as 'objective items': ")
    assert warned(tasks) == warned("tracking.enabled=true") == []


class TestIdentity:
    def test_settings_that_change_scores_were_not_compared(self, copy: Path) -> None:
        before = prepared(copy).identity()
        assert prepared(copy, "fitness.batch_size=4").identity() != before
        assert prepared(copy, "pool.device=cpu").identity() != before
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            path = copy / "models/base" / name
            text = path.read_text()
            path.write_text(text + "\n")
            assert prepared(copy).identity() != before, name
            path.write_text(text)
        assert prepared(copy).identity() == before

    def test_a_written_default_was_refused(self, project: Path) -> None:
        search = ("search.searcher=nsga2", "search.arguments={}")
        bare = prepared(project, *search).identity()
        written = prepared(project, search[0], "search.arguments={mutation_eta: 20}").identity()
        assert written == bare
        other = prepared(project, search[0], "search.arguments={mutation_eta: 21}").identity()
        assert other != bare


class TestCheck:
    def test_a_missing_or_broken_tokenizer_was_not_noticed(self, copy: Path) -> None:
        for name in ("base", "math", "code"):
            (copy / "models" / name / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
        text = problems(copy, "search.trials=6")
        assert "models.base: its tokenizer cannot be loaded: " in text
        assert str(copy / "models/base") in text
        for name in ("base", "math", "code"):
            for path in (copy / "models" / name).glob("tokenizer*"):
                path.unlink()
        assert "models.base: its tokenizer cannot be loaded: ValueError" in problems(copy)

    def test_problems_of_the_searcher_lacked_their_path(self, project: Path) -> None:
        assert "search.searcher: unknown 'cmaa'" in problems(project, "search.searcher=cmaa")
        text = problems(project, "search.searcher=cma", "search.arguments={sigm: 1, sigma: 9}")
        assert "search.arguments.sigm: unknown argument" in text
        assert "search.arguments.sigma: expected float in [0.001, 1], got 9" in text

    def test_normalized_baselines_were_other_merges_than_their_labels(self, project: Path) -> None:
        normalize = "space.parameters={weight: {low: 0, high: 2}, normalize: true}"
        made = {one.label: one for one in prepared(project, normalize).baselines}
        # 2 experts: weights that do not sum to one would be divided by their sum.
        inside = {"expert:math", "expert:code", "uniform", "task_arithmetic:0.5"}
        assert {label for label, one in made.items() if one.x is not None} == inside
        assert made["task_arithmetic:1"].recipe.table == ((1.0, 1.0),)
        assert not made["task_arithmetic:1"].recipe.option("normalize", False)
        assert made["base"].recipe.table == ((0.0, 0.0),)


class TestResolvedFile:
    def test_without_tracking_it_was_never_written(self, copy: Path) -> None:
        finished = launch.run(prepared(copy), [])
        directory = copy / "studies/tiny"
        assert finished.target is None
        assert load(directory / STUDY_FILE).directory == "studies/tiny"
        scoring = take_home._scoring(finished.view)
        assert scoring is not None
        assert scoring.tasks == ("pick_a", "pick_b")
        # What was used counts, not what somebody wrote there later.
        text = (directory / STUDY_FILE).read_text()
        (directory / STUDY_FILE).write_text(text.replace("batch_size: 8", "batch_size: 99"))
        changed = take_home._scoring(finished.view)
        assert changed is not None
        assert changed.batch_size == scoring.batch_size == 8
        versions = finished.view.contract["identity"]["versions"]
        assert {"torch", "transformers", "tokenizers", "lm_eval"} <= set(versions)

    def test_other_settings_do_not_overwrite_it(self, copy: Path) -> None:
        directory = copy / "studies/tiny"
        launch.run(prepared(copy), [])
        before = (directory / STUDY_FILE).read_bytes()
        with pytest.raises(InputError, match="begun with other settings"):
            launch.run(prepared(copy, "search.trials=7"), [])
        assert (directory / STUDY_FILE).read_bytes() == before

    def test_a_directory_of_dot_lost_the_users_file(self, copy: Path, tmp_path: Path) -> None:
        path = copy / "study.yaml"
        path.write_text("# mine\n" + path.read_text() + "directory: .\n")
        before = path.read_text()
        view = launch.run(prepared(copy), []).view
        assert view.directory.resolve() == copy
        assert path.read_text() == before
        assert take_home.study_root(view.directory) == copy
        take_home.export_trial(view, best=None, trial=None, out=copy / "merged", shards="5GB")
        scores = json.loads((copy / "merged/evomerge_scores.json").read_text())
        assert "pretrained=merged," in scores["reproduce"]["commands"][0]
        assert {"lm_eval", "torch", "transformers"} <= set(scores["reproduce"]["versions"])

    def test_a_study_root_follows_the_depth_of_the_directory(self, tmp_path: Path) -> None:
        for inside in ("studies/tiny", "tiny", "./tiny", "."):
            folder = tmp_path / "p" / inside
            folder.mkdir(parents=True, exist_ok=True)
            text = f"directory: {inside}\nmodels: {{base: b, experts: {{a: a}}}}\n"
            (folder / STUDY_FILE).write_text(text + "fitness: {tasks: [t]}\n")
            assert take_home.study_root(folder) == tmp_path / "p", inside

    def test_one_that_cannot_be_written_is_a_storage_error(self, copy: Path) -> None:
        (copy / "studies/tiny" / STUDY_FILE).mkdir(parents=True)
        with pytest.raises(StorageError, match=f"{STUDY_FILE}: cannot be written: .* then run the"):
            launch.run(prepared(copy), [])
        events = [record["ev"] for record in read(copy / "studies/tiny").records]
        assert "ask" not in events

    def test_a_relative_database_started_from_the_current_directory(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = load(copy / "study.yaml", ["tracking={uri: 'sqlite:///runs/ml.db'}"])
        target = launch._target(file, copy / "studies/tiny", copy)
        assert target is not None
        assert target.uri == f"sqlite:///{copy}/runs/ml.db"
        (copy / "studies/tiny").mkdir(parents=True)
        launch.save_resolved(file, copy / "studies/tiny", copy)
        assert load(copy / "studies/tiny" / STUDY_FILE).tracking.uri == target.uri


class TestMoved:
    def test_export_worked_only_at_the_recorded_path(self, copy: Path, tmp_path: Path) -> None:
        before = launch.run(prepared(copy), []).view
        moved = copy.rename(tmp_path / "elsewhere")
        view = StudyView.load(moved / "studies/tiny")
        assert view.front == before.front
        exported = take_home.export_trial(
            view, best=None, trial=None, out=tmp_path / "merged", shards="5GB"
        )
        assert (exported.out / "model.safetensors").exists()
        shutil.rmtree(moved / "models/math")
        with pytest.raises(InputError, match="math"):
            take_home.export_trial(view, best=None, trial=None, out=tmp_path / "x", shards="5GB")

    def test_a_moved_study_goes_on(self, copy: Path, tmp_path: Path) -> None:
        calm = launch.run(prepared(copy), []).view
        journal = copy / "studies/tiny" / JOURNAL
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[: len(lines) // 2]))
        moved = copy.rename(tmp_path / "elsewhere")
        view = launch.run(prepared(moved), []).view
        assert [t.evaluation and t.evaluation.scores for t in view.trials] == [
            t.evaluation and t.evaluation.scores for t in calm.trials
        ]
        assert (view.front, view.knee) == (calm.front, calm.knee)


@pytest.mark.parametrize(("given", "waits"), [("1800", 1790), ("5", 4.5), (None, 60), ("x", 60)])
def test_a_stopped_job_had_a_minute_whatever_its_grace(
    project: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, waits: float
) -> None:
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", given)
    ready = prepared(project)
    assert launch.study_of(ready, ready.make_pool).grace_seconds == waits


def test_a_stop_waited_long_for_mlflow(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Stopped:
        def __init__(self, *args: object, **kwargs: object) -> None:
            pass

        def run(self, restart: bool) -> None:
            raise Interrupted("now", 2)

    monkeypatch.setattr(launch, "Study", Stopped)
    monkeypatch.setattr(launch._Tracking, "close", lambda self, seconds: waits.append(seconds))
    with pytest.raises(Interrupted):
        launch.run(prepared(project), [])
    assert waits == [launch._STOP_SECONDS]
    assert launch._STOP_SECONDS < 5


def test_importance_is_kept_with_the_study(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next run reads no weights for it, and continues the same study."""
    override = "space.partition=importance(6)"
    first = prepared(copy, override)
    launch.run(first, [])
    monkeypatch.setattr("evomerge.examination.task_vector_masses", None)
    again = prepared(copy, override)
    assert again.masses == first.masses
    assert again.space.digest == first.space.digest
