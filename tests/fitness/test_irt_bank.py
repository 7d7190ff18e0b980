"""Item banks: fits, files, imports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import InputError
from evomerge.fitness.irt.ability import fit_map, sigmoid
from evomerge.fitness.irt.bank import ItemBank, import_tiny_benchmarks, load_bank
from evomerge.fitness.irt.bank_fit import (
    HeldOut,
    Responses,
    binarised,
    fewest_good,
    fit_bank,
    held_out,
    read_csv,
)
from evomerge.fitness.irt.synthetic import level_a


def responses(seed: int = 0, items: int = 200, models: int = 100, dimensions: int = 1) -> Responses:
    made = level_a(seed, items=items, models=models, dimensions=dimensions)
    return Responses(tuple(f"model-{m}" for m in range(models)), made.ids, made.bank)


def small_bank() -> ItemBank:
    rng = np.random.default_rng(0)
    ids = tuple(f"q{i}" for i in range(6))
    return ItemBank("m2pl", ids, rng.normal(size=(6, 2)), rng.normal(size=6), 0.02, 0.2)


def test_fit_finds_the_parameters_that_made_the_answers() -> None:
    rng = np.random.default_rng(1)
    slopes, intercepts = rng.uniform(0.5, 2.0, 150), rng.normal(0, 1, 150)
    theta = rng.normal(size=(400, 1))
    y = (rng.random((400, 150)) < sigmoid(theta * slopes - intercepts)).astype(float)
    names = tuple(map(str, range(400)))
    bank = fit_bank(Responses(names, tuple(map(str, range(150))), y), "2pl")
    assert np.corrcoef(bank.slopes[:, 0], slopes)[0, 1] > 0.9
    assert np.corrcoef(bank.intercepts, intercepts)[0, 1] > 0.98
    assert abs(bank.slopes[:, 0].mean() - slopes.mean()) < 0.1
    assert abs(bank.intercepts.mean() - intercepts.mean()) < 0.15


def test_1pl_has_one_slope() -> None:
    rng = np.random.default_rng(2)
    intercepts, theta = rng.normal(size=100), rng.normal(size=(300, 1))
    y = (rng.random((300, 100)) < sigmoid(1.3 * theta - intercepts)).astype(float)
    names = tuple(map(str, range(300)))
    bank = fit_bank(Responses(names, tuple(map(str, range(100))), y), "1pl")
    assert np.ptp(bank.slopes) == 0.0
    assert abs(bank.slopes[0, 0] - 1.3) < 0.12
    assert np.corrcoef(bank.intercepts, intercepts)[0, 1] > 0.98


def test_dimensions_are_chosen_on_models_that_were_held_out() -> None:
    several = fit_bank(responses(3, items=600, models=160, dimensions=3))
    assert several.dimensions in {3, 5}
    assert fit_bank(responses(3, items=300, models=160)).dimensions == 1
    assert 0.0 < several.error < 0.05
    assert several.variance == pytest.approx(responses(3, 600, 160, 3).scores.var(axis=1).mean())


def test_held_out_models_are_predicted_better_than_by_the_items_alone() -> None:
    data = responses(4, items=400, models=150)
    held = np.arange(150) % 5 == 0
    difficulty = data.scores[~held].mean(axis=0)[1::2]
    alone = np.abs(difficulty.mean() - data.scores[held][:, 1::2].mean(axis=1)).mean()
    assert held_out(data, [1])[1].error < 0.5 * alone


def test_fewest_dimensions_within_the_tolerance() -> None:
    tried = {1: HeldOut(0.01, 0.5), 2: HeldOut(0.01, 0.4005), 5: HeldOut(0.01, 0.4)}
    assert fewest_good(tried) == 2


def test_a_missing_answer_is_not_a_wrong_one() -> None:
    data = responses(5)
    holes = np.random.default_rng(0).random(data.scores.shape) < 0.3
    bank = fit_bank(replace(data, scores=np.where(holes, np.nan, data.scores)), "2pl")
    whole = fit_bank(data, "2pl")
    assert np.corrcoef(bank.intercepts, whole.intercepts)[0, 1] > 0.95
    assert abs(bank.intercepts.mean() - whole.intercepts.mean()) < 0.1


def test_abilities_of_the_fit_are_standard() -> None:
    data = responses(6, items=400, models=150, dimensions=2)
    bank = fit_bank(data, dimensions=2)
    fit = fit_map(bank.slopes, -bank.intercepts, data.scores, np.zeros(2), np.eye(2))
    assert np.allclose(fit.parameters.mean(axis=0), 0.0, atol=0.15)
    assert np.allclose(np.cov(fit.parameters.T), np.eye(2), atol=0.2)


def test_threshold_keeps_the_means() -> None:
    rng = np.random.default_rng(0)
    graded = Responses(("a", "b", "c"), tuple(map(str, range(500))), rng.random((3, 500)) ** 2)
    cut = binarised(graded)
    assert set(np.unique(cut.scores)) == {0.0, 1.0}
    assert np.allclose(cut.scores.mean(axis=1), graded.scores.mean(axis=1), atol=0.04)
    assert np.array_equal(binarised(graded, 0.5).scores, graded.scores >= 0.5)


@pytest.mark.parametrize(
    ("kind", "dimensions", "words"),
    [
        ("3pl", None, "kind: expected one of 1pl, 2pl, m2pl, got '3pl'"),
        ("1pl", 2, "1pl has one dimension, got 2"),
        ("m2pl", 100, "more than dimensions, got 100"),
    ],
)
def test_what_cannot_be_fitted_is_refused(kind: str, dimensions: int | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        fit_bank(responses(), kind, dimensions)


def test_matrix_must_make_sense() -> None:
    for scores, words in (
        (np.zeros((2, 2)), "expected \\[M, I\\] = \\[1, 2\\]"),
        (np.array([[0.0, 1.5]]), "outside \\[0, 1\\]"),
        (np.array([[0.0, np.nan]]), "no score at all"),
    ):
        with pytest.raises(InputError, match=words):
            Responses(("a",), ("x", "y"), scores)


def test_bank_survives_its_file(tmp_path: Path) -> None:
    bank = small_bank()
    bank.save(tmp_path / "bank.npz")
    read = load_bank(tmp_path / "bank.npz")
    assert read.digest == bank.digest
    assert (read.kind, read.ids, read.error, read.variance) == ("m2pl", bank.ids, 0.02, 0.2)
    assert np.array_equal(read.slopes, bank.slopes)


def test_a_bank_keeps_the_scores_that_it_was_fitted_to(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).integers(0, 2, (8, 6)).astype(float)
    scores[0], scores[1] = 0.0, 1.0
    bank = fit_bank(Responses(tuple("abcdefgh"), tuple("ABCDEF"), scores), "2pl")
    path = tmp_path / "bank.npz"
    bank.save(path)
    loaded = load_bank(path)
    assert loaded.responses is not None
    assert np.array_equal(loaded.responses, scores)
    picked = loaded.select(("D", "A"))
    assert picked.responses is not None
    assert np.array_equal(picked.responses, scores[:, [3, 0]])
    # One without them, as banks were before, has the digest that it had.
    bare = replace(bank, responses=None)
    bare.save(path)
    assert load_bank(path).responses is None
    assert load_bank(path).digest == bare.digest != bank.digest


def test_an_incomplete_matrix_is_not_kept() -> None:
    scores = np.random.default_rng(0).integers(0, 2, (8, 6)).astype(float)
    scores[2, 3] = np.nan
    assert fit_bank(Responses(tuple("abcdefgh"), tuple("ABCDEF"), scores), "2pl").responses is None


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    small_bank().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["intercepts"] = arrays["intercepts"] + 1e-9
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="it is damaged or was edited"):
        load_bank(path)


def test_a_pickle_inside_the_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "bank.npz"
    np.savez(path, header=np.array([{}], dtype=object), ids=np.array("[]"), slopes=0, intercepts=0)
    with pytest.raises(InputError, match="not an npz file of plain arrays"):
        load_bank(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not an npz file"):
        load_bank(path)
    with pytest.raises(InputError, match="not an npz file"):
        load_bank(tmp_path / "none.npz")


def test_items_are_found_by_id_never_by_place() -> None:
    bank = small_bank()
    part = bank.select(("q4", "q1"))
    assert np.array_equal(part.slopes, bank.slopes[[4, 1]])
    with pytest.raises(InputError, match="no item 'q9' and 0 others"):
        bank.select(("q1", "q9"))


def test_csv_matrix(tmp_path: Path) -> None:
    path = tmp_path / "matrix.csv"
    path.write_text("model,q1,q2\nfirst,1,0\nsecond,,0.5\n")
    data = read_csv(path)
    assert (data.models, data.ids) == (("first", "second"), ("q1", "q2"))
    assert np.array_equal(data.scores, np.array([[1, 0], [np.nan, 0.5]]), equal_nan=True)
    for text, words in (
        ("model,q1\na,yes\n", "row 2, item 'q1': expected a number, got 'yes'"),
        ("model,q1\na,1,2\n", "row 2: expected 2 cells, got 3"),
        ("model,q1\na,2\n", "outside"),
        ("", "expected a CSV file with a header"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_csv(path)


@pytest.mark.parametrize("columns", [1, 3])
def test_tiny_benchmarks_curve_is_kept(tmp_path: Path, columns: int) -> None:
    """Their item_curve subtracts the difficulty once per dimension."""
    rng = np.random.default_rng(0)
    slopes, difficulty = rng.normal(size=(1, 3, 5)), rng.normal(size=(1, columns, 5))
    theta = rng.normal(size=(1, 3, 1))
    theirs = 1 / (1 + np.exp(-np.clip(slopes * theta - difficulty, -30, 30).sum(axis=1)))[0]
    np.savez(tmp_path / "tiny.npz", A=slopes, B=difficulty)
    parameters = {"disc": slopes[0].T.tolist(), "diff": difficulty[0].T.tolist()}
    (tmp_path / "best_parameters.json").write_text(json.dumps(parameters))
    for name in ("tiny.npz", "best_parameters.json"):
        bank = import_tiny_benchmarks(tmp_path / name, ("a", "b", "c", "d", "e"))
        ours = sigmoid(bank.slopes @ theta[0, :, 0] - bank.intercepts)
        assert np.allclose(ours, theirs)


def test_tiny_benchmarks_pickle_and_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a pickle can run any code"):
        import_tiny_benchmarks(tmp_path / "tinyBenchmarks.pkl", ("a",))
    np.savez(tmp_path / "tiny.npz", A=np.zeros((1, 2, 3)), B=np.zeros((1, 1, 3)))
    with pytest.raises(InputError, match="expected parameters of 2 items"):
        import_tiny_benchmarks(tmp_path / "tiny.npz", ("a", "b"))
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(InputError, match="'disc' and 'diff'"):
        import_tiny_benchmarks(tmp_path / "p.json", ("a", "b"))
