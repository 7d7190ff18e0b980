"""What a submitted study takes along to a cluster, and what it never does.

The study file travels with its task files, its Python objectives and the data that they name:
kilobytes. Weights do not: models are hub ids, or directories that every machine of the cluster
sees under the same name. Nor do tokens and passwords.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from evomerge.checkpoint import is_local, resolve_source
from evomerge.config import StudyFile
from evomerge.errors import InputError
from evomerge.fitness.task_files import FILE_LOADERS, include_chain, read_yaml
from evomerge.fitness_file import include_paths, task_specs
from evomerge.journal import JOURNAL
from evomerge.objective_sections import PythonSection
from evomerge.tracking_target import tracking_target

#: Ray keeps what jobs bring in the memory of the head, and copies it to every node.
LIMIT_BYTES = 64 << 20
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack",
)  # fmt: skip
_MIB = 1 << 20
#: Of the study file in the job's working directory.
STUDY = "study.yaml"
#: Read from the environment of each machine, by those who need them.
_SECRETS = (
    "HF_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
)  # fmt: skip
#: Models of one folder that are noted one by one.
_SINGLY = 8
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class StudyKey:
    """Which study a job belongs to: its name, and where its journal lies on the cluster.

    Two jobs with one key would write one journal, so the key is what must not run twice.
    """

    name: str
    directory: str

    @property
    def job(self) -> str:
        """What the ids of its jobs begin with; ``-1``, ``-2`` ... follow."""
        return f"evomerge-{self.name}-{blake2b(self.directory.encode(), digest_size=4).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Package:
    """A study ready to travel.

    Attributes:
        key: of the study.
        folder: what becomes the working directory of the job; holds nothing else.
        digest: of the folder's content.
        size: bytes.
        files: number of files.
        notes: what the user should know; nothing that prevents the job.
    """

    key: StudyKey
    folder: Path
    digest: str
    size: int
    files: int
    notes: tuple[str, ...]


def study_key(file: StudyFile) -> StudyKey:
    """Return the key of a study.

    Raises:
        InputError: its directory is relative, which on a cluster is nowhere.
    """
    if not file.directory or not Path(file.directory).is_absolute():
        raise InputError(
            f"directory: a submitted study needs an absolute one, got "
            f"{file.directory or 'none'}: a folder "
            "on a volume that outlives the cluster and that its head sees, such as "
            f"/shared/studies/{file.name} (in the study file, or --set directory=...)"
        )
    return StudyKey(str(file.name), str(Path(file.directory)))


def pack(file: StudyFile, path: Path, folder: Path) -> Package:
    """Write what a study needs on a cluster into an empty folder.

    Args:
        file: the study file, with overrides.
        path: where it lies.
        folder: exists and is empty.

    Raises:
        InputError: every file that is missing or may not travel; a pool that does not use Ray;
            files that are too large together.
    """
    root = path.resolve().parent
    key = study_key(file)
    if file.pool.kind != "ray":
        raise InputError(
            f"pool.kind: {file.pool.kind} would score on the cluster's head, without its workers "
            "(use ray: in the study file, or --set pool.kind=ray)"
        )
    file, notes = _for_cluster(file, root)
    found = _files(file, root)
    _require_small(found, root)
    for source in found:
        target = folder / _inside(source, root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (folder / STUDY).write_text(file.to_yaml(), encoding="utf-8")
    packed = sorted(one for one in folder.rglob("*") if one.is_file())
    digest = blake2b(digest_size=16)
    for one in packed:
        digest.update(json.dumps(str(one.relative_to(folder))).encode())
        digest.update(blake2b(one.read_bytes()).digest())
    size = sum(one.stat().st_size for one in packed)
    return Package(key, folder, digest.hexdigest(), size, len(packed), notes)


def _for_cluster(file: StudyFile, root: Path) -> tuple[StudyFile, tuple[str, ...]]:
    """Return the file with the same models and tracking wherever it is read, and notes on them."""
    base = resolve_source(file.models.base, root)
    experts = {name: resolve_source(one, root) for name, one in file.models.experts.items()}
    models = file.models.model_copy(update={"base": base, "experts": experts})
    named = {"base": base, **{f"experts.{name}": one for name, one in experts.items()}}
    notes = _not_sent(named)
    uri = file.tracking.uri
    if uri:  # it is sent even where it is not used
        tracking_target(uri, file.tracking.experiment, root)  # refuses passwords in it
    if file.tracking.enabled and uri:
        parts = urlsplit(uri)
        if parts.scheme == "sqlite" and not uri.startswith("sqlite:////"):
            raise InputError(
                f"tracking.uri: {uri} is relative, so it would lie in the job's own folder and be "
                "lost (leave it out: the database is then in the study's directory)"
            )
        if parts.hostname in _LOOPBACK:
            notes.append(
                f"tracking.uri: {parts.hostname} is then the cluster's head, not this machine"
            )
    elif file.tracking.enabled and os.environ.get("MLFLOW_TRACKING_URI"):
        notes.append(
            "tracking.uri: MLFLOW_TRACKING_URI is set here but not sent; the cluster uses its own, "
            "or a database in the study's directory (name the server in tracking.uri)"
        )
    if here := [name for name in _SECRETS if os.environ.get(name)]:
        notes.append(
            f"{', '.join(here)}: not sent, because whoever may list jobs could read them; the "
            "cluster needs its own (ray_cluster.yaml: evomerge.env; on Kubernetes a Secret)"
        )
    update = {"models": models, "directory": str(file.directory)}
    return file.model_copy(update=update), tuple(notes)


def _not_sent(sources: Mapping[str, str]) -> list[str]:
    """Return which models must be on the cluster, folders of many in one line."""
    local = {
        where: source
        for where, source in sources.items()
        if Path(source).is_absolute() or source.startswith("~")
    }
    folders = Counter(str(Path(source).parent) for source in local.values())
    notes: dict[str, None] = {}
    for where, source in local.items():
        folder = str(Path(source).parent)
        count = folders[folder]
        what, shown = f"models.{where}", source
        if count > _SINGLY:
            what, shown = f"models: {count} of them", folder
        here = "" if is_local(shown) else ", and it does not exist on this machine"
        notes[
            f"{what}: weights are not sent; {shown} must be there on every machine of the "
            f"cluster{here} (a shared volume, or a hub id instead)"
        ] = None
    return list(notes)


def _files(file: StudyFile, root: Path) -> tuple[Path, ...]:
    """Return all files that the study refers to, absolute, in order.

    Raises:
        InputError: some do not exist, lie outside of ``root``, or hold weights.
    """
    problems: list[str] = []
    found: dict[Path, None] = {}
    for where, named, sources in _named(file, root):
        if Path(named).is_absolute():
            continue  # a path of the cluster, like those of models
        for source in sources:
            if not _inside(source, root):
                problems.append(
                    f"{where}: {named} lies outside of {root} and cannot be sent (move it there, "
                    "or give an absolute path that every machine of the cluster sees)"
                )
            elif source.suffix.lower() in _WEIGHTS:
                problems.append(
                    f"{where}: {_inside(source, root)} looks like weights, which are not sent "
                    "(keep it on a volume that every machine of the cluster sees)"
                )
            elif not source.is_file():
                problems.append(f"{where}: no such file: {source}")
            else:
                found[source] = None
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))
    return tuple(sorted(found))


def _inside(source: Path, root: Path) -> str:
    """Return a path from ``root``, empty where it, or what it links to, does not lie below."""
    plain = Path(os.path.normpath(source))
    below = plain.is_relative_to(root) and plain.resolve().is_relative_to(root.resolve())
    return str(plain.relative_to(root)) if below else ""


def _named(file: StudyFile, root: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """Yield (dotted path, as written, files) of everything that the study file names."""
    given = file.fitness.include_path
    folders = [given] if isinstance(given, str) else given
    for name, folder in zip(folders, include_paths(file, root), strict=True):
        if not folder.is_dir() and not Path(name).is_absolute():
            raise InputError(f"fitness.include_path: no such directory: {folder}")
        yield "fitness.include_path", name, sorted(_below(folder))
    yield from _task_data(file, root)
    for number, goal in enumerate(file.fitness.objectives):
        where = f"fitness.objectives[{number}]"
        if isinstance(goal, PythonSection):
            code = root / goal.function.rpartition(":")[0]
            # It may import the modules beside it.
            beside = sorted(code.parent.glob("*.py")) if code.is_file() else []
            yield f"{where}.function", str(goal.function), beside or [code]
            yield f"{where}.items", goal.items, [root / goal.items]
        elif text := getattr(goal, "text", None):
            yield f"{where}.text", text, [root / text]
    for objective, bank in getattr(file.fitness.estimator, "banks", {}).items():
        yield f"fitness.estimator.banks.{objective}", bank, [root / bank]
    if text := str(file.search.arguments.get("start") or ""):
        start, colon, trial = text.rpartition(":")
        study = bool(colon) and trial.isdigit()
        name = start if study else text
        source = root / name
        yield "search.arguments.start", name, [source / JOURNAL if study else source]


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without what is hidden or compiled."""
    for one in folder.rglob("*"):
        parts = one.relative_to(folder).parts
        if one.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
            yield one


def _task_data(file: StudyFile, root: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """Yield the data and the included files that the study's own task files name."""
    own = [one for folder in include_paths(file, root) for one in _below(folder)]
    tasks = {one: read_yaml(one) for one in sorted(own) if one.suffix in (".yaml", ".yml")}
    wanted = {spec.task for spec in task_specs(file)}
    reached: set[Path] = set()
    while new := [one for one in tasks if one not in reached and _is_any(tasks[one], wanted)]:
        reached.update(new)
        for one in new:
            wanted |= _members(tasks[one])
    for one in sorted(reached):
        for link in include_chain(one):
            yield "fitness.include_path", str(link.name), [link]
            for name in _data_names(read_yaml(link), root):
                source = root / name
                sources = sorted(_below(source)) if source.is_dir() else sorted(root.glob(name))
                yield f"{one.name}: dataset", name, sources or [source]


def _is_any(task: dict[str, Any], names: set[str]) -> bool:
    tags = task.get("tag") or []
    of = {
        str(task.get("task")),
        str(task.get("group")),
        *([tags] if isinstance(tags, str) else tags),
    }
    return bool(of & names)


def _members(task: dict[str, Any]) -> set[str]:
    """Return the names of the tasks of a group."""
    inside = task.get("task")
    if "group" not in task or not isinstance(inside, list):
        return set()
    return {str(one.get("task") if isinstance(one, dict) else one) for one in inside}


def _data_names(task: dict[str, Any], root: Path) -> Iterator[str]:
    """Yield the local paths, absolute ones left out, that one task file names."""
    kwargs = task.get("dataset_kwargs") or {}
    path = str(task.get("dataset_path") or "")
    names = list(_flat(kwargs.get("data_files"))) if isinstance(kwargs, dict) else []
    if isinstance(kwargs, dict) and "data_dir" in kwargs:
        names = [str(kwargs["data_dir"])]  # the files are relative to it
    if path and path not in FILE_LOADERS and (root / path).is_dir():
        names.append(path)
    for name in names:
        if "://" not in name and not Path(name).is_absolute():
            yield name


def _flat(files: Any) -> Iterator[str]:
    """Yield the names in a path, a list of paths, or a mapping of them by split."""
    if isinstance(files, dict):
        files = list(files.values())
    for one in files if isinstance(files, list) else [files]:
        if isinstance(one, list):
            yield from _flat(one)
        elif one is not None:
            yield str(one)


def _require_small(files: Iterable[Path], root: Path) -> None:
    sizes = sorted(((one.stat().st_size, one) for one in files), reverse=True)
    total = sum(size for size, _ in sizes)
    if total <= LIMIT_BYTES:
        return
    largest = [f"  {size / _MIB:.1f} MiB {_inside(one, root)}" for size, one in sizes[:5]]
    lines = "\n".join(largest)
    raise InputError(
        f"the files of this study are {total / _MIB:.1f} MiB, and at most {LIMIT_BYTES >> 20} MiB "
        "are sent with a job; put large ones on a volume that every machine of the cluster sees, "
        f"and give their absolute paths. The largest:\n{lines}"
    )


@dataclass(frozen=True, slots=True)
class Submitted:
    """What is remembered beside a study file about its job; holds no secret.

    Attributes:
        name, directory: of the study's key.
        address: of the cluster; None in records of before it was always known.
        job: submission id of the last attempt.
        overrides: of settings, ``dotted.key=value``, with which it was submitted.
    """

    name: str
    directory: str
    address: str | None
    job: str
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> StudyKey:
        """Of the study."""
        return StudyKey(self.name, self.directory)

    def save(self, study: Path) -> None:
        """Write it beside the study file, atomically.

        Raises:
            InputError: that cannot be written.
        """
        path = _record_path(study)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written: {error.strerror} (the job {self.job} was submitted; "
                "`evomerge logs` and `stop` need this file, or the study's directory)"
            ) from error


def submitted(study: Path) -> Submitted | None:
    """Return what is remembered of a study file's job, None where it was not submitted from here.

    Raises:
        InputError: the record is damaged.
    """
    path = _record_path(study)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        overrides = data.pop("overrides", [])
        if not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
            raise TypeError("overrides: expected a list of text")
        return Submitted(**data, overrides=tuple(overrides))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not a record of a submitted study (remove it, and submit again)"
        ) from error


def _record_path(study: Path) -> Path:
    return study.with_name(f"{study.stem}.job.json")


def bare_address(address: str | None) -> str | None:
    """Return an address without user and password."""
    if address is None or "@" not in address:
        return address
    if "://" not in address:  # host:port, of which the host would be taken for a scheme
        return address.rpartition("@")[2]
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
