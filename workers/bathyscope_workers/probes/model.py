"""A trained probe as a file, and its predictions.

The file is safetensors: `weights` (1 or classes, hidden), `intercept` (1 or classes,), `mean` and `scale` (hidden,),
all float64 and in the space of raw states, so that probabilities are the logistic function (softmax) of
`states @ weights.T + intercept`; `mean` and `scale` record the standardisation it was trained with. Everything else
stands in `__metadata__` as strings. Layout and order are fixed, so that equal probes are equal bytes. Reading and
predicting need numpy and nothing else of the worker's libraries.

Predictions do not depend on what else is predicted: each row's score is summed on its own, in one order, where a
matrix product would choose its order by the shape of the whole batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope.errors import FieldError, InvalidRequest

Floats = NDArray[np.float64]

FORMAT = "bathyscope-probe/1"
"""Value of `format` in the metadata; raised when readers have to change."""

_NAMES = ("weights", "intercept", "mean", "scale")
_CHUNK_BYTES = 8_000_000
_MAX_HEADER = 16_000_000


class ProbeFormatError(ValueError):
    """The bytes are not those of a probe that this version can read."""


@dataclass(frozen=True)
class FittedProbe:
    """A linear probe with everything needed to use it and to know what it was made for."""

    weights: Floats
    """On raw states, (1, hidden) for binary probes (the positive class), else (classes, hidden)."""

    intercept: Floats
    """(1,) or (classes,)."""

    mean: Floats
    """Mean of the rows it was fitted on, (hidden,)."""

    scale: Floats
    """Deviations it was standardised with, (hidden,)."""

    classes: tuple[bool | int | str, ...]
    """In the order of the probabilities; the second of two is the positive class."""

    layer: int
    """The entry of the `hidden_states` tuple it reads."""

    task: str
    """`binary` or `multiclass`."""

    estimator: str
    """What it was learned with."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of the estimator: `C`, `standardize`."""

    identity: dict[str, Any] = field(default_factory=dict)
    """Of the states it was made for: base model, revision, quantization, adapter, pooling and so on."""

    report_sha256: str = ""
    """Digest of the report that was made with it."""

    @property
    def hidden_size(self) -> int:
        """Width of the states it reads."""
        return int(self.weights.shape[1])

    def decision_function(self, states: NDArray[Any]) -> Floats:
        """Log-odds of the positive class (rows,), or a score a class (rows, classes), for states (rows, hidden)."""
        if states.ndim != 2 or states.shape[1] != self.hidden_size:
            raise InvalidRequest(
                f"The probe reads states of width {self.hidden_size}; these are of shape {states.shape}.",
                errors=[FieldError(pointer="/extraction", detail=f"give states of width {self.hidden_size}")],
            )
        scores = np.empty((len(states), len(self.weights)))
        step = max(1, _CHUNK_BYTES // (8 * self.hidden_size))
        for start in range(0, len(states), step):
            part = np.ascontiguousarray(states[start : start + step], dtype=np.float64)
            for column, weights in enumerate(self.weights):
                scores[start : start + step, column] = np.add.reduce(part * weights, axis=1)
        scores += self.intercept
        return scores[:, 0] if len(self.weights) == 1 else scores

    def predict(self, states: NDArray[Any]) -> Floats:
        """Probabilities (rows, classes) for states (rows, hidden) of this probe's layer, any float dtype.

        A row's bits are the same alone and among others. Raises `InvalidRequest` pointing at `/extraction` for
        another hidden size.
        """
        scores = self.decision_function(states)
        if scores.ndim == 1:
            scores = np.stack([-scores / 2, scores / 2], axis=1)
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        result: Floats = powers / powers.sum(axis=1, keepdims=True)
        return result

    def labels(self, probabilities: Floats) -> list[bool | int | str]:
        """The most probable class of each row; the first at a tie."""
        return [self.classes[code] for code in np.argmax(probabilities, axis=1)]

    def to_bytes(self) -> bytes:
        """The safetensors file; equal probes give equal bytes."""
        arrays = [
            np.ascontiguousarray(array, dtype="<f8") for array in (self.weights, self.intercept, self.mean, self.scale)
        ]
        header: dict[str, Any] = {
            "__metadata__": {
                "classes": _compact(list(self.classes)),
                "estimator": self.estimator,
                "format": FORMAT,
                "identity": _compact(self.identity),
                "layer": str(self.layer),
                "report_sha256": self.report_sha256,
                "settings": _compact(self.settings),
                "task": self.task,
            }
        }
        offset = 0
        for name, array in zip(_NAMES, arrays, strict=True):
            span = [offset, offset + array.nbytes]
            header[name] = {"dtype": "F64", "shape": list(array.shape), "data_offsets": span}
            offset += array.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays)])

    def save(self, path: str | Path) -> None:
        """Write `to_bytes()` to `path`."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> FittedProbe:
        """The probe that `to_bytes` wrote. Raises `ProbeFormatError` for anything else."""
        try:
            length = int.from_bytes(data[:8], "little")
            if length > min(_MAX_HEADER, len(data) - 8):
                raise ProbeFormatError("the header is longer than the file")
            header = json.loads(data[8 : 8 + length])
            notes = header["__metadata__"]
            if notes["format"] != FORMAT:
                raise ProbeFormatError(f"the format is {notes['format']!r}; this version reads {FORMAT!r}")
            arrays = {name: _array(data, 8 + length, header[name]) for name in _NAMES}
            probe = cls(
                **arrays,
                classes=tuple(json.loads(notes["classes"])),
                layer=int(notes["layer"]),
                task=notes["task"],
                estimator=notes["estimator"],
                settings=json.loads(notes["settings"]),
                identity=json.loads(notes["identity"]),
                report_sha256=notes["report_sha256"],
            )
        except ProbeFormatError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            raise ProbeFormatError(f"not a probe of {FORMAT!r}: {error!r}") from error
        outputs = 1 if len(probe.classes) == 2 else len(probe.classes)
        expected = ((outputs, probe.mean.size), (outputs,), (probe.mean.size,), (probe.mean.size,))
        if tuple(arrays[name].shape for name in _NAMES) != expected:
            raise ProbeFormatError("the shapes of the tensors do not belong together")
        return probe

    @classmethod
    def load(cls, path: str | Path) -> FittedProbe:
        """Read a file. Raises `ProbeFormatError`, or OSError when it cannot be read."""
        return cls.from_bytes(Path(path).read_bytes())


def _array(data: bytes, base: int, entry: dict[str, Any]) -> Floats:
    if entry["dtype"] != "F64":
        raise ProbeFormatError(f"tensors are F64; one is {entry['dtype']!r}")
    start, stop = entry["data_offsets"]
    if not 0 <= start <= stop <= len(data) - base:
        raise ProbeFormatError("a tensor lies outside the file")
    array: Floats = np.frombuffer(data[base + start : base + stop], dtype="<f8").reshape(entry["shape"])
    return array


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False)
