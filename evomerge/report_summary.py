"""A study in a page of Markdown, for a pull request or a model card."""

from __future__ import annotations

from evomerge.comparison_rows import COMPARISON_HEADER, comparison_note, overview_rows
from evomerge.estimate_audits import distrust
from evomerge.front_page import summary
from evomerge.front_table import cell, front_markdown
from evomerge.item_comparison import Comparison, compare_trials, rivals_of
from evomerge.presentation import export_command, project, study_name, verify_command
from evomerge.redaction import redacted
from evomerge.study_view import StudyView


def recommended_comparison(view: StudyView) -> Comparison | None:
    """Return the recommended merge against the baselines; None where there is nothing to compare.

    Each on the best items that both were scored on; the rows say which.
    """
    if view.knee is None:
        return None
    rivals = [n for n in rivals_of(view, view.knee) if view.trials[n].evaluation is not None]
    return compare_trials(view, [view.knee, *rivals]) if rivals else None


def report_markdown(view: StudyView) -> str:
    """Return the summary: what was searched, the front, what is gained, and how to repeat it."""
    projection = project(view)
    front = projection.front
    name = study_name(view)
    lines = [f"## {name}", "", front.subtitle, "", *projection.words, "", front_markdown(front)]
    if view.knee is not None:
        recipe = view.trial(view.knee).recipe
        lines += [f"Recommended is trial {view.knee}: {summary(recipe)}.", ""]
    found = recommended_comparison(view)
    if found is not None:
        header = COMPARISON_HEADER
        lines += [
            f"### What {found.names[found.first]} gains", "",
            f"| {' | '.join(header)} |",
            "|---|---|" + "---:|" * (len(header) - 2),
            *(f"| {' | '.join(map(cell, row))} |".replace("*", r"\*")
              for row in overview_rows(found)),
            "",
            comparison_note(found).replace("*", r"\*"), "",
        ]  # fmt: skip
    lines += [line for warning in distrust(view) for line in (f"**Warning:** {warning}", "")]
    if view.counts.failed:
        lines += [f"Failed trials: {view.counts.failed}; `evomerge report` lists why.", ""]
    lines += ["Take it home:", "", f"    {export_command(view, '--pick knee', 'merged')}",
              f"    {verify_command(view, 'merged')}", ""]  # fmt: skip
    return redacted("\n".join(lines))
