"""Gaussian processes against scikit-learn used directly, and what the rounds make of them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray

from evomerge.pareto import hypervolume
from evomerge.search.gp import _Plane, fit_process
from evomerge.search.protocol import Candidate, SearchProblem
from evomerge.search.registry import make_searcher
from evomerge.testing import drive, sphere, told

Array = NDArray[np.float64]


def surface(points: Array) -> Array:
    return np.asarray(np.sin(5 * points[:, 0]) + 0.5 * points[:, 1] ** 2 + 3.0)


def test_it_is_scikit_learns_process_at_the_same_hyper_parameters() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    rng = np.random.default_rng(0)
    known, fresh = rng.random((25, 2)), rng.random((40, 2))
    losses = surface(known) + 0.02 * rng.standard_normal(25)
    ours = fit_process(known, losses)
    kernel = ConstantKernel(1.0, (0.05, 50.0)) * Matern([0.5, 0.5], (0.05, 20.0), nu=2.5)
    kernel += WhiteKernel(1e-3, (1e-6, 1.0))
    theirs = GaussianProcessRegressor(kernel, alpha=0.0, normalize_y=True, n_restarts_optimizer=3,
                                      random_state=0)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bounds that the optimum may touch
        theirs.fit(known, losses)
    # The likelihood that scikit-learn's own optimiser finds is not better than ours.
    assert ours._model.log_marginal_likelihood_value_ > (
        theirs.log_marginal_likelihood_value_ - 0.05
    )
    mean, deviation = theirs.predict(fresh, return_std=True)
    np.testing.assert_allclose(ours(fresh)[0], mean, atol=0.01)
    np.testing.assert_allclose(ours(fresh)[1], deviation, atol=0.01)


def test_leave_one_out_is_leaving_one_out() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor

    rng = np.random.default_rng(1)
    known = rng.random((12, 2))
    losses = surface(known)
    process = fit_process(known, losses)
    kernel = process._model.kernel_
    normal = (losses - losses.mean()) / losses.std()
    off = []
    for row in range(12):
        rest = np.delete(np.arange(12), row)
        model = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None)
        model.fit(known[rest], normal[rest])
        off.append(normal[row] - model.predict(known[row : row + 1])[0])
    assert process.error == pytest.approx(losses.std() * np.sqrt(np.mean(np.square(off))), rel=1e-6)


@pytest.mark.parametrize("losses", [[2.0] * 6, [1e300, 0.0, 1e300, -1e300, 0.0, 1.0]])
def test_flat_and_huge_losses_give_finite_predictions(losses: list[float]) -> None:
    known = np.random.default_rng(0).random((6, 2))
    mean, deviation = fit_process(known, np.array(losses))(known)
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()


@pytest.mark.parametrize("seed", [2, 5])
def test_hyper_parameters_of_few_points_do_not_keep_more_points_from_being_fitted(
    seed: int,
) -> None:
    """Baselines and a design of 24 coefficients, then a batch: R2 was 0.000 with it.

    The losses are nearly determined by the mean coefficients of two experts.
    """
    rng = np.random.default_rng(seed)
    baselines = np.zeros((7, 24))
    for expert in range(3):
        baselines[1 + expert, expert::3] = 2 / 3
    baselines[4:] = np.array([2 / 9, 1 / 3, 8 / 15])[:, None]
    known = np.concatenate([baselines, rng.random((9, 24))])
    first, second = known[:, 0::3].mean(axis=1), known[:, 1::3].mean(axis=1)
    losses = np.tanh(4 * (second - first)) + 0.05 * rng.standard_normal(16)
    begun = fit_process(known[:11], losses[:11])
    alone, goes_on = fit_process(known, losses), fit_process(known, losses, begun.theta)
    assert goes_on.r2 > 0.8
    assert goes_on.r2 == pytest.approx(alone.r2, abs=0.05)
    fresh = rng.random((200, 24))
    true = np.tanh(4 * (fresh[:, 1::3].mean(axis=1) - fresh[:, 0::3].mean(axis=1)))
    assert np.corrcoef(goes_on(fresh)[0], true)[0, 1] > 0.3  # by chance 0.07; was not defined


def test_nothing_but_noise_stays_nothing_but_noise() -> None:
    rng = np.random.default_rng(0)
    known, losses = rng.random((40, 3)), rng.standard_normal(40)
    begun = fit_process(known[:10], losses[:10])
    assert fit_process(known, losses, begun.theta).r2 < 0.2


def test_rounds_find_the_front_of_three_bowls_with_forty_trials() -> None:
    """The true front's share that random search reaches with ten times as many."""
    searcher = make_searcher("gp_rounds", {"batch": 10}, SearchProblem(3, 3, 40, 4, seed=0))
    calls = drive(searcher, lambda one: sphere(one, 3), 40, 4, order=0)
    by_chance = np.random.default_rng(0).random((400, 3))
    others = [sphere(Candidate(0, tuple(x)), 3).losses for x in by_chance.tolist()]
    reference = (0.3,) * 3
    ours = [one.losses for one in told(calls)]
    assert hypervolume(ours, reference) > hypervolume(others, reference)


def test_it_tells_its_error_on_points_that_it_had_not_seen() -> None:
    problem = SearchProblem(2, 2, 30, 4, seed=0)
    searcher = make_searcher("gp_rounds", {"population": 12, "generations": 6}, problem)
    drive(searcher, lambda one: sphere(one, 2), 30, 4, order=0)
    facts = searcher.facts()  # type: ignore[attr-defined]
    assert "Gaussian processes of " in facts["surrogate"]
    assert facts["surrogate"].count("R2 0.9") + facts["surrogate"].count("R2 1.0") == 2
    assert facts["prediction error"].startswith("rms on ")


def test_distances_are_the_same_in_fewer_coordinates() -> None:
    generator = np.random.default_rng(0)
    points, others = generator.random((12, 60)), generator.random((5, 60))
    plane = _Plane.of(points)
    assert plane(points).shape == (12, 13)
    for a, b in ((points, points), (others, points)):
        true = np.linalg.norm(a[:, None] - b[None, :], axis=2)
        seen = np.linalg.norm(plane(a)[:, None] - plane(b)[None, :], axis=2)
        assert seen == pytest.approx(true, abs=1e-7)
