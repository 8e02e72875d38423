"""Figures of predicted values, as functions of row weights; see `metrics` for how intervals come from them."""

from __future__ import annotations

import numpy as np

from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import Figure, Statistic, figure, ratio
from bathyscope_workers.probes.resampling import Resamples


def r2(y: Floats, predicted: Floats) -> Statistic:
    """Share of the variance that is explained: 1 - sum (y - p)² / sum (y - mean)²; below 0 for worse than the mean."""
    squared = np.square(y - predicted)
    centred = y - y.mean()

    def statistic(weights: Floats) -> Floats:
        total = weights.sum(axis=1)
        spread = weights @ np.square(centred) - np.square(weights @ centred) / total
        return 1.0 - ratio(weights @ squared, np.where(spread > 1e-12 * float(centred @ centred), spread, 0.0))

    return statistic


def mae(y: Floats, predicted: Floats) -> Statistic:
    """Mean absolute error, in the labels' unit."""
    error = np.abs(y - predicted)
    return lambda weights: ratio(weights @ error, weights.sum(axis=1))


def mse(y: Floats, predicted: Floats) -> Statistic:
    """Mean squared error."""
    error = np.square(y - predicted)
    return lambda weights: ratio(weights @ error, weights.sum(axis=1))


def spearman(y: Floats, predicted: Floats, strata: Codes | None = None) -> Statistic:
    """Rank correlation, equal values sharing their mean rank; 0 for predictions that are all the same.

    With `strata`, the fold of each row, ranks are compared within a fold and the folds weighted by their rows: a fold's
    mean goes against its training side's, so that ranks over all folds would show a correlation below 0 where there is
    none (see `metrics`).
    """
    strata = np.zeros(len(y), dtype=np.int64) if strata is None else strata
    parts = [(rows, _Ranks(y[rows]), _Ranks(predicted[rows])) for rows in map(np.flatnonzero, _each(strata))]

    def statistic(weights: Floats) -> Floats:
        found, counted = np.zeros(len(weights)), np.zeros(len(weights))
        for rows, truth, said in parts:
            w = weights[:, rows]
            total = w.sum(axis=1)
            a, b = truth.centred(w), said.centred(w)
            spread = np.einsum("ij,ij->i", w, a * a)
            scale = np.sqrt(spread * np.einsum("ij,ij->i", w, b * b))
            correlation = np.divide(np.einsum("ij,ij->i", w, a * b), scale, out=np.zeros_like(scale), where=scale > 0)
            known = spread > 0
            found += np.where(known, total * correlation, 0.0)
            counted += np.where(known, total, 0.0)
        return ratio(found, counted)

    return statistic


def score_values(
    y: Floats,
    predicted: Floats,
    *,
    strata: Codes | None = None,
    resamples: Resamples | None = None,
    spread: float = 1.0,
) -> dict[str, Figure]:
    """Every metric of predicted values of `y`, both (rows,), by its name in the API."""
    rows, infinite = len(y), float("inf")
    found = statistics_of(y, predicted, strata=strata)
    return {
        "r2": figure(found["r2"], rows, resamples, spread=spread, lowest=-infinite),
        "mae": figure(found["mae"], rows, resamples, spread=spread, highest=infinite),
        "spearman": figure(found["spearman"], rows, resamples, spread=spread, lowest=-1.0),
    }


def statistics_of(y: Floats, predicted: Floats, *, strata: Codes | None = None) -> dict[str, Statistic]:
    """The metrics of `score_values`, by name, as functions of row weights."""
    return {"r2": r2(y, predicted), "mae": mae(y, predicted), "spearman": spearman(y, predicted, strata)}


class _Ranks:
    """Rows sorted once, for any number of resamples."""

    def __init__(self, values: Floats) -> None:
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        fresh = np.r_[True, ordered[1:] != ordered[:-1]]
        self._starts = np.flatnonzero(fresh)
        self._tie = np.empty(len(values), dtype=np.int64)
        self._tie[self._order] = np.cumsum(fresh) - 1

    def centred(self, weights: Floats) -> Floats:
        """Mean rank of each row among the weighted rows, minus the mean of all, (resamples, rows)."""
        tallies = np.add.reduceat(weights[:, self._order], self._starts, axis=1)
        ranks = np.cumsum(tallies, axis=1) - tallies / 2
        result: Floats = ranks[:, self._tie] - weights.sum(axis=1, keepdims=True) / 2
        return result


def _each(strata: Codes) -> list[Codes]:
    return [strata == stratum for stratum in np.unique(strata)]
