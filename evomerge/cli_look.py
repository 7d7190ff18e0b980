"""Commands of the second moment: look at a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from evomerge.cli_arguments import (
    AS_JSON,
    OVERRIDES,
    PICK_HELP,
    STUDY,
    directory_of,
    open_view,
    print_json,
    show,
)
from evomerge.cli_cluster import ADDRESS, job_facts, job_line
from evomerge.errors import NothingUsableError, SetupError


@click.command()
@STUDY
@OVERRIDES
@AS_JSON
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Also draw it: .html (interactive), .png or .svg.",
)
@click.option("--pick", metavar="HOW", default=None, help=f"Say which it chooses: {PICK_HELP}.")
def front(
    study: str, overrides: tuple[str, ...], as_json: bool, plot: Path | None, pick: str | None
) -> None:
    """Show the Pareto front of a study with the baselines beside it.

    STUDY is a study file or its directory. Works while the search is running. A study that was
    run with --set name=... or directory=... is found with the same --set.
    """
    from evomerge.facts import front_facts
    from evomerge.picking import pick_line, pick_trial
    from evomerge.terminal import front_table, gains_table, make_console, save_plot

    view = open_view(study, overrides)
    if not view.front:
        raise NothingUsableError(f"{study}: no trial has succeeded yet")
    picked = pick_trial(view, pick) if pick is not None else None
    if plot is not None:
        save_plot(view, plot)
        click.echo(f"wrote {plot}", err=as_json)
    if as_json:
        chosen = {} if picked is None else {"picked": {"how": pick, "trial": picked}}
        print_json({**front_facts(view), **chosen})
        return
    console = make_console()
    console.print(front_table(view))
    table = gains_table(view)
    if table is not None:
        console.print(table)
    if pick is not None and picked is not None:
        console.print(pick_line(view, pick, picked), markup=False, highlight=False, soft_wrap=True)


@click.command()
@STUDY
@OVERRIDES
@ADDRESS
@AS_JSON
def status(study: str, overrides: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Say where a study stands. Works while it is running, and after a crash.

    A study that was run with --set name=... or directory=... is found with the same --set.

    Of a study that was submitted to a cluster it also says what its job does. Where the study's
    directory cannot be seen from here, that is all there is to say.
    """
    from evomerge.facts import status_facts, status_lines

    if overrides and address is not None:
        raise click.UsageError("--set finds a study on this machine, --address one on a cluster")
    job = None if overrides else job_facts(study, address)
    if job is None:
        found = status_facts(open_view(study, overrides))
        show(found if as_json else status_lines(found), as_json)
        return
    facts: dict[str, Any] = {"study": study}
    lines = facts
    if (Path(job["directory"]) / "journal.jsonl").exists():
        facts = status_facts(open_view(job["directory"]))
        lines = status_lines(facts)
    elif "problem" in job:
        raise SetupError(str(job["problem"]))
    show({**facts, "job": job} if as_json else {**lines, "job": job_line(job)}, as_json)


@click.command("list")
@click.argument("what", type=click.Choice([
    "methods", "searchers", "partitions", "objectives", "estimators", "studies",
]))  # fmt: skip
@click.option(
    "--under", type=click.Path(path_type=Path), default=Path(), help="Where to look for studies."
)
@AS_JSON
def list_(what: str, under: Path, as_json: bool) -> None:
    """List methods, searchers, partitions, objectives, estimators, or the studies of a folder."""
    from evomerge.catalogue import catalogue, catalogue_lines

    if as_json:
        print_json(catalogue(what, under))
        return
    rows = catalogue_lines(what, under)
    if not rows:
        click.echo(f"no studies below {under}")
    for row in rows:
        (_, name), (_, text), *rest = row.items()
        click.echo(f"{click.style(f'{name:<16}', bold=True)} {text}")
        details = [f"{key}: {value}" for key, value in rest if value]
        if details:
            click.echo("    " + "; ".join(details))


@click.command()
@STUDY
@AS_JSON
def sync(study: str, as_json: bool) -> None:
    """Send to MLflow whatever it lacks of a study, each point once.

    Needed only after MLflow could not be reached during the run.
    """
    from evomerge.launch import sync_study

    directory = directory_of(study)
    synced = sync_study(directory)
    facts = {"experiment": synced.experiment_id, "run": synced.run_id, "new_trials": synced.trials}
    if as_json:
        print_json(facts)
    else:
        click.echo(f"MLflow run {synced.run_id} is up to date ({synced.trials} trials were new)")
