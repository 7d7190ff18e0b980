"""What there is: methods, searchers, partitions, studies; the tables of `list` and the README."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import EvomergeError, InputError

if TYPE_CHECKING:
    from evomerge.merge.methods.method import Option
    from evomerge.search.entry import ArgumentSpec, SearcherEntry

Row = dict[str, str]


def catalogue(what: str, under: Path) -> list[dict[str, Any]]:
    """Return one table as data.

    Args:
        what: ``methods``, ``searchers``, ``partitions``, ``objectives``, ``estimators``
            or ``studies``.
        under: folder that is searched for studies.
    """
    if what == "methods":
        return method_facts()
    if what == "searchers":
        return searcher_facts()
    if what == "partitions":
        return [*partitions()]
    if what == "objectives":
        return [*objectives()]
    if what == "estimators":
        return [*estimators()]
    return studies(under)


def catalogue_lines(what: str, under: Path) -> list[Row]:
    """Return the rows of one table for people.

    Args:
        what: ``methods``, ``searchers``, ``partitions``, ``objectives``, ``estimators``
            or ``studies``.
        under: folder that is searched for studies.
    """
    if what == "methods":
        return methods()
    if what == "searchers":
        return searchers()
    if what == "partitions":
        return partitions()
    if what == "objectives":
        return objectives()
    if what == "estimators":
        return estimators()
    return [{key: str(value) for key, value in row.items()} for row in studies(under)]


def method_facts() -> list[dict[str, Any]]:
    """Return the merge methods with all that is known of their parameters and options."""
    from evomerge.merge.methods import METHODS

    return [
        {
            "method": method.name,
            "what it does": method.summary,
            "parameters": [asdict(parameter) for parameter in method.parameters],
            "options": [asdict(option) for option in method.options],
            "experts": list(method.experts),
            "source": method.source,
        }
        for method in METHODS.values()
    ]


def searcher_facts() -> list[dict[str, Any]]:
    """Return the searchers with their arguments and defaults."""
    from evomerge.search.registry import find_searcher, searcher_names

    return [
        {
            "searcher": name,
            "library": entry.library,
            "what it does": entry.summary,
            "multi_objective": entry.multi_objective,
            "arguments": {
                key: {"default": spec.default, "expected": spec.expected, "help": spec.help}
                for key, spec in entry.arguments.items()
            },
        }
        for name in searcher_names()
        for entry in [find_searcher(name)]
    ]


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
                "experts": _count(low, high),
                "source": method.source,
                "options": "\n".join(
                    f"{option.name}: {option.help}; {_choices(option)}" for option in method.options
                ),
            }
        )
    return rows


def _count(low: int, high: int | None) -> str:
    """Return how many experts a method takes."""
    if high is None:
        return f"{low}+"
    return str(low) if low == high else f"{low} to {high}"


def searchers() -> list[Row]:
    """Return the searchers with their arguments and defaults."""
    from evomerge.search.registry import find_searcher, searcher_names

    rows = []
    for name in searcher_names():
        entry = find_searcher(name)
        arguments = [_argument(key, spec) for key, spec in entry.arguments.items()]
        rows.append(
            {
                "searcher": name,
                "library": entry.library,
                "what it does": entry.summary,
                "objectives": _objectives(entry),
                "arguments": ", ".join(arguments),
            }
        )
    return rows


def searcher(name: str) -> list[Row]:
    """Return what one searcher is, and a row for each of its arguments.

    Raises:
        InputError: no such searcher.
    """
    from evomerge.search.registry import find_searcher

    entry = find_searcher(name)
    about = f"{entry.summary}; library: {entry.library}; objectives: {_objectives(entry)}"
    rows = [{"name": name, "": about}]
    for key, spec in entry.arguments.items():
        default = "" if spec.default is None else f"; default {_number(spec.default)}"
        rows.append({"name": f"  {key}", "": f"{spec.help}{default}; {spec.expected}"})
    return rows


def _objectives(entry: SearcherEntry) -> str:
    """Return how many objectives a searcher takes."""
    if not entry.multi_objective:
        return "one (weighted mean)"
    return "several" if entry.single_objective else "two or more"


def _argument(key: str, spec: ArgumentSpec) -> str:
    """Return an argument with its default and its choices."""
    text = key if spec.default is None else f"{key}={_number(spec.default)}"
    others = [choice for choice in spec.choices if choice != spec.default]
    return f"{text} (or {', '.join(others)})" if others else text


def _choices(option: Option) -> str:
    """Return the choices of an option, the default first."""
    others = [choice for choice in option.choices if choice != option.default]
    texts = [str(choice).lower() for choice in (option.default, *others)]
    return f"{texts[0]} (or {', '.join(texts[1:])})"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def partitions() -> list[Row]:
    """Return the partitions."""
    from evomerge.layout import PARTITIONS

    return [{"partition": name, "blocks": text} for name, text in PARTITIONS.items()]


def objectives() -> list[Row]:
    """Return what can be an objective, and where it is written in a study file."""
    from evomerge.fitness.goals import KINDS
    from evomerge.fitness.measures import MEASURES

    rows = [
        {
            "objective": "acc, exact_match, perplexity, ...",
            "written as": "{task: NAME, metric: METRIC}",
            "what it is": "a metric of an lm-eval task, group or tag: a mean over items, or a "
            "perplexity",
        }
    ]
    rows += [
        {
            "objective": name,
            "written as": f"{{task: NAME, metric: {name}}}",
            "what it is": f"{measure.summary} ({', '.join(measure.kinds)})",
        }
        for name, measure in MEASURES.items()
    ]
    rows += [
        {"objective": kind, "written as": f"{{kind: {kind}, ...}}", "what it is": summary}
        for kind, summary in KINDS.items()
    ]
    return rows


def estimators() -> list[Row]:
    """Return the estimators of ``fitness.estimator``, then its designs."""
    from evomerge.fitness.irt.design import DESIGNS
    from evomerge.fitness.irt.estimators import ESTIMATORS

    rows = [
        {
            "name": name,
            "what it does": entry.summary,
            "needs": ", ".join(entry.needs),
            "from": entry.source,
        }
        for name, entry in ESTIMATORS.items()
    ]
    designs = ", ".join(DESIGNS)
    return [*rows, {"name": "design", "what it does": f"how the items are chosen: {designs}"}]


def studies(under: Path) -> list[dict[str, Any]]:
    """Return the studies in and below a folder, by path."""
    from evomerge.study_view import StudyView

    if not under.is_dir():
        raise InputError(f"--under: {under}: no such directory")
    rows: list[dict[str, Any]] = []
    for journal in sorted(under.rglob("journal.jsonl")):
        directory = journal.parent
        try:
            view = StudyView.load(directory)
        except EvomergeError as error:
            rows.append({"study": str(directory), "state": f"unreadable: {error}"})
            continue
        rows.append(
            {
                "study": str(directory),
                "state": view.state.value,
                "trials": view.counts.done,
                "front": len(view.front),
            }
        )
    return rows
