"""What there is: methods, searchers, partitions, studies; the tables of `list` and the README."""

from __future__ import annotations

from pathlib import Path

from evomerge.errors import EvomergeError, InputError

Row = dict[str, str]


def catalogue(what: str, under: Path) -> list[Row]:
    """Return the rows of one table.

    Args:
        what: ``methods``, ``searchers``, ``partitions`` or ``studies``.
        under: folder that is searched for studies.
    """
    if what == "methods":
        return methods()
    if what == "searchers":
        return searchers()
    if what == "partitions":
        return partitions()
    return studies(under)


def methods() -> list[Row]:
    """Return the merge methods with their parameters and options."""
    from evomerge.merge.methods import METHODS, Scope

    rows = []
    for method in METHODS.values():
        parameters = [
            parameter.name + (" per expert" if parameter.scope is Scope.EXPERT else "")
            for parameter in method.parameters
        ]
        low, high = method.experts
        rows.append(
            {
                "method": method.name,
                "what it does": method.summary,
                "searchable": ", ".join(parameters),
                "options": ", ".join(option.name for option in method.options),
                "experts": f"{low}+" if high is None else f"{low} to {high}",
                "source": method.source,
            }
        )
    return rows


def searchers() -> list[Row]:
    """Return the searchers with their arguments and defaults."""
    from evomerge.search.registry import find_searcher, searcher_names

    rows = []
    for name in searcher_names():
        entry = find_searcher(name)
        arguments = [
            key if spec.default is None else f"{key}={spec.default}"
            for key, spec in entry.arguments.items()
        ]
        rows.append(
            {
                "searcher": name,
                "library": entry.library,
                "what it does": entry.summary,
                "objectives": "several" if entry.multi_objective else "one (weighted mean)",
                "arguments": ", ".join(arguments),
            }
        )
    return rows


def partitions() -> list[Row]:
    """Return the partitions."""
    from evomerge.layout import PARTITIONS

    return [{"partition": name, "blocks": text} for name, text in PARTITIONS.items()]


def studies(under: Path) -> list[Row]:
    """Return the studies in and below a folder, by path."""
    from evomerge.study_view import StudyView

    if not under.is_dir():
        raise InputError(f"--under: {under}: no such directory")
    rows = []
    for journal in sorted(under.rglob("journal.jsonl")):
        directory = journal.parent
        try:
            view = StudyView.load(directory)
            state, trials = view.state.value, str(view.counts.done)
            front = str(len(view.front))
        except EvomergeError as error:
            state, trials, front = f"unreadable: {error}", "", ""
        rows.append({"study": str(directory), "state": state, "trials": trials, "front": front})
    return rows
