"""Ridge regression, on values or on classes.

The objective is half the squared error times C plus half the squared norm of the weights, intercept unpenalised:
`sklearn.linear_model.Ridge(alpha=1 / C)`. All penalties share one Gram matrix, on the smaller side.

Classes are learned one against the rest on targets of +1 and -1, as `RidgeClassifier` does. Its scores f estimate
2 P(class) - 1 and know no bounds, so probabilities are their softmax; with two classes the scores are f and -f, and the
positive class's log-odds 2f. That is the logistic function that agrees with (1 + f) / 2 in value and slope at f = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh

from bathyscope_workers.probes.estimators._base import Floats, LinearFit, Penalised, Standardizer, checked

DEFAULT_RIDGE_C = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Squared errors have no scale of their own, so there is no one good strength."""


@dataclass(frozen=True)
class RidgeEstimator(Penalised):
    """L2-penalised least squares on standardised states, one fit for each `C`."""

    C: tuple[float, ...] = DEFAULT_RIDGE_C
    """Inverse strengths of the penalty, 1 / alpha."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows."""

    name: ClassVar[str] = "ridge"
    reads: ClassVar[Literal["pooled", "tokens"]] = "pooled"

    def fit_path(self, X: NDArray[np.floating], y: NDArray[np.generic], classes: int) -> list[LinearFit]:
        """Fit states `X` (rows, hidden), any float dtype, to codes or values `y` (rows,): one fit for each C."""
        X = checked(X, y, classes)
        standardizer = Standardizer.fit(X, scale=self.standardize)
        Z = standardizer.transform(X)
        targets = _targets(y, classes)
        mean = targets.mean(axis=0)
        wide = Z.shape[0] < Z.shape[1]
        gram = Z @ Z.T if wide else Z.T @ Z
        right = targets - mean if wide else Z.T @ (targets - mean)
        fits = []
        for strength in self.C:
            solved = _solve(gram, right, 1 / strength)
            coef = (Z.T @ solved if wide else solved).T
            scale = 2.0 if classes == 2 else 1.0
            fits.append(standardizer.to_raw(scale * coef, scale * mean))
        return fits


def _targets(y: NDArray[np.generic], classes: int) -> Floats:
    if not classes:
        return y.astype(np.float64)[:, None]
    columns = np.array([1]) if classes == 2 else np.arange(classes)
    return np.where(y[:, None] == columns, 1.0, -1.0)


def _solve(gram: Floats, right: Floats, alpha: float) -> Floats:
    """(gram + alpha I)⁻¹ right."""
    shifted = gram.copy()
    shifted[np.diag_indices_from(shifted)] += alpha
    try:
        solved: Floats = cho_solve(cho_factor(shifted, lower=True, check_finite=False), right, check_finite=False)
    except LinAlgError:  # alpha drowns in the rounding of the largest eigenvalue
        values, vectors = eigh(gram, check_finite=False)
        solved = vectors @ ((vectors.T @ right) / (np.maximum(values, 0.0) + alpha)[:, None])
    return solved
