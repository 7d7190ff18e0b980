"""Finds a study by what people have of it: its study file, its folder, its directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.study_view import StudyView


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
        from evomerge.config import load_place
        from evomerge.examination import study_directory

        return study_directory(load_place(path, overrides), path.resolve().parent)
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
