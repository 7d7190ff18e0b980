"""Choose one member of a study's front by knee, weights, objective or volume."""

from __future__ import annotations

import math

from evomerge.errors import InputError, NothingUsableError
from evomerge.pareto import most_volume
from evomerge.pareto import pick as pick_by_weights
from evomerge.presentation import export_command, study_name
from evomerge.study_view import StudyView
from evomerge.telling import losses_of
from evomerge.trial import Evaluation

#: Ways to choose, as they are written, with what the command line says about them.
PICKS = {
    "knee": "the recommended compromise",
    "asf:W1,W2,...": "the member that serves these weights best, one per objective",
    "best:OBJECTIVE": "the best of one objective",
    "hv": "the member without which the front would lose most hypervolume",
}
CHOICES = ", ".join(PICKS)


def pick_trial(view: StudyView, pick: str) -> int:
    """Return the number of the front member that ``pick`` asks for.

    ``asf`` is the augmented Chebyshev achievement function (Steuer & Choo 1983) on the losses of
    the front normalised to [0, 1]: a member is as good as its worst weighted objective. ``hv``
    and ``asf`` see the scores that decided the front.

    Args:
        view: the study.
        pick: ``knee``, ``asf:0.7,0.3``, ``best:OBJECTIVE`` or ``hv``.

    Raises:
        InputError: another word, an unknown objective, or not one valid weight per objective.
        NothingUsableError: no trial has succeeded.
    """
    word, colon, argument = pick.partition(":")
    if pick not in ("knee", "hv") and not (word in ("asf", "best") and colon and argument):
        raise InputError(f"--pick: expected one of {CHOICES}; got {pick!r}")
    weights = _weights(view, argument) if word == "asf" else ()
    if view.knee is None or not view.front:
        raise NothingUsableError(f"{view.directory}: no trial has succeeded, nothing to choose")
    if word == "knee":
        return view.knee
    if word == "best":
        return view.best(argument)
    losses = [
        losses_of(view.objectives, deciding(view, number).values) for number in view.front
    ]  # [f][m]
    row = pick_by_weights(losses, weights) if word == "asf" else most_volume(losses)
    return view.front[row]


def pick_line(view: StudyView, pick: str, number: int) -> str:
    """Return what was chosen, its scores, and the command that takes it home."""
    pairs = zip(view.objectives, deciding(view, number).values, strict=True)
    values = ", ".join(f"{objective.name} {value:.4f}" for objective, value in pairs)
    command = export_command(view, f"--trial {number}", f"{study_name(view)}-{number}")
    return f"{pick} picks trial {number}: {values} ({view.front_split} items)\n    {command}"


def _weights(view: StudyView, text: str) -> tuple[float, ...]:
    names = [objective.name for objective in view.objectives]
    try:
        weights = tuple(float(piece) for piece in text.split(","))
    except ValueError:
        weights = ()
    valid = all(math.isfinite(weight) and weight >= 0 for weight in weights) and sum(weights) > 0
    if not valid or len(weights) != len(names):
        raise InputError(
            f"--pick asf: expected {len(names)} weights >= 0, not all 0, for "
            f"{', '.join(names)} in this order; got {text!r}"
        )
    return weights


def deciding(view: StudyView, number: int) -> Evaluation:
    """Return the evaluation of a front member on the split that decided the front."""
    evaluation = view.trial(number).evaluation
    if view.front_split == "search":
        assert evaluation is not None
        return evaluation
    return view.evaluation(view.front_split, number)
