"""``models.experts: FOLDER``: every subfolder is an expert, so that nobody writes 100 lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: One of these makes a folder a model.
_CONFIGS = ("adapter_config.json", "config.json")


def list_experts(data: dict[str, Any], root: Path, partly: bool = False) -> list[str]:
    """Put the experts of a folder into the place of its path, where a study file names one.

    They are listed once, when the file is read: the resolved study holds each of them, so that a
    folder that has others later is noticed.

    Args:
        data: of a study file; ``models.experts`` is replaced where it is a text.
        root: folder that relative paths start from.
        partly: leave out what is no model.

    Returns:
        One line per problem; unless ``partly``, nothing is replaced where there is any.
    """
    models = data.get("models")
    folder = models.get("experts") if isinstance(models, dict) else None
    if not isinstance(models, dict) or not isinstance(folder, str):
        return []
    found, problems = experts_in(folder, root)
    if not problems or (partly and found):
        models["experts"] = found
    return problems


def experts_in(folder: str, root: Path) -> tuple[dict[str, str], list[str]]:
    """Return name and path of every model in a folder, by name, and what is wrong with it.

    Files and hidden folders are passed over; all else must be a model, links to nowhere included.

    Args:
        folder: as the user wrote it.
        root: folder that relative paths start from.
    """
    try:
        path = root / Path(folder).expanduser()
        # An empty path would be the folder of the study file itself.
        if not folder.strip() or not path.is_dir():
            return {}, [
                f"models.experts: no such folder: {folder or repr(folder)} (a folder whose "
                "subfolders are the experts, or a mapping of names to models)"
            ]
        found = sorted(path.iterdir())
        inside = [one for one in found if one.name[0] != "." and not one.is_file()]
        others = [one for one in inside if not any((one / n).is_file() for n in _CONFIGS)]
    except (OSError, RuntimeError, ValueError) as error:  # closed, too long, unknown ~user, NUL
        reason = error.strerror if isinstance(error, OSError) else str(error).rstrip(".")
        return {}, [f"models.experts: {folder}: cannot be read: {reason} (give another folder)"]
    if not inside:
        return {}, [f"models.experts: {folder} has no subfolders (each is to be an expert)"]
    start = folder.rstrip("/") + "/"
    neither = f"it has neither {' nor '.join(_CONFIGS)}"
    if others == inside and len(inside) > 1:
        return {}, [
            f"models.experts: no subfolder of {folder} is a model, such as {start}{inside[0].name}:"
            f" {neither} (give the folder whose subfolders are the experts)"
        ]
    problems = [
        f"models.experts: {start}{one.name} is no model: {neither} (move it out of the folder, "
        "or list the experts by name)"
        for one in others
    ]
    return {one.name: f"{start}{one.name}" for one in inside if one not in others}, problems
