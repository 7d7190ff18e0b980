"""Commands for what lasts: verify and repair a journal, give a study more budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evomerge.cli_arguments import AS_JSON, OVERRIDES, STUDY, directory_of, prepared_study, show
from evomerge.errors import InputError, StorageError

if TYPE_CHECKING:
    from evomerge.replay import Verified
    from evomerge.study import Study


@click.command()
@STUDY
@click.option(
    "--records", "records_only", is_flag=True,
    help="Check the records only: fast, and needs neither models nor tasks.",
)  # fmt: skip
@click.option(
    "--repair", is_flag=True,
    help="Cut a damaged journal to its longest valid part; the original stays beside it.",
)  # fmt: skip
@OVERRIDES
@AS_JSON
def replay(
    study: str, records_only: bool, repair: bool, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Verify the journal of a study.

    STUDY is a study file or its directory. Checks every record, then builds a fresh searcher and
    asks it everything again: every candidate must be the recorded one bit for bit, and the
    results must lead to the recorded front. Scores nothing, and without --repair changes nothing.
    Of a search that was restarted (`evomerge run --restart-search`) the last searcher is asked.
    Exit code 6 where something is wrong.

    The searcher is built with the settings that the study was run with (study.resolved.yaml beside
    the journal). With --set it is built with those of the study file and the overrides: exit code
    2 where they are others.
    """
    from evomerge.replay import repair as repair_journal
    from evomerge.replay import verify

    directory = directory_of(study, overrides)
    if repair:
        repaired = repair_journal(directory)
        if repaired is None:
            click.echo("nothing to repair", err=as_json)
        else:
            click.echo(
                f"kept {repaired.kept} records and removed {repaired.removed_bytes} bytes behind "
                f"them; the whole file is {repaired.original}\nits problem: {repaired.problem}",
                err=as_json,
            )
    asked = None
    if not records_only:
        asked, settings = _study(study, directory, overrides)
        click.echo(f"settings: {settings}", err=True)
    verified = verify(directory, asked)
    show(dataclasses.asdict(verified) if as_json else _lines(verified), as_json)
    if verified.problems:
        raise StorageError(
            f"{directory}: the journal does not hold a study that can be continued as it is"
            + (
                ""
                if repair or not verified.damaged
                else " (evomerge replay STUDY --repair cuts off damaged records)"
            )
        )


def _study(text: str, directory: Path, overrides: tuple[str, ...]) -> tuple[Study, str]:
    """Return a study, which never gets a worker, and where its settings are from."""
    from evomerge.config import load
    from evomerge.launch import study_of
    from evomerge.prepare import prepare
    from evomerge.presentation import STUDY_FILE
    from evomerge.take_home import study_root

    path, resolved = Path(text), directory / STUDY_FILE
    if path.is_dir() and (path / "study.yaml").is_file():
        path /= "study.yaml"
    given = path.is_file() and path.name != STUDY_FILE
    if given and (overrides or not resolved.exists()):
        prepared = prepared_study(path, overrides)
        settings = str(path) + "".join(f", {one}" for one in overrides)
    else:
        root = path.resolve().parent if given else study_root(directory)
        if root is None:
            raise InputError(
                f"{text}: give the study file, so that its searcher can be asked again (or "
                "--records, to check the records alone)"
            )
        prepared = prepare(load(resolved), root / STUDY_FILE)
        settings = f"those that the study was run with ({resolved})"
    return study_of(prepared, prepared.make_pool), settings


def _lines(verified: Verified) -> dict[str, object]:
    asks = f"{verified.trials} trials asked, {verified.results} results"
    if verified.compared is not None:
        asks += f", {verified.compared} asks repeated by a fresh searcher"
        if verified.taken:
            asks += f", {verified.taken} before its restart taken as they are"
    harmless = [
        (verified.torn_bytes, "bytes of a record that a kill cut short"),
        (verified.late, "lines of a driver that had been overtaken"),
    ]
    return {
        "journal": f"{verified.records} records by {verified.drivers} drivers",
        "search": asks,
        "state": "finished" if verified.finished else "not finished",
        "harmless": [f"{count} {text}" for count, text in harmless if count],
        "problems": [line for text in verified.problems for line in text.splitlines()],
        "verdict": "damaged or changed" if verified.problems else "sound",
    }


@click.command()
@STUDY
@click.option("--trials", type=click.IntRange(min=1), help="Trials to add.")
@click.option("--items", type=click.IntRange(min=1), help="Item evaluations to add.")
@OVERRIDES
def extend(study: str, trials: int | None, items: int | None, overrides: tuple[str, ...]) -> None:
    """Add to the budget of a study, finished or not; `evomerge run` then goes on.

    \b
    evomerge extend study.yaml --trials 100
    evomerge run study.yaml

    The study file stays as it is: its budget is still the one that the study began with, and the
    command that is printed continues the study. The searcher goes on where it stood, and the
    finalists are chosen anew among all trials.
    """
    from evomerge.extension import continuing
    from evomerge.extension import extend as extend_study

    directory = directory_of(study, overrides)
    extended = extend_study(directory, trials or 0, items or 0)
    for unit in ("trials", "items"):
        before, after = getattr(extended.before, unit), getattr(extended.after, unit)
        if before != after:
            click.echo(f"search.{unit}: {before} -> {after}")
    click.echo(f"next: {continuing(study, directory)}")
