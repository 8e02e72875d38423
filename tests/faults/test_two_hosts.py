"""Two workers on hosts of their own (network namespaces), with Redis and an S3 server between them, and a cut cable."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import orjson
import pytest
import redis
from moto.server import ThreadedMotoServer

from tests.files import matching
from tests.service.test_extractions import assert_close, npy
from tests.stack import Stack, free_port

HOSTS = ("near", "far")
BODY: dict[str, Any] = {
    "model": "tiny",
    "inputs": [{"token_ids": [(k * 7 + i) % 250 + 2 for i in range(400)]} for k in range(100)],
    "layers": [0, 2, 4],
    "pooling": "mean",
}


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Cables:
    """A network namespace for each host, joined by a cable of its own to the namespace of the test."""

    def __init__(self) -> None:
        number = os.getpid() % 10_000
        self.names = {host: f"bathyscope-{number}-{host}" for host in HOSTS}
        self.devices = {host: f"bs{number}{host}" for host in HOSTS}
        self.here = {host: f"10.{64 + number % 128}.{at}.1" for at, host in enumerate(HOSTS)}

    def lay(self) -> None:
        for host in HOSTS:
            name, device = self.names[host], self.devices[host]
            there = self.here[host].removesuffix("1") + "2"
            ip("netns", "add", name)
            ip("link", "add", device, "type", "veth", "peer", "name", "cable", "netns", name)
            ip("addr", "add", f"{self.here[host]}/30", "dev", device)
            ip("link", "set", device, "up")
            ip("-n", name, "addr", "add", f"{there}/30", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")

    def take_away(self) -> None:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", self.names[host]], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", self.devices[host]], capture_output=True, check=False)

    def cut(self, host: str) -> None:
        ip("link", "set", self.devices[host], "down")

    def mend(self, host: str) -> None:
        ip("link", "set", self.devices[host], "up")


@pytest.fixture(scope="module")
def cables() -> Iterator[Cables]:
    laid = Cables()
    try:
        try:
            laid.lay()
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield laid
    finally:
        laid.take_away()


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[int, Any]]:
    """A port, and a client that sees what is stored."""
    server = ThreadedMotoServer(ip_address="0.0.0.0", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="two-hosts")
    yield port, client
    client.close()
    server.stop()


@pytest.fixture(scope="module")
def installation(
    cables: Cables, bucket: tuple[int, Any], models: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The service beside Redis and the store; each worker has only its cable."""
    redis_port, (s3_port, _) = free_port(), bucket

    def reached_at(address: str) -> dict[str, str]:
        options = {
            "endpoint": f"http://{address}:{s3_port}",
            "allow_http": "true",
            "access_key_id": "a",
            "secret_access_key": "b",
            "region": "us-east-1",
        }
        return {
            "BATHYSCOPE_REDIS_URL": f"redis://{address}:{redis_port}",
            "BATHYSCOPE_STORE_OPTIONS": orjson.dumps(options).decode(),
        }

    running = Stack(
        tmp_path_factory.mktemp("two-hosts"),
        models=models,
        packaged_model="false",
        store_url="s3://two-hosts/artifacts",
        jobs__lease_seconds=3,
        worker__concurrent_jobs=4,
    )
    try:
        server = redis.Redis.from_url(running.valkey.url)
        server.config_set("protected-mode", "no")
        server.config_set("bind", " ".join(["127.0.0.1", *cables.here.values()]))
        server.config_set("port", redis_port)
        server.close()
        running.environment |= reached_at("127.0.0.1")
        running.start("service", "service")
        for host in HOSTS:
            folder = running.data_dir / host
            environment = {
                **running.environment,
                **reached_at(cables.here[host]),
                "BATHYSCOPE_DATA_DIR": str(folder),
                "BATHYSCOPE_WORKER__NAME": host,
            }
            with (running.logs / f"{host}.log").open("ab") as log:
                running.processes[host] = subprocess.Popen(
                    ["ip", "netns", "exec", cables.names[host], sys.executable, "-m", "bathyscope.cli", "worker"],
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        running.wait_ready()
        yield running
    finally:
        for host in HOSTS:
            cables.mend(host)
        running.down()


def until(so: Callable[[], Any], running: Stack, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := so()):
        assert time.monotonic() < deadline, running.said()
        time.sleep(0.1)
    return found


def said_by(server: redis.Redis, host: str) -> dict[str, Any] | None:
    """What a worker last said of itself."""
    told = server.get(f"{{bathyscope}}:worker:{host}")
    return orjson.loads(told) if told is not None else None  # type: ignore[arg-type]


class Load:
    """Jobs for both workers: as many as it takes, for how fast each of them is differs between machines."""

    def __init__(self, running: Stack, server: redis.Redis) -> None:
        self.jobs: list[str] = []
        self._running, self._server = running, server

    def _told(self) -> list[list[str]]:
        """Status and worker of each job."""
        return [self._server.hmget(f"{{bathyscope}}:job:{job_id}", "status", "worker") for job_id in self.jobs]  # type: ignore[misc]

    def holders(self) -> set[str]:
        """Which workers run some of the jobs."""
        return {worker for status, worker in self._told() if status == "running"}

    def spread(self) -> None:
        """Queue jobs until both workers run some at the same time."""

        def both() -> bool:
            if all(status != "queued" for status, _ in self._told()):
                made = [self._running.client.post("/v1/extractions", json=BODY) for _ in range(8)]
                self.jobs += [answer.json()["id"] for answer in made]
            return self.holders() == set(HOSTS)

        until(both, self._running)


def test_one_load_on_two_hosts_of_which_one_is_cut_off(
    installation: Stack, cables: Cables, bucket: tuple[int, Any]
) -> None:
    server = redis.Redis.from_url(installation.valkey.url, decode_responses=True)
    _, client = bucket
    try:
        until(lambda: all(said_by(server, host) for host in HOSTS), installation)
        expected = npy(installation, installation.extract(**BODY))
        load = Load(installation, server)
        load.spread()
        cables.cut("far")
        while "far" not in load.holders():  # it had just handed in the last of them
            cables.mend("far")
            load.spread()
            cables.cut("far")
        ended = [installation.job(job_id) for job_id in load.jobs]  # the other finishes what the lost one held
        assert {job["status"] for job in ended} == {"succeeded"}, ended
        until(lambda: said_by(server, "far") is None, installation)
        assert installation.client.get("/readyz").json()["workers"] == 1
        cables.mend("far")
        until(lambda: (said_by(server, "far") or {}).get("jobs") == 0, installation)

        resources = {job["resource"].rpartition("/")[2] for job in ended}
        assert len(resources) == len(load.jobs)
        for resource_id in sorted(resources):
            extraction = installation.client.get(f"/v1/extractions/{resource_id}").json()
            assert_close(npy(installation, extraction), expected)
            kept = client.list_objects_v2(Bucket="two-hosts", Prefix=f"artifacts/blobs/{resource_id}/")
            assert kept["KeyCount"] == 1, kept  # the stale worker published nothing
        manifests = client.list_objects_v2(Bucket="two-hosts", Prefix="artifacts/manifests/")
        assert manifests["KeyCount"] == len(load.jobs) + 1
        ends: Any = server.hgetall("{bathyscope}:totals")
        assert {name: ends[name] for name in ends if name.startswith("extraction|")} == {
            "extraction|succeeded": str(len(load.jobs) + 1)
        }
        assert int(ends["|lease_lapsed"]) >= 1
        assert not matching(installation.data_dir / "far" / "scratch", "*/job_*")

        again = Load(installation, server)
        again.spread()  # both work again
        assert {installation.job(job_id)["status"] for job_id in again.jobs} == {"succeeded"}
    finally:
        server.close()
