"""States from the store to a numpy array over loopback, against curl from Python's file server, and against JSON."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks import corpus
from benchmarks.bench import Bench
from benchmarks.measure import alternately, over
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.stack import MODEL

MEGABYTES = (100, 200)
"""Of states, in the default run and in the full one."""
ROUNDS = 5
SHARE, TIMES = 0.4, 20.0
_TOKEN_BYTES = 31 * 576 * 4


def run(bench: Bench) -> Row:
    """The row."""
    count = bench.reference("float32").count
    wanted = MEGABYTES[1 if bench.full else 0] * 10**6
    texts: list[str] = []
    for text in corpus.mixed(400, 1, count, 5_000)[0]:
        if sum(map(count, texts)) * _TOKEN_BYTES >= wanted:
            break
        texts.append(text)
    made = bench.client.extractions.create(
        model=MODEL, inputs=texts, layers="all", pooling="none", compute_dtype="float32", wait=60
    ).wait()
    size = int(np.prod(made.shape)) * 4
    few = min(range(len(texts)), key=lambda number: count(texts[number]))
    few_bytes = count(texts[few]) * _TOKEN_BYTES
    address = f"{bench.stack.url}{made.links['hidden_states']}"
    states: dict[str, Any] = {}

    def sdk(_number: int) -> float:
        extraction = bench.client.extractions.get(made.id)
        started = time.perf_counter()
        states["sdk"] = extraction.hidden_states()
        states["sum"] = float(states["sdk"].sum())  # every page is read
        return size / (time.perf_counter() - started) / 1e6

    def as_json(_number: int) -> float:
        started = time.perf_counter()
        with httpx2.Client(timeout=120) as client:
            content = client.get(address, params={"format": "json", "rows": f"{few}-{few}"}).content
        states["json"] = np.array(json.loads(content)["hidden_states"], dtype=np.float32)
        return few_bytes / (time.perf_counter() - started) / 1e6

    with tempfile.TemporaryDirectory(prefix="bathyscope-bench-payload-") as folder, _files(Path(folder)) as server:
        (Path(folder) / "states").write_bytes(bytes(size))

        def curl(_number: int) -> float:
            started = time.perf_counter()
            subprocess.run([_curl(), "--silent", "--fail", "--output", "/dev/null", f"{server}/states"], check=True)
            return size / (time.perf_counter() - started) / 1e6

        contenders = {"sdk": sdk, "curl": curl, "json": as_json}
        found = alternately(ROUNDS, contenders, own=bench.own(), patience=bench.patience)
    share, times = over(found["sdk"], found["curl"]), over(found["sdk"], found["json"])
    first = sum(map(count, texts[:few]))
    equal = np.array_equal(states["sdk"][first : first + count(texts[few])], states["json"].reshape(-1, 31, 576))
    return Row(
        name="payload",
        title=f"{size / 1e6:.0f} MB of states from the store to numpy over loopback",
        comparisons=[
            Comparison("SDK", "JSON, parsed", "MB/s", found["sdk"], found["json"], times),
            Comparison("SDK", "curl from http.server", "MB/s", found["sdk"], found["curl"], share),
        ],
        limits=[Limit("what curl gets from python -m http.server", share)],
        goals=[
            Goal(f">= {SHARE:.0%} of curl", share.show("{:.0%}"), share.median >= SHARE),
            Goal(f">= {TIMES:g} x JSON", times.show("{:.0f}"), times.median >= TIMES),
            Goal("JSON says the same numbers", "yes" if equal else "no", equal),
        ],
        notes=[f"{found.said()}; the JSON is of one text, {few_bytes / 1e6:.1f} MB of states"],
        details={"all_rounds": {"values": found.values, "foreign_cores": found.foreign, "kept": found.kept}},
    )


def _curl() -> str:
    path = shutil.which("curl")
    if path is None:
        raise RuntimeError("this row needs curl")
    return path


@contextlib.contextmanager
def _files(folder: Path) -> Iterator[str]:
    """Python's own file server on loopback; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
