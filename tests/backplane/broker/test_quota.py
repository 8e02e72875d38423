"""What an owner may use: counted with the submit, not for what is refused, given back when jobs end."""

from __future__ import annotations

import asyncio
import time

import pytest

from bathyscope.errors import IdempotencyMismatch, LaneFull, QuotaExceeded
from bathyscope_backplane.broker import Idempotency

DAY_MS = 86_400_000


async def test_a_days_inputs_end_with_the_day(make_broker, new_job):
    broker = make_broker()
    await broker.submit(new_job(inputs=7, inputs_limit=10))
    with pytest.raises(QuotaExceeded) as caught:
        await broker.submit(new_job(inputs=4, inputs_limit=10))
    assert caught.value.extra == {"quota": "inputs_per_day", "used": 7, "limit": 10, "asked": 4}
    for number in ("7", "10", "4"):
        assert number in caught.value.detail
    left = DAY_MS - int(time.time() * 1000) % DAY_MS
    assert caught.value.retry_after is not None
    assert abs(caught.value.retry_after * 1000 - left) < 5_000
    await broker.submit(new_job(inputs=3, inputs_limit=10))
    await broker.submit(new_job(owner="key_b", inputs=10, inputs_limit=10))
    await broker.submit(new_job(inputs=0, inputs_limit=10))  # what has no inputs costs none
    usage = await broker.usage("key_a")
    assert (usage.inputs_today, usage.open_jobs) == (10, 3)
    assert abs(usage.day_ends_ms - left) < 5_000
    tomorrow = make_broker(clock_skew_ms=left + 1)
    assert (await tomorrow.usage("key_a")).inputs_today == 0
    await tomorrow.submit(new_job(inputs=10, inputs_limit=10))


async def test_what_is_refused_or_replayed_costs_nothing(make_broker, new_job):
    broker = make_broker(lane_queued=3, owner_open=2)
    first = new_job(inputs=2, bytes=100, inputs_limit=50, bytes_limit=1000, idempotency=Idempotency("scope", "body"))
    await broker.submit(first)
    await broker.submit(first)  # sent again by a connection that broke
    again = await broker.submit(new_job(inputs=2, bytes=100, idempotency=first.idempotency))
    assert again.replayed
    with pytest.raises(IdempotencyMismatch):
        await broker.submit(new_job(inputs=2, bytes=100, idempotency=Idempotency("scope", "other")))
    await broker.submit(new_job(inputs=2, bytes=100))
    with pytest.raises(QuotaExceeded, match="2 unfinished jobs and may have 2") as caught:
        await broker.submit(new_job(inputs=2, bytes=100))
    assert caught.value.extra == {"quota": "jobs", "used": 2, "limit": 2}
    await broker.submit(new_job(owner="key_b"))
    with pytest.raises(LaneFull):
        await broker.submit(new_job(owner="key_b", inputs=2, bytes=100))
    with pytest.raises(QuotaExceeded):
        await broker.submit(new_job(owner="key_b", lane="x", inputs=2, inputs_limit=1))
    with pytest.raises(QuotaExceeded):
        await broker.submit(new_job(owner="key_b", lane="x", inputs=2, bytes=2, bytes_limit=1))
    a, b = await broker.usage("key_a"), await broker.usage("key_b")
    assert (a.inputs_today, a.bytes_promised, b.inputs_today, b.bytes_promised) == (4, 200, 0, 0)


async def test_a_replayed_request_is_answered_when_the_quota_is_used_up(broker, new_job):
    job = new_job(inputs=5, inputs_limit=5, owner_limit=1, idempotency=Idempotency("scope", "body"))
    await broker.submit(job)
    again = await broker.submit(new_job(inputs=5, inputs_limit=5, owner_limit=1, idempotency=job.idempotency))
    assert (again.id, again.replayed) == (job.id, True)


async def test_of_many_submits_at_once_no_more_pass_than_may(broker, new_job):
    outcomes = await asyncio.gather(
        *(broker.submit(new_job(inputs=3, inputs_limit=20)) for _ in range(30)), return_exceptions=True
    )
    assert sum(not isinstance(outcome, Exception) for outcome in outcomes) == 6
    assert (await broker.usage("key_a")).inputs_today == 18


async def test_bytes_are_promised_until_a_job_ends_and_again_when_it_is_replayed(make_broker, new_job):
    broker = make_broker()
    for _ in range(2):
        await broker.submit(new_job(bytes=400, bytes_limit=1000, bytes_stored=100, max_attempts=1))
    with pytest.raises(QuotaExceeded) as caught:
        await broker.submit(new_job(bytes=101, bytes_limit=1000, bytes_stored=100))
    assert caught.value.extra == {"quota": "bytes", "used": 900, "limit": 1000, "asked": 101}
    assert caught.value.retry_after == 60
    for number in ("1,000", "100", "800", "101"):
        assert number in caught.value.detail
    taken = await broker.take("w", ["cpu"], 2, lease_ms=60_000, engine_idle=True)
    done, failed = taken.leases
    await broker.finish(done.ref, resource="/x", timings={})
    assert (await broker.usage("key_a")).bytes_promised == 400
    await broker.fail(failed.ref, {"type": "/problems/x", "detail": "x"}, retry=True)
    assert (await broker.usage("key_a")).bytes_promised == 0
    assert await broker.replay(failed.job_id)
    assert (await broker.usage("key_a")).bytes_promised == 400
    await broker.cancel(failed.job_id)
    assert (await broker.usage("key_a")).bytes_promised == 0
    with pytest.raises(QuotaExceeded) as caught:
        await broker.submit(new_job(bytes=1, bytes_limit=1000, bytes_stored=1000))
    assert caught.value.retry_after == 3600


async def test_secrets_go_with_the_end_and_their_names_stay(make_broker, new_job):
    ends = {
        "succeeded": lambda broker, lease: broker.finish(lease.ref, resource="/x", timings={}),
        "failed": lambda broker, lease: broker.fail(lease.ref, {"type": "x"}, retry=False),
        "dead": lambda broker, lease: broker.fail(lease.ref, {"type": "x"}, retry=True),
        "died": lambda broker, lease: broker.release(lease.ref, reason="engine_died_alone"),
        "cancelled": lambda broker, lease: broker.acknowledge_cancel(lease.ref),
    }
    broker = make_broker()
    for name, end in ends.items():
        job = new_job(secret="sealed", credentials=("hf_token", "tinker_api_key"), max_attempts=1, lane=name)
        await broker.submit(job)
        [lease] = (await broker.take("w", [name], 1, lease_ms=60_000, engine_idle=True)).leases
        assert lease.secret == "sealed"
        await broker.release(lease.ref, reason="drain")
        [lease] = (await broker.take("w", [name], 1, lease_ms=60_000, engine_idle=True)).leases
        assert lease.secret == "sealed"  # another attempt has it too
        assert await end(broker, lease)
        assert "secret" not in await broker.redis.hgetall(f"{broker.prefix}job:{job.id}"), name
        record = await broker.get(job.id)
        assert record.credentials == ("hf_token", "tinker_api_key")
        if record.dead_letter:
            assert await broker.replay(job.id, secret="sealed anew")
            [lease] = (await broker.take("w", [name], 1, lease_ms=60_000, engine_idle=True)).leases
            assert lease.secret == "sealed anew"
            await broker.finish(lease.ref, resource="/x", timings={})
    queued = new_job(secret="sealed", credentials=("hf_token",), lane="queued")
    await broker.submit(queued)
    await make_broker(clock_skew_ms=8 * DAY_MS).reap()
    assert (await broker.get(queued.id)).status == "expired"
    assert "secret" not in await broker.redis.hgetall(f"{broker.prefix}job:{queued.id}")
