"""Serving: turns, priorities, aging, batches, jobs that must run alone."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

LEASE = {"lease_ms": 30_000, "engine_idle": True}


async def take_ids(broker, n=1, lanes=("cpu",), **given):
    taken = await broker.take("w", list(lanes), n, **{**LEASE, **given})
    return [lease.job_id for lease in taken.leases]


async def submit(broker, job):
    return (await broker.submit(job)).id


async def test_a_lease_carries_all_that_the_worker_needs(broker, new_job):
    job = new_job(payload='{"x": 1}', secret="sealed", resource_id="ext_1", priority="low", max_attempts=5)
    await broker.submit(job)
    taken = await broker.take("worker-1", ["cpu"], 4, lease_ms=1_000, engine_idle=False)
    (lease,) = taken.leases
    assert (lease.payload, lease.secret, lease.resource_id) == ('{"x": 1}', "sealed", "ext_1")
    assert (lease.attempt, lease.max_attempts, lease.solo, lease.priority) == (1, 5, False, "low")
    record = await broker.get(job.id)
    assert (record.status, record.worker, record.attempt) == ("running", "worker-1", 1)
    assert record.started_at == lease.started_at
    assert not taken.solo_waiting
    assert (await broker.events(job.id))[0].data == {"status": "running", "attempt": 1}


async def test_nothing_to_do_is_no_error(broker):
    taken = await broker.take("w", ["cpu", "fetch"], 8, **LEASE)
    assert (taken.leases, taken.solo_waiting) == ([], False)
    assert (await broker.take("w", [], 8, **LEASE)).leases == []


async def test_one_owner_is_served_in_order(broker, new_job):
    ids = [await submit(broker, new_job()) for _ in range(20)]
    assert await take_ids(broker, 7) + await take_ids(broker, 100) == ids


async def test_a_take_is_of_one_lane_and_lanes_go_in_the_order_given(broker, new_job):
    cpu = [await submit(broker, new_job()) for _ in range(2)]
    fetch = [await submit(broker, new_job(lane="fetch")) for _ in range(2)]
    assert await take_ids(broker, 9, ["model:none", "fetch", "cpu"]) == fetch
    assert await take_ids(broker, 9, ["fetch", "cpu"]) == cpu


async def test_one_job_does_not_wait_behind_five_thousand(broker, new_job):
    for _ in range(250):
        await asyncio.gather(*(broker.submit(new_job(owner="key_bulk")) for _ in range(20)))
    single = await submit(broker, new_job(owner="key_single"))
    assert await broker.position(single) == 1
    assert single in await take_ids(broker, 2)
    # Nor when bulk has been waiting for very long.
    broker.clock_skew_ms += 100 * broker.limits.aging_ms
    another = await submit(broker, new_job(owner="key_other"))
    assert another in await take_ids(broker, 2)
    assert len(await take_ids(broker, 64)) == 64


async def test_owners_take_turns(broker, new_job):
    owners = {await submit(broker, new_job(owner=f"key_{name}")): name for name in "abc" for _ in range(10)}
    turns = [owners[id] for _ in range(5) for id in await take_ids(broker, 3)]
    assert all(Counter(turns[at : at + 3]) == Counter("abc") for at in range(0, 15, 3))


async def test_coming_back_again_and_again_wins_nothing(broker, new_job):
    bulk = [await submit(broker, new_job(owner="key_bulk")) for _ in range(20)]
    served = []
    for _ in range(10):
        await broker.submit(new_job(owner="key_x"))
        await broker.submit(new_job(owner="key_y"))
        served += await take_ids(broker, 3)
    assert len(set(served) & set(bulk)) == 10


async def test_better_priorities_go_first_whoever_they_are_of(broker, new_job):
    low = await submit(broker, new_job(priority="low"))
    normal = await submit(broker, new_job(owner="key_b"))
    high = await submit(broker, new_job(owner="key_c", priority="high"))
    own_high = await submit(broker, new_job(priority="high"))
    assert await broker.position(low) == 3
    assert await take_ids(broker, 9) == [high, own_high, normal, low]


@pytest.mark.parametrize("same_owner", [True, False])
@pytest.mark.parametrize("pressure", ["high", "normal"])
async def test_low_priority_is_late_but_not_starved(broker, new_job, same_owner, pressure):
    low = await submit(broker, new_job(priority="low", owner="key_low"))
    owner = "key_low" if same_owner else "key_busy"
    served = []
    for _ in range(6):
        for _ in range(4):
            await broker.submit(new_job(priority=pressure, owner=owner))
        served.append(await take_ids(broker, 2))
        broker.clock_skew_ms += broker.limits.aging_ms // 2
    late = [turn for turn, ids in enumerate(served) if low in ids]
    # High is two classes away and normal one: as many times aging_ms must pass.
    assert late == [4 if pressure == "high" else 2]


async def test_what_was_passed_over_gets_every_second_turn_only(broker, new_job):
    lows = {await submit(broker, new_job(priority="low", owner=f"key_{n}")) for n in range(20)}
    broker.clock_skew_ms += 3 * broker.limits.aging_ms
    for _ in range(20):
        await broker.submit(new_job(priority="high", owner="key_busy"))
    first = await take_ids(broker, 10)
    assert len(lows & set(first)) == 5


async def test_a_backlog_that_is_served_does_not_age(broker, new_job):
    for _ in range(20):
        await broker.submit(new_job(priority="low", owner="key_bulk"))
    broker.clock_skew_ms += 10 * broker.limits.aging_ms
    await take_ids(broker, 2)
    highs = [await submit(broker, new_job(priority="high", owner="key_bulk")) for _ in range(3)]
    assert await take_ids(broker, 3) == highs


async def put_back_solo(broker, new_job, **given):
    """A job that was in an engine that died."""
    id = await submit(broker, new_job(**given))
    (lease,) = (await broker.take("w", ["cpu"], 1, **LEASE)).leases
    assert await broker.release(lease.ref, reason="engine_died_together")
    return id


async def test_a_solo_job_waits_for_an_idle_engine_and_goes_alone(broker, new_job):
    solo = await put_back_solo(broker, new_job)
    after = [await submit(broker, new_job()) for _ in range(3)]
    assert (await broker.lanes())[0].solo == 1
    busy = await broker.take("w", ["fetch", "cpu"], 8, lease_ms=30_000, engine_idle=False)
    assert (busy.leases, busy.solo_waiting) == ([], True)
    idle = await broker.take("w", ["cpu"], 8, **LEASE)
    assert [lease.job_id for lease in idle.leases] == [solo]
    assert idle.leases[0].solo
    assert (await broker.get(solo)).alone
    assert await take_ids(broker, 8) == after


async def test_a_take_ends_before_a_solo_job(broker, new_job):
    blocker = [await submit(broker, new_job(owner="key_b", priority="high")) for _ in range(2)]
    await submit(broker, new_job())
    (first,) = (await broker.take("w", ["cpu"], 1, **LEASE)).leases
    assert first.job_id == blocker[0]
    (second, third) = (await broker.take("w", ["cpu"], 2, **LEASE)).leases
    for lease in (first, third):
        await broker.release(lease.ref, reason="engine_died_together")
    await broker.release(second.ref, reason="drain")
    # Two highs, of which the first is solo, then the solo normal.
    taken = await broker.take("w", ["cpu"], 8, lease_ms=30_000, engine_idle=False)
    assert (taken.leases, taken.solo_waiting) == ([], True)
    assert await take_ids(broker, 8) == [first.job_id]
    partly = await broker.take("w", ["cpu"], 8, **LEASE)
    assert [lease.job_id for lease in partly.leases] == [second.job_id]
    assert partly.solo_waiting


async def test_positions_count_fair_turns(broker, new_job):
    for _ in range(10):
        await broker.submit(new_job(owner="key_a"))
    third = [await submit(broker, new_job(owner="key_b")) for _ in range(3)][-1]
    # Two of its own, and of key_a three, whose turn comes first.
    assert await broker.position(third) == 5
    order = await take_ids(broker, 13)
    assert order.index(third) == 5
    assert await broker.position(third) is None


async def test_a_take_sent_twice_gives_the_same_jobs(broker, new_job, monkeypatch):
    ids = [await submit(broker, new_job()) for _ in range(5)]
    monkeypatch.setattr("secrets.token_hex", lambda _: "the-same-call")
    first = await broker.take("w", ["cpu"], 3, **LEASE)
    again = await broker.take("w", ["cpu"], 3, **LEASE)
    assert first == again
    assert [lease.job_id for lease in again.leases] == ids[:3]
    assert [lease.attempt for lease in again.leases] == [1, 1, 1]
    monkeypatch.undo()
    assert await take_ids(broker, 3) == ids[3:]


async def test_numbers_for_metrics(broker, new_job):
    for kind in ("extraction", "probe"):
        for _ in range(3):
            await broker.submit(new_job(kind=kind, lane=f"model:{kind}"))
    parent = await submit(broker, new_job())
    await broker.submit(new_job(parents=(parent,)))
    broker.clock_skew_ms += 5_000
    (lease,) = (await broker.take("w", ["model:probe"], 1, **LEASE)).leases
    await broker.finish(lease.ref, resource="/v1/probes/prb_1", timings={})
    stats = await broker.stats()
    by_lane = {lane.lane: lane for lane in stats.lanes}
    assert {name: (lane.depth, lane.queued) for name, lane in by_lane.items()} == {
        "model:extraction": (3, 3),
        "model:probe": (2, 2),
        "cpu": (1, 2),
    }
    assert all(lane.oldest_age_ms >= 5_000 for lane in stats.lanes)
    assert stats.jobs == {"queued": 7, "succeeded": 1}
    assert stats.ended == {("probe", "succeeded"): 1}
    assert (stats.waiting, stats.delayed, stats.leases, stats.dead_letters) == (1, 0, 0, 0)
    assert json.dumps([lane.lane for lane in await broker.lanes()])
