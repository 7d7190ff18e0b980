"""Lineage: which merges an evolved front member was made from, back to the first ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from evomerge.plain_page import heading, page, paragraph, table
from evomerge.study_view import StudyView
from evomerge.trial import Trial

#: Front members that are shown, the recommended one first; and lines of each at most.
_MOST_MEMBERS, _MOST_LINES = 24, 200


def lineage_html(title: str, view: StudyView) -> str:
    """Return the page: for each evolved member of the front a tree of its ancestors."""
    evolved = [number for number in view.front if view.trial(number).origin is not None]
    shown = sorted(evolved, key=lambda number: number != view.knee)[:_MOST_MEMBERS]
    first = _first_of_recipes(view)
    columns = ["merge", "made by", *(objective.name for objective in view.objectives), "front"]
    body = [
        paragraph(
            "Below each merge, further in, stand the two that it was made from: the first gives "
            "its coefficients up to the split, the second from there on, each mixed with a share "
            "of the other. Values are those of the search items."
        )
    ]
    for number in shown:
        mark = " (recommended)" if number == view.knee else ""
        rows = list(_rows(view, number, first))
        body += [heading(f"trial {number}{mark}"), table(columns, rows[:_MOST_LINES])]
        if len(rows) > _MOST_LINES:
            body.append(paragraph(f"{len(rows) - _MOST_LINES} more ancestors are not shown."))
    if not shown:
        body.append(paragraph("No member of the front was evolved from others."))
    if len(evolved) > len(shown):
        body.append(paragraph(f"{len(evolved) - len(shown)} more members are not shown."))
    return page(f"{title}: lineage of the front", body)


def _first_of_recipes(view: StudyView) -> Mapping[str, Trial]:
    """Return the first trial of each recipe: a searcher asks for baselines again as its own."""
    first: dict[str, Trial] = {}
    for trial in view.trials:
        first.setdefault(view.history.digests[trial.number], trial)
    return first


def _rows(view: StudyView, number: int, first: Mapping[str, Trial]) -> Iterator[Sequence[str]]:
    """Yield the tree depth first, one merge per row; an ancestor is followed up once."""
    followed: set[int] = set()
    waiting = [(number, 0)]
    while waiting:
        number, depth = waiting.pop()
        trial = view.trial(number)
        known = first[view.history.digests[number]]
        name = known.label or f"trial {number}"
        # A searcher that took over asks again for what it starts from.
        origin = None if known.label else trial.origin or known.origin
        seen = origin is not None and number in followed
        how = "see above" if seen else "" if origin is None else origin.how
        values = [] if trial.evaluation is None else [f"{v:.3f}" for v in trial.evaluation.values]
        values += [""] * (len(view.objectives) - len(values))
        yield ["· " * depth + name, how, *values, "front" if number in view.front else ""]
        followed.add(number)
        if origin is not None and not seen:
            waiting += [(parent, depth + 1) for parent in reversed(origin.parents)]
