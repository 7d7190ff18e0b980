"""Fitting an item bank to a response matrix."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import InputError
from evomerge.fitness.irt.ability import fit_map, sigmoid
from evomerge.fitness.irt.bank import ItemBank

Floats = NDArray[np.float64]

KINDS = ("1pl", "2pl", "m2pl")
#: Numbers of dimensions that are tried; efficbench tries 2, 5, 10, 15.
DIMENSIONS = (1, 2, 3, 5, 8)
#: The fewest dimensions within this of the smallest loss are taken, nats per answer.
GOOD_ENOUGH = 0.001
#: A spread of parameters below this would freeze them where they are.
SMALLEST_SPREAD = 0.05
#: Sweeps over items and models at most.
SWEEPS = 100
#: Mean change of a parameter in a sweep that ends the fit; their standard errors are about .2.
SETTLED = 1e-2


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """What models scored on items.

    Attributes:
        models: names [M].
        ids: of the items [I].
        scores: in [0, 1] [M, I]; NaN where a model was not asked.
    """

    models: tuple[str, ...]
    ids: tuple[str, ...]
    scores: Floats

    def __post_init__(self) -> None:
        expected = (len(self.models), len(self.ids))
        if self.scores.shape != expected:
            raise InputError(
                f"responses: expected [M, I] = {list(expected)}, got {list(self.scores.shape)}"
            )
        if len(set(self.ids)) != len(self.ids):
            raise InputError("responses: an item id occurs more than once")
        known = np.isfinite(self.scores)
        if (np.isinf(self.scores) | (known & ((self.scores < 0) | (self.scores > 1)))).any():
            raise InputError("responses: a score is outside [0, 1] (rescale the scores)")
        if not (known.any(axis=0).all() and known.any(axis=1).all()):
            raise InputError("responses: a model or an item has no score at all (leave it out)")


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well a bank predicts models that its fit did not see.

    Attributes:
        error: mean over the models of the absolute error of their mean score.
        loss: minus the log-likelihood per answer, nats.
    """

    error: float
    loss: float


def read_csv(path: Path) -> Responses:
    """Read a matrix: a header ``model,<item id>,...``, then a row per model; empty is missing.

    Raises:
        InputError: unreadable, a row of another length, or a cell that is no number in [0, 1].
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *body = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: expected a CSV file with a header: {error}") from error
    scores = np.full((len(body), len(header) - 1), np.nan)
    for line, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise InputError(f"{path}: row {line}: expected {len(header)} cells, got {len(row)}")
        for column, cell in enumerate(row[1:]):
            try:
                scores[line - 2, column] = float(cell) if cell.strip() else np.nan
            except ValueError as error:
                raise InputError(
                    f"{path}: row {line}, item {header[column + 1]!r}: expected a number, "
                    f"got {cell!r}"
                ) from error
    try:
        return Responses(tuple(row[0] for row in body), tuple(header[1:]), scores)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def binarised(responses: Responses, threshold: float | None = None) -> Responses:
    """Return the scores as 0 or 1: 1 where at least the threshold.

    Args:
        responses: graded scores.
        threshold: None for the one of .01, .02, ... .99 that keeps the models' means best
            (tinyBenchmarks).
    """
    scores, known = responses.scores, np.isfinite(responses.scores)

    def cut(at: float) -> Floats:
        return np.where(known, (scores >= at).astype(np.float64), np.nan)

    def loss(at: float) -> float:
        return float(np.abs(np.nanmean(cut(at), axis=1) - np.nanmean(scores, axis=1)).mean())

    if threshold is None:
        threshold = min((float(at) for at in np.arange(1, 100) / 100), key=loss)
    return replace(responses, scores=cut(threshold))


def fit_bank(responses: Responses, kind: str = "m2pl", dimensions: int | None = None) -> ItemBank:
    """Fit a bank, and measure how well it predicts models that it did not see.

    Alternates Newton steps of all items and of all models (joint MAP); the normal priors of the
    items are learned with them (Laplace), the abilities are N(0, I). No random numbers.

    Args:
        responses: at least 5 models; graded scores count as that many answers.
        kind: ``1pl``, ``2pl`` or ``m2pl``.
        dimensions: of ``m2pl``; None for the best on held-out models.

    Raises:
        InputError: an unknown kind, dimensions that it does not have, or too few models.
    """
    if kind not in KINDS:
        raise InputError(f"item bank: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind != "m2pl" and dimensions not in {None, 1}:
        raise InputError(f"item bank: {kind} has one dimension, got {dimensions}")
    models = len(responses.models)
    if models < 5 or (dimensions or 1) >= models:
        raise InputError(
            f"item bank: expected at least 5 models and more than dimensions, got {models} "
            "(score more random merges)"
        )
    if kind == "m2pl" and dimensions is None:
        tried = held_out(responses, [d for d in DIMENSIONS if 4 * d <= models])
        dimensions = fewest_good(tried)
        error = tried[dimensions].error
    else:
        dimensions = dimensions or 1
        error = held_out(responses, [dimensions], kind)[dimensions].error
    slopes, intercepts = _fit(responses.scores, dimensions, common=kind == "1pl")
    variance = float(np.nanvar(responses.scores, axis=1).mean())
    complete = responses.scores if np.isfinite(responses.scores).all() else None
    return ItemBank(kind, responses.ids, slopes, intercepts, error, variance, complete)


def held_out(
    responses: Responses, dimensions: Sequence[int], kind: str = "m2pl"
) -> dict[int, HeldOut]:
    """Predict models that the fit did not see, by number of dimensions.

    Every fifth model is held out, its ability fitted on the even items, and the odd ones
    predicted (tinyBenchmarks).
    """
    held = np.arange(len(responses.models)) % 5 == 0
    even = np.arange(len(responses.ids)) % 2 == 0
    if even.all():
        raise InputError("item bank: expected at least 2 items, got 1")
    test = responses.scores[held]
    seen = np.isfinite(test)
    y, odd = np.nan_to_num(test), seen[:, ~even]
    usable = odd.any(axis=1)
    results = {}
    for count in dimensions:
        slopes, intercepts = _fit(responses.scores[~held], count, common=kind == "1pl")
        fit = fit_map(
            slopes[even],
            -intercepts[even],
            y[:, even],
            np.zeros(count),
            np.eye(count),
            seen=seen[:, even].astype(np.float64),
        )
        z = fit.parameters @ slopes[~even].T - intercepts[~even]
        gap = np.where(odd, sigmoid(z) - y[:, ~even], 0.0).sum(axis=1)[usable]
        loss = (np.logaddexp(0.0, z) - y[:, ~even] * z)[odd].mean()
        results[count] = HeldOut(float(np.abs(gap / odd.sum(axis=1)[usable]).mean()), float(loss))
    return results


def fewest_good(tried: dict[int, HeldOut]) -> int:
    """Return the smallest number of dimensions whose loss is about the best.

    tinyBenchmarks compares the errors of the means; those hardly differ between one dimension
    and the right number, while the losses do, and weights on the endpoints' abilities need the
    dimensions in which the endpoints differ.
    """
    best = min(result.loss for result in tried.values())
    return min(count for count, result in tried.items() if result.loss <= best + GOOD_ENOUGH)


def _fit(scores: Floats, dimensions: int, *, common: bool) -> tuple[Floats, Floats]:
    """Return slopes [I, D] and intercepts [I]; with ``common``, one slope for all items."""
    seen = np.isfinite(scores).astype(np.float64)  # [M, I]
    y = np.nan_to_num(scores)
    theta = _first_abilities(scores, dimensions)  # [M, D]
    items = np.zeros((y.shape[1], dimensions + 1))  # slopes and intercept of each item
    items[:, 0] = 1.0
    mean, spread = np.zeros(dimensions + 1), np.ones(dimensions + 1)
    mean[0] = 1.0
    for _ in range(SWEEPS):
        before = items.copy()
        x = np.column_stack([theta, -np.ones(len(theta))])  # [M, D + 1]
        prior = np.diag(spread**-2)
        fit = fit_map(x, np.zeros(len(x)), y.T, mean, prior, seen=seen.T, start=items, iterations=1)
        items = fit.parameters
        if common:
            items[:, 0] = _common_slope(x, y, seen, items)
        slopes, intercepts = items[:, :-1], items[:, -1]
        models = fit_map(
            slopes, -intercepts, y, np.zeros(dimensions), np.eye(dimensions), seen=seen,
            start=theta, iterations=1,
        )  # fmt: skip
        theta, items = _standardised(models.parameters, items)
        mean = items.mean(axis=0)
        variances = ((items - mean) ** 2 + np.einsum("npp->np", fit.covariance)).mean(axis=0)
        spread = np.maximum(np.sqrt(variances), SMALLEST_SPREAD)
        if np.abs(items - before).mean() < SETTLED:
            break
    return items[:, :-1].copy(), items[:, -1].copy()


def _first_abilities(scores: Floats, dimensions: int) -> Floats:
    """Return the leading singular vectors of the centred matrix, of unit variance [M, D]."""
    centred = np.nan_to_num(scores - np.nanmean(scores, axis=0))
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    theta = left[:, :dimensions] * np.sqrt(len(scores))
    # The first one grows with the mean score, so that most slopes are positive.
    falls = (theta * np.nanmean(scores, axis=1)[:, None]).sum(axis=0) < 0
    return np.asarray(theta * np.where(falls, -1.0, 1.0))


def _common_slope(x: Floats, y: Floats, seen: Floats, items: Floats) -> float:
    """Return the one slope of a 1PL after a Newton step, from the items' mean slope."""
    slope = float(items[:, 0].mean())
    p = sigmoid(slope * x[:, :1] - items[:, -1])  # [M, I]
    gradient = float(((y - p) * seen * x[:, :1]).sum())
    curvature = float((p * (1 - p) * seen * x[:, :1] ** 2).sum()) + 1.0
    return slope + float(np.clip(gradient / curvature, -0.5, 0.5))


def _standardised(theta: Floats, items: Floats) -> tuple[Floats, Floats]:
    """Return abilities with mean 0 and covariance I, and items that predict the same."""
    centre = theta.mean(axis=0)
    # 1e-6 keeps a dimension that no item uses invertible.
    covariance = np.atleast_2d(np.cov(theta.T)) + 1e-6 * np.eye(theta.shape[1])
    root = np.linalg.cholesky(covariance)
    slopes, intercepts = items[:, :-1], items[:, -1]
    moved = np.column_stack([slopes @ root, intercepts - slopes @ centre])
    return np.linalg.solve(root, (theta - centre).T).T, moved
