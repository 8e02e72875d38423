"""Anything in any order: jobs, workers that die, late answers, clocks that jump; and still each job ends once, and
whoever wanted to be told of it is told once.

Hypothesis draws the steps, a real server runs them, and a small model says who may hold what. After each example the
queue is worked empty, and then everything is let expire: whatever is left in the server was lost there.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass, field
from functools import partial

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from bathyscope_backplane.broker import ENDED, Broker, BrokerLimits, HookQueue, Lease, Shard, connect, shards_of

LANES = ["cpu", "fetch", "model:m:none:auto"]
OWNERS = ["key_a", "key_b", "key_c"]
WORKERS = ["w1", "w2", "w3"]
LEASE_MS = 10_000
LEAST_STEPS = 2_000
LIMITS = BrokerLimits(
    aging_ms=7_000,
    backoff_base_ms=3_000,
    backoff_cap_ms=9_000,
    max_group_deaths=2,
    queue_ttl_ms=900_000,
    result_ttl_ms=3_600_000,
    lane_queued=40,
    owner_open=40,
    reap_batch=5,
    events_kept=20,
)
PROBLEM = {"type": "/problems/out-of-memory", "title": "Out of memory", "status": 500, "detail": "Too big."}
RELEASES = {
    "drain": "drain",
    "elsewhere": "elsewhere",
    "alone": "engine_died_alone",
    "together": "engine_died_together",
    "hung alone": "engine_hung_alone",
    "hung together": "engine_hung_together",
}
DEEDS = ["finish", "retry", "final", "postpone", "move", *RELEASES, "stop", "progress", "mark", "renew"]
_namespaces = itertools.count(1)


@dataclass
class Model:
    """What must be so: who holds each job now, and how those that ended did."""

    holder: dict[str, str | None] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    deeds: dict[tuple[str, str], str] = field(default_factory=dict)
    awaited: set[str] = field(default_factory=set)
    told: set[str] = field(default_factory=set)


class Machine(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    leases = Bundle("leases")
    steps = 0
    """Taken by all examples together."""

    def __init__(self, url, audit, new_job):
        super().__init__()
        self.audit, self.new_job = audit, new_job
        self.runner = asyncio.Runner()
        self.namespace = f"machine{next(_namespaces)}"
        self.redis = connect(url)
        self.broker = Broker(self.redis, namespace=self.namespace, limits=LIMITS)
        self.hooks = HookQueue(self.broker)
        self.model = Model()
        self.refs = {}
        self.set_back = 0

    def run(self, awaitable):
        return self.runner.run(awaitable)

    @invariant()
    def count(self):
        Machine.steps += 1

    @initialize(target=jobs)
    def first(self):
        return self.submit(0, 0, "normal", 3, [], True, 0)

    @rule(
        target=jobs,
        lane=st.integers(0, 2),
        owner=st.integers(0, 2),
        priority=st.sampled_from(["high", "normal", "low"]),
        max_attempts=st.integers(1, 3),
        parents=st.lists(jobs, max_size=3),
        hook=st.booleans(),
        parts=st.sampled_from([0, 0, 0, 1, 2, 3]),
    )
    def submit(self, lane, owner, priority, max_attempts, parents, hook, parts):
        job = self.new_job(
            lane=LANES[lane],
            owner=OWNERS[owner],
            priority=priority,
            max_attempts=max_attempts,
            parents=() if parts else tuple(parents),
            shards=tuple(
                Shard(number=part, first=part, inputs=1, start=part, end=part + 1, rows=1 + part)
                for part in range(parts)
            ),
            webhook=f"https://hooks{owner}.example/" if hook else None,
        )
        # Sent twice, as a connection that breaks would.
        assert self.run(self.broker.submit(job)) == self.run(self.broker.submit(job))
        for id in (job.id, *(f"{job.id}+{part}" for part in range(parts))):
            self.model.holder[id] = None
        if hook:
            self.model.awaited.add(job.id)
        self.look([job.id])
        return job.id

    @rule(
        target=leases,
        worker=st.sampled_from(WORKERS),
        lanes=st.permutations(LANES),
        n=st.integers(1, 6),
        idle=st.booleans(),
        shards=st.booleans(),
    )
    def take(self, worker, lanes, n, idle, shards):
        shard_lanes = [shards_of(lane) for lane in lanes] if shards else []
        taken = self.run(
            self.broker.take(worker, lanes, n, lease_ms=LEASE_MS, engine_idle=idle, shard_lanes=shard_lanes)
        )
        self.took(taken, n, idle)
        return taken.leases

    def took(self, taken, n, idle):
        assert len(taken.leases) <= n
        assert sum(lease.shard is not None for lease in taken.leases) <= 1
        assert len({lease.lane for lease in taken.leases if lease.shard is None}) <= 1
        if any(lease.solo for lease in taken.leases):
            assert idle
            assert len(taken.leases) == 1
        for lease in taken.leases:
            assert self.model.holder[lease.job_id] is None, "given out twice"
            assert lease.job_id not in self.model.ended
            assert 1 <= lease.attempt <= lease.max_attempts
            self.model.holder[lease.job_id] = lease.ref.token
            self.refs[lease.job_id] = lease.ref

    @rule(batch=leases, at=st.integers(0, 5), deed=st.sampled_from(DEEDS))
    def work(self, batch, at, deed):
        """A worker writes: of a job that it holds, or of one that it lost long ago."""
        if at < len(batch):
            self.write(batch[at], deed)

    def write(self, lease: Lease, deed: str) -> None:
        ref, broker = lease.ref, self.broker
        if lease.shard is not None and deed == "move":
            return
        holds = self.model.holder[ref.job_id] == ref.token
        again = self.family(self.model.deeds.get((ref.job_id, ref.token))) == self.family(deed)
        cancelled = holds and self.run(broker.get(ref.job_id)).cancel_requested
        call = {
            "finish": lambda: broker.finish(ref, resource="/v1/x", timings={}),
            "retry": lambda: broker.fail(ref, PROBLEM, retry=True),
            "final": lambda: broker.fail(ref, PROBLEM, retry=False),
            "postpone": lambda: broker.postpone(ref, PROBLEM),
            "move": lambda: broker.move(ref, lane=LANES[-1], payload='{"part": 2}'),
            **{name: partial(broker.release, ref, reason=reason) for name, reason in RELEASES.items()},
            "stop": lambda: broker.acknowledge_cancel(ref),
            "progress": lambda: broker.progress(ref, stage="s", done=1, total=2, unit="inputs"),
            "mark": lambda: broker.mark_alone(ref, True),
            "renew": lambda: broker.renew([ref], LEASE_MS),
        }[deed]
        before = self.run(broker.get(ref.job_id))
        reply = self.run(call())
        if deed == "renew":
            assert reply == ["cancelled" if cancelled else "held" if holds else "lost"]
            return
        if not holds:
            # True only for the very deed that ended this attempt, whose answer may have been lost, as long as the job's
            # record is there.
            assert reply == (again and before is not None)
            assert self.run(broker.get(ref.job_id)) == before
            return
        assert reply
        if deed in {"progress", "mark"}:
            return
        self.model.holder[ref.job_id] = None
        self.model.deeds[ref.job_id, ref.token] = deed
        after = self.look([ref.job_id])[0]
        assert after is not None
        if deed == "finish":
            assert after.status == "succeeded"
        elif cancelled or deed == "stop":
            assert after.status == "cancelled"
        elif deed == "final":
            assert after.status == "failed"
        elif deed in {"drain", "elsewhere", "postpone", "move"}:
            assert (after.status, after.attempt) == ("queued", lease.attempt - 1)
            assert after.lane == (LANES[-1] if deed == "move" else lease.lane)
        else:
            assert after.status in {"queued", "failed"}
            assert after.dead_letter == (after.status == "failed")
        self.look(list(self.model.holder))

    @staticmethod
    def family(deed):
        return "fail" if deed in {"final", "retry"} else "put" if deed in RELEASES else deed

    @rule(job=jobs)
    def cancel(self, job):
        did = self.run(self.broker.cancel(job))
        held, ended = self.model.holder[job] is not None, self.model.ended.get(job)
        if ended is not None:
            assert did == {"cancelled": "already", "gone": "missing"}.get(ended, "finished")
        else:
            assert did == ("cancelling" if held else "cancelled")
        self.look(list(self.model.holder))

    @rule(ms=st.sampled_from([2_000, 6_000, 12_000, 40_000, 1_000_000, -3_000]))
    def jump(self, ms):
        self.broker.clock_skew_ms += ms
        self.set_back += max(0, -ms)

    @rule()
    def reap(self):
        while True:
            reaped = self.run(self.broker.reap())
            for job in reaped.lapsed:
                assert self.model.holder[job] is not None
                self.model.holder[job] = None
            if not reaped.more:
                break
        self.look(list(self.model.holder))

    @rule(worker=st.sampled_from(WORKERS))
    def die(self, worker):
        """A worker dies; the others renew. Its jobs are taken back when their leases are over, and only its."""
        held = {job: self.refs[job] for job, token in self.model.holder.items() if token is not None}
        self.broker.clock_skew_ms += LEASE_MS + 1 + self.set_back
        others = [ref for ref in held.values() if ref.worker != worker]
        assert "lost" not in self.run(self.broker.renew(others, LEASE_MS))
        lapsed = set()
        while (reaped := self.run(self.broker.reap())).more or reaped.lapsed:
            lapsed |= set(reaped.lapsed)
        assert lapsed == {job for job, ref in held.items() if ref.worker == worker}
        for job in lapsed:
            self.model.holder[job] = None
        self.look(list(self.model.holder))

    @rule(how=st.sampled_from(["delivered", "failed", "retry", "put back", "lost"]))
    def deliver(self, how):
        """Somebody delivers a webhook, or dies with it."""
        hook = self.run(self.hooks.claim(5_000))
        if hook is None:
            return
        assert hook.job_id in self.model.awaited
        assert self.model.ended.get(hook.job_id) in ENDED, "told of a job that has not ended"
        assert hook.delivery_id not in self.model.told, "told twice"
        if how in {"delivered", "failed"}:
            assert self.run(self.hooks.settle(hook, how))
            assert not self.run(self.hooks.settle(hook, how))
            self.model.told.add(hook.delivery_id)
        elif how != "lost":
            assert self.run(self.hooks.retry(hook, 4_000) if how == "retry" else self.hooks.put_back(hook))

    @rule(job=jobs)
    def replay(self, job):
        dead = {letter.id for letter in self.run(self.broker.dead_letters())}
        assert self.run(self.broker.replay(job)) == (job in dead)
        if job in dead:
            assert self.model.ended.pop(job) == "failed"
            for part in [id for id in self.model.holder if id.startswith(f"{job}+")]:
                self.model.ended.pop(part, None)
                self.model.holder[part] = None

    @rule(job=consumes(jobs))
    def forget(self, job):
        if job in self.model.ended:
            assert self.run(self.broker.forget(job)) == (self.model.ended[job] != "gone")
            self.model.ended[job] = "gone"
            for part in [id for id in self.model.holder if id.startswith(f"{job}+")]:
                self.model.ended[part], self.model.holder[part] = "gone", None

    def look(self, ids):
        """Holds records against the model: what ended stays as it ended, what is held runs."""
        records = [self.run(self.broker.get(id)) for id in ids]
        for id, record in zip(ids, records, strict=True):
            if record is None and "+" in id:  # it goes with its job
                assert self.model.ended.get(id.partition("+")[0]) is not None, "lost"
                self.model.ended[id] = "gone"
                continue
            if record is None:
                assert self.model.ended.get(id) is not None, "lost"
                self.model.ended[id] = "gone"
                assert self.run(self.broker.tombstone(id)) is not None
                continue
            assert (record.state == "running") == (self.model.holder[id] is not None)
            assert record.shards or (record.status == "running") == (record.state == "running")
            if record.status in ENDED:
                assert self.model.ended.setdefault(id, record.status) == record.status
            else:
                assert id not in self.model.ended
        return records

    def teardown(self):
        try:
            self.run(self.settle())
        finally:
            self.run(self.redis.aclose())
            self.runner.close()

    async def settle(self):
        prefix = f"{{{self.namespace}}}:"
        await self.audit(self.redis, prefix)
        # Every worker dies; others come and do what there is to do.
        for _ in range(200):
            self.broker.clock_skew_ms += 15_000
            for job in (await self.broker.reap()).lapsed:
                self.model.holder[job] = None
            taken = await self.broker.take(
                "another", LANES, 8, lease_ms=LEASE_MS, engine_idle=True, shard_lanes=[*map(shards_of, LANES)]
            )
            self.took(taken, 8, True)
            for lease in taken.leases:
                assert await self.broker.finish(lease.ref, resource=None, timings={})
                self.model.holder[lease.job_id] = None
            stats = await self.broker.stats()
            if not {"queued", "running"} & set(stats.jobs) and not stats.leases:
                break
        else:
            raise AssertionError("stuck")
        for id in self.model.holder:
            record = await self.broker.get(id)
            assert record.status in ENDED if record else "+" in id or await self.broker.tombstone(id)
            self.model.ended[id] = record.status if record else "gone"
        # Claims of those who died with them lapse, pauses end, and every hook is told.
        self.broker.clock_skew_ms += 10_000
        while hook := await self.hooks.claim(5_000):
            assert hook.delivery_id not in self.model.told
            self.model.told.add(hook.delivery_id)
            assert await self.hooks.settle(hook, "delivered")
        told = {delivery.rpartition(".")[0] for delivery in self.model.told}
        assert {id for id in self.model.awaited if self.model.ended[id] != "gone"} <= told
        await self.audit(self.redis, prefix)
        # And when their time is over nothing is left of them.
        self.broker.clock_skew_ms += LIMITS.result_ttl_ms + 1_000
        while (await self.broker.reap()).more:
            pass
        left = [key async for key in self.redis.scan_iter(f"*{self.namespace}?:*", count=1_000)]
        kinds = {key.removeprefix(prefix).partition(":")[0] for key in left}
        assert kinds <= {"tomb", "taken", "sequence", "totals"}


def test_every_job_ends_once(server, audit, new_job):
    """More steps: BATHYSCOPE_TEST_EXAMPLES=2000."""
    before = Machine.steps
    run_state_machine_as_test(
        lambda: Machine(server.url, audit, new_job),
        settings=settings(
            max_examples=int(os.environ.get("BATHYSCOPE_TEST_EXAMPLES", "90")),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert Machine.steps - before >= LEAST_STEPS
