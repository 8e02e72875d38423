"""Cancel, dependencies, expiry, tombstones, dead letters."""

from __future__ import annotations

import pytest

from bathyscope.errors import StateConflict, from_problem

PROBLEM = {"type": "/problems/model-load-failed", "title": "t", "status": 500, "detail": "No such file.",
           "errors": [{"pointer": "/inputs/3", "detail": "it is empty"}]}  # fmt: skip
LEASE_MS = 30_000


async def take(broker, n=1):
    return (await broker.take("w", ["cpu"], n, lease_ms=LEASE_MS, engine_idle=True)).leases


async def statuses(broker, jobs):
    return [(await broker.get(job.id)).status for job in jobs]


async def submit(broker, *jobs):
    for job in jobs:
        await broker.submit(job)


async def test_a_queued_job_is_cancelled_at_once(broker, new_job):
    job, other = new_job(secret="sealed"), new_job()
    await submit(broker, job, other)
    assert await broker.cancel(job.id) == "cancelled"
    assert await broker.cancel(job.id) == "already"
    assert [lease.job_id for lease in await take(broker, 9)] == [other.id]
    record = await broker.get(job.id)
    assert (record.status, record.error["type"]) == ("cancelled", "/problems/job-cancelled")
    assert await broker.payload(job.id) is None


async def test_a_running_job_is_cancelled_by_its_worker(broker, new_job):
    job = new_job()
    await submit(broker, job)
    (lease,) = await take(broker)
    assert await broker.cancel(job.id) == "cancelling"
    assert await broker.cancel(job.id) == "cancelling"
    assert (await broker.get(job.id)).cancel_requested
    assert await broker.renew([lease.ref], LEASE_MS) == ["cancelled"]
    assert await broker.acknowledge_cancel(lease.ref)
    assert await broker.cancel(job.id) == "already"
    assert await statuses(broker, [job]) == ["cancelled"]


@pytest.mark.parametrize("ending", ["finish", "retry", "final", "drain", "death", "lapse"])
async def test_a_cancelled_job_ends_whatever_its_worker_does(broker, new_job, ending):
    job = new_job()
    await submit(broker, job)
    (lease,) = await take(broker)
    await broker.cancel(job.id)
    if ending == "finish":
        assert await broker.finish(lease.ref, resource="/v1/x", timings={})
    elif ending == "retry":
        assert await broker.fail(lease.ref, PROBLEM, retry=True)
    elif ending == "final":
        assert await broker.fail(lease.ref, PROBLEM, retry=False)
    elif ending == "lapse":
        broker.clock_skew_ms += LEASE_MS + 1
        await broker.reap()
    else:
        assert await broker.release(lease.ref, reason="drain" if ending == "drain" else "engine_died_alone")
    # What was finished before the cancel reached it stands.
    assert await statuses(broker, [job]) == ["succeeded" if ending == "finish" else "cancelled"]
    assert await broker.cancel(job.id) == ("finished" if ending == "finish" else "already")
    assert await take(broker) == []


async def test_a_delayed_job_can_be_cancelled(broker, new_job):
    job = new_job()
    await submit(broker, job)
    (lease,) = await take(broker)
    await broker.fail(lease.ref, PROBLEM, retry=True)
    assert await broker.cancel(job.id) == "cancelled"
    broker.clock_skew_ms += 1_000_000
    assert (await broker.reap()).promoted == 0


async def test_a_child_is_served_when_all_its_parents_succeeded(broker, new_job):
    parents = [new_job(), new_job()]
    child = new_job(parents=(parents[0].id, parents[1].id, parents[0].id), priority="high")
    grandchild = new_job(parents=(child.id,))
    await submit(broker, *parents, child, grandchild)
    record = await broker.get(child.id)
    assert (record.status, record.state, record.unmet) == ("queued", "waiting", 2)
    assert await broker.position(child.id) is None
    served = []
    for _ in range(4):
        (lease,) = await take(broker)
        served.append(lease.job_id)
        assert await broker.finish(lease.ref, resource=None, timings={})
    assert served == [parents[0].id, parents[1].id, child.id, grandchild.id]


async def test_a_child_of_parents_that_succeeded_is_ready_at_once(broker, new_job):
    parent = new_job()
    await submit(broker, parent)
    (lease,) = await take(broker)
    await broker.finish(lease.ref, resource=None, timings={})
    child = new_job(parents=(parent.id,))
    await submit(broker, child)
    assert [lease.job_id for lease in await take(broker)] == [child.id]


@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("failed", "before"),
        ("failed", "after"),
        ("cancelled", "before"),
        ("cancelled", "after"),
        ("expired", "after"),
        ("missing", "after"),
    ],
)
async def test_a_parents_failure_fails_its_children_with_the_cause(make_broker, new_job, how, when):
    """Whether they were submitted before or after their parent ended."""
    broker = make_broker(queue_ttl_ms=1_000_000)
    parent, other = new_job(), new_job(lane="fetch")
    children = [new_job(parents=(other.id, parent.id)), new_job(parents=(parent.id,))]
    family = [*children, new_job(parents=(children[0].id, children[1].id))]
    if how != "missing":
        await submit(broker, parent)
    if when == "before":
        await submit(broker, other, *family)
    if how == "failed":
        (lease,) = await take(broker)
        await broker.fail(lease.ref, PROBLEM, retry=False)
    elif how == "cancelled":
        assert await broker.cancel(parent.id) == "cancelled"
    elif how == "expired":
        broker.clock_skew_ms += 1_000_001
        assert (await broker.reap()).expired == [parent.id]
    if when == "after":
        await submit(broker, other, *family)
    assert await statuses(broker, family) == ["failed"] * 3
    for child in children:
        error = (await broker.get(child.id)).error
        assert error["type"] == "/problems/dependency-failed"
        assert error["parent"] == parent.id
        assert parent.id in error["detail"]
        assert from_problem(error).status == 424
    if how == "failed":
        for job in family:
            error = (await broker.get(job.id)).error
            assert error["cause"] == PROBLEM
            assert error["detail"].count(PROBLEM["detail"]) == 1
    assert await take(broker) == []
    assert await statuses(broker, [other]) == ["queued"]


async def test_a_retried_parent_keeps_its_children_waiting(broker, new_job):
    parent = new_job(max_attempts=2)
    child = new_job(parents=(parent.id,))
    await submit(broker, parent, child)
    (lease,) = await take(broker)
    await broker.fail(lease.ref, PROBLEM, retry=True)
    assert (await broker.get(child.id)).state == "waiting"
    broker.clock_skew_ms += 100_000
    await broker.reap()
    (lease,) = await take(broker)
    await broker.finish(lease.ref, resource=None, timings={})
    assert [lease.job_id for lease in await take(broker)] == [child.id]


async def test_a_long_chain_falls_in_one_piece(broker, new_job):
    chain = [new_job()]
    for _ in range(1_000):
        chain.append(new_job(parents=(chain[-1].id,)))
    await submit(broker, *chain)
    assert await broker.cancel(chain[0].id) == "cancelled"
    assert (await broker.stats()).jobs == {"cancelled": 1, "failed": 1_000}


async def test_cancelling_a_child_leaves_its_parents_alone(broker, new_job):
    parent = new_job()
    child = new_job(parents=(parent.id,))
    await submit(broker, parent, child)
    assert await broker.cancel(child.id) == "cancelled"
    (lease,) = await take(broker)
    assert await broker.finish(lease.ref, resource=None, timings={})
    assert await statuses(broker, [parent, child]) == ["succeeded", "cancelled"]


async def test_what_ended_goes_and_leaves_a_tombstone(make_broker, new_job):
    broker = make_broker(result_ttl_ms=1_000_000)
    job = new_job(owner="key_z")
    await submit(broker, job)
    assert await broker.tombstone(job.id) is None
    (lease,) = await take(broker)
    await broker.finish(lease.ref, resource=None, timings={})
    record = await broker.get(job.id)
    assert record.expires_at == record.finished_at + 1_000_000
    broker.clock_skew_ms += 999_000
    assert (await broker.reap()).purged == 0
    broker.clock_skew_ms += 2_000
    assert (await broker.reap()).purged == 1
    assert await broker.get(job.id) is None
    assert (await broker.list("key_z")).jobs == []
    assert await broker.events(job.id) == []
    assert await broker.tombstone(job.id) == "key_z"
    assert (await broker.stats()).jobs == {}


async def test_records_go_by_themselves_when_nobody_reaps(make_broker, new_job, until):
    broker = make_broker(result_ttl_ms=30)
    job = new_job()
    await submit(broker, job)
    await broker.cancel(job.id)

    async def gone():
        return await broker.get(job.id) is None

    await until(gone)
    assert await broker.tombstone(job.id) == job.owner
    # Lists do not trip over what is gone, and the next reap tidies up.
    assert (await broker.list(None)).jobs == []
    assert (await broker.reap()).purged == 1


async def test_a_job_that_nobody_serves_expires(make_broker, new_job):
    broker = make_broker(queue_ttl_ms=100_000)
    ready, running = new_job(), new_job(lane="fetch")
    waiting = new_job(parents=(running.id,))
    await submit(broker, ready, running, waiting)
    (lease,) = (await broker.take("w", ["fetch"], 1, lease_ms=10_000_000, engine_idle=True)).leases
    broker.clock_skew_ms += 100_001
    assert sorted((await broker.reap()).expired) == sorted([ready.id, waiting.id])
    assert await statuses(broker, [ready, running, waiting]) == ["expired", "running", "expired"]
    assert (await broker.get(ready.id)).error["type"] == "/problems/expired"
    assert await broker.finish(lease.ref, resource=None, timings={})


async def test_a_family_that_nobody_serves_expires_together(make_broker, new_job):
    """The child ends with its parent, in the same reap that finds it overdue itself: its record stays all the same."""
    broker = make_broker(queue_ttl_ms=100_000)
    parent = new_job()
    child = new_job(parents=(parent.id,))
    await submit(broker, parent, child)
    broker.clock_skew_ms += 200_000
    reaped = await broker.reap()
    assert (reaped.expired, reaped.purged) == ([parent.id], 0)
    assert await statuses(broker, [parent, child]) == ["expired", "failed"]


async def test_a_dead_letter_is_replayed_with_a_clean_slate(broker, new_job, redis, audit):
    job = new_job(max_attempts=1, payload='{"n": 1}')
    child = new_job(parents=(job.id,))
    await submit(broker, job, child)
    (lease,) = await take(broker)
    await broker.fail(lease.ref, PROBLEM, retry=True)
    assert await statuses(broker, [job, child]) == ["failed", "failed"]
    assert not await broker.replay(child.id)
    assert await broker.replay(job.id)
    assert not await broker.replay(job.id)
    assert await broker.tombstone(job.id) is None
    await audit(redis, broker.prefix)  # among others: it does not expire any more
    record = await broker.get(job.id)
    assert (record.status, record.attempt, record.error, record.finished_at, record.expires_at) == (
        "queued", 0, None, None, None,
    )  # fmt: skip
    (lease,) = await take(broker)
    assert (lease.payload, lease.attempt, lease.solo) == ('{"n": 1}', 1, False)
    assert await broker.finish(lease.ref, resource="/v1/x", timings={})
    assert await broker.dead_letters() == []


async def test_dead_letters_go_with_their_record(make_broker, new_job):
    broker = make_broker(result_ttl_ms=1_000_000)
    jobs = [new_job(max_attempts=1) for _ in range(3)]
    await submit(broker, *jobs)
    for lease in await take(broker, 3):
        await broker.fail(lease.ref, PROBLEM, retry=True)
        broker.clock_skew_ms += 10
    assert [dead.id for dead in await broker.dead_letters(2)] == [jobs[2].id, jobs[1].id]
    assert (await broker.stats()).dead_letters == 3
    broker.clock_skew_ms += 2_000_000
    await broker.reap()
    assert await broker.dead_letters() == []
    assert not await broker.replay(jobs[0].id)


async def test_forgetting_removes_what_has_ended(broker, new_job):
    job = new_job()
    await submit(broker, job)
    with pytest.raises(StateConflict):
        await broker.forget(job.id)
    (lease,) = await take(broker)
    with pytest.raises(StateConflict):
        await broker.forget(job.id)
    await broker.finish(lease.ref, resource=None, timings={})
    assert await broker.forget(job.id)
    assert not await broker.forget(job.id)
    assert await broker.get(job.id) is None
    assert await broker.tombstone(job.id) == job.owner
    assert (await broker.list(None)).jobs == []
