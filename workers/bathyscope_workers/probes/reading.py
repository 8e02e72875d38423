"""What a probe says of stored states: pooled as it reads them, whole and token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope._probe_file import not_finite
from bathyscope.errors import FieldError, InvalidInput
from bathyscope_workers.probes.model import FittedProbe


@dataclass(frozen=True)
class Source:
    """Hidden states of inputs."""

    states: NDArray[Any]
    """(inputs, layers, hidden), or (tokens, layers, hidden) where every token of each input was kept; any float dtype,
    memory-mapped or not."""

    layers: list[int]
    """The numbers of the layers axis."""

    offsets: NDArray[np.int64] | None
    """Where each input's tokens begin and the last one's end, (inputs + 1,); null of pooled states."""

    pointer: str
    """What a fault of an input points at: `/extraction`, or `/inputs` and its number behind."""


def read(
    probe: FittedProbe,
    source: Source,
    *,
    pooling: str,
    positions: Mapping[str, Any] | None,
    threshold: float | None = None,
    per_token: bool = False,
) -> dict[str, Any]:
    """The numbers of a `Reading`: arrays and lists, one entry an input.

    `pooling` and `positions` are those of the states that the probe was made for, and applied here where the source
    kept every token. With `threshold` also `decisions`; with `per_token`, which needs every token, `token_scores`,
    (tokens,) or (tokens, classes). Raises `InvalidInput` for an input that lacks the positions, or whose states are not
    finite.
    """
    states = source.states[:, source.layers.index(probe.layer)]
    if source.offsets is None:
        found = probe.predict(_finite(states, source, probe))
    elif probe.reads == "tokens":
        tokens, offsets = _restricted(states, source, positions)
        found = probe.predict(_finite(tokens, source, probe, offsets), offsets)
    else:
        found = probe.predict(_finite(_pooled(states, source, pooling, positions), source, probe))
    if probe.task == "regression":
        numbers: dict[str, Any] = {"values": found}
    else:
        numbers = {"probabilities": found, "labels": probe.labels(found)}
        if threshold is not None:
            numbers["decisions"] = probe.decisions(found, threshold)
    if per_token:
        scores = probe.predict_tokens(_finite(states, source, probe, source.offsets))
        numbers["token_scores"] = np.ascontiguousarray(scores[:, 1]) if probe.task == "binary" else scores
    return numbers


def _finite(
    states: NDArray[Any], source: Source, probe: FittedProbe, offsets: NDArray[np.int64] | None = None
) -> NDArray[Any]:
    """The states (rows, hidden) as they are; `offsets` say which input's tokens the rows are, else each is an input."""
    row = not_finite(states)
    if row is None:
        return states
    if offsets is not None:
        row = int(np.searchsorted(offsets, row, side="right")) - 1
    detail = f"input {row} overflows: leave it out, or extract in float32 or bfloat16 and train the probe on that"
    raise InvalidInput(
        f"The states of input {row} at layer {probe.layer} are not all finite.",
        errors=[FieldError(pointer=_pointer(source, row), detail=detail)],
    )


def _pointer(source: Source, row: int) -> str:
    return source.pointer if source.pointer == "/extraction" else f"{source.pointer}/{row}"


def _pooled(
    states: NDArray[Any], source: Source, pooling: str, positions: Mapping[str, Any] | None
) -> NDArray[np.float32]:
    """One vector an input, as an extraction with that pooling makes it; means are taken in float64."""
    assert source.offsets is not None
    result = np.empty((len(source.offsets) - 1, states.shape[1]), np.float32)
    for row, start in enumerate(source.offsets[:-1].tolist()):
        places = _places(source, row, positions)
        begin, end = start + int(places[0]), start + int(places[-1]) + 1
        match pooling:
            case "last":
                result[row] = states[end - 1]
            case "first":
                result[row] = states[begin]
            case "max":
                result[row] = states[begin:end].max(axis=0)
            case "mean":
                result[row] = states[begin:end].mean(axis=0, dtype=np.float64)
            case _:
                raise ValueError(f"a pooled probe cannot be of pooling {pooling}")
    return result


def _restricted(
    states: NDArray[Any], source: Source, positions: Mapping[str, Any] | None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The tokens that count, and where each input's begin."""
    assert source.offsets is not None
    if positions is None:
        return states, source.offsets
    kept = [start + _places(source, row, positions) for row, start in enumerate(source.offsets[:-1].tolist())]
    return states[np.concatenate(kept)], np.cumsum([0, *(len(one) for one in kept)])


def _places(source: Source, row: int, positions: Mapping[str, Any] | None) -> NDArray[np.int64]:
    """Which tokens of an input count, from its first."""
    assert source.offsets is not None
    length = int(source.offsets[row + 1] - source.offsets[row])
    if positions and positions.get("tokens") is not None:
        places = np.array([one + length if one < 0 else one for one in positions["tokens"]], dtype=np.int64)
    elif positions and positions.get("span") is not None:
        first, last = positions["span"]
        begin = first + length if first < 0 else first
        end = length if last is None else last + length if last < 0 else last
        places = np.arange(begin, end) if begin >= 0 and end <= length else np.array([-1])
    else:
        places = np.arange(length)
    if not places.size or places.min() < 0 or places.max() >= length:
        raise InvalidInput(
            f"Input {row} lacks the positions that the probe reads.",
            errors=[
                FieldError(pointer=_pointer(source, row), detail=f"input {row} has {length} tokens; give a longer one")
            ],
        )
    return places
