"""The front end's own parts against a Redis that stops answering, and results that go while they are read."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import orjson
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer
from starlette.requests import Request

from bathyscope.errors import LaneFull, TooLarge, Unavailable
from bathyscope.types import ProbeRequest
from bathyscope_backplane.artifacts import ArtifactStore, Blob, Resource
from bathyscope_backplane.broker import Broker, BrokerLimits, NewJob, Submitted
from bathyscope_backplane.embedded import EmbeddedServer
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.keys import LOCAL
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.settings import Settings
from bathyscope_service.context import Context, Memory, Places
from bathyscope_service.extractions.representations import States
from bathyscope_service.jobs.endpoints import job_events
from bathyscope_service.jobs.submission import Work, answer, submit
from bathyscope_service.probes.endpoints import create_probe
from tests.stack import Stack, free_port, stack

REQUEST = {"type": "http", "path": "/v1/extractions", "headers": [(b"prefer", b"wait=2")]}


def request() -> Request:
    return Request({**REQUEST, "state": {"body_bytes": 100, "body_digest": "d"}})


def work(rows: int) -> Work:
    return Work(kind="extraction", lane="cpu", spec={}, rows=["deep water"] * rows, resource_id=new_id("ext"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path) as running:
        yield running


@pytest.fixture
async def context(server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Context]:
    """A front end without its HTTP, whose patience with Redis is short."""
    settings = Settings(data_dir=tmp_path, redis_url=server.url)
    async with open_backplane(settings) as plane:
        broker = Broker(plane.redis, limits=BrokerLimits(lane_queued=3), patience_s=0.4)
        async with await broker.subscribe() as listener:
            yield Context(
                plane=dataclasses.replace(plane, broker=broker),
                listener=listener,
                loopback=True,
                waiting=Places(9, 9),
                streams=Places(9, 9),
                memory=Places(2**30, 2**30),
            )


@contextmanager
def silent(server: EmbeddedServer) -> Iterator[None]:
    """Redis hears everything and answers nothing."""
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def rows_kept(context: Context) -> list[str]:
    folder = context.plane.settings.data_dir / "artifacts" / "inputs"
    return [path.stem for path in folder.glob("*")]


async def test_rows_of_a_job_that_may_be_queued_are_kept(context: Context, server: EmbeddedServer) -> None:
    await submit(context, request(), LOCAL, work(1))  # the connection and the script are there
    with silent(server), pytest.raises(Unavailable):
        await submit(context, request(), LOCAL, work(20_000))
    kept = rows_kept(context)
    assert len(kept) == 1
    payload = None  # the server had the request and queues the job when it goes on
    async with asyncio.timeout(20):
        while payload is None:
            payload = await context.plane.broker.payload(kept[0])
    assert await context.plane.store.size(orjson.loads(payload)["rows_key"])


async def test_rows_of_a_refused_job_are_not_kept(context: Context) -> None:
    for _ in range(3):
        await submit(context, request(), LOCAL, work(1))
    with pytest.raises(LaneFull):
        await submit(context, request(), LOCAL, work(20_000))
    assert not rows_kept(context)


async def test_an_accepted_job_stays_accepted(context: Context, server: EmbeddedServer) -> None:
    asked = work(1)
    job_id, replayed = await submit(context, request(), LOCAL, asked)
    with silent(server):
        told = await answer(context, request(), LOCAL, asked, job_id, replayed)
    assert told.status_code == 202
    assert told.headers["location"] == f"/v1/jobs/{job_id}"
    job = orjson.loads(told.body)
    assert (job["id"], job["kind"], job["status"]) == (job_id, "extraction", "queued")
    assert job["created_at"].endswith("Z")


async def test_the_extraction_of_a_probe_that_may_be_queued_goes_on(context: Context, server: EmbeddedServer) -> None:
    class StopsBeforeProbes(Broker):
        async def submit(self, job: NewJob) -> Submitted:
            if job.kind == "probe":
                with silent(server):
                    return await super().submit(job)
            return await super().submit(job)

    broker = StopsBeforeProbes(context.plane.redis, patience_s=0.4)
    context.plane = dataclasses.replace(context.plane, broker=broker)
    data = {"model": "smollm2", "inputs": ["a", "b", "c", "d"]}
    body = ProbeRequest.model_validate({"data": data, "labels": [0, 1, 0, 1], "folds": 2})
    with pytest.raises(Unavailable):
        await create_probe(request(), context, LOCAL, Memory(context.memory, LOCAL.id), body)
    async with asyncio.timeout(20):
        jobs = (await broker.list("local", limit=9)).jobs
        while len(jobs) < 2:
            jobs = (await broker.list("local", limit=9)).jobs
    assert {job.kind: job.status for job in jobs} == {"probe": "queued", "extraction": "queued"}


async def test_a_stream_of_events_ends_quietly(context: Context, server: EmbeddedServer) -> None:
    job_id, _ = await submit(context, request(), LOCAL, work(1))
    response: Any = await job_events(job_id, request(), context, LOCAL)
    events = aiter(response.body_iterator)
    with silent(server):
        assert await anext(events, None) is None
    assert not context.streams.taken


async def test_large_bodies_are_worked_on_beside_the_loop(context: Context) -> None:
    here = threading.get_ident()
    assert await context.apart(1000, threading.get_ident) == here
    assert await context.apart(2**24, threading.get_ident) != here


async def test_a_tombstone_lives_for_a_second_at_least(context: Context) -> None:
    catalogue = type(context.plane.catalogue)(context.plane.redis, context.plane.store, "x", tombstone_days=1e-6)
    resource = Resource(new_id("ext"), "extraction", "local", new_id("job"), 1, 2, {})
    await catalogue.commit(resource)
    await catalogue.delete(resource, expired=True)
    assert await catalogue.tombstone(resource.id) == "local"


async def states_of(
    store: ArtifactStore, tokens: list[int], *, ragged: bool, layers: int = 2, hidden: int = 4
) -> States:
    """An artifact of zeros with so many tokens in each input."""
    vectors = sum(tokens) if ragged else len(tokens)
    layout: dict[str, Any] = {}
    content = b""
    for name, dtype, array in (
        ("hidden_states", "F32", np.zeros((vectors, layers, hidden), "<f4")),
        ("token_ids", "I64", np.zeros(sum(tokens), "<i8")),
        ("offsets", "I64", np.cumsum([0, *tokens]).astype("<i8")),
    ):
        layout[name] = {"dtype": dtype, "shape": list(array.shape), "start": len(content)}
        content += array.tobytes()
        layout[name]["end"] = len(content)
    await store.put("blobs/states", content)
    body = {
        "pooling": "none" if ragged else "last",
        "layers": list(range(layers)),
        "num_layers": layers - 1,
        "inputs": len(tokens),
    }
    blobs = {"states": Blob("blobs/states", len(content), "0")}
    return States(store, Resource("ext_1", "extraction", "local", "job_1", 0, None, body, blobs, {"layout": layout}))


async def test_arrow_is_refused_for_an_input_beyond_its_bound(tmp_path: Path) -> None:
    states = await states_of(ArtifactStore(tmp_path.as_uri()), [2, 300_000, 3], ragged=True)
    selection = states.select(None, None)
    largest = 300_000 * (2 * 4 * 4 + 8)
    with pytest.raises(TooLarge, match="safetensors") as caught:
        await states.arrow(selection, largest - 1)
    assert caught.value.extra["estimate"] >= largest
    found = b"".join([piece async for piece in await states.arrow(states.select(None, "1-1"), largest)])
    assert pa.ipc.open_stream(found).read_all().num_rows == 1
    whole = b"".join([piece async for piece in await states.arrow(selection, 2 * largest)])
    assert pa.ipc.open_stream(whole).read_all().column("index").to_pylist() == [0, 1, 2]
    small = await states.arrow(states.select(None, "0-0"), 2 * (2 * 4 * 4 + 8))
    assert [piece async for piece in small]


async def test_token_ids_count_in_the_size_of_a_part(tmp_path: Path) -> None:
    states = await states_of(ArtifactStore(tmp_path.as_uri()), [400_000] * 4, ragged=False)
    pieces = [piece async for piece in await states.arrow(states.select(None, None), 2**30)]
    assert max(map(len, pieces)) < 5 * 2**20
    assert pa.ipc.open_stream(b"".join(pieces)).read_all().column("index").to_pylist() == [0, 1, 2, 3]
    with pytest.raises(TooLarge):
        await states.json(states.select(None, None), 2**20)


# --- the store ------------------------------------------------------------------------------------------


class Bucket:
    """An S3 server that can be stopped and started; what it stores stays."""

    def __init__(self) -> None:
        self.port = free_port()
        self._server: ThreadedMotoServer | None = None

    def start(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    made = Bucket()
    made.start()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{made.port}",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="outages")
    client.close()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def remote(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """An installation whose store is in that bucket."""
    options = {
        "endpoint": f"http://127.0.0.1:{bucket.port}",
        "allow_http": "true",
        "access_key_id": "a",
        "secret_access_key": "b",
        "region": "us-east-1",
    }
    with stack(
        tmp_path_factory.mktemp("remote"),
        models=models,
        packaged_model="false",
        store_url="s3://outages/artifacts",
        store_options=orjson.dumps(options).decode(),
    ) as running:
        yield running


def test_a_result_waits_for_the_store_and_new_work_is_refused(remote: Stack, bucket: Bucket) -> None:
    body = {"model": "tiny", "inputs": ["deep water"], "layers": [1]}
    kept = remote.extract(body["inputs"], model="tiny", layers=[1])  # type: ignore[arg-type]
    [engine] = remote.engines()
    os.kill(engine, signal.SIGSTOP)
    try:
        job_id = remote.client.post("/v1/extractions", json=body).json()["id"]
        deadline = time.monotonic() + 30
        while remote.client.get(f"/v1/jobs/{job_id}").json()["status"] != "running":
            assert time.monotonic() < deadline, remote.said()
        bucket.stop()
        os.kill(engine, signal.SIGCONT)
        while remote.client.get("/readyz").json()["store"]:  # what it said is believed for a second
            assert time.monotonic() < deadline, remote.said()
        for refused in (body, {**body, "inputs": ["deep water"] * 20_000}):
            answer = remote.client.post("/v1/extractions", json=refused)
            assert answer.status_code == 503, answer.text
            assert answer.json()["type"] == "/problems/unavailable"
            assert int(answer.headers["retry-after"]) >= 1
            assert "127.0.0.1" not in answer.text
        readiness = remote.client.get("/readyz")
        assert (readiness.status_code, readiness.json()["store"], readiness.json()["redis"]) == (503, False, True)
        assert remote.client.get(f"/v1/extractions/{kept['id']}").status_code == 200  # what Redis knows is told
        assert remote.client.get(f"/v1/extractions/{kept['id']}/hidden_states").status_code == 503
        while "store.fault" not in (remote.logs / "worker0.log").read_text():
            assert time.monotonic() < deadline + 60, remote.said()
        assert remote.client.get(f"/v1/jobs/{job_id}").json()["status"] == "running"
    finally:
        os.kill(engine, signal.SIGCONT)
        bucket.start()
    job = remote.job(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    remote.wait_ready()
    again = remote.extract(body["inputs"], model="tiny", layers=[1])  # type: ignore[arg-type]
    contents = {
        remote.client.get(f"/v1/extractions/{found}/hidden_states?format=npy").content
        for found in (kept["id"], again["id"], job["resource"].rpartition("/")[2])
    }
    assert len(contents) == 1
