"""Comparing variants on stored states, in the cpu engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bathyscope.errors import InternalError
from bathyscope_workers.comparisons import compare
from bathyscope_workers.engine.handlers import JobContext
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.engine.stored import stored_tensor
from bathyscope_workers.probes import SweepConfig


def run(job: RunJob, context: JobContext) -> dict[str, Any]:
    """The handler of a comparison: read every variant's states through a memory map, leave the report in scratch."""
    spec = job.spec
    parts = spec["parts"]
    states = [stored_tensor(part["states_path"], part["layout"]["hidden_states"]) for part in parts]
    token_ids, offsets = (_tensor(parts[0], name) for name in ("token_ids", "offsets"))
    for part in parts[1:]:
        if not (np.array_equal(token_ids, _tensor(part, "token_ids"))):
            raise InternalError("The variants were not read from the same tokens.")
    rows = orjson.loads(Path(spec["rows_path"]).read_bytes())
    labels, groups, split = (list(column) for column in zip(*rows, strict=True))

    def cancelled() -> bool:
        context.beat()  # raises when the job was stopped
        return False

    report = compare(
        states,
        [part["name"] for part in parts],
        spec["layers"],
        labels,
        groups=None if all(group is None for group in groups) else groups,
        split=spec.get("split") if all(side is None for side in split) else split,
        token_ids=token_ids,
        offsets=offsets,
        config=SweepConfig(**spec["config"]),
        progress=context.progress,
        cancelled=cancelled,
    )
    path = Path(job.scratch) / "comparison.json"
    path.write_bytes(orjson.dumps(report))
    metric = "auroc" if report["task"] != "regression" else "r2"
    changes = [None, *(one["held_out"].get(metric) for one in report["differences"])]
    return {
        "report_path": str(path),
        "inputs": report["n"],
        "summary": [
            {
                "name": variant["name"],
                "best_layer": variant["best_layer"],
                "metric": metric,
                "held_out": variant["held_out"].get(metric),
                "difference": change,
            }
            for variant, change in zip(report["variants"], changes, strict=True)
        ],
    }


def _tensor(part: dict[str, Any], name: str) -> Any:
    return np.asarray(stored_tensor(part["states_path"], part["layout"][name]))
