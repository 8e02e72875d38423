"""Comparisons against plain loops of scikit-learn and numpy, and against differences that are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bathyscope._targets import encode_labels
from bathyscope.errors import InvalidRequest, JobCancelled
from bathyscope.types import ComparisonReport
from bathyscope_workers.comparisons import compare
from bathyscope_workers.comparisons.paired import differences, draws_of
from bathyscope_workers.comparisons.shift import layer_shift
from bathyscope_workers.probes import SweepConfig, sweep
from bathyscope_workers.probes import baselines as rivals
from bathyscope_workers.probes.config import SweepConfig as Config
from bathyscope_workers.probes.estimators import make_estimator
from bathyscope_workers.probes.planning import folds_for, plan_for

QUICK = SweepConfig(bootstrap=100)
NAMES = ["base", "tuned", "other"]


def planted(rows: int = 160, layers: int = 3, hidden: int = 24, seed: int = 0) -> tuple[list[Any], Any]:
    """States of three variants: the second shows the label more, the third by other features; and labels."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(rows) % 2)
    noise = rng.normal(size=(rows, layers, hidden))
    one, other = np.eye(hidden)[0], np.eye(hidden)[1]
    strength = np.linspace(0.2, 1.0, layers)[:, None]
    shown = (2 * y - 1)[:, None, None]
    base = noise + 0.7 * shown * strength * one
    tuned = noise + 1.6 * shown * strength * one
    turned = noise + 1.2 * shown * strength * other
    return [states.astype(np.float32) for states in (base, tuned, turned)], y


@pytest.fixture(scope="module")
def study() -> tuple[list[Any], Any, dict[str, Any]]:
    states, y = planted()
    return states, y, compare(states, NAMES, [4, 8, 12], y.tolist(), config=QUICK)


def model() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.01, tol=1e-8, max_iter=10_000))


def by_fold(y: Any, predicted: Any, folds: Any) -> float:
    return float(np.mean([roc_auc_score(y[test], predicted[test]) for _, test in folds]))


def test_each_variant_has_the_figures_of_a_sweep_by_itself(study: Any) -> None:
    states, y, report = study
    for place, variant in enumerate(report["variants"]):
        alone = sweep(states[place], [4, 8, 12], y.tolist(), config=SweepConfig(bootstrap=100, selectivity=False))
        assert variant["layers"] == alone.report.layers
        assert (
            variant["held_out"]["auroc"] == alone.report.held_out["auroc"].to_dict()
            if hasattr(alone.report.held_out["auroc"], "to_dict")
            else variant["held_out"]["auroc"] == alone.report.held_out["auroc"]
        )
        assert variant["best_layer"] == alone.report.best_layer
        assert variant["chosen_layers"] == [choice["layer"] for choice in alone.report.held_out["choices"]]
        assert report["folds"]["sha256"] == alone.report.folds["sha256"]


def test_differences_and_transfer_equal_a_plain_scikit_learn_loop(study: Any) -> None:
    states, y, report = study
    folds = sweep(states[0], [4, 8, 12], y.tolist(), config=QUICK).folds
    for index in range(3):
        predicted = np.empty((3, 3, len(y)))
        for train, test in folds:
            for trained in range(3):
                fitted = model().fit(states[trained][train, index].astype(np.float64), y[train])
                for place in range(3):
                    X = states[place][test, index].astype(np.float64)
                    predicted[trained, place, test] = fitted.predict_proba(X)[:, 1]
        values = report["transfer"]["layers"][index]["values"]
        expected = [[by_fold(y, predicted[i, j], folds) for j in range(3)] for i in range(3)]
        np.testing.assert_allclose(values, expected, atol=2e-3)
        for place in (1, 2):
            found = report["differences"][place - 1]["layers"][index]
            assert found["auroc"]["value"] == pytest.approx(expected[place][place] - expected[0][0], abs=2e-3)
            losses = [log_loss(y, predicted[one, one]) for one in (place, 0)]
            assert found["nll"]["value"] == pytest.approx(losses[0] - losses[1], abs=1e-4)
    # The tuned variant shows the label more along the same features; the third along others.
    last = report["transfer"]["layers"][2]["values"]
    assert last[0][1] > last[0][0] > last[0][2]
    better = report["differences"][0]["layers"][2]["auroc"]
    assert better["low"] > 0


def test_the_transfer_of_the_procedure_has_the_held_out_figures_on_its_diagonal(study: Any) -> None:
    _, _, report = study
    for place, variant in enumerate(report["variants"]):
        assert report["transfer"]["values"][place][place]["value"] == variant["held_out"]["auroc"]["value"]
        for cell in report["transfer"]["values"][place]:
            assert cell["low"] <= cell["value"] <= cell["high"]
    values = np.array([[cell["value"] for cell in row] for row in report["transfer"]["values"]])
    assert np.abs(values - values.T).max() > 1e-6  # rows are what was trained on, so the matrix is not symmetric


def test_directions_are_those_of_weights_on_raw_states(study: Any) -> None:
    states, y, report = study
    folds = sweep(states[0], [4, 8, 12], y.tolist(), config=QUICK).folds
    for index in range(3):
        means = []
        for place in range(3):
            units = []
            for train, _ in folds:
                fitted = model().fit(states[place][train, index].astype(np.float64), y[train])
                raw = fitted[-1].coef_[0] / fitted[0].scale_
                units.append(raw / np.linalg.norm(raw))
            means.append(np.mean(units, axis=0))
        means = [one / np.linalg.norm(one) for one in means]
        np.testing.assert_allclose(
            report["directions"][index]["values"], [[a @ b for b in means] for a in means], atol=1e-3
        )
    last = report["directions"][2]["values"]
    assert last[0][0] == pytest.approx(1.0)
    assert last[0][1] > 0.8 > last[0][2]


def test_the_shift_is_that_of_the_states(study: Any) -> None:
    states, _, report = study
    for place, found in enumerate(report["shift"]):
        assert (found["name"], found["reference"]) == (NAMES[place + 1], "base")
        for index, layer in enumerate(found["layers"]):
            a, b = (states[one][:, index].astype(np.float64) for one in (0, place + 1))
            relative = np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1)
            cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            for name, values in (("relative_norm", relative), ("cosine", cosine)):
                spread = layer[name]
                assert spread["mean"] == pytest.approx(values.mean())
                assert [spread["q25"], spread["median"], spread["q75"]] == pytest.approx(
                    np.quantile(values, [0.25, 0.5, 0.75])
                )


def test_equal_states_have_moved_nowhere_and_are_told_of() -> None:
    states, y = planted()
    report = compare([states[0], states[0]], ["base", "ad_noop"], [4, 8, 12], y.tolist(), config=QUICK)
    for layer in report["shift"][0]["layers"]:
        assert layer["relative_norm"] == {"mean": 0.0, "q25": 0.0, "median": 0.0, "q75": 0.0}
        assert layer["cosine"]["mean"] == 1.0
    for found in report["differences"][0]["layers"]:
        assert found["auroc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert found["ece"]["value"] == 0.0
    assert any("equal those of base" in said for said in report["warnings"])


def test_a_zero_state_has_no_cosine() -> None:
    found = layer_shift(np.zeros((3, 4)), np.ones((3, 4)))
    assert found["relative_norm"]["mean"] is None
    assert found["cosine"]["mean"] is None


def test_rows_of_a_group_stay_together_for_every_variant_and_are_drawn_together() -> None:
    states, y = planted()
    groups = (np.arange(len(y)) // 4).tolist()
    report = compare(states, NAMES, [4, 8, 12], y.tolist(), groups=groups, config=QUICK)
    assert report["folds"]["kind"] == "grouped"
    assert report["folds"]["clusters"] == 40


@pytest.mark.parametrize("calibration", ["temperature", "isotonic"])
def test_calibration_is_each_variants_own(calibration: str) -> None:
    states, y = planted()
    report = compare(states, NAMES, [4, 8, 12], y.tolist(), config=SweepConfig(bootstrap=20, calibration=calibration))
    for variant in report["variants"]:
        assert variant["layers"][2]["uncalibrated"]["ece"]["value"] is not None
    ComparisonReport.model_validate(report)


def test_classes_and_values_are_compared_too() -> None:
    states, y = planted()
    three = (np.arange(len(y)) % 3).tolist()
    report = compare(states[:2], NAMES[:2], [4, 8, 12], three, config=SweepConfig(bootstrap=20))
    assert len(report["classes"]) == 3
    assert report["directions"][0]["values"][0][0] == pytest.approx(1.0)
    values = (y + 0.25).tolist()
    report = compare(states[:2], NAMES[:2], [4, 8, 12], values, config=SweepConfig(bootstrap=20, estimator="ridge"))
    assert report["transfer"]["metric"] == "r2"
    assert report["differences"][0]["held_out"]["r2"]["value"] is not None
    ComparisonReport.model_validate(report)


def test_a_given_test_set_is_scored_by_the_training_rows_alone() -> None:
    states, y = planted()
    split = ["train" if row % 3 else "test" for row in range(len(y))]
    report = compare(states, NAMES, [4, 8, 12], y.tolist(), split=split, config=QUICK)
    train = np.array([side == "train" for side in split])
    for trained in range(3):
        fitted = model().fit(states[trained][train, 2].astype(np.float64), y[train])
        for place in range(3):
            said = fitted.predict_proba(states[place][~train, 2].astype(np.float64))[:, 1]
            found = report["transfer"]["layers"][2]["values"][trained][place]
            assert found == pytest.approx(roc_auc_score(y[~train], said), abs=2e-3)


def test_the_same_again_gives_the_same_numbers(study: Any) -> None:
    states, y, report = study
    again = compare(states, NAMES, [4, 8, 12], y.tolist(), config=SweepConfig(bootstrap=100, threads=1))
    assert again == report


def test_what_cannot_be_compared_is_refused_and_cancelling_ends_it() -> None:
    states, y = planted()
    with pytest.raises(InvalidRequest):
        compare(states, NAMES, [4, 8, 12], [1] * len(y), config=QUICK)
    with pytest.raises(InvalidRequest):
        compare(states, NAMES, [4, 8, 12], y.tolist(), config=SweepConfig(estimator="attention"))
    with pytest.raises(JobCancelled):
        compare(states, NAMES, [4, 8, 12], y.tolist(), config=QUICK, cancelled=lambda: True)
    with pytest.raises(ValueError, match="same rows"):
        compare([states[0], states[1][:-1]], NAMES[:2], [4, 8, 12], y.tolist(), config=QUICK)


STUDIES = 100


def test_intervals_of_differences_cover_the_true_one_in_nine_of_ten_studies() -> None:
    """In each study two variants are probed on rows in clusters of two; the truth is what the same procedure's probes
    are worth on very many fresh rows, averaged over studies."""
    rng = np.random.default_rng(5)
    rows, hidden, fresh = 120, 6, 4000
    found, truths = [], []
    config = Config(bootstrap=300, near_duplicates=None)

    def draw(count: int) -> tuple[Any, Any, Any]:
        y = rng.permutation(np.repeat(np.arange(count // 2) % 2, 2))
        clusters = np.empty(count, dtype=int)
        for label in (0, 1):
            mine = np.flatnonzero(y == label)
            clusters[mine] = label * count + np.arange(len(mine)) // 2
        shared = rng.normal(size=(2 * count, hidden))[clusters]
        noise = 0.8 * shared + 0.6 * rng.normal(size=(count, hidden))
        shown = (2 * y - 1)[:, None] * np.eye(hidden)[0]
        return noise + 0.5 * shown, noise + 0.9 * shown + 0.3 * rng.normal(size=noise.shape), (y, clusters)

    for study in range(STUDIES):
        first, second, (y, clusters) = draw(rows)
        targets = encode_labels(y.tolist(), rows)
        inputs = rivals.Inputs(token_ids=None, offsets=None, lengths=None, confidence=None)
        folds = folds_for(targets, Config(seed=study), inputs, clusters.tolist(), None, None)
        estimator = make_estimator("logistic", C=None, standardize=True, seed=0, task="binary", covariance="none")
        plan = plan_for(targets, folds, estimator, config, None, layers=1)
        fresh_first, fresh_second, (fresh_y, _) = draw(fresh)
        drawn, worth = [], []
        for X, unseen in ((first, fresh_first), (second, fresh_second)):
            predicted, seen = np.empty((rows, 2)), []
            for train, test in folds:
                [fit] = estimator.fit_path(X[train], y[train], 2)
                predicted[test] = fit.predict_proba(X[test])
                seen.append(roc_auc_score(fresh_y, fit.decision_function(unseen)))
            drawn.append(draws_of(predicted[folds.held_out], plan))
            worth.append(np.mean(seen))
        found.append(differences(drawn[0], drawn[1], plan)["auroc"])
        truths.append(worth[1] - worth[0])
    truth = float(np.mean(truths))
    covered = sum(one.low <= truth <= one.high for one in found)
    assert covered >= 90
    # Not by being wide: most of the intervals exclude a difference of none.
    assert sum(one.low > 0 for one in found) > 50
