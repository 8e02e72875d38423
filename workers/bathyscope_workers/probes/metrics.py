"""What predictions are worth: discrimination, accuracy, calibration, each with a bootstrap interval.

Every metric is one function of row weights: `weights` (resamples, rows) in, (resamples,) out, and the figure itself
is the case of one resample in which every row counts once. So value and interval come from the same code.

Ranking metrics (AUROC, average precision) take `strata`, the fold of each row. Out-of-fold scores of different
folds come from different fits, and pooling them ranks rows across fits: a training side with fewer positives
gives its (positive-richer) held-out rows lower scores, so that a probe without any information scores below 0.5.
They therefore compare rows of the same fold only, folds weighted by their pairs (positives); see Airola et al.,
"An experimental comparison of cross-validation techniques for estimating the area under the ROC curve" (2011).
With one stratum they are scikit-learn's.

Binary probabilities are those of the second class; multi-class calibration is that of the top label.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Codes, Floats
from bathyscope_workers.probes.resampling import Resamples

BINS = 15
"""Bins of the expected calibration error (Guo et al. 2017)."""

_LEVEL = 95.0
BIASED = ("ece", "ece_equal_mass")
"""Those that noise can only raise; see `figure`."""

_HIGHEST = {"nll": float("inf"), "brier": 2.0}

Statistic = Callable[[Floats], Floats]
"""Weights (resamples, rows) to values (resamples,); nan where a resample leaves the metric undefined."""


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval; None where it is not defined or no resamples were drawn."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """As the API writes it."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Ranking:
    """Rows sorted once by (stratum, score), for any number of resamples."""

    def __init__(self, positive: NDArray[np.bool_], scores: Floats, strata: Codes | None = None) -> None:
        """`positive` and `scores` (rows,); equal scores of one stratum are tied."""
        strata = np.zeros(len(scores), dtype=np.int64) if strata is None else strata
        self.order = np.lexsort((scores, strata))
        ordered, stratum = scores[self.order], strata[self.order]
        new_stratum = np.r_[True, stratum[1:] != stratum[:-1]]
        self._starts = np.flatnonzero(new_stratum | np.r_[True, ordered[1:] != ordered[:-1]])
        self._stratum_of_tie = np.cumsum(new_stratum)[self._starts] - 1
        self._first_tie = np.flatnonzero(new_stratum[self._starts])
        self._positive = positive[self.order].astype(np.float64)
        self.thresholds = ordered[self._starts]
        """The score of each tie, ascending within its stratum."""

    def _tallies(self, weights: Floats) -> tuple[Floats, Floats]:
        """Weight of positives and of negatives in each tie, (resamples, ties)."""
        ordered = weights[:, self.order]
        positives = ordered * self._positive
        return (
            np.add.reduceat(positives, self._starts, axis=1),
            np.add.reduceat(ordered - positives, self._starts, axis=1),
        )

    def _totals(self, tallies: Floats) -> Floats:
        """Sum over each stratum, (resamples, strata)."""
        result: Floats = np.add.reduceat(tallies, self._first_tie, axis=1)
        return result

    def _below(self, tallies: Floats) -> Floats:
        """Weight in the lower ties of the same stratum, (resamples, ties)."""
        running = np.cumsum(tallies, axis=1) - tallies
        result: Floats = running - running[:, self._first_tie[self._stratum_of_tie]]
        return result

    def auroc(self, weights: Floats) -> Floats:
        """Share of (positive, negative) pairs in the right order, ties for half."""
        positives, negatives = self._tallies(weights)
        concordant = np.sum(positives * (self._below(negatives) + negatives / 2), axis=1)
        pairs = np.sum(self._totals(positives) * self._totals(negatives), axis=1)
        return ratio(concordant, pairs)

    def average_precision(self, weights: Floats) -> Floats:
        """Mean over positives of the precision at their score."""
        positives, negatives = self._tallies(weights)
        above_p = self._totals(positives)[:, self._stratum_of_tie] - self._below(positives)
        above_n = self._totals(negatives)[:, self._stratum_of_tie] - self._below(negatives)
        taken = above_p + above_n
        precision = np.divide(above_p, taken, out=np.zeros_like(taken), where=taken > 0)
        return ratio(np.sum(positives * precision, axis=1), np.sum(positives, axis=1))

    def recall_at_fpr(self, weights: Floats, target: float) -> Floats:
        """Highest recall of a threshold whose false-positive rate is at most `target`; strata are not told apart."""
        positives, negatives = self._tallies(weights)
        taken_p = np.cumsum(positives[:, ::-1], axis=1)
        taken_n = np.cumsum(negatives[:, ::-1], axis=1)
        allowed = taken_n <= target * taken_n[:, -1:] * (1 + 1e-12)
        best = np.max(np.where(allowed, taken_p, 0.0), axis=1)
        return np.where(taken_n[:, -1] > 0, ratio(best, taken_p[:, -1]), np.nan)

    def operating_points(self) -> tuple[Floats, Floats, Floats]:
        """(score, true positives, false positives) of "positive from this score on", from the highest score down."""
        positives, negatives = self._tallies(np.ones((1, len(self.order))))
        return self.thresholds[::-1], np.cumsum(positives[0, ::-1]), np.cumsum(negatives[0, ::-1])


def auroc(y: Codes, probabilities: Floats, strata: Codes | None = None) -> Statistic:
    """Area under the ROC curve; with more than two classes the mean over one-vs-rest."""
    return _one_vs_rest(y, probabilities, strata, Ranking.auroc)


def average_precision(y: Codes, probabilities: Floats, strata: Codes | None = None) -> Statistic:
    """Area under the precision-recall steps; with more than two classes the mean over one-vs-rest."""
    return _one_vs_rest(y, probabilities, strata, Ranking.average_precision)


def accuracy(y: Codes, probabilities: Floats) -> Statistic:
    """Share of rows whose most probable class is theirs; at a tie the first class is taken."""
    return _mean(np.argmax(probabilities, axis=1) == y)


def balanced_accuracy(y: Codes, probabilities: Floats) -> Statistic:
    """Mean over the classes of the share of their rows that is recognised."""
    correct = (np.argmax(probabilities, axis=1) == y).astype(np.float64)
    member = (y[:, None] == np.arange(probabilities.shape[1])).astype(np.float64)  # (rows, classes)

    def statistic(weights: Floats) -> Floats:
        total = weights @ member
        recall = np.divide(weights @ (member * correct[:, None]), total, out=np.zeros_like(total), where=total > 0)
        return ratio(recall.sum(axis=1), np.sum(total > 0, axis=1).astype(np.float64))

    return statistic


def brier(y: Codes, probabilities: Floats) -> Statistic:
    """Mean squared error of the positive probability; multi-class: of all probabilities, summed (Brier 1950)."""
    if probabilities.shape[1] == 2:
        return _mean(np.square(probabilities[:, 1] - y))
    return _mean(np.square(probabilities - (y[:, None] == np.arange(probabilities.shape[1]))).sum(axis=1))


def nll(y: Codes, probabilities: Floats) -> Statistic:
    """Mean negative log-likelihood in nats; a probability counts as at least 2.2e-16."""
    own = probabilities[np.arange(len(y)), y]
    return _mean(-np.log(np.clip(own, np.finfo(np.float64).eps, 1.0)))


def ece(y: Codes, probabilities: Floats, *, equal_mass: bool = False, bins: int = BINS) -> Statistic:
    """Expected calibration error: the mean over bins, by weight, of |observed frequency - mean confidence|.

    Bins are equal in width, or equal in mass on the rows as they are, and stay the same in every resample.
    """
    confidence, outcome = top_label(y, probabilities)
    edges = bin_edges(confidence, equal_mass=equal_mass, bins=bins)
    member = membership(confidence, edges)
    gap = member * (outcome - confidence)[:, None]

    def statistic(weights: Floats) -> Floats:
        return ratio(np.abs(weights @ gap).sum(axis=1), weights.sum(axis=1))

    return statistic


def top_label(y: Codes, probabilities: Floats) -> tuple[Floats, Floats]:
    """What calibration is about: (confidence, outcome 0 or 1), each (rows,).

    Binary: probability of the positive class, and whether it is that. Multi-class: probability of the most
    probable class, and whether it is right.
    """
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], (y == 1).astype(np.float64)
    return probabilities.max(axis=1), (np.argmax(probabilities, axis=1) == y).astype(np.float64)


def bin_edges(confidence: Floats, *, equal_mass: bool = False, bins: int = BINS) -> Floats:
    """The `bins` + 1 edges; a value on an inner edge belongs to the bin below it."""
    if equal_mass:
        result: Floats = np.quantile(confidence, np.linspace(0.0, 1.0, bins + 1))
        return result
    return np.linspace(0.0, 1.0, bins + 1)


def reliability(y: Codes, probabilities: Floats, *, equal_mass: bool = False, bins: int = BINS) -> list[dict[str, Any]]:
    """The bins of a reliability diagram: `low`, `high`, `count`, mean `confidence` and observed `accuracy`."""
    confidence, outcome = top_label(y, probabilities)
    edges = bin_edges(confidence, equal_mass=equal_mass, bins=bins)
    member = membership(confidence, edges)
    counts = member.sum(axis=0)
    rows = []
    for index, count in enumerate(counts):
        rows.append(
            {
                "low": float(edges[index]),
                "high": float(edges[index + 1]),
                "count": int(count),
                "confidence": float(member[:, index] @ confidence / count) if count else None,
                "accuracy": float(member[:, index] @ outcome / count) if count else None,
            }
        )
    return rows


def figure(
    statistic: Statistic,
    rows: int,
    resamples: Resamples | None = None,
    *,
    biased: bool = False,
    spread: float = 1.0,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Figure:
    """The value of a statistic on all rows, and its percentile interval over the resamples.

    `biased` is for statistics that noise can only raise, such as the ECE: their resamples lie above the value by as
    much as the value lies above the truth, and a plain percentile interval may miss the value itself. Their interval
    is moved by the mean difference. `spread` multiplies the distances from the value to the interval's ends (see
    `cross_validation_spread`). The ends are cut at `lowest` and at `highest`.
    """
    value = float(statistic(np.ones((1, rows)))[0])
    if resamples is None or resamples.count == 0 or not np.isfinite(value):
        return with_interval(value, None)
    draws = np.concatenate([statistic(weights) for weights in resamples.chunks()])
    return with_interval(value, draws, biased=biased, spread=spread, lowest=lowest, highest=highest)


def with_interval(
    value: float,
    draws: Floats | None,
    *,
    biased: bool = False,
    spread: float = 1.0,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Figure:
    """A value and the interval of its resampled `draws`; see `figure`."""
    if not np.isfinite(value):
        return Figure(None)
    drawn = np.zeros(0) if draws is None else draws[np.isfinite(draws)]
    if len(drawn) == 0:
        return Figure(value)
    low, high = np.percentile(drawn, [50 - _LEVEL / 2, 50 + _LEVEL / 2])
    if biased:
        shift = float(drawn.mean()) - value
        low, high = min(low - shift, value), max(high - shift, value)
    low, high = value + spread * (low - value), value + spread * (high - value)
    return Figure(value, max(float(low), lowest), min(float(high), highest))


def cross_validation_spread(folds: int) -> float:
    """By how much intervals of cross-validated figures are wider than those of one probe on fresh rows.

    Resampling predictions holds the fitted probes fixed. In cross-validation they are not: each row is tested by one
    probe and trained the others, so that the folds' errors go together, with a correlation of about the share held
    out, 1/K (Nadeau & Bengio, "Inference for the generalization error", 2003). The variance of the mean over K folds
    is then 1 + (K - 1)/K times that of independent folds. Without it 95 % intervals of K = 5 folds cover about 80 %.
    One fold, a test set of its own, needs none.
    """
    return float(np.sqrt(1 + (folds - 1) / folds))


def statistics_of(
    y: Codes, probabilities: Floats, *, strata: Codes | None = None, target_fpr: float | None = None
) -> dict[str, Statistic]:
    """The metrics of `score`, by name, as functions of row weights."""
    statistics: dict[str, Statistic] = {
        "auroc": auroc(y, probabilities, strata),
        "average_precision": average_precision(y, probabilities, strata),
        "accuracy": accuracy(y, probabilities),
        "balanced_accuracy": balanced_accuracy(y, probabilities),
        "brier": brier(y, probabilities),
        "nll": nll(y, probabilities),
        "ece": ece(y, probabilities),
        "ece_equal_mass": ece(y, probabilities, equal_mass=True),
    }
    if target_fpr is not None and probabilities.shape[1] == 2:
        ranking = Ranking(y == 1, probabilities[:, 1])
        statistics["recall_at_fpr"] = lambda weights: ranking.recall_at_fpr(weights, target_fpr)
    return statistics


def score(
    y: Codes,
    probabilities: Floats,
    *,
    strata: Codes | None = None,
    resamples: Resamples | None = None,
    target_fpr: float | None = None,
    spread: float = 1.0,
    only: Collection[str] | None = None,
) -> dict[str, Figure]:
    """Every metric of predictions `probabilities` (rows, classes) of codes `y` (rows,), by its name in the API.

    `recall_at_fpr` is there for binary predictions when `target_fpr` is given. See `figure` for `spread`. `only` names
    the metrics wanted; None is all.
    """
    statistics = statistics_of(y, probabilities, strata=strata, target_fpr=target_fpr)
    return {
        name: figure(
            statistic,
            len(y),
            resamples,
            biased=name in BIASED,
            spread=spread,
            highest=_HIGHEST.get(name, 1.0),
        )
        for name, statistic in statistics.items()
        if only is None or name in only
    }


def _one_vs_rest(
    y: Codes, probabilities: Floats, strata: Codes | None, metric: Callable[[Ranking, Floats], Floats]
) -> Statistic:
    classes = probabilities.shape[1]
    wanted = [1] if classes == 2 else range(classes)
    rankings = [Ranking(y == code, probabilities[:, code], strata) for code in wanted]

    def statistic(weights: Floats) -> Floats:
        result: Floats = np.mean([metric(ranking, weights) for ranking in rankings], axis=0)
        return result

    return statistic


def _mean(values: NDArray[Any]) -> Statistic:
    column = values.astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        return ratio(weights @ column, weights.sum(axis=1))

    return statistic


def membership(confidence: Floats, edges: Floats) -> Floats:
    """Which bin each row is in, one-hot, (rows, bins)."""
    index = np.searchsorted(edges[1:-1], confidence)
    member: Floats = (index[:, None] == np.arange(len(edges) - 1)).astype(np.float64)
    return member


def ratio(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, nan where bottom is not above 0."""
    result: Floats = np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
    return result
