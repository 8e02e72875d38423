"""Baselines and control tasks: what the probe is held against."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize

from bathyscope_workers.probes import SweepConfig, sweep
from bathyscope_workers.probes.baselines import bag_of_words
from tests.workers.probes.test_sweep import planted

QUICK = SweepConfig(bootstrap=100, selectivity=False)


def texts(rows: int, seed: int = 0) -> tuple[Any, Any, list[str]]:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(100, 160, int(rng.integers(1, 15))) for _ in range(rows)]
    return np.concatenate(lists), np.cumsum([0, *map(len, lists)]), [" ".join(map(str, one)) for one in lists]


def test_a_bag_of_words_is_scikit_learns() -> None:
    token_ids, offsets, words = texts(60)
    counts = CountVectorizer(token_pattern=r"\d+").fit_transform(words)  # three digits: in the order of the ids
    np.testing.assert_allclose(
        bag_of_words(token_ids, offsets).toarray(), normalize(np.log1p(counts.toarray().astype(float))), atol=1e-12
    )


def test_the_bag_of_words_baseline_learns_from_training_rows_alone() -> None:
    token_ids, offsets, words = texts(200)
    states, _, _ = planted()
    y = np.array(["121" in one for one in words]).astype(int)
    y[:30] = 1 - y[:30]
    config = dataclasses.replace(QUICK, baselines=["bag_of_words"], near_duplicates=None)
    result = sweep(states, range(4), y.tolist(), token_ids=token_ids, offsets=offsets, config=config)
    features = normalize(np.log1p(CountVectorizer(token_pattern=r"\d+").fit_transform(words).toarray().astype(float)))
    areas, pairs = [], []
    for train, test in result.folds:
        p = LogisticRegression(C=10.0, max_iter=1000).fit(features[train], y[train]).predict_proba(features[test])
        areas.append(roc_auc_score(y[test], p[:, 1]))
        pairs.append(y[test].sum() * (1 - y[test]).sum())
    expected = np.average(areas, weights=pairs)
    found = result.report.baselines["bag_of_words"]
    assert found["auroc"]["value"] == pytest.approx(expected, abs=2e-3)
    assert found["auroc"]["low"] < found["auroc"]["value"] < found["auroc"]["high"]


def test_the_models_own_confidence_is_scored_as_it_is() -> None:
    rng = np.random.default_rng(0)
    states, y, _ = planted()
    confidence = np.clip(0.3 * y + rng.random(200) * 0.7, 0, 1)
    config = dataclasses.replace(QUICK, baselines=["model_confidence"])
    split = ["train", "test"] * 100
    report = sweep(states, range(4), y.tolist(), confidence=confidence, split=split, config=config).report
    own = report.baselines["model_confidence"]
    assert own["auroc"]["value"] == pytest.approx(roc_auc_score(y[1::2], confidence[1::2]))
    assert own["brier"]["value"] == pytest.approx(np.mean((y[1::2] - confidence[1::2]) ** 2))
    assert report.confidence is not None


def test_baselines_that_cannot_be_had_are_said() -> None:
    states, y, _ = planted()
    config = dataclasses.replace(QUICK, baselines=["bag_of_words", "length"])
    report = sweep(states, range(4), y.tolist(), config=config).report
    assert report.baselines == {}
    assert [warning.split()[1] for warning in report.warnings] == ["bag_of_words", "length"]


def control(states: Any, y: Any, **options: Any) -> dict[str, Any]:
    config = dataclasses.replace(QUICK, selectivity=True, C=[options.pop("C", 0.01)])
    report = sweep(states, [5], y.tolist(), config=config, **options).report
    assert report.selectivity is not None
    return report.selectivity | {"accuracy": report.layers[0]["balanced_accuracy"], "warnings": report.warnings}


def test_a_real_direction_is_selective() -> None:
    states, y, _ = planted(layers=2, strength=4.0)
    found = control(states[:, 1:], y)
    assert found["probe"] == found["accuracy"]
    assert found["selectivity"]["value"] == pytest.approx(found["probe"]["value"] - found["control"]["value"])
    assert found["selectivity"]["low"] > 0.2
    assert abs(found["control"]["value"] - 0.5) < 0.1
    assert (found["layer"], found["metric"], found["types"], found["recurring"]) == (5, "balanced_accuracy", 200, 0)


def test_a_probe_that_learns_groups_by_heart_is_not() -> None:
    """States say which group a row is of, and labels only that: any labels of the groups are learned as well."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    y = rng.permutation(np.arange(40) % 2)[groups]
    states = (3 * rng.normal(size=(40, 1, 64)))[groups] + rng.normal(size=(200, 1, 64))
    found = control(states, y, groups=groups.tolist(), C=1.0)
    assert found["control"]["value"] > 0.9
    assert found["training"] > 0.99
    assert found["selectivity"]["high"] < 0
    assert (found["types"], found["recurring"]) == (40, 200)
    assert any("not shown to be selective" in warning for warning in found["warnings"])


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_few_positives_are_no_sign_of_learning_by_heart(share: float) -> None:
    states, y, _ = planted(rows=400, layers=2, strength=4.0)
    kept = np.flatnonzero((y == 0) | (np.cumsum(y) <= share * (y == 0).sum()))
    found = control(states[kept, 1:], y[kept])
    assert found["chance"] == 0.5
    assert found["selectivity"]["value"] >= 0
    assert not any("selective" in warning for warning in found["warnings"])


def test_uneven_groups_with_a_real_signal_are_no_sign_of_it() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(60), 5)
    y = (np.arange(60) % 6 == 0).astype(int)[groups]
    states = rng.normal(size=(300, 1, 40)) + 0.5 * rng.normal(size=(60, 1, 40))[groups]
    states[:, 0, 0] += 4.0 * y
    found = control(states, y, groups=groups.tolist(), C=1.0)
    assert found["selectivity"]["low"] > 0
    assert not any("selective" in warning for warning in found["warnings"])


def test_what_learning_by_heart_takes_shows_in_training() -> None:
    states, y, _ = planted(rows=60, layers=2, hidden=100, strength=4.0)
    assert control(states[:, 1:], y, C=100.0)["training"] == 1.0
    assert control(states[:, 1:, :2], y)["training"] < 0.8


def test_without_rows_enough_for_a_control_task_there_is_none() -> None:
    y = np.array([0, 1, 0, 1] + [0] * 16)
    states = np.random.default_rng(0).normal(size=(20, 1, 3))
    config = dataclasses.replace(QUICK, selectivity=True, folds=2)
    selectivity = sweep(states, [5], y.tolist(), config=config).report.selectivity
    assert selectivity is None or selectivity["draws"] == 5
