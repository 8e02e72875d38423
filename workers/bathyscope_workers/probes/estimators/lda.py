"""Linear discriminant analysis with Ledoit-Wolf shrinkage.

What `LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")` of scikit-learn computes: the covariance within each
class is shrunk (on features scaled by their deviation within the class), the classes' covariances are averaged by their
frequencies, and Bayes' rule for Gaussians with that covariance gives linear scores with the logarithms of the
frequencies in the intercepts. scikit-learn solves for the features' covariance by singular values, which takes seconds
at 2,048 features; the same numbers come from among the rows (`_covariance`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Codes, Floats, LinearFit, Standardizer, Unpenalised, checked
from bathyscope_workers.probes.estimators._covariance import Covariance, bayes_rule, ledoit_wolf


@dataclass(frozen=True)
class LDAEstimator(Unpenalised):
    """Shrunk linear discriminant analysis; there is no penalty to choose."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows. Shrinkage scales features itself: this changes
    little."""

    name: ClassVar[str] = "lda"
    reads: ClassVar[Literal["pooled", "tokens"]] = "pooled"

    def fit_path(self, X: NDArray[np.floating], y: Codes, classes: int) -> list[LinearFit]:
        """Fit states `X` (rows, hidden), any float dtype, to codes `y` (rows,): one fit."""
        X = checked(X, y, classes)
        standardizer = Standardizer.fit(X, scale=self.standardize)
        Z = standardizer.transform(X)
        frequencies = np.bincount(y, minlength=classes) / len(y)
        means = np.stack([Z[y == code].mean(axis=0) for code in range(classes)])
        coef = _within(Z, y, frequencies).solve(means)
        return [standardizer.to_raw(*bayes_rule(means, coef, frequencies))]


def _within(Z: Floats, y: Codes, frequencies: Floats) -> Covariance:
    diagonal = np.zeros(Z.shape[1])
    factor = np.empty_like(Z)
    for code, frequency in enumerate(frequencies):
        members = y == code
        own = Standardizer.fit(Z[members])
        centred = own.transform(Z[members])
        weight, multiple = ledoit_wolf(centred)
        diagonal += frequency * weight * multiple * np.square(own.scale)
        factor[members] = centred * own.scale * np.sqrt(frequency * (1 - weight) / len(centred))
    return Covariance(diagonal, factor)
