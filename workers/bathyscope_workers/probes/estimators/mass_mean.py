"""Mass-mean probes: the direction from the mean of one class to that of the other.

After Marks & Tegmark 2023, "The Geometry of Truth" (arXiv 2310.06824), section 4: θ is the difference of the classes'
means, and with `covariance="shrunk"` it is corrected to Σ⁻¹θ, Σ the covariance of the rows around their class's mean;
shrunk (Ledoit-Wolf) here, since with more features than rows it has no inverse. Their probes are on raw states:
`standardize=False`.

Directions alone give no probabilities. Decision values are the log-odds of Gaussian classes with one covariance: Σ in
the corrected probe; in the plain one σ²I, σ² the variance within classes along the differences of the means. The
frequencies of the classes are in the intercepts. With more than two classes each has the score of its own mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bathyscope_workers.probes.estimators._base import Codes, LinearFit, Standardizer, Unpenalised, checked
from bathyscope_workers.probes.estimators._covariance import Covariance, bayes_rule, ledoit_wolf

_FLOOR = 1e-9
"""Variance along the means' differences, relative to these squared, below which classes count as this far apart."""


@dataclass(frozen=True)
class MassMeanEstimator(Unpenalised):
    """The difference of means; there is no penalty to choose."""

    covariance: Literal["none", "shrunk"] = "none"
    """Whether the direction is corrected by the covariance within classes."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows."""

    name: ClassVar[str] = "mass_mean"
    reads: ClassVar[Literal["pooled", "tokens"]] = "pooled"

    def fit_path(self, X: NDArray[np.floating], y: Codes, classes: int) -> list[LinearFit]:
        """Fit states `X` (rows, hidden), any float dtype, to codes `y` (rows,): one fit."""
        X = checked(X, y, classes)
        standardizer = Standardizer.fit(X, scale=self.standardize)
        Z = standardizer.transform(X)
        frequencies = np.bincount(y, minlength=classes) / len(y)
        means = np.stack([Z[y == code].mean(axis=0) for code in range(classes)])  # around 0, the mean of all
        centred = Z - means[y]
        if self.covariance == "shrunk":
            weight, multiple = ledoit_wolf(centred)
            diagonal = np.full(Z.shape[1], weight * multiple)
            coef = Covariance(diagonal, centred * np.sqrt((1 - weight) / len(Z))).solve(means)
        else:
            between = float(frequencies @ np.square(means).sum(axis=1))
            along = float(frequencies @ np.square(centred @ means.T).mean(axis=0))
            coef = means / max(along / between, _FLOOR * between) if between > 0 else means
        return [standardizer.to_raw(*bayes_rule(means, coef, frequencies))]
