"""The description of a study's run in MLflow: words, a small table, and where to go from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evomerge.front_page import FrontPoint, summary
from evomerge.front_table import front_markdown
from evomerge.gain import Gain
from evomerge.metric_names import renamed
from evomerge.pareto_view import front_query
from evomerge.projection import Projection

#: MLflow cuts tags off at 8000 characters without a word.
_CHARACTERS = 7500


def study_note(projection: Projection, run: str, pareto_link: str) -> str:
    """Return the Markdown that MLflow shows on the study's overview.

    Args:
        projection: of the study.
        run: id of its run.
        pareto_link: address of its Pareto page, relative to the page of the note.
    """
    front = projection.front
    members = [point for point in front.points if point.front]
    lines = [f"**{front.title}**: {front.subtitle}", ""]
    if not members:
        return _cut("\n".join([*lines, *projection.words, "", "No trial has finished yet.", ""]))
    best = next((point for point in members if point.number == front.knee), members[0])
    lines += [
        # First of all: MLflow folds a description after its first lines.
        f"[**Open the Pareto page**]({pareto_link}): MLflow's own charts of all trials, the front "
        "in colour. Under *Artifacts*: **front.html**, interactive, with error bars and export "
        "commands; **coefficients.html**. Under *Model metrics*: the front over the trials.",
        "",
        *projection.words,
        "",
        *_renamed(projection),
        front_markdown(front),
        *_best(projection, best),
        "Take it home:", "", f"    {front.command.replace('{n}', str(best.number))}", "",
        "The front members alone, as a query for the list of runs:", "",
        f"    {front_query(run)}", "",
    ]  # fmt: skip
    return _cut("\n".join(lines))


def _renamed(projection: Projection) -> Iterator[str]:
    """Yield which metrics of MLflow's tables and charts are objectives of another name."""
    for own, shown in renamed(projection.front.objectives).items():
        yield f"The objective `{own}` is the metric `{shown}`."
        yield ""


def _best(projection: Projection, best: FrontPoint) -> Iterator[str]:
    if best.recipe is not None:
        yield f"Recommended is trial {best.number}: {summary(best.recipe)}."
        yield ""
    rivals = [gain for gain in projection.gains if gain.against in projection.rivals]
    if rivals:
        yield "On held-out items, paired, it gains " + _sentence(rivals) + "."
        yield ""


def _sentence(gains: Sequence[Gain]) -> str:
    """Return e.g. ``+0.350 ± 0.020 over expert math and +0.400 ± 0.021 over uniform``."""
    parts = []
    for gain in gains:
        name = gain.against.replace("expert:", "the best single expert, ").replace(
            "uniform", "the uniform average"
        )
        of = f" in {gain.objective}" if gain.objective else ""
        error = gain.difference.standard_error
        shown = f" ± {error:.3f}" if gain.difference.comparable else ""
        parts.append(f"{gain.difference.value:+.3f}{shown}{of} over {name}")
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _cut(note: str) -> str:
    return note if len(note) < _CHARACTERS else note[: _CHARACTERS - 100] + "\n\n(see front.csv)\n"
