"""What may be loaded, from where, and what a user is told when it may not."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_tasks import HEAD, TASKS, Zoo, make_zoo, write_task

from evomerge.errors import TaskError
from evomerge.fitness.lm_eval import LmEvalTasks, TaskSpec


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("study"))


def load(zoo: Zoo, *specs: TaskSpec, **options: Any) -> LmEvalTasks:
    return LmEvalTasks.load(specs, (zoo.tasks,), zoo.root, **options)


@contextmanager
def one_task(zoo: Zoo, body: str, head: str = HEAD) -> Iterator[TaskSpec]:
    """Put one more task beside the others for a while."""
    path = write_task(zoo.tasks, "extra", body, head)
    try:
        yield TaskSpec("extra")
    finally:
        path.unlink()


def refusal(zoo: Zoo, spec: TaskSpec, **options: Any) -> str:
    with pytest.raises(TaskError) as caught:
        load(zoo, spec, **options)
    return str(caught.value)


# Naming


def test_unknown_task_gets_the_nearest_name_and_all_problems_are_told(
    zoo: Zoo, only_local: None
) -> None:
    with pytest.raises(TaskError) as caught:
        load(zoo, TaskSpec("gen_regx"), TaskSpec("likely"), TaskSpec("choice", "f1"))
    assert str(caught.value).splitlines() == [
        "tasks[0]: unknown task 'gen_regx' (did you mean 'gen_regex'?); no task file in "
        f"fitness.include_path defines it: {zoo.tasks}",
        "tasks[2].metric: 'f1' not produced by 'choice' (has acc, acc_norm; evomerge adds margin, "
        "reference_loglikelihood)",
    ]


@pytest.fixture
def only_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lm-eval's own 14,000 names out of the index; reading them takes seconds."""
    from lm_eval import tasks

    real = tasks.TaskManager

    def local(include_path: Any, include_defaults: bool = False) -> Any:
        return real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", local)


def test_broken_file_is_named_where_a_task_is_missing(zoo: Zoo, only_local: None) -> None:
    broken = zoo.tasks / "extra.yaml"
    broken.write_text("task: extra\nmetric_list: [\n")
    try:
        text = refusal(zoo, TaskSpec("extra"))
    finally:
        broken.unlink()
    assert text.startswith("tasks[0]: unknown task 'extra' (")
    assert "extra.yaml: cannot be read as a task file" in text


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (
            TaskSpec("choice"),
            "tasks[0].metric: 'choice' has the metrics acc, acc_norm; choose one",
        ),
        (
            TaskSpec("choice", "response_tokens"),
            "tasks[0].metric: 'response_tokens' is for tasks of type generate_until, 'choice' is "
            "multiple_choice",
        ),
        (
            TaskSpec("gen_regex"),
            "tasks[0].filter: 'gen_regex' has the filters letter, strict; choose one",
        ),
        (
            TaskSpec("gen_regex", filter="lettre"),
            "tasks[0].filter: 'lettre' not in 'gen_regex' (has letter, strict)",
        ),
        (
            TaskSpec("gen_stops", name="a,b"),
            "tasks[0].name: 'a,b' may hold letters, digits, '_', '-' and '.' only",
        ),
        (
            TaskSpec("gen_stops", num_fewshot=-1),
            "tasks[0].num_fewshot: must be an integer >= 0, got -1",
        ),
        (
            TaskSpec("choice_shots", num_fewshot=13),
            "tasks[0]: 'choice_shots': item '0' gives no prompt: ValueError: Sample larger than "
            "population or is negative",
        ),
    ],
)
def test_what_a_task_lacks_is_told(zoo: Zoo, spec: TaskSpec, text: str) -> None:
    assert refusal(zoo, spec) == text


def test_two_objectives_of_one_name(zoo: Zoo) -> None:
    with pytest.raises(TaskError) as caught:
        load(zoo, TaskSpec("choice", "acc"), TaskSpec("choice", "acc_norm"))
    assert str(caught.value) == (
        "tasks[1].name: 'choice' is the name of two objectives (give one a name of its own)"
    )


def test_no_task(zoo: Zoo) -> None:
    with pytest.raises(TaskError, match="tasks: need at least 1"):
        load(zoo)


def test_missing_include_path(zoo: Zoo) -> None:
    with pytest.raises(TaskError, match=r"nowhere is not a folder \(.*--root FOLDER"):
        LmEvalTasks.load([TaskSpec("choice")], (zoo.root / "nowhere",), zoo.root)


def test_metric_over_all_items_together_is_refused(zoo: Zoo) -> None:
    body = TASKS["choice"] + "  - {metric: f1, aggregation: f1, higher_is_better: true}\n"
    with one_task(zoo, body):
        text = refusal(zoo, TaskSpec("extra", "f1"))
    assert text == (
        "tasks[0].metric: 'f1' of 'extra' is computed by f1_score over all items together, not as "
        "the mean of item scores (choose from: acc, acc_norm)"
    )


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (
            "group: both\ntask: [choice, {task: likely, num_fewshot: 1}]\n",
            "'both' changes settings of its task 'likely' (give that task a file of its own, or "
            "name the tasks one by one)",
        ),
        (
            "group: both\ntask: [choice, likely]\nnum_fewshot: 2\n",
            "'both' changes settings of its tasks (num_fewshot); name the tasks one by one",
        ),
        ("group: both\ntask: []\n", "'both' is a group of no tasks"),
        (
            "group: both\ntask: [choice, likely]\n"
            "aggregate_metric_list: [{metric: acc}, {metric: acc_norm}]\n",
            ".metric: 'both' has the metrics acc, acc_norm; choose one",
        ),
        (
            "group: both\ntask: [choice, gen_stops]\naggregate_metric_list: [{metric: acc}]\n",
            ".metric: 'acc' not produced by 'gen_stops' (has exact_match; evomerge adds "
            "response_tokens, reference_loglikelihood)",
        ),
        (
            "group: both\ntask: [likely]\naggregate_metric_list: [{metric: perplexity}]\n",
            ".metric: 'both' weighs its tasks' 'perplexity' by their sizes, which is no mean of "
            "item scores (name the tasks one by one)",
        ),
        (
            "group: both\ntask: [choice, nowhere]\n",
            "unknown task 'nowhere'",
        ),
    ],
)
def test_groups_that_cannot_be_one_objective(
    zoo: Zoo, group: str, text: str, only_local: None
) -> None:
    path = zoo.tasks / "group.yaml"
    path.write_text(group)
    try:
        told = refusal(zoo, TaskSpec("both"))
    finally:
        path.unlink()
    assert told.startswith("tasks[0]" + (text if text.startswith(".") else f": {text}"))


def test_names_are_made_safe_for_the_tracker(zoo: Zoo) -> None:
    head = HEAD.replace("{name}", "a/b (c)")
    with one_task(zoo, TASKS["likely"], head):
        (objective,) = load(zoo, TaskSpec("a/b (c)", weight=2.0)).objectives
    assert (objective.name, objective.weight) == ("a_b__c_", 2.0)


def test_fixed_zero_shots_are_not_overruled_silently(zoo: Zoo) -> None:
    with one_task(zoo, TASKS["likely"] + "num_fewshot: 0\n"):
        text = refusal(zoo, TaskSpec("extra", num_fewshot=2))
        assert load(zoo, TaskSpec("extra", num_fewshot=0)).objectives
    assert text == (
        "tasks[0].num_fewshot: 'extra' fixes it at 0 and lm-eval ignores other values "
        "(remove num_fewshot: 2)"
    )


@pytest.mark.parametrize("how", ["do_sample: true", "temperature: 0.7"])
def test_sampled_answers_are_refused(zoo: Zoo, how: str) -> None:
    body = TASKS["gen_stops"].replace("max_gen_toks: 5", f"max_gen_toks: 5, {how}")
    with one_task(zoo, body) as spec:
        assert "tasks[0]: 'extra' samples its answers" in refusal(zoo, spec)


def test_minimised_metric_turns_the_direction(zoo: Zoo) -> None:
    body = TASKS["likely"].replace("higher_is_better: true", "higher_is_better: false")
    with one_task(zoo, body) as spec:
        assert load(zoo, spec).objectives[0].direction == "minimize"


def test_answer_that_fills_the_context_is_refused(zoo: Zoo) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    body = TASKS["gen_stops"].replace("max_gen_toks: 5", "max_gen_toks: 64")
    with one_task(zoo, body) as spec:
        tasks = load(zoo, spec)
    model = AutoModelForCausalLM.from_pretrained(zoo.models[0])
    with pytest.raises(TaskError) as caught:
        tasks.bind(model, AutoTokenizer.from_pretrained(zoo.models[0]), batch_size=4)
    assert str(caught.value) == (
        "extra: generation_kwargs.max_gen_toks: 64 tokens leave no room for the prompt in the "
        "model's context of 64 tokens (set a smaller max_gen_toks in the task)"
    )


# Code


@pytest.fixture
def canary(zoo: Zoo) -> Iterator[Path]:
    """A Python file beside the tasks that leaves a trace when it runs."""
    trace = zoo.root / "ran"
    code = zoo.tasks / "code.py"
    code.write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "def text(doc):\n    return doc['text']\n"
        "def score(doc, results):\n    doc.clear()\n    return {'acc': float(results[0][1])}\n"
    )
    yield trace
    code.unlink()
    trace.unlink(missing_ok=True)


def test_function_is_refused_before_it_runs(zoo: Zoo, canary: Path) -> None:
    body = TASKS["likely"].replace('doc_to_text: "{{text}}"', "doc_to_text: !function code.text")
    with one_task(zoo, body) as spec:
        assert refusal(zoo, spec) == (
            "tasks[0]: 'extra' loads Python code (extra.yaml: code.text); "
            "set fitness.allow_task_code: true if you trust it with this machine"
        )
        assert not canary.exists()
        allowed = load(zoo, spec, allow_task_code=True)
        assert canary.exists()
        plain = load(zoo, TaskSpec("likely"))
        first, second = allowed._tasks[0].requests, plain._tasks[0].requests
        assert [made[0].args for made in first] == [made[0].args for made in second]


def test_function_in_an_included_file_is_refused(zoo: Zoo, canary: Path) -> None:
    part = zoo.tasks / "_part"
    part.write_text("doc_to_text: !function code.text\n")
    try:
        with one_task(zoo, TASKS["likely"] + "include: _part\n") as spec:
            assert "loads Python code (_part: code.text)" in refusal(zoo, spec)
    finally:
        part.unlink()
    assert not canary.exists()


def test_includes_in_a_circle(zoo: Zoo, only_local: None) -> None:
    with one_task(zoo, TASKS["likely"] + "include: extra.yaml\n") as spec:
        assert "includes" in refusal(zoo, spec)


def test_process_results_may_spoil_its_document(zoo: Zoo, canary: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    body = TASKS["likely"] + "process_results: !function code.score\n"
    with one_task(zoo, body) as spec:
        tasks = load(zoo, spec, allow_task_code=True)
    model = AutoModelForCausalLM.from_pretrained(zoo.models[0])
    fitness = tasks.bind(model, AutoTokenizer.from_pretrained(zoo.models[0]), batch_size=4)
    assert fitness.score(tasks.item_ids) == fitness.score(tasks.item_ids)
    assert all(tasks._tasks[0].docs)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("unsafe_code: true\n", "executes generated code (unsafe_code: true)"),
        ("class: code.Task\n", "is a Python class (code.Task)"),
        ("use_prompt: promptsource:all\n", "loads a prompt library (use_prompt: promptsource:all)"),
        (
            "metric_list: [{metric: ./evil}]\n",
            "loads the metric './evil' as a script from HF Evaluate",
        ),
        (
            "metric_list: [{metric: acc, hf_evaluate: true}]\n",
            "loads the metric 'acc' as a script from HF Evaluate",
        ),
        ("dataset_path: pandas\n", "reads pickled data (dataset_path: pandas)"),
    ],
)
def test_other_ways_to_code_are_refused(zoo: Zoo, extra: str, reason: str) -> None:
    with one_task(zoo, TASKS["likely"] + extra) as spec:  # of two equal keys the last one holds
        assert refusal(zoo, spec).startswith(
            f"tasks[0]: 'extra' {reason}; set fitness.allow_task_code: true if you trust it"
        )


def test_templates_cannot_reach_python(zoo: Zoo) -> None:
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    body = TASKS["likely"].replace('"{{text}}"', f'"{attack}"')
    with one_task(zoo, body) as spec:
        text = refusal(zoo, spec)
    assert "SecurityError: access to attribute '__class__' of 'str' object is unsafe" in text


def test_tasks_of_the_wheel_may_hold_functions_but_not_execute_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The folders of two shipped tasks are indexed as if they were all of lm-eval.
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    with pytest.raises(TaskError) as caught:
        LmEvalTasks.load(
            [TaskSpec("humaneval"), TaskSpec("hellaswag", "acc")],
            (home / "humaneval", home / "hellaswag"),
        )
    code, data = str(caught.value).splitlines()
    assert code.startswith("tasks[0]: 'humaneval' executes generated code (unsafe_code: true)")
    # hellaswag.yaml has a !function and passes; what it lacks here is its data.
    assert data.startswith("tasks[1]: dataset 'Rowan/hellaswag' of 'hellaswag' is not available")


# Data


@pytest.mark.timeout(20)  # the library's own retries take 23 s and more
def test_hub_that_does_not_answer_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import lm_eval.tasks
    from huggingface_hub import constants

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for name in (
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    folder = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    with pytest.raises(TaskError) as caught:
        LmEvalTasks.load([TaskSpec("hellaswag", "acc")], (folder,))
    assert str(caught.value) == (
        "tasks[0]: dataset 'Rowan/hellaswag' of 'hellaswag' is not available offline (the hub "
        "cannot be reached and it is not in the local cache; run once with a connection, or copy "
        "the cache)"
    )
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False)


def test_data_is_found_from_any_directory(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    want = load(zoo, TaskSpec("likely")).digest
    folder = tmp_path / "pack"
    shutil.copytree(zoo.tasks, folder)

    def digest(data_root: Path | None) -> str:
        return LmEvalTasks.load([TaskSpec("likely")], (folder,), data_root).digest

    with pytest.raises(TaskError) as caught:
        digest(None)
    assert str(caught.value) == (
        f"tasks[0]: data_files: 'data/train.jsonl' not found (looked in {tmp_path}, {folder}; put "
        "it into one of them, or start where the path starts from)"
    )
    shutil.copytree(zoo.root / "data", folder / "data")  # beside the task file
    assert digest(None) == want
    changed = tmp_path / "data" / "test.jsonl"  # the current directory wins over it
    shutil.copytree(zoo.root / "data", tmp_path / "data")
    changed.write_text(changed.read_text() + changed.read_text().splitlines()[0] + "\n")
    assert digest(None) != want
    assert digest(zoo.root) == want  # and the study's folder over both


def test_broken_data_is_named(zoo: Zoo) -> None:
    (zoo.root / "data" / "broken.jsonl").write_text('{"text": \n')
    head = HEAD.replace("data/test.jsonl", "data/broken.jsonl")
    with one_task(zoo, TASKS["likely"], head) as spec:
        assert refusal(zoo, spec).startswith("tasks[0]: 'extra' cannot be loaded: Dataset")


def test_template_with_a_missing_field_is_named(zoo: Zoo) -> None:
    body = TASKS["likely"].replace("{{text}}", "{{txet}}")
    with one_task(zoo, body) as spec:
        assert refusal(zoo, spec) == (
            "tasks[0]: 'extra' cannot be loaded: UndefinedError: 'txet' is undefined"
        )


# Identity


Change = Callable[[str], str]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda body: body, True),
        (lambda body: body.replace('"{{text}}"', '"{{text}} "'), False),
        (lambda body: body + "repeats: 2\n", False),
        (lambda body: body + "num_fewshot: 1\nfewshot_split: train\n", False),
        (lambda body: "# a remark\n" + body, True),
    ],
)
def test_digest_follows_what_is_asked(zoo: Zoo, change: Change, same: bool) -> None:
    with one_task(zoo, TASKS["likely"]) as spec:
        before = load(zoo, spec).digest
    with one_task(zoo, change(TASKS["likely"])) as spec:
        assert (load(zoo, spec).digest == before) is same


def test_digest_follows_metric_filter_seed_and_data(zoo: Zoo, tmp_path: Path) -> None:
    digests = [
        load(zoo, TaskSpec("choice", "acc")).digest,
        load(zoo, TaskSpec("choice", "acc_norm")).digest,
        load(zoo, TaskSpec("gen_regex", filter="letter")).digest,
        load(zoo, TaskSpec("gen_regex", filter="strict")).digest,
        load(zoo, TaskSpec("choice_shots")).digest,
        load(zoo, TaskSpec("choice_shots"), seed=7).digest,
    ]
    shutil.copytree(zoo.root / "data", tmp_path / "data")
    test = tmp_path / "data" / "test.jsonl"
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    rows[3]["label"] = (rows[3]["label"] + 1) % 3
    test.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    digests.append(LmEvalTasks.load([TaskSpec("choice", "acc")], (zoo.tasks,), tmp_path).digest)
    assert len(set(digests)) == len(digests)
    renamed = TaskSpec("choice", "acc", name="other", weight=3.0)
    assert load(zoo, renamed).digest == digests[0]


def test_digest_is_the_same_in_another_process_and_place(zoo: Zoo, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(zoo.root, copy)
    specs = "[TaskSpec('choice_shots'), TaskSpec('gen_regex', filter='letter')]"
    code = (
        "from pathlib import Path\n"
        "from evomerge.fitness.lm_eval import LmEvalTasks, TaskSpec\n"
        f"print(LmEvalTasks.load({specs}, (Path('tasks'),), Path('.').absolute()).digest)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env={
            "PYTHONHASHSEED": "5",
            "PYTHONPATH": ":".join(sys.path),
            "HF_HOME": str(tmp_path / "hub"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    here = load(zoo, TaskSpec("choice_shots"), TaskSpec("gen_regex", filter="letter")).digest
    assert (made.stdout.strip(), made.stderr) == (here, "")
