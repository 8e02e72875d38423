"""Queueing: idempotency, limits, the record, lists."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from bathyscope.errors import IdempotencyMismatch, InvalidRequest, LaneFull, QuotaExceeded
from bathyscope_backplane.broker import Idempotency, Submitted


async def test_the_record_says_what_was_submitted(broker, new_job):
    job = new_job(
        lane="model:org/name:8bit:auto",
        request='{"inputs": 3, "text": "Ça va, 世界 🌍"}',
        resource_id="ext_1",
        priority="high",
        max_attempts=7,
        webhook="https://example.org/hook",
        secret="sealed",
    )
    assert await broker.submit(job) == Submitted(job.id, replayed=False)
    record = await broker.get(job.id)
    assert record is not None
    for name in ("id", "kind", "lane", "owner", "priority", "resource_id", "max_attempts", "parents"):
        assert getattr(record, name) == getattr(job, name)
    assert record.webhook is not None
    assert (record.webhook.url, record.webhook.state) == (job.webhook, "waiting")
    assert record.request == {"inputs": 3, "text": "Ça va, 世界 🌍"}
    assert (record.status, record.state, record.attempt) == ("queued", "ready", 0)
    assert not record.ended
    assert record.created_at == record.enqueued_at
    assert record.started_at is record.finished_at is record.expires_at is record.error is None
    assert await broker.payload(job.id) == job.payload
    assert await broker.position(job.id) == 0


async def test_what_never_was_is_not_there(broker):
    assert await broker.get("job_none") is None
    assert await broker.payload("job_none") is None
    assert await broker.tombstone("job_none") is None
    assert await broker.position("job_none") is None
    assert await broker.events("job_none") == []
    assert await broker.cancel("job_none") == "missing"
    assert not await broker.replay("job_none")
    assert not await broker.forget("job_none")


@pytest.mark.parametrize("wrong", [{"id": "job 1"}, {"owner": "a|b"}, {"id": ""}, {"lane": ""}, {"max_attempts": 0}])
def test_names_that_would_blur_keys_are_refused(new_job, wrong):
    with pytest.raises(ValueError, match=r"cannot be|must be"):
        new_job(**wrong)


async def test_a_submit_sent_twice_makes_one_job(broker, new_job):
    job = new_job(idempotency=Idempotency("scope", "body"))
    assert await broker.submit(job) == await broker.submit(job) == Submitted(job.id, replayed=False)
    assert (await broker.stats()).jobs == {"queued": 1}


async def test_the_same_key_and_body_is_the_same_job(broker, new_job):
    first = await broker.submit(new_job(idempotency=Idempotency("k", "body")))
    again = await broker.submit(new_job(idempotency=Idempotency("k", "body")))
    assert again == Submitted(first.id, replayed=True)
    with pytest.raises(IdempotencyMismatch):
        await broker.submit(new_job(idempotency=Idempotency("k", "another")))
    assert (await broker.stats()).jobs == {"queued": 1}


async def test_many_at_the_same_moment_with_one_key_make_one_job(broker, new_job):
    jobs = [new_job(idempotency=Idempotency("k", "body")) for _ in range(50)]
    answers = await asyncio.gather(*(broker.submit(job) for job in jobs))
    assert len({answer.id for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1
    assert len((await broker.list(None)).jobs) == 1


async def test_a_refused_submit_leaves_nothing(make_broker, new_job):
    broker = make_broker(lane_queued=1)
    await broker.submit(new_job())
    refused = new_job(idempotency=Idempotency("k", "body"))
    with pytest.raises(LaneFull) as caught:
        await broker.submit(refused)
    assert caught.value.status == 429
    assert caught.value.retry_after
    assert await broker.get(refused.id) is None
    taken = await broker.take("w", ["cpu"], 1, lease_ms=30_000, engine_idle=True)
    assert len(taken.leases) == 1
    assert not (await broker.submit(refused)).replayed


async def test_a_full_lane_leaves_others_open_and_counts_what_waits(make_broker, new_job):
    broker = make_broker(lane_queued=2)
    parent = await broker.submit(new_job())
    await broker.submit(new_job(parents=(parent.id,)))
    with pytest.raises(LaneFull):
        await broker.submit(new_job(owner="key_b"))
    await broker.submit(new_job(lane="fetch"))
    await broker.submit(new_job(lane_limit=3))


async def test_an_owner_has_a_share_until_its_jobs_end(make_broker, new_job):
    broker = make_broker(owner_open=2)
    await broker.submit(new_job())
    await broker.submit(new_job(lane="fetch"))
    taken = await broker.take("w", ["cpu"], 9, lease_ms=30_000, engine_idle=True)
    with pytest.raises(QuotaExceeded):
        await broker.submit(new_job())
    await broker.submit(new_job(owner="key_b"))
    await broker.finish(taken.leases[0].ref, resource=None, timings={})
    await broker.submit(new_job())
    with pytest.raises(QuotaExceeded):
        await broker.submit(new_job(owner="key_b", owner_limit=1))


async def test_lists_are_newest_first_and_of_one_owner(broker, new_job):
    mine = [(await broker.submit(new_job())).id for _ in range(7)]
    theirs = [(await broker.submit(new_job(owner="key_b"))).id for _ in range(3)]
    seen, cursor = [], None
    while True:
        page = await broker.list("key_a", limit=3, cursor=cursor)
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
        if cursor is None:
            break
        assert len(page.jobs) == 3
        # What comes in while one turns pages does not shift them.
        await broker.submit(new_job())
    assert seen == mine[::-1]
    assert {job.id for job in (await broker.list(None, limit=100)).jobs} >= {*mine, *theirs}
    assert [job.id for job in (await broker.list("key_b")).jobs] == theirs[::-1]
    assert (await broker.list("key_c")).jobs == []


async def test_lists_are_filtered_by_kind_and_status(broker, new_job):
    for number in range(30):
        await broker.submit(new_job(kind="probe" if number % 3 == 0 else "extraction"))
    taken = await broker.take("w", ["cpu"], 6, lease_ms=30_000, engine_idle=True)
    running = {lease.job_id for lease in taken.leases}
    probes = await broker.list("key_a", kind="probe", limit=100)
    assert len(probes.jobs) == 10
    assert {job.kind for job in probes.jobs} == {"probe"}
    assert {job.id for job in (await broker.list("key_a", status="running", limit=100)).jobs} == running
    both = await broker.list("key_a", kind="probe", status="running", limit=1)
    assert len(both.jobs) == 1
    assert both.next_cursor
    rest = await broker.list("key_a", kind="probe", status="running", limit=9, cursor=both.next_cursor)
    assert len(rest.jobs) == 1
    assert rest.next_cursor is None
    assert (await broker.list("key_a", status="failed")).jobs == []


@pytest.mark.parametrize("cursor", ["x", "job_1", "é", "MTpqb2JfOTg=", "MTpqb2JfIQ", "MjpqPTE", "'; --", "A" * 4000])
async def test_a_cursor_of_ones_own_making_is_refused(broker, cursor):
    with pytest.raises(InvalidRequest) as caught:
        await broker.list("key_a", cursor=cursor)
    assert caught.value.errors[0]["pointer"] == "/cursor"


async def test_payload_and_lists_survive_any_text(broker, new_job):
    payload = '{"inputs": ["\\u0000 | \\n {}", "' + "ß" * 20_000 + '"]}'
    job = new_job(payload=payload, owner="local", lane="model:a|b c:none:auto")
    await broker.submit(job)
    taken = await broker.take("w", [job.lane], 1, lease_ms=30_000, engine_idle=True)
    assert taken.leases[0].payload == payload
    assert replace(taken.leases[0].ref, token="") != taken.leases[0].ref
