"""Waiting: wake-ups by job and by lane, and what an outage does to those who wait."""

from __future__ import annotations

import asyncio

import pytest

from bathyscope.errors import Unavailable
from bathyscope_backplane.broker import Broker, connect

LONG = 30  # seconds: far more than any wake-up takes, so that only a lost one runs into it


async def take(broker, lanes=("cpu",), worker="w"):
    return (await broker.take(worker, list(lanes), 1, lease_ms=30_000, engine_idle=True)).leases


async def test_every_change_of_a_job_wakes_who_waits_for_it(broker, new_job):
    job, other = new_job(), new_job(lane="fetch")
    await broker.submit(job)
    await broker.submit(other)
    async with await broker.subscribe() as listener, listener.job(job.id) as waiter, listener.job(other.id) as deaf:
        (lease,) = await take(broker)
        assert await waiter.wait(LONG)
        await broker.progress(lease.ref, stage="forward", done=1, total=2, unit="inputs")
        assert await waiter.wait(LONG)
        await broker.finish(lease.ref, resource=None, timings={})
        assert await waiter.wait(LONG)
        assert not await deaf.wait(0)
        assert not await waiter.wait(0)


async def test_a_wake_up_before_the_wait_is_not_lost(broker, new_job):
    job = new_job()
    await broker.submit(job)
    async with await broker.subscribe() as listener, listener.job(job.id) as waiter, listener.job(job.id) as second:
        await broker.cancel(job.id)
        assert await second.wait(LONG)
        assert await waiter.wait(LONG)


async def test_waiters_leave_nothing_behind(broker, new_job):
    async with await broker.subscribe() as listener:
        async with listener.job("job_1"), listener.job("job_1"), listener.bell(["cpu"]):
            pass
        assert not listener._jobs
        assert not listener._bells


@pytest.mark.parametrize("how", ["submit", "release", "retry", "parent", "lapse", "replay"])
async def test_the_bell_rings_for_each_job_made_ready(broker, new_job, how):
    job = new_job(max_attempts=1 if how == "replay" else 3)
    if how != "submit":
        await broker.submit(job)
        (lease,) = await take(broker)
    if how == "parent":
        await broker.submit(new_job(parents=(job.id,)))
    if how in {"retry", "replay"}:
        await broker.fail(lease.ref, {"detail": "x"}, retry=True)
    async with (
        await broker.subscribe() as listener,
        listener.bell(["cpu"]) as bell,
        listener.bell(["fetch"]) as other,
        listener.bell() as every,
    ):
        if how == "submit":
            await broker.submit(job)
        elif how == "release":
            await broker.release(lease.ref, reason="drain")
        elif how == "parent":
            await broker.finish(lease.ref, resource=None, timings={})
        elif how == "replay":
            await broker.replay(job.id)
        else:
            broker.clock_skew_ms += 10_000_000
            await broker.reap()
        assert await bell.wait(LONG)
        assert await every.wait(LONG)
        assert not await other.wait(0)
        assert len(await take(broker)) == 1


async def test_the_bell_tells_a_worker_what_to_stop(broker, new_job):
    job = new_job()
    await broker.submit(job)
    async with (
        await broker.subscribe() as listener,
        listener.bell(["cpu"], worker="w1") as bell,
        listener.bell(["fetch"], worker="w2") as other,
    ):
        await take(broker, worker="w1")
        await broker.cancel(job.id)
        assert await bell.wait(LONG)
        assert bell.stops() == {job.id}
        assert bell.stops() == set()
        assert not await other.wait(0)


async def test_after_an_outage_everybody_looks_again(own_server, own_client, new_job, until):
    """What happened while the connection was down was published to nobody."""
    broker = Broker(own_client)
    job = new_job()
    await broker.submit(job)
    async with (
        await broker.subscribe() as listener,
        listener.job(job.id) as waiter,
        listener.bell(["nothing"]) as bell,
    ):
        for _ in range(2):
            own_server.stop()
            await until(lambda: not listener.connected)
            own_server.start()
            assert await waiter.wait(LONG)
            assert await bell.wait(LONG)
            assert listener.connected
        # And it hears what comes now.
        await broker.cancel(job.id)
        assert await waiter.wait(LONG)


async def test_a_connection_cut_by_the_server_is_made_anew(own_client, new_job):
    broker = Broker(own_client)
    job = new_job()
    await broker.submit(job)
    async with await broker.subscribe() as listener, listener.job(job.id) as waiter:
        await own_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        assert await waiter.wait(LONG)
        await broker.cancel(job.id)
        assert await waiter.wait(LONG)


async def test_closing_wakes_who_still_waits(broker):
    listener = await broker.subscribe()
    async with listener.job("job_1") as waiter:
        waiting = asyncio.create_task(waiter.wait(LONG))
        await asyncio.sleep(0)
        await listener.aclose()
        assert await waiting
    await listener.aclose()


async def test_listening_to_nobody_is_told_at_once(tmp_path):
    client = connect(f"unix://{tmp_path}/nobody.sock", retries=1)
    with pytest.raises(Unavailable):
        await Broker(client).subscribe()
    await client.aclose()
