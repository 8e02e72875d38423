"""Predictions in the engines: on stored states (cpu), and on new inputs, whose states were just extracted (model).

Either way one or several probes read the same states; `readings` says how each does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from bathyscope_workers.engine.handlers import JobContext
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.engine.stored import stored_tensor
from bathyscope_workers.extraction.token_texts import Place, read_token_texts
from bathyscope_workers.probes import FittedProbe
from bathyscope_workers.probes.reading import Source, read

if TYPE_CHECKING:
    from bathyscope_workers.extraction.extraction import ExtractionResult

_NOWHERE: Place = (None, None, None, None)
_STORED = {"float32": "F32", "int64": "I64"}


def predict_stored(job: RunJob, context: JobContext) -> dict[str, Any]:
    """The handler of a prediction on an extraction that exists."""
    spec = job.spec
    path, layout = spec["states_path"], spec["layout"]
    offsets = np.asarray(stored_tensor(path, layout["offsets"])) if spec["pooling"] == "none" else None
    token_ids = stored_tensor(path, layout["token_ids"])
    states = stored_tensor(path, layout["hidden_states"])
    source = Source(states, spec["held_layers"], offsets, "/extraction")
    return _write(job, context, spec["readings"], source, token_ids, spec["per_token"])


def predict_inputs(job: RunJob, result: ExtractionResult, context: JobContext) -> dict[str, Any]:
    """The finisher of a prediction on new inputs."""
    found = {
        name: stored_tensor(result.path, {**place, "dtype": _STORED[place["dtype"]], "start": place["offset"]})
        for name, place in result.tensors.items()
    }
    pooled = result.provenance["pooling"] != "none"
    source = Source(found["hidden_states"], result.layers, None if pooled else np.asarray(found["offsets"]), "/inputs")
    readings, per_token = job.extra["readings"], job.extra["per_token"]
    wire = _write(job, context, readings, source, found["token_ids"], per_token)
    return {**wire, "provenance": result.provenance}


def _write(
    job: RunJob,
    context: JobContext,
    readings: Sequence[dict[str, Any]],
    source: Source,
    token_ids: NDArray[Any],
    per_token: bool,
) -> dict[str, Any]:
    """Every reading to a file in scratch: the numbers of a `Prediction`."""
    found = []
    for reading in readings:
        context.beat()
        probe = FittedProbe.load(reading["weights_path"])
        options = {name: reading[name] for name in ("pooling", "positions", "threshold")}
        found.append(read(probe, source, per_token=per_token, **options))
    first, *others = found
    scores = first.pop("token_scores", None)
    content: dict[str, Any] = first
    scratch = Path(job.scratch)
    if scores is not None:
        assert source.offsets is not None
        bounds = source.offsets.tolist()
        fresh = source.pointer == "/inputs"
        texts = read_token_texts(scratch) if fresh else [{"rendered": None, "tokens": None}] * (len(bounds) - 1)
        content["tokens"] = list(_tokens(token_ids, scores, texts, bounds))
        content["rendered"] = [one["rendered"] for one in texts]
        for other in others:
            other["token_scores"] = [other["token_scores"][start:end] for start, end in pairwise(bounds)]
    content["also"] = others
    path = scratch / "prediction.json"
    path.write_bytes(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))
    return {"prediction_path": str(path)}


def _tokens(
    token_ids: NDArray[Any], scores: NDArray[Any], texts: Sequence[dict[str, Any]], bounds: Sequence[int]
) -> Iterator[list[dict[str, Any]]]:
    for one, (start, end) in zip(texts, pairwise(bounds), strict=True):
        places = one["tokens"] or [_NOWHERE] * (end - start)
        yield [
            {"id": number, "text": text, "start": first, "end": last, "special": special, "score": score}
            for number, score, (text, first, last, special) in zip(
                token_ids[start:end].tolist(), scores[start:end].tolist(), places, strict=True
            )
        ]
