"""What lm-eval asks in the items on which merges differ."""

from __future__ import annotations

from pathlib import Path

from evomerge.config import load
from evomerge.errors import InputError
from evomerge.fitness_file import include_paths, task_specs
from evomerge.item_comparison import Comparison
from evomerge.presentation import STUDY_FILE
from evomerge.study_view import StudyView
from evomerge.take_home import study_root

#: Characters of a text at most.
_LONGEST = 160


def item_texts(view: StudyView, found: Comparison, items: int) -> dict[tuple[str, str], str]:
    """Load the tasks of a study and return what they ask, on one line each.

    Args:
        view: the study.
        found: a comparison of its trials.
        items: how many changed items of each pairing are wanted.

    Returns:
        texts by objective and item; nothing for objectives that are no lm-eval tasks.

    Raises:
        InputError: the study's file is gone, or its tasks cannot be loaded.
    """
    path = view.directory / STUDY_FILE
    if not path.exists():
        raise InputError(f"--text: {view.directory} has no {STUDY_FILE}: its tasks are not known")
    file = load(path)
    specs = task_specs(file)
    numbers = {one.name: number for number, one in enumerate(view.objectives[: len(specs)])}
    wanted = {
        (one.objective, change.item)
        for one in found.pairings
        for change in one.changes[:items]
        if one.objective in numbers
    }
    if not wanted:
        return {}
    from evomerge.fitness.lm_eval import LmEvalTasks

    root = study_root(view.directory) or Path.cwd()
    tasks = LmEvalTasks.load(specs, include_paths(file, root), root, file.fitness.allow_task_code)
    return {
        (objective, item): _shortened(tasks.text(numbers[objective], item))
        for objective, item in sorted(wanted)
    }


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 2] + " …"
