"""Brier decomposition, thresholds and the figures of a regression, each against an independent reference."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from bathyscope_workers.probes import metrics, regression
from bathyscope_workers.probes.decomposition import TERMS, brier_decomposition
from bathyscope_workers.probes.resampling import Resamples
from bathyscope_workers.probes.thresholds import decision_thresholds
from tests.workers.probes.test_metrics import data


def murphy(p: Any, y: Any) -> dict[str, float]:
    """Murphy's three terms and what is left within the bins, written out bin by bin."""
    terms = dict.fromkeys(TERMS, 0.0)
    terms["uncertainty"] = y.mean() * (1 - y.mean())
    edges = np.linspace(0, 1, 16)
    for index in range(15):
        low = -1 if index == 0 else edges[index]
        inside = (p > low) & (p <= edges[index + 1])
        if inside.any():
            share, f, o = inside.mean(), p[inside].mean(), y[inside].mean()
            terms["reliability"] += share * (f - o) ** 2
            terms["resolution"] += share * (o - y.mean()) ** 2
            terms["within_bin_variance"] += share * p[inside].var()
            terms["within_bin_covariance"] += 2 * share * np.mean((p[inside] - f) * (y[inside] - o))
    return terms


def total(terms: dict[str, float]) -> float:
    return (
        terms["reliability"]
        - terms["resolution"]
        + terms["uncertainty"]
        + terms["within_bin_variance"]
        - terms["within_bin_covariance"]
    )


@pytest.mark.parametrize(("classes", "decimals"), [(2, None), (2, 1), (4, None)])
def test_the_brier_score_comes_apart_as_its_formulas_say(classes: int, decimals: int | None) -> None:
    y, P = data(classes, rows=317, decimals=decimals)
    ours = {name: figure.value or 0.0 for name, figure in brier_decomposition(y, P).items()}
    columns = [1] if classes == 2 else range(classes)
    parts = [murphy(P[:, code], (y == code).astype(float)) for code in columns]
    for term in TERMS:
        assert ours[term] == pytest.approx(sum(part[term] for part in parts), abs=1e-12), term
    assert total(ours) == pytest.approx(metrics.score(y, P)["brier"].value, abs=1e-12)
    if decimals:  # a bin holds one or two values: little is left within
        assert ours["within_bin_variance"] < 0.001


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32 - 1), st.integers(5, 60))
def test_the_terms_sum_to_the_score_in_every_resample(classes: int, seed: int, rows: int) -> None:
    y, P = data(classes, rows=rows, seed=seed)
    weights = next(Resamples(rows, 4, seed=seed % 1000).chunks())
    brier = metrics.brier(y, P)(weights)
    for number, row in enumerate(weights):
        drawn = np.repeat(np.arange(rows), row.astype(int))
        terms = {name: figure.value or 0.0 for name, figure in brier_decomposition(y[drawn], P[drawn]).items()}
        assert total(terms) == pytest.approx(brier[number], abs=1e-12)


def test_the_terms_have_intervals() -> None:
    y, P = data(2)
    terms = brier_decomposition(y, P, resamples=Resamples(200, 300))
    for figure in terms.values():
        assert figure.low <= figure.value <= figure.high  # type: ignore[operator]
        assert figure.low < figure.high  # type: ignore[operator]


@pytest.mark.parametrize("target", [0.0001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("decimals", [None, 2, 1])
def test_thresholds_equal_the_roc_curve(target: float, decimals: int | None) -> None:
    y, P = data(2, decimals=decimals)
    p = P[:, 1]
    fpr, tpr, _ = reference.roc_curve(y, p, drop_intermediate=False)
    found = decision_thresholds(y, p, target, metrics.Figure(0.5))
    at = found["target_fpr"]
    best = tpr[fpr <= target].max()
    if at["threshold"] is None:
        assert best == 0
    else:
        assert (p >= at["threshold"])[y == 1].mean() == pytest.approx(best)
        assert (p >= at["threshold"])[y == 0].mean() == pytest.approx(at["fpr"])
        assert at["fpr"] <= target
    assert found["youden"]["value"] == pytest.approx((tpr - fpr).max())
    best_f1 = max(reference.f1_score(y, p >= threshold) for threshold in np.unique(p))
    assert found["f1"]["value"] == pytest.approx(best_f1)
    for name in ("youden", "f1"):
        called = p >= found[name]["threshold"]
        assert found[name]["recall"] == pytest.approx(reference.recall_score(y, called))
        assert found[name]["precision"] == pytest.approx(reference.precision_score(y, called))
        assert found[name]["fpr"] == pytest.approx(called[y == 0].mean())


def test_thresholds_need_both_classes() -> None:
    assert decision_thresholds(np.ones(3, int), np.full(3, 0.5), 0.1, metrics.Figure(None)) == {"default": 0.5}


def values(rows: int = 150, seed: int = 0, decimals: int | None = None) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = rng.normal(5, 2, rows)
    predicted = 0.6 * y + rng.normal(2, 1, rows)
    return (y, predicted) if decimals is None else (y.round(decimals), predicted.round(decimals))


@pytest.mark.parametrize("decimals", [None, 0])
def test_values_equal_scikit_learns_and_scipys(decimals: int | None) -> None:
    y, predicted = values(decimals=decimals)
    ours = {name: figure.value for name, figure in regression.score_values(y, predicted).items()}
    assert ours["r2"] == pytest.approx(reference.r2_score(y, predicted), abs=1e-12)
    assert ours["mae"] == pytest.approx(reference.mean_absolute_error(y, predicted), abs=1e-12)
    assert ours["spearman"] == pytest.approx(stats.spearmanr(y, predicted).statistic, abs=1e-12)


def test_resampled_values_are_those_of_the_rows_drawn() -> None:
    y, predicted = values(60, decimals=0)
    for weights in next(Resamples(60, 6).chunks()):
        drawn = np.repeat(np.arange(60), weights.astype(int))
        a, b = y[drawn], predicted[drawn]
        row = weights[None]
        assert regression.r2(y, predicted)(row)[0] == pytest.approx(reference.r2_score(a, b), abs=1e-10)
        assert regression.mae(y, predicted)(row)[0] == pytest.approx(reference.mean_absolute_error(a, b), abs=1e-12)
        assert regression.spearman(y, predicted)(row)[0] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_ranks_are_compared_within_folds() -> None:
    y, predicted = values(90)
    folds = np.arange(90) % 3
    each = [stats.spearmanr(y[folds == fold], predicted[folds == fold]).statistic for fold in range(3)]
    found = regression.score_values(y, predicted, strata=folds)["spearman"].value
    assert found == pytest.approx(np.mean(each), abs=1e-12)
    # The mean of the others: below 0 over all rows, nothing within folds.
    means = np.array([y[folds != fold].mean() for fold in range(3)])[folds]
    assert stats.spearmanr(y, means).statistic < 0
    assert regression.score_values(y, means, strata=folds)["spearman"].value == 0


def test_intervals_of_values_may_lie_below_zero() -> None:
    rng = np.random.default_rng(0)
    y, predicted = rng.normal(size=100), rng.normal(size=100)
    figures = regression.score_values(y, predicted, resamples=Resamples(100, 300))
    assert figures["r2"].high < 0  # type: ignore[operator]
    assert figures["spearman"].low < 0 < figures["spearman"].high  # type: ignore[operator]
    assert figures["mae"].low > 0.5  # type: ignore[operator]
