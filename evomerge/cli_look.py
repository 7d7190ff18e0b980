"""Commands of the second moment: look at a study."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

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
    "--plot", metavar="FILE|-", default=None,
    help="Draw it into a file: .html (interactive), .png or .svg; - draws it here, also where "
    "the output is no terminal.",
)  # fmt: skip
@click.option(
    "--objectives", "names", metavar="A[,B]", default=None,
    help="Which objectives to draw; the first two where absent.",
)  # fmt: skip
@click.option(
    "--pick", metavar="HOW", default=None,
    help=f"Say which member it chooses, and mark it in the terminal: {PICK_HELP}.",
)  # fmt: skip
def front(
    study: str, overrides: tuple[str, ...], as_json: bool, plot: str | None, names: str | None,
    pick: str | None,
) -> None:  # fmt: skip
    """Show the Pareto front of a study with the baselines beside it.

    STUDY is a study file or its directory. Works while the search is running. A study that was
    run with --set name=... or directory=... is found with the same --set.

    \b
    On a terminal it is drawn as well: further right and further up is better.
    evomerge front STUDY --objectives math,code       two of many objectives
    evomerge front STUDY --plot front.html            all of them, interactive, in one file
    evomerge front STUDY --pick asf:0.7,0.3           which merge serves these weights best
    """
    from evomerge.facts import front_facts
    from evomerge.picking import pick_line, pick_trial
    from evomerge.terminal import front_table, gains_table, make_console, print_plot, save_plot

    view = open_view(study, overrides)
    if not view.front:
        raise NothingUsableError(f"{study}: no trial has succeeded yet")
    if as_json and plot == "-":
        raise click.UsageError("--json prints one document: give --plot a file")
    if as_json and names is not None and plot is None:
        raise click.UsageError("--objectives says what to draw: give --plot FILE with --json")
    picked = pick_trial(view, pick) if pick is not None else None
    wanted = None if names is None else names.split(",")
    if plot not in (None, "-"):
        save_plot(view, Path(plot), wanted)
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
    if plot == "-" or (plot is None and (console.is_terminal or wanted is not None)):
        print_plot(console, view, wanted, picked)
    if pick is not None and picked is not None:
        console.print(pick_line(view, pick, picked), markup=False, highlight=False, soft_wrap=True)


@click.command()
@STUDY
@click.argument("which", nargs=-1, metavar="[WHICH]...")
@OVERRIDES
@click.option(
    "--trials", "listed", multiple=True, metavar="WHICH",
    help="The same as an argument, before the others: --trials 12 base, or --trials 12,17.",
)  # fmt: skip
@click.option(
    "--split", type=click.Choice(["test", "validation", "search"]), default=None,
    help="Which items; where absent the first of these on which both were scored.",
)  # fmt: skip
@click.option(
    "--items", "count", type=click.IntRange(0), metavar="N", default=0,
    help="Also list N items per objective on which they differ, by their ids.",
)  # fmt: skip
@click.option("--text", is_flag=True, help="With --items: what lm-eval asks; loads the tasks.")
@AS_JSON
def compare(
    study: str, which: tuple[str, ...], overrides: tuple[str, ...], listed: tuple[str, ...],
    split: Literal["test", "validation", "search"] | None, count: int, text: bool, as_json: bool,
) -> None:  # fmt: skip
    """Compare merges of a study item by item, the first one with each of the others.

    WHICH is a trial number, knee, hv, best:OBJECTIVE, asf:W1,W2,..., or a baseline: base,
    expert:NAME, uniform, task_arithmetic:SCALE. One is compared with all baselines; none: the
    knee is.

    \b
    evomerge compare STUDY --trials 12 base expert:math
    evomerge compare STUDY knee uniform --items 10 --text

    Only items that both were scored on count, so that what is hard for both falls out. Beside
    every difference stand its standard error from paired items, the interval of a paired
    bootstrap, how many items went either way, and the p-value of McNemar's exact test (of
    Student's t where scores are not 0 or 1), corrected after Holm for everything in the table.
    """
    from evomerge.comparison_rows import comparison_facts
    from evomerge.item_comparison import compare_trials, find_trial, rivals_of
    from evomerge.item_texts import item_texts
    from evomerge.terminal import make_console, print_comparison

    if text and not count:
        raise click.UsageError("--text is for --items N")
    view = open_view(study, overrides)
    words = [*(word for one in listed for word in _listed(one)), *which] or ["knee"]
    numbers = [find_trial(view, word) for word in words]
    if len(numbers) == 1:
        numbers += rivals_of(view, numbers[0])
    found = compare_trials(view, numbers, split)
    texts = item_texts(view, found, count) if text else {}
    if as_json:
        print_json(comparison_facts(found, count, texts))
    else:
        print_comparison(make_console(), found, count, texts)


def _listed(text: str) -> list[str]:
    """Split ``12,17``; the commas of ``asf:0.7,0.3`` belong to it."""
    return [text] if text.startswith("asf:") else text.split(",")


@click.command()
@STUDY
@OVERRIDES
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
    help="Page to write; report.html where neither it nor --markdown is given.",
)  # fmt: skip
@click.option(
    "--markdown", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), default=None,
    metavar="FILE|-", help="Summary for a pull request or a model card; - prints it.",
)  # fmt: skip
def report(study: str, overrides: tuple[str, ...], out: Path | None, markdown: Path | None) -> None:
    """Write what came of a study as one HTML page, a Markdown summary, or both.

    The page needs nothing but itself: it can be mailed, attached and opened without a network.
    It holds what was searched and what it cost, the interactive front, what the recommended
    merge gains over the baselines with intervals, best values over the trials, coefficients,
    failures, audits of estimates, versions, and commands to go on. Works while the search runs.
    """
    from evomerge.atomic_file import write_text
    from evomerge.report import save_report
    from evomerge.report_summary import report_markdown

    view = open_view(study, overrides)
    if not view.front:
        raise NothingUsableError(f"{study}: no trial has succeeded yet")
    if out is not None or markdown is None:
        path = out or Path("report.html")
        save_report(view, path)
        click.echo(f"wrote {path}", err=markdown is not None)
    if markdown is not None:
        text = report_markdown(view)
        if str(markdown) == "-":
            click.echo(text, nl=False)
        else:
            write_text(markdown, text, "--markdown")
            click.echo(f"wrote {markdown}")


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
@click.argument("name", required=False)
@click.option(
    "--under", type=click.Path(path_type=Path), default=Path(), help="Where to look for studies."
)
@AS_JSON
def list_(what: str, name: str | None, under: Path, as_json: bool) -> None:
    """List methods, searchers, partitions, objectives, estimators, or the studies of a folder.

    With the NAME of a searcher: what each of its arguments means, may be, and is by default.
    """
    from evomerge.catalogue import catalogue, catalogue_lines, searcher
    from evomerge.listing import listing

    if name is not None and what != "searchers":
        raise click.UsageError(f"a NAME is for searchers; evomerge list {what} has all of them")
    rows = [] if name is None else searcher(name)  # refuses a name that is none
    if as_json:
        table = catalogue(what, under)
        print_json(table if name is None else [one for one in table if one["searcher"] == name])
        return
    rows = rows or catalogue_lines(what, under)
    if not rows:
        click.echo(f"no studies below {under}")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, text in listing(rows, width):
        click.echo(f"{click.style(name, bold=True)}{text}")


@click.command()
@STUDY
@click.option(
    "--log-model", type=click.Choice(["none", "knee", "front"]), default=None,
    help="Log the recommended merge, or the whole front, as MLflow models "
    "(tracking.log_model of the study file).",
)  # fmt: skip
@AS_JSON
def sync(study: str, log_model: Literal["none", "knee", "front"] | None, as_json: bool) -> None:
    """Send to MLflow whatever it lacks of a study, each point once.

    Needed only after MLflow could not be reached during the run, or was too slow to take all in
    the 30 seconds after it. Models are logged as the directories that `evomerge export` writes,
    without one of MLflow's flavours: from_pretrained loads what
    mlflow.artifacts.download_artifacts("models:/<id>") returns.
    """
    from evomerge.launch import sync_study

    directory = directory_of(study)
    synced, models = sync_study(directory, log_model)
    facts = {
        "experiment": synced.experiment_id, "run": synced.run_id, "new_trials": synced.trials,
        "models": {str(one.trial): one.model for one in models},
    }  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        click.echo(f"MLflow run {synced.run_id} is up to date ({synced.trials} trials were new)")
        for one in models:
            was = "logged" if one.new else "there already"
            click.echo(f"trial {one.trial}: models:/{one.model} ({was})")
