"""The interface of estimators, and what every linear one gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


class Estimator(Protocol):
    """Learns probes from states of one layer, one for each penalty it was made with."""

    @property
    def name(self) -> str:
        """What the API calls it."""
        ...

    @property
    def penalties(self) -> tuple[float, ...]:
        """The settings among which the sweep chooses; one entry when there is nothing to choose."""
        ...

    def with_penalty(self, penalty: float) -> Estimator:
        """The same estimator with one of its penalties only."""
        ...

    def fit_path(self, X: Floats, y: Codes, classes: int) -> list[LinearFit]:
        """Fit states `X` (rows, hidden) to codes `y` (rows,) in [0, classes): one fit a penalty, in their order.

        Every class occurs in `y`. Nothing outside these rows is looked at.
        """
        ...


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear probe, in the space of the raw states.

    Binary probes have one row of coefficients, that of the positive class; others one a class.
    """

    coef: Floats
    """Weights on raw (not standardised) states, (1 or classes, hidden)."""

    intercept: Floats
    """(1 or classes,)."""

    mean: Floats
    """Mean of the training rows, (hidden,)."""

    scale: Floats
    """What a standardised feature was divided by, (hidden,); 1 where constant or not standardised."""

    converged: bool = True
    """Whether the solver reached its tolerance."""

    def decision_function(self, X: Floats) -> Floats:
        """Log-odds of the positive class (rows,), or one score a class (rows, classes)."""
        scores: Floats = X @ self.coef.T + self.intercept
        return scores[:, 0] if len(self.coef) == 1 else scores

    def predict_proba(self, X: Floats) -> Floats:
        """Probabilities, (rows, classes)."""
        return probabilities(self.decision_function(X))


@dataclass(frozen=True)
class Standardizer:
    """Mean and population deviation of the rows it was fitted on."""

    mean: Floats
    scale: Floats

    @classmethod
    def fit(cls, X: Floats, *, scale: bool = True) -> Standardizer:
        """Fit to `X` (rows, hidden). A feature that only varies by rounding is constant: its scale is 1.

        With `scale=False` features are centred only, which an unpenalised intercept makes no difference to.
        """
        mean = X.mean(axis=0)
        if not scale:
            return cls(mean, np.ones_like(mean))
        variance = np.square(X - mean).mean(axis=0)
        # The rounding error of the mean, as scikit-learn's StandardScaler bounds it.
        rounding = len(X) * np.finfo(np.float64).eps
        constant = variance <= rounding * variance + np.square(rounding * mean)
        return cls(mean, np.where(constant, 1.0, np.sqrt(variance)))

    def transform(self, X: Floats) -> Floats:
        """Standardised rows."""
        result: Floats = (X - self.mean) / self.scale
        return result

    def to_raw(self, coef: Floats, intercept: Floats, *, converged: bool = True) -> LinearFit:
        """The probe on raw states that equals `coef`, `intercept` on standardised ones."""
        raw = coef / self.scale
        return LinearFit(raw, intercept - raw @ self.mean, self.mean, self.scale, converged)


def probabilities(scores: Floats) -> Floats:
    """Probabilities (rows, classes) of log-odds (rows,) or of one score a class (rows, classes)."""
    if scores.ndim == 1:
        return np.stack([expit(-scores), expit(scores)], axis=1)
    result: Floats = softmax(scores, axis=1)
    return result
