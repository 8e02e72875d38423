"""Probes in the engines: training and predicting on stored states (cpu), predicting on new inputs (model).

States are read from an extraction's file through a memory map, so a sweep over all of its layers copies one layer at a
time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_workers.engine.handlers import JobContext
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.extraction.extraction import ExtractionResult
from bathyscope_workers.probes import FittedProbe, SweepConfig, input_keys, sweep

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
}


def train(job: RunJob, context: JobContext) -> dict[str, Any]:
    """The handler of a probe: sweep over the layers asked for, leave report and weights in scratch."""
    spec = job.spec
    states = _tensor(spec["states_path"], spec["layout"]["hidden_states"])
    token_ids = _tensor(spec["states_path"], spec["layout"]["token_ids"])
    offsets = np.asarray(_tensor(spec["states_path"], spec["layout"]["offsets"]))
    rows = orjson.loads(Path(spec["rows_path"]).read_bytes())
    labels, groups, split = (list(column) for column in zip(*rows, strict=True))
    held: list[int] = spec["held_layers"]
    depth = spec["num_layers"]
    wanted = held if spec["layers"] == "all" else _resolved(spec["layers"], held, depth)
    if wanted != held:
        states = states[:, [held.index(layer) for layer in wanted]]
    result = sweep(
        states,
        wanted,
        labels,
        groups=None if all(group is None for group in groups) else groups,
        split=None if all(side is None for side in split) else split,
        lengths=np.diff(offsets).tolist(),
        input_keys=input_keys(token_ids, offsets),
        config=SweepConfig(**spec["config"]),
        progress=context.progress,
        cancelled=_beating(context),
    )
    scratch = Path(job.scratch)
    report_path, weights_path = scratch / "report.json", scratch / "weights.safetensors"
    report_path.write_bytes(orjson.dumps(result.report.to_dict()))
    dataclasses.replace(result.probe, identity=spec["identity"]).save(weights_path)
    return {"report_path": str(report_path), "weights_path": str(weights_path)}


def predict_stored(job: RunJob, context: JobContext) -> dict[str, Any]:
    """The handler of a prediction on an extraction that exists."""
    spec = job.spec
    probe = FittedProbe.load(spec["weights_path"])
    states = _tensor(spec["states_path"], spec["layout"]["hidden_states"])
    return _write(job, probe, states[:, spec["held_layers"].index(probe.layer)])


def predict_inputs(job: RunJob, result: ExtractionResult, context: JobContext) -> dict[str, Any]:
    """The finisher of a prediction on new inputs: reads the one layer that was extracted."""
    probe = FittedProbe.load(job.extra["weights_path"])
    place = result.tensors["hidden_states"]
    states = np.memmap(result.path, np.dtype("<f4"), "r", place["offset"], tuple(place["shape"]))
    return {**_write(job, probe, states[:, 0]), "provenance": result.provenance}


def _resolved(asked: list[int], held: list[int], depth: int) -> list[int]:
    """Layer numbers as the extraction has them. Raises `InvalidRequest` for one that it lacks or that comes twice."""
    wanted = [layer + depth + 1 if layer < 0 else layer for layer in asked]
    found = [
        FieldError(
            pointer=f"/layers/{number}",
            detail=f"layer {layer} is named twice"
            if layer in held
            else f"the extraction holds the layers {', '.join(map(str, held))}",
        )
        for number, layer in enumerate(wanted)
        if layer not in held or layer in wanted[:number]
    ]
    if found:
        raise InvalidRequest("The layers do not fit the extraction.", errors=found[:50])
    return wanted


def _write(job: RunJob, probe: FittedProbe, states: NDArray[Any]) -> dict[str, Any]:
    probabilities = probe.predict(states)
    path = Path(job.scratch) / "prediction.json"
    content = {
        "probabilities": probabilities,
        "labels": probe.labels(probabilities),
    }
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))
    return {"prediction_path": str(path), "classes": list(probe.classes)}


def _tensor(path: str, entry: dict[str, Any]) -> NDArray[Any]:
    """A tensor of a safetensors file, mapped; bfloat16 as float32."""
    count = int(np.prod(entry["shape"]))
    if not count:
        return np.zeros(entry["shape"], np.float32)
    mapped: NDArray[Any] = np.memmap(path, _DTYPES[entry["dtype"]], "r", entry["start"], tuple(entry["shape"]))
    if entry["dtype"] != "BF16":
        return mapped
    widened: NDArray[Any] = (mapped.astype(np.uint32) << 16).view(np.float32)  # its upper half is the float32's
    return widened


def _beating(context: JobContext) -> Any:
    def cancelled() -> bool:
        context.beat()  # raises when the job was stopped
        return False

    return cancelled
