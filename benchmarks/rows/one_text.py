"""One text on a warm model through HTTP: how long it takes beyond the forward pass itself, and where that goes.

`inference`, as the job's timings and the header `X-Inference-Time` tell it, is the engine's time in the batch: padding,
the model's lowest blocks, and the copy of the wanted rows into the result file. It holds no tokenising, no laying out
of the file, no queue and no commit. The same partial forward is timed in this process too, in turn with the requests.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path

from bathyscope.types import Job
from benchmarks import corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, timed
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.stack import MODEL
from benchmarks.trace import Trace, stages

LAYERS = [8, 15]
LIMIT_MS = 20.0
REQUESTS, TRACED = (60, 20), (300, 60)
"""Timed and traced requests, in the default run and in the full one."""


@dataclass(frozen=True, slots=True)
class Times:
    """One request. Milliseconds."""

    total: float
    """From before the POST until the numpy array is there."""
    post: float
    """`POST` with `Prefer: wait`, until the finished job is there."""
    describe: float
    """`GET` of the extraction, which tells its digest."""
    get: float
    """`GET` of the hidden states, and the array."""
    queue: float
    """Until a worker took the job, by the job's own clock (whole milliseconds)."""
    inference: float
    """In the engine's batch."""
    worker: float
    """With the worker, besides the batch: payload, tokenising, result file, digest, commit."""
    beyond: float
    """`total` without `inference`."""


def run(bench: Bench) -> Row:
    """The row."""
    requests, traced = REQUESTS[1 if bench.full else 0], TRACED[1 if bench.full else 0]
    reference = bench.reference("float32")
    texts = corpus.short(requests + traced + 10, variant=3)
    for text in texts[:10]:
        request(bench, text)
        reference.partial(text, max(LAYERS))
    found: list[Times] = []
    forward, durable = Spread(), Spread()
    for number, text in enumerate(texts[10 : 10 + requests]):
        if number % 2:
            found.append(request(bench, text)[0])
        forward.add(1e3 * timed(lambda text=text: reference.partial(text, max(LAYERS))))  # type: ignore[misc]
        if not number % 2:
            found.append(request(bench, text)[0])
        durable.add(1e3 * timed(lambda: _durable_write(bench.stack.data_dir / "durable")))
    parts: dict[str, Spread] = {}
    with Trace(bench.stack.redis_url) as trace:
        for text in texts[10 + requests :]:
            trace.clear()
            started = time.time()
            times, job = request(bench, text)
            for name, milliseconds in stages(trace.events(), job.id, started, times).items():
                parts.setdefault(name, Spread()).add(milliseconds)
    spreads = {one.name: Spread([getattr(times, one.name) for times in found]) for one in fields(Times)}
    return _row(spreads, forward, durable, parts)


def request(bench: Bench, text: str) -> tuple[Times, Job]:
    """One text as the SDK does it."""
    started = time.perf_counter()
    job = bench.client.extractions.create(
        wait=60, model=MODEL, inputs=[text], layers=LAYERS, pooling="last", compute_dtype="float32"
    )
    posted = time.perf_counter()
    extraction = job.wait()
    described = time.perf_counter()
    states = extraction.hidden_states()
    ended = time.perf_counter()
    if states.shape[:2] != (1, len(LAYERS)):
        raise RuntimeError(f"a single text gave states of the shape {states.shape}")
    timings = {name: 1e3 * seconds for name, seconds in job.record.timings.items()}
    total = 1e3 * (ended - started)
    times = Times(
        total=total,
        post=1e3 * (posted - started),
        describe=1e3 * (described - posted),
        get=1e3 * (ended - described),
        queue=timings["queue"],
        inference=timings["inference"],
        worker=timings["total"] - timings["queue"] - timings["inference"],
        beyond=total - timings["inference"],
    )
    return times, job.record


def _row(spreads: dict[str, Spread], forward: Spread, durable: Spread, parts: dict[str, Spread]) -> Row:
    beyond = spreads["beyond"]
    share = Spread(
        [part / whole for part, whole in zip(spreads["inference"].values, spreads["total"].values, strict=True)]
    )
    slower = Spread([one / other for one, other in zip(spreads["total"].values, forward.values, strict=True)])
    same = Spread([one / other for one, other in zip(spreads["inference"].values, forward.values, strict=True)])
    row = Row(
        name="one-text",
        title="one short text, layers 8 and 15, warm model, POST with Prefer: wait, then GET of the numbers",
        comparisons=[
            Comparison("service, submit to array", "15 blocks, this process", "ms", spreads["total"], forward, slower),
            Comparison("engine's inference time", "15 blocks, this process", "ms", spreads["inference"], forward, same),
        ],
        limits=[Limit("the forward pass alone", share)],
        goals=[
            Goal(
                f"beyond the forward <= {LIMIT_MS:g} ms at the median",
                beyond.show("{:.1f}") + " ms",
                beyond.median <= LIMIT_MS,
            )
        ],
        details={
            "milliseconds": {name: spread.as_json() for name, spread in spreads.items()},
            "stages_ms": {name: spread.as_json() for name, spread in parts.items()},
            "forward_ms": forward.as_json(),
            "durable_write_ms": durable.as_json(),
        },
    )
    row.notes.append(
        "by client and job: " + ", ".join(f"{name} {spread.show('{:.1f}')}" for name, spread in spreads.items()) + " ms"
    )
    row.notes.append("by the queue's own clock, in a run of its own with Redis MONITOR on:")
    row.notes += [f"  {name:<38} {spread.show('{:.1f}')} ms" for name, spread in parts.items()]
    row.notes.append(f"a durable write here (4 KB and fsync): {durable.show('{:.2f}')} ms")
    return row


def _durable_write(path: Path) -> None:
    """What a queue that loses nothing does several times for each job."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, b"\0" * 4096)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
