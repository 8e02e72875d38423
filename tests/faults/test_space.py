"""Full disks, a store that cannot be written, a full Redis: new work is refused, what runs is kept, all recovers.

The disks are small file systems in memory, mounted for the test; where that is not allowed it is skipped and says so.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis

from tests.faults.test_kills import SERVERS
from tests.stack import Stack, stack

SMALL: dict[str, Any] = {"model": "tiny", "inputs": ["deep water"], "layers": [1]}
TEXT = "small fish 🐟, pressure and light; " * 8
DISK = 64 * 2**20


def until(so: Callable[[], Any], running: Stack, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := so()):
        assert time.monotonic() < deadline, running.said()
        time.sleep(0.05)
    return found


def refused(answer: httpx2.Response, slug: str) -> None:
    assert answer.status_code == 503, answer.text
    assert answer.json()["type"] == f"/problems/{slug}"
    assert int(answer.headers["retry-after"]) >= 1


def submitted(running: Stack, body: dict[str, Any]) -> str:
    answer = running.client.post("/v1/extractions", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def status(running: Stack, job_id: str) -> str:
    return str(running.client.get(f"/v1/jobs/{job_id}").json()["status"])


def refuses(running: Stack) -> httpx2.Response | None:
    answer = running.client.post("/v1/extractions", json=SMALL)
    return answer if answer.status_code == 503 else None


def works(running: Stack) -> bool:
    answer = running.post("/v1/extractions", SMALL)
    return answer.status_code == 200 and answer.json()["status"] == "succeeded"


def logged(running: Stack, event: str, job_id: str) -> bool:
    """Whether the worker has said that of the job."""
    lines = (running.logs / "worker0.log").read_text().splitlines()
    return any(f'"{event}"' in line and job_id in line for line in lines)


def mount(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """An installation whose scratch folder and whose store are small disks, each of its own."""
    folder = tmp_path_factory.mktemp("disks")
    mounted: list[Path] = []
    try:
        for name in ("scratch", "store"):
            (folder / name).mkdir()
            mount(folder / name, "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs")
            mounted.append(folder / name)
        with stack(
            folder, models=models, packaged_model="false", store_url=(folder / "store").as_uri(), log_level="info"
        ) as running:
            running.extract(["warm"], model="tiny", layers=[0])
            yield running
    finally:
        for place in mounted:
            subprocess.run(["umount", "-l", place], check=True)


@contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """A disk with so many bytes left."""
    filler = folder / "filler"
    facts = os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, facts.f_bavail * facts.f_frsize - left)
    try:
        yield
    finally:
        filler.unlink()


def large(megabytes: int) -> dict[str, Any]:
    """A request whose result has about so many megabytes: 640 bytes a token of the tiny model."""
    tokens = 400
    rows = megabytes * 2**20 // (640 * tokens) + 1
    row = {"token_ids": [5] * tokens}
    return {"model": "tiny", "inputs": [row] * rows, "layers": "all", "pooling": "none"}


@pytest.mark.parametrize("name", ["scratch", "store"])
def test_nothing_is_accepted_while_a_disk_is_nearly_full(disks: Stack, name: str) -> None:
    with filled(disks.data_dir / name, DISK // 20):  # a tenth is kept
        answer = until(lambda: refuses(disks), disks)
        refused(answer, "out-of-space")
        assert "delete results" in answer.json()["detail"]
        assert str(disks.data_dir) not in answer.text
        readiness = disks.client.get("/readyz")
        assert readiness.status_code == 503
        assert {**readiness.json(), "workers": 1} == {
            "ready": False, "redis": True, "store": True, "space": False, "workers": 1,
        }  # fmt: skip
        assert disks.client.get("/v1/extractions").status_code == 200
    until(lambda: works(disks), disks)
    disks.wait_ready()


def test_a_job_is_not_begun_while_the_disk_is_nearly_full(disks: Stack) -> None:
    [engine] = disks.engines()
    os.kill(engine, signal.SIGSTOP)
    try:
        held = submitted(disks, SMALL)
        until(lambda: status(disks, held) == "running", disks)
        with filled(disks.data_dir / "scratch", DISK // 20):
            until(lambda: refuses(disks), disks)
            os.kill(engine, signal.SIGCONT)
            assert disks.job(held)["status"] == "succeeded"  # what runs goes on
    finally:
        os.kill(engine, signal.SIGCONT)
    until(lambda: works(disks), disks)


def test_a_job_whose_scratch_fills_up_is_done_later(disks: Stack) -> None:
    with filled(disks.data_dir / "scratch", 10 * 2**20):  # more than is kept, less than the job needs
        job_id = submitted(disks, large(20))
        until(lambda: logged(disks, "job.postponed", job_id), disks)
        until(lambda: disks.client.get(f"/v1/jobs/{job_id}").json()["status"] == "queued", disks)
        assert works(disks)  # a small one goes on
    job = disks.job(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1), job
    assert disks.client.delete(job["resource"]).status_code == 204


def test_a_job_that_no_disk_of_the_worker_holds_fails_at_once(disks: Stack) -> None:
    job = disks.job(submitted(disks, large(80)))
    assert job["status"] == "failed"
    assert job["error"]["type"] == "/problems/too-large"


def test_a_result_waits_for_room_in_the_store(disks: Stack) -> None:
    with filled(disks.data_dir / "store", 10 * 2**20):
        job_id = submitted(disks, large(20))
        until(lambda: logged(disks, "store.fault", job_id), disks)
        assert status(disks, job_id) == "running"
    job = disks.job(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    states = disks.client.get(f"{job['resource']}/hidden_states")
    assert len(states.content) == disks.client.get(job["resource"]).json()["bytes"]
    assert not list((disks.data_dir / "store").rglob("*#*"))
    assert disks.client.delete(job["resource"]).status_code == 204


def test_a_result_waits_for_a_store_that_cannot_be_written(disks: Stack) -> None:
    store = disks.data_dir / "store"
    kept = disks.extract(["kept"], model="tiny", layers=[1])
    [engine] = disks.engines()
    os.kill(engine, signal.SIGSTOP)
    try:
        job_id = submitted(disks, SMALL)
        until(lambda: status(disks, job_id) == "running", disks)
        mount(store, "-o", "remount,ro")
        os.kill(engine, signal.SIGCONT)
        refused(until(lambda: refuses(disks), disks), "unavailable")
        assert disks.client.get("/readyz").json()["store"] is False
        until(lambda: logged(disks, "store.fault", job_id), disks)
        assert status(disks, job_id) == "running"
        assert disks.client.get(f"/v1/extractions/{kept['id']}/hidden_states").status_code == 200
    finally:
        os.kill(engine, signal.SIGCONT)
        mount(store, "-o", "remount,rw")
    job = disks.job(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    until(lambda: works(disks), disks)


@pytest.fixture(scope="module", params=sorted(SERVERS))
def memory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(
        tmp_path_factory.mktemp("memory"),
        binary=Path(SERVERS[request.param]),
        models=models,
        packaged_model="false",
        jobs__lease_seconds=2,
    ) as running:
        running.extract(["warm"], model="tiny", layers=[0])
        yield running


def test_a_full_redis_takes_nothing_new_and_ends_what_it_has(memory: Stack) -> None:
    server = redis.Redis.from_url(memory.valkey.url, decode_responses=True)
    [engine] = memory.engines()
    os.kill(engine, signal.SIGSTOP)
    try:
        jobs = [submitted(memory, {**SMALL, "inputs": [TEXT] * 20, "layers": "all"}) for _ in range(20)]
        cancelled = submitted(memory, SMALL)
        until(lambda: status(memory, jobs[0]) == "running", memory)
        server.config_set("maxmemory", server.info("memory")["used_memory"] // 2)
        for body in (SMALL, {**SMALL, "inputs": [TEXT] * 1000}):
            answer = memory.client.post("/v1/extractions", json=body)
            refused(answer, "out-of-space")
            assert "memory" in answer.json()["detail"]
        assert memory.client.post(f"/v1/jobs/{cancelled}/cancel").status_code == 200
        time.sleep(3)  # longer than a lease: they are renewed at the limit
        os.kill(engine, signal.SIGCONT)
        ended = [memory.job(job_id) for job_id in jobs]
        assert {(job["status"], job["attempt"]) for job in ended} == {("succeeded", 1)}, ended
        assert memory.client.get("/readyz").json()["workers"] == 1  # it still says that it lives
        assert memory.client.get(f"{ended[0]['resource']}/hidden_states").status_code == 200
        assert memory.client.delete(ended[0]["resource"]).status_code == 204
        assert memory.client.get(ended[0]["resource"]).status_code == 404
        refused(memory.client.post("/v1/extractions", json=SMALL), "out-of-space")
    finally:
        os.kill(engine, signal.SIGCONT)
        server.config_set("maxmemory", 0)
        server.close()
    assert works(memory)
    inputs = memory.data_dir / "artifacts" / "inputs"
    assert not inputs.exists() or not list(inputs.iterdir())
