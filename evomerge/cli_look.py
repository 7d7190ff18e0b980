"""Commands of the second moment: look at a study."""

from __future__ import annotations

from pathlib import Path

import click

from evomerge.cli_arguments import AS_JSON, STUDY, directory_of, open_view, print_json, show
from evomerge.errors import NothingUsableError


@click.command()
@STUDY
@AS_JSON
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Also draw it: .html (interactive), .png or .svg.",
)
def front(study: str, as_json: bool, plot: Path | None) -> None:
    """Show the Pareto front of a study with the baselines beside it.

    STUDY is a study file or its directory. Works while the search is running.
    """
    from evomerge.facts import front_facts
    from evomerge.terminal import front_table, gains_table, make_console, save_plot

    view = open_view(study)
    if not view.front:
        raise NothingUsableError(f"{study}: no trial has succeeded yet")
    if plot is not None:
        save_plot(view, plot)
        click.echo(f"wrote {plot}", err=as_json)
    if as_json:
        print_json(front_facts(view))
        return
    console = make_console()
    console.print(front_table(view))
    table = gains_table(view)
    if table is not None:
        console.print(table)


@click.command()
@STUDY
@AS_JSON
def status(study: str, as_json: bool) -> None:
    """Say where a study stands. Works while it is running, and after a crash."""
    from evomerge.facts import status_facts, status_lines

    facts = status_facts(open_view(study))
    show(facts if as_json else status_lines(facts), as_json)


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
