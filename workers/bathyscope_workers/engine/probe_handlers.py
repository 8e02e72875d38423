"""Training probes on stored states, in the cpu engine.

States are read from an extraction's file through a memory map, so a sweep over all of its layers copies one layer at a
time.
"""

from __future__ import annotations

import dataclasses
import operator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bathyscope.errors import FieldError, InvalidRequest
from bathyscope_backplane.one_answer import refuse_one_answer
from bathyscope_workers.engine.handlers import JobContext
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.engine.scored import read_scores
from bathyscope_workers.engine.stored import stored_tensor
from bathyscope_workers.probes import SweepConfig, sweep


def train(job: RunJob, context: JobContext) -> dict[str, Any]:
    """The handler of a probe: sweep over the layers asked for, leave report and weights in scratch."""
    spec = job.spec
    states = stored_tensor(spec["states_path"], spec["layout"]["hidden_states"])
    token_ids = stored_tensor(spec["states_path"], spec["layout"]["token_ids"])
    offsets = np.asarray(stored_tensor(spec["states_path"], spec["layout"]["offsets"]))
    rows = orjson.loads(Path(spec["rows_path"]).read_bytes())
    labels, groups, split = (list(column) for column in zip(*rows, strict=True))
    own: dict[str, Any] = {}
    if "choices_path" in spec:
        correct, confidence = read_scores(spec["choices_path"], *spec["choices_lines"])
        if spec["labels"] == "correct":
            refuse_one_answer(sum(correct), len(correct))
            labels = correct
        if _say_right(labels, correct):
            own["confidence"] = confidence
    held: list[int] = spec["held_layers"]
    depth = spec["num_layers"]
    wanted = held if spec["layers"] == "all" else _resolved(spec["layers"], held, depth)
    tokens = spec["identity"]["pooling"] == "none"
    if not (tokens and spec["identity"]["positions"]):  # else there are the ids of the tokens kept only
        own |= {"token_ids": token_ids, "offsets": offsets}
    if wanted != held:
        states = states[:, [held.index(layer) for layer in wanted]]
    result = sweep(
        states,
        wanted,
        labels,
        groups=None if all(group is None for group in groups) else groups,
        split=spec.get("split") if all(side is None for side in split) else split,
        state_offsets=offsets if tokens else None,
        **own,
        config=SweepConfig(**spec["config"]),
        progress=context.progress,
        cancelled=_beating(context),
    )
    scratch = Path(job.scratch)
    report_path, weights_path = scratch / "report.json", scratch / "weights.safetensors"
    report_path.write_bytes(orjson.dumps(result.report.to_dict()))
    dataclasses.replace(result.probe, identity=spec["identity"]).save(weights_path)
    return {"report_path": str(report_path), "weights_path": str(weights_path)}


def _say_right(labels: list[Any], correct: list[bool]) -> bool:
    """Whether labels can be of what the model's confidence is of: true where it is right, if by another's judgement."""
    return {*labels} <= {False, True} and 2 * sum(map(operator.eq, labels, correct)) > len(correct)


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


def _beating(context: JobContext) -> Any:
    def cancelled() -> bool:
        context.beat()  # raises when the job was stopped
        return False

    return cancelled
