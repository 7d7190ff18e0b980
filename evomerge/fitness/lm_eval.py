"""Scoring a live transformers model on lm-eval tasks, item by item.

The only module that imports lm-eval. lm-eval's ``evaluate`` builds its tasks and prompts anew at
every call; here they are built once, and for each model only the model's own request functions,
the task's filters and its ``process_results`` run. The numbers are those of
``lm_eval.simple_evaluate`` with the same batch size.

No answer is ever kept: weights change in place, and lm-eval's cache key does not contain them.
"""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from evomerge.errors import InputError, TaskError
from evomerge.fitness.aggregate import Aggregate
from evomerge.fitness.columns import Columns, GroupMetric, Opened, joint
from evomerge.fitness.groups import complete, is_group, is_tag, leaves
from evomerge.fitness.margins import ungraded
from evomerge.fitness.measures import choices_of
from evomerge.fitness.offline import hub_or_offline, reachable, silent_datasets
from evomerge.fitness.protocol import Live
from evomerge.fitness.scorer import LmEvalFitness
from evomerge.fitness.task_files import (
    Templates,
    code_reason,
    include_chain,
    load_problem,
    resolve_data,
    unknown_task,
)
from evomerge.fitness.tasks import Column, LoadedTask, TaskSpec, digest_of
from evomerge.trial import Objective

log = logging.getLogger(__name__)

#: lm-eval's own default (``lm_eval.defaults.DEFAULT_OTHER_SEED``): with it, the plain ``lm_eval``
#: command draws the same few-shot examples.
FEWSHOT_SEED = 1234

#: What lm-eval and datasets raise for a task that is written wrongly.
_TASK_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, jinja2.TemplateError, yaml.YAMLError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LmEvalTasks:
    """The tasks of a study, loaded without any model.

    Attributes:
        objectives: one per task spec [m].
        item_ids: of each objective [m][I]: the index of the document, which is lm-eval's
            ``doc_id``, so that ``samples={task: sorted(ints)}`` selects the same documents;
            for a group ``subtask/index``.
        aggregates: how the value of each objective is made of item scores [m].
        sources: task, group or tag of each objective [m].
        digest: identity of the fitness: lm-eval version, task settings, documents, prompts,
            metric and filter. Not paths.
    """

    objectives: tuple[Objective, ...]
    item_ids: tuple[tuple[str, ...], ...]
    aggregates: tuple[Aggregate, ...]
    sources: tuple[str, ...]
    digest: str
    _columns: tuple[Column, ...]
    _tasks: tuple[LoadedTask, ...]
    _templates: Templates

    @staticmethod
    def load(
        specs: Sequence[TaskSpec],
        include_paths: Sequence[Path] = (),
        data_root: Path | None = None,
        allow_task_code: bool = False,
        seed: int = FEWSHOT_SEED,
        margins: bool = False,
    ) -> LmEvalTasks:
        """Load tasks and build every prompt.

        Args:
            specs: one per objective; their order is the order of objectives.
            include_paths: folders with task files; they win over lm-eval's own tasks.
            data_root: where relative data paths are looked up first (the study file's folder);
                then the current directory, then the folder of the task file.
            allow_task_code: let task files outside lm-eval run Python, and tasks execute
                generated code.
            seed: of the few-shot examples, as ``lm_eval --seed`` has it. An item keeps the
                examples that a run over the whole task gives it, whatever subset is scored.
            margins: give metrics of generated answers margins: the mean log-likelihood per token
                of the item's reference answer, which costs one log-likelihood more per item.
                Tasks with an item without a reference answer (``doc_to_target``) get none.

        Raises:
            TaskError: one line per spec that cannot be used.
        """
        if not specs:
            raise TaskError("tasks: need at least 1")
        import lm_eval
        import lm_eval.api.metrics

        templates = Templates()
        with _lm_eval(templates, logging.ERROR), silent_datasets():
            found = _TaskIndex(specs, tuple(include_paths), data_root, allow_task_code)
            columns = Columns(
                found.open,
                functools.partial(_build, seed=seed),
                {
                    lm_eval.api.metrics.mean: ("mean", False),
                    lm_eval.api.metrics.perplexity: ("exp", False),
                    lm_eval.api.metrics.weighted_perplexity: ("exp", True),
                    lm_eval.api.metrics.bits_per_byte: ("bits", True),
                },
                margins,
            )
            problems = []
            for number, spec in enumerate(specs):
                try:
                    columns.add(spec)
                except TaskError as error:
                    problems.append(f"tasks[{number}]{joint(str(error))}{error}")
            if problems:
                raise TaskError("\n".join(problems))
            return LmEvalTasks(
                objectives=tuple(columns.objectives),
                item_ids=tuple(map(columns.item_ids, columns.columns)),
                aggregates=tuple(column.aggregate for column in columns.columns),
                sources=tuple(spec.task for spec in specs),
                digest=digest_of(lm_eval.__version__, columns.tasks, columns.columns),
                _columns=tuple(columns.columns),
                _tasks=tuple(columns.tasks),
                _templates=templates,
            )

    @property
    def ungraded(self) -> tuple[str, ...]:
        """Why an objective has no margins [m]; empty where each of its items has one."""

        def reason(column: Column) -> str:
            try:
                return ungraded(column, self._tasks)
            except _TASK_FAULTS as error:
                return f"its reference answers cannot be made ({type(error).__name__}: {error})"

        with _lm_eval(self._templates, logging.ERROR):
            return tuple(map(reason, self._columns))

    def text(self, objective: int, item: str) -> str:
        """Return what a task asks in one item, without few-shot examples.

        Args:
            objective: its number.
            item: one of its ids.
        """
        parts = self._columns[objective].parts
        part = next(one for one in parts if item.rpartition("/")[0] == one.prefix.rstrip("/"))
        task = self._tasks[part.task]
        with _lm_eval(self._templates, logging.ERROR):
            return str(task.task.doc_to_text(task.docs[int(item.removeprefix(part.prefix))]))

    def attach(self, live: Live) -> LmEvalFitness:
        """Return what scores a live model; see ``bind``."""
        return self.bind(
            live.model, live.tokenizer, live.batch_size, live.batch_tokens, live.found, live.share
        )

    def bind(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        batch_tokens: int | None = None,
        found: bool = False,
        share: float = 1.0,
    ) -> LmEvalFitness:
        """Return the fitness of whatever weights ``model`` holds at the time of scoring.

        Args:
            model: a live transformers model; it is put into evaluation mode.
            tokenizer: its tokenizer (a transformers one).
            batch_size: prompts per forward pass of lm-eval's own code, at least 1; it answers
                for encoder-decoders, and what is unusual.
            batch_tokens: tokens per forward pass of ours; None to find it by memory.
            found: whether an earlier run found ``batch_tokens`` by its memory.
            share: of a GPU that may be filled.

        Raises:
            TaskError: the model's context is too short for what a task generates.
        """
        if batch_size < 1:
            raise InputError(f"batch_size: must be an integer >= 1, got {batch_size}")
        with _lm_eval(self._templates, logging.ERROR):
            from lm_eval.models.huggingface import HFLM

            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            for task in self._tasks:
                _check_room(task, lm)
        # Prompts never change, so their tokens are kept; lm-eval only slices the lists.
        lm.tok_encode = functools.cache(lm.tok_encode)
        session = functools.partial(_lm_eval, self._templates)
        answers: Any = lm
        if lm.backend == "causal":
            from evomerge.fitness.hot.runner import Runner

            answers = Runner(lm, batch_tokens, found, share)
        return LmEvalFitness(self.objectives, self._columns, self._tasks, answers, lm, session)


class _TaskIndex:
    """Finds task files by name and opens those that may be opened."""

    def __init__(
        self,
        specs: Sequence[TaskSpec],
        include_paths: Sequence[Path],
        data_root: Path | None,
        allow_task_code: bool,
    ) -> None:
        from lm_eval.tasks import TaskManager

        for path in include_paths:
            if not path.is_dir():
                raise TaskError(
                    f"include_path: {path.absolute()} is not a folder (of task files; verify takes "
                    "--root FOLDER, that of the study file, or --include FOLDER)"
                )
        self._include_paths = include_paths
        self._allow_task_code = allow_task_code
        self._reachable = functools.cache(reachable)  # a hub that is away costs its wait once
        self._roots = [root for root in (data_root, Path.cwd()) if root is not None]
        paths = [str(path) for path in include_paths]
        self._manager = TaskManager(include_path=paths, include_defaults=False)
        if not all(complete(spec.task, self._manager.task_index) for spec in specs):
            # Seconds: it reads every task file of lm-eval.
            self._manager = TaskManager(include_path=paths)

    def open(self, spec: TaskSpec) -> Opened:
        """Return what a spec names, loaded.

        Raises:
            TaskError: unknown, needs code, or its data is missing.
        """
        entry = self._entry(spec.task)
        if not is_group(entry) and not is_tag(entry):
            return Opened({spec.task: self._task(spec.task)}, single=True)
        metrics = tuple(
            GroupMetric(one.metric, tuple(one.filter_list or ()), one.weight_by_size)
            for one in (self._reported(entry) if is_group(entry) else ())
        )
        names = leaves(spec.task, self._entry)
        return Opened({name: self._task(name) for name in names}, metrics)

    def _reported(self, entry: Any) -> list[Any]:
        """Return what lm-eval reports for a group."""
        from lm_eval.config.group import GroupConfig

        try:
            config = GroupConfig(
                group=entry.name, aggregate_metric_list=entry.cfg.get("aggregate_metric_list")
            )
        except _TASK_FAULTS as error:
            raise TaskError(f"{entry.name!r} cannot be loaded: {error}") from error
        listed = config.aggregate_metric_list or []
        if any(one.aggregation != "mean" for one in listed):
            raise TaskError(
                f"{entry.name!r} aggregates its tasks by a function of its own "
                "(name the tasks one by one)"
            )
        return listed

    def _task(self, name: str) -> Any:
        """Return lm-eval's task object."""
        from datasets.exceptions import DatasetsError

        config, chain, trusted = self._audited(name, self._entry(name))
        local = False
        if trusted:
            source: Any = name
        else:
            config, local = resolve_data(config, [*self._roots, chain[0].parent])
            source = config
        with _plain_seeds(), hub_or_offline(local, self._reachable) as offline:
            try:
                (task,) = self._manager.load([source])["tasks"].values()
            except (*_TASK_FAULTS, DatasetsError) as error:
                raise TaskError(load_problem(name, config, error, offline)) from error
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"{name!r} needs images or audio; only text tasks are supported")
        return task

    def _entry(self, name: str) -> Any:
        """Return lm-eval's index entry of a task, group or tag."""
        index = self._manager.task_index
        if name not in index:
            raise TaskError(unknown_task(name, list(index), self._include_paths))
        return index[name]

    def _audited(self, name: str, entry: Any) -> tuple[dict[str, Any], tuple[Path, ...], bool]:
        """Return a task's settings, its files, and whether they all come with lm-eval."""
        import lm_eval.tasks
        from lm_eval.api.registry import metric_registry
        from lm_eval.tasks._yaml_loader import load_yaml

        home = Path(lm_eval.tasks.__file__).resolve().parent
        chain = include_chain(entry.yaml_path)
        trusted = all(path.is_relative_to(home) for path in chain)
        if not self._allow_task_code:
            reason = code_reason(entry.cfg, chain, home, tuple(metric_registry.keys()))
            if reason:
                raise TaskError(
                    f"{name!r} {reason}; set fitness.allow_task_code: true if you trust it with "
                    "this machine"
                )
        if trusted:
            return dict(entry.cfg), chain, True
        try:
            return load_yaml(entry.yaml_path, resolve_func=True), chain, False
        except _TASK_FAULTS as error:
            raise TaskError(f"{name!r} cannot be loaded: {error}") from error


def _build(task: Any, spec: TaskSpec, seed: int) -> LoadedTask:
    """Build every prompt of a task, as ``Task.build_all_requests`` does, without progress bars."""
    from lm_eval.api.task import ConfigurableTask

    own = task.get_config("num_fewshot")
    if spec.num_fewshot is not None:
        if spec.num_fewshot < 0:
            raise TaskError(f"num_fewshot: must be an integer >= 0, got {spec.num_fewshot}")
        if own == 0 and spec.num_fewshot != 0:
            raise TaskError(
                f"num_fewshot: {spec.task!r} fixes it at 0 and lm-eval ignores other values "
                f"(remove num_fewshot: {spec.num_fewshot})"
            )
        task.set_config(key="num_fewshot", value=spec.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    _check_greedy(task, spec.task)
    task.set_fewshot_seed(seed=seed)
    docs, requests = [], []
    try:
        for index, doc in task.doc_iterator(rank=0, limit=None, world_size=1):
            context = task.fewshot_context(
                doc,
                num_fewshot=task.get_config("num_fewshot"),
                system_instruction=None,
                apply_chat_template=False,
                fewshot_as_multiturn=False,
                chat_template=None,
                gen_prefix=task.doc_to_prefix(doc),
            )
            made = task.construct_requests(
                doc=doc,
                ctx=context,
                metadata=(task.get_config("task"), index, task.get_config("repeats")),
                apply_chat_template=False,
                chat_template=None,
            )
            made = made if isinstance(made, list) else [made]
            docs.append(doc)
            requests.append(tuple(sorted(made, key=lambda request: int(request.idx))))
    except _TASK_FAULTS as error:
        raise TaskError(
            f"{spec.task!r}: item '{len(docs)}' gives no prompt: {type(error).__name__}: {error}"
        ) from error
    if not docs:
        raise TaskError(f"{spec.task!r} has no items")
    own_code = type(task) is not ConfigurableTask or callable(task.get_config("process_results"))
    choices = []
    if task.OUTPUT_TYPE == "multiple_choice" and not own_code:
        choices = [choices_of(task, doc) for doc in docs]
    known = tuple(one for one in choices if one is not None)
    return LoadedTask(
        task, tuple(docs), tuple(requests), own_code, known if len(known) == len(docs) else ()
    )


def _check_greedy(task: Any, name: str) -> None:
    """Refuse tasks whose answers are drawn at random: the same merge would score differently."""
    from lm_eval.models.utils import normalize_gen_kwargs

    settings = task.get_config("generation_kwargs")
    if settings and normalize_gen_kwargs(settings).get("do_sample"):
        raise TaskError(
            f"{name!r} samples its answers (generation_kwargs: do_sample or temperature > 0), so "
            "the same merge would score differently each time; copy the task and set "
            "do_sample: false, temperature: 0"
        )


def _check_room(task: LoadedTask, lm: Any) -> None:
    """Refuse a model whose whole context a task's answer would fill."""
    from lm_eval.models.utils import normalize_gen_kwargs

    settings = {}  # one request for each of the settings, usually one
    for request in (request for made in task.requests for request in made):
        if request.request_type == "generate_until":
            settings[repr(request.args[1])] = request
    for request in settings.values():
        tokens = normalize_gen_kwargs(request.args[1], lm.max_gen_toks)["max_gen_toks"]
        if tokens >= lm.max_length:
            raise TaskError(
                f"{request.task_name}: generation_kwargs.max_gen_toks: {tokens} tokens leave no "
                f"room for the prompt in the model's context of {lm.max_length} tokens "
                "(set a smaller max_gen_toks in the task)"
            )


@contextmanager
def _lm_eval(templates: Templates, level: int) -> Iterator[None]:
    """Run lm-eval with our templates and with its log lines below ``level`` held back."""
    import lm_eval.utils

    logger = logging.getLogger("lm_eval")
    before, environment = logger.level, lm_eval.utils.env
    templates.filters["regex_replace"] = lm_eval.utils.regex_replace
    logger.setLevel(max(level, logger.getEffectiveLevel()))
    lm_eval.utils.env = templates
    try:
        yield
    finally:
        lm_eval.utils.env = environment
        logger.setLevel(before)


@contextmanager
def _plain_seeds() -> Iterator[None]:
    """Seed the global generators as ``simple_evaluate`` does; some tasks shuffle their choices."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  tasks use it
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  tasks use it
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  tasks use it


def generation_settings(lm: Any, given: Mapping[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Return stop strings, most new tokens, and what else a request wants, as HFLM reads them."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    settings = dict(normalize_gen_kwargs(dict(given), lm.max_gen_toks))
    end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    stops = handle_stop_sequences(settings.pop("until", None), eos=end)
    return stops, int(settings.pop("max_gen_toks")), settings


def before_stops(text: str, stops: Sequence[str]) -> str:
    """Return a generated text up to the first of the stop strings, as HFLM cuts it."""
    from lm_eval.models.utils import postprocess_generated_text

    return str(postprocess_generated_text(text, list(stops), None))


def rolling_windows(lm: Any, text: str) -> list[tuple[list[int], list[int]]]:
    """Return the contexts and continuations that a text is cut into, as HFLM cuts it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = get_rolling_token_windows(
        token_list=lm.tok_encode(text),
        prefix_token=lm.prefix_token_id,
        max_seq_len=lm.max_length,
        context_len=1,
    )
    return [make_disjoint_window(window) for window in windows]


__all__ = ["FEWSHOT_SEED", "LmEvalFitness", "LmEvalTasks", "TaskSpec"]
