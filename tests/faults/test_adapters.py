"""Adapters in the making, and whoever makes them really killed: the job ends well, once, with the right adapter.

Gates (`tests.faults.gated_engine`) hold the real code where half of a step is done, so that each blow falls there. In
`make test` a few of the blows; `make faults` deals all of them, with an upload and with a download from the stand-in.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bathyscope_backplane.artifacts import Swept, sweep
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.settings import Settings
from bathyscope_workers.adapters.conversion import convert
from bathyscope_workers.adapters.skeleton import Skeleton
from bathyscope_workers.adapters.source import SourceAdapter
from bathyscope_workers.adapters.unpacking import unpack
from tests.faults import WHOLE
from tests.faults.test_chaos import family
from tests.files import matching, paths_below
from tests.service.test_adapters import files, traces, upload
from tests.service.test_adapters_hostile import on_shelf
from tests.service.test_adapters_live import RANK, TEXTS, archive, assert_equal, merged
from tests.service.test_extractions import npy
from tests.stack import Stack
from tests.tinker_standin import KEY, Fault, Standin

WORKER = "worker0"

FETCHING = ("download", "unpack", "convert")
ATTACHING = ("attach", "effect")
OWN = ("upload", "move", "place", "claim", "commit")
"""Steps of the supervisor; the others are its engines'."""

SWEPT = ("upload", "move")
"""Killed there, the worker leaves files in the store that nobody names, which the sweep of orphans removes."""

BLOWS = [
    ("download", "fetch", "tinker"),
    ("attach", "model", "upload"),
    ("upload", WORKER, "upload"),
]
if WHOLE:
    BLOWS = [
        (step, victim, source)
        for step in (*FETCHING, *OWN, *ATTACHING)
        for victim in ("fetch", "model", WORKER)
        for source in ("tinker", "upload")
        if (step, source) not in {("download", "upload"), ("unpack", "tinker")}
        and (victim == WORKER or victim == ("fetch" if step in FETCHING else "model" if step in ATTACHING else ""))
    ]


@pytest.fixture(scope="module")
def tinker() -> Iterator[Standin]:
    with Standin() as standin:
        yield standin


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, models: str, tinker: Standin) -> Iterator[Stack]:
    made = Stack(
        tmp_path_factory.mktemp("gated"),
        models=models,
        worker_module="tests.faults.gated_worker",
        worker__adopt_seconds=0,
        jobs__lease_seconds=3,
        adapters__tinker_url=tinker.url,
    )
    (gates := made.data_dir / "gates").mkdir()
    made.environment["TEST_GATES"] = str(gates)
    (temporary := made.data_dir / "tmp").mkdir()
    made.environment["TMPDIR"] = str(temporary)
    try:
        made.up()
        made.extract(["warm"], model="tiny")
        yield made
    finally:
        made.down()


@pytest.fixture(autouse=True)
def alone(gated: Stack) -> Iterator[None]:
    """No test is in the way of another."""
    yield
    for adapter in gated.client.get("/v1/adapters").json()["data"]:
        gated.client.delete(f"/v1/adapters/{adapter['id']}")


def content_of(packed: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def undisturbed(folder: Path, tiny_dir: Path, packed: bytes) -> tuple[str, dict[str, bytes]]:
    """Digest and files of an adapter that nothing happens to."""
    (folder / "archive").write_bytes(packed)
    unpack(folder / "archive", folder / "files")
    converted = convert(SourceAdapter.open(folder / "files", base_model="tiny"), Skeleton.read(tiny_dir, name="tiny"))
    converted.save(folder / "peft")
    return converted.digest, {path.name: path.read_bytes() for path in (folder / "peft").iterdir()}


def submit(running: Stack, tinker: Standin, packed: bytes, source: str, **fields: str) -> str:
    if source == "upload":
        answer = upload(running.client, packed, wait=0, **fields)
    else:
        run = tinker.add_run(base_model="tiny", rank=RANK)
        path = run.add_checkpoint("external_weights", "final", dict(content_of(packed)))
        body = {"source": path, "base_model": "tiny", **fields}
        answer = running.client.post("/v1/adapters", json=body, headers={"X-Tinker-Api-Key": KEY})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@contextmanager
def held(running: Stack, tinker: Standin, step: str) -> Iterator[Any]:
    """A step that is not gone on with inside the block. Yields how to wait until it is reached."""
    gate = running.data_dir / "gates" / step
    reached = gate.with_name(f"{step}.reached")

    def arrived() -> bool:
        if step == "download":
            return bool(matching(running.data_dir / "scratch", "*/job_*/files/adapter_model.safetensors"))
        return reached.exists()

    def wait(job_id: str) -> None:
        deadline = time.monotonic() + 60
        while not arrived():
            job = running.client.get(f"/v1/jobs/{job_id}").json()
            assert step == "fail" or job["status"] in ("queued", "running"), job
            assert time.monotonic() < deadline, job
            time.sleep(0.02)

    if step == "download":
        tinker.fail("file", Fault(seconds=8, pause_after=4000))
    else:
        gate.touch()
    try:
        yield wait
    finally:
        tinker.state.faults.clear()
        gate.unlink(missing_ok=True)
        reached.unlink(missing_ok=True)


@contextmanager
def watched(running: Stack) -> Iterator[list[dict[str, Any]]]:
    """Every adapter that was visible while the block ran, each with its files, read as soon as it was seen."""
    seen: list[dict[str, Any]] = []
    faults: list[str] = []
    over = threading.Event()

    def look() -> None:
        with httpx2.Client(base_url=running.url, timeout=30) as client:
            while not over.wait(0.03):
                for adapter in client.get("/v1/adapters").json()["data"]:
                    whole = client.get(adapter["links"]["archive"])
                    if whole.status_code != 200:
                        faults.append(whole.text)
                    elif not any(adapter == known["body"] for known in seen):
                        seen.append({"body": adapter, "files": content_of(whole.content)})

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
        time.sleep(0.1)
    finally:
        over.set()
        thread.join()
    assert faults == []


def kill(running: Stack, victim: str) -> None:
    if victim != WORKER:
        [pid] = running.engines(victim)
        os.kill(pid, signal.SIGKILL)
        return
    running.kill(WORKER)
    deadline = time.monotonic() + 60  # its engines, and Tinker's SDK in a process of its own
    while time.monotonic() < deadline and len(family(running.data_dir)) > 1:
        time.sleep(0.02)
    assert list(family(running.data_dir)) == [running.processes["service"].pid]
    running.start(WORKER, "worker")


def ended(running: Stack) -> dict[str, int]:
    """How many adapter jobs ever ended, by status, as the broker counts."""
    found = {}
    for line in running.client.get("/metrics").text.splitlines():
        if line.startswith('bathyscope_jobs_ended_total{kind="adapter"'):
            found[line.split('status="')[1].partition('"')[0]] = int(float(line.rpartition(" ")[2]))
    return found


def orphans_swept(running: Stack) -> Swept:
    """The sweep of what belongs to nothing, as a worker makes it once an hour, without its grace."""

    async def run() -> Swept:
        async with open_backplane(Settings(data_dir=running.data_dir, redis_url=running.valkey.url)) as plane:
            shelf, may_run = plane.catalogue.shelf, plane.broker.may_run
            return await sweep(plane.store, plane.broker.knows, grace_s=0, shelf=shelf, job_open=may_run)

    return asyncio.run(run())


def left(running: Stack, cached: set[str]) -> list[str]:
    """Files of uploads, jobs, half downloads and half cached adapters, on a disk that has come to rest."""
    deadline = time.monotonic() + 60
    while True:
        cache = {path.name for path in (running.data_dir / "adapters").glob("*")} - {".locks"} - cached
        temporary = [path for path in paths_below(running.data_dir / "tmp") if path.is_file()]
        there = [*traces(running), *sorted(cache), *map(str, temporary)]
        if not there or time.monotonic() > deadline:
            return there
        time.sleep(0.05)


def claimed(running: Stack) -> list[str]:
    """Keys of shares and claims."""
    return [key for key in on_shelf(running) if "refs:" in key or "names:" in key or "digests:" in key]


@pytest.mark.parametrize(("step", "victim", "source"), BLOWS, ids=["-".join(blow) for blow in BLOWS])
def test_killed_in_the_midst_the_job_ends_well(
    gated: Stack, tinker: Standin, tiny_dir: Path, tmp_path: Path, step: str, victim: str, source: str
) -> None:
    seed = 100 + BLOWS.index((step, victim, source))
    packed = archive(seed, "tinker")
    digest, expected = undisturbed(tmp_path, tiny_dir, packed)
    known, before = {path.name for path in (gated.data_dir / "adapters").glob("[0-9a-f]*")}, ended(gated)

    with watched(gated) as seen:
        with held(gated, tinker, step) as reached:
            job_id = submit(gated, tinker, packed, source, name="blow")
            reached(job_id)
            if step != "commit":
                time.sleep(0.1)
                assert seen == []
            kill(gated, victim)
        job = gated.job(job_id)
    assert job["status"] == "succeeded", job
    assert job["attempt"] <= 2  # a try that ended before its part in the engine had begun does not count

    # Visible was the whole adapter, or nothing.
    assert [one["body"]["digest"] for one in seen] == [digest]
    assert seen[0]["files"] == expected
    adapter = gated.client.get(job["resource"]).json()
    assert adapter == seen[0]["body"]
    assert (adapter["tensors"], adapter["effect"]["is_noop"]) == ({"read": 24, "applied": 24}, False)
    assert ended(gated) == {**before, "succeeded": before.get("succeeded", 0) + 1}
    states = gated.extract(TEXTS, model="tiny", adapter=["base", adapter["id"]])
    for found, wanted in zip(npy(gated, states), [merged(tiny_dir, None), merged(tiny_dir, seed)], strict=True):
        assert_equal(found, wanted)

    # Nothing is left of the first try, but for what the sweep is for.
    assert left(gated, known | {digest}) == []
    cached = gated.data_dir / "adapters" / digest
    assert {path.name: path.read_bytes() for path in cached.iterdir()} == expected
    if step not in SWEPT:
        assert len(files(gated)) == 2
    swept = orphans_swept(gated)
    assert swept.uploads == swept.inputs == 0
    assert {path.name: path.read_bytes() for path in files(gated)} == expected
    assert len(files(gated)) == 2
    assert gated.client.delete(job["resource"]).status_code == 204
    assert files(gated) == []
    assert claimed(gated) == []


@pytest.mark.parametrize(
    ("step", "source"),
    [("download", "tinker"), ("convert", "upload"), ("move", "upload"), ("attach", "upload"), ("place", "tinker")],
)
def test_cancelled_in_the_midst_it_leaves_nothing(gated: Stack, tinker: Standin, step: str, source: str) -> None:
    known = {path.name for path in (gated.data_dir / "adapters").glob("[0-9a-f]*")}
    packed = archive(200 + len(step), "tinker")
    with watched(gated) as seen:
        with held(gated, tinker, step) as reached:
            job_id = submit(gated, tinker, packed, source, name="cancelled")
            reached(job_id)
            gated.client.post(f"/v1/jobs/{job_id}/cancel")
            if step == "download":  # it need not wait for bytes that do not come
                assert gated.job(job_id)["status"] == "cancelled"
            else:  # until the worker has heard of it: a job that is done before that has succeeded
                time.sleep(2)
        assert gated.job(job_id)["status"] == "cancelled"
    assert seen == []
    extra = {path.name for path in (gated.data_dir / "adapters").glob("[0-9a-f]*")} - known
    # The worker's cache is bounded, and may hold a whole one that is asked for again.
    assert len(extra) <= (step in ("place", "attach"))
    for name in extra:
        assert len(list((gated.data_dir / "adapters" / name).iterdir())) == 2
    assert left(gated, known | extra) == []
    deadline = time.monotonic() + 60
    while (files(gated) or claimed(gated)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert files(gated) == []
    assert claimed(gated) == []


def test_failed_at_its_last_step_it_leaves_nothing(gated: Stack, tinker: Standin) -> None:
    """Its file in the store goes while the worker fetches it."""
    known = {path.name for path in (gated.data_dir / "adapters").glob("[0-9a-f]*")}
    with watched(gated) as seen:
        with held(gated, tinker, "place") as reached:
            job_id = submit(gated, tinker, archive(300, "tinker"), "upload")
            reached(job_id)
            for path in files(gated):
                path.unlink()
        job = gated.job(job_id)
    assert (job["status"], job["error"]["type"]) == ("failed", "/problems/expired")
    assert seen == []
    assert left(gated, known) == []
    assert files(gated) == []
    assert claimed(gated) == []


def test_who_waits_for_another_job_holds_no_place(gated: Stack, tinker: Standin) -> None:
    """A job that makes the same as one whose claim stands goes back to the queue, and is taken again later."""
    packed = archive(700, "tinker")
    with held(gated, tinker, "claim") as reached:
        first = submit(gated, tinker, packed, "upload", name="same")
        reached(first)
        second = submit(gated, tinker, packed, "upload")
        deadline = time.monotonic() + 60
        log = gated.logs / f"{WORKER}.log"
        while not any("job.postponed" in line and second in line for line in log.read_text().splitlines()):
            assert time.monotonic() < deadline, gated.client.get(f"/v1/jobs/{second}").text
            time.sleep(0.05)
        assert gated.client.get(f"/v1/jobs/{first}").json()["status"] == "running"
    jobs = [gated.job(job_id) for job_id in (first, second)]
    assert [job["status"] for job in jobs] == ["succeeded", "succeeded"]
    assert jobs[0]["resource"] == jobs[1]["resource"]
    assert jobs[1]["attempt"] == 1  # it was no fault of its own
    assert len(files(gated)) == 2


def test_a_renewal_after_its_end_keeps_nobody_from_clearing_up(gated: Stack, tinker: Standin) -> None:
    """The lease is gone by then, and that looks as if another worker had taken the job."""
    known = {path.name for path in (gated.data_dir / "adapters").glob("[0-9a-f]*")}
    with held(gated, tinker, "fail") as reached:
        answer = upload(gated.client, archive(600, "tinker")[:4000], wait=0)
        reached(answer.json()["id"])
        deadline = time.monotonic() + 60
        while "job.lease_lost" not in (log := gated.said()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "job.lease_lost" in log
    assert gated.job(answer.json()["id"])["status"] == "failed"
    assert left(gated, known) == []


@pytest.mark.skipif(not WHOLE, reason="in the whole form only: BATHYSCOPE_FAULTS=whole")
@pytest.mark.parametrize("step", ["convert", "move", "claim"])
def test_cancelled_while_no_worker_lives(gated: Stack, tinker: Standin, step: str) -> None:
    """Nobody is there to clear up: what is left goes with the sweep, and hinders nobody."""
    known = {path.name for path in (gated.data_dir / "adapters").glob("[0-9a-f]*")}
    packed = archive(400 + len(step), "tinker")
    with held(gated, tinker, step) as reached:
        job_id = submit(gated, tinker, packed, "upload", name="unlucky")
        reached(job_id)
        gated.kill(WORKER)
    gated.client.post(f"/v1/jobs/{job_id}/cancel")
    gated.start(WORKER, "worker")
    assert gated.job(job_id)["status"] == "cancelled"
    orphans_swept(gated)
    assert files(gated) == []
    extra = {path.name for path in (gated.data_dir / "adapters").glob("[0-9a-f]*")} - known
    assert left(gated, known | extra) == []
    again = gated.job(submit(gated, tinker, packed, "upload", name="unlucky"))
    assert again["status"] == "succeeded", again
    assert len(files(gated)) == 2
    gated.client.delete(again["resource"])
    assert files(gated) == []


def test_cancelled_in_its_queue_its_archive_goes_at_once(gated: Stack, tinker: Standin) -> None:
    gated.processes[WORKER].send_signal(signal.SIGSTOP)
    try:
        job_id = submit(gated, tinker, archive(500, "tinker"), "upload")
        assert traces(gated)
        assert gated.client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        assert traces(gated) == []
    finally:
        gated.processes[WORKER].send_signal(signal.SIGCONT)
