"""Ridge, LDA and mass-mean probes against scikit-learn and closed formulas, and the registry of all estimators."""

from typing import Any

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from bathyscope.errors import InvalidRequest
from bathyscope_workers.probes.estimators import DEFAULT_C, Estimator, TokenStates, fit_folds, make_estimator
from bathyscope_workers.probes.estimators._covariance import ledoit_wolf as ours

LINEAR: list[dict[str, Any]] = [
    {"name": "logistic"},
    {"name": "ridge"},
    {"name": "mass_mean"},
    {"name": "mass_mean", "covariance": "shrunk"},
    {"name": "lda"},
]
POOLED = [*LINEAR, {"name": "mlp"}]


def problem(rows: int, hidden: int, classes: int, seed: int = 0) -> tuple[Any, Any]:
    """Correlated features of different sizes and means."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 6)) @ rng.normal(size=(6, hidden)) + rng.normal(size=(rows, hidden))
    X = X * np.exp(rng.normal(size=hidden)) + 5 * rng.normal(size=hidden)
    y = np.arange(rows) % classes
    X[:, :classes] += 2 * np.eye(classes)[y]
    return X, y.astype(np.int64)


@pytest.mark.parametrize("arguments", LINEAR)
@pytest.mark.parametrize("standardize", [True, False])
def test_a_planted_direction_is_found(arguments: dict[str, Any], standardize: bool) -> None:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=48)
    direction /= np.linalg.norm(direction)
    y = np.arange(3000) % 2
    X = rng.normal(size=(3000, 48)) + np.outer(2.0 * y, direction)
    for fit in make_estimator(**arguments, standardize=standardize).fit_path(X, y, 2):
        coef = fit.tensors()["weights"][0]
        assert coef @ direction / np.linalg.norm(coef) > 0.95


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_ridge_finds_a_planted_direction_of_values(task: str) -> None:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=30)
    X = rng.normal(size=(500, 30))
    values = X @ direction + 7 + 0.1 * rng.normal(size=500)
    y, classes = (values, 0) if task == "regression" else ((values > 7).astype(np.int64), 2)
    fit = make_estimator("ridge", C=[0.1]).fit_path(X, y, classes)[0]
    coef = fit.tensors()["weights"][0]
    assert coef @ direction / np.linalg.norm(coef) / np.linalg.norm(direction) > 0.95
    if task == "regression":
        assert np.corrcoef(fit.decision_function(X), values)[0, 1] > 0.99


@pytest.mark.parametrize(("rows", "hidden"), [(60, 150), (300, 40)])
@pytest.mark.parametrize("standardize", [True, False])
def test_ridge_equals_scikit_learn(rows: int, hidden: int, standardize: bool) -> None:
    strengths = (1e-4, 1e-2, 1.0)
    for classes in (0, 2, 4):
        X, codes = problem(rows, hidden, classes or 2)
        y: Any = codes if classes else X[:, 3] * 2 + np.sin(np.arange(rows))
        Z = StandardScaler().fit_transform(X) if standardize else X
        fits = make_estimator("ridge", C=strengths, standardize=standardize).fit_path(X, y, classes)
        for C, fit in zip(strengths, fits, strict=True):
            reference = (RidgeClassifier if classes else Ridge)(alpha=1 / C).fit(Z, y)
            expected = reference.decision_function(Z) if classes else reference.predict(Z)
            found = fit.decision_function(X)
            np.testing.assert_allclose(found, 2 * expected if classes == 2 else expected, rtol=1e-6, atol=1e-6)


def test_the_probabilities_of_ridge_agree_with_the_linear_ones_in_the_middle() -> None:
    X, y = problem(200, 30, 2)
    fit = make_estimator("ridge", C=[1e-4]).fit_path(X, y, 2)[0]
    f = fit.decision_function(X) / 2
    near = np.abs(f) < 0.1
    assert near.any()
    np.testing.assert_allclose(fit.predict_proba(X)[near, 1], (1 + f[near]) / 2, atol=1e-3)


@pytest.mark.parametrize("C", [1e-8, 1e8])
def test_ridge_with_any_penalty_is_finite(C: float) -> None:
    X, y = problem(40, 80, 2)
    X = np.concatenate([X, X])  # a singular Gram matrix
    fit = make_estimator("ridge", C=[C]).fit_path(X, np.concatenate([y, y]), 2)[0]
    assert np.isfinite(fit.decision_function(X)).all()
    if C > 1:  # all rows fitted
        np.testing.assert_allclose(fit.decision_function(X[:40]), 2 * (2.0 * y - 1), atol=1e-2)


@pytest.mark.parametrize(("rows", "hidden"), [(60, 150), (300, 40), (30, 1)])
def test_the_shrinkage_is_scikit_learns(rows: int, hidden: int) -> None:
    X, _ = problem(rows, hidden, 1)
    X = X - X.mean(axis=0)
    weight, multiple = ours(X)
    expected, expected_weight = ledoit_wolf(X)
    assert weight == pytest.approx(expected_weight, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose((1 - weight) * X.T @ X / rows + weight * multiple * np.eye(hidden), expected, rtol=1e-8)


def around(scores: Any) -> Any:
    """Scores of classes around their mean: what all classes share changes no probability."""
    return scores if scores.ndim == 1 else scores - scores.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("rows", "hidden"), [(60, 150), (300, 40)])
@pytest.mark.parametrize("solver", ["lsqr", "eigen"])
def test_lda_equals_scikit_learn(classes: int, rows: int, hidden: int, solver: str) -> None:
    X, y = problem(rows, hidden, classes)
    X[:, -1] = 4.5
    y[: rows // 6] = 0
    fit = make_estimator("lda", standardize=False).fit_path(X, y, classes)[0]
    reference = LinearDiscriminantAnalysis(solver=solver, shrinkage="auto").fit(X, y)
    np.testing.assert_allclose(around(fit.decision_function(X)), around(reference.decision_function(X)), atol=1e-6)
    np.testing.assert_allclose(fit.predict_proba(X), reference.predict_proba(X), atol=1e-7)
    standardized = make_estimator("lda").fit_path(X, y, classes)[0]
    Z = StandardScaler().fit_transform(X)
    expected = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(Z, y).decision_function(Z)
    np.testing.assert_allclose(around(standardized.decision_function(X)), around(expected), atol=1e-6)


def test_mass_mean_is_the_difference_of_means() -> None:
    X, y = problem(100, 40, 2)
    fit = make_estimator("mass_mean", standardize=False).fit_path(X, y, 2)[0]
    theta = X[y == 1].mean(0) - X[y == 0].mean(0)
    coef = fit.tensors()["weights"][0]
    assert coef @ theta / np.linalg.norm(coef) / np.linalg.norm(theta) == pytest.approx(1)
    # Log-odds of two Gaussians of one variance along theta.
    t = X @ theta
    low, high = t[y == 0].mean(), t[y == 1].mean()
    variance = np.mean(np.square(t - np.where(y == 1, high, low)))
    expected = (np.square(t - low) - np.square(t - high)) / (2 * variance)
    np.testing.assert_allclose(fit.decision_function(X), expected, rtol=1e-9, atol=1e-9)


def test_the_corrected_mass_mean_is_the_inverse_covariance_times_the_difference() -> None:
    """After the formula of Marks & Tegmark 2023, the covariance shrunk by scikit-learn."""
    X, y = problem(60, 150, 2)
    y[:7] = 0
    fit = make_estimator("mass_mean", covariance="shrunk", standardize=False).fit_path(X, y, 2)[0]
    means = np.stack([X[y == code].mean(0) for code in (0, 1)])
    sigma, _ = ledoit_wolf(X - means[y], assume_centered=True)
    coef = np.linalg.solve(sigma, means[1] - means[0])
    offset = np.log(np.mean(y) / (1 - np.mean(y))) - coef @ (means[0] + means[1]) / 2
    np.testing.assert_allclose(fit.decision_function(X), X @ coef + offset, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("covariance", ["none", "shrunk"])
def test_mass_mean_of_several_classes_prefers_the_nearest_mean(covariance: str) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    X = rng.normal(size=(300, 20)) + 3 * np.eye(20)[y]
    fit = make_estimator("mass_mean", covariance=covariance, standardize=False).fit_path(X, y, 3)[0]
    means = np.stack([X[y == code].mean(0) for code in range(3)])
    nearest = np.argmin(np.square(X[:, None] - means).sum(axis=2), axis=1)
    assert fit.decision_function(X).shape == (300, 3)
    assert np.mean(np.argmax(fit.predict_proba(X), axis=1) == nearest) > (0.99 if covariance == "none" else 0.9)


def numbers(estimator: Estimator, X: Any, y: Any, classes: int) -> list[Any]:
    fits = estimator.fit_path(X, y, classes)
    assert len(fits) == len(estimator.penalties)
    return [array for fit in fits for array in fit.tensors().values()]


DEGENERATE: dict[str, Any] = {
    "a constant feature": lambda X: np.concatenate([X, np.full((len(X), 1), 3.3)], axis=1),
    "constant features": lambda X: np.full_like(X, 0.1),
    "repeated rows": lambda X: np.repeat(X[:2], len(X) // 2, axis=0),
    "one feature": lambda X: X[:, :1],
    "repeated features": lambda X: np.concatenate([X, X], axis=1),
    "huge": lambda X: X * 1e30,
    "tiny": lambda X: X * 1e-30,
    "huge beside tiny": lambda X: X * np.logspace(-20, 20, X.shape[1]),
    "float16": lambda X: X.astype(np.float16),
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("arguments", POOLED, ids=lambda arguments: "-".join(arguments.values()))
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("rows", [24, 120])
def test_degenerate_states_give_finite_probes(arguments: dict[str, Any], kind: str, rows: int) -> None:
    X, codes = problem(rows, 50, 3)
    X = DEGENERATE[kind](X)
    for classes in (2, 3):
        y = codes % classes
        for fit in make_estimator(**arguments).fit_path(X, y, classes):
            chances = fit.predict_proba(X)
            assert chances.shape == (rows, classes)
            assert np.isfinite(chances).all()
            np.testing.assert_allclose(chances.sum(axis=1), 1)
            if kind == "constant features":
                rates = np.bincount(y) / rows
                tolerance = 0.2 if arguments["name"] == "mlp" else 0.05 if arguments["name"] == "ridge" else 1e-5
                if not (arguments["name"] == "ridge" and classes == 3):  # the softmax of its scores is no rate
                    np.testing.assert_allclose(chances, np.tile(rates, (rows, 1)), atol=tolerance)


@pytest.mark.parametrize("arguments", POOLED, ids=lambda arguments: "-".join(arguments.values()))
def test_the_same_states_give_the_same_bits(arguments: dict[str, Any]) -> None:
    for classes in (2, 3):
        X, y = problem(90, 120, classes)
        first = numbers(make_estimator(**arguments, seed=4), X, y, classes)
        again = numbers(make_estimator(**arguments, seed=4), X.copy(), y.copy(), classes)
        assert all((one == other).all() for one, other in zip(first, again, strict=True))
        assert all(array.dtype == np.float64 for array in first)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("arguments", POOLED, ids=lambda arguments: "-".join(arguments.values()))
def test_folds_together_equal_folds_apart(arguments: dict[str, Any]) -> None:
    X, y = problem(90, 120, 2)
    estimator = make_estimator(**arguments)
    trainings = [np.flatnonzero(np.arange(90) % 5 != fold) for fold in range(4)] + [np.arange(20, 77)]
    together = fit_folds(estimator, X, y, 2, trainings)
    for rows, path in zip(trainings, together, strict=True):
        for fit, apart in zip(path, estimator.fit_path(X[rows], y[rows], 2), strict=True):
            np.testing.assert_allclose(fit.decision_function(X), apart.decision_function(X), atol=1e-4)


@pytest.mark.parametrize("arguments", POOLED, ids=lambda arguments: "-".join(arguments.values()))
def test_a_missing_class_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every class"):
        make_estimator(**arguments).fit_path(np.zeros((4, 2)), np.zeros(4, dtype=np.int64), 2)


def test_the_registry() -> None:
    assert make_estimator("logistic").penalties == DEFAULT_C
    assert make_estimator("logistic", C=[1, 0.1, 1]).penalties == (0.1, 1.0)
    assert make_estimator("ridge", C=[1.0, 2.0]).with_penalty(2.0).penalties == (2.0,)
    assert np.isnan(make_estimator("lda").penalties[0])
    for name in ("attention", "max_mean"):
        assert make_estimator(name).reads == "tokens"
    for name in ("ridge", "mlp", "attention"):
        assert make_estimator(name, task="regression").name == name


@pytest.mark.parametrize(
    ("arguments", "pointer", "remedy"),
    [
        ({"name": "forest"}, "/estimator", "logistic"),
        ({"name": "logistic", "C": [0.0]}, "/C", "positive"),
        ({"name": "mlp", "C": []}, "/C", "positive"),
        ({"name": "lda", "C": [1.0]}, "/C", "leave C out"),
        ({"name": "mass_mean", "C": [1.0]}, "/C", "leave C out"),
        ({"name": "mass_mean", "covariance": "full"}, "/covariance", "shrunk"),
        ({"name": "lda", "covariance": "shrunk"}, "/covariance", "mass_mean"),
        ({"name": "logistic", "task": "regression"}, "/estimator", "ridge"),
        ({"name": "lda", "task": "regression"}, "/estimator", "ridge"),
        ({"name": "mass_mean", "task": "regression"}, "/estimator", "ridge"),
        ({"name": "max_mean", "task": "regression"}, "/estimator", "attention"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_remedy(arguments: Any, pointer: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest, match=remedy) as caught:
        make_estimator(**arguments)
    assert caught.value.errors[0]["pointer"] == pointer


def test_token_states_pick_rows_without_copying() -> None:
    states = np.arange(14.0).reshape(7, 2)
    X = TokenStates(states, np.array([0, 1, 4, 7]))
    assert len(X) == 3
    assert X.lengths.tolist() == [1, 3, 3]
    picked = X[np.array([2, 0])]
    assert np.shares_memory(picked.states, states)
    assert (picked.row(0) == states[4:7]).all()
    assert picked.positions().tolist() == [4, 5, 6, 0]
    masked = picked[np.array([False, True])]
    assert (masked.row(0) == states[:1]).all()
    assert len(masked) == 1
    states[5, 1] = np.nan
    assert X.finite_rows().tolist() == [True, True, False]


@pytest.mark.parametrize("offsets", [[0, 1, 1, 7], [0, 3], [1, 7], [0, 4, 2, 7]])
def test_token_states_need_offsets_that_fit(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        TokenStates(np.zeros((7, 2)), np.array(offsets))
