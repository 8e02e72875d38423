"""The client of the memory rows, a process of its own: `python -m benchmarks.memory_client URL FOLDER TEXTS POOLING`.

TEXTS is a JSON file: a list of texts for each request, the first of which warms up. Says `ready` when that is done.
Then for each line that it reads it submits the next, waits, fetches, maps and sums up, and says what that took as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

import bathyscope
from bathyscope.types import Pooling
from benchmarks.stack import MODEL

_ROWS = 256


def main(url: str, folder: str, file: str, pooling: Pooling) -> None:
    """Run it."""
    warm, *requests = json.loads(Path(file).read_text())
    with bathyscope.Client(url, timeout=600.0, cache_dir=folder) as client:
        _fetch(client, warm, pooling)
        print("ready", flush=True)
        for texts in requests:
            sys.stdin.readline()
            print(json.dumps(_fetch(client, texts, pooling)), flush=True)
        sys.stdin.readline()


def _fetch(client: bathyscope.Client, texts: list[str], pooling: Pooling) -> dict[str, float]:
    started = time.perf_counter()
    job = client.extractions.create(model=MODEL, inputs=texts, layers="all", pooling=pooling, compute_dtype="float32")
    submitted = time.perf_counter()
    extraction = job.wait()
    ended = time.perf_counter()
    states = extraction.hidden_states()
    total = 0.0
    for start in range(0, len(states), _ROWS):
        total += float(np.abs(states[start : start + _ROWS]).sum(dtype=np.float64))
    fetched = time.perf_counter()
    return {
        "submit": submitted - started,
        "wait": ended - submitted,
        "fetch": fetched - ended,
        "bytes": float(states.nbytes),
        "tokens": float(extraction.tokens["total"]),
        "inference": job.record.timings.get("inference", 0.0),
        "sum": total,
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4])  # type: ignore[arg-type]
