"""lm-eval task files as files: what they include, whether they run code, where their data lies.

Nothing here imports lm-eval: a task file is judged by its text before lm-eval sees it, because
lm-eval runs the Python beside a task file as soon as it loads one with a ``!function`` tag.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment

from evomerge.errors import TaskError
from evomerge.fitness.measures import MEASURES

#: Loaders of the ``datasets`` library that read local files; "dataset_path: json" is not a folder.
FILE_LOADERS = ("arrow", "csv", "json", "parquet", "text", "webdataset", "xml")

FUNCTION_TAG = "!function"


class _TextLoader(yaml.SafeLoader):
    """Reads a task file without running anything; a function stays a string."""


_TextLoader.add_constructor(FUNCTION_TAG, lambda loader, node: f"{FUNCTION_TAG} {node.value}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in one task file, functions as strings, includes not followed.

    Raises:
        TaskError: unreadable, not YAML, or not a mapping.
    """
    try:
        # _TextLoader is a SafeLoader with one more tag that yields a string.
        data = yaml.load(path.read_bytes(), Loader=_TextLoader)  # noqa: S506
    except (OSError, yaml.YAMLError) as error:
        raise TaskError(f"{path}: cannot be read as a task file: {error}") from error
    if not isinstance(data, dict):
        raise TaskError(f"{path}: expected a mapping, got {type(data).__name__}")
    return data


def include_chain(path: Path) -> tuple[Path, ...]:
    """Return a task file and every file that it includes, directly or not.

    Raises:
        TaskError: one of them cannot be read, or they include each other in a circle.
    """
    chain: list[Path] = []

    def visit(file: Path) -> None:
        file = file.expanduser().resolve()
        if file in chain:
            raise TaskError(f"{path}: includes {file} twice or in a circle")
        chain.append(file)
        included = read_yaml(file).get("include", ())
        for name in [included] if isinstance(included, str) else included:
            visit(file.parent / name)

    visit(path)
    return tuple(chain)


def tasks_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the settings behind each name of a task, group or tag that a folder's files define.

    Files that cannot be read are passed over: loading the tasks tells of them.

    Args:
        folder: looked through with its subfolders; may be absent.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            settings: dict[str, Any] = {}
            for file in reversed(include_chain(path)):
                settings |= read_yaml(file)
        except TaskError:
            continue
        tag = settings.get("tag")
        tags = tag if isinstance(tag, list) else [tag]
        names = [settings.get("task"), settings.get("group"), *tags]
        for name in names:
            if isinstance(name, str):
                found.setdefault(name, settings)
    return found


def has_reference(settings: Mapping[str, Any]) -> bool:
    """Return whether a task's file lets it have the metric ``reference_loglikelihood``.

    Groups are taken to: their tasks have files of their own.

    Args:
        settings: of a task or group, includes merged.
    """
    if "group" in settings:
        return True
    kinds = MEASURES["reference_loglikelihood"].kinds
    kind = settings.get("output_type", "generate_until")  # lm-eval's default
    return kind in kinds and settings.get("doc_to_target") is not None


def unknown_task(name: str, known: Sequence[str], folders: Sequence[Path]) -> str:
    """Return the line that tells a user why a task is unknown.

    Args:
        name: of the task.
        known: names of all tasks, groups and tags.
        folders: with task files of the user's own.
    """
    # Below 0.8 lm-eval's 14,000 names hold something like anything: a guess that misleads.
    near = get_close_matches(name, known, n=1, cutoff=0.8)
    line = f"unknown task {name!r}"
    line += f" (did you mean {near[0]!r}?)" if near else " (`lm_eval ls tasks` lists lm-eval's own)"
    if not folders:
        return line + "; your own tasks need fitness.include_path: the folder of their YAML files"
    line += f"; no task file in fitness.include_path defines it: {', '.join(map(str, folders))}"
    for path in (path for folder in folders for path in sorted(folder.glob("**/*.yaml"))):
        try:
            include_chain(path)
        except TaskError as error:
            line += f"; {error}"
    return line


def functions_in(path: Path) -> tuple[str, ...]:
    """Return what the ``!function`` tags of one file name, in order."""
    events = yaml.parse(path.read_bytes(), Loader=yaml.SafeLoader)
    return tuple(
        str(getattr(event, "value", "?"))
        for event in events
        if getattr(event, "tag", None) == FUNCTION_TAG
    )


def code_reason(
    config: Mapping[str, Any], chain: Sequence[Path], trusted: Path, metrics: Collection[str]
) -> str | None:
    """Say how a task would run code that does not come with lm-eval, None when it does not.

    Args:
        config: the whole task, includes merged.
        chain: its files.
        trusted: the folder of the installed lm-eval; files below it may load their Python.
        metrics: names of the metrics that lm-eval itself has.
    """
    if config.get("unsafe_code"):
        return "executes generated code (unsafe_code: true)"
    outside = [path for path in chain if not path.is_relative_to(trusted)]
    for path in outside:
        functions = functions_in(path)
        if functions:
            return f"loads Python code ({path.name}: {', '.join(functions)})"
    if not outside:
        return None
    if "class" in config:
        return f"is a Python class ({config['class']})"
    if config.get("dataset_path") == "pandas":
        return "reads pickled data (dataset_path: pandas)"
    if config.get("use_prompt") and not str(config["use_prompt"]).startswith("qa-basic:"):
        return f"loads a prompt library (use_prompt: {config['use_prompt']})"
    for entry in config.get("metric_list") or ():
        # lm-eval looks for any other name in HF Evaluate, which runs a downloaded script.
        if isinstance(entry, Mapping) and (
            entry.get("hf_evaluate") or entry.get("metric") not in metrics
        ):
            return f"loads the metric {entry.get('metric')!r} as a script from HF Evaluate"
    return None


def resolve_data(config: Mapping[str, Any], roots: Sequence[Path]) -> tuple[dict[str, Any], bool]:
    """Return a copy of a task whose local data paths are absolute.

    Args:
        config: the whole task, includes merged.
        roots: folders to look in, the first that has the file wins.

    Returns:
        the task, and whether all its data is local.

    Raises:
        TaskError: a local file that is in none of the folders.
    """
    config = dict(config)
    kwargs = dict(config.get("dataset_kwargs") or {})
    path = str(config.get("dataset_path") or "")
    if "data_dir" in kwargs:
        # Files given beside data_dir are relative to it; datasets joins them itself.
        kwargs["data_dir"] = _found(str(kwargs["data_dir"]), roots, "data_dir")
    elif "data_files" in kwargs:
        kwargs["data_files"] = _each(kwargs["data_files"], roots)
    if kwargs:
        config["dataset_kwargs"] = kwargs
    if path in FILE_LOADERS:
        return config, "://" not in str(kwargs.get("data_files", ""))
    folder = next((root / path for root in roots if path and (root / path).is_dir()), None)
    if folder is None:
        if path.startswith((".", os.sep)):
            _found(path, roots, "dataset_path")
        return config, False
    config["dataset_path"] = str(folder.resolve())
    return config, True


def _each(files: Any, roots: Sequence[Path]) -> Any:
    """Resolve the three forms of ``data_files``: a path, a list, a mapping by split."""
    if isinstance(files, Mapping):
        return {split: _each(value, roots) for split, value in files.items()}
    if isinstance(files, str):
        return _found(files, roots, "data_files")
    return [_found(str(file), roots, "data_files") for file in files]


def _found(name: str, roots: Sequence[Path], key: str) -> str:
    """Return the absolute path of a local file, folder or pattern; addresses stay as they are."""
    if "://" in name:
        return name
    for root in roots:
        # glob.glob, unlike Path.glob, takes absolute patterns too.
        if (root / name).exists() or glob.glob(str(root / name), recursive=True):  # noqa: PTH207
            return str((root / name).absolute())
    raise TaskError(f"{key}: {name!r} not found {_where_it_may_be(name, roots)}")


def _where_it_may_be(name: str, roots: Sequence[Path]) -> str:
    """Return where a file was looked for, and from which folder above it would be found."""
    folders = list(dict.fromkeys(root.absolute() for root in roots))
    looked = f"(looked in {', '.join(map(str, folders))}"
    above = (folder for root in folders for folder in root.parents)
    near = next((folder for folder in above if (folder / name).exists()), None)
    if near is None:
        return f"{looked}; put it into one of them, or start where the path starts from)"
    return f"{looked}; it is in {near}: start evomerge there, or verify with --root {near})"


def load_problem(name: str, config: Mapping[str, Any], error: Exception, offline: bool) -> str:
    """Return the line that tells a user why a task did not load."""
    dataset = str(config.get("dataset_path"))
    if offline and (isinstance(error, OSError) or "cache" in str(error)):
        return (
            f"dataset {dataset!r} of {name!r} is not available offline (the hub cannot be reached "
            "and it is not in the local cache; run once with a connection, or copy the cache)"
        )
    return f"{name!r} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"


class Templates(SandboxedEnvironment):
    """Jinja as lm-eval sets it up, but compiled once and unable to reach Python's internals.

    lm-eval compiles a template each time it renders one, which costs more than scoring a short
    answer, and renders templates of any task file without a sandbox.
    """

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        self._compiled: dict[str, jinja2.Template] = {}

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> jinja2.Template:
        """Return the compiled template of ``source``."""
        if args or kwargs or not isinstance(source, str):
            return super().from_string(source, *args, **kwargs)
        if source not in self._compiled:
            self._compiled[source] = super().from_string(source)
        return self._compiled[source]
