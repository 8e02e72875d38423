"""Risk and coverage against counting, ties against every order of them, the report against its parts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from bathyscope_workers.probes import metrics
from bathyscope_workers.probes.confidence import RiskCoverage, confidence_report, confidence_warnings
from bathyscope_workers.probes.resampling import Resamples


def counted(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean risk over the coverages, and over every order that the confidence allows."""
    areas = []
    for order in itertools.permutations(range(len(confidence))):
        if all(confidence[one] >= confidence[other] for one, other in itertools.pairwise(order)):
            wrong = ~correct[list(order)]
            areas.append(np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))
    return float(np.mean(areas))


@pytest.mark.parametrize("levels", [1, 2, 3, 100])
def test_areas_are_those_of_counting(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(5):
        confidence = rng.integers(levels, size=6) / levels
        correct = rng.random(6) < 0.6
        selective, ones = RiskCoverage(confidence, correct), np.ones((1, 6))
        assert selective.aurc(ones)[0] == pytest.approx(counted(confidence, correct))
        assert selective.optimal_aurc(ones)[0] == pytest.approx(counted(correct.astype(float), correct))
        excess = counted(confidence, correct) - counted(correct.astype(float), correct)
        assert selective.excess_aurc(ones)[0] == pytest.approx(excess)


def test_a_resample_is_the_rows_it_repeats() -> None:
    confidence = np.array([0.9, 0.9, 0.5, 0.4, 0.1])
    correct = np.array([True, False, True, False, True])
    weights = np.array([[2.0, 0, 1, 1, 1], [0, 0, 5, 0, 0], [1, 1, 1, 1, 1]])
    selective = RiskCoverage(confidence, correct)
    for row, area, at in zip(weights, selective.aurc(weights), selective.accuracy_at(weights, 0.6), strict=True):
        drawn = np.repeat(np.arange(5), row.astype(int))
        assert area == pytest.approx(counted(confidence[drawn], correct[drawn]))
        single = RiskCoverage(confidence[drawn], correct[drawn])
        assert at == pytest.approx(single.accuracy_at(np.ones((1, 5)), 0.6)[0])


def test_ends_of_the_scale() -> None:
    correct = np.array([True] * 6 + [False] * 4)
    ones = np.ones((1, 10))
    perfect = RiskCoverage(correct.astype(float), correct)
    assert perfect.excess_aurc(ones)[0] == pytest.approx(0)
    assert perfect.accuracy_at(ones, 0.6)[0] == 1
    assert perfect.accuracy_at(ones, 1.0)[0] == pytest.approx(0.6)
    flat = RiskCoverage(np.full(10, 0.7), correct)
    assert flat.aurc(ones)[0] == pytest.approx(0.4)
    assert set(np.round(flat.curve()["risk"], 12)) == {0.4}
    reverse = RiskCoverage(1.0 - correct, correct)
    assert reverse.aurc(ones)[0] > flat.aurc(ones)[0] > perfect.aurc(ones)[0]


def test_curves_are_bounded_and_end_at_the_error_rate() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(1000) < 0.7
    curve = RiskCoverage(rng.random(1000), correct).curve()
    assert len(curve["coverage"]) == len(curve["risk"]) == 101
    assert curve["coverage"] == sorted(curve["coverage"])
    assert (curve["coverage"][0], curve["coverage"][-1]) == (0.001, 1.0)
    assert curve["risk"][-1] == pytest.approx(1 - correct.mean())


def test_the_better_side_shows_in_the_difference() -> None:
    rng = np.random.default_rng(1)
    y = (rng.random(400) < 0.6).astype(np.int64)
    knows = np.clip(0.3 + 0.4 * y + rng.normal(0, 0.15, 400), 0.01, 0.99)
    guesses = rng.random(400)
    resamples = Resamples(400, 200, seed=0)
    report = confidence_report(y, knows, guesses, resamples)
    assert report["accuracy"]["value"] == pytest.approx(y.mean())
    assert report["difference"]["aurc"]["high"] < 0 < report["difference"]["auroc"]["low"]
    assert confidence_warnings(report) == []
    for side, values in (("probe", knows), ("model", guesses)):
        columns = np.stack([1 - values, values], axis=1)
        assert report[side]["auroc"]["value"] == metrics.figure(metrics.auroc(y, columns), 400).value
        assert report[side]["ece"]["value"] == metrics.figure(metrics.ece(y, columns), 400).value
        assert report[side]["aurc"]["low"] < report[side]["aurc"]["value"] < report[side]["aurc"]["high"]
    swapped = confidence_report(y, guesses, knows, resamples)
    assert swapped["difference"]["aurc"]["value"] == pytest.approx(-report["difference"]["aurc"]["value"])
    assert "more than the model says by itself" in confidence_warnings(swapped)[0]
    wide = confidence_report(y, knows, guesses, resamples, spread=2.0)
    assert wide["probe"]["aurc"]["high"] > report["probe"]["aurc"]["high"]
    assert wide["model"] == report["model"]
    plain = confidence_report(y, knows, guesses, None)
    assert plain["difference"]["aurc"] == {"value": report["difference"]["aurc"]["value"], "low": None, "high": None}


def test_the_models_own_auroc_is_over_all_rows() -> None:
    """Nothing of it was fitted in a fold, so its scores compare across them."""
    rng = np.random.default_rng(0)
    y, folds = rng.integers(0, 2, 200), np.arange(200) % 5
    own = np.clip(0.5 + 0.1 * (y - 0.5) + 0.1 * (folds - 2) + 0.1 * rng.normal(size=200), 0.0, 1.0)
    report = confidence_report(y, own, own, None, strata=folds)
    assert report["model"]["auroc"]["value"] == pytest.approx(roc_auc_score(y, own))
    assert report["probe"]["auroc"]["value"] != pytest.approx(roc_auc_score(y, own), abs=0.01)
    assert report["difference"]["auroc"]["value"] == 0
