"""Reports and pictures appear whole or not at all, and errors are one line."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_study import finished
from test_cli import call

from evomerge.atomic_file import atomic_file, write_text
from evomerge.errors import InputError, StorageError

#: The command with a limit on the size of files: the system refuses as a full disk does.
LIMITED = (
    "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); "
    "from evomerge.cli import main; main()"
)
#: ... and one that dies in mid-write.
KILLED = (
    "import os, signal; from pathlib import Path; write = Path.write_text\n"
    "def part(self, text, encoding=None):\n"
    "    write(self, text[: len(text) // 2], encoding=encoding)\n"
    "    os.kill(os.getpid(), signal.SIGKILL)\n"
    "Path.write_text = part\n"
    "from evomerge.cli import main; main()"
)
COMMANDS = (
    ("report", "--out", "report.html"),
    ("report", "--markdown", "report.md"),
    ("front", "--plot", "front.html"),
    ("front", "--plot", "front.svg"),
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("study") / "strings").directory


def run(code: str, study: Path, folder: Path, command: tuple[str, ...]) -> tuple[int, str]:
    name, option, file = command
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(study), option, str(folder / file)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[2])
def test_a_full_disk_took_the_old_file_as_well(
    study: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    old = tmp_path / command[2]
    old.write_text("what was there")
    code, err = run(LIMITED, study, tmp_path, command)
    assert code == 6, err
    [line] = [line for line in err.splitlines() if "error" in line]
    assert line.startswith(f"error: {command[1]}: {old}: cannot be written: File too large")
    assert old.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [old]


def test_a_killed_command_leaves_the_old_file(study: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("what was there")
    assert run(KILLED, study, tmp_path, COMMANDS[0])[0] == -9
    assert (tmp_path / "report.html").read_text() == "what was there"
    [half] = [path for path in tmp_path.iterdir() if path.name != "report.html"]
    assert half.name.startswith(".")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[2])
def test_a_folder_that_is_not_there(
    study: Path, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    name, option, file = command
    target = tmp_path / "no" / "such" / file
    code, out, err = call(capsys, monkeypatch, name, str(study), option, str(target))
    assert (code, out) == (2, "")
    assert err == (
        f"error: {option}: {target}: cannot be written: there is no folder {target.parent} (make "
        "it first)\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[2])
def test_a_folder_that_takes_nothing(
    study: Path, tmp_path: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    opened = Path.open

    def refused(self: Path, mode: str = "r", **options: Any) -> Any:
        if "r" not in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", refused)  # root, who may run this, writes everywhere
    name, option, file = command
    code, out, err = call(capsys, monkeypatch, name, str(study), option, str(tmp_path / file))
    assert (code, out) == (2, "")
    assert err == (
        f"error: {option}: {tmp_path / file}: cannot be written: Permission denied (choose another "
        "place)\n"
    )


def test_a_folder_in_the_place_of_the_picture(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "front.html").mkdir()
    code, _, err = call(
        capsys, monkeypatch, "front", str(study), "--plot", str(tmp_path / "front.html")
    )
    assert code == 2
    assert "front.html: cannot be written: Is a directory" in err


def test_an_error_of_the_writer_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="mine"), atomic_file(path, "--out") as temporary:
        temporary.write_text("half")
        raise ValueError("mine")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new", "--out")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "made.txt", "new", "--out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "made.txt").stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write what another user owns")
def test_root_took_the_files_of_users_over(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    os.chown(path, 12345, 54321)
    write_text(path, "new", "--out")
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 54321)


def test_a_link_to_nowhere_blamed_the_folder_that_is_there(tmp_path: Path) -> None:
    link = tmp_path / "report.html"
    link.symlink_to(tmp_path / "gone" / "report.html")
    with pytest.raises(InputError, match=rf"there is no folder {tmp_path}/gone \("):
        write_text(link, "text", "--out")


def test_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    write_text(Path("/dev/null"), "text", "--out")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(StorageError, match="No space left on device"):
        write_text(Path("/dev/full"), "text", "--out")


def test_long_names(tmp_path: Path) -> None:
    path = tmp_path / f"{'ä' * 120}.html"
    write_text(path, "text", "--out")
    assert path.read_text() == "text"
    with pytest.raises(InputError, match="File name too long"):
        write_text(tmp_path / ("n" * 300), "text", "--out")
