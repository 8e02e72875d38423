"""Who sees what: choices, calibrators and scores by rows that may make them."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from bathyscope._calibrators import probabilities
from bathyscope.errors import InvalidRequest
from bathyscope.types import Report as WireReport
from bathyscope_workers.probes import FittedProbe, SweepConfig, sweep
from bathyscope_workers.probes.calibration import fit_calibrator
from tests.workers.probes.test_sweep import planted

QUICK = SweepConfig(bootstrap=100, selectivity=False)
METHODS = ("platt", "isotonic", "temperature")


def turned(y: Any, rows: Any) -> Any:
    other = y.copy()
    other[rows] = 1 - other[rows]
    return other


@pytest.mark.parametrize("method", METHODS)
def test_held_out_labels_reach_no_choice_and_no_calibrator(method: str) -> None:
    """A test set with its labels turned around changes scores only: the probe, and what it says, stay to the bit."""
    states, y, _ = planted(rows=240, strength=1.0)
    split = ["train" if row % 3 else "test" for row in range(240)]
    test = np.flatnonzero(np.arange(240) % 3 == 0)
    config = dataclasses.replace(QUICK, calibration=method, C=[1e-3, 1.0])
    one, other = (
        sweep(states, range(4), labels.tolist(), split=split, config=config) for labels in (y, turned(y, test))
    )
    assert (one.held_out_probabilities == other.held_out_probabilities).all()
    assert (
        dataclasses.replace(one.probe, report_sha256="", thresholds={}).to_bytes()
        == dataclasses.replace(other.probe, report_sha256="", thresholds={}).to_bytes()
    )
    assert one.report.held_out["choices"] == other.report.held_out["choices"]
    assert one.report.held_out["auroc"]["value"] == pytest.approx(1 - other.report.held_out["auroc"]["value"])


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_one_fold_do_not_reach_what_is_said_of_it(method: str) -> None:
    states, y, _ = planted(strength=1.0)
    split = (np.arange(200) % 4).tolist()
    test = np.flatnonzero(np.arange(200) % 4 == 2)
    config = dataclasses.replace(QUICK, calibration=method, C=[1e-3, 1.0])
    one, other = (
        sweep(states, range(4), labels.tolist(), split=split, config=config) for labels in (y, turned(y, test))
    )
    assert (one.held_out_probabilities[test] == other.held_out_probabilities[test]).all()
    assert not (one.held_out_probabilities == other.held_out_probabilities).all()
    assert one.report.held_out["choices"][2] == other.report.held_out["choices"][2]


@pytest.mark.parametrize("method", METHODS)
def test_the_kept_calibrator_is_fitted_on_out_of_fold_scores(method: str) -> None:
    """Done again by hand with scikit-learn: scores of rows by probes that did not see them."""
    states, y, _ = planted(rows=150, strength=2.0)
    config = dataclasses.replace(QUICK, calibration=method, C=[0.01])
    result = sweep(states[:, 2:3], [7], y.tolist(), config=config)
    X = states[:, 2].astype(np.float64)
    scores = np.empty(150)
    for train, test in result.folds:
        mean, scale = X[train].mean(axis=0), X[train].std(axis=0)
        model = LogisticRegression(C=0.01, tol=1e-10, max_iter=10_000).fit((X[train] - mean) / scale, y[train])
        scores[test] = model.decision_function((X[test] - mean) / scale)
    expected = fit_calibrator(method, scores, y)
    raw = dataclasses.replace(result.probe, calibrator=None).decision_function(states[:, 2])
    np.testing.assert_allclose(result.probe.predict(states[:, 2]), expected.apply(raw), atol=1e-3)
    assert not np.allclose(result.probe.predict(states[:, 2]), probabilities(raw), atol=1e-3)
    loaded = FittedProbe.from_bytes(result.probe.to_bytes())
    assert (loaded.predict(states[:, 2]) == result.probe.predict(states[:, 2])).all()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([None, "random", "stratified"]))
def test_near_duplicates_stay_on_one_side(seed: int, split: str | None) -> None:
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 4000, (40, 40))
    copies = texts.copy()
    copies[np.arange(40), rng.integers(0, 40, 40)] = rng.integers(4000, 8000, 40)
    token_ids = np.concatenate([texts, copies]).ravel()
    states = rng.normal(size=(80, 1, 3))
    labels = rng.permutation(np.arange(80) % 2)
    labels[40:] = labels[:40]
    labels[:4] = labels[40:44] = [0, 1, 0, 1]
    config = dataclasses.replace(QUICK, bootstrap=0, folds=3, seed=seed % 1000)
    result = sweep(
        states, [1], labels.tolist(), split=split, token_ids=token_ids, offsets=np.arange(81) * 40, config=config
    )
    assert (result.folds.assignment[:40] == result.folds.assignment[40:]).all()


def test_every_option_gives_the_same_numbers_again_whatever_the_threads() -> None:
    states, y, _ = planted(rows=90, layers=3, classes=3)
    rng = np.random.default_rng(0)
    token_ids, offsets = rng.integers(0, 50, 900), np.arange(91) * 10
    for method, split in zip(METHODS, ("random", "stratified", None), strict=True):
        config = SweepConfig(
            bootstrap=20, calibration=method, C=(0.01, 0.1), baselines=("length", "bag_of_words", "shuffled_labels")
        )
        runs = [
            sweep(
                states,
                range(3),
                y.tolist(),
                split=split,
                token_ids=token_ids,
                offsets=offsets,
                config=dataclasses.replace(config, threads=threads),
            )
            for threads in (1, 3)
        ]
        one, other = (json.dumps(run.report.to_dict(), allow_nan=False).encode() + run.probe.to_bytes() for run in runs)
        assert one == other
        assert runs[0].report.seed == runs[0].report.folds["seed"] == 0


def test_the_report_says_which_score_is_which() -> None:
    states, y, _ = planted()
    config = dataclasses.replace(QUICK, C=[0.01, 1.0], calibration="platt")
    text = sweep(states, range(4), y.tolist(), config=config).report.protocol
    for words in ("`layers`", "`held_out`", "quote `held_out`", "C is chosen in inner folds", "calibrated (platt)"):
        assert words in text
    single = sweep(states[:, :1], [0], y.tolist(), config=QUICK).report.protocol
    assert "nothing was chosen" in single
    penalties = sweep(states[:, 3:], [3], y.tolist(), config=dataclasses.replace(QUICK, C=[0.01, 1.0])).report.protocol
    assert "for each fold C chosen in inner folds" in penalties


def test_the_report_of_every_option_is_the_wire_schema() -> None:
    states, y, _ = planted()
    rng = np.random.default_rng(0)
    config = SweepConfig(bootstrap=50, calibration="temperature", baselines=["bag_of_words", "model_confidence"])
    result = sweep(
        states,
        range(4),
        y.tolist(),
        token_ids=rng.integers(0, 9, 800),
        offsets=np.arange(201) * 4,
        confidence=rng.random(200),
        config=config,
    )
    report = WireReport.model_validate(json.loads(json.dumps(result.report.to_dict())))
    assert report.calibration is not None
    assert report.calibration.after.ece == report.held_out.ece
    assert report.layers[1].uncalibrated is not None
    assert report.layers[1].recall_at_fpr is not None
    assert report.selectivity is not None
    parts = report.held_out.brier_decomposition
    assert parts is not None
    assert report.held_out.brier is not None
    summed = (
        parts.reliability.value - parts.resolution.value + parts.uncertainty.value  # type: ignore[operator]
        + parts.within_bin_variance.value - parts.within_bin_covariance.value  # type: ignore[operator]
    )  # fmt: skip
    assert summed == pytest.approx(report.held_out.brier.value, abs=1e-12)
    assert set(result.probe.thresholds) == {"default", "target_fpr", "youden", "f1"}
    assert report.confidence is not None
    # Class labels and accuracy are those of the calibrated predictions.
    picked = result.held_out_probabilities.argmax(axis=1)
    assert report.held_out.accuracy is not None
    assert report.held_out.accuracy.value == pytest.approx(accuracy_score(y, picked))
    assert report.held_out.balanced_accuracy is not None
    assert report.held_out.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(y, picked))


def test_a_penalty_at_the_end_of_its_path_is_said() -> None:
    states, y, _ = planted(strength=2.0)
    report = sweep(states, range(4), y.tolist(), config=dataclasses.replace(QUICK, C=[1e-7, 1e-6])).report
    assert any(warning.startswith("The chosen C (1e-06) is the largest") for warning in report.warnings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [0.5, 1.5] * 20, "estimator": "lda"}, "lda learns classes"),
        ({"labels": [0, 1] * 20, "state_offsets": np.arange(41)}, "one vector an input"),
        ({"labels": [0, 1] * 20, "estimator": "attention"}, "extract with pooling none"),
        ({"labels": [0, 1] * 20, "estimator": "max_mean"}, "extract with pooling none"),
    ],
)
def test_estimators_that_do_not_fit_the_states_or_the_task(options: dict[str, Any], words: str) -> None:
    states = np.zeros((40, 1, 3))
    config = dataclasses.replace(QUICK, estimator=options.get("estimator", "logistic"))
    with pytest.raises(InvalidRequest, match=words) as caught:
        sweep(states, [0], options["labels"], state_offsets=options.get("state_offsets"), config=config)
    assert caught.value.errors[0]["pointer"] == "/estimator"


def test_the_models_confidence_is_a_probability() -> None:
    states, y, _ = planted()
    confidence = np.full(200, 0.5)
    confidence[9] = np.nan
    with pytest.raises(InvalidRequest) as caught:
        sweep(states, range(4), y.tolist(), confidence=confidence, config=QUICK)
    assert caught.value.errors[0]["pointer"] == "/inputs/9"
