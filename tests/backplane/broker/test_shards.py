"""A split job: its shards are jobs to workers and nothing to anybody else."""

from __future__ import annotations

from typing import Any

import pytest

from bathyscope.errors import LaneFull
from bathyscope_backplane.broker import Broker, Lease, NewJob, Shard, base_lane, shards_of
from tests.backplane.broker.conftest import MakeBroker, MakeJob

LANE = "model:m:none:auto"
PROBLEM = {"type": "/problems/out-of-memory", "title": "Out of memory", "status": 500, "detail": "Too big."}


@pytest.fixture
def split(new_job: MakeJob) -> Any:
    def make(parts: int = 3, **given: Any) -> NewJob:
        shards = [
            Shard(number=number, first=10 * number, inputs=10, start=100 * number, end=100 * number + 100, rows=20)
            for number in range(parts)
        ]
        return new_job(lane=LANE, shards=tuple(shards), resource_id="ext_1", **given)

    return make


async def take(broker: Broker, n: int = 1, *, worker: str = "w", shards: bool = True, idle: bool = True) -> list[Lease]:
    taken = await broker.take(
        worker, [LANE], n, lease_ms=10_000, engine_idle=idle, shard_lanes=[shards_of(LANE)] if shards else []
    )
    return taken.leases


async def finish(broker: Broker, lease: Lease) -> None:
    assert await broker.finish(lease.ref, resource=None, timings={})


def test_lanes_of_shards() -> None:
    assert base_lane(shards_of(LANE)) == base_lane(LANE) == LANE


async def test_one_after_the_other_and_then_the_whole(broker: Broker, split: Any) -> None:
    job = split(payload='{"shards": 3}', trace="00-ab")
    assert (await broker.submit(job)).id == job.id
    assert [one.id for one in (await broker.list(None)).jobs] == [job.id]
    for number in range(3):
        [lease] = await take(broker, 5)  # not all at once: others want some
        assert lease.job_id == f"{job.id}+{number}"
        assert lease.whole_id == job.id
        assert lease.shard == job.shards[number]
        assert (lease.kind, lease.lane) == ("shard", shards_of(LANE))
        assert (lease.payload, lease.resource_id, lease.trace) == (job.payload, "ext_1", "00-ab")
        record = await broker.get(job.id)
        assert record is not None
        assert (record.status, record.state, record.worker) == ("running", "split", None)
        await finish(broker, lease)
    began = record.started_at
    broker.clock_skew_ms += 5_000
    [lease] = await take(broker)
    assert (lease.job_id, lease.shard, lease.kind, lease.attempt) == (job.id, None, "extraction", 1)
    assert lease.started_at == began
    await finish(broker, lease)
    record = await broker.get(job.id)
    assert record is not None
    assert (record.status, record.started_at) == ("succeeded", began)
    assert (await broker.stats()).ended == {("extraction", "succeeded"): 1}


async def test_others_go_before_a_second_shard(broker: Broker, split: Any, new_job: MakeJob) -> None:
    await broker.submit(split())
    small = [new_job(lane=LANE) for _ in range(2)]
    for job in small:
        await broker.submit(job)
    leases = await take(broker, 8)
    assert [lease.shard is not None for lease in leases] == [True, False, False]
    assert [lease.job_id for lease in leases[1:]] == [job.id for job in small]


async def test_progress_is_the_sum(broker: Broker, split: Any) -> None:
    job = split(2)
    await broker.submit(job)
    [first], [second] = await take(broker), await take(broker, worker="v")

    async def done() -> tuple[int, int | None]:
        record = await broker.get(job.id)
        assert record is not None
        assert record.progress is not None
        return record.progress.done, record.progress.total

    await broker.progress(first.ref, stage="tokenise", done=9, total=10, unit="inputs")
    await broker.progress(first.ref, stage="forward", done=5, total=10, unit="inputs")
    assert await done() == (10, 40)
    await broker.progress(second.ref, stage="forward", done=1, total=20, unit="inputs")
    assert await done() == (11, 40)
    await broker.release(first.ref, reason="drain")
    assert await done() == (1, 40)
    await finish(broker, second)
    assert await done() == (20, 40)
    events = [event for event in await broker.events(job.id) if event.type == "progress"]
    assert [event.data["done"] for event in events] == [10, 11, 1, 20]


async def test_what_counts_is_the_job(broker: Broker, split: Any) -> None:
    job = split(inputs=30, bytes=7, webhook="https://hook.example/")
    await broker.submit(job)
    usage = await broker.usage(job.owner)
    assert (usage.open_jobs, usage.inputs_today, usage.bytes_promised) == (1, 30, 7)
    [lane] = await broker.lanes()
    assert (lane.lane, lane.depth, lane.queued) == (LANE, 3, 4)
    [lease] = await take(broker)
    broker.clock_skew_ms += 9_000
    [lane] = await broker.lanes()
    assert lane.oldest_age_ms == 0  # nobody need hurry to a lane that is being served
    assert (await broker.stats()).jobs == {"running": 1}
    await broker.release(lease.ref, reason="drain")
    broker.clock_skew_ms += 2_000
    [lane] = await broker.lanes()
    assert lane.oldest_age_ms >= 9_000
    assert await broker.cancel(job.id) == "cancelled"
    assert (await broker.usage(job.owner)).open_jobs == 0


async def test_owners_take_turns_whatever_their_jobs_are_split_into(broker: Broker, split: Any) -> None:
    large = [split(6, owner="key_a"), split(6, owner="key_a")]
    for job in large:
        await broker.submit(job)
    late = split(2, owner="key_b")
    await broker.submit(late)
    turns = [(await take(broker, worker=f"w{number}"))[0] for number in range(4)]
    assert [lease.owner for lease in turns] == ["key_a", "key_b", "key_a", "key_b"]
    assert {lease.whole_id for lease in turns if lease.owner == "key_a"} == {large[0].id}


async def test_a_lane_counts_it_as_one(make_broker: MakeBroker, split: Any, new_job: MakeJob) -> None:
    broker = make_broker(lane_queued=2)
    await broker.submit(split(5))
    await broker.submit(new_job(lane=LANE, owner="key_b"))
    with pytest.raises(LaneFull):
        await broker.submit(new_job(lane=LANE, owner="key_b"))


async def test_a_shard_that_fails_fails_the_job_and_stops_the_others(broker: Broker, split: Any) -> None:
    job = split()
    await broker.submit(job)
    [first], [second] = await take(broker), await take(broker, worker="v")
    assert await broker.fail(first.ref, PROBLEM, retry=False)
    record = await broker.get(job.id)
    assert record is not None
    assert (record.status, record.error, record.dead_letter) == ("failed", PROBLEM, False)
    assert await broker.renew([second.ref], 10_000) == ["cancelled"]
    assert await take(broker, 5) == []
    assert await broker.acknowledge_cancel(second.ref)
    assert (await broker.stats()).leases == 0
    assert await broker.get(job.id) == record


async def test_a_shard_is_tried_again_by_the_rules_of_jobs(broker: Broker, split: Any) -> None:
    job = split(1, max_attempts=2)
    await broker.submit(job)
    [lease] = await take(broker)
    assert await broker.release(lease.ref, reason="engine_died_together")
    assert await take(broker, idle=False) == []  # alone now
    [lease] = await take(broker, 5)
    assert (lease.solo, lease.attempt) == (True, 1)
    broker.clock_skew_ms += 11_000
    assert (await broker.reap()).lapsed == [lease.job_id]
    [lease] = await take(broker)
    assert lease.attempt == 2
    record = await broker.get(job.id)
    assert record is not None
    assert (record.status, record.shard_attempt) == ("running", 2)
    assert await broker.fail(lease.ref, PROBLEM, retry=True)
    record = await broker.get(job.id)
    assert record is not None
    assert (record.status, record.error, record.dead_letter, record.reason) == (
        "failed",
        PROBLEM,
        True,
        "attempts_spent",
    )
    assert [letter.id for letter in await broker.dead_letters()] == [job.id]


async def test_a_replay_runs_what_did_not_succeed(broker: Broker, split: Any) -> None:
    job = split(max_attempts=1)
    await broker.submit(job)
    [first] = await take(broker)
    await finish(broker, first)
    [second], [third] = await take(broker), await take(broker, worker="v")
    assert await broker.fail(second.ref, PROBLEM, retry=True)
    assert await broker.may_run(job.id)
    assert await broker.replay(job.id)
    assert await broker.renew([third.ref], 10_000) == ["lost"]  # it was to stop, and is begun anew
    leases = [(await take(broker))[0], (await take(broker))[0]]
    assert sorted(lease.job_id for lease in leases) == [second.job_id, third.job_id]
    for lease in leases:
        await finish(broker, lease)
    [whole] = await take(broker)
    assert whole.job_id == job.id
    # Of a join that failed for good, only the join is made again.
    assert await broker.fail(whole.ref, PROBLEM, retry=True)
    assert await broker.replay(job.id)
    [whole] = await take(broker)
    assert whole.job_id == job.id
    await finish(broker, whole)


async def test_the_end_of_the_job_ends_its_shards(make_broker: MakeBroker, split: Any) -> None:
    broker = make_broker(queue_ttl_ms=60_000, result_ttl_ms=100_000)
    served, unserved = split(), split()
    await broker.submit(served)
    [lease] = await take(broker)
    await broker.submit(unserved)
    broker.clock_skew_ms += 61_000
    await broker.renew([lease.ref], 10_000)
    assert (await broker.reap()).expired == [unserved.id]
    record = await broker.get(served.id)
    assert record is not None
    assert record.status == "running"
    # What is forgotten while a worker is at it leaves nothing.
    assert await broker.cancel(served.id) == "cancelled"
    assert await broker.forget(served.id)
    assert not await broker.finish(lease.ref, resource=None, timings={})
    assert (await broker.stats()).leases == 0
    assert await take(broker, 5) == []


async def test_position_and_children(broker: Broker, split: Any, new_job: MakeJob) -> None:
    first, second = split(), split(2)
    child = new_job(parents=(second.id,))
    for job in (first, second, child):
        await broker.submit(job)
    assert await broker.position(second.id) == 3
    for _ in range(5):
        for lease in await take(broker):
            await finish(broker, lease)
    leases = await take(broker, 5)
    assert [lease.job_id for lease in leases] == [first.id, second.id]
    for lease in leases:
        await finish(broker, lease)
    record = await broker.get(child.id)
    assert record is not None
    assert record.state == "ready"


async def test_a_submit_that_is_sent_again_splits_once(broker: Broker, split: Any) -> None:
    job = split()
    assert await broker.submit(job) == await broker.submit(job)
    assert (await broker.lanes())[0].queued == 4


def test_a_job_with_parents_is_not_split(split: Any) -> None:
    with pytest.raises(ValueError, match="parents"):
        split(parents=("job_1",))
