"""Brokers for tests, and the audit that holds every index against the hashes after each test."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from bathyscope_backplane.broker import Broker, BrokerLimits, NewJob

_numbers = itertools.count(1)

Audit = Callable[[Redis, str], Awaitable[None]]
MakeBroker = Callable[..., Broker]
MakeJob = Callable[..., NewJob]


@pytest.fixture(scope="session")
def new_job() -> MakeJob:
    """A job with whatever is not said made up."""

    def make(**given: Any) -> NewJob:
        job: dict[str, Any] = {
            "id": f"job_{next(_numbers):026d}",
            "kind": "extraction",
            "lane": "cpu",
            "owner": "key_a",
            "payload": '{"inputs": []}',
        }
        return NewJob(**{**job, **given})

    return make


@pytest.fixture(scope="session")
def audit() -> Audit:
    """Proves that lanes, rings, sets, lists and counters say exactly what the job hashes say."""
    return _audit


@pytest.fixture
async def make_broker(redis: Redis) -> AsyncIterator[MakeBroker]:
    """Brokers of one namespace that is fresh for this test; audited when the test is over."""
    namespace = f"test{next(_numbers)}"

    def make(clock_skew_ms: int = 0, **limits: Any) -> Broker:
        return Broker(redis, namespace=namespace, limits=BrokerLimits(**limits), clock_skew_ms=clock_skew_ms)

    yield make
    await _audit(redis, f"{{{namespace}}}:")


@pytest.fixture
def broker(make_broker: MakeBroker) -> Broker:
    return make_broker()


CLASSES = {"high": 0, "normal": 1, "low": 2}


async def _audit(redis: Redis, prefix: str) -> None:
    keys = {key.removeprefix(prefix) async for key in redis.scan_iter(f"{_escaped(prefix)}*", count=1000)}
    jobs: dict[str, dict[str, str]] = {}
    ids = [key.removeprefix("job:") for key in keys if key.startswith("job:")]
    async with redis.pipeline(transaction=False) as pipe:
        for id in ids:
            pipe.hgetall(f"{prefix}job:{id}").smembers(f"{prefix}children:{id}")
            pipe.ttl(f"{prefix}job:{id}").ttl(f"{prefix}events:{id}").ttl(f"{prefix}tomb:{id}")
        replies = iter(await pipe.execute())
    children, times = {}, {}
    for id in ids:
        jobs[id], children[id] = next(replies), set(next(replies))
        times[id] = (next(replies), next(replies), next(replies))

    shards = {id: jobs.pop(id) for id in ids if "+" in id}
    all_jobs = {**jobs, **shards}

    def those(state: str) -> set[str]:
        return {id for id, job in all_jobs.items() if job["state"] == state}

    async def ranked(key: str) -> dict[str, float]:
        return dict(await redis.zrange(prefix + key, 0, -1, withscores=True))

    expected: set[str] = {f"job:{id}" for id in all_jobs}

    # Each job's state has its index, and the index nothing else.
    assert set(await ranked("leases")) == those("running")
    assert set(await ranked("delayed")) == those("delayed")
    assert set(await redis.smembers(prefix + "waiting")) == those("waiting")
    assert set(await ranked("expiry")) == set(jobs)
    assert set(await ranked("dead")) == {id for id, job in jobs.items() if job.get("dead_letter") == "1"}
    assert set(await ranked("jobs")) == set(jobs)
    for owner in {job["owner"] for job in jobs.values()}:
        assert set(await ranked(f"jobs:{owner}")) == {id for id, job in jobs.items() if job["owner"] == owner}
        expected.add(f"jobs:{owner}")
    expected |= {"leases", "delayed", "waiting", "expiry", "dead", "jobs"}

    # Lanes: queue, ring, clock of being passed over, ages, and solo jobs of each.
    for lane in {job["lane"] for job in all_jobs.values()}:
        ready = {id: job for id, job in all_jobs.items() if job["state"] == "ready" and job["lane"] == lane}
        assert set(await ranked(f"age:{lane}")) == set(ready)
        assert set(await redis.smembers(f"{prefix}solo:{lane}")) == {
            i for i, job in ready.items() if job["solo"] == "1"
        }
        expected |= {f"age:{lane}", f"solo:{lane}"}
        for owner in {job["owner"] for job in jobs.values()}:
            queue = await ranked(f"ready:{lane}|{owner}")
            assert queue == {
                id: CLASSES[job["priority"]] * 2**50 + int(job["sequence"])
                for id, job in ready.items()
                if job["owner"] == owner
            }
            expected.add(f"ready:{lane}|{owner}")
        for name, number in CLASSES.items():
            owners = {job["owner"] for job in ready.values() if job["priority"] == name}
            assert set(await ranked(f"turns:{number}:{lane}")) == owners
            assert set(await ranked(f"passed:{number}:{lane}")) == (owners if number else set())
            expected |= {f"turns:{number}:{lane}", f"passed:{number}:{lane}"}
        if not ready:
            assert not await redis.hexists(prefix + "aged", lane)

    # Webhooks: the jobs that ended and are yet to be told of, by owner and host, with nothing due before its folder.
    untold = {id: job for id, job in jobs.items() if job.get("hook_state") == "pending"}
    folders: dict[str, dict[str, float]] = {}
    for key in {f"hooks:{job['owner']}|{urlsplit(job['webhook']).hostname or ''}" for job in untold.values()}:
        owner, _, host = key.removeprefix("hooks:").partition("|")
        queue = await ranked(key)
        assert set(queue) == {
            id for id, job in untold.items() if job["owner"] == owner and urlsplit(job["webhook"]).hostname == host
        }
        folders.setdefault(f"hooks:{owner}", {})[host] = min(queue.values())
        expected.add(key)
    for key, heads in folders.items():
        ranks = await ranked(key)
        assert set(ranks) == set(heads)
        assert all(ranks[host] >= head for host, head in heads.items())
        expected.add(key)
    assert set(await ranked("hooks")) == {key.removeprefix("hooks:") for key in folders}
    assert all("hook_state" not in job for job in jobs.values() if job["state"] != "ended")
    expected.add("hooks")

    # Counters.
    queued = Counter(job["lane"] for job in all_jobs.values() if job["state"] not in ("running", "ended"))
    held = Counter(job["lane"] for job in shards.values() if job["state"] == "running")
    unfinished = Counter(job["owner"] for job in jobs.values() if job["state"] != "ended")
    statuses = Counter(job["status"] for job in jobs.values())
    counted = {"lane_load": queued, "owner_load": unfinished, "tally": statuses, "shards_running": held}
    for name, count in counted.items():
        assert {field: int(value) for field, value in (await redis.hgetall(prefix + name)).items()} == dict(count)
    promised: Counter[str] = Counter()
    for job in jobs.values():
        if job["state"] != "ended" and "bytes" in job:
            promised[job["owner"]] += int(job["bytes"])
    assert {field: int(value) for field, value in (await redis.hgetall(prefix + "owner_bytes")).items()} == promised
    expected.add("owner_bytes")
    expected |= {"lane_load", "owner_load", "tally", "totals", "aged", "sequence", "shards_running"}

    # Shards go with their job, which waits for those that have not succeeded, and shows how far all of them are.
    for id, job in jobs.items():
        parts = [shards.pop(f"{id}+{number}") for number in range(int(job.get("shards", 0)))]
        if job["state"] == "split":
            assert int(job["unmet"]) == sum(part["status"] != "succeeded" for part in parts) > 0
            assert all(part["state"] != "ended" for part in parts if part["status"] != "succeeded")
            assert int(job.get("done", 0)) == sum(int(part.get("done", 0)) for part in parts)
        elif job["state"] == "ended":
            assert all(part["state"] == "ended" or part.get("cancel") == "1" for part in parts)
            assert all(times[part["id"]][0] > 0 for part in parts)
        else:
            assert all(part["status"] == "succeeded" for part in parts)
        if job["state"] != "ended":
            assert all(times[part["id"]][0] == -1 for part in parts)
        assert (job["state"] in ("running", "split") or bool(parts)) or job["status"] != "running"
    assert not shards

    # Parents know who waits for them, as long as they wait.
    waiters: dict[str, set[str]] = {}
    for id in those("waiting"):
        for parent in jobs[id]["parents"].split():
            waiters.setdefault(parent, set()).add(id)
    for id, job in jobs.items():
        assert children[id] == (waiters.get(id, set()) if job["state"] != "ended" else set())
        if job["state"] == "waiting":
            unmet = [parent for parent in job["parents"].split() if jobs[parent]["state"] != "ended"]
            assert int(job["unmet"]) == len(set(unmet)) > 0
        expected |= {f"children:{id}", f"events:{id}"}
        # A job that has ended goes by itself even when nobody reaps; secrets are gone at once.
        record_s, events_s, tombstone_s = times[id]
        if job["state"] == "ended":
            assert 0 < record_s < tombstone_s
            assert events_s > 0
            assert "secret" not in job
        else:
            assert record_s == -1
            assert tombstone_s == -2

    # Nothing else is left lying, and what is kept for a while goes by itself.
    rest = {key for key in keys - expected if not key.startswith(("tomb:", "idem:", "taken:", "inputs:"))}
    assert rest == set()
    for key in keys - expected:
        assert await redis.ttl(prefix + key) != -1  # -2: it just went


def _escaped(prefix: str) -> str:
    return "".join(f"\\{letter}" if letter in "{}[]*?^\\" else letter for letter in prefix)
