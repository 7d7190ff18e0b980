"""Commands for a study on a Ray cluster: submit it, read its log, stop it, ask for its job."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evomerge.cli_arguments import AS_JSON, OVERRIDES, STUDY, print_json
from evomerge.errors import InputError, SetupError

if TYPE_CHECKING:
    from evomerge.jobs import Job, Jobs
    from evomerge.submission import StudyKey

ADDRESS = click.option(
    "--address", default=None, metavar="URL",
    help="Of the cluster, such as http://127.0.0.1:8265. Default: RAY_API_SERVER_ADDRESS, "
    "RAY_ADDRESS, where the study was submitted to, or http://127.0.0.1:8265.",
)  # fmt: skip


def require_no_directory(file: Path) -> None:
    """Say what to give instead of a directory to a command that reads a study file.

    Raises:
        InputError: it is a directory.
    """
    from evomerge.presentation import STUDY_FILE

    if not file.is_dir():
        return
    resolved, inside = file / STUDY_FILE, file / "study.yaml"
    if resolved.exists():
        raise InputError(
            f"{file}: the directory of a study, not its file (give the study file; {resolved} "
            "holds its settings)"
        )
    remedy = (
        f"give {inside}" if inside.exists() else "give the study file; `evomerge init` writes one"
    )
    raise InputError(f"{file}: a directory, not a study file ({remedy})")


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="STUDY.yaml")
@ADDRESS
@OVERRIDES
@click.option("--follow", is_flag=True, help="Show the driver's log until it ends.")
@click.option(
    "--grace", type=click.IntRange(1), default=600, show_default=True,
    help="Seconds that running trials have when the job is stopped.",
)  # fmt: skip
@click.option(
    "--restart-search", is_flag=True,
    help="Go on with a fresh searcher where the old one does not repeat itself: see `run --help`.",
)  # fmt: skip
@AS_JSON
def submit(
    file: Path,
    address: str | None,
    overrides: tuple[str, ...],
    follow: bool,
    grace: int,
    restart_search: bool,
    as_json: bool,
) -> None:
    """Run a study on a Ray cluster, or continue it there.

    \b
    ray up ray_cluster.yaml; ray dashboard ray_cluster.yaml    (brings port 8265 here)
    evomerge submit study.yaml --address http://127.0.0.1:8265 --set directory=/shared/my-study
    evomerge logs study.yaml --follow
    evomerge stop study.yaml                            (says how to continue)

    The study's driver runs on the cluster's head, its workers where the GPUs are. While it is at
    work there, submitting again starts nothing; once it has ended, failed or was lost, submitting
    again continues the study, and no finished evaluation is repeated.

    Sent are the study file, its task files, its Python objectives and the data that they name. Not
    sent are weights (give hub ids, or directories that every machine of the cluster sees) and
    tokens (a cluster has its own; see ray_cluster.yaml). The study's `directory` must be absolute,
    on a volume that outlives the cluster. Ray's variables give address and token: RAY_ADDRESS or
    RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.
    """
    from evomerge.config import load
    from evomerge.jobs import cluster_address, connect
    from evomerge.submission import Submitted, bare_address, pack, submitted

    if follow and as_json:
        raise click.UsageError("--follow and --json exclude each other")
    require_no_directory(file)
    with tempfile.TemporaryDirectory(prefix="evomerge-") as folder:
        package = pack(load(file, overrides), file, Path(folder))
        for note in package.notes:
            click.echo(f"note: {note}", err=True)
        before = submitted(file)
        address = cluster_address(address, before.address if before else None)
        jobs = connect(address)
        done = jobs.submit(package, grace, ["--restart-search"] if restart_search else [])
    key = package.key
    where = bare_address(address)
    Submitted(key.name, key.directory, where, done.job, overrides).save(file)
    if as_json:
        print_json({"job": done.job, "attempt": done.attempt, "attached": done.attached})
    elif done.attached:
        click.echo(f"{done.job} is at work on this study already; nothing was started")
    else:
        size = f"{package.files} files, {package.size / 1024:.0f} KiB sent"
        after = (
            f"; continues after {done.before.id} ({_ending(done.before)})" if done.before else ""
        )
        click.echo(f"submitted as {done.job} ({size}){after}")
    if follow:
        _follow(jobs, _Target(key, address, file, overrides))
    elif not as_json:
        name = shlex.quote(str(file))
        click.echo(f"its log: evomerge logs {name} --follow; stop it: evomerge stop {name}")


@click.command()
@STUDY
@ADDRESS
@click.option("--follow", is_flag=True, help="Go on until the job ends; its exit code is returned.")
def logs(study: str, address: str | None, follow: bool) -> None:
    """Print what the driver of a submitted study has printed.

    STUDY is the study file that was submitted, or its directory. With --follow, Ctrl-C ends the
    printing and leaves the job alone.
    """
    from evomerge.jobs import connect

    target = _target(study, address)
    jobs = connect(target.address)
    if follow:
        _follow(jobs, target)
    else:
        click.echo(jobs.logs(jobs.last(target.key)), nl=False)


@click.command()
@STUDY
@ADDRESS
@click.option("--no-wait", is_flag=True, help="Return at once, not when the job has ended.")
def stop(study: str, address: str | None, no_wait: bool) -> None:
    """Stop a submitted study; `evomerge submit` continues it.

    The driver finishes the trials that are running, writes them down and leaves, within the
    seconds that it was submitted with (--grace). What takes longer is scored again next time.
    """
    from evomerge.jobs import connect

    target = _target(study, address)
    jobs = connect(target.address)
    job = jobs.last(target.key)
    if job.over:
        click.echo(f"{job.id} is not running: {_ending(job)}")
        return
    click.echo(f"stopping {job.id}; running trials are finished first", err=True)
    job = jobs.stop(job, 0.0 if no_wait else None)
    if job.over:
        click.echo(f"{job.id}: {_ending(job)}; to continue: {target.again}")
    else:
        click.echo(f"{job.id} was asked to stop")


def job_facts(study: str, address: str | None) -> dict[str, Any] | None:
    """Return what the job of a study does; None where it was never submitted from here.

    A cluster that does not answer is a fact too, under ``problem``.

    Raises:
        InputError: the record of the job is damaged, or ``address`` is given for a study that
            cannot be on a cluster.
    """
    from evomerge.jobs import connect, failure_hint
    from evomerge.submission import submitted

    path = Path(study)
    if address is None and (not path.is_file() or submitted(path) is None):
        return None
    target = _target(study, address)
    key = target.key
    facts: dict[str, Any] = {"directory": key.directory}
    try:
        jobs = connect(target.address)
        attempts = jobs.attempts(key)
    except SetupError as error:
        return facts | {"problem": str(error)}
    if not attempts:
        return facts | {"problem": f"the cluster knows no job {key.job}-*; submit to continue"}
    job = attempts[-1]
    facts |= {"id": job.id, "status": job.status}
    for name, seconds in (("started", job.started), ("ended", job.ended)):
        if seconds is not None:
            facts[name] = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    if job.exit_code is not None:
        facts["exit_code"] = job.exit_code
    log = jobs.logs(job)
    lines = [line for line in log.splitlines() if line.strip()]
    if lines:
        facts["last_line"] = lines[-1].strip()
    if hint := failure_hint(job, log):
        facts["hint"] = hint
    return facts


def job_line(facts: dict[str, Any]) -> str:
    """Return the facts of ``job_facts`` in one line for people."""
    if "problem" in facts:
        return str(facts["problem"])
    begun = f" since {facts['started']}" if "started" in facts and "ended" not in facts else ""
    ended = f" at {facts['ended']}" if "ended" in facts else ""
    code = f", exit code {facts['exit_code']}" if facts.get("exit_code") else ""
    last = f"; last line: {facts['last_line']}" if "last_line" in facts else ""
    hint = f" ({facts['hint']})" if "hint" in facts else ""
    return f"{facts['id']}: {facts['status']}{begun}{ended}{code}{last}{hint}"


@dataclass(frozen=True, slots=True)
class _Target:
    """A study on a cluster.

    Attributes:
        key: of the study.
        address: of the cluster.
        file: the study file.
        overrides: with which it was submitted.
    """

    key: StudyKey
    address: str
    file: Path
    overrides: tuple[str, ...]

    @property
    def again(self) -> str:
        """The command that continues it, complete."""
        from evomerge.submission import bare_address

        words = ["evomerge", "submit", str(self.file), "--address", str(bare_address(self.address))]
        for override in self.overrides:
            words += ["--set", override]
        return shlex.join(words)


def _target(study: str, address: str | None) -> _Target:
    """Return which study is meant, and on which cluster it is said to be."""
    from evomerge.config import load_place
    from evomerge.jobs import cluster_address
    from evomerge.presentation import STUDY_FILE
    from evomerge.submission import study_key, submitted

    path = Path(study)
    if path.is_dir() and (path / STUDY_FILE).exists():
        path /= STUDY_FILE
    if not path.is_file():
        raise InputError(f"{study}: neither a study file nor a study directory")
    record = submitted(path)
    if record is None:
        return _Target(study_key(load_place(path)), cluster_address(address), path, ())
    where = cluster_address(address, record.address)
    return _Target(record.key, where, path, record.overrides)


def _follow(jobs: Jobs, target: _Target) -> None:
    """Print a driver's log until it ends, then end as it did."""
    from evomerge.jobs import failure_hint

    try:
        job = jobs.follow(target.key, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        name = shlex.quote(str(target.file))
        click.echo(f"\nthe job goes on; to stop it: evomerge stop {name}", err=True)
        raise click.exceptions.Exit(130) from None
    click.echo(f"{job.id}: {_ending(job)}", err=True)
    if job.lost:
        raise SetupError(f"{job.id} was lost; to continue: {target.again}")
    if job.status == "STOPPED":
        click.echo(f"to continue: {target.again}", err=True)
        raise click.exceptions.Exit(143)
    if job.status == "FAILED" and (hint := failure_hint(job, jobs.logs(job))):
        click.echo(hint, err=True)
    raise click.exceptions.Exit(job.exit_code or 0)


def _ending(job: Job) -> str:
    code = f", exit code {job.exit_code}" if job.exit_code else ""
    return f"{job.status.lower()}{code}"
