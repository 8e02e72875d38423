"""The ROC curve of a report: scikit-learn's for one fold, and with several one whose area is the AUROC."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from bathyscope_workers.probes import metrics
from bathyscope_workers.probes.roc import POINTS, roc_curve


def area(curve: dict[str, list[float]]) -> float:
    return float(np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"]))


rows = st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 2)), min_size=2, max_size=60)


@given(rows)
def test_its_area_is_the_auroc_within_folds(drawn: list[tuple[bool, int, int]]) -> None:
    y = np.array([int(positive) for positive, _, _ in drawn])
    score = np.array([value / 6 for _, value, _ in drawn])
    strata = np.array([fold for _, _, fold in drawn])
    curve = roc_curve(y, score, strata)
    expected = metrics.auroc(y, np.stack([1 - score, score], axis=1), strata)(np.ones((1, len(y))))[0]
    if curve is None:
        assert np.isnan(expected)
        return
    assert area(curve) == pytest.approx(expected, abs=1e-9)
    for name in ("false_positive_rate", "true_positive_rate"):
        values = curve[name]
        assert values == sorted(values)
        assert (values[0], values[-1]) == (0.0, 1.0)


def test_with_one_fold_it_is_scikit_learns() -> None:
    chance = np.random.default_rng(0)
    y = chance.integers(0, 2, 80)
    score = np.round(chance.random(80) + 0.3 * y, 1)
    x, t, _ = reference.roc_curve(y, score, drop_intermediate=False)
    curve = roc_curve(y, score)
    assert curve is not None
    found, expected = (
        {(round(float(a), 12), round(float(b), 12)) for a, b in zip(*points, strict=True)}
        for points in (curve.values(), (x, t))
    )
    assert found < expected  # what lies within a step straight up is left out
    assert area(curve) == pytest.approx(reference.auc(x, t), abs=1e-12)


def test_many_rows_give_few_points() -> None:
    chance = np.random.default_rng(1)
    y = chance.integers(0, 2, 20_000)
    score = chance.random(20_000) + 0.4 * y
    curve = roc_curve(y, score, chance.integers(0, 5, 20_000))
    assert curve is not None
    assert len(curve["false_positive_rate"]) <= 2 * POINTS
    assert area(curve) == pytest.approx(reference.roc_auc_score(y, score), abs=0.01)


def test_folds_of_one_class_have_no_part() -> None:
    assert roc_curve(np.array([1, 1, 0, 0]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1])) is None


def test_it_ends_at_one_where_the_folds_shares_add_up_to_a_little_less() -> None:
    assert sum([1 / 6] * 6) < 1
    curve = roc_curve(np.array([0, 1] * 6), np.array([0.2, 0.8] * 6), np.repeat(np.arange(6), 2))
    assert curve is not None
    assert curve["true_positive_rate"][-1] == 1.0
