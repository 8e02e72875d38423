"""Jobs put back for want of room or of the store, and a server at its memory limit."""

from __future__ import annotations

import pytest

from bathyscope.errors import OutOfSpace

PROBLEM = OutOfSpace("The worker's disk has no room left.").problem()
LEASE_MS = 30_000


async def taken(broker):
    return (await broker.take("w", ["cpu"], 1, lease_ms=LEASE_MS, engine_idle=True)).leases


async def test_it_comes_again_later_each_time_and_never_counts(make_broker, new_job):
    broker = make_broker(backoff_base_ms=1_000, backoff_cap_ms=8_000)
    job = new_job(max_attempts=2)
    await broker.submit(job)
    for pause in (1_000, 2_000, 4_000, 8_000, 8_000, 8_000):
        [lease] = await taken(broker)
        assert lease.attempt == 1
        assert await broker.postpone(lease.ref, PROBLEM)
        assert await broker.postpone(lease.ref, PROBLEM)  # the answer was lost, and it is sent again
        record = await broker.get(job.id)
        assert (record.status, record.state, record.attempt, record.reason) == ("queued", "delayed", 0, "postponed")
        assert record.error == PROBLEM
        broker.clock_skew_ms += pause // 2 - 300
        assert (await broker.reap()).promoted == 0
        broker.clock_skew_ms += pause // 2 + 300
        assert (await broker.reap()).promoted == 1
    [lease] = await taken(broker)
    assert await broker.finish(lease.ref, resource=None, timings={})
    record = await broker.get(job.id)
    assert (record.status, record.attempt, record.error) == ("succeeded", 1, None)


async def test_what_was_cancelled_meanwhile_ends(broker, new_job):
    job = new_job()
    await broker.submit(job)
    [lease] = await taken(broker)
    assert await broker.cancel(job.id) == "cancelling"
    assert await broker.postpone(lease.ref, PROBLEM)
    assert (await broker.get(job.id)).status == "cancelled"


async def test_a_stale_worker_postpones_nothing(broker, new_job):
    job = new_job()
    await broker.submit(job)
    [lease] = await taken(broker)
    broker.clock_skew_ms += LEASE_MS + 1
    await broker.reap()
    [again] = await taken(broker)
    assert not await broker.postpone(lease.ref, PROBLEM)
    assert (await broker.get(job.id)).status == "running"
    assert await broker.finish(again.ref, resource=None, timings={})


async def test_what_nobody_can_serve_expires(make_broker, new_job):
    broker = make_broker(queue_ttl_ms=60_000)
    job = new_job()
    await broker.submit(job)
    [lease] = await taken(broker)
    await broker.postpone(lease.ref, PROBLEM)
    broker.clock_skew_ms += 60_001
    await broker.reap()
    await broker.reap()
    assert (await broker.get(job.id)).status == "expired"


async def test_a_full_server_says_so_before_anything_is_done(own_server, own_client, new_job):
    from bathyscope_backplane.broker import Broker

    broker = Broker(own_client)
    held, waiting = new_job(), new_job()
    for job in (held, waiting):
        await broker.submit(job)
    [lease] = await taken(broker)
    used = (await own_client.info("memory"))["used_memory"]
    await own_client.config_set("maxmemory", used // 2)
    refused = new_job()
    with pytest.raises(OutOfSpace) as caught:
        await broker.submit(refused)
    assert caught.value.retry_after
    assert not await broker.knows(refused.id)
    # All that leads towards the end of a job goes on.
    assert await broker.renew([lease.ref], LEASE_MS) == ["held"]
    assert await broker.progress(lease.ref, stage="forward", done=1, total=2, unit="inputs")
    assert await broker.mark_alone(lease.ref, True)
    assert await broker.postpone(lease.ref, PROBLEM)
    [other] = await taken(broker)
    assert await broker.finish(other.ref, resource="/v1/extractions/x", timings={})
    assert await broker.cancel(held.id) == "cancelled"
    await broker.reap()
    assert await broker.forget(held.id)
    await own_client.config_set("maxmemory", 0)
    await broker.submit(refused)
