"""A study and an export that die at every step, and what the next start makes of it."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from chaos_study import Plan, drive, notes
from crash_points import chosen, forked
from process_pool import context
from small_study import EXPERTS, finished
from under_fire import UnderFire, undisturbed

#: The resume after a death dies too, at one of its first points, and so on, so many times.
_DEATHS_OF_A_RESUME = 2


@dataclass
class Matrix:
    """What came of dying at every point.

    Attributes:
        points: that a run passes.
        died: at so many of them.
        deaths: all together, those of resumes too.
        kinds: the points by name, without their number.
        problems: one line each.
    """

    points: int = 0
    died: int = 0
    deaths: int = 0
    kinds: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def crash_study(place: Path, every: int) -> Matrix:
    """Let a study die at each ``every``-th point."""
    return _in_process(_crash_study, place, every)


def crash_export(place: Path, every: int, base: str, experts: list[str]) -> Matrix:
    """Let an export die at each ``every``-th point."""
    return _in_process(_crash_export, place, every, base, experts)


def _in_process(work: Callable[..., Matrix], place: Path, *arguments: Any) -> Matrix:
    """Run in a process with one thread, which can be forked."""
    place.mkdir(parents=True)
    child = context().Process(target=_report, args=(work, place, arguments))
    child.start()
    child.join()
    if child.exitcode != 0:
        return Matrix(problems=[f"the matrix itself ended with {child.exitcode}"])
    return Matrix(**json.loads((place / "matrix.json").read_text()))


def _report(work: Callable[..., Matrix], place: Path, arguments: tuple[Any, ...]) -> None:
    (place / "matrix.json").write_text(json.dumps(asdict(work(place, *arguments))))


def _crash_study(place: Path, every: int) -> Matrix:
    plan = Plan("de", trials=4)
    reference = undisturbed(plan, place / "calm")
    whole = place / "whole"
    status, names = forked(partial(drive, plan, whole), whole, None)
    matrix = Matrix(len(names), kinds=sorted(set(names)))
    if status != 0:
        matrix.problems.append(f"the undisturbed run ended with {status}")
        return matrix
    for point in chosen(names, every):
        directory = place / f"point{point}"
        study = UnderFire(plan, directory, random.Random(point))
        fatal = point
        for _ in range(1 + _DEATHS_OF_A_RESUME):
            study.note_complete()
            status, _ = forked(partial(drive, plan, directory), directory, fatal)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                matrix.problems.append(f"{names[point]}: a driver ended with {status}")
            matrix.deaths += 1
            fatal = point * 7 % 13  # of the resume: repair, lock, spool, first records
        matrix.died += 1
        study.note_complete()
        status, _ = forked(partial(drive, plan, directory), directory, None)
        tally = study.judge(reference)
        if status != 0 or not tally.clean:
            matrix.problems.append(f"{point} {names[point]}: {status} {tally}")
        shutil.rmtree(directory)
        shutil.rmtree(notes(directory))
    return matrix


def _crash_export(place: Path, every: int, base: str, experts: list[str]) -> Matrix:
    from evomerge.export import export
    from evomerge.models import open_models

    models = open_models(base, list(zip(EXPERTS, experts, strict=True)))
    view = finished(place / "study", models=models)
    assert view.knee is not None

    def write(out: Path) -> None:
        out.parent.mkdir(exist_ok=True)
        export(view, view.knee or 0, models, out, root=out.parent)

    status, names = forked(partial(write, place / "whole" / "out"), place / "whole", None)
    matrix = Matrix(len(names), kinds=sorted(set(names)))
    if status != 0:
        matrix.problems.append(f"the undisturbed export ended with {status}")
        return matrix
    right = _contents(place / "whole" / "out")
    for point in chosen(names, every):
        folder = place / f"point{point}"
        status, _ = forked(partial(write, folder / "out"), folder, point)
        matrix.died += 1
        matrix.deaths += status == -signal.SIGKILL
        out = folder / "out"
        if out.exists() and _contents(out) != right:
            matrix.problems.append(f"{point} {names[point]}: a half directory was left")
        if not out.exists():
            status, _ = forked(partial(write, out), folder, None)
            if status != 0 or _contents(out) != right:
                matrix.problems.append(f"{point} {names[point]}: the next one ended with {status}")
            left = sorted(path.name for path in folder.iterdir())
            if left != ["out"]:
                matrix.problems.append(f"{point} {names[point]}: {left} is left")
        shutil.rmtree(folder)
    return matrix


def _contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}
