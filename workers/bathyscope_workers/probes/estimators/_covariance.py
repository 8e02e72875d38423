"""Shrunk covariances of states, solved on the smaller side.

Hidden states have more features than a probe has rows, so a covariance has to be shrunk to be inverted, and it is the
sum of a diagonal and of few outer products. Its inverse is then applied among the rows (Woodbury's identity), which
costs rows² features where factorising the matrix itself costs features³/3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, lstsq

from bathyscope_workers.probes.estimators._base import Floats

_FLOOR = 1e-12


@dataclass(frozen=True)
class Covariance:
    """diag(`diagonal`) + `factor`ᵀ `factor`."""

    diagonal: Floats
    """(hidden,)."""

    factor: Floats
    """(rows, hidden)."""

    def solve(self, M: Floats) -> Floats:
        """Each row of `M` (k, hidden) times the inverse."""
        rows, hidden = self.factor.shape
        if rows >= hidden:
            dense = np.diag(self.diagonal) + self.factor.T @ self.factor
            try:
                solved: Floats = cho_solve(cho_factor(dense, lower=True, check_finite=False), M.T, check_finite=False).T
            except LinAlgError:  # nothing was shrunk, and features repeat each other: the shortest solution
                solved = lstsq(dense, M.T, check_finite=False)[0].T
            return solved
        variance = float(np.mean(self.diagonal + np.square(self.factor).sum(axis=0)))
        diagonal = np.maximum(self.diagonal, _FLOOR * variance if variance > 0 else 1.0)
        scaled = self.factor / diagonal
        inner = np.eye(rows) + scaled @ self.factor.T
        among_rows = cho_solve(cho_factor(inner, lower=True, check_finite=False), scaled @ M.T, check_finite=False)
        found: Floats = M / diagonal - among_rows.T @ scaled
        return found


def bayes_rule(means: Floats, coef: Floats, frequencies: Floats) -> tuple[Floats, Floats]:
    """(weights, intercepts) of the log-odds of Gaussian classes with one covariance; of two classes, of the second.

    `coef` (classes, hidden) are the classes' `means` times the inverse covariance, `frequencies` (classes,) their
    priors.
    """
    intercept = np.log(frequencies) - (means * coef).sum(axis=1) / 2
    if len(means) == 2:
        return coef[1:] - coef[:1], intercept[1:] - intercept[:1]
    return coef, intercept


def ledoit_wolf(centred: Floats) -> tuple[float, float]:
    """The weight of the identity and its multiple, for rows (rows, hidden) around their mean.

    The shrunk covariance is (1 - weight) S + weight * multiple * I (Ledoit & Wolf 2004, "A well-conditioned estimator
    for large-dimensional covariance matrices"), as `sklearn.covariance.ledoit_wolf` has it; |S|² is the same among the
    rows and among the features. With one feature there is nothing to shrink.
    """
    rows, hidden = centred.shape
    multiple = float(np.square(centred).sum() / (rows * hidden))
    if hidden == 1:
        return 0.0, multiple
    inner = centred @ centred.T if rows < hidden else centred.T @ centred
    total = float(np.square(inner).sum()) / rows**2
    spread = float(np.square(np.square(centred).sum(axis=1)).sum()) / rows
    noise = (spread - total) / (rows * hidden)
    distance = (total - hidden * multiple**2) / hidden
    noise = min(noise, distance)
    return (noise / distance if noise > 0 else 0.0), multiple
