"""Every estimator through the whole sweep: task, calibration, file, the same bits again."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from bathyscope.errors import InvalidInput, InvalidRequest
from bathyscope.types import Report as WireReport
from bathyscope_workers.probes import FittedProbe, SweepConfig, SweepResult, sweep
from tests.workers.probes.test_sweep import everything, planted

QUICK = SweepConfig(bootstrap=50, folds=3)
POOLED = ("logistic", "ridge", "mass_mean", "lda", "mlp")


def tokens(states: Any, seed: int = 0) -> tuple[Any, Any]:
    """Each row's states with a few tokens of noise before and behind."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 5, len(states))
    offsets = np.cumsum([0, *lengths])
    laid = rng.normal(size=(offsets[-1], *states.shape[1:])).astype(np.float32) / 3
    laid[offsets[:-1] + rng.integers(0, lengths)] = states
    return laid, offsets


def trained(estimator: str, states: Any, labels: Any, **options: Any) -> tuple[SweepResult, Any, Any]:
    """The sweep, and the states and offsets that it read."""
    offsets = None
    if estimator in ("attention", "max_mean"):
        states, offsets = tokens(states)
    config = dataclasses.replace(QUICK, estimator=estimator, **options)
    return sweep(states, range(states.shape[1]), labels, state_offsets=offsets, config=config), states, offsets


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(
    ("estimator", "calibration"),
    [*zip(POOLED, ("platt", "none", "temperature", "isotonic", "none"), strict=True),
     ("attention", "temperature"), ("max_mean", "platt")],
)  # fmt: skip
def test_classes(estimator: str, calibration: str, classes: int) -> None:
    states, y, _ = planted(rows=120, layers=2, hidden=12, strength=5.0, classes=classes)
    result, read, offsets = trained(estimator, states, y.tolist(), calibration=calibration)
    report = WireReport.model_validate(json.loads(json.dumps(result.report.to_dict(), allow_nan=False)))
    assert report.best_layer == 1
    assert report.held_out.auroc is not None
    assert report.held_out.auroc.value > 0.85  # type: ignore[operator]
    assert result.report.estimator == result.probe.estimator == estimator
    assert report.selectivity is not None
    loaded = FittedProbe.from_bytes(result.probe.to_bytes())
    P = loaded.predict(read[:, 1], offsets)
    assert P.shape == (120, classes)
    assert (P.argmax(axis=1) == y).mean() > 0.75
    assert (result.probe.predict(read[:, 1], offsets) == P).all()
    if calibration != "none":
        assert loaded.calibrator is not None
        assert loaded.calibrator["kind"] == calibration


def measured(rows: int = 150, noise: float = 0.5) -> tuple[Any, Any]:
    """States whose layer 1 shows a value along one direction."""
    rng = np.random.default_rng(0)
    y = rng.gamma(2.0, 3.0, rows)
    states = rng.normal(size=(rows, 2, 10))
    states[:, 1, 3] += y
    states[:, 1] += noise * rng.normal(size=(rows, 10))
    return states.astype(np.float32), y


@pytest.mark.parametrize("estimator", ["ridge", "mlp", "attention"])
def test_values(estimator: str) -> None:
    states, y = measured()
    token_ids, offsets = np.arange(300) % 7, np.arange(151) * 2
    options: dict[str, Any] = {"baselines": ["length", "bag_of_words", "shuffled_labels"]}
    if estimator == "ridge":
        config = dataclasses.replace(QUICK, estimator=estimator, **options, near_duplicates=None)
        result = sweep(
            states, range(2), y.tolist(), token_ids=token_ids, offsets=offsets, input_keys=range(150), config=config
        )
        read, starts = states, None
        assert set(result.report.baselines) == {"length", "bag_of_words", "shuffled_labels"}
        assert result.report.baselines["shuffled_labels"]["r2"]["value"] < 0.1
    else:
        result, read, starts = trained(estimator, states, y.tolist())
    report = WireReport.model_validate(json.loads(json.dumps(result.report.to_dict(), allow_nan=False)))
    assert (report.task, report.class_counts, report.thresholds) == ("regression", [], {})
    assert report.best_layer == 1
    figures = report.held_out
    predicted = result.held_out_probabilities
    assert figures.r2 is not None
    assert figures.r2.value == pytest.approx(r2_score(y, predicted))
    assert figures.r2.low < figures.r2.value < figures.r2.high  # type: ignore[operator]
    assert figures.mae is not None
    assert figures.mae.value == pytest.approx(np.abs(y - predicted).mean())
    folds = result.folds.assignment
    within = [stats.spearmanr(y[folds == fold], predicted[folds == fold]).statistic for fold in range(3)]
    assert figures.spearman is not None
    assert figures.spearman.value == pytest.approx(np.average(within, weights=np.bincount(folds)))
    assert figures.r2.value > 0.5  # type: ignore[operator]
    assert report.selectivity is not None
    assert report.selectivity.metric == "r2"
    assert "R2" in (report.protocol or "")
    loaded = FittedProbe.from_bytes(result.probe.to_bytes())
    values = loaded.predict(read[:, 1], starts)
    assert values.shape == (150,)
    assert r2_score(y, values) > 0.6


def test_ridge_equals_scikit_learns_loop() -> None:
    states, y = measured()
    config = dataclasses.replace(QUICK, estimator="ridge", C=[0.1], selectivity=False)
    result = sweep(states[:, 1:], [4], y.tolist(), config=config)
    predicted = np.empty(150)
    X = states[:, 1].astype(np.float64)
    for train, test in result.folds:
        mean, scale = X[train].mean(axis=0), X[train].std(axis=0)
        model = Ridge(alpha=10.0).fit((X[train] - mean) / scale, y[train])
        predicted[test] = model.predict((X[test] - mean) / scale)
    np.testing.assert_allclose(result.held_out_probabilities, predicted, atol=1e-6)


@pytest.mark.parametrize("estimator", [*POOLED, "attention", "max_mean"])
def test_the_same_bits_whatever_the_threads(estimator: str) -> None:
    states, y, _ = planted(rows=90, layers=3, hidden=8, strength=3.0)
    quick = {"selectivity": estimator != "mlp"}
    runs = [everything(trained(estimator, states, y.tolist(), threads=threads, **quick)[0]) for threads in (1, 3)]
    assert runs[0] == runs[1]


def test_a_covariance_is_for_the_mass_mean_probe() -> None:
    states, y, _ = planted(rows=90, layers=2, hidden=8, strength=3.0)
    plain, corrected = (
        trained("mass_mean", states, y.tolist(), covariance=covariance)[0] for covariance in ("none", "shrunk")
    )
    assert corrected.report.settings == {"C": None, "standardize": True, "covariance": "shrunk", "C_candidates": []}
    assert corrected.probe.settings["covariance"] == "shrunk"
    assert not np.allclose(plain.probe.tensors["weights"], corrected.probe.tensors["weights"])
    for options, pointer in (({"covariance": "shrunk"}, "/covariance"), ({"estimator": "lda", "C": [1.0]}, "/C")):
        with pytest.raises(InvalidRequest) as caught:
            sweep(states, range(2), y.tolist(), config=dataclasses.replace(QUICK, **options))
        assert caught.value.errors[0]["pointer"] == pointer


def test_token_states_are_checked() -> None:
    states, y, _ = planted(rows=90, layers=2, hidden=8)
    laid, offsets = tokens(states)
    config = dataclasses.replace(QUICK, estimator="max_mean")
    laid[offsets[7], 1, 2] = np.nan
    with pytest.raises(InvalidInput) as caught:
        sweep(laid, range(2), y.tolist(), state_offsets=offsets, config=config)
    assert caught.value.errors[0]["pointer"] == "/inputs/7"
    laid[offsets[7], 1, 2] = 0.0
    empty = offsets.copy()
    empty[5] = empty[4]
    with pytest.raises(InvalidInput) as caught:
        sweep(laid, range(2), y.tolist(), state_offsets=empty, config=config)
    assert caught.value.errors[0]["pointer"] == "/inputs/4"
