"""A trained probe as a file, and its predictions, with numpy alone.

The file is safetensors, every tensor float64. Which tensors there are says its `kind`, see `_probe_scores`; those of a
calibrator follow as `calibrator.<name>`. Everything else stands in `__metadata__` as strings. Layout and order are
fixed, so that equal probes are equal bytes. `bathyscope-probe/1` held linear probes without a calibrator and is read.

A file may come from anyone: nothing in it is believed before it is checked, and nothing in it can run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bathyscope import _calibrators
from bathyscope._probe_scores import KINDS, Floats, Kind
from bathyscope.errors import FieldError, InvalidRequest, ProbeFormatError

FORMAT = "bathyscope-probe/2"
"""Value of `format` in the metadata; raised when readers have to change."""

_FIRST_FORMAT = "bathyscope-probe/1"
_MAX_HEADER = 4_000_000
_MAX_BYTES = 2**30
_MAX_HIDDEN, _MAX_CLASSES, _MAX_TEXT, _MAX_LAYER = 2**20, 4096, 4096, 100_000
_PREFIX = "calibrator."
_CHECKED_AT_ONCE = 1_000_000
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")

Label = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class FittedProbe:
    """A probe with everything needed to use it and to know what it was made for."""

    kind: str
    """`linear`, `mlp`, `attention` or `max_mean`."""

    tensors: Mapping[str, Floats]
    """By name, see `_probe_scores`."""

    calibrator: Mapping[str, Any] | None = None
    """`kind` and arrays, see `_calibrators`; null when probabilities are the softmax of the scores."""

    classes: tuple[Label, ...]
    """In the order of the probabilities; the second of two is the positive class. None of a regression."""

    layer: int
    """The entry of the `hidden_states` tuple it reads."""

    task: str
    """`binary`, `multiclass` or `regression`."""

    estimator: str
    """What it was learned with."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the estimator, as `C` and `standardize`."""

    identity: Mapping[str, Any] = field(default_factory=dict)
    """Of the states it was made for: base model, revision, quantization, adapter, pooling and so on."""

    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of the positive class's probability, by name: `default`, `target_fpr`, `youden`, `f1`."""

    report_sha256: str = ""
    """Digest of the report that was made with it."""

    @property
    def outputs(self) -> int:
        """Scores of one input: 1, or with three classes and more one a class."""
        return len(self.classes) if self.task == "multiclass" else 1

    @property
    def hidden_size(self) -> int:
        """Width of the states it reads."""
        return int(self.tensors["mean"].size)

    @property
    def reads(self) -> str:
        """`pooled`: one vector an input; `tokens`: every token of it."""
        return self._kind.reads

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    def decision_function(self, states: NDArray[Any], offsets: Sequence[int] | NDArray[Any] | None = None) -> Floats:
        """Log-odds of the positive class (rows,), a score a class (rows, classes), or values of a regression (rows,).

        `states` are (rows, hidden), of any float dtype. A probe on tokens reads (tokens, hidden) and `offsets`
        (rows + 1,), where each input's tokens begin and the last one's end. Raises `InvalidRequest`.
        """
        states = np.asarray(states)
        if states.dtype.kind in "OSUcmMb":
            raise _refused("The states are no numbers.", "give states of a float dtype")
        if states.ndim != 2 or states.shape[1] != self.hidden_size:
            raise _refused(
                f"The probe reads states of width {self.hidden_size}; these are of shape {states.shape}.",
                f"give states of width {self.hidden_size}",
            )
        if self.reads == "pooled" and offsets is not None:
            raise _refused("The probe reads one vector an input.", "give pooled states, and no offsets")
        bounds = None if self.reads == "pooled" else _bounds(offsets, len(states))
        if (row := not_finite(states)) is not None:
            raise _refused(f"In row {row} of the states a number is not finite.", "give states that are finite")
        with np.errstate(over="ignore", invalid="ignore"):
            if bounds is None:
                scores = self._kind.score(self.tensors, states)
            else:
                parts = [self._kind.score(self.tensors, states[start:stop]) for start, stop in pairwise(bounds)]
                scores = np.concatenate(parts) if parts else np.empty((0, self.outputs))
        if not np.isfinite(scores).all():
            raise _refused("The probe's scores of these states are too large for numbers.", "give smaller states")
        return self._flat(scores)

    def predict(self, states: NDArray[Any], offsets: Sequence[int] | NDArray[Any] | None = None) -> Floats:
        """Calibrated probabilities (rows, classes), or values of a regression (rows,); see `decision_function`.

        `states` are those of this probe's layer. A row's bits are the same alone and among others.
        """
        return self._read(self.decision_function(states, offsets))

    def predict_tokens(self, states: NDArray[Any]) -> Floats:
        """What the probe says of each token of states (tokens, hidden), as if its input had no other.

        (tokens, classes) of probabilities, or (tokens,) of values. A probe on pooled states is applied to each token's
        own state: it was not trained on those, so take the scores as a reading, not as calibrated probabilities.
        """
        offsets = None if self.reads == "pooled" else range(len(states) + 1)
        return self._read(self.decision_function(states, offsets))

    def labels(self, probabilities: Floats) -> list[Label]:
        """The most probable class of each row; the first at a tie. None of a regression."""
        if self.task == "regression":
            return []
        return [self.classes[code] for code in np.argmax(probabilities, axis=1)]

    def decisions(self, probabilities: Floats, threshold: float | str = "default") -> list[Label]:
        """The class of each row at a threshold of the positive class's probability, a number or a name in `thresholds`.

        Raises `InvalidRequest` for a probe that is not binary, or lacks the threshold.
        """
        if self.task != "binary":
            raise InvalidRequest("Only a binary probe has thresholds; `labels` gives the most probable class.")
        if isinstance(threshold, str):
            if threshold not in self.thresholds:
                known = ", ".join(self.thresholds) or "none"
                raise InvalidRequest(
                    f"The probe has no threshold {threshold!r}; it has {known}: give one, or a number."
                )
            threshold = self.thresholds[threshold]
        return [self.classes[int(value >= threshold)] for value in probabilities[:, 1]]

    def _flat(self, scores: Floats) -> Floats:
        return scores[:, 0] if self.outputs == 1 else scores

    def _read(self, scores: Floats) -> Floats:
        return scores if self.task == "regression" else _calibrators.probabilities(scores, self.calibrator)

    # --- the file ---

    def to_bytes(self) -> bytes:
        """The safetensors file; equal probes give equal bytes. Raises ValueError for a probe that is none."""
        check(self)
        arrays = {name: self.tensors[name] for name in self._kind.names}
        if self.calibrator is not None:
            names = _calibrators.KINDS[self.calibrator["kind"]]
            arrays |= {_PREFIX + name: np.atleast_1d(self.calibrator[name]) for name in names}
        header: dict[str, Any] = {
            "__metadata__": {
                "calibration": "none" if self.calibrator is None else self.calibrator["kind"],
                "classes": _compact(list(self.classes)),
                "estimator": self.estimator,
                "format": FORMAT,
                "identity": _compact(dict(self.identity)),
                "kind": self.kind,
                "layer": str(self.layer),
                "report_sha256": self.report_sha256,
                "settings": _compact(dict(self.settings)),
                "task": self.task,
                "thresholds": _compact(dict(self.thresholds)),
            }
        }
        parts: list[bytes] = []
        offset = 0
        for name, array in arrays.items():
            content = np.ascontiguousarray(array, dtype="<f8")
            span = [offset, offset + content.nbytes]
            header[name] = {"dtype": "F64", "shape": list(content.shape), "data_offsets": span}
            offset += content.nbytes
            parts.append(content.tobytes())
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return b"".join([len(text).to_bytes(8, "little"), text, *parts])

    def save(self, path: str | Path) -> None:
        """Write `to_bytes()` to `path`."""
        Path(path).write_bytes(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> FittedProbe:
        """The probe that `to_bytes` wrote. Raises `ProbeFormatError` for anything else."""
        try:
            return _parse(data)
        except ProbeFormatError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise ProbeFormatError(f"not a probe of {FORMAT!r}: {error!r}"[:500]) from error

    @classmethod
    def load(cls, path: str | Path) -> FittedProbe:
        """Read a file. Raises `ProbeFormatError`, or OSError when it cannot be read."""
        with Path(path).open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        return cls.from_bytes(data)


def not_finite(states: NDArray[Any]) -> int | None:
    """The first row of states (rows, hidden) that holds NaN or an infinity; null when there is none."""
    step = max(1, _CHECKED_AT_ONCE // max(1, states.shape[1]))
    for start in range(0, len(states), step):
        finite = np.isfinite(states[start : start + step]).all(axis=1)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def thresholds_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The thresholds of a probe's report by name, without what the report says of them."""
    given = report.get("thresholds") or {}
    flat: dict[str, Any] = {
        name: one.get("threshold") if isinstance(one, Mapping) else one for name, one in given.items()
    }
    return {name: float(value) for name, value in flat.items() if _is_number(value)}


def check(probe: FittedProbe) -> None:
    """Raise `ProbeFormatError` unless the parts of a probe belong together and every number is finite."""
    if probe.kind not in KINDS:
        raise ProbeFormatError(f"there is no kind {str(probe.kind)[:40]!r}; it is one of {', '.join(KINDS)}")
    expected = {"binary": (2, 2), "multiclass": (3, _MAX_CLASSES), "regression": (0, 0)}.get(probe.task)
    if expected is None or not expected[0] <= len(probe.classes) <= expected[1]:
        raise ProbeFormatError(f"a task {str(probe.task)[:40]!r} with {len(probe.classes)} classes is none")
    if not all(_is_label(label) for label in probe.classes) or len(set(probe.classes)) != len(probe.classes):
        raise ProbeFormatError("classes are booleans, numbers or short strings, each once")
    if not 0 <= probe.layer <= _MAX_LAYER:
        raise ProbeFormatError(f"there is no layer {probe.layer}")
    if set(probe.tensors) != set(KINDS[probe.kind].names):
        raise ProbeFormatError(f"a probe of kind {probe.kind} holds {', '.join(KINDS[probe.kind].names)}")
    hidden = probe.hidden_size
    if not 1 <= hidden <= _MAX_HIDDEN:
        raise ProbeFormatError(f"no states are {hidden} numbers wide")
    for name, shape in KINDS[probe.kind].shapes(probe.outputs, hidden, probe.tensors).items():
        if probe.tensors[name].shape != shape:
            raise ProbeFormatError(f"the tensor {name} is of shape {probe.tensors[name].shape}, not {shape}")
    if not all(np.isfinite(array).all() for array in probe.tensors.values()):
        raise ProbeFormatError("a tensor holds a number that is not finite")
    if not (probe.tensors["scale"] > 0).all():
        raise ProbeFormatError("a scale is not above 0")
    if "window" in probe.tensors and not 1 <= probe.tensors["window"][0] <= 2**31:
        raise ProbeFormatError("the window is not a number of tokens")
    if not all(_is_number(value) and 0 <= value <= 1 for value in probe.thresholds.values()):
        raise ProbeFormatError("a threshold is not a number from 0 to 1")
    if probe.calibrator is not None:
        _check_calibrator(probe)


def _check_calibrator(probe: FittedProbe) -> None:
    record = probe.calibrator or {}
    kind, outputs = record.get("kind"), probe.outputs
    names = _calibrators.KINDS.get(str(kind))
    if names is None or probe.task == "regression" or set(record) != {"kind", *names}:
        raise ProbeFormatError(f"there is no calibrator {str(kind)[:40]!r} of such a probe")
    arrays = {name: np.atleast_1d(np.asarray(record[name], dtype=np.float64)) for name in names}
    if not all(array.ndim == 1 and np.isfinite(array).all() for array in arrays.values()):
        raise ProbeFormatError("the calibrator holds a number that is not finite, or a matrix")
    if kind == "temperature":
        sound = arrays["temperature"].size == 1 and arrays["temperature"][0] > 0
    elif kind == "platt":
        sound = arrays["slope"].size == arrays["intercept"].size == outputs
    else:
        sound = _isotonic_is_sound(arrays["x"], arrays["y"], arrays["offsets"], outputs)
    if not sound:
        raise ProbeFormatError("the arrays of the calibrator do not belong together")


def _isotonic_is_sound(x: Floats, y: Floats, offsets: Floats, outputs: int) -> bool:
    if x.size != y.size or offsets.size != outputs + 1 or offsets[0] != 0 or offsets[-1] != x.size:
        return False
    if (offsets != np.floor(offsets)).any() or (np.diff(offsets) < 1).any() or (y < 0).any() or (y > 1).any():
        return False
    bounds = offsets.astype(np.int64)
    return all((np.diff(x[a:b]) > 0).all() for a, b in pairwise(bounds.tolist()))


def _parse(data: bytes) -> FittedProbe:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(_MAX_HEADER, len(data) - 8) or len(data) > _MAX_BYTES:
        raise ProbeFormatError("the header is longer than the file, or the file than any probe")
    header = _json(data[8 : 8 + length].decode())
    notes = header.pop("__metadata__")
    if not all(isinstance(value, str) for value in notes.values()):
        raise ProbeFormatError("the metadata are strings")
    if notes["format"] not in (FORMAT, _FIRST_FORMAT):
        raise ProbeFormatError(f"the format is {notes['format'][:40]!r}; this version reads {FORMAT!r}")
    arrays = _arrays(memoryview(data)[8 + length :], header)
    calibrator: dict[str, Any] | None = None
    if (calibration := notes.get("calibration", "none")) != "none":
        found = [name for name in arrays if name.startswith(_PREFIX)]
        calibrator = {"kind": calibration} | {name.removeprefix(_PREFIX): arrays.pop(name) for name in found}
    classes = _json(notes["classes"])
    if not isinstance(classes, list) or _LAYER.fullmatch(notes["layer"]) is None:
        raise ProbeFormatError("the classes are no list, or the layer is no number")
    probe = FittedProbe(
        kind=notes.get("kind", "linear"),
        tensors=arrays,
        calibrator=calibrator,
        classes=tuple(classes),
        layer=int(notes["layer"]),
        task=notes["task"],
        estimator=notes["estimator"][:_MAX_TEXT],
        settings=_object(notes["settings"]),
        identity=_object(notes["identity"]),
        thresholds=_object(notes.get("thresholds", "{}")),
        report_sha256=notes["report_sha256"][:_MAX_TEXT],
    )
    check(probe)
    return probe


def _arrays(body: memoryview, header: dict[str, Any]) -> dict[str, Floats]:
    """The tensors, which must fill the body without a gap."""
    found: dict[str, Floats] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] != "F64":
            raise ProbeFormatError(f"tensors are F64; one is {str(entry['dtype'])[:20]!r}")
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        if not all(type(extent) is int and 0 <= extent < 2**40 for extent in (start, stop, *shape)):
            raise ProbeFormatError("extents are whole numbers")
        if len(shape) > 2 or start != end or stop - start != 8 * math.prod(shape) or stop > len(body):
            raise ProbeFormatError("a tensor lies outside the file, or on another")
        found[name] = np.frombuffer(body[start:stop], dtype="<f8").reshape(shape).astype(np.float64, copy=False)
        end = stop
    if end != len(body):
        raise ProbeFormatError("the file holds more than its tensors")
    return found


def _bounds(offsets: Sequence[int] | NDArray[Any] | None, tokens: int) -> list[int]:
    if offsets is None:
        raise _refused("The probe reads every token of an input.", "give states with pooling none, and their offsets")
    bounds = [int(one) for one in offsets]
    ordered = all(first < second for first, second in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or not ordered:
        raise _refused(
            f"The offsets do not cut {tokens} tokens into inputs.",
            "offsets rise from 0 to the number of tokens; each input has one token at least",
        )
    return bounds


def _refused(detail: str, remedy: str) -> InvalidRequest:
    return InvalidRequest(detail, errors=[FieldError(pointer="/extraction", detail=remedy)])


def _object(text: str) -> dict[str, Any]:
    found = _json(text)
    if not isinstance(found, dict):
        raise ProbeFormatError("a part of the metadata is no object")
    return found


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ProbeFormatError(f"{name} is not a number")


def _is_label(label: Any) -> bool:
    if isinstance(label, str):
        return len(label) <= _MAX_TEXT
    return isinstance(label, bool) or _is_number(label)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False, allow_nan=False)
