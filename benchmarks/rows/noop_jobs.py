"""Jobs that compute nothing: how many a service process accepts a second, and whether Redis forgets those done."""

from __future__ import annotations

import http.client
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psutil
import redis

from benchmarks.bench import Bench
from benchmarks.measure import ForeignLoad, Spread, wait_until_quiet
from benchmarks.report import Comparison, Goal, Limit, Row
from benchmarks.stack import MODEL, Stack, running

JOBS = (1_000, 5_000)
"""Of a round, in the default run and in the full one."""
ROUNDS = 3
CLIENTS = 8
RATE = 500.0
KEPT_SECONDS = 5.0
_SWEEP_SECONDS = 90.0
_BODY = json.dumps({"model": MODEL, "inputs": ["a"], "layers": [0]}).encode()


def run(bench: Bench) -> Row:
    """The first round warms up; what the last two leave in Redis is compared."""
    jobs = JOBS[1 if bench.full else 0]
    days = KEPT_SECONDS / 86_400
    accepted, drained, pings, left = Spread(), Spread(), Spread(), []
    with (
        running(worker_module="benchmarks.noop_worker", jobs__result_days=days, jobs__tombstone_days=days) as stack,
        redis.Redis.from_url(stack.redis_url) as server,
    ):
        own = [*bench.own(), *stack.processes().values()]
        with ForeignLoad(own) as load:
            for number in range(ROUNDS):
                wait_until_quiet(own, bench.patience)
                rate, seconds = _round(stack, jobs)
                left.append(_left(server))
                if number:
                    accepted.add(rate)
                    drained.add(jobs / seconds)
                    pings.add(_pings(server))
    grown = (left[-1] - left[-2]) / jobs
    return Row(
        name="noop-jobs",
        title=f"{jobs:,} extractions of one text for an engine that computes nothing, {CLIENTS} clients",
        comparisons=[
            Comparison(
                "accepted by one service process",
                "a round trip to Redis, one client",
                "a second",
                accepted,
                pings,
                Spread([one / other for one, other in zip(accepted.values, pings.values, strict=True)]),
            )
        ],
        limits=[
            Limit(
                "a round trip to Redis for each job",
                Spread([one / other for one, other in zip(accepted.values, pings.values, strict=True)]),
            )
        ],
        goals=[
            Goal(f">= {RATE:g} accepted a second", accepted.show("{:.0f}"), accepted.median >= RATE),
            Goal("Redis does not grow with jobs done", f"{grown:.1f} bytes a job", grown < 16),
        ],
        notes=[
            f"drained at {drained.show('{:.0f}')} a second after all were queued; Redis held "
            f"{', '.join(f'{one / 2**20:.2f}' for one in left)} MiB once the results of each round had expired; others "
            f"used {load.cores:.2f} cores"
        ],
    )


def _round(stack: Stack, jobs: int) -> tuple[float, float]:
    """Accepted a second while no worker takes them, and seconds until all have ended once it does."""
    supervisor = psutil.Process(stack.processes()["supervisor"])
    supervisor.send_signal(signal.SIGSTOP)
    try:
        last, lock = [""], threading.Lock()

        def client(number: int) -> None:
            connection = http.client.HTTPConnection(urlsplit(stack.url).netloc, timeout=60)
            for _ in range(jobs // CLIENTS):
                connection.request("POST", "/v1/extractions", _BODY, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 202:
                    raise RuntimeError(f"a job was not accepted: {content.decode()[:300]}")
            with lock:
                last[0] = json.loads(content)["id"]
            connection.close()

        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))
        rate = jobs / (time.perf_counter() - started)
    finally:
        supervisor.send_signal(signal.SIGCONT)
    started = time.perf_counter()
    with stack.client() as sdk:
        while sdk.jobs.get(last[0]).status in ("queued", "running"):
            time.sleep(0.05)
    return rate, time.perf_counter() - started


def _left(server: redis.Redis) -> int:
    """Bytes that Redis holds once everything has been swept: the least of a while."""
    least, deadline = 2**62, time.monotonic() + _SWEEP_SECONDS
    quiet = 0
    while time.monotonic() < deadline and quiet < 8:
        used = int(server.info("memory")["used_memory"])  # type: ignore[index]
        quiet = 0 if used < least - 4096 else quiet + 1
        least = min(least, used)
        time.sleep(4)
    return least


def _pings(server: redis.Redis) -> float:
    """Round trips a second."""
    started = time.perf_counter()
    for _ in range(2_000):
        server.ping()
    return 2_000 / (time.perf_counter() - started)
