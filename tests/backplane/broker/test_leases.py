"""Attempts: fencing, renewal, lapses, retries, deaths of engines."""

from __future__ import annotations

from dataclasses import replace

import pytest

PROBLEM = {"type": "/problems/out-of-memory", "title": "Out of memory", "status": 500, "detail": "Too big."}
LEASE_MS = 30_000


async def take(broker, n=1, worker="w", idle=True):
    return (await broker.take(worker, ["cpu"], n, lease_ms=LEASE_MS, engine_idle=idle)).leases


async def attempts(broker, ref):
    """What each write of a worker says, in the order of harm."""
    return [
        await broker.renew([ref], LEASE_MS) == ["held"],
        await broker.mark_alone(ref, True),
        await broker.progress(ref, stage="forward", done=1, total=2, unit="inputs"),
        await broker.release(ref, reason="drain"),
        await broker.release(ref, reason="engine_died_alone"),
        await broker.acknowledge_cancel(ref),
        await broker.fail(ref, PROBLEM, retry=True),
        await broker.fail(ref, PROBLEM, retry=False),
        await broker.finish(ref, resource="/v1/stale", timings={}),
    ]


async def test_a_stale_attempt_changes_nothing(broker, new_job):
    job = new_job()
    await broker.submit(job)
    (old,) = await take(broker, worker="w1")
    broker.clock_skew_ms += LEASE_MS + 1
    assert (await broker.reap()).lapsed == [job.id]
    assert not any(await attempts(broker, old.ref))
    (new,) = await take(broker, worker="w1")  # the same worker, even
    before = await broker.get(job.id)
    assert not any(await attempts(broker, old.ref))
    assert not any(await attempts(broker, replace(new.ref, worker="w2")))
    assert not any(await attempts(broker, replace(new.ref, token="guessed")))
    assert await broker.get(job.id) == before
    assert await broker.finish(new.ref, resource="/v1/x", timings={"inference": 0.5})
    done = await broker.get(job.id)
    assert not any(await attempts(broker, old.ref))
    assert await broker.get(job.id) == done
    assert (done.status, done.resource, done.timings) == ("succeeded", "/v1/x", {"inference": 0.5})


async def test_writes_of_nobody_change_nothing(broker, new_job):
    job = new_job()
    await broker.submit(job)
    (lease,) = await take(broker)
    await broker.release(lease.ref, reason="drain")
    ref = replace(lease.ref, token="")
    assert not any(await attempts(broker, ref))
    assert not any(await attempts(broker, replace(ref, job_id="job_none")))


async def test_an_answer_that_was_lost_is_given_again(broker, new_job):
    """A connection that breaks after the server acted sends the same write again."""
    for _ in range(5):
        await broker.submit(new_job())
    finished, failed, retried, drained, stopped = await take(broker, 5)
    await broker.cancel(stopped.job_id)
    for _ in range(2):
        assert await broker.finish(finished.ref, resource="/v1/x", timings={})
        assert await broker.fail(failed.ref, PROBLEM, retry=False)
        assert await broker.fail(retried.ref, PROBLEM, retry=True)
        assert await broker.release(drained.ref, reason="drain")
        assert await broker.acknowledge_cancel(stopped.ref)
    # But another deed of an attempt that is over is refused.
    assert not await broker.fail(finished.ref, PROBLEM, retry=True)
    assert not await broker.finish(retried.ref, resource=None, timings={})
    assert (await broker.get(retried.job_id)).attempt == 1
    assert len(await broker.events(finished.job_id)) == 2


async def test_renewing_keeps_a_job_for_ever(broker, new_job):
    await broker.submit(new_job())
    (lease,) = await take(broker)
    for _ in range(10):
        broker.clock_skew_ms += LEASE_MS - 5_000
        assert (await broker.reap()).lapsed == []
        assert await broker.renew([lease.ref], LEASE_MS) == ["held"]
    assert await take(broker) == []
    assert await broker.finish(lease.ref, resource=None, timings={})
    assert await broker.renew([lease.ref], LEASE_MS) == ["lost"]
    assert await broker.renew([], LEASE_MS) == []


async def test_a_late_renewal_is_good_as_long_as_nobody_took_the_job(broker, new_job):
    await broker.submit(new_job())
    (lease,) = await take(broker)
    broker.clock_skew_ms += 2 * LEASE_MS
    assert await broker.renew([lease.ref], LEASE_MS) == ["held"]
    assert (await broker.reap()).lapsed == []


async def test_renew_answers_each_in_order(broker, new_job):
    for _ in range(3):
        await broker.submit(new_job())
    held, cancelled, lost = await take(broker, 3)
    await broker.cancel(cancelled.job_id)
    await broker.finish(lost.ref, resource=None, timings={})
    assert await broker.renew([held.ref, cancelled.ref, lost.ref], LEASE_MS) == ["held", "cancelled", "lost"]


async def test_progress_is_kept_and_announced(broker, new_job):
    job = new_job()
    await broker.submit(job)
    (lease,) = await take(broker)
    assert (await broker.get(job.id)).progress is None
    assert await broker.progress(lease.ref, stage="load", done=0, total=None, unit="bytes")
    assert await broker.progress(lease.ref, stage="forward", done=5, total=9, unit="inputs")
    progress = (await broker.get(job.id)).progress
    assert (progress.stage, progress.done, progress.total, progress.unit) == ("forward", 5, 9, "inputs")
    await broker.finish(lease.ref, resource=None, timings={})
    events = await broker.events(job.id)
    assert [event.type for event in events] == ["status", "progress", "progress", "done"]
    assert events[-1].data == {"status": "succeeded"}
    assert await broker.events(job.id, after=events[1].id) == events[2:]


async def test_event_streams_stay_short(make_broker, new_job):
    broker = make_broker(events_kept=10)
    job = new_job()
    await broker.submit(job)
    (lease,) = await take(broker)
    for number in range(1_000):
        await broker.progress(lease.ref, stage="forward", done=number, total=1_000, unit="inputs")
    events = await broker.events(job.id)
    assert len(events) < 300  # the server trims whole nodes of its list
    assert events[-1].data["done"] == 999


async def test_retries_pause_longer_each_time_and_then_end_as_a_dead_letter(make_broker, new_job):
    broker = make_broker(backoff_base_ms=10_000, backoff_cap_ms=15_000)
    job = new_job(max_attempts=3)
    await broker.submit(job)
    for attempt, longest in ((1, 10_000), (2, 15_000)):
        (lease,) = await take(broker)
        assert lease.attempt == attempt
        assert await broker.fail(lease.ref, PROBLEM, retry=True)
        record = await broker.get(job.id)
        assert (record.status, record.state, record.error, record.reason) == ("queued", "delayed", PROBLEM, "retry")
        # Half of the pause is jitter, the other half is certain.
        broker.clock_skew_ms += longest // 2 - 2_000
        assert (await broker.reap()).promoted == 0
        assert await take(broker) == []
        broker.clock_skew_ms += longest // 2 + 4_000
        assert (await broker.reap()).promoted == 1
    (lease,) = await take(broker)
    assert await broker.fail(lease.ref, PROBLEM, retry=True)
    record = await broker.get(job.id)
    assert (record.status, record.error, record.dead_letter) == ("failed", PROBLEM, True)
    assert [dead.id for dead in await broker.dead_letters()] == [job.id]


async def test_a_failure_that_no_retry_would_mend_is_final(broker, new_job):
    job = new_job()
    await broker.submit(job)
    (lease,) = await take(broker)
    assert await broker.fail(lease.ref, PROBLEM, retry=False)
    record = await broker.get(job.id)
    assert (record.status, record.attempt, record.dead_letter) == ("failed", 1, False)
    assert await broker.dead_letters() == []


async def test_a_drain_does_not_count_and_keeps_the_place(broker, new_job):
    job, later = new_job(max_attempts=1), new_job()
    await broker.submit(job)
    await broker.submit(later)
    for _ in range(5):
        (lease,) = await take(broker)
        assert (lease.job_id, lease.attempt, lease.solo) == (job.id, 1, False)
        assert await broker.release(lease.ref, reason="drain")
    assert [lease.job_id for lease in await take(broker, 2)] == [job.id, later.id]


@pytest.mark.parametrize("how", ["death", "lapse"])
async def test_a_poison_job_fails_and_its_batch_mates_never_do(broker, new_job, how):
    """An engine dies whenever the poison is in it; all others succeed, whatever shared its batch."""
    poison = new_job(max_attempts=2)
    innocent = [new_job(max_attempts=1) for _ in range(12)]
    for job in [*innocent[:5], poison, *innocent[5:]]:
        await broker.submit(job)
    for _ in range(200):
        leases = await take(broker, 4)
        if not leases:
            break
        alone = len(leases) == 1
        if poison.id not in [lease.job_id for lease in leases]:
            for lease in leases:
                assert await broker.finish(lease.ref, resource=None, timings={})
        elif how == "death":
            for lease in leases:
                assert await broker.release(lease.ref, reason="engine_died_alone" if alone else "engine_died_together")
        else:
            broker.clock_skew_ms += LEASE_MS + 1
            assert sorted((await broker.reap()).lapsed) == sorted(lease.job_id for lease in leases)
    dead = await broker.get(poison.id)
    assert (dead.status, dead.attempt, dead.group_deaths, dead.dead_letter) == ("failed", 2, 1, True)
    assert dead.error["type"] == ("/problems/engine-died" if how == "death" else "/problems/lease-lapsed")
    for job in innocent:
        record = await broker.get(job.id)
        assert (record.status, record.attempt) == ("succeeded", 1)
        assert record.error is None


async def test_deaths_in_company_have_a_bound_of_their_own(make_broker, new_job):
    broker = make_broker(max_group_deaths=2)
    job = new_job(max_attempts=1)
    await broker.submit(job)
    for deaths in (1, 2):
        (lease,) = await take(broker)
        assert await broker.release(lease.ref, reason="engine_died_together")
        record = await broker.get(job.id)
        assert (record.status, record.group_deaths, record.attempt) == ("queued", deaths, 0)
    (lease,) = await take(broker)
    assert await broker.release(lease.ref, reason="engine_died_together")
    record = await broker.get(job.id)
    assert (record.status, record.dead_letter) == ("failed", True)
    assert record.error["type"] == "/problems/engine-died"


async def test_a_lapse_counts_only_for_who_was_alone(broker, new_job):
    jobs = [new_job(max_attempts=1), new_job(max_attempts=1)]
    for job in jobs:
        await broker.submit(job)
    alone, together = await take(broker, 2)
    assert await broker.mark_alone(alone.ref, True)
    assert await broker.mark_alone(together.ref, True)
    assert await broker.mark_alone(together.ref, False)
    broker.clock_skew_ms += LEASE_MS + 1
    await broker.reap()
    assert (await broker.get(alone.job_id)).status == "failed"
    again = await broker.get(together.job_id)
    assert (again.status, again.solo, again.attempt) == ("queued", True, 0)


async def test_a_lapse_of_many_is_reaped_in_batches(make_broker, new_job):
    broker = make_broker(reap_batch=3)
    for _ in range(7):
        await broker.submit(new_job())
    assert len(await take(broker, 7)) == 7
    broker.clock_skew_ms += LEASE_MS + 1
    lapsed = []
    while True:
        reaped = await broker.reap()
        lapsed += reaped.lapsed
        if not reaped.more:
            break
    assert len(set(lapsed)) == 7
