from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp, softmax
from sklearn.calibration import _sigmoid_calibration
from sklearn.isotonic import IsotonicRegression

from bathyscope import _calibrators
from bathyscope.errors import InvalidRequest
from bathyscope_workers.probes import cautions, metrics
from bathyscope_workers.probes.calibration import check_calibration, fit_calibrator
from bathyscope_workers.probes.metrics import Figure
from bathyscope_workers.probes.report import Scores

METHODS = ("platt", "isotonic", "temperature")


def binary(rows: int = 4000, seed: int = 0) -> tuple[Any, Any]:
    """True log-odds, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, rows)
    return logits, (rng.random(rows) < expit(logits)).astype(np.int64)


def several(rows: int = 4000, classes: int = 4, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (rows, classes))
    drawn = (rng.random(rows)[:, None] > np.cumsum(softmax(logits, axis=1), axis=1)).sum(axis=1)
    return logits, np.minimum(drawn, classes - 1)


def ece(y: Any, P: Any) -> float:
    return float(metrics.ece(y, P)(np.ones((1, len(y))))[0])


def one_against_rest(scores: Any) -> Any:
    return np.stack(
        [scores[:, k] - logsumexp(np.delete(scores, k, axis=1), axis=1) for k in range(scores.shape[1])], axis=1
    )


@pytest.mark.parametrize("factor", [1e-9, 1e5, 1e12])
def test_temperature_follows_the_size_of_the_scores(factor: float) -> None:
    for logits, y in (binary(), several()):
        plain, scaled = (fit_calibrator("temperature", k * logits, y) for k in (1.0, factor))
        assert scaled.arrays["temperature"][0] == pytest.approx(factor * plain.arrays["temperature"][0], rel=1e-5)


def test_temperature_is_the_one_of_the_highest_likelihood() -> None:
    for logits, y in (binary(), several()):
        fitted = fit_calibrator("temperature", 3.0 * logits, y)
        pair = np.stack([-1.5 * logits, 1.5 * logits], axis=1) if logits.ndim == 1 else 3.0 * logits

        def loss(log_temperature: Any, pair: Any = pair, y: Any = y) -> float:
            return float(-log_softmax(pair / np.exp(log_temperature[0]), axis=1)[np.arange(len(y)), y].mean())

        best = float(np.exp(minimize(loss, [0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x[0]))
        assert fitted.arrays["temperature"][0] == pytest.approx(best, rel=1e-5)
        assert best == pytest.approx(3.0, rel=0.1)
        np.testing.assert_allclose(fitted.apply(3.0 * logits), softmax(pair / best, axis=1), atol=1e-5)


def test_platt_equals_scikit_learns() -> None:
    """Its private function of Platt's article gives the negatives of slope and offset."""
    logits, y = binary(600)
    scores = 5.0 * logits + 2.0
    fitted = fit_calibrator("platt", scores, y)
    a, b = _sigmoid_calibration(scores, y)
    assert fitted.arrays["slope"][0] == pytest.approx(-a, rel=1e-3)
    assert fitted.arrays["intercept"][0] == pytest.approx(-b, rel=1e-2, abs=1e-3)
    np.testing.assert_allclose(fitted.apply(scores)[:, 1], expit(-(a * scores + b)), atol=1e-3)


def test_platts_targets_keep_separated_scores_finite() -> None:
    """At the optimum of separated scores the mean probability of each side is its smoothed target."""
    fitted = fit_calibrator("platt", np.array([-1.0, -1.0, -1.0, 1.0, 1.0]), np.array([0, 0, 0, 1, 1]))
    P = fitted.apply(np.array([-1.0, 1.0]))[:, 1]
    np.testing.assert_allclose(P, [1 / 5, 3 / 4], atol=1e-6)


def test_isotonic_equals_scikit_learns() -> None:
    logits, y = binary(500)
    fitted = fit_calibrator("isotonic", logits, y)
    new = np.linspace(-8, 8, 999)
    expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(logits, y).predict(new)
    np.testing.assert_allclose(fitted.apply(new)[:, 1], expected, atol=1e-12)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_several_classes_are_one_against_the_rest_and_normalised(method: str) -> None:
    logits, y = several(600, 3)
    fitted = fit_calibrator(method, logits, y)
    columns = one_against_rest(logits)
    alone = [
        fit_calibrator(method, columns[:, k], (y == k).astype(np.int64)).apply(columns[:, k])[:, 1] for k in range(3)
    ]
    expected = np.stack(alone, axis=1)
    np.testing.assert_allclose(fitted.apply(logits), expected / expected.sum(axis=1, keepdims=True), atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [2, 4])
def test_too_sure_scores_are_repaired(method: str, classes: int) -> None:
    """Fitted on some rows and looked at on others, the calibration error falls by more than half."""
    logits, y = binary(8000) if classes == 2 else several(8000)
    fitted = fit_calibrator(method, 4.0 * logits[:4000], y[:4000])
    raw = _calibrators.probabilities(4.0 * logits[4000:])
    assert ece(y[4000:], fitted.apply(4.0 * logits[4000:])) < 0.5 * ece(y[4000:], raw)


@pytest.mark.parametrize(("method", "can"), [("platt", True), ("isotonic", True), ("temperature", False)])
def test_a_shift_is_repaired_by_those_that_have_an_offset(method: str, can: bool) -> None:
    logits, y = binary(8000)
    fitted = fit_calibrator(method, logits[:4000] + 2.0, y[:4000])
    before = ece(y[4000:], _calibrators.probabilities(logits[4000:] + 2.0))
    after = ece(y[4000:], fitted.apply(logits[4000:] + 2.0))
    assert (after < 0.5 * before) == can


@pytest.mark.parametrize(("method", "can"), [("isotonic", True), ("platt", False), ("temperature", False)])
def test_a_bend_is_repaired_by_the_one_that_bends(method: str, can: bool) -> None:
    logits, y = binary(8000)
    bent = np.where(logits < 0, 8.0 * logits, 0.3 * logits) + 1.0
    fitted = fit_calibrator(method, bent[:4000], y[:4000])
    before, after = (ece(y[4000:], P) for P in (_calibrators.probabilities(bent[4000:]), fitted.apply(bent[4000:])))
    assert (after < 0.25 * before) == can


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.integers(2, 4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-3, 1.0, 50.0, 1e4]),
)
def test_every_answer_is_a_probability_alone_as_among_others(
    method: str, classes: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = scale * rng.normal(size=(30, classes) if classes > 2 else 30)
    y = np.r_[np.arange(classes), rng.integers(0, classes, 30 - classes)]
    fitted = fit_calibrator(method, scores, y)
    new = np.concatenate([scores, 10 * scores, -scores])
    P = fitted.apply(new)
    assert np.isfinite(P).all()
    assert (P >= 0).all()
    np.testing.assert_allclose(P.sum(axis=1), 1.0, atol=1e-12)
    for row in (0, 41, 89):
        assert (fitted.apply(new[row : row + 1])[0] == P[row]).all()
    if classes == 2 and method != "platt":  # whose slope is negative where scores go against the labels
        assert (np.diff(P[np.argsort(new), 1]) >= -1e-12).all()


def test_fitting_twice_gives_the_same_bits() -> None:
    logits, y = several(300)
    for method in METHODS:
        one, again = (fit_calibrator(method, logits, y) for _ in range(2))
        assert all((one.arrays[name] == again.arrays[name]).all() for name in one.arrays)
        assert list(one.arrays) == list(_calibrators.KINDS[method])


def test_a_calibrator_of_another_number_of_classes_is_refused() -> None:
    logits, y = several(300, 3)
    with pytest.raises(ValueError, match="3 outputs"):
        fit_calibrator("platt", logits, y).apply(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="no calibrator"):
        _calibrators.probabilities(np.zeros(2), {"kind": "beta"})


@pytest.mark.parametrize(("method", "task"), [("beta", "binary"), ("platt", "regression")])
def test_refusals(method: str, task: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_calibration(method, task)
    assert caught.value.errors[0]["pointer"] == "/calibration"


def test_a_temperature_at_the_end_of_its_range_is_said() -> None:
    y = np.arange(200) % 2
    separated = fit_calibrator("temperature", np.where(y == 1, 5.0, -5.0), y)
    noise = fit_calibrator("temperature", np.random.default_rng(0).normal(size=200) + y, y)
    reversed_ = fit_calibrator("temperature", np.where(y == 1, -5.0, 5.0), y)
    assert (separated.at_bound, noise.at_bound, reversed_.at_bound) == (True, False, True)
    before = Scores({"ece": Figure(0.2)})
    said = cautions.about_calibration("temperature", before, before, 200, at_bound=True)
    assert ["end of its range" in one for one in said] == [True]
