"""Several workers: who may publish, what a drain does, whose turn it is, and which model goes where."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from bathyscope_backplane.broker import Broker, BrokerLimits, NewJob, connect
from bathyscope_backplane.ids import new_id
from tests.files import contents_below, matching
from tests.service.test_keys import make_key
from tests.stack import Stack, stack

LEASE_SECONDS = 2.5
"""A renewal comes four times as often; a disk that others keep busy may hold one up for a second."""
PREFIX = "{bathyscope}:"
SPIN = {"model": "tiny", "inputs": ["MARK spin"], "layers": [0]}
"""Six seconds of work: more than two leases."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(
        tmp_path_factory.mktemp("two"),
        workers=2,
        models=models,
        worker_module="tests.faults.bad_worker",
        jobs__lease_seconds=LEASE_SECONDS,
        worker__adopt_seconds=0,
        worker__concurrent_jobs=1,
    ) as running:
        # Both have the model, so that either can take a job at once.
        jobs = [submit(running, **SPIN), submit(running, **SPIN)]
        until(lambda: all(running_on(running, job) for job in jobs))
        assert {running_on(running, job) for job in jobs} == {"worker0", "worker1"}
        assert {running.job(job)["status"] for job in jobs} == {"succeeded"}
        yield running


def submit(running: Stack, **body: Any) -> str:
    answer = running.client.post("/v1/extractions", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def ask_redis(running: Stack, *command: str) -> Any:
    with redis.Redis.from_url(running.valkey.url, decode_responses=True) as client:
        return client.execute_command(*command)


def running_on(running: Stack, job_id: str) -> str | None:
    """The worker that runs a job."""
    status, worker = ask_redis(running, "HMGET", f"{PREFIX}job:{job_id}", "status", "worker")
    return worker if status == "running" else None


def until(so: Any, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := so():
            return answer
        time.sleep(0.02)
    raise TimeoutError("it never was so")


def succeeded(running: Stack) -> int:
    return int(ask_redis(running, "HGET", f"{PREFIX}totals", "extraction|succeeded") or 0)


def artifacts(running: Stack) -> dict[str, bytes]:
    folder = running.data_dir / "artifacts"
    return {str(path.relative_to(folder)): content for path, content in contents_below(folder)}


def scratch(running: Stack, worker: str) -> list[Path]:
    return matching(running.data_dir / "scratch", f"{worker}-*/*")


def test_a_woken_supervisor_publishes_nothing(two: Stack) -> None:
    before = succeeded(two)
    job_id = submit(two, **SPIN)
    sleeper = until(lambda: running_on(two, job_id))
    # Known to run alone, so that the lapse counts as an attempt of its own.
    until(lambda: ask_redis(two, "HGET", f"{PREFIX}job:{job_id}", "alone") == "1")
    process = two.processes[sleeper]
    process.send_signal(signal.SIGSTOP)
    try:
        # Its engine goes on, and its result lies in the pipe; meanwhile the other has taken the job and done it.
        job = two.job(job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 2)
        assert ask_redis(two, "HGET", f"{PREFIX}job:{job_id}", "worker") != sleeper
        record = ask_redis(two, "HGETALL", f"{PREFIX}job:{job_id}")
        kept = artifacts(two)
        assert scratch(two, sleeper)
    finally:
        process.send_signal(signal.SIGCONT)
    until(lambda: not scratch(two, sleeper))
    time.sleep(0.5)
    assert artifacts(two) == kept
    assert ask_redis(two, "HGETALL", f"{PREFIX}job:{job_id}") == record
    assert succeeded(two) == before + 1
    # And it is of use again: its engine is not held against it.
    jobs = [submit(two, **SPIN) for _ in range(2)]
    until(lambda: {running_on(two, job) for job in jobs} == {"worker0", "worker1"})
    assert [two.job(job)["attempt"] for job in jobs] == [1, 1]


def test_a_drain_longer_than_the_lease_runs_nothing_twice(two: Stack) -> None:
    before = succeeded(two)
    job_id = submit(two, **SPIN)
    leaver = until(lambda: running_on(two, job_id))
    process = two.processes[leaver]
    process.terminate()
    job = two.job(job_id)
    assert process.wait(60) == 0
    two.start(leaver, "worker", BATHYSCOPE_WORKER__NAME=leaver)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    assert ask_redis(two, "HGET", f"{PREFIX}job:{job_id}", "worker") == leaver
    assert succeeded(two) == before + 1
    events = ask_redis(two, "XRANGE", f"{PREFIX}events:{job_id}", "-", "+")
    assert sum('"running"' in str(event) for event in events) == 1


def test_a_second_signal_hands_over_to_the_other_at_once(two: Stack) -> None:
    before = succeeded(two)
    job_id = submit(two, **SPIN)
    leaver = until(lambda: running_on(two, job_id))
    two.processes[leaver].terminate()
    time.sleep(0.3)
    assert running_on(two, job_id) == leaver
    two.processes[leaver].terminate()
    until(lambda: running_on(two, job_id) not in (None, leaver))
    assert two.processes[leaver].wait(60) == 0
    two.start(leaver, "worker", BATHYSCOPE_WORKER__NAME=leaver)
    job = two.job(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)  # what was handed over does not count
    assert succeeded(two) == before + 1


def test_the_dead_leave_neither_engines_nor_scratch(two: Stack) -> None:
    job_id = submit(two, **SPIN)
    victim = until(lambda: running_on(two, job_id))
    until(lambda: scratch(two, victim))
    pid = two.processes[victim].pid
    engines = [engine for kind in ("model", "cpu") for engine in two.engines(kind)]
    mine = [engine for engine in engines if f"PPid:\t{pid}\n" in Path(f"/proc/{engine}/status").read_text()]
    assert len(mine) == 2
    two.kill(victim)
    until(lambda: not any(Path(f"/proc/{engine}").exists() for engine in mine))
    two.start(victim, "worker", BATHYSCOPE_WORKER__NAME=victim)
    until(lambda: not (two.data_dir / "scratch" / f"{victim}-{pid}").exists())
    assert two.job(job_id)["status"] == "succeeded"


# --- turns ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_by_one(tmp_path: Path, models: str) -> Iterator[Stack]:
    """A service without a worker; `start("worker", "worker")` brings one that does one job at a time, in no time."""
    with stack(tmp_path, workers=0, models=models, noop=True, worker__concurrent_jobs=1, jobs__aging_seconds=1) as made:
        yield made


async def queue_more(running: Stack, like: str, number: int) -> None:
    """More jobs like one that the service queued, straight into the broker: thousands of requests would take long."""
    owner, payload, lane = ask_redis(running, "HMGET", f"{PREFIX}job:{like}", "owner", "payload", "lane")
    client = connect(running.valkey.url)
    broker = Broker(client, limits=BrokerLimits(owner_open=10_000))

    def one() -> NewJob:
        made = {"id": new_id("job"), "resource_id": new_id("ext")}
        return NewJob(kind="extraction", lane=lane, owner=owner, payload=payload, **made)

    for _ in range(number // 100):
        await asyncio.gather(*(broker.submit(one()) for _ in range(100)))
    await client.aclose()


def test_one_job_is_next_although_another_key_has_five_thousand(one_by_one: Stack) -> None:
    bulk, single = make_key(one_by_one, "bulk"), make_key(one_by_one, "single")

    def asking(key: str) -> httpx2.Client:
        return httpx2.Client(base_url=one_by_one.url, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    body = {"model": "tiny", "inputs": ["mine"], "layers": [0]}
    with asking(bulk) as many, asking(single) as few:
        first = many.post("/v1/extractions", json=body).json()["id"]
        asyncio.run(queue_more(one_by_one, first, 5_000))
        mine = few.post("/v1/extractions", json=body).json()["id"]
        one_by_one.start("worker", "worker")
        until(lambda: few.get(f"/v1/jobs/{mine}").json()["status"] == "succeeded")
        started = few.get(f"/v1/jobs/{mine}").json()["started_at"]
        listed = many.get("/v1/jobs", params={"status": "succeeded", "limit": 100}).json()["data"]
        assert sum(job["started_at"] < started for job in listed) <= 1
        left = int(ask_redis(one_by_one, "HGET", f"{PREFIX}lane_load", "model:tiny:none:auto"))
        assert left > 4_000


def test_low_priority_is_late_but_not_never(one_by_one: Stack) -> None:
    """An endless supply of better work, more than is done, and one job of low priority in the middle of it."""
    body = {"model": "tiny", "inputs": ["x"], "layers": [0]}
    slow = {**body, "priority": "high", "metadata": {"noop_seconds": 0.1}}
    over, ahead = threading.Event(), []

    def supply() -> None:
        with httpx2.Client(base_url=one_by_one.url, timeout=60) as client:
            for _ in count():
                if over.is_set():
                    return
                ahead.append(client.post("/v1/extractions", json=slow).json()["id"])
                over.wait(0.02)

    supplier = threading.Thread(target=supply)
    supplier.start()
    try:
        until(lambda: len(ahead) >= 50)
        low = submit(one_by_one, **body, priority="low")
        before = len(ahead)
        one_by_one.start("worker", "worker")
        job = one_by_one.job(low)
        assert job["status"] == "succeeded"
        # It went before better ones that had been there when it came.
        waiting = [
            other for other in ahead[:before] if one_by_one.client.get(f"/v1/jobs/{other}").json()["status"] == "queued"
        ]
        assert waiting
    finally:
        over.set()
        supplier.join()


# --- memory ---------------------------------------------------------------------------------------------------

SMALL = {"BATHYSCOPE_WORKER__MEMORY_BYTES": str(200 * 2**20)}
"""Less than SmolLM2 takes, more than MiniLM does."""


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A worker that holds small models only; a larger one comes later."""
    made = Stack(
        tmp_path_factory.mktemp("unlike"),
        models=models,
        worker__adopt_seconds=0,
        worker__concurrent_jobs=1,
        worker__starvation_seconds=600,
    )
    try:
        made.start("service", "service")
        made.start("small", "worker", BATHYSCOPE_WORKER__NAME="small", **SMALL)
        made.wait_ready()
        yield made
    finally:
        made.down()


def reasons(running: Stack, job_id: str) -> list[str]:
    """How a job went: the workers' words in its events."""
    found = []
    for _, fields in ask_redis(running, "XRANGE", f"{PREFIX}events:{job_id}", "-", "+"):
        values = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
        if values["type"] == "status":
            found.append(values["data"])
    return found


def test_what_fits_nowhere_fails_with_its_reason(unlike: Stack) -> None:
    job = unlike.job(submit(unlike, model="smollm2", inputs=["x"], layers=[0]))
    assert job["error"]["type"] == "/problems/out-of-memory"
    assert "smollm2 needs about" in job["error"]["detail"]
    assert "raise the worker's bound of memory" in job["error"]["detail"]
    assert job["attempt"] == 1


def test_what_does_not_fit_here_waits_for_the_worker_that_it_fits(unlike: Stack) -> None:
    ask_redis(unlike, "DEL", f"{PREFIX[:-1]}:memory")
    restart_small(unlike)  # it has forgotten what it found out
    unlike.start("large", "worker", BATHYSCOPE_WORKER__NAME="large")
    until(lambda: {"small", "large"} <= set(ask_redis(unlike, "SMEMBERS", f"{PREFIX}workers")))
    # The larger one is busy with something else when the job comes, so the small one tries, and leaves it.
    unlike.processes["small"].send_signal(signal.SIGSTOP)
    busy = [
        submit(unlike, model="tiny", inputs=[f"{n} {k} " + "deep water " * 20 for k in range(1500)], layers="all")
        for n in range(3)
    ]
    until(lambda: running_on(unlike, busy[0]))
    unlike.processes["small"].send_signal(signal.SIGCONT)
    job_id = submit(unlike, model="smollm2", inputs=["x"], layers=[0])
    job = unlike.job(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1), job
    assert ask_redis(unlike, "HGET", f"{PREFIX}job:{job_id}", "worker") == "large"
    for other in busy:
        assert unlike.job(other)["status"] == "succeeded"
    # Now it is known what the model takes, and the small one does not even try, however idle.
    later = [submit(unlike, model="smollm2", inputs=[f"{k}"], layers=[0]) for k in range(6)]
    for job_id in later:
        assert unlike.job(job_id)["status"] == "succeeded"
        assert not any("elsewhere" in word for word in reasons(unlike, job_id))
        assert ask_redis(unlike, "HGET", f"{PREFIX}job:{job_id}", "worker") == "large"
    # When the larger one has gone there is nobody to wait for.
    unlike.processes["large"].terminate()
    assert unlike.processes["large"].wait(60) == 0
    job = unlike.job(submit(unlike, model="smollm2", inputs=["x"], layers=[0]))
    assert job["error"]["type"] == "/problems/out-of-memory"
    # What fits is served by the small one all the while.
    assert unlike.job(submit(unlike, model="minilm", inputs=["x"], layers=[0]))["status"] == "succeeded"


def restart_small(running: Stack) -> None:
    running.processes["small"].terminate()
    assert running.processes["small"].wait(60) == 0
    running.start("small", "worker", BATHYSCOPE_WORKER__NAME="small", **SMALL)
