"""The client of the memory row, a process of its own: `python -m benchmarks.memory_client URL COUNT FOLDER`.

Says `ready` when it has everything loaded and has fetched a small result, waits for a line, then submits, waits,
fetches, maps and sums up, and says what that took as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

import bathyscope
from benchmarks import corpus
from benchmarks.stack import MODEL

_ROWS = 256


def main(url: str, count: int, folder: str) -> None:
    """Run it."""
    with bathyscope.Client(url, timeout=600.0, cache_dir=folder) as client:
        _fetch(client, corpus.short(16, variant=8))
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(_fetch(client, corpus.short(count, variant=9))), flush=True)
        sys.stdin.readline()


def _fetch(client: bathyscope.Client, texts: list[str]) -> dict[str, float]:
    started = time.perf_counter()
    job = client.extractions.create(model=MODEL, inputs=texts, layers="all", pooling="last", compute_dtype="float32")
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
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
