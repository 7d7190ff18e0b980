"""Digests of all files of a directory, in the form that ``sha256sum -c`` reads too."""

from __future__ import annotations

import hashlib
from pathlib import Path

from evomerge.errors import InputError

SUMS_FILE = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Write the digests of all files that lie directly in ``folder``, except of the list itself."""
    lines = [f"{_sha256(path)}  {path.name}\n" for path in _files(folder)]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def differing_files(folder: Path) -> list[str]:
    """Return what is not as it was written, one line per file; nothing where all is.

    Hidden files and folders are not looked at: the Hub and git put some there.

    Raises:
        InputError: there is no list of digests, or it is damaged.
    """
    recorded = _recorded(folder)
    present = {path.name: path for path in _files(folder)}
    problems = []
    for name, digest in recorded.items():
        if name not in present:
            problems.append(f"{name}: missing")
        elif _sha256(present[name]) != digest:
            problems.append(f"{name}: has changed since it was written")
    problems += [f"{name}: was not written with the others" for name in present.keys() - recorded]
    return sorted(problems)


def recorded_files(folder: Path) -> int:
    """Return the number of files that the list of digests names.

    Raises:
        InputError: there is no such list, or it is damaged.
    """
    return len(_recorded(folder))


def _recorded(folder: Path) -> dict[str, str]:
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise InputError(f"{path}: cannot be read: {reason} (export writes it)") from error
    recorded = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or "/" in name:
            raise InputError(f"{path}: not a list of SHA-256 digests: {line[:80]!r}")
        recorded[name] = digest
    return recorded


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and not path.name.startswith(".") and path.name != SUMS_FILE
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
