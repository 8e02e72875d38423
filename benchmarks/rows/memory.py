"""Many short texts, all layers: no process may hold the result, though each passes it on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks import arithmetic, corpus
from benchmarks.bench import Bench
from benchmarks.measure import Spread, over, timed
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.rss import Watch

TEXTS = (1_000, 10_000)
"""In the default run and in the full one."""
SHARE = 1 / 3
_SAMPLE = 128
"""Texts of the loop that the time is compared with, before and after."""
_WARM = 256


def run(bench: Bench) -> Row:
    """The row."""
    count = TEXTS[1 if bench.full else 0]
    reference = bench.reference("float32")
    top = int(reference.model.config.num_hidden_layers)
    layers = list(range(top + 1))
    texts = corpus.short(count, variant=9)
    # Warm, and idle: the allocators hold what batches of this kind need.
    bench.extract(corpus.short(_WARM, variant=7), "float32").hidden_states()
    loop, rate = Spread(), Spread()

    def time_loop() -> None:
        loop.add(_SAMPLE / timed(lambda: reference.in_batches(texts[:_SAMPLE], layers)))
        rate.add(arithmetic.matrix_rate(reference.model, top))

    time_loop()
    with client_process(bench, [corpus.short(16, variant=8), texts], "last") as client:
        time.sleep(1.5)
        with Watch(groups_of(bench, client.pid)) as watch:
            told = ask(client)
            time.sleep(0.2)
    time_loop()
    lengths = [reference.count(text) for text in texts]
    return _row(bench, watch, told, loop, rate, arithmetic.work_of(reference.model, top).of(lengths), count)


def groups_of(bench: Bench, client: int) -> dict[str, list[int]]:
    """The processes whose memory is watched."""
    pids = bench.stack.processes()
    return {
        "service": [pids["service"]],
        "worker": [pids[role] for role in ("supervisor", "model engine", "cpu engine") if role in pids],
        "client": [client],
        "supervisor": [pids["supervisor"]],
        "model engine": [pids["model engine"]],
        "valkey": [pids["valkey"]],
    }


@contextmanager
def client_process(bench: Bench, requests: Sequence[Sequence[str]], pooling: str) -> Iterator[subprocess.Popen[str]]:
    """A client in a process of its own, warm by the first of these requests."""
    file = bench.stack.data_dir / "memory-client.json"
    file.write_text(json.dumps(requests))
    words = [bench.stack.url, str(bench.stack.data_dir / "memory-client"), str(file), pooling]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.memory_client", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the client process did not get ready")
        try:
            yield process
        finally:
            process.terminate()


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Have it send its next request, and what it says of it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the client process ended without a word")
    found: dict[str, Any] = json.loads(line)
    return found


def _row(bench: Bench, watch: Watch, told: dict[str, Any], loop: Spread, rate: Spread, work: int, count: int) -> Row:
    size, growth = told["bytes"], watch.growth
    took = told["submit"] + told["wait"] + told["fetch"]
    ours = Spread([count / took] * len(loop.values))
    limit = Spread([value / work * count for value in rate.values])
    row = Row(
        name="memory",
        title=f"{count:,} short texts, all layers, last token: {size / 1e6:.0f} MB; peak growth of RssAnon",
        comparisons=[_grown(name, growth[name], size) for name in ("service", "worker", "client")],
        limits=[Limit("matrix products, all blocks", over(ours, limit))],
        details={
            "bytes": size,
            "before": watch.before,
            "peak": watch.peak,
            "growth": watch.growth,
            "seconds": told,
            "multiply_adds": work,
        },
    )
    row.comparisons.append(
        Comparison("service, submit to sum", "loop, batches of 8, float32", "texts/s", ours, loop, over(ours, loop))
    )
    row.goals = [
        Goal(
            f"{name} grows by less than a third of the result",
            f"{growth[name] / 1e6:.0f} of {size / 1e6:.0f} MB",
            growth[name] < SHARE * size,
        )
        for name in ("service", "worker", "client")
    ]
    row.notes = [
        f"submit {told['submit']:.1f} s, wait {told['wait']:.1f} s (inference {told['inference']:.1f} s), "
        f"fetch, map and sum {told['fetch']:.1f} s",
        "growth in MB: "
        + ", ".join(
            f"{name} {value / 1e6:.1f} (from {watch.before[name] / 1e6:.0f})" for name, value in watch.growth.items()
        ),
        f"measured once; the loop ran {_SAMPLE} of the texts before and after",
    ]
    return row


def _grown(name: str, growth: int, size: float) -> Comparison:
    grown, whole = Spread([growth / 1e6]), Spread([size / 1e6])
    return Comparison(f"{name}'s peak growth", "the result's size", "MB", grown, whole, over(grown, whole))
