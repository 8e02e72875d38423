"""Fitting the training sides of several folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Estimator, Fit
from bathyscope_workers.probes.estimators.logistic import LogisticEstimator


def fit_folds(
    estimator: Estimator, X: Any, y: NDArray[Any], classes: int, trainings: Sequence[NDArray[np.int64]]
) -> Sequence[Sequence[Fit]]:
    """`estimator.fit_path(X[rows], y[rows], classes)` for each of `trainings` (arrays of rows), in their order.

    Estimators whose training sets can share work do so; the numbers are those of separate fits up to their tolerance.
    """
    if isinstance(estimator, LogisticEstimator):
        return estimator.fit_folds(X, y, classes, trainings)
    return [estimator.fit_path(X[rows], y[rows], classes) for rows in trainings]
