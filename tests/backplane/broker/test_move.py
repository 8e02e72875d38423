"""A job of two parts: handed over from one lane to another."""

from __future__ import annotations

import asyncio

import pytest

from bathyscope_backplane.broker import LeaseRef

LEASE_MS = 30_000
MODEL = "model:m:none:auto"


async def take(broker, lane, worker="w", idle=True):
    return (await broker.take(worker, [lane], 1, lease_ms=LEASE_MS, engine_idle=idle)).leases


async def move(broker, lease, payload='{"part": 2}'):
    return await broker.move(lease.ref, lane=MODEL, payload=payload)


async def test_it_goes_on_in_the_other_lane_under_the_same_attempt(broker, new_job):
    job = new_job(lane="fetch", max_attempts=1, resource_id="ad_1", secret="sealed", credentials=("hf_token",))
    await broker.submit(job)
    [first] = await take(broker, "fetch")
    assert (first.attempt, first.secret) == (1, "sealed")
    assert await broker.progress(first.ref, stage="download", done=1, total=2, unit="bytes")
    assert await move(broker, first)
    record = await broker.get(job.id)
    assert (record.status, record.state, record.lane, record.attempt) == ("queued", "ready", MODEL, 0)
    assert (record.reason, record.credentials, record.progress) == ("moved", (), None)
    assert await broker.position(job.id) == 0
    assert await take(broker, "fetch") == []
    [second] = await take(broker, MODEL, worker="other")
    assert (second.attempt, second.payload, second.lane) == (1, '{"part": 2}', MODEL)
    assert (second.secret, second.resource_id, second.created_at) == (None, "ad_1", first.created_at)
    assert await broker.finish(second.ref, resource="/v1/adapters/ad_1", timings={})
    assert (await broker.get(job.id)).attempt == 1


async def test_sent_again_it_is_answered_again(broker, new_job):
    job = new_job(lane="fetch")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    assert await move(broker, lease)
    assert await move(broker, lease)  # the answer was lost
    [second] = await take(broker, MODEL)
    assert await move(broker, lease, payload="{}")  # and comes later still: nothing is done by it
    assert not await broker.finish(lease.ref, resource=None, timings={})
    record = await broker.get(job.id)
    assert (record.status, record.lane) == ("running", MODEL)
    assert await broker.finish(second.ref, resource=None, timings={})


async def test_a_stale_worker_moves_nothing(broker, new_job):
    job = new_job(lane="fetch")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    broker.clock_skew_ms += LEASE_MS + 1
    await broker.reap()
    assert not await move(broker, lease)
    assert not await broker.move(LeaseRef(job.id, "w", "never"), lane=MODEL, payload="{}")
    assert (await broker.get(job.id)).lane == "fetch"
    assert not await broker.move(LeaseRef("job_none", "w", "never"), lane=MODEL, payload="{}")


async def test_what_was_cancelled_meanwhile_ends(broker, new_job):
    job = new_job(lane="fetch", secret="sealed")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    assert await broker.cancel(job.id) == "cancelling"
    assert await move(broker, lease)
    record = await broker.get(job.id)
    assert (record.status, record.lane) == ("cancelled", "fetch")
    assert await take(broker, MODEL) == []


async def test_moved_it_is_cancelled_like_any_other(broker, new_job):
    job = new_job(lane="fetch")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    await move(broker, lease)
    assert await broker.cancel(job.id) == "cancelled"
    assert await take(broker, MODEL) == []


async def test_blame_stays_with_the_first_engine(broker, new_job):
    """After a death in the first lane it is tried alone there; the second lane's engine has nothing to fear of it."""
    job = new_job(lane="fetch")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    await broker.release(lease.ref, reason="engine_died_together")
    [again] = await take(broker, "fetch")
    assert again.solo
    assert await move(broker, again)
    [second] = await take(broker, MODEL, idle=False)
    assert (second.solo, second.attempt) == (False, 1)
    assert await broker.fail(second.ref, {"type": "/problems/x"}, retry=True)
    record = await broker.get(job.id)
    assert (record.state, record.lane, record.attempt) == ("delayed", MODEL, 1)


async def test_it_keeps_its_place_before_what_came_later(broker, new_job):
    moved = new_job(lane="fetch")
    await broker.submit(moved)
    later = new_job(lane=MODEL)
    await broker.submit(later)
    [lease] = await take(broker, "fetch")
    await move(broker, lease)
    assert [one.job_id for one in (await broker.take("w", [MODEL], 2, lease_ms=LEASE_MS, engine_idle=True)).leases] == [
        moved.id,
        later.id,
    ]


async def test_it_is_moved_into_a_full_lane(make_broker, new_job):
    broker = make_broker(lane_queued=1)
    job = new_job(lane="fetch")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    await broker.submit(new_job(lane=MODEL))
    assert await move(broker, lease)
    assert {lane.lane: lane.queued for lane in await broker.lanes()} == {MODEL: 2}


async def test_a_dead_letter_of_the_second_part_is_replayed_there(broker, new_job):
    job = new_job(lane="fetch", max_attempts=1, credentials=("hf_token",), secret="sealed")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    await move(broker, lease)
    [second] = await take(broker, MODEL)
    await broker.fail(second.ref, {"type": "/problems/x"}, retry=True)
    record = await broker.get(job.id)
    assert (record.status, record.dead_letter, record.credentials) == ("failed", True, ())
    assert await broker.replay(job.id)
    [third] = await take(broker, MODEL)
    assert third.payload == '{"part": 2}'


@pytest.mark.parametrize("workers", [8])
async def test_of_many_that_move_at_once_one_does(broker, new_job, workers):
    job = new_job(lane="fetch")
    await broker.submit(job)
    [lease] = await take(broker, "fetch")
    stale = [LeaseRef(job.id, "w", f"token{number}") for number in range(workers)]
    moved = await asyncio.gather(*(broker.move(ref, lane="cpu", payload="{}") for ref in stale), move(broker, lease))
    assert moved == [False] * workers + [True]
    assert (await broker.get(job.id)).lane == MODEL
