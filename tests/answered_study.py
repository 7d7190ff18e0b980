"""A small study whose items are answered right or wrong, as those of most tasks are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

from small_study import small_study

from evomerge.pool import SerialPool
from evomerge.presentation import STUDY_FILE
from evomerge.study_view import StudyView
from evomerge.trial import Evaluation, Job, Score

TEST = tuple(str(number) for number in range(100, 160))


class Answers:
    """Solves an item where a number made of it is below what the merge's weights give."""

    def run(self, job: Job) -> Evaluation:
        first, second = job.recipe.table[:2]  # baselines have equal rows and cannot be good
        if job.number == 9:
            raise ValueError("diverged on <purpose> & https://user:secret@host")
        scores = []
        for number, items in enumerate(job.items):
            level = 0.15 + 0.8 * first[number] * (1 - second[number])
            values = tuple(float(Random(f"{i}/{number}").random() < level) for i in items)
            scores.append(Score(sum(values) / len(values), 0.05, values))
        return Evaluation(tuple(scores), {"score": 0.001})

    def describe(self) -> Mapping[str, str]:
        return {"device": "none"}


def answered(directory: Path) -> StudyView:
    """Run the study and return its view; two objectives, 60 test items, one failed trial."""
    study = small_study(directory, objectives=2)
    study.make_pool = lambda: SerialPool(Answers)
    study.items["test"] = (TEST, TEST)
    view = study.run()
    (directory / STUDY_FILE).write_text(
        "name: strings\nseed: 3\nhub_token: hf_abcdefghijklmnopqr\n"
    )
    return view
