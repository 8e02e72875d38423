"""The ways to Redis, and what happens when it is away, restarted, full, or forgets its scripts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest
from redis.asyncio import Redis, RedisCluster

from bathyscope.errors import SetupError, Unavailable
from bathyscope_backplane.broker import Broker, BrokerLimits, connect


async def a_job_through(broker, new_job):
    job = new_job(lane="fetch")
    await broker.submit(job)
    (lease,) = (await broker.take("w", [job.lane], 1, lease_ms=30_000, engine_idle=True)).leases
    assert await broker.finish(lease.ref, resource=None, timings={})
    assert (await broker.get(job.id)).status == "succeeded"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(*command: str, port: int):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1_000):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.01)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("scheme", ["unix", "valkey+unix", "redis+unix"])
async def test_a_socket(server, new_job, scheme):
    client = connect(server.url.replace("unix", scheme, 1))
    await a_job_through(Broker(client, namespace="socket"), new_job)
    await client.aclose()


async def test_a_server_by_host_with_a_password(binary, tmp_path, new_job):
    port = free_port()
    with program(binary, "--port", str(port), "--dir", str(tmp_path), "--requirepass", "a:b@c", port=port):
        for url in (f"redis://:a%3Ab%40c@127.0.0.1:{port}/2", f"valkey://default:a%3Ab%40c@localhost:{port}"):
            client = connect(url)
            await a_job_through(Broker(client), new_job)
            await client.aclose()
        client = connect(f"redis://127.0.0.1:{port}", retries=0)
        with pytest.raises(Unavailable):
            await Broker(client).get("job_1")
        await client.aclose()


async def test_a_cluster(binary, tmp_path, new_job, until):
    """One node that holds all slots says of every key where it is, as a cluster does."""
    port = free_port()
    bus = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    with program(binary, "--port", str(port), "--dir", str(tmp_path), *bus, port=port):
        plain = Redis(port=port)
        await plain.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)

        async def whole():
            return b"cluster_state:ok" in await plain.execute_command("CLUSTER", "INFO")

        await until(whole)
        await plain.aclose()
        client = connect(f"redis+cluster://127.0.0.1:{port},127.0.0.1:{free_port()}")
        assert isinstance(client, RedisCluster)
        broker = Broker(client)
        await a_job_through(broker, new_job)
        job = new_job()
        await broker.submit(job)
        async with await broker.subscribe() as listener, listener.job(job.id) as waiter:
            await broker.cancel(job.id)
            assert await waiter.wait(30)
        await client.aclose()


async def test_sentinels(binary, tmp_path, new_job):
    port, guard = free_port(), free_port()
    (tmp_path / "sentinel.conf").write_text(f"port {guard}\nsentinel monitor main 127.0.0.1 {port} 1\n")
    with (
        program(binary, "--port", str(port), "--dir", str(tmp_path), port=port),
        program(binary, str(tmp_path / "sentinel.conf"), "--sentinel", port=guard),
    ):
        client = connect(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{guard}/main/0")
        await a_job_through(Broker(client), new_job)
        await client.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://h",
        "localhost:6379",
        "redis+sentinel://h",
        "redis+sentinel://h/s/x",
        "redis+cluster://",
        "redis://h:x",
    ],
)
def test_other_urls_are_refused_with_a_sentence(url):
    with pytest.raises(SetupError, match=r"URL"):
        connect(url)


def test_a_client_of_bytes_is_refused():
    with pytest.raises(ValueError, match="decode_responses"):
        Broker(Redis())


async def test_every_method_says_unavailable(tmp_path, new_job):
    client = connect(f"unix://{tmp_path}/nobody.sock", retries=0)
    broker = Broker(client)
    for call in (
        broker.submit(new_job()),
        broker.take("w", ["cpu"], 1, lease_ms=1, engine_idle=True),
        broker.cancel("job_1"),
        broker.reap(),
        broker.get("job_1"),
        broker.payload("job_1"),
        broker.tombstone("job_1"),
        broker.list(None),
        broker.events("job_1"),
        broker.stats(),
        broker.position("job_1"),
        broker.dead_letters(),
    ):
        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.retry_after
        assert str(tmp_path) not in str(caught.value)
    await client.aclose()


async def test_a_server_that_does_not_answer_is_not_waited_for_long(own_server):
    client = connect(own_server.url, timeout_s=0.2, retries=1)
    broker = Broker(client, patience_s=0.3)
    assert await broker.get("job_1") is None
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable):
            await broker.get("job_1")
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        while True:
            try:
                assert await broker.get("job_1") is None
                break
            except Unavailable:
                await asyncio.sleep(0.05)
    await client.aclose()


async def test_scripts_are_loaded_again_when_the_server_forgot_them(own_server, own_client, new_job):
    broker = Broker(own_client)
    await a_job_through(broker, new_job)
    await own_client.script_flush()
    await a_job_through(broker, new_job)
    own_server.stop()
    own_server.start()
    await a_job_through(broker, new_job)
    assert len((await broker.list(None)).jobs) == 3


async def test_a_short_restart_passes_unnoticed(own_server, own_client, new_job):
    broker = Broker(own_client)
    await a_job_through(broker, new_job)
    own_server.stop()
    restart = asyncio.create_task(asyncio.to_thread(own_server.start))
    await a_job_through(broker, new_job)
    await restart


async def test_a_full_server_refuses_new_jobs_and_still_ends_old_ones(own_client, new_job, audit):
    """Out of memory is told before a script begins: none stops half-way, and what frees memory goes on."""
    broker = Broker(own_client, limits=BrokerLimits(result_ttl_ms=1_000_000))
    for _ in range(4):
        await broker.submit(new_job(max_attempts=1))
    await own_client.config_set("maxmemory", "1")
    for _ in range(3):
        with pytest.raises(Unavailable, match="does not accept writes"):
            await broker.submit(new_job())
    first, second, third = (await broker.take("w", ["cpu"], 3, lease_ms=30_000, engine_idle=True)).leases
    assert await broker.renew([first.ref], 30_000) == ["held"]
    assert await broker.finish(first.ref, resource=None, timings={})
    assert await broker.fail(second.ref, {"detail": "x"}, retry=True)
    assert await broker.release(third.ref, reason="drain")
    await audit(own_client, broker.prefix)
    broker.clock_skew_ms += 2_000_000
    assert (await broker.reap()).purged == 2
    await own_client.config_set("maxmemory", "0")
    await a_job_through(broker, new_job)
    await audit(own_client, broker.prefix)


async def test_kill_nine_of_the_server_loses_no_acknowledged_job(own_server, own_client, new_job, audit, until):
    broker = Broker(own_client)
    acknowledged, running = [], True

    async def submitting():
        while running:
            job = new_job()
            while True:
                try:
                    await broker.submit(job)
                    break
                except Unavailable:
                    pass
            acknowledged.append(job.id)

    submitters = [asyncio.create_task(submitting()) for _ in range(4)]
    for round_ in range(1, 4):
        wanted = 40 * round_
        await until(lambda wanted=wanted: len(acknowledged) >= wanted)
        os.kill(own_server.pid, signal.SIGKILL)
        await asyncio.to_thread(own_server.start)
    running = False
    await asyncio.gather(*submitters)
    stats = await broker.stats()
    # Each once; nothing else, since what was not acknowledged was sent again under the same id.
    assert stats.jobs["queued"] == len(acknowledged) == len(set(acknowledged))
    await audit(own_client, broker.prefix)
    served = set()
    while leases := (await broker.take("w", ["cpu"], 64, lease_ms=30_000, engine_idle=True)).leases:
        served |= {lease.job_id for lease in leases}
    assert served == set(acknowledged)
