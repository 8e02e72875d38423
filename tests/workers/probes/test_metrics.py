from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from bathyscope_workers.probes import metrics
from bathyscope_workers.probes.resampling import Resamples


def data(classes: int, rows: int = 200, seed: int = 0, decimals: int | None = None) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, rows)
    scores = rng.normal(size=(rows, classes)) + np.eye(classes)[y]
    P = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    if decimals is not None:  # ties
        first = P[:, 1].round(decimals)
        P = np.stack([1 - first, first], axis=1)
    return y, P


def values(y: Any, P: Any, **options: Any) -> dict[str, float]:
    return {name: figure.value or 0.0 for name, figure in metrics.score(y, P, **options).items()}


def expected(y: Any, P: Any, weights: Any = None) -> dict[str, float]:
    """Scikit-learn's figures."""
    binary = P.shape[1] == 2
    onehot = np.eye(P.shape[1])[y]
    picked = P.argmax(1)
    return {
        "auroc": reference.roc_auc_score(onehot, P, average="macro", sample_weight=weights)
        if not binary
        else reference.roc_auc_score(y, P[:, 1], sample_weight=weights),
        "average_precision": reference.average_precision_score(onehot, P, sample_weight=weights)
        if not binary
        else reference.average_precision_score(y, P[:, 1], sample_weight=weights),
        "accuracy": reference.accuracy_score(y, picked, sample_weight=weights),
        "balanced_accuracy": reference.balanced_accuracy_score(y, picked, sample_weight=weights),
        "brier": reference.brier_score_loss(y, P[:, 1], sample_weight=weights)
        if binary
        else float(np.average(np.square(P - onehot).sum(1), weights=weights)),
        "nll": reference.log_loss(y, P, sample_weight=weights),
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("classes", "decimals"), [(2, None), (2, 1), (3, None), (5, None)])
def test_figures_equal_scikit_learns(classes: int, decimals: int | None, seed: int) -> None:
    y, P = data(classes, seed=seed, decimals=decimals)
    ours = values(y, P)
    for name, value in expected(y, P).items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(("classes", "decimals"), [(2, None), (2, 1), (4, None)])
def test_resampled_figures_equal_scikit_learns_with_weights(classes: int, decimals: int | None) -> None:
    y, P = data(classes, rows=80, decimals=decimals)
    weights = next(Resamples(80, 5).chunks())
    statistics = {
        "auroc": metrics.auroc(y, P),
        "average_precision": metrics.average_precision(y, P),
        "accuracy": metrics.accuracy(y, P),
        "balanced_accuracy": metrics.balanced_accuracy(y, P),
        "brier": metrics.brier(y, P),
        "nll": metrics.nll(y, P),
    }
    for row in weights:
        for name, value in expected(y, P, row).items():
            assert statistics[name](row[None])[0] == pytest.approx(value, abs=1e-12), name


def plain_ece(confidence: Any, outcome: Any, edges: Any) -> float:
    """Guo et al. (2017), equation 5, written out; bins are open below and closed above."""
    total = 0.0
    for index in range(len(edges) - 1):
        low = -np.inf if index == 0 else edges[index]
        high = np.inf if index == len(edges) - 2 else edges[index + 1]
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(outcome[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize(("classes", "decimals"), [(2, None), (2, 1), (4, None)])
def test_ece_equals_its_formula(classes: int, decimals: int | None) -> None:
    y, P = data(classes, rows=317, decimals=decimals)
    confidence = P[:, 1] if classes == 2 else P.max(1)
    outcome = (y == 1) if classes == 2 else (P.argmax(1) == y)
    ours = values(y, P)
    assert ours["ece"] == pytest.approx(plain_ece(confidence, outcome, np.linspace(0, 1, 16)), abs=1e-12)
    edges = np.quantile(confidence, np.linspace(0, 1, 16))
    assert ours["ece_equal_mass"] == pytest.approx(plain_ece(confidence, outcome, edges), abs=1e-12)


@pytest.mark.parametrize(("strategy", "equal_mass"), [("uniform", False), ("quantile", True)])
def test_reliability_bins_equal_scikit_learns(strategy: str, equal_mass: bool) -> None:
    y, P = data(2, rows=500)
    bins = metrics.reliability(y, P, equal_mass=equal_mass)
    assert len(bins) == 15
    assert sum(row["count"] for row in bins) == 500
    observed, predicted = calibration_curve(y, P[:, 1], n_bins=15, strategy=strategy)
    filled = [row for row in bins if row["count"]]
    np.testing.assert_allclose([row["accuracy"] for row in filled], observed)
    np.testing.assert_allclose([row["confidence"] for row in filled], predicted)
    error = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in filled) / 500
    name = "ece_equal_mass" if equal_mass else "ece"
    assert values(y, P)[name] == pytest.approx(error, abs=1e-12)
    empty = metrics.reliability(np.array([0, 1]), np.array([[0.5, 0.5], [0.5, 0.5]]))
    assert {row["count"] for row in empty} == {0, 2}
    assert all(row["accuracy"] is None for row in empty if not row["count"])


@pytest.mark.parametrize("target", [0.0001, 0.01, 0.1, 0.5])
def test_recall_at_a_false_positive_rate_equals_the_roc_curve(target: float) -> None:
    y, P = data(2, decimals=2)
    fpr, tpr, _ = reference.roc_curve(y, P[:, 1], drop_intermediate=False)
    best = tpr[fpr <= target].max()
    assert values(y, P, target_fpr=target)["recall_at_fpr"] == pytest.approx(best)


def test_strata_compare_rows_of_one_fold_only() -> None:
    y, P = data(2, rows=150, decimals=1)
    folds = np.arange(150) % 4
    pairs = concordant = 0.0
    precision = 0.0
    for fold in range(4):
        own = folds == fold
        n = (y[own] == 1).sum() * (y[own] == 0).sum()
        pairs += n
        concordant += n * reference.roc_auc_score(y[own], P[own, 1])
        precision += (y[own] == 1).sum() * reference.average_precision_score(y[own], P[own, 1])
    ours = values(y, P, strata=folds)
    assert ours["auroc"] == pytest.approx(concordant / pairs, abs=1e-12)
    assert ours["average_precision"] == pytest.approx(precision / (y == 1).sum(), abs=1e-12)


def test_base_rates_that_differ_by_fold_do_not_count_as_information() -> None:
    """A fold richer in positives is predicted by a training side poorer in them: pooled, that ranks below chance."""
    y = np.array([1] * 30 + [0] * 10 + [1] * 10 + [0] * 30)
    folds = np.repeat([0, 1], 40)
    positive = np.where(folds == 0, 10 / 40, 30 / 40)
    P = np.stack([1 - positive, positive], axis=1)
    assert values(y, P)["auroc"] == pytest.approx(0.25)
    assert values(y, P, strata=folds)["auroc"] == 0.5


predictions = st.integers(8, 40).flatmap(
    lambda rows: st.tuples(
        st.lists(st.integers(0, 1), min_size=rows, max_size=rows).filter(lambda y: 0 < sum(y) < len(y)),
        st.lists(st.integers(0, 20), min_size=rows, max_size=rows),
    )
)


@settings(max_examples=80, deadline=None)
@given(predictions, st.randoms(use_true_random=False))
def test_properties(drawn: tuple[list[int], list[int]], random: Any) -> None:
    y = np.array(drawn[0])
    positive = np.array(drawn[1]) / 20
    P = np.stack([1 - positive, positive], axis=1)
    own = metrics.score(y, P, resamples=Resamples(len(y), 20), target_fpr=0.1)
    for name, figure in own.items():
        assert figure.value is not None
        assert figure.value >= 0
        if name not in ("nll",):
            assert figure.value <= 1
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.high
    for name in ("ece", "ece_equal_mass"):
        assert own[name].low <= own[name].value <= own[name].high  # type: ignore[operator]
    # Swapping the classes mirrors the ranking and keeps what is symmetric.
    swapped = values(1 - y, P[:, ::-1])
    assert swapped["auroc"] == pytest.approx(own["auroc"].value)
    assert swapped["brier"] == pytest.approx(own["brier"].value)
    assert swapped["nll"] == pytest.approx(own["nll"].value)
    assert values(1 - y, P)["auroc"] == pytest.approx(1 - (own["auroc"].value or 0))
    # The order of rows does not matter.
    order = list(range(len(y)))
    random.shuffle(order)
    for name, value in values(y[order], P[order], target_fpr=0.1).items():
        assert value == pytest.approx(own[name].value, abs=1e-12)
    # Ranking metrics look at order only.
    bent = np.stack([1 - positive**3, positive**3], axis=1)
    assert values(y, bent)["auroc"] == own["auroc"].value


def test_undefined_figures_are_none() -> None:
    y = np.zeros(5, dtype=np.int64)
    P = np.full((5, 2), 0.5)
    figures = metrics.score(y, P, resamples=Resamples(5, 10))
    assert figures["auroc"] == metrics.Figure(None)
    assert figures["auroc"].to_dict() == {"value": None, "low": None, "high": None}
    assert figures["brier"].value == 0.25


def test_certain_and_wrong_is_finite() -> None:
    P = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert values(np.array([1, 0]), P)["nll"] == pytest.approx(reference.log_loss([1, 0], P))


def test_intervals_are_percentiles_and_spread_widens_them() -> None:
    y, P = data(2)
    resamples = Resamples(200, 400, seed=5)
    statistic = metrics.accuracy(y, P)
    draws = np.concatenate([statistic(weights) for weights in resamples.chunks()])
    plain = metrics.figure(statistic, 200, resamples)
    assert (plain.low, plain.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))
    wide = metrics.figure(statistic, 200, resamples, spread=1.5)
    assert (wide.high or 0) - (plain.value or 0) == pytest.approx(1.5 * ((plain.high or 0) - (plain.value or 0)))
    everything = metrics.figure(statistic, 200, resamples, spread=100)
    assert (everything.low, everything.high) == (0, 1)
    assert metrics.cross_validation_spread(1) == 1
    assert metrics.cross_validation_spread(5) == pytest.approx(np.sqrt(1.8))


def test_the_interval_of_a_calibration_error_is_about_its_value() -> None:
    """Perfectly calibrated, so resamples only add error: the plain percentiles would lie above the value."""
    rng = np.random.default_rng(0)
    positive = rng.random(300)
    y = (rng.random(300) < positive).astype(np.int64)
    P = np.stack([1 - positive, positive], axis=1)
    resamples = Resamples(300, 500)
    plain = metrics.figure(metrics.ece(y, P), 300, resamples)
    moved = metrics.score(y, P, resamples=resamples)["ece"]
    assert plain.low is not None
    assert moved.low is not None
    assert moved.low < plain.low
    assert moved.low <= moved.value <= moved.high  # type: ignore[operator]


def test_resamples() -> None:
    first, second = Resamples(50, 300, seed=1), Resamples(50, 300, seed=1)
    weights = np.concatenate(list(first.chunks()))
    assert weights.shape == (300, 50)
    assert (weights.sum(axis=1) == 50).all()
    assert (weights == np.concatenate(list(second.chunks()))).all()
    assert (weights == np.concatenate(list(first.chunks()))).all()
    assert not (weights == np.concatenate(list(Resamples(50, 300, seed=2).chunks()))).all()
    # A row is drawn Binomial(50, 1/50) times.
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(0.98, abs=0.05)


def test_clusters_are_drawn_whole() -> None:
    clusters = np.array([4, 4, 7, 7, 7, 9])
    resamples = Resamples(6, 50, clusters=clusters)
    assert resamples.clusters == 3
    for weights in resamples.chunks():
        assert (weights[:, 0] == weights[:, 1]).all()
        assert (weights[:, 2] == weights[:, 4]).all()
        assert (weights[:, [0, 2, 5]].sum(axis=1) == 3).all()


def test_too_many_to_keep_are_drawn_again_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = np.concatenate(list(Resamples(50, 300).chunks()))
    monkeypatch.setattr("bathyscope_workers.probes.resampling._KEPT_ELEMENTS", 10)
    again = Resamples(50, 300)
    assert (np.concatenate(list(again.chunks())) == kept).all()
    assert (np.concatenate(list(again.chunks())) == kept).all()


def test_intervals_of_dependent_rows_are_wider_by_cluster() -> None:
    y, P = data(2, rows=60)
    y, P = np.repeat(y, 5), np.repeat(P, 5, axis=0)
    by_row = metrics.score(y, P, resamples=Resamples(300, 500))["auroc"]
    by_cluster = metrics.score(y, P, resamples=Resamples(300, 500, clusters=np.repeat(np.arange(60), 5)))["auroc"]

    def width(figure: metrics.Figure) -> float:
        assert figure.low is not None
        assert figure.high is not None
        return figure.high - figure.low

    assert width(by_cluster) > 1.8 * width(by_row)
