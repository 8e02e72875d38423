"""A small multi-layer perceptron: one hidden layer of rectified units, by scikit-learn.

Up to `FEW` training rows the penalised loss is minimised by L-BFGS: minibatches of so few rows make too few steps an
epoch, and a tenth of them tells too little, to say when to end. With more rows Adam on minibatches, with weight decay,
until the score on a tenth of the training rows has not risen for a while (`early_stopping`); the weights of the best
epoch are kept. That tenth is drawn from the training rows by the seed, stratified by class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.neural_network import MLPClassifier, MLPRegressor

from bathyscope_workers.probes.estimators._base import Floats, Penalised, Standardizer, checked, probabilities

DEFAULT_MLP_C = (1.0,)
"""Of standardised states; 1 / C is scikit-learn's alpha."""

UNITS = 64
_MAX_EPOCHS = 500
FEW = 2000
"""Training rows up to which all of them make every step."""

_ROUND = 100
_MAX_ROUNDS = 10
_LEAST_GAIN = 0.01
"""L-BFGS ends when its gradient is small, or when a round of steps lowers the loss by less than this share: at the
kinks of rectified units the gradient need not become small."""

_PATIENCE = 25
"""Epochs of more than `FEW` rows, each of at least ten steps of Adam, that the score may fail to rise."""

_HELD_OUT = 0.1


@dataclass(frozen=True)
class MLPFit:
    """A fitted perceptron.

    Decision values are `relu(((X - mean) / scale) @ hidden_weights.T + hidden_bias) @ weights.T + intercept`; of binary
    and regression probes, which have one output, without the column.
    """

    mean: Floats
    """Mean of the training rows, (hidden,)."""

    scale: Floats
    """What a feature is divided by, (hidden,)."""

    hidden_weights: Floats
    """(units, hidden)."""

    hidden_bias: Floats
    """(units,)."""

    weights: Floats
    """(1 or classes, units)."""

    intercept: Floats
    """(1 or classes,)."""

    converged: bool = True
    """Whether training ended by itself, before the last step or epoch allowed."""

    kind: ClassVar[str] = "mlp"

    def decision_function(self, X: NDArray[Any]) -> Floats:
        """Log-odds of the positive class (rows,), one score a class (rows, classes), or predicted values (rows,)."""
        active = np.maximum(((X - self.mean) / self.scale) @ self.hidden_weights.T + self.hidden_bias, 0.0)
        scores: Floats = active @ self.weights.T + self.intercept
        return scores[:, 0] if len(self.weights) == 1 else scores

    def predict_proba(self, X: NDArray[Any]) -> Floats:
        """Probabilities, (rows, classes)."""
        return probabilities(self.decision_function(X))

    def tensors(self) -> dict[str, Floats]:
        """The six arrays of the formula."""
        return {
            "mean": self.mean,
            "scale": self.scale,
            "hidden_weights": self.hidden_weights,
            "hidden_bias": self.hidden_bias,
            "weights": self.weights,
            "intercept": self.intercept,
        }


@dataclass(frozen=True)
class MLPEstimator(Penalised):
    """A perceptron on standardised states, one fit for each `C`."""

    C: tuple[float, ...] = DEFAULT_MLP_C
    """Inverse strengths of the weight decay."""

    standardize: bool = True
    """Divide each feature by its deviation over the training rows."""

    seed: int = 0
    """Of the first weights, the minibatches and the rows that end training."""

    name: ClassVar[str] = "mlp"
    reads: ClassVar[Literal["pooled", "tokens"]] = "pooled"

    def fit_path(self, X: NDArray[np.floating], y: NDArray[Any], classes: int) -> list[MLPFit]:
        """Fit states `X` (rows, hidden), any float dtype, to codes or values `y` (rows,): one fit for each C."""
        X = checked(X, y, classes)
        standardizer = Standardizer.fit(X, scale=self.standardize)
        Z = standardizer.transform(X).astype(np.float32)
        return [self._fit(Z, y, classes, strength, standardizer) for strength in self.C]

    def _fit(self, Z: NDArray[Any], y: NDArray[Any], classes: int, C: float, standardizer: Standardizer) -> MLPFit:
        shift, stretch = 0.0, 1.0
        settings = {"hidden_layer_sizes": (UNITS,), "alpha": 1 / C, "random_state": self.seed}
        settings |= _training(y, classes)
        if classes:
            model = MLPClassifier(**settings)
        else:
            model = MLPRegressor(**settings)
            shift, stretch = float(np.mean(y)), float(np.std(y)) or 1.0
            y = (y - shift) / stretch
        converged = _train(model, Z, y)
        first, second = (np.ascontiguousarray(weights.T, dtype=np.float64) for weights in model.coefs_)
        bias, intercept = (values.astype(np.float64) for values in model.intercepts_)
        return MLPFit(
            standardizer.mean,
            standardizer.scale,
            first,
            bias,
            stretch * second,
            stretch * intercept + shift,
            converged=converged,
        )


def _training(y: NDArray[Any], classes: int) -> dict[str, Any]:
    """How scikit-learn's model is trained on these rows."""
    if len(y) <= FEW:
        return {"solver": "lbfgs", "tol": 1e-3, "max_iter": _ROUND, "warm_start": True}
    # Stratified by class, the tenth needs a row of every class on both sides.
    spared = not classes or (np.bincount(y).min() >= 2 and _HELD_OUT * len(y) >= classes)
    return {
        "solver": "adam",
        "max_iter": _MAX_EPOCHS,
        "tol": 1e-4,
        "n_iter_no_change": _PATIENCE,
        "validation_fraction": _HELD_OUT,
        "early_stopping": spared,
    }


def _train(model: Any, Z: NDArray[Any], y: NDArray[Any]) -> bool:
    """Fit the model; whether it came to an end by itself."""
    if model.solver == "adam":
        return bool(model.fit(Z, y).n_iter_ < _MAX_EPOCHS)
    before = float("inf")
    for _ in range(_MAX_ROUNDS):
        model.fit(Z, y)
        if model.n_iter_ < _ROUND or model.loss_ > (1 - _LEAST_GAIN) * before:
            return True
        before = model.loss_
    return False
