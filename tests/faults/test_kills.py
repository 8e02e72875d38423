"""Real processes, really killed in the middle of a job: the job still ends succeeded, once, with the right numbers.

On the embedded Valkey and on Debian's redis-server, blows at the workers alone on the latter in `make faults` only.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bathyscope_backplane.embedded import find_binary
from tests.faults import WHOLE
from tests.files import matching
from tests.service.test_extractions import assert_close, npy
from tests.stack import Stack, stack

TEXTS = [f"Text {k}: the deeper one dives, the darker and the colder the water gets. " * 3 for k in range(48)]
BODY: dict[str, Any] = {"model": "smollm2", "inputs": TEXTS, "layers": [0, 15, 30]}

SERVERS = {"valkey": str(find_binary())}
if found := shutil.which("redis-server"):
    SERVERS["redis-server"] = found


@pytest.fixture
def of_workers(installation: Stack) -> Stack:
    """For tests in which the server has no part of its own."""
    if installation.valkey.binary == Path(SERVERS.get("redis-server", "")) and not WHOLE:
        pytest.skip("part of `make faults`")
    return installation


def test_debians_redis_is_there_where_it_must_be() -> None:
    assert "redis-server" in SERVERS or not os.environ.get("CI"), "install Debian's redis-server"


@pytest.fixture(scope="module", params=sorted(SERVERS))
def installation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(
        tmp_path_factory.mktemp("kills"),
        binary=Path(SERVERS[request.param]),
        jobs__lease_seconds=3,
        worker__adopt_seconds=0,
    ) as running:
        running.expected = npy(running, running.extract(**BODY))  # type: ignore[attr-defined]
        yield running


def submit(running: Stack) -> str:
    answer = running.client.post("/v1/extractions", json=BODY)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def until_halfway(running: Stack, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = running.client.get(f"/v1/jobs/{job_id}").json()
        assert job["status"] in ("queued", "running"), job
        if job["progress"]["stage"] == "forward" and job["progress"]["done"] > 0:
            return
        time.sleep(0.02)
    raise TimeoutError(job)


def ended(running: Stack) -> int:
    """How many extractions ever succeeded, as the broker counts."""
    for line in running.client.get("/metrics").text.splitlines():
        if line.startswith('bathyscope_jobs_ended_total{kind="extraction",status="succeeded"}'):
            return int(float(line.rpartition(" ")[2]))
    return 0


def check(running: Stack, job_id: str, before: int) -> dict[str, Any]:
    """Succeeded, once, right, and nothing left over."""
    job = running.job(job_id)
    assert job["status"] == "succeeded", job
    time.sleep(0.3)
    assert ended(running) == before + 1
    extraction = running.client.get(job["resource"]).json()
    assert_close(npy(running, extraction), running.expected)  # type: ignore[attr-defined]
    blobs = running.data_dir / "artifacts" / "blobs" / extraction["id"]
    assert len(list(blobs.iterdir())) == 1
    assert not matching(running.data_dir / "scratch", "*/job_*")
    return job


def test_the_engine_is_killed(of_workers: Stack) -> None:
    before = ended(of_workers)
    job_id = submit(of_workers)
    until_halfway(of_workers, job_id)
    [engine] = of_workers.engines()
    os.kill(engine, signal.SIGKILL)
    job = check(of_workers, job_id, before)
    assert job["attempt"] == 2


def test_the_supervisor_is_killed(of_workers: Stack) -> None:
    before = ended(of_workers)
    job_id = submit(of_workers)
    until_halfway(of_workers, job_id)
    engines = of_workers.engines()
    of_workers.kill("worker0")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{engine}").exists() for engine in engines) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{engine}").exists() for engine in engines)
    of_workers.start("worker0", "worker")
    check(of_workers, job_id, before)


def test_the_service_is_killed(installation: Stack) -> None:
    before = ended(installation)
    job_id = submit(installation)
    until_halfway(installation, job_id)
    installation.kill("service")
    installation.start("service", "service")
    installation.wait_alive()
    check(installation, job_id, before)


def test_the_queue_is_killed(installation: Stack) -> None:
    before = ended(installation)
    job_id = submit(installation)
    until_halfway(installation, job_id)
    pid = installation.valkey.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    installation.valkey.start()
    check(installation, job_id, before)


def test_the_queue_is_out_of_reach_and_says_so(installation: Stack) -> None:
    pid = installation.valkey.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    answer = installation.client.post("/v1/extractions", json=BODY)
    assert answer.status_code == 503
    assert answer.json()["type"] == "/problems/unavailable"
    assert int(answer.headers["retry-after"]) >= 1
    assert installation.client.get("/readyz").status_code == 503
    assert installation.client.get("/healthz").status_code == 200
    installation.valkey.start()
    installation.wait_ready()


def test_a_drained_worker_hands_its_job_over(of_workers: Stack) -> None:
    before = ended(of_workers)
    job_id = submit(of_workers)
    until_halfway(of_workers, job_id)
    worker = of_workers.processes["worker0"]
    worker.terminate()
    time.sleep(0.5)
    worker.terminate()  # a second one hurries
    assert worker.wait(30) == 0
    job = of_workers.client.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["attempt"]) == ("queued", 0)
    of_workers.start("worker0", "worker")
    assert check(of_workers, job_id, before)["attempt"] == 1


def test_results_outlive_everything(installation: Stack) -> None:
    extraction = installation.extract(["kept"], model="smollm2", layers=[3])
    numbers = npy(installation, extraction)
    for name in ("service", "worker0"):
        installation.kill(name)
    installation.valkey.stop()
    installation.valkey.start()
    installation.start("service", "service")
    installation.start("worker0", "worker")
    installation.wait_ready()
    again = installation.client.get(f"/v1/extractions/{extraction['id']}").json()
    assert again == extraction
    assert np.array_equal(npy(installation, again), numbers)
