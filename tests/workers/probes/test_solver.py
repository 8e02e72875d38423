"""The batched logistic solver reaches scikit-learn's optimum, and says when it cannot."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from bathyscope_workers.probes.estimators import LogisticEstimator, Standardizer
from bathyscope_workers.probes.estimators._batched import SCORE_TOLERANCE, SharedStates, solve_path
from bathyscope_workers.probes.estimators._exact import solve_exactly

CPU = torch.device("cpu")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def states(rows: int, hidden: int, classes: int, seed: int = 0) -> tuple[Any, Any]:
    """A spectrum that falls like hidden states' does, and a massive feature; labels that follow a noisy direction."""
    rng = np.random.default_rng(seed)
    size = np.arange(1, hidden + 1) ** -0.7
    X = (rng.normal(size=(rows, hidden)) * size) @ np.linalg.qr(rng.normal(size=(hidden, hidden)))[0]
    scores = X @ rng.normal(size=(hidden, classes)) * 3
    y = np.argmax(scores + scores.std() * rng.gumbel(size=scores.shape), axis=1)
    y[:classes] = np.arange(classes)
    X[:, 0] = 300 * X[:, 0] + 2000
    return X, y.astype(np.int64)


def folds(rows: int, count: int) -> list[Any]:
    assignment = np.random.default_rng(1).permutation(rows) % count
    return [np.flatnonzero(assignment != fold) for fold in range(count)]


def solve(X: Any, y: Any, classes: int, trainings: list[Any], strengths: Any, *, standardize: bool = True) -> Any:
    shared = SharedStates(X, standardize=standardize, device=CPU)
    standardizers = shared.standardizers(trainings)
    return standardizers, solve_path(shared, trainings, standardizers, y, classes, strengths)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("rows", "hidden", "classes"), [(150, 300, 2), (300, 80, 2), (90, 120, 4)])
def test_every_fold_and_penalty_reaches_scikit_learns_optimum(
    rows: int, hidden: int, classes: int, standardize: bool
) -> None:
    X, y = states(rows, hidden, classes)
    if not standardize:
        X[:, 0] = (X[:, 0] - 2000) / 300
    trainings = folds(rows, 3)
    fits = LogisticEstimator(C=STRENGTHS, standardize=standardize).fit_folds(X, y, classes, trainings)
    for train, path in zip(trainings, fits, strict=True):
        test = np.setdiff1d(np.arange(rows), train)
        scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(X[train])
        for C, fit in zip(STRENGTHS, path, strict=True):
            reference = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(scaler.transform(X[train]), y[train])
            assert fit.converged
            for part in (train, test):
                expected = reference.decision_function(scaler.transform(X[part]))
                assert np.abs(fit.decision_function(X[part]) - expected).max() < 1e-3
            if classes == 2:
                found = roc_auc_score(y[test], fit.decision_function(X[test]))
                assert found == pytest.approx(roc_auc_score(y[test], expected), abs=1e-4)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("rows", "hidden"), [(100, 250), (250, 60)])
def test_a_certified_result_is_within_its_tolerance(classes: int, rows: int, hidden: int) -> None:
    X, y = states(rows, hidden, classes)
    standardizers, (path,) = solve(X, y, classes, [np.arange(rows)], STRENGTHS)
    Z = standardizers[0].transform(X)
    for C, (coef, intercept, certified) in zip(STRENGTHS, path, strict=True):
        assert certified
        scores = Z @ coef.T + intercept
        # One more step from there, in float64: scikit-learn's Newton steps end at rounding.
        best = LogisticRegression(C=C, solver="newton-cg", tol=1e-12, max_iter=1000).fit(Z, y)
        expected = Z @ best.coef_.T + best.intercept_
        assert np.abs(scores - expected).max() < 10 * SCORE_TOLERANCE
        if classes > 2:
            assert abs(intercept.sum()) < 1e-9


def test_one_training_set_alone_and_among_others() -> None:
    X, y = states(120, 200, 2)
    trainings = folds(120, 4)
    _, together = solve(X, y, 2, trainings, STRENGTHS)
    _, alone = solve(X, y, 2, trainings[2:3], STRENGTHS)
    for (coef, intercept, _), (other, shift, _) in zip(together[2], alone[0], strict=True):
        np.testing.assert_allclose(coef, other, atol=1e-7)
        np.testing.assert_allclose(intercept, shift, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 3])
def test_training_sets_with_more_and_with_fewer_rows_than_features(classes: int) -> None:
    X, y = states(150, 80, classes)
    trainings = [np.arange(40), np.arange(150), np.arange(20, 100), np.arange(70, 150), np.arange(30, 111)]
    fits = LogisticEstimator(C=(0.01, 1.0)).fit_folds(X, y, classes, trainings)
    for rows, path in zip(trainings, fits, strict=True):
        scaler = StandardScaler().fit(X[rows])
        for C, fit in zip((0.01, 1.0), path, strict=True):
            reference = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(scaler.transform(X[rows]), y[rows])
            assert fit.converged
            expected = reference.decision_function(scaler.transform(X))
            assert np.abs(fit.decision_function(X) - expected).max() < 1e-3


@pytest.mark.parametrize("hidden", [200, 30])
@pytest.mark.parametrize("classes", [2, 3])
def test_side_by_side_equals_one_after_the_other(hidden: int, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device, with training sets of different sizes."""
    X, y = states(100, hidden, classes)
    trainings = [*folds(100, 3), np.arange(60), np.arange(10, 100)]
    _, expected = solve(X, y, classes, trainings, STRENGTHS)
    monkeypatch.setattr("bathyscope_workers.probes.estimators._batched.side_by_side", lambda _: True)
    standardizers, found = solve(X, y, classes, trainings, STRENGTHS)
    for rows, standardizer, one, other in zip(trainings, standardizers, found, expected, strict=True):
        Z = standardizer.transform(X[rows])
        for (coef, intercept, certified), (best, shift, _) in zip(one, other, strict=True):
            assert certified
            assert np.abs(Z @ (coef - best).T + intercept - shift).max() < 2 * SCORE_TOLERANCE


def test_penalties_in_any_order() -> None:
    X, y = states(80, 120, 2)
    rows = [np.arange(80)]
    _, (up,) = solve(X, y, 2, rows, (0.01, 1.0, 0.1))
    _, (down,) = solve(X, y, 2, rows, (1.0, 0.1, 0.01))
    for place, other in ((0, 2), (1, 0), (2, 1)):
        assert (up[place][0] == down[other][0]).all()


@pytest.mark.parametrize("standardize", [True, False])
def test_standardizers_of_training_sets_equal_their_own(standardize: bool) -> None:
    X, _ = states(60, 20, 2)
    trainings = folds(60, 3)
    X[:, 5] = 7.7
    X[trainings[0], 6] = 0.1  # constant in one training set, and not in the others
    X[trainings[0], 7] = 1e6 + 1e-4 * X[trainings[0], 7]  # nearly
    found = SharedStates(X, standardize=standardize, device=CPU).standardizers(trainings)
    for rows, standardizer in zip(trainings, found, strict=True):
        own = Standardizer.fit(X[rows], scale=standardize)
        np.testing.assert_allclose(standardizer.mean, own.mean, rtol=1e-9)
        np.testing.assert_allclose(standardizer.scale, own.scale, rtol=1e-7)
    if standardize:
        assert found[0].scale[6] == 1


@pytest.mark.parametrize("C", [1e4, 1e8])
@pytest.mark.parametrize(("rows", "hidden"), [(60, 100), (200, 30)])
def test_a_huge_C_reaches_the_optimum_or_says_that_it_does_not(C: float, rows: int, hidden: int) -> None:
    X, y = states(rows, hidden, 2)
    fit = LogisticEstimator(C=(C,)).fit_path(X, y, 2)[0]
    scores = fit.decision_function(X)
    assert np.isfinite(scores).all()
    Z = StandardScaler().fit_transform(X)
    reference = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000).fit(Z, y)
    expected = reference.decision_function(Z)
    if fit.converged:
        assert np.abs(scores - expected).max() < 1e-3 * max(1.0, np.abs(expected).max())


def test_what_float32_cannot_hold_is_not_certified_and_solved_exactly() -> None:
    X, y = states(60, 100, 2)
    X *= 1e25  # its squares overflow float32
    _, (path,) = solve(X, y, 2, [np.arange(60)], (1e-52,), standardize=False)
    assert not path[0][2]
    fit = LogisticEstimator(C=(1e-52,), standardize=False).fit_path(X, y, 2)[0]
    expected = LogisticEstimator(C=(0.01,), standardize=False).fit_path(X / 1e25, y, 2)[0]
    np.testing.assert_allclose(fit.decision_function(X), expected.decision_function(X / 1e25), atol=1e-4)


@pytest.mark.parametrize(("rows", "hidden"), [(60, 100), (150, 40)])
@pytest.mark.parametrize("classes", [2, 3])
def test_the_slow_solver_equals_scikit_learn(rows: int, hidden: int, classes: int) -> None:
    X, y = states(rows, hidden, classes)
    Z = StandardScaler().fit_transform(X)
    for C in (1e-3, 1.0):
        coef, intercept, converged = solve_exactly(Z, y, classes, C)
        reference = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(Z, y)
        assert converged
        scores = Z @ coef.T + intercept
        np.testing.assert_allclose(scores[:, 0] if classes == 2 else scores, reference.decision_function(Z), atol=1e-4)


def test_repeated_rows_with_other_labels() -> None:
    X, y = states(40, 100, 2)
    X, y = np.concatenate([X, X]), np.concatenate([y, 1 - y])
    fit = LogisticEstimator(C=(1.0,)).fit_path(X, y, 2)[0]
    assert fit.converged
    np.testing.assert_allclose(fit.decision_function(X), 0, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("classes", [2, 3])
def test_cuda_equals_the_cpu(classes: int) -> None:
    X, y = states(120, 200, classes)
    trainings = folds(120, 3)
    shared = SharedStates(X, standardize=True, device=torch.device("cuda"))
    found = solve_path(shared, trainings, shared.standardizers(trainings), y, classes, STRENGTHS)
    _, expected = solve(X, y, classes, trainings, STRENGTHS)
    for one, other in zip(found, expected, strict=True):
        for (coef, _, certified), (best, _, _) in zip(one, other, strict=True):
            assert certified
            np.testing.assert_allclose(coef, best, atol=1e-5)


def test_scikit_learns_own_end_is_judged_by_the_gradient() -> None:
    """Rows that a plane separates have their optimum far out, and L-BFGS ends where it hardly moves any more."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    Z = rng.normal(size=(60, 8)) + 6 * np.eye(3)[y] @ rng.normal(size=(3, 8))
    for C, sure in ((1.0, True), (1e8, False)):
        coef, intercept, converged = solve_exactly(Z, y, 3, C)
        scores = Z @ coef.T + intercept
        p = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        gradient = C * (p - np.eye(3)[y]).T @ Z + coef
        reach = np.linalg.norm(Z, axis=1).max() * np.linalg.norm(gradient)
        assert converged == sure
        assert (reach <= 10 * SCORE_TOLERANCE) == sure
