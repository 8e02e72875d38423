from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from bathyscope_workers.probes.estimators import LogisticEstimator, Standardizer


def problem(rows: int, hidden: int, classes: int, seed: int = 0) -> tuple[Any, Any]:
    """Correlated features of very different sizes, a few massive, as hidden states are."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 12)) @ rng.normal(size=(12, hidden)) + 0.3 * rng.normal(size=(rows, hidden))
    X *= np.exp(rng.normal(size=hidden))
    X[:, 0] = X[:, 0] * 300 + 2000
    y = rng.integers(0, classes, rows)
    y[:classes] = np.arange(classes)
    X[:, 1 : 1 + classes] += np.eye(classes)[y]
    return X, y.astype(np.int64)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(
    ("rows", "hidden", "classes", "strengths"),
    [
        (120, 300, 2, (1e-4, 1e-2, 1.0, 100.0)),  # more features than rows
        (300, 60, 2, (1e-3, 1.0)),  # more rows than features
        (90, 200, 4, (1e-3, 1e-1)),
        (200, 40, 3, (1e-2,)),
    ],
)
def test_equals_scikit_learn(
    rows: int, hidden: int, classes: int, strengths: tuple[float, ...], standardize: bool
) -> None:
    X, y = problem(rows, hidden, classes)
    if not standardize:
        X = (X - X.mean(0)) / np.abs(X).max(0)
    fits = LogisticEstimator(C=strengths, standardize=standardize).fit_path(X, y, classes)
    Z = StandardScaler().fit_transform(X) if standardize else X
    for strength, fit in zip(strengths, fits, strict=True):
        solver = "newton-cholesky" if classes == 2 else "lbfgs"
        reference = LogisticRegression(C=strength, tol=1e-8, max_iter=20_000, solver=solver).fit(Z, y)
        expected = reference.decision_function(Z)
        assert fit.converged
        assert np.abs(fit.decision_function(X) - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(fit.predict_proba(X), reference.predict_proba(Z), atol=1e-6)


@pytest.mark.parametrize("strength", [1e-6, 1e-2, 1.0, 1e4])
def test_the_gradient_vanishes(strength: float) -> None:
    """At the optimum w = C Zᵀ(y - p), and the residuals sum to 0."""
    X, y = problem(80, 200, 2, seed=3)
    fit = LogisticEstimator(C=(strength,)).fit_path(X, y, 2)[0]
    residual = y - fit.predict_proba(X)[:, 1]
    Z = (X - X.mean(0)) / X.std(0)
    expected = strength * Z.T @ residual
    np.testing.assert_allclose(fit.coef[0] * fit.scale, expected, atol=1e-3 * np.abs(expected).max())
    assert abs(residual.sum()) < 1e-5 * len(y)


def test_a_path_equals_single_fits() -> None:
    X, y = problem(80, 200, 2)
    path = LogisticEstimator(C=(1e-3, 1e-1, 10.0)).fit_path(X, y, 2)
    for fit, strength in zip(path, (1e-3, 1e-1, 10.0), strict=True):
        alone = LogisticEstimator(C=(strength,)).fit_path(X, y, 2)[0]
        np.testing.assert_allclose(fit.decision_function(X), alone.decision_function(X), atol=1e-4)


def test_float32_and_float16_are_fitted_in_float64() -> None:
    X, y = problem(60, 100, 2)
    narrow = (X / np.abs(X).max(0)).astype(np.float16)
    expected = LogisticEstimator().fit_path(narrow.astype(np.float64), y, 2)[0]
    for dtype in (np.float16, np.float32):
        fit = LogisticEstimator().fit_path(narrow.astype(dtype), y, 2)[0]
        assert fit.coef.dtype == np.float64
        assert (fit.coef == expected.coef).all()


def test_constant_features_weigh_nothing() -> None:
    X, y = problem(60, 100, 2)
    X[:, 5] = 1234.567
    X[:, 6] = np.float32(0.1)
    fit = LogisticEstimator(C=(1.0,)).fit_path(X, y, 2)[0]
    assert np.isfinite(fit.coef).all()
    assert (np.abs(fit.coef[0, 5:7]) < 1e-12).all()
    assert (fit.scale[5:7] == 1).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_states_without_information_give_the_base_rate(classes: int) -> None:
    y = np.arange(90) % classes
    y[:10] = 0
    X = np.full((90, 200), 3.25)
    fit = LogisticEstimator().fit_path(X, y, classes)[0]
    rates = np.bincount(y) / len(y)
    np.testing.assert_allclose(fit.predict_proba(X), np.tile(rates, (90, 1)), atol=1e-5)


def test_standardizer_equals_scikit_learns() -> None:
    X, _ = problem(50, 30, 2)
    X[:, 3] = 7.7
    ours, theirs = Standardizer.fit(X), StandardScaler().fit(X)
    np.testing.assert_allclose(ours.mean, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.scale, theirs.scale_, rtol=1e-9)


def test_a_planted_direction_is_found() -> None:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=64)
    direction /= np.linalg.norm(direction)
    y = np.arange(2000) % 2
    X = rng.normal(size=(2000, 64)) + np.outer(2.0 * y, direction)
    coef = LogisticEstimator(C=(0.01,)).fit_path(X, y, 2)[0].coef[0]
    assert coef @ direction / np.linalg.norm(coef) > 0.95


def test_every_class_must_be_there() -> None:
    with pytest.raises(ValueError, match="every class"):
        LogisticEstimator().fit_path(np.zeros((4, 2)), np.zeros(4, dtype=np.int64), 2)
