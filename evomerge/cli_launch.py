"""Commands of the first moment: write a study file, check it, run it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from evomerge.cli_arguments import (
    AS_JSON,
    OVERRIDES,
    expert_pairs,
    prepared_study,
    print_json,
    show,
)
from evomerge.cli_cluster import require_no_directory
from evomerge.errors import InputError


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("evomerge-demo"),
    show_default=True,
    help="Folder for models, study and export.",
)
@click.option("--trials", type=click.IntRange(1), default=None, help="Fewer trials, sooner done.")
@click.option("--workers", type=click.IntRange(1), default=None, help="Ray workers (2).")
@click.option("--quick", is_flag=True, help="A smoke test in a minute, with untrained models.")
def demo(out: Path, trials: int | None, workers: int | None, quick: bool) -> None:
    """Train tiny models, search their merges, export the best one.

    Trains a small base and three experts (once; about two minutes on one core), searches
    layer-wise merges of them with Ray workers, logs to MLflow, shows the front, and exports the
    recommended merge. A second run reuses the models, and continues or reuses the search.
    """
    from evomerge.demo import run_demo

    run_demo(out, trials, workers, quick)


@click.command()
@click.argument("file", type=click.Path(path_type=Path), default=Path("study.yaml"))
@click.option("--base", default=None, help="Base model: directory or hub id.")
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="NAME=MODEL",
    help="Expert: short name and directory or hub id; repeat for each.",
)
@click.option(
    "--adapters", default=None, metavar="FOLDER",
    help="Instead of experts a folder of LoRA adapters, merged as factors (Evo-Merging, LoraHub).",
)  # fmt: skip
@click.option("--task", "tasks", multiple=True, help="lm-eval task; repeat for each objective.")
@click.option(
    "--include-path", "folders", multiple=True, metavar="FOLDER",
    help="Folder with your own task files; repeat for each. FILE's fitness/ where that has a task.",
)  # fmt: skip
@click.option(
    "--mergekit-evolve", "evolve", type=click.Path(path_type=Path), default=None,
    metavar="CONFIG.yml", help="Take everything from a mergekit-evolve config, as it is.",
)  # fmt: skip
def init(
    file: Path, base: str | None, experts: tuple[str, ...], adapters: str | None,
    tasks: tuple[str, ...], folders: tuple[str, ...], evolve: Path | None,
) -> None:  # fmt: skip
    """Write a commented study file for your models.

    \b
    evomerge init study.yaml --base meta-llama/Llama-3.1-8B \\
        --expert math=org/llama-math --expert code=./models/code --task gsm8k \\
        --task arc_challenge
    evomerge init study.yaml --base models/base --adapters adapters/ --task my_task \\
        --include-path fitness
    evomerge init study.yaml --mergekit-evolve evolve.yml
    """
    from evomerge.template import study_template

    notes: tuple[str, ...] = ()
    include, ungraded = _own_tasks(folders, tasks, file)
    if adapters is not None and experts:
        raise InputError("init: --adapters names the experts already (drop --expert)")
    if evolve is None:
        text = study_template(
            base, expert_pairs(experts), tasks, _adapters(adapters, file), include, ungraded
        )
    elif base or experts or tasks or adapters:
        raise InputError("init: --mergekit-evolve names models and tasks already (drop the others)")
    else:
        from evomerge.mergekit_evolve import study_from_evolve

        converted = study_from_evolve(evolve, include=include)
        text, notes = converted.text, converted.notes
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except FileExistsError as error:
        raise InputError(f"{file}: exists already (give another name, or remove it)") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
    if include and not folders:
        notes += ("fitness.include_path is fitness/, which defines the tasks (or some of them)",)
    for note in notes:
        click.echo(f"note: {note}")
    click.echo(f"wrote {file}; edit it, then: evomerge check {file}")


def _own_tasks(
    folders: tuple[str, ...], tasks: tuple[str, ...], file: Path
) -> tuple[tuple[str, ...], set[str]]:
    """Return the folders of task files, and which tasks there have no reference answers.

    ``fitness`` beside the file is such a folder where it defines one of the tasks.

    Raises:
        InputError: a folder is none, as the study file will see it.
    """
    from evomerge.fitness.task_files import has_reference, tasks_in

    root = file.resolve().parent
    for folder in folders:
        if not (root / folder).is_dir():
            raise InputError(
                f"init: --include-path: no such folder: {root / folder} (give the folder of your "
                f"task files; relative paths start from the study file's folder, {root})"
            )
    found = {name: own for folder in folders or ("fitness",)
             for name, own in tasks_in(root / folder).items()}  # fmt: skip
    ungraded = {name for name, own in found.items() if not has_reference(own)}
    return folders if folders or found.keys().isdisjoint(tasks) else ("fitness",), ungraded


def _adapters(folder: str | None, file: Path) -> tuple[str, int] | None:
    """Return a folder of adapters and how many it holds.

    Raises:
        InputError: it is none, as the study file will see it.
    """
    from evomerge.expert_folder import experts_in

    if folder is None:
        return None
    found, problems = experts_in(folder, file.resolve().parent)
    if problems:
        raise InputError("\n".join(problems).replace("models.experts", "--adapters"))
    return folder, len(found)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@OVERRIDES
@AS_JSON
def check(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check a study file against models and tasks; touch no GPU, weights for importance(n) only.

    Every problem comes with its dotted path, all of them at once: those of form (unknown keys,
    wrong types), then those of content (models, tasks, ranges). Only what follows from another
    problem is left out. Exit code 2 where there is one.
    """
    from evomerge.facts import plan_facts, plan_lines

    require_no_directory(file)
    if sys.stderr.isatty():
        click.echo("reading models and loading tasks ...", err=True)
    prepared = prepared_study(file, overrides)
    show(plan_facts(prepared) if as_json else plan_lines(prepared), as_json)
    click.echo(f"ok; next: evomerge run {file}", err=as_json)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--dry-run", is_flag=True, help="Check and print the plan; run nothing.")
@click.option(
    "--restart-search", is_flag=True,
    help="Where the searcher does not repeat its recorded candidates any more (another type of "
    "CPU, other versions of its libraries), go on with a fresh one that knows all results.",
)  # fmt: skip
@AS_JSON
def run(
    file: Path, overrides: tuple[str, ...], dry_run: bool, restart_search: bool, as_json: bool
) -> None:
    """Run a study, or continue it where it stopped.

    Scores the base, every expert and simple merges, searches, re-scores the finalists on
    validation items and the front on held-out items. Stop it with Ctrl-C (once: after the
    running trials; twice: at once) or any other way: the same command continues, and no
    finished evaluation is repeated.

    To continue, the searcher is asked everything again and must repeat itself bit for bit. On
    another type of CPU, or with other versions of numpy, scipy, pymoo or nevergrad, it may not:
    then the study stops, names what differs, and says how to go on exactly as it began. With
    --restart-search it goes on without that: trials that were asked are finished, and a fresh
    searcher spends the rest of the budget, starting from all results so far. The study is then no
    longer reproducible from its seed alone, and says so. Later runs need the flag no more. Where
    the searcher repeats itself it stays, with the flag too.
    """
    from evomerge.facts import front_facts, plan_facts, plan_lines
    from evomerge.terminal import make_console, print_finished, run_with_progress

    require_no_directory(file)
    prepared = prepared_study(file, overrides)
    if dry_run:
        show(plan_facts(prepared) if as_json else plan_lines(prepared), as_json)
        return
    console = make_console(stderr=as_json)
    finished = run_with_progress(prepared, console, restart_search)
    if as_json:
        print_json(front_facts(finished.view))
    else:
        print_finished(console, finished)


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="STUDY.yaml")
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=20.0, show_default=True,
    help="To spend on measuring, beside loading.",
)  # fmt: skip
@OVERRIDES
@AS_JSON
def bench(file: Path, seconds: float, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure what a study will need with your models on this machine.

    Loads one worker, applies random merges of the study's space and scores a few search items.
    Reports how near the merge is to the speed of a plain copy, items per second, and the time
    and memory of the whole study. Other programs on the machine disturb the numbers.
    """
    from evomerge.bench import measure

    require_no_directory(file)
    found = measure(prepared_study(file, overrides), seconds)
    show(found.to_dict() if as_json else found.lines(), as_json)


@click.command()
def schema() -> None:
    """Print the JSON schema of study files, for editors.

    \b
    evomerge schema > study.schema.json
    and begin a study file with: # yaml-language-server: $schema=study.schema.json
    """
    from evomerge.config import json_schema

    print_json(json_schema())
