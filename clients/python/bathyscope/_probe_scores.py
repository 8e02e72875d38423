"""The arithmetic of probes: from hidden states to scores, by numpy alone. `_calibrators` goes on to probabilities.

Each row's score is summed on its own, in one order, where a matrix product would choose its order by the shape of the
whole batch. So a row has the same bits alone and among others, today and after a restart.

Kinds and their tensors, all float64, with `outputs` 1 (binary: the positive class's log-odds; regression: the value) or
the number of classes:

    linear     weights (outputs, hidden), intercept (outputs,); mean and scale (hidden,) record the standardisation that
               the weights, which apply to raw states, have in them already
    mlp        mean, scale (hidden,), hidden_weights (units, hidden), hidden_bias (units,), weights (outputs, units),
               intercept (outputs,): relu(((x - mean) / scale) @ hidden_weights.T + hidden_bias) @ weights.T + intercept
    attention  as linear, and query (hidden,): the tokens' linear scores, averaged with the weights softmax(x @ query)
    max_mean   as linear, and window (1,): means of the tokens' linear scores over that many neighbours (over all tokens
               of a shorter text), and of these the largest

`linear` and `mlp` read one pooled vector an input, the others every token of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Tensors = Mapping[str, Floats]

_CHUNK_BYTES = 8_000_000


@dataclass(frozen=True)
class Kind:
    """A kind of probe: what its file holds, and how it scores."""

    names: tuple[str, ...]
    """Its tensors, in the order of the file."""

    reads: Literal["pooled", "tokens"]
    """`pooled`: a vector an input; `tokens`: every token of it."""

    score: Callable[[Tensors, NDArray[Any]], Floats]
    """Scores (rows, outputs) of states (rows, hidden), a row an input; or one row of all tokens of one input."""

    shapes: Callable[[int, int, Tensors], dict[str, tuple[int, ...]]]
    """What shapes the tensors must have, by outputs, hidden size and the tensors themselves."""


def dots(states: NDArray[Any], weights: Floats) -> Floats:
    """`states @ weights.T`, (rows, outputs), each entry summed alone, for states (rows, hidden) of any float dtype."""
    found = np.empty((len(states), len(weights)))
    step = max(1, _CHUNK_BYTES // (8 * max(1, weights.shape[1])))
    for start in range(0, len(states), step):
        part = np.ascontiguousarray(states[start : start + step], dtype=np.float64)
        for column, row in enumerate(weights):
            found[start : start + step, column] = np.add.reduce(part * row, axis=1)
    return found


def _linear(tensors: Tensors, states: NDArray[Any]) -> Floats:
    found: Floats = dots(states, tensors["weights"]) + tensors["intercept"]
    return found


def _mlp(tensors: Tensors, states: NDArray[Any]) -> Floats:
    units = tensors["hidden_weights"]
    activations = np.empty((len(states), len(units)))
    step = max(1, _CHUNK_BYTES // (8 * units.shape[1]))
    for start in range(0, len(states), step):
        part = (np.asarray(states[start : start + step], dtype=np.float64) - tensors["mean"]) / tensors["scale"]
        activations[start : start + step] = dots(part, units)
    return _linear(tensors, np.maximum(activations + tensors["hidden_bias"], 0.0))


def _attention(tensors: Tensors, states: NDArray[Any]) -> Floats:
    scores = dots(states, tensors["query"][None]).T  # (1, tokens)
    powers = np.exp(scores - scores.max())
    heed = powers / powers.sum()
    return dots(heed, np.ascontiguousarray(_linear(tensors, states).T))


def _max_mean(tensors: Tensors, states: NDArray[Any]) -> Floats:
    scores = _linear(tensors, states)
    width = min(int(tensors["window"][0]), len(scores))
    windows = np.lib.stride_tricks.sliding_window_view(scores, width, axis=0)  # (windows, outputs, width)
    found: Floats = np.add.reduce(np.ascontiguousarray(windows), axis=2).max(axis=0, keepdims=True) / width
    return found


def _linear_shapes(outputs: int, hidden: int, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {"weights": (outputs, hidden), "intercept": (outputs,), "mean": (hidden,), "scale": (hidden,)}


def _mlp_shapes(outputs: int, hidden: int, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    units = tensors["hidden_bias"].size
    return {
        "mean": (hidden,),
        "scale": (hidden,),
        "hidden_weights": (units, hidden),
        "hidden_bias": (units,),
        "weights": (outputs, units),
        "intercept": (outputs,),
    }


KINDS: dict[str, Kind] = {
    "linear": Kind(("weights", "intercept", "mean", "scale"), "pooled", _linear, _linear_shapes),
    "mlp": Kind(
        ("mean", "scale", "hidden_weights", "hidden_bias", "weights", "intercept"), "pooled", _mlp, _mlp_shapes
    ),
    "attention": Kind(
        ("weights", "intercept", "query", "mean", "scale"),
        "tokens",
        _attention,
        lambda outputs, hidden, tensors: {**_linear_shapes(outputs, hidden, tensors), "query": (hidden,)},
    ),
    "max_mean": Kind(
        ("weights", "intercept", "window", "mean", "scale"),
        "tokens",
        _max_mean,
        lambda outputs, hidden, tensors: {**_linear_shapes(outputs, hidden, tensors), "window": (1,)},
    ),
}
"""By the name in the file."""
