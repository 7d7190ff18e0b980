"""What commands share: options, what arguments mean, how facts are printed.

Imports nothing heavy before it is needed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.prepare import Prepared
    from evomerge.study_view import StudyView

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


def directory_of(text: str, overrides: tuple[str, ...] = ()) -> Path:
    """Return the study directory of a study file or directory.

    Args:
        text: path of the file or directory.
        overrides: with which the study file was run; its name or directory may be among them.

    Raises:
        InputError: it is neither, or overrides are given for what is no study file.
    """
    path = Path(text)
    if path.is_file():
        from evomerge.presentation import STUDY_FILE

        if path.name == STUDY_FILE and (path.parent / "journal.jsonl").exists():
            _no_overrides(text, overrides)
            return path.parent
        from evomerge.config import load
        from evomerge.prepare import study_directory

        return study_directory(load(path, overrides), path.resolve().parent)
    if (path / "journal.jsonl").exists():
        _no_overrides(text, overrides)
        return path
    if (path / "study.yaml").exists():
        return directory_of(str(path / "study.yaml"), overrides)
    raise InputError(
        f"{text}: neither a study file nor a study directory (see `evomerge list studies`)"
    )


def _no_overrides(text: str, overrides: tuple[str, ...]) -> None:
    if overrides:
        raise InputError(
            f"--set: {text} is the directory of one study, whose settings are fixed (give the "
            "study file to find the study that it was run as)"
        )


def open_view(text: str, overrides: tuple[str, ...] = ()) -> StudyView:
    """Return the view of a study by its file or directory.

    Args:
        text: path of the file or directory.
        overrides: see ``directory_of``.

    Raises:
        InputError: there is none, or it has not been run.
    """
    from evomerge.study_view import StudyView

    directory = directory_of(text, overrides)
    if not (directory / "journal.jsonl").exists():
        raise InputError(f"{text}: this study has not been run yet (evomerge run {text})")
    return StudyView.load(directory)


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
    from evomerge.prepare import prepare

    with byte_progress("weights for importance", Console(stderr=True)) as progress:
        return prepare(load(file, overrides), file, progress)


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
