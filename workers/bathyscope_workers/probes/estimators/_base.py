"""The interface of estimators, and what every linear one gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


class Fit(Protocol):
    """A fitted probe, in numpy alone: what it was learned with is forgotten.

    The docstring of each kind gives the formula from its tensors to decision values. The way from decision values to
    probabilities is the same for all: the logistic function of one column, the softmax of several (`probabilities`).
    """

    @property
    def kind(self) -> str:
        """The formula: `linear`, `mlp`, `attention` or `max_mean`."""
        ...

    @property
    def converged(self) -> bool:
        """Whether the solver reached its tolerance."""
        ...

    def decision_function(self, X: Any) -> Floats:
        """Log-odds of the positive class (rows,), one score a class (rows, classes), or predicted values (rows,)."""
        ...

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities of the classes, (rows, classes). Means nothing for regression."""
        ...

    def tensors(self) -> dict[str, Floats]:
        """What the formula needs, by name, in a fixed order."""
        ...


class Estimator(Protocol):
    """Learns probes from states of one layer, one for each penalty it was made with."""

    @property
    def name(self) -> str:
        """What the API calls it."""
        ...

    @property
    def reads(self) -> Literal["pooled", "tokens"]:
        """Whether `X` is one vector a row or a `TokenStates`."""
        ...

    @property
    def penalties(self) -> tuple[float, ...]:
        """The settings (inverse strengths C) among which the sweep chooses; one entry when there is nothing to choose,
        nan where the estimator has no penalty."""
        ...

    def with_penalty(self, penalty: float) -> Estimator:
        """The same estimator with one of its penalties only."""
        ...

    def fit_path(self, X: Any, y: NDArray[Any], classes: int) -> Sequence[Fit]:
        """Fit states `X` to `y` (rows,): one fit a penalty, in their order.

        `X` is (rows, hidden) of any float dtype, or a `TokenStates` for an estimator that reads tokens. `y` holds
        codes in [0, classes), each of which occurs; with `classes == 0` it holds float64 values (regression).
        Nothing outside these rows is looked at.
        """
        ...


@dataclass(frozen=True)
class Penalised:
    """An estimator with a penalty: one fit for each `C`."""

    C: tuple[float, ...]
    """Inverse strengths of the penalty."""

    @property
    def penalties(self) -> tuple[float, ...]:
        """The values of C."""
        return self.C

    def with_penalty(self, penalty: float) -> Self:
        """The same with this C alone."""
        return replace(self, C=(penalty,))


class Unpenalised:
    """An estimator without a penalty: one fit."""

    @property
    def penalties(self) -> tuple[float, ...]:
        """None: nan."""
        return (float("nan"),)

    def with_penalty(self, penalty: float) -> Self:
        """Itself."""
        return self


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear probe, in the space of the raw states.

    Decision values are `X @ weights.T + intercept`. Binary and regression probes have one row of weights (that of the
    positive class), and their decision values lose the column; others have one a class.
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

    kind: ClassVar[str] = "linear"

    def decision_function(self, X: Floats) -> Floats:
        """Log-odds of the positive class (rows,), one score a class (rows, classes), or predicted values (rows,)."""
        scores: Floats = X @ self.coef.T + self.intercept
        return scores[:, 0] if len(self.coef) == 1 else scores

    def predict_proba(self, X: Floats) -> Floats:
        """Probabilities, (rows, classes)."""
        return probabilities(self.decision_function(X))

    def tensors(self) -> dict[str, Floats]:
        """`weights` (outputs, hidden), `intercept` (outputs,), and, for the record, `mean` and `scale` (hidden,)."""
        return {"weights": self.coef, "intercept": self.intercept, "mean": self.mean, "scale": self.scale}


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
        same = np.flatnonzero((X[0] == X[-1]) & (X[0] == X[len(X) // 2]))
        same = same[(X[:, same] == X[0, same]).all(axis=0)]
        mean[same] = X[0, same]  # and not their rounded mean, beside which they would vary
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


def checked(X: NDArray[Any], y: NDArray[Any], classes: int) -> Floats:
    """The states in float64. Raises ValueError unless every class occurs among the codes."""
    check_classes(y, classes)
    return np.asarray(X, dtype=np.float64)


def check_classes(y: NDArray[Any], classes: int) -> None:
    """Raise ValueError unless every class occurs among the codes."""
    if classes and len(np.unique(y)) != classes:
        raise ValueError("every class must occur among the training rows")


def probabilities(scores: Floats) -> Floats:
    """Probabilities (rows, classes) of log-odds (rows,) or of one score a class (rows, classes)."""
    if scores.ndim == 1:
        return np.stack([expit(-scores), expit(scores)], axis=1)
    result: Floats = softmax(scores, axis=1)
    return result
