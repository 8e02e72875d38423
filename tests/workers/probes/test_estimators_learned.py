"""Probes that are trained by steps: the perceptron, the attention-pooled and the max-of-means probe."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier

from bathyscope_workers.probes.estimators import LogisticEstimator, TokenStates, make_estimator
from bathyscope_workers.probes.estimators.max_mean import WINDOW

TOKEN = ("attention", "max_mean")


def ragged(rows: int, hidden: int, seed: int = 0, longest: int = 30) -> TokenStates:
    """Noise; every fifth row has one token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest, rows)
    lengths[::5] = 1
    return TokenStates(rng.normal(size=(lengths.sum(), hidden)).astype(np.float32), np.append(0, np.cumsum(lengths)))


def planted(rows: int, hidden: int, classes: int, seed: int = 0) -> tuple[TokenStates, Any]:
    """Of each row two neighbouring tokens say the class, along the first axes; another axis marks them."""
    X = ragged(rows, hidden, seed)
    rng = np.random.default_rng(seed + 1)
    y = np.arange(rows) % classes
    for start, length, label in zip(X.starts, X.lengths, y, strict=True):
        at = start + rng.integers(0, max(1, length - 1))
        X.states[at : min(at + 2, start + length), label] += 6
        X.states[at : min(at + 2, start + length), classes] += 6
    return X, y.astype(np.int64)


def test_the_perceptron_learns_what_no_line_separates() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(800, 10))
    y = ((X[:, 0] > 0) ^ (X[:, 1] > 0)).astype(np.int64)
    train, test = np.arange(600), np.arange(600, 800)
    line = LogisticEstimator().fit_path(X[train], y[train], 2)[0].predict_proba(X[test])
    curve = make_estimator("mlp").fit_path(X[train], y[train], 2)[0].predict_proba(X[test])
    assert np.mean(np.argmax(line, axis=1) == y[test]) < 0.65
    assert np.mean(np.argmax(curve, axis=1) == y[test]) > 0.85


@pytest.mark.parametrize(("rows", "hidden"), [(100, 50), (300, 576)])
def test_a_perceptron_of_few_rows_learns_what_a_line_learns(rows: int, hidden: int) -> None:
    lines, curves = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, rows + 400)
        X = rng.normal(size=(len(y), hidden))
        X[:, :6] += 0.8 * (2 * y - 1)[:, None]
        for name, found in (("logistic", lines), ("mlp", curves)):
            fit = make_estimator(name, seed=seed).fit_path(X[:rows], y[:rows], 2)[0]
            assert fit.converged
            found.append(roc_auc_score(y[rows:], fit.decision_function(X[rows:])))
    assert np.mean(lines) > 0.85
    assert np.mean(curves) > np.mean(lines) - 0.05


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("rows", [200, 2100])
def test_the_formula_of_the_perceptron_is_scikit_learns(rows: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(rows, 12)) * 5 + 3
    y = np.argmax(X[:, :classes], axis=1)
    fit = make_estimator("mlp", C=[0.05], seed=3).fit_path(X, y, classes)[0]
    Z = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    training: dict[str, Any] = (
        {"solver": "lbfgs", "tol": 1e-3} if rows < 2000 else {"solver": "adam", "n_iter_no_change": 25, "tol": 1e-4}
    )
    reference = MLPClassifier(
        (64,), alpha=20.0, max_iter=500, early_stopping=rows > 2000, random_state=3, **training
    ).fit(Z, y)
    assert fit.converged
    np.testing.assert_allclose(fit.predict_proba(X), reference.predict_proba(Z), atol=1e-4)


def test_the_perceptron_depends_on_the_seed_and_on_nothing_else() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(100, 8))
    y = (X[:, 0] > 0).astype(np.int64)
    one, same, other = (
        make_estimator("mlp", seed=seed).fit_path(X, y, 2)[0].tensors()["hidden_weights"] for seed in (1, 1, 2)
    )
    assert (one == same).all()
    assert not (one == other).all()


def test_the_perceptron_predicts_values() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(800, 8))
    y = 1000 + 50 * np.abs(X[:, 0])
    fit = make_estimator("mlp").fit_path(X[:600], y[:600], 0)[0]
    assert np.corrcoef(fit.decision_function(X[600:]), y[600:])[0, 1] > 0.9
    assert np.abs(np.mean(fit.decision_function(X[600:]) - y[600:])) < 10


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("rows", [4, 30])
def test_a_perceptron_of_few_rows(rows: int) -> None:
    X = np.random.default_rng(0).normal(size=(rows, 6))
    y = np.arange(rows) % 2
    fit = make_estimator("mlp").fit_path(X, y, 2)[0]
    assert fit.converged
    assert np.isfinite(fit.predict_proba(X)).all()


def by_formula(name: str, tensors: dict[str, Any], S: Any) -> Any:
    """The docstrings' formulas, for one row."""
    scores = S @ tensors["weights"].T + tensors["intercept"]
    if name == "attention":
        return softmax(S @ tensors["query"]) @ scores
    width = min(int(tensors["window"][0]), len(S))
    return np.max([scores[i : i + width].mean(axis=0) for i in range(len(S) - width + 1)], axis=0)


@pytest.mark.parametrize("name", TOKEN)
@pytest.mark.parametrize("classes", [2, 3])
def test_token_probes_find_the_tokens_that_tell(name: str, classes: int) -> None:
    X, y = planted(300, 16, classes)
    unseen, expected = planted(150, 16, classes, seed=9)
    fit = make_estimator(name, C=[1.0]).fit_path(X, y, classes)[0]
    assert fit.converged
    chances = fit.predict_proba(unseen)
    assert chances.shape == (150, classes)
    assert np.mean(np.argmax(chances, axis=1) == expected) > 0.9
    scores = np.stack([by_formula(name, fit.tensors(), unseen.row(number)) for number in range(len(unseen))])
    np.testing.assert_allclose(
        fit.decision_function(unseen), scores[:, 0] if classes == 2 else scores, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", TOKEN)
def test_token_probes_find_a_planted_direction(name: str) -> None:
    rng = np.random.default_rng(0)
    direction = rng.normal(size=24)
    direction /= np.linalg.norm(direction)
    X = ragged(800, 24, longest=8)
    y = np.arange(800) % 2
    X.states[:] += np.repeat(3.0 * y, X.lengths)[:, None] * direction
    weights = make_estimator(name, C=[0.01], standardize=False).fit_path(X, y, 2)[0].tensors()["weights"][0]
    assert weights @ direction / np.linalg.norm(weights) > 0.95


def test_attention_predicts_values() -> None:
    X = ragged(400, 12)
    y = np.array([100 + 20 * X.row(number)[:, 2].mean() for number in range(400)])
    train, test = np.arange(300), np.arange(300, 400)
    fit = make_estimator("attention", C=[10.0]).fit_path(X[train], y[train], 0)[0]
    assert np.corrcoef(fit.decision_function(X[test]), y[test])[0, 1] > 0.95


@pytest.mark.parametrize("name", TOKEN)
@pytest.mark.parametrize("classes", [2, 3])
def test_rows_of_one_token_are_read_as_a_linear_probe_reads_them(name: str, classes: int) -> None:
    """Attention and windows have no choice there, so the optimum is logistic regression's."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(120, 10)) * 3 + 1
    y = np.arange(120) % classes
    states[:, 0] += 2 * y
    X = TokenStates(states, np.arange(121))
    fit = make_estimator(name, C=[0.1]).fit_path(X, y, classes)[0]
    expected = LogisticEstimator(C=(0.1,)).fit_path(states, y, classes)[0]
    np.testing.assert_allclose(fit.predict_proba(X), expected.predict_proba(states), atol=5e-3)


@pytest.mark.parametrize("name", TOKEN)
def test_the_optimum_is_no_worse_than_a_plain_minimiser_finds(name: str) -> None:
    """The same objective, written plainly in numpy and minimised by finite differences."""
    X, y = planted(60, 3, 2)
    C = 0.5
    tokens = X.states.astype(np.float64)
    Z = TokenStates((tokens - tokens.mean(0)) / tokens.std(0), X.offsets)

    def objective(values: Any) -> float:
        tensors = {"query": values[:3], "weights": values[None, 3:6], "intercept": values[6:], "window": [WINDOW]}
        f = np.array([by_formula(name, tensors, Z.row(number))[0] for number in range(60)])
        penalty = values[3:6] @ values[3:6] + (values[:3] @ values[:3] if name == "attention" else 0)
        return float(C * np.sum(np.logaddexp(0, f) - y * f) + penalty / 2)

    fit = make_estimator(name, C=[C]).fit_path(X, y, 2)[0]
    own = fit.tensors()
    weights = own["weights"][0] * own["scale"]
    query = own["query"] * own["scale"] if name == "attention" else np.zeros(3)
    intercept = own["intercept"] + own["weights"] @ own["mean"]
    found = objective(np.concatenate([query, weights, intercept]))
    best = minimize(objective, np.zeros(7), method="L-BFGS-B").fun
    assert found <= best * (1 + 1e-3)


@pytest.mark.parametrize("name", TOKEN)
def test_token_probes_give_the_same_bits_and_ignore_the_order_of_what_is_not_theirs(name: str) -> None:
    X, y = planted(60, 8, 2)
    rows = np.arange(5, 45)
    first = make_estimator(name).fit_path(X[rows], y[rows], 2)[0].tensors()
    again = make_estimator(name).fit_path(X[rows], y[rows], 2)[0].tensors()
    X.states[X.offsets[45] :] = 1e6
    unseen = make_estimator(name).fit_path(X[rows], y[rows], 2)[0].tensors()
    for key, array in first.items():
        assert (array == again[key]).all()
        assert (array == unseen[key]).all()


@pytest.mark.parametrize("name", TOKEN)
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20])
def test_token_probes_of_degenerate_states_are_finite(name: str, scale: float) -> None:
    X, y = planted(40, 6, 3)
    X = TokenStates(X.states.astype(np.float64) * scale, X.offsets)
    for classes in (2, 3):
        fit = make_estimator(name, C=[1e4]).fit_path(X, y % classes, classes)[0]
        chances = fit.predict_proba(X)
        assert np.isfinite(chances).all()
        if not scale:
            rates = np.bincount(y % classes) / 40
            np.testing.assert_allclose(chances, np.tile(rates, (40, 1)), atol=1e-2)


@pytest.mark.parametrize("name", TOKEN)
def test_a_path_of_penalties(name: str) -> None:
    X, y = planted(60, 8, 2)
    fits = make_estimator(name, C=[1e-3, 1e-1]).fit_path(X, y, 2)
    assert np.linalg.norm(fits[0].tensors()["weights"]) < np.linalg.norm(fits[1].tensors()["weights"])
    with pytest.raises(ValueError, match="TokenStates"):
        make_estimator(name).fit_path(np.zeros((4, 2)), np.array([0, 1, 0, 1]), 2)


def test_probabilities_are_the_logistic_function_and_the_softmax() -> None:
    X, y = planted(40, 6, 3)
    three = make_estimator("attention").fit_path(X, y, 3)[0]
    scores = three.decision_function(X)
    expected = np.exp(scores - logsumexp(scores, axis=1, keepdims=True))
    np.testing.assert_allclose(three.predict_proba(X), expected)
    two = make_estimator("max_mean").fit_path(X, y % 2, 2)[0]
    np.testing.assert_allclose(two.predict_proba(X)[:, 1], expit(two.decision_function(X)))
