"""Tables and plots of searches on real pools; see ``real_pools.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: Searches are looked at after these shares of their trials.
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Run:
    """One search.

    Attributes:
        case: its name.
        entry: of ``ENTRIES``.
        seed: of the searcher.
        budget: trials.
        scores: test scores of what was measured as best after ``SHARES`` of the trials.
        overhead: seconds in the searcher per trial.
        chosen: what ``auto`` took.
    """

    case: str
    entry: str
    seed: int
    budget: int
    scores: tuple[float, ...]
    overhead: float
    chosen: str

    @property
    def score(self) -> float:
        """Test score after all trials."""
        return self.scores[-1]


def read(path: Path) -> Run:
    """Return a finished search."""
    values = json.loads(path.read_text())
    return Run(**{**values, "scores": tuple(values["scores"])})


def table(runs: Sequence[Run], cases: Sequence[str], entries: Sequence[str]) -> str:
    """Return a row per searcher: mean, 95 % half-width and number of seeds.

    Bold is what cannot be told from the best of its column: Welch's t test, two-sided, 5 %. Both
    need three seeds or more. ``of the best`` is the mean over columns of the mean score as a share
    of the column's best one.
    """
    names = [case for case in cases if any(run.case == case for run in runs)]
    lines = ["| searcher | " + " | ".join(names) + " | of the best | ms per trial |"]
    lines.append("|---|" + "---|" * (len(names) + 2))
    found = {
        (name, entry): [run.score for run in runs if (run.case, run.entry) == (name, entry)]
        for name in names
        for entry in entries
    }
    best = {name: _best([found[name, entry] for entry in entries]) for name in names}
    for entry in entries:
        own = [run for run in runs if run.entry == entry]
        if not own:
            continue
        cells = [_cell(found[name, entry], best[name]) for name in names]
        shares = [
            float(np.mean(found[name, entry]) / np.mean(best[name]))
            for name in names
            if found[name, entry] and best[name]
        ]
        share = f"{100 * np.mean(shares):.0f} %" if shares else ""
        slow = 1000 * max(run.overhead for run in own)
        lines.append(f"| {entry} | " + " | ".join(cells) + f" | {share} | {slow:.0f} |")
    return "\n".join(lines)


def _best(columns: Sequence[Sequence[float]]) -> Sequence[float]:
    """Return the scores with the largest mean among those of three seeds or more."""
    enough = [scores for scores in columns if len(scores) > 2]
    return max(enough, key=lambda scores: float(np.mean(scores)), default=[])


def level(scores: Sequence[float], best: Sequence[float]) -> bool:
    """Return whether scores cannot be told from the best ones."""
    from scipy.stats import ttest_ind_from_stats

    if min(len(scores), len(best)) < 3:
        return False
    means, spreads = [(float(f(scores)), float(f(best))) for f in (np.mean, np.ptp)]
    if max(spreads) < 1e-9:  # nothing to tell them apart by but the means themselves
        return abs(means[0] - means[1]) < 1e-9
    deviations = [float(np.std(one, ddof=1)) for one in (scores, best)]
    test = ttest_ind_from_stats(
        means[0], deviations[0], len(scores), means[1], deviations[1], len(best), equal_var=False
    )
    return float(test.pvalue) > 0.05


def _cell(scores: Sequence[float], best: Sequence[float]) -> str:
    if not scores:
        return ""
    mean, count = float(np.mean(scores)), len(scores)
    if count == 1:
        return f"{mean:.3f} (1)"
    text = f"{mean:.3f} ± {half_width(scores):.3f} ({count})"
    return f"**{text}**" if level(scores, best) else text


def half_width(scores: Sequence[float]) -> float:
    """Return half of the mean's 95 % interval (Student's t); 0 for one score."""
    from scipy.stats import t

    count = len(scores)
    if count < 2:
        return 0.0
    return float(t.ppf(0.975, count - 1) * np.std(scores, ddof=1) / np.sqrt(count))


def plot(runs: Sequence[Run], cases: Sequence[str], entries: Sequence[str], path: Path) -> None:
    """Draw scores over trials, a panel per case: lines are means, bands 95 % intervals.

    The axes reach as far as the means.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [case for case in cases if any(run.case == case for run in runs)]
    wide = min(4, len(drawn))
    tall = -(-len(drawn) // wide)
    figure = Figure(figsize=(3.6 * wide, 3.0 * tall + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(tall, wide, squeeze=False)
    lines = {}
    for axes, case in zip(panels.flat, drawn, strict=False):
        for number, entry in enumerate(entries):
            rows = [run for run in runs if (run.case, run.entry) == (case, entry)]
            if rows:
                lines[entry] = _line(axes, rows, f"C{number}")
        axes.set_title(case)
        axes.set_xlabel("trials")
        heights = [height for line in axes.get_lines() for height in line.get_ydata()]
        margin = 0.15 * (max(heights) - min(heights)) + 0.002
        # Bands of few seeds are wider than all that tells the searchers apart.
        axes.set_ylim(min(heights) - margin, max(heights) + margin)
        one = case.endswith("x1")
        axes.set_ylabel("test accuracy" if one else "hypervolume on test items")
    for axes in panels.flat[len(drawn) :]:
        axes.remove()
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=max(1, len(lines))
    )
    figure.savefig(path, dpi=110)


def _line(axes: Any, runs: Sequence[Run], colour: str) -> Any:
    trials = [round(share * runs[0].budget) for share in SHARES]
    columns = list(zip(*(run.scores for run in runs), strict=True))
    means = np.array([np.mean(column) for column in columns])
    halves = np.array([half_width(column) for column in columns])
    axes.fill_between(trials, means - halves, means + halves, color=colour, alpha=0.1, lw=0)
    return axes.plot(trials, means, "o-", color=colour, ms=3)[0]
