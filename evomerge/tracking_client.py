"""All that we import of MLflow: its client, made quick to give up, quiet, and quick to commit."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import SetupError
from evomerge.tracking_target import Target

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel as LoggedModel
    from mlflow.entities import Run as Run
    from mlflow.tracking import MlflowClient as MlflowClient

#: A value of a series: name, value, unix milliseconds, step.
Point = tuple[str, float, int, int]

#: By default MLflow retries an unreachable server for 246 s per call. Not once is right for us:
#: a request whose answer was lost may have been done, so we look before we send it again.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
#: File systems of one machine, on which sqlite may keep a write-ahead log.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs"}


def limit_mlflow() -> None:
    """Set what MLflow reads from the environment when it is imported; the user's values stay."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # It announces every retry in paragraphs; what comes of them is said once, by ``Tracker``.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def open_client(target: Target) -> MlflowClient:
    """Return a client; a sqlite database's folder is made where it is absent."""
    limit_mlflow()
    from mlflow.tracking import MlflowClient

    database = target.database
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
        if target.own and file_system(database.parent) in _LOCAL:
            _log_ahead(database)
    return MlflowClient(tracking_uri=target.uri)


@contextmanager
def setup_errors(before: str, after: str) -> Iterator[None]:
    """Turn what MLflow and the disk raise while the context is open into ``SetupError``.

    Args:
        before: what failed; a colon and the reason follow.
        after: what to do about it.

    Raises:
        SetupError: see above.
    """
    limit_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise SetupError(f"{before}: {first_line(error)} ({after})") from error


def log_batch(
    client: MlflowClient,
    run: str,
    metrics: Sequence[Point] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Log all of it to a run, in as few requests as MLflow takes."""
    from mlflow.entities import Metric, Param, RunTag

    client.log_batch(
        run,
        [Metric(*metric) for metric in metrics],
        [Param(name, value) for name, value in (params or {}).items()],
        [RunTag(name, value) for name, value in (tags or {}).items()],
    )


def set_experiment_tags(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str:
    """Set tags; return why MLflow refused one: not allowed to, or too long for this server."""
    from mlflow.exceptions import MlflowException

    try:
        for name, value in tags.items():
            client.set_experiment_tag(experiment, name, value)
    except MlflowException as error:
        return first_line(error)
    return ""


def link_model(client: MlflowClient, run: str, model: str) -> None:
    """Show a logged model as an output of a run."""
    from mlflow.entities import LoggedModelOutput

    client.log_outputs(run, models=[LoggedModelOutput(model, step=0)])


def logged_pictures(client: MlflowClient, run: str, key: str) -> dict[int, list[str]]:
    """Return the files of a chart of pictures by step, in both forms that MLflow's names have."""
    keys = {key.replace("/", letter) for letter in "#~"}
    found: dict[int, list[str]] = {}
    for file in client.list_artifacts(run, "images"):
        match = re.match(r"(.+?)[%+]step[%+](\d+)[%+]timestamp[%+]", Path(file.path).name)
        if match and match[1] in keys:
            found.setdefault(int(match[2]), []).append(str(file.path))
    return found


def log_pictures(
    client: MlflowClient, run: str, key: str, pictures: Mapping[int, tuple[Any, int]]
) -> None:
    """Log pictures that MLflow shows with a slider, so large that they can be read.

    Args:
        client: of the server.
        run: its id.
        key: names the chart.
        pictures: pixels [height, width, 3] and unix milliseconds, by step.
    """
    if not pictures:
        return
    from PIL import Image

    for step, (pixels, milliseconds) in pictures.items():
        client.log_image(
            run, pixels, key=key, step=step, timestamp=milliseconds, synchronous=True
        )  # fmt: skip
    # What its pages show is a copy of 256 pixels, even on the whole screen.
    with tempfile.TemporaryDirectory(prefix="evomerge-") as folder:
        for step, files in logged_pictures(client, run, key).items():
            for file in files if step in pictures else ():
                small = Path(folder) / Path(file).name
                if small.stem.endswith("compressed"):
                    Image.fromarray(pictures[step][0]).save(small)
                    client.log_artifact(run, str(small), "images")
                    small.unlink()


def first_line(error: Exception) -> str:
    """Return what is worth reading of MLflow's long messages."""
    text = str(error).partition("\n")[0]
    # MLflow quotes the whole report of urllib3; its end says what happened.
    _, failed, report = text.partition(" failed with exception ")
    if failed:
        text = "no answer: " + report.rpartition(": ")[2].strip("\"')")
    return text[:300]


def file_system(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the type of the file system that holds a folder; empty where nobody says."""
    try:
        rows = [line.split() for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return ""
    real = folder.resolve()
    # Of two mounts on the same place the later one is seen.
    holding = [row for row in rows if real.is_relative_to(row[1].replace("\\040", " "))]
    return max(reversed(holding), key=lambda row: len(row[1]))[2] if holding else ""


@cache
def _log_ahead(database: Path) -> None:
    """Let commits to a database of our own wait for one write to the disk in three.

    A power failure may take the last commits, which are sent again; it damages nothing.
    """
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def connected(connection: Any, _: object) -> None:
        rows = connection.execute("PRAGMA database_list").fetchall()
        if rows and rows[0][2] and Path(rows[0][2]).resolve() == database.resolve():
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

    event.listen(Engine, "connect", connected)
