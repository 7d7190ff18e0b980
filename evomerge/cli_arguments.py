"""What commands share: options, what arguments mean, how facts are printed.

Imports nothing heavy before it is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evomerge.errors import InputError
from evomerge.study_location import directory_of as directory_of
from evomerge.study_location import open_view as open_view

if TYPE_CHECKING:
    from evomerge.prepare import Prepared

STUDY = click.argument("study", metavar="STUDY")
OVERRIDES = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override one setting, e.g. search.trials=50.",
)  # fmt: skip
DTYPE = click.Choice(["float32", "bfloat16", "float16"])
SHARD_SIZE = click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Such as 2GB or 500MB."
)
MODEL_FOLDERS = click.option(
    "--models", "folders", multiple=True, type=click.Path(path_type=Path), metavar="FOLDER",
    help="Find models below it by the digests of their weights; repeat for each.",
)  # fmt: skip
#: As in ``evomerge.picking.PICKS``, which a test compares; importing it would load numpy.
PICK_HELP = "knee, asf:W1,W2,... (weights), best:OBJECTIVE or hv (most hypervolume)"
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def expert_pairs(experts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Split ``NAME=MODEL`` options.

    Raises:
        InputError: one is not of this form.
    """
    pairs = []
    for expert in experts:
        name, equals, source = expert.partition("=")
        if not equals or not name or not source:
            raise InputError(f"--expert: expected NAME=MODEL, got {expert!r}")
        pairs.append((name, source))
    return pairs


def prepared_study(file: Path, overrides: tuple[str, ...] = ()) -> Prepared:
    """Return a checked study file, with a bar where a terminal waits for weights to be read.

    Raises:
        StudyFileError: see ``prepare``.
    """
    from rich.console import Console

    from evomerge.byte_progress import byte_progress
    from evomerge.config import load
    from evomerge.errors import StudyFileError
    from evomerge.examination import further_problems
    from evomerge.prepare import prepare

    try:
        loaded = load(file, overrides)
    except StudyFileError as error:
        further = further_problems(file, overrides)
        raise StudyFileError(error.source, [*error.problems, *further]) from error
    with byte_progress("weights for importance", Console(stderr=True)) as progress:
        return prepare(loaded, file, progress)


def print_json(data: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(data, indent=1, allow_nan=False))


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts for a program or for a person, one line per value."""
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        for line in value if isinstance(value, list) else [value]:
            click.echo(f"{key:<12} {line}")
