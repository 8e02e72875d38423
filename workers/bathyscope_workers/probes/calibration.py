"""Calibrators: from scores to probabilities that mean what they say, learned from out-of-fold scores.

- `temperature` divides the scores by one number, by maximum likelihood (Guo et al., "On calibration of modern neural
  networks", 2017). One parameter, and the order of classes stays.
- `platt` fits a slope and an offset to the log-odds, by maximum likelihood on Platt's smoothed targets: (n₊ + 1) /
  (n₊ + 2) for positives and 1 / (n₋ + 2) for negatives, which keep separated scores finite (Platt, "Probabilistic
  outputs for support vector machines", 1999). Repairs a shift as well.
- `isotonic` fits any rising step function (Zadrozny & Elkan 2002), by scikit-learn. Repairs any monotone distortion,
  and overfits with few rows: 0 and 1 among its values mean "none seen", not "impossible".

With several classes `platt` and `isotonic` are fitted one against the rest, on each class's log-odds, and normalised.

The scores have to be those of probes that did not see the rows, since a probe's scores on its own training rows are far
too sure. How a calibrator is applied stands in `bathyscope._calibrators`, which a saved probe is read by too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from bathyscope._calibrators import one_against_rest, probabilities
from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_workers.probes.estimators._base import Codes, Floats

METHODS = ("none", "platt", "isotonic", "temperature")

_LOG_TEMPERATURES = (-7.0, 7.0)
"""Between a thousandth and a thousand times the spread of the scores: beyond lies a probe that separates its rows, or
one that says nothing."""

_FLAT = 1e-9
"""Nats: where an end of the range is as good as this, the likelihood has no peak within it."""


@dataclass(frozen=True)
class Calibrator:
    """A fitted map from scores to probabilities."""

    kind: str
    """`platt`, `isotonic` or `temperature`."""

    arrays: dict[str, Floats]
    """Its numbers, by the names of `bathyscope._calibrators`."""

    rows: int
    """Rows it was fitted on."""

    at_bound: bool = False
    """A temperature's search ended at an end of its range: the likelihood goes on rising beyond."""

    def apply(self, scores: Floats) -> Floats:
        """Probabilities (rows, classes) of log-odds (rows,) or of one score a class (rows, classes)."""
        return probabilities(scores, self.record())

    def record(self) -> dict[str, Any]:
        """What a probe's file holds: `kind` and the arrays."""
        return {"kind": self.kind, **self.arrays}

    def summary(self) -> dict[str, Any]:
        """What a report says of it: its parameters, or the number of an isotonic function's points."""
        if self.kind == "isotonic":
            return {"kind": self.kind, "points": len(self.arrays["x"]), "rows": self.rows}
        return {"kind": self.kind, **{name: values.tolist() for name, values in self.arrays.items()}, "rows": self.rows}


def check_calibration(method: str, task: str) -> str:
    """The method. Raises `InvalidRequest` pointing at `/calibration` for one that is not there, or for regression."""
    if method not in METHODS:
        detail = f"use {', '.join(METHODS[:-1])} or {METHODS[-1]}"
        raise InvalidRequest(
            f"There is no calibration {method!r}.", errors=[FieldError(pointer="/calibration", detail=detail)]
        )
    if method != "none" and task == "regression":
        raise InvalidRequest(
            "A regression gives values and no probabilities that could be calibrated.",
            errors=[FieldError(pointer="/calibration", detail="use none with regression")],
        )
    return method


def fit_calibrator(method: str, scores: Floats, y: Codes) -> Calibrator:
    """Fit to `scores` (rows,) | (rows, classes) of rows that the probe behind them did not see, and codes `y`."""
    if method == "temperature":
        temperature, at_bound = _temperature(scores, y)
        return Calibrator("temperature", {"temperature": np.array([temperature])}, len(y), at_bound)
    columns = one_against_rest(scores)
    positives = [y == 1] if columns.shape[1] == 1 else [y == k for k in range(columns.shape[1])]
    if method == "platt":
        lines = [_platt(columns[:, k], positive) for k, positive in enumerate(positives)]
        slope, intercept = (np.array(part, dtype=np.float64) for part in zip(*lines, strict=True))
        return Calibrator("platt", {"slope": slope, "intercept": intercept}, len(y))
    if method != "isotonic":
        raise ValueError(f"there is no calibration {method!r}")
    x, values, offsets = [], [], [0]
    for k, positive in enumerate(positives):
        fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(columns[:, k], positive)
        x.append(np.asarray(fitted.X_thresholds_, dtype=np.float64))
        values.append(np.asarray(fitted.y_thresholds_, dtype=np.float64))
        offsets.append(offsets[-1] + len(x[-1]))
    arrays = {"x": np.concatenate(x), "y": np.concatenate(values), "offsets": np.array(offsets, dtype=np.float64)}
    return Calibrator("isotonic", arrays, len(y))


def _temperature(scores: Floats, y: Codes) -> tuple[float, bool]:
    """The temperature of the highest likelihood, and whether it is an end of the range.

    Its logarithm is searched, where the likelihood has one peak.
    """
    rows = np.arange(len(y))
    pair = np.stack([-scores / 2, scores / 2], axis=1) if scores.ndim == 1 else scores
    shifted = pair - pair.max(axis=1, keepdims=True)
    spread = float(shifted.std()) or 1.0
    shifted /= spread

    def loss(log_temperature: float) -> float:
        divided = shifted / np.exp(log_temperature)
        return float(np.mean(np.log(np.exp(divided).sum(axis=1)) - divided[rows, y]))

    found = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-8})
    at_bound = min(loss(end) for end in _LOG_TEMPERATURES) - found.fun < _FLAT
    return float(np.exp(found.x)) * spread, bool(at_bound)


def _platt(values: Floats, positive: Codes) -> tuple[float, float]:
    """(slope, intercept) by maximum likelihood on Platt's targets, on standardised values."""
    count = float(np.sum(positive))
    targets = np.where(positive, (count + 1) / (count + 2), 1 / (len(values) - count + 2))
    centre, spread = float(values.mean()), float(values.std())
    spread = spread if spread > 0 else 1.0
    z = (values - centre) / spread

    def loss(parameters: Floats) -> tuple[float, Floats]:
        logits = parameters[0] * z + parameters[1]
        excess = expit(logits) - targets
        value = float(np.mean(np.logaddexp(0.0, logits) - targets * logits))
        return value, np.array([np.mean(excess * z), np.mean(excess)])

    base = float(targets.mean())
    start = np.array([0.0, np.log(base / (1 - base))])
    found = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(found[0] / spread), float(found[1] - found[0] * centre / spread)
