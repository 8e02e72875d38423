"""Differences between two variants on the same rows, with intervals of the paired bootstrap.

Every resample draws the same rows (whole clusters) for both, so that what makes a row easy or hard for both cancels;
the interval is of the differences, resample by resample. Intervals of cross-validated differences are widened as those
of the figures are, see `metrics.cross_validation_spread`: Nadeau & Bengio (2003) is about differences.
"""

from __future__ import annotations

import numpy as np

from bathyscope_workers.probes import metrics, regression
from bathyscope_workers.probes.crossval import Plan
from bathyscope_workers.probes.estimators._base import Floats
from bathyscope_workers.probes.metrics import BIASED, Figure, with_interval

CLASSIFIED = ("auroc", "average_precision", "accuracy", "balanced_accuracy", "brier", "nll", "ece")
"""What is compared of classes."""

_BOUNDS = {"brier": 2.0, "nll": np.inf, "r2": np.inf, "mae": np.inf, "spearman": 2.0}

Draws = dict[str, Floats]
"""By metric: its value on the rows as they are, then on every resample."""


def draws_of(predictions: Floats, plan: Plan) -> Draws:
    """The figures of predictions of the held-out rows, and of every resample of them.

    `predictions` are (held-out rows, classes), or values (held-out rows,).
    """
    y = plan.targets.y[plan.folds.held_out]
    if plan.classes:
        known = metrics.statistics_of(y, predictions, strata=plan.strata)
        statistics = {name: known[name] for name in CLASSIFIED}
    else:
        statistics = regression.statistics_of(y, predictions, strata=plan.strata)
    found = {name: [statistic(np.ones((1, len(y))))] for name, statistic in statistics.items()}
    for weights in plan.resamples.chunks():
        for name, statistic in statistics.items():
            found[name].append(statistic(weights))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def differences(reference: Draws, variant: Draws, plan: Plan) -> dict[str, Figure]:
    """Variant minus reference, by metric."""
    found = {}
    for name, first in reference.items():
        change = variant[name] - first
        bound = _BOUNDS.get(name, 1.0)
        found[name] = with_interval(
            float(change[0]),
            change[1:] if len(change) > 1 else None,
            biased=name in BIASED,
            spread=plan.spread,
            lowest=-bound,
            highest=bound,
        )
    return found
