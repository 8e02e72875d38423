"""From a probe's scores to probabilities, with or without a calibrator, by numpy alone.

A calibrator is a *record*: `kind` and float64 arrays, which is how a probe's file holds it.

- `temperature`: `temperature` (1,). Scores are divided by it (Guo et al. 2017).
- `platt`: `slope` and `intercept`, (1,) or (classes,). The probability is the logistic function of
  `slope * score + intercept` (Platt 1999).
- `isotonic`: `x`, `y` and `offsets`. The probability is that of the line through the points (x, y), level beyond the
  ends (Zadrozny & Elkan 2002). With several classes their points follow one another, those of class k from
  `offsets[k]` to `offsets[k + 1]`; else `offsets` is [0, points].

With several classes `platt` and `isotonic` read each class's log-odds against the rest and are normalised to sum 1.
Every operation is on one row alone: a row's bits are the same alone and among others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

KINDS: dict[str, tuple[str, ...]] = {
    "temperature": ("temperature",),
    "platt": ("slope", "intercept"),
    "isotonic": ("x", "y", "offsets"),
}
"""The arrays of each kind, in the order in which a file holds them."""


def probabilities(scores: Floats, calibrator: Mapping[str, Any] | None = None) -> Floats:
    """Probabilities (rows, classes) of log-odds of the second class (rows,), or of one score a class (rows, classes).

    Without a calibrator they are the logistic function, or the softmax, of the scores. Raises ValueError for a
    calibrator of another kind or of another number of classes.
    """
    if calibrator is None:
        return _softmax(scores)
    kind = calibrator["kind"]
    if kind == "temperature":
        return _softmax(scores / float(calibrator["temperature"][0]))
    if kind not in KINDS:
        raise ValueError(f"there is no calibrator {kind!r}")
    columns = one_against_rest(scores)
    outputs = len(calibrator["slope"]) if kind == "platt" else len(calibrator["offsets"]) - 1
    if columns.shape[1] != outputs:
        raise ValueError(f"a calibrator of {outputs} outputs cannot read {columns.shape[1]}")
    read = [_platt(calibrator, k, columns[:, k]) if kind == "platt" else _isotonic(calibrator, k, columns[:, k])
            for k in range(outputs)]  # fmt: skip
    if outputs == 1:
        return np.stack([1.0 - read[0], read[0]], axis=1)
    raised = np.stack(read, axis=1)
    total = raised.sum(axis=1, keepdims=True)
    level = np.full_like(raised, 1.0 / outputs)
    result: Floats = np.divide(raised, total, out=level, where=total > 0)
    return result


def one_against_rest(scores: Floats) -> Floats:
    """What `platt` and `isotonic` read: log-odds as they are (rows, 1), or of each class against the rest.

    Against the rest (rows, classes) they are at most 36.04, where 1 - p is the smallest step from 1.
    """
    if scores.ndim == 1:
        return scores[:, None]
    shifted = scores - scores.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    result: Floats = logs - np.log(np.maximum(-np.expm1(logs), np.finfo(np.float64).eps))
    return result


def _softmax(scores: Floats) -> Floats:
    if scores.ndim == 1:
        scores = np.stack([-scores / 2, scores / 2], axis=1)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: Floats = powers / powers.sum(axis=1, keepdims=True)
    return result


def _platt(calibrator: Mapping[str, Any], k: int, values: Floats) -> Floats:
    result: Floats = _softmax(float(calibrator["slope"][k]) * values + float(calibrator["intercept"][k]))[:, 1]
    return result


def _isotonic(calibrator: Mapping[str, Any], k: int, values: Floats) -> Floats:
    start, stop = int(calibrator["offsets"][k]), int(calibrator["offsets"][k + 1])
    x, y = np.asarray(calibrator["x"][start:stop]), np.asarray(calibrator["y"][start:stop])
    if len(x) == 1:
        return np.full(values.shape, float(y[0]))
    clipped = np.clip(values, x[0], x[-1])
    below = np.clip(np.searchsorted(x, clipped, side="right") - 1, 0, len(x) - 2)
    share = (clipped - x[below]) / (x[below + 1] - x[below])
    result: Floats = np.clip(y[below] + share * (y[below + 1] - y[below]), 0.0, 1.0)
    return result
