"""A saved view of MLflow's own charts: scatter plots and parallel coordinates of one study.

The format is MLflow's own and not documented: the JSON that its user interface writes when a
person saves a view (read from MLflow 3.17; the browser test opens it). A version that does not
understand it shows the plain list of runs.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import combinations

#: Prefix of the experiment tag that holds a view; the rest is the view's key in addresses.
VIEW_TAG = "mlflow.sharedViewState."
#: Key of the view of all studies of an experiment.
STUDIES = "evomerge-studies"
#: Scatter plots at most: every pair of five objectives.
_MOST_SCATTERS = 10
#: Objectives in the list of studies at most.
_MOST_COLUMNS = 40
#: Axes of the parallel coordinates at most, beside the objectives.
_MOST_PARAMS = 6
#: MLflow makes a chart of every metric; its sections for those below are folded up.
_FOLDED = (
    "Model metrics", "standard_error", "seconds", "validation", "test", "items", "estimate",
    "System metrics",
)  # fmt: skip
_SECTION = "pareto-front"


def children_query(run: str) -> str:
    """Return the query that finds the trials of a study by the id of its run."""
    return f"tags.`mlflow.parentRunId` = '{run}'"


def front_query(run: str) -> str:
    """Return the query that finds the front members of a study by the id of its run."""
    return f"{children_query(run)} and tags.front = 'true'"


def pareto_view(
    title: str, run: str, objectives: Sequence[str], params: Sequence[str], milliseconds: int
) -> str:
    """Return the value of the experiment tag that makes the view.

    Args:
        title: name of the view in MLflow's menu.
        run: id of the study's run.
        objectives: names of metrics [m]; a plot for every pair.
        params: names of parameters, for the parallel coordinates.
        milliseconds: unix time at which the view was made.
    """
    columns = [*(f"metrics.`{name}`" for name in objectives), "tags.`front`", "tags.`knee`"]
    state = {
        **_facets(children_query(run), "metrics.`front`"),
        "selectedColumns": columns,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": list(_cards(objectives, params)),
        "compareRunSections": [
            {**_SECTION_DEFAULTS, "uuid": _SECTION, "name": "Pareto front", "display": True,
             "columns": 3 if len(objectives) > 2 else 2, "cardHeight": 400},
            *({**_SECTION_DEFAULTS, "uuid": f"folded-{name}", "name": name, "display": False}
              for name in _FOLDED),
        ],
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
        "runListHidden": False,
        "viewMaximized": False,
    }  # fmt: skip
    return _envelope(f"{title}: Pareto front", state, milliseconds)


def studies_view(objectives: Sequence[Sequence[str]], milliseconds: int) -> str:
    """Return the value of the experiment tag that lists its studies with their objectives.

    Args:
        objectives: names of metrics by study; one column each, the first studies' first.
        milliseconds: unix time at which the view was made.
    """
    names = dict.fromkeys(name for study in objectives for name in study)
    metrics = [*[*names][:_MOST_COLUMNS], "hypervolume", "trials/finished", "trials/failed"]
    state = {
        **_facets("tags.`evomerge.kind` = 'study'", "attributes.`Created`"),
        "selectedColumns": [f"metrics.`{name}`" for name in metrics],
    }
    return _envelope("Studies", state, milliseconds)


def _facets(query: str, order: str) -> dict[str, object]:
    return {
        "searchFilter": query,
        "orderByKey": order,
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
    }


def _envelope(name: str, state: dict[str, object], milliseconds: int) -> str:
    packed = zlib.compress(json.dumps(state, separators=(",", ":")).encode(), 9)
    envelope = {
        "name": name,
        "createdAt": milliseconds,
        "updatedAt": milliseconds,
        "state": "deflate;" + base64.b64encode(packed).decode(),
    }
    return json.dumps(envelope)


_SECTION_DEFAULTS = {"isReordered": True, "deleted": False, "isGenerated": False}


def _cards(objectives: Sequence[str], params: Sequence[str]) -> Iterator[dict[str, object]]:
    common = {"deleted": False, "isGenerated": False, "metricSectionId": _SECTION}
    pairs = list(combinations(objectives, 2))[:_MOST_SCATTERS]
    for number, (x, y) in enumerate(pairs):
        yield {
            **common,
            "uuid": f"pareto-{number}",
            "type": "SCATTER",
            "displayName": f"{y} against {x}",
            "runsCountToCompare": 1000,
            "xaxis": {"key": x, "type": "METRIC"},
            "yaxis": {"key": y, "type": "METRIC"},
        }
    if not pairs:
        yield {
            **common,
            "uuid": "pareto-bar",
            "type": "BAR",
            "runsCountToCompare": 20,
            "metricKey": objectives[0],
            "displayName": objectives[0],
        }
    yield {
        **common,
        "uuid": "pareto-parallel",
        "type": "PARALLEL",
        "displayName": "Coefficients and objectives",
        "runsCountToCompare": 1000,
        "selectedParams": list(params[:_MOST_PARAMS]),
        "selectedMetrics": list(objectives),
        "showAllRuns": True,
    }
