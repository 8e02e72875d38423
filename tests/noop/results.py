"""Probes and predictions of the right shape with made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_workers.engine.protocol import RunJob

_TENSORS = ("weights", "intercept", "mean", "scale")


def probe(job: RunJob) -> dict[str, Any]:
    """A probe file that `FittedProbe.load` reads, and a report of the API's shape."""
    spec = job.spec
    rows = orjson.loads(Path(spec["rows_path"]).read_bytes())
    correct = spec.get("labels") == "correct"
    classes = [False, True] if correct else sorted({row[0] for row in rows}, key=str)
    if len(classes) < 2:
        raise InvalidRequest(
            "Nothing can be learned.", errors=[FieldError(pointer="/labels", detail="give two classes or more")]
        )
    held, depth = spec["held_layers"], spec["num_layers"]
    layers = held if spec["layers"] == "all" else [one + depth + 1 if one < 0 else one for one in spec["layers"]]
    scores = _scores()
    report = {
        "task": "binary" if len(classes) == 2 else "multiclass",
        "estimator": spec["config"]["estimator"],
        "settings": {"C": 1.0, "standardize": True},
        "n": len(rows),
        "classes": classes,
        "layers": [{"layer": layer, **scores} for layer in layers],
        "best_layer": layers[0],
        "held_out": scores,
        "baselines": dict.fromkeys(spec["config"]["baselines"], scores),
        "thresholds": {},
        "warnings": ["Made up."],
    }
    scratch = Path(job.scratch)
    (scratch / "report.json").write_bytes(orjson.dumps(report))
    _write_weights(scratch / "weights.safetensors", job, classes, layers[0], report["task"])
    return {"report_path": str(scratch / "report.json"), "weights_path": str(scratch / "weights.safetensors")}


def choices(job: RunJob, inputs: list[Any], variants: int) -> dict[str, Any]:
    """Scores of the right shape: every second question is right, of further variants every one but the first."""
    lines = [
        orjson.dumps(_scores_of(number, item, number % 2 == 0 if variant == 0 else number > 0)) + b"\n"
        for variant in range(variants)
        for number, item in enumerate(inputs, start=job.extra.get("first_input", 0))
    ]
    path, index = Path(job.scratch) / "choices.jsonl", Path(job.scratch) / "choices.index"
    path.write_bytes(b"".join(lines))
    index.write_bytes(np.cumsum([0, *map(len, lines)], dtype="<i8").tobytes())
    scored = [
        {"answered": len(inputs), "correct": right, "confidence": 0.5, "shared": 0}
        for right in [(len(inputs) + 1) // 2, *[len(inputs) - 1] * (variants - 1)]
    ]
    return {"choices_path": str(path), "choices_index_path": str(index), "scored": scored}


def _scores_of(number: int, item: dict[str, Any], right: bool) -> dict[str, Any]:
    choices = item.get("choices")
    many = len(choices) if choices else 1
    scores = {"logprobs": [-1.0] * many, "logprobs_per_token": [-1.0] * many, "tokens": [1] * many}
    return {
        "index": number,
        **scores,
        "picked": 0 if choices else None,
        "correct": right,
        "confidence": 0.5,
        **({} if choices else {"answer": "made up", "ended": True}),
    }


def prediction(job: RunJob, readings: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Equal probabilities for every row, under the classes of each probe's file."""
    found = []
    for reading in readings:
        data = Path(reading["weights_path"]).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        classes = json.loads(header["__metadata__"]["classes"])
        found.append({"probabilities": [[1 / len(classes)] * len(classes)] * rows, "labels": [classes[0]] * rows})
    path = Path(job.scratch) / "prediction.json"
    path.write_bytes(orjson.dumps({**found[0], "also": found[1:]}))
    return {"prediction_path": str(path)}


def _scores() -> dict[str, Any]:
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    names = ("auroc", "average_precision", "accuracy", "balanced_accuracy", "brier", "nll", "ece", "ece_equal_mass")
    bins = [{"low": 0.0, "high": 1.0, "count": 1, "confidence": 0.5, "accuracy": 0.5}]
    return {**dict.fromkeys(names, figure), "reliability": bins}


def _write_weights(path: Path, job: RunJob, classes: list[Any], layer: int, task: str) -> None:
    hidden = job.spec["layout"]["hidden_states"]["shape"][-1]
    outputs = 1 if len(classes) == 2 else len(classes)
    arrays = [np.zeros((outputs, hidden)), np.zeros(outputs), np.zeros(hidden), np.ones(hidden)]
    header: dict[str, Any] = {
        "__metadata__": {
            "classes": json.dumps(classes),
            "estimator": job.spec["config"]["estimator"],
            "format": "bathyscope-probe/1",
            "identity": json.dumps(job.spec["identity"]),
            "layer": str(layer),
            "report_sha256": "",
            "settings": "{}",
            "task": task,
        }
    }
    position = 0
    for name, array in zip(_TENSORS, arrays, strict=True):
        span = [position, position + array.nbytes]
        header[name] = {"dtype": "F64", "shape": list(array.shape), "data_offsets": span}
        position += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays)]))
