"""Who knows better when the model is right: a probe on its hidden states, or the model's own probability?

Both give each row a confidence, and each row is right or wrong. Selective prediction answers only the rows of highest
confidence: the share answered is the coverage, the share of errors among them the risk, and the area under the
risk-coverage curve (AURC; Geifman & El-Yaniv, "Selective classification for deep neural networks", 2017) is the mean
risk over the coverages 1/n, 2/n, … 1. No order can do better than all right rows before all wrong ones; what lies above
that is the excess (E-AURC; Geifman, Uziel & El-Yaniv 2019), which does not reward a model for making few errors.

Rows of equal confidence have no order. Their errors count evenly over the places that they share, which is the mean
over all orders: a confidence that is the same for all has a flat curve at the error rate, however the rows lie.

Every figure is a function of row weights, as in `metrics`; a resample's repeated rows are such ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes import metrics
from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.metrics import Figure, Statistic
from bathyscope_workers.probes.resampling import Resamples

COVERAGES = (0.25, 0.5, 0.75, 0.9)
"""At which the accuracy is told."""

_CURVE_POINTS = 101


class RiskCoverage:
    """Rows sorted once from the most to the least confident, for any number of resamples."""

    def __init__(self, confidence: Floats, correct: NDArray[np.bool_]) -> None:
        """Both (rows,)."""
        self._order = np.argsort(-confidence, kind="stable")
        ordered = confidence[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, int)
        self._wrong = (~np.asarray(correct, dtype=bool))[self._order].astype(np.float64)

    def _tallies(self, weights: Floats) -> tuple[Floats, Floats]:
        """Weight of each tie and of the errors in it, (resamples, ties)."""
        ordered = weights[:, self._order]
        return (
            np.add.reduceat(ordered, self._starts, axis=1),
            np.add.reduceat(ordered * self._wrong, self._starts, axis=1),
        )

    def aurc(self, weights: Floats) -> Floats:
        """Mean over k = 1 … n of the expected share of errors among the k most confident rows."""
        total, errors = self._tallies(weights)
        rate = np.divide(errors, total, out=np.zeros_like(errors), where=total > 0)
        before, errors_before = np.cumsum(total, axis=1) - total, np.cumsum(errors, axis=1) - errors
        # Within a tie the k-th risk is (errors before + (k - before) * rate) / k; summed with harmonic numbers.
        harmonic = _harmonic(int(total.sum(axis=1).max(initial=0)))
        places = harmonic[_whole(before + total)] - harmonic[_whole(before)]
        risks = (errors_before - before * rate) * places + errors
        return _ratio(risks.sum(axis=1), total.sum(axis=1))

    def optimal_aurc(self, weights: Floats) -> Floats:
        """AURC of an order with every right row before every wrong one."""
        total, errors = (tally.sum(axis=1) for tally in self._tallies(weights))
        right = total - errors
        harmonic = _harmonic(int(total.max(initial=0)))
        # Among the k first, k - right are wrong, from k = right + 1 on.
        risks = errors - right * (harmonic[_whole(total)] - harmonic[_whole(right)])
        return _ratio(risks, total)

    def excess_aurc(self, weights: Floats) -> Floats:
        """AURC above that of the best order of the same rows."""
        result: Floats = self.aurc(weights) - self.optimal_aurc(weights)
        return result

    def accuracy_at(self, weights: Floats, coverage: float) -> Floats:
        """Expected share of right rows among the `coverage` (over 0, up to 1) most confident, at least one row."""
        total, errors = self._tallies(weights)
        taken = np.maximum(np.ceil(coverage * total.sum(axis=1) * (1 - 1e-12)), 1.0)[:, None]
        before = np.cumsum(total, axis=1) - total
        share = np.divide(np.clip(taken - before, 0.0, total), total, out=np.zeros_like(total), where=total > 0)
        return _ratio(taken[:, 0] - (share * errors).sum(axis=1), taken[:, 0])

    def curve(self, points: int = _CURVE_POINTS) -> dict[str, list[float]]:
        """`coverage` and `risk`: of every row up to `points` of them, else of evenly spaced coverages up to 1."""
        rows = len(self._order)
        taken = np.unique(np.ceil(np.linspace(1, rows, min(points, rows)) - 1e-9).astype(int))
        ones = np.ones((1, rows))
        risk = [1.0 - float(self.accuracy_at(ones, count / rows)[0]) for count in taken]
        return {"coverage": [float(count / rows) for count in taken], "risk": [max(one, 0.0) for one in risk]}


def confidence_report(
    y: Codes,
    probe_probability: Floats,
    model_confidence: Floats,
    resamples: Resamples | None,
    *,
    strata: Codes | None = None,
    spread: float = 1.0,
    coverages: Sequence[float] = COVERAGES,
) -> dict[str, Any]:
    """Probe and model side by side on the same held-out rows: the member `confidence` of a probe's report.

    `y` (rows,) says whether the model is right, 1 or 0; `probe_probability` is the probe's P(right) of rows that took
    no part in fitting it, `model_confidence` the model's own; `resamples` are of these rows. `strata` and `spread` are
    those of `metrics` for cross-validated predictions; the model was fitted on none of these rows, so the spread is not
    its.
    `difference` is probe minus model, draw by draw on the same resamples.
    """
    correct = np.asarray(y) == 1
    probe = _statistics(y, probe_probability, strata, coverages)
    model = _statistics(y, model_confidence, None, coverages)  # fitted on no fold: compared across them
    paired = _statistics(y, model_confidence, strata, coverages)
    rows = len(y)
    report: dict[str, Any] = {
        "rows": rows,
        "accuracy": metrics.figure(_mean(correct), rows, resamples).to_dict(),
        "optimal_aurc": float(RiskCoverage(model_confidence, correct).optimal_aurc(np.ones((1, rows)))[0]),
        "probe": _side(y, probe_probability, probe, resamples, spread),
        "model": _side(y, model_confidence, model, resamples, 1.0),
        "difference": {
            name: _difference(probe[name], paired[name], rows, resamples, spread).to_dict()
            for name in ("auroc", "ece", "brier", "aurc")
        },
    }
    return report


def confidence_warnings(report: dict[str, Any]) -> list[str]:
    """Sentences for a careful reader of `confidence_report`; empty when nothing is off."""
    found = []
    area = report["difference"]["aurc"]
    if area["value"] is not None:
        bar = area["value"] if area["high"] is None else area["high"]
        if bar >= 0:
            found.append(
                f"The probe's risk-coverage area ({report['probe']['aurc']['value']:.3f}) is not shown to be below "
                f"that of the model's own confidence ({report['model']['aurc']['value']:.3f}): the probe may know no "
                "more than the model says by itself."
            )
    return found


def _statistics(y: Codes, confidence: Floats, strata: Codes | None, coverages: Sequence[float]) -> dict[str, Statistic]:
    columns = np.stack([1.0 - confidence, confidence], axis=1)
    selective = RiskCoverage(confidence, np.asarray(y) == 1)
    found: dict[str, Statistic] = {
        "auroc": metrics.auroc(y, columns, strata),
        "brier": metrics.brier(y, columns),
        "ece": metrics.ece(y, columns),
        "ece_equal_mass": metrics.ece(y, columns, equal_mass=True),
        "aurc": selective.aurc,
        "excess_aurc": selective.excess_aurc,
    }
    for coverage in coverages:
        found[f"accuracy_at/{coverage:g}"] = lambda weights, at=coverage: selective.accuracy_at(weights, at)  # type: ignore[misc]
    return found


def _side(
    y: Codes, confidence: Floats, statistics: dict[str, Statistic], resamples: Resamples | None, spread: float
) -> dict[str, Any]:
    figures = {
        name: metrics.figure(
            statistic, len(y), resamples, biased=name in ("ece", "ece_equal_mass"), spread=spread
        ).to_dict()
        for name, statistic in statistics.items()
    }
    at = {name.partition("/")[2]: figures.pop(name) for name in list(figures) if name.startswith("accuracy_at/")}
    columns = np.stack([1.0 - confidence, confidence], axis=1)
    return {
        **figures,
        "accuracy_at_coverage": at,
        "risk_coverage": RiskCoverage(confidence, np.asarray(y) == 1).curve(),
        "reliability": metrics.reliability(y, columns),
    }


def _difference(one: Statistic, other: Statistic, rows: int, resamples: Resamples | None, spread: float) -> Figure:
    """one - other, with a paired 95 % percentile interval."""
    value = float(one(np.ones((1, rows)))[0] - other(np.ones((1, rows)))[0])
    if not np.isfinite(value):
        return Figure(None)
    if resamples is None or resamples.count == 0:
        return Figure(value)
    draws = np.concatenate([one(weights) - other(weights) for weights in resamples.chunks()])
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Figure(value)
    low, high = (float(end) for end in np.percentile(draws, [2.5, 97.5]))
    return Figure(value, max(value + spread * (low - value), -1.0), min(value + spread * (high - value), 1.0))


def _mean(values: NDArray[np.bool_]) -> Statistic:
    column = values.astype(np.float64)
    return lambda weights: _ratio(weights @ column, weights.sum(axis=1))


def _harmonic(last: int) -> Floats:
    """H(0) … H(last)."""
    return np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, last + 1))])


def _whole(weights: Floats) -> NDArray[np.int64]:
    return np.rint(weights).astype(np.int64)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    result: Floats = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    return result
