"""Data whose answer is known: what a probe must find, and what it must not."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from bathyscope_workers.probes import SweepConfig, sweep

QUICK = SweepConfig(bootstrap=200, selectivity=False, threads=1)


def test_noise_is_called_noise() -> None:
    """The 95 % interval of the held-out AUROC covers one half in at least 90 of 100 seeds, layer chosen and all."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        states = rng.normal(size=(80, 2, 6)).astype(np.float32)
        labels = rng.permutation(np.arange(80) % 2).tolist()
        figure = sweep(states, range(2), labels, config=dataclasses.replace(QUICK, seed=seed)).report.held_out["auroc"]
        covered += figure["low"] <= 0.5 <= figure["high"]
    assert covered >= 90


@pytest.mark.parametrize("split", [None, "random", "stratified"])
def test_labels_that_follow_only_the_group_score_one_half(split: str | None) -> None:
    """Over a few seeds, so that the mean tells: without groups it is near 1."""
    grouped, leaking = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), 4)
        y = rng.permutation(np.arange(40) % 2)[groups]
        states = (2 * rng.normal(size=(40, 1, 48)))[groups] + rng.normal(size=(160, 1, 48))
        config = dataclasses.replace(QUICK, seed=seed, bootstrap=0)
        for scores, given in ((grouped, groups.tolist()), (leaking, None)):
            report = sweep(states, [3], y.tolist(), groups=given, split=split, config=config).report
            scores.append(report.held_out["auroc"]["value"])
    assert abs(np.mean(grouped) - 0.5) < 0.12
    assert np.mean(leaking) > 0.8


def near_copies(texts: int, copies: int, length: int, rng: Any) -> tuple[Any, Any]:
    """Token ids and offsets of each text and of copies of it with one token changed."""
    rows = []
    for text in rng.integers(0, 5000, (texts, length)):
        for copy in range(copies):
            row = text.copy()
            if copy:
                row[rng.integers(length)] = rng.integers(5000, 9000)
            rows.append(row)
    return np.concatenate(rows), np.arange(texts * copies + 1) * length


def test_near_duplicates_do_not_leak() -> None:
    """Labels follow only the text, and the states nearly so: kept together the copies tell nothing."""
    text = np.repeat(np.arange(40), 4)
    scores = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        token_ids, offsets = near_copies(40, 4, 50, rng)
        y = rng.permutation(np.arange(40) % 2)[text].tolist()
        states = (2 * rng.normal(size=(40, 2, 48)))[text] + rng.normal(size=(160, 2, 48))
        kept = sweep(states, range(2), y, token_ids=token_ids, offsets=offsets, config=QUICK).report
        assert kept.folds["clusters"] == 40
        scores.append(kept.held_out["auroc"]["value"])
    assert abs(np.mean(scores) - 0.5) < 0.12
    assert kept.folds["near_duplicates"] == {"threshold": 0.8}
    assert any("tie 160 groups or inputs to 40" in warning for warning in kept.warnings)
    off = dataclasses.replace(QUICK, near_duplicates=None)
    leaking = sweep(states, range(2), y, token_ids=token_ids, offsets=offsets, config=off).report
    assert leaking.held_out["auroc"]["value"] > 0.75
    assert leaking.folds["clusters"] == 160
    split = ["train", "train", "train", "test"] * 40
    given = sweep(states, range(2), y, split=split, token_ids=token_ids, offsets=offsets, config=QUICK).report
    assert any(warning.startswith("Leakage") for warning in given.warnings)


def test_labels_that_follow_only_the_length_are_told() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 40, 200)
    y = lengths > np.median(lengths)
    states = rng.normal(size=(200, 2, 16))
    states[:, 1, 0] += 0.2 * lengths
    config = dataclasses.replace(QUICK, baselines=["length"])
    report = sweep(states, [4, 8], y.tolist(), lengths=lengths.tolist(), config=config).report
    assert report.held_out["auroc"]["value"] > 0.95
    assert any(warning.startswith("The length baseline") for warning in report.warnings)


def test_labels_that_one_word_gives_away_are_told() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    rows = [np.r_[rng.integers(0, 3000, 9), 5000 + label] for label in y]
    token_ids, offsets = np.concatenate(rows), np.arange(201) * 10
    states = rng.normal(size=(200, 2, 16))
    states[:, :, 0] += 3 * y[:, None]
    config = dataclasses.replace(QUICK, baselines=["bag_of_words"])
    report = sweep(states, [0, 8], y.tolist(), token_ids=token_ids, offsets=offsets, config=config).report
    assert report.baselines["bag_of_words"]["auroc"]["value"] > 0.99
    assert any(warning.startswith("The bag_of_words baseline") for warning in report.warnings)
    assert any("embeddings before any block" in warning for warning in report.warnings)


def softened(rows: int, classes: int, noise: int) -> tuple[Any, Any]:
    """Logits in a few features and noise in the others: a strong penalty makes a probe that is far too unsure."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(rows, classes))
    drawn = signal / 0.7 + rng.gumbel(size=(rows, classes))
    y = drawn.argmax(axis=1)
    states = np.concatenate([signal, rng.normal(size=(rows, noise))], axis=1)[:, None]
    return states.astype(np.float32), y


@pytest.mark.parametrize("method", ["platt", "isotonic", "temperature"])
@pytest.mark.parametrize(("rows", "classes", "noise"), [(1200, 2, 30), (1200, 3, 30)])
def test_a_miscalibrated_probe_is_repaired(method: str, rows: int, classes: int, noise: int) -> None:
    states, y = softened(rows + 2000, classes, noise)
    new_states, new_y, states, y = states[rows:], y[rows:], states[:rows], y[:rows]
    config = dataclasses.replace(QUICK, C=[1e-3], calibration=method)
    result = sweep(states, [5], y.tolist(), config=config)
    calibration = result.report.calibration
    assert calibration is not None
    before, after = calibration["before"]["ece"]["value"], calibration["after"]["ece"]["value"]
    assert before > 0.15
    assert after < 0.5 * before
    assert result.report.layers[0]["uncalibrated"]["ece"] == calibration["before"]["ece"]
    assert result.report.layers[0]["ece"] == calibration["after"]["ece"] == result.report.held_out["ece"]
    # The kept probe is calibrated too: on new rows of the same kind it is as good.
    P = result.probe.predict(new_states[:, 0])
    confidence = P[:, 1] if classes == 2 else P.max(axis=1)
    right = new_y == 1 if classes == 2 else P.argmax(axis=1) == new_y
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(np.sum(right[bins == k]) - np.sum(confidence[bins == k])) for k in range(15)]
    assert sum(gaps) / len(new_y) < 0.5 * before


def test_few_rows_are_warned_of_before_an_isotonic_calibrator() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 120)
    y = rng.random(120) < expit(logits)
    config = dataclasses.replace(QUICK, C=[1.0], calibration="isotonic", folds=3)
    warnings = sweep(logits[:, None, None], [5], y.tolist(), config=config).report.warnings
    assert any(warning.startswith("An isotonic calibrator learned from 120 rows") for warning in warnings)
