"""Webhooks in the broker: jobs that ended are handed out once at a time, in turns, until somebody was told."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from bathyscope_backplane.broker import HookQueue

CLAIM_MS = 10_000
DAY_MS = 86_400_000
PROBLEM = {"type": "/problems/out-of-memory", "title": "Out of memory", "status": 500, "detail": "Too big."}


@pytest.fixture
def hooks(broker):
    return HookQueue(broker)


@pytest.fixture
def ended(broker, new_job):
    """A job that has ended, whose webhook is of that host and owner."""

    async def make(host="a.example", owner="key_a", **fields):
        job = new_job(owner=owner, webhook=f"https://{host}/hook?secret=1", **fields)
        await broker.submit(job)
        (lease,) = (await broker.take("w", ["cpu"], 1, lease_ms=30_000, engine_idle=True)).leases
        assert lease.job_id == job.id
        assert await broker.finish(lease.ref, resource="/v1/x", timings={})
        return job

    return make


async def webhook_of(broker, job):
    record = await broker.get(job.id)
    return record.webhook


async def test_a_job_is_handed_out_once_it_has_ended(broker, hooks, new_job):
    job, silent = new_job(webhook="https://A.example:8443/hook"), new_job()
    for one in (job, silent):
        await broker.submit(one)
    assert (await webhook_of(broker, job)).state == "waiting"
    assert await webhook_of(broker, silent) is None
    assert await hooks.claim(CLAIM_MS) is None
    for lease in (await broker.take("w", ["cpu"], 2, lease_ms=30_000, engine_idle=True)).leases:
        assert await broker.finish(lease.ref, resource="/v1/x", timings={})
    state = await webhook_of(broker, job)
    assert (state.state, state.attempts) == ("pending", 0)
    hook = await hooks.claim(CLAIM_MS)
    assert (hook.job_id, hook.owner, hook.host) == (job.id, "key_a", "a.example")
    assert (hook.url, hook.attempt) == (job.webhook, 1)
    assert await hooks.claim(CLAIM_MS) is None
    assert await hooks.settle(hook, "delivered", status=204, detail="ok")
    state = await webhook_of(broker, job)
    assert (state.state, state.attempts, state.last_status, state.detail) == ("delivered", 1, 204, "ok")
    assert state.delivered_at is not None
    assert state.next_attempt_at is None
    broker.clock_skew_ms += DAY_MS
    assert await hooks.claim(CLAIM_MS) is None


@pytest.mark.parametrize(
    "ending", ["failed", "cancelled", "cancelled while running", "expired", "dependency", "poison"]
)
async def test_every_end_is_told(broker, hooks, new_job, ending):
    parent = new_job()
    job = new_job(webhook="https://a.example/", max_attempts=1, parents=(parent.id,) if ending == "dependency" else ())
    if ending == "dependency":
        await broker.submit(parent)
    await broker.submit(job)

    async def take():
        return (await broker.take("w", ["cpu"], 1, lease_ms=30_000, engine_idle=True)).leases[0].ref

    if ending == "failed":
        await broker.fail(await take(), PROBLEM, retry=False)
    elif ending == "cancelled":
        await broker.cancel(job.id)
    elif ending == "cancelled while running":
        ref = await take()
        await broker.cancel(job.id)
        await broker.acknowledge_cancel(ref)
    elif ending == "expired":
        broker.clock_skew_ms += 8 * DAY_MS
        await broker.reap()
    elif ending == "dependency":
        await broker.fail(await take(), PROBLEM, retry=False)
    else:
        await broker.release(await take(), reason="engine_died_alone")
    assert (await hooks.claim(CLAIM_MS)).job_id == job.id


async def test_a_claim_that_lapses_is_followed_by_another(broker, hooks, ended):
    job = await ended()
    first = await hooks.claim(CLAIM_MS)
    broker.clock_skew_ms += CLAIM_MS + 1
    second = await hooks.claim(CLAIM_MS)
    assert (second.job_id, second.attempt, second.delivery_id) == (job.id, 2, first.delivery_id)
    assert not await hooks.settle(first, "failed", detail="late")
    assert not await hooks.retry(first, 1)
    assert not await hooks.put_back(first)
    assert await hooks.settle(second, "delivered", status=200)
    assert not await hooks.settle(second, "failed")
    assert (await webhook_of(broker, job)).state == "delivered"


async def test_a_retry_waits_and_one_that_was_put_back_does_not_count(broker, hooks, ended):
    job = await ended()
    hook = await hooks.claim(CLAIM_MS)
    assert await hooks.put_back(hook)
    assert (await webhook_of(broker, job)).attempts == 0
    hook = await hooks.claim(CLAIM_MS)
    assert hook.attempt == 1
    assert await hooks.retry(hook, 60_000, status=500, detail="The answer was 500.")
    state = await webhook_of(broker, job)
    assert (state.state, state.attempts, state.last_status) == ("pending", 1, 500)
    assert state.detail == "The answer was 500."
    assert state.next_attempt_at is not None
    assert await hooks.claim(CLAIM_MS) is None
    broker.clock_skew_ms += 60_001
    assert (await hooks.claim(CLAIM_MS)).attempt == 2


async def test_no_attempt_is_planned_for_after_the_record(broker, hooks, ended):
    job = await ended()
    assert await hooks.retry(await hooks.claim(CLAIM_MS), 8 * DAY_MS, detail="no answer")
    state = await webhook_of(broker, job)
    assert (state.state, state.detail, state.next_attempt_at) == ("failed", "no answer", None)


async def test_a_replayed_job_is_told_again_under_another_id(broker, hooks, new_job):
    job = new_job(webhook="https://a.example/", max_attempts=1)
    await broker.submit(job)

    async def fail():
        (lease,) = (await broker.take("w", ["cpu"], 1, lease_ms=30_000, engine_idle=True)).leases
        await broker.fail(lease.ref, PROBLEM, retry=True)

    await fail()
    first = await hooks.claim(CLAIM_MS)
    await hooks.settle(first, "delivered", status=200)
    await broker.replay(job.id)
    state = await webhook_of(broker, job)
    assert (state.state, state.attempts, state.last_status, state.delivered_at) == ("waiting", 0, None, None)
    await fail()
    second = await hooks.claim(CLAIM_MS)
    assert second.delivery_id != first.delivery_id
    # Replayed in the middle of a delivery: what comes of it is of no interest any more.
    await broker.replay(job.id)
    assert not await hooks.settle(second, "delivered", status=200)
    assert (await webhook_of(broker, job)).state == "waiting"
    assert await hooks.claim(CLAIM_MS) is None


async def test_what_is_forgotten_is_not_told(broker, hooks, ended):
    claimed = await ended()
    hook = await hooks.claim(CLAIM_MS)
    waiting = await ended()
    for job in (claimed, waiting):
        assert await broker.forget(job.id)
    assert not await hooks.settle(hook, "delivered", status=200)
    assert await hooks.claim(CLAIM_MS) is None


async def test_an_entry_whose_record_went_by_itself_is_dropped(broker, hooks, ended, redis):
    lost, kept = await ended(), await ended()
    await redis.delete(f"{broker.prefix}job:{lost.id}")
    assert (await hooks.claim(CLAIM_MS)).job_id == kept.id
    broker.clock_skew_ms += 8 * DAY_MS
    await broker.reap()


async def test_owners_and_below_them_hosts_take_turns(hooks, ended):
    for number in range(12):
        await ended(host=f"h{number % 2}.flood", owner="key_a")
    await ended(host="late.example", owner="key_a")
    await ended(host="b.example", owner="key_b")
    claims = []
    for _ in range(6):
        claims.append(await hooks.claim(CLAIM_MS))
        await asyncio.sleep(0.002)  # turns are told apart by milliseconds
    assert "key_b" in [hook.owner for hook in claims[:3]]
    assert "late.example" in [hook.host for hook in claims]
    assert Counter(hook.host for hook in claims)["h0.flood"] <= 2


async def test_the_full_are_passed_over_however_long_their_queues(hooks, ended):
    for _ in range(5):
        await ended(host="blackhole.example", owner="key_a")
    await ended(host="a.example", owner="key_a")
    for number in range(5):
        await ended(host=f"many{number}.example", owner="key_b")
    await ended(host="blackhole.example", owner="key_c")
    await ended(host="c.example", owner="key_d")
    full = {"full_owners": ["key_b"], "full_hosts": ["blackhole.example"]}
    first, second = [await hooks.claim(CLAIM_MS, **full) for _ in range(2)]
    assert {first.host, second.host} == {"a.example", "c.example"}
    assert await hooks.claim(CLAIM_MS, **full) is None
    rest = [await hooks.claim(CLAIM_MS) for _ in range(11)]
    assert Counter(hook.owner for hook in rest) == {"key_a": 5, "key_b": 5, "key_c": 1}
    assert await hooks.claim(CLAIM_MS) is None


STEP = st.tuples(
    st.sampled_from(["end", "claim", "deliver", "retry", "put back", "lapse", "forget"]),
    st.integers(0, 3),
    st.integers(0, 5),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, min_size=5, max_size=40))
async def test_in_any_order_nothing_is_lost_or_given_out_twice(make_broker, new_job, audit, redis, steps):
    broker = make_broker()
    hooks, held, told, untold = HookQueue(broker), [], set(), set()
    for deed, who, which in steps:
        if deed == "end":
            job = new_job(owner=f"key_{who % 2}", webhook=f"https://h{which % 3}.example/{which}")
            await broker.submit(job)
            await broker.cancel(job.id)
            untold.add(job.id)
        elif deed == "claim":
            hook = await hooks.claim(CLAIM_MS, full_owners=["key_0"] if who == 3 else [])
            if hook is not None:
                assert hook.job_id in untold
                assert hook.job_id not in {other.job_id for other in held}
                assert who != 3 or hook.owner != "key_0"
                held.append(hook)
        elif deed == "lapse":
            broker.clock_skew_ms += CLAIM_MS + 1
            held.clear()
        elif deed == "forget":
            for job_id in sorted(untold)[which : which + 1]:
                assert await broker.forget(job_id)
                untold.discard(job_id)
                held = [hook for hook in held if hook.job_id != job_id]
        elif held:
            hook = held.pop(which % len(held))
            if deed == "deliver":
                assert await hooks.settle(hook, "delivered", status=200)
                told.add(hook.job_id)
                untold.discard(hook.job_id)
            elif deed == "retry":
                assert await hooks.retry(hook, 1_000 * who)
            else:
                assert await hooks.put_back(hook)
        await audit(redis, broker.prefix)
    broker.clock_skew_ms += CLAIM_MS + 10_000
    for _ in itertools.count():
        hook = await hooks.claim(CLAIM_MS)
        if hook is None:
            break
        assert hook.job_id in untold
        untold.discard(hook.job_id)
        assert await hooks.settle(hook, "delivered", status=200)
    assert not untold
