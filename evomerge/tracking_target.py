"""Where a study is tracked, and where a browser finds it there."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from evomerge.errors import InputError
from evomerge.pareto_view import STUDIES

DEFAULT_PORT = 5000


@dataclass(frozen=True, slots=True)
class Target:
    """Where to track.

    Attributes:
        uri: of the tracking server or database, without credentials.
        experiment: name of the MLflow experiment.
        artifacts: location of the artifacts; None where the server decides.
        own: it is a database of this study alone.
    """

    uri: str
    experiment: str
    artifacts: str | None
    own: bool = False

    @property
    def database(self) -> Path | None:
        """The file of a sqlite database; None for anything else."""
        scheme = "sqlite:///"
        found = self.uri.startswith(scheme)
        return Path(self.uri.removeprefix(scheme)) if found else None


@dataclass(frozen=True, slots=True)
class Synced:
    """Where the study is shown, and what was sent to get there.

    Attributes:
        experiment_id, run_id: of the study's run.
        trials: how many trials were sent now.
    """

    experiment_id: str
    run_id: str
    trials: int


def tracking_target(uri: str | None, experiment: str, directory: Path) -> Target:
    """Return where to track a study.

    Args:
        uri: as the user wrote it; None for a database in the study's directory.
        experiment: name of the experiment.
        directory: of the study.

    Raises:
        InputError: a URI with a password, or of a kind that cannot be used.
    """
    folder = directory.absolute()
    if uri is None:
        return Target(f"sqlite:///{folder}/mlflow.db", experiment, _artifacts(folder), own=True)
    parts = urlsplit(uri)
    if parts.password is not None or (parts.username and parts.scheme in ("http", "https")):
        shown = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        raise InputError(
            f"tracking.uri: {shown} was given with credentials, which would be stored and shown "
            "(set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, MLFLOW_TRACKING_TOKEN, "
            "or the database's own password file)"
        )
    if parts.scheme in ("http", "https"):
        return Target(uri, experiment, None)
    if parts.scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        if not uri.startswith("sqlite:///") or not path.name:
            raise InputError(
                f"tracking.uri: {uri!r} names no file (write sqlite:///path/mlflow.db)"
            )
        path = path.absolute()
        return Target(f"sqlite:///{path}", experiment, _artifacts(path.parent))
    if parts.scheme.partition("+")[0] in ("postgresql", "mysql", "mssql"):
        return Target(uri, experiment, _artifacts(folder))
    raise InputError(
        f"tracking.uri: {uri!r} cannot be used (expected http://, https://, sqlite:///path, "
        "postgresql://, mysql:// or mssql://)"
    )


def anchored_uri(uri: str, root: Path) -> str:
    """Return a URI in which the path of a sqlite database starts from ``root``, not from here."""
    scheme = "sqlite:///"
    return f"{scheme}{root / uri.removeprefix(scheme)}" if _is_relative(uri, scheme) else uri


def _is_relative(uri: str, scheme: str) -> bool:
    path = uri.removeprefix(scheme)
    return uri.startswith(scheme) and bool(path) and not path.startswith("/")


def _artifacts(folder: Path) -> str:
    return (folder / "mlartifacts").as_uri()


def ui_command(target: Target, port: int = DEFAULT_PORT) -> str:
    """Return the command that opens the UI on a database; empty for a server, which has one."""
    if is_server(target):
        return ""
    return f"mlflow ui --backend-store-uri {shlex.quote(target.uri)} --port {port}"


def pareto_page(synced: Synced) -> str:
    """Return the part of the Pareto page's address that follows the server's."""
    return (
        f"#/experiments/{synced.experiment_id}/runs?viewStateShareKey={synced.run_id}"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )


def studies_url(target: Target, synced: Synced, port: int = DEFAULT_PORT) -> str:
    """Return the address of the list of studies, with their objectives as columns."""
    return (
        f"{_root(target, port)}/#/experiments/{synced.experiment_id}/runs"
        f"?viewStateShareKey={STUDIES}&compareRunsMode=TABLE&workflowType=machine_learning"
    )


def pareto_url(target: Target, synced: Synced, port: int = DEFAULT_PORT) -> str:
    """Return the address of the study's Pareto page in the UI."""
    return f"{_root(target, port)}/{pareto_page(synced)}"


def is_server(target: Target) -> bool:
    """Return whether a tracking server is at ``target``, which has a UI, and no database."""
    return target.uri.startswith(("http://", "https://"))


def is_absent(target: Target) -> bool:
    """Return whether ``target`` is a database file that does not exist yet."""
    return target.database is not None and not target.database.exists()


def _root(target: Target, port: int) -> str:
    return target.uri.rstrip("/") if is_server(target) else f"http://127.0.0.1:{port}"


def ui_url(target: Target, synced: Synced, port: int = DEFAULT_PORT, page: str = "") -> str:
    """Return the address of the study's run in the UI.

    Args:
        target: where it is tracked.
        synced: the run.
        port: that ``ui_command`` was given.
        page: artifact to show, e.g. ``front.html``; empty for the overview.
    """
    tail = f"/artifacts/{quote(page)}" if page else ""
    run = f"experiments/{synced.experiment_id}/runs/{synced.run_id}{tail}"
    # Without the type MLflow 3 opens its page for chat traces, which shows no runs.
    return f"{_root(target, port)}/#/{run}?workflowType=machine_learning"
