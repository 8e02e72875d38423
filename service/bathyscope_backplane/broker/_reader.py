"""What can be read of the broker: jobs, lists, events, lanes, numbers. Nothing here changes a job."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

from redis.asyncio import Redis, RedisCluster

from bathyscope.errors import (
    DependencyFailed,
    EngineDied,
    EngineHung,
    Expired,
    IdempotencyMismatch,
    InvalidRequest,
    JobCancelled,
    LeaseLapsed,
)

from . import _cursor as cursors
from . import _scripts as scripts
from ._answer import answer
from ._listener import Listener
from ._lua import Link
from ._records import RECORD_FIELDS, record
from ._types import BrokerLimits, BrokerStats, Event, Idempotency, JobRecord, LaneStats, Page, Status, Usage, base_lane

T = TypeVar("T")

_SCAN = 1_000  # jobs that one listing script walks over at most: about a millisecond of the server
_SCANS = 10  # such walks for one page
_RING = 128  # owners that a position looks at; longer rings are extrapolated
_EVENT_ID = re.compile(r"\d{1,20}(-\d{1,20})?")


def other_body() -> IdempotencyMismatch:
    """What is said of a key that comes with another request."""
    return IdempotencyMismatch(
        "This Idempotency-Key was used before with another body; use a new key for a new request."
    )


class Reader:
    """The reading half of `Broker`, which documents the constructor."""

    def __init__(
        self,
        redis: Redis | RedisCluster,
        *,
        namespace: str = "bathyscope",
        limits: BrokerLimits | None = None,
        clock_skew_ms: int = 0,
        patience_s: float = 15.0,
    ) -> None:
        if not redis.get_encoder().decode_responses:
            raise ValueError("the broker needs a Redis client with decode_responses=True; see broker.connect")
        if not namespace or set(namespace) & set("{} \n"):
            raise ValueError(f"{namespace!r} cannot be a namespace")
        self.redis = redis
        self.limits = limits or BrokerLimits()
        self.prefix = f"{{{namespace}}}:"
        """Begins every key and channel of this queue; the braces keep all of them in one slot of a cluster."""
        self._patience_s = patience_s
        self._link = Link(redis, self.prefix, clock_skew_ms, json.dumps(_terms(self.limits)))

    @property
    def clock_skew_ms(self) -> int:
        """Added to the server's clock in every script; tests move it."""
        return self._link.skew_ms

    @clock_skew_ms.setter
    def clock_skew_ms(self, value: int) -> None:
        self._link.skew_ms = value

    async def _answer(self, awaitable: Awaitable[T]) -> T:
        return await answer(awaitable, self._patience_s)

    async def _read(self, command: object) -> Any:
        # redis-py types its replies for every setting of a client at once; with ours they are texts.
        return await self._answer(cast(Awaitable[Any], command))

    async def get(self, job_id: str) -> JobRecord | None:
        """The job, or None when it never was or its time is over (then see `tombstone`)."""
        values: list[str | None] = await self._read(self.redis.hmget(f"{self.prefix}job:{job_id}", RECORD_FIELDS))
        return record(values) if values[0] else None

    async def first_of(self, idempotency: Idempotency) -> str | None:
        """The job that an earlier request with this key made, if there still is one.

        Raises `IdempotencyMismatch` (422) when it came with another body.
        """
        known: str | None = await self._read(self.redis.get(f"{self.prefix}idem:{idempotency.key}"))
        body, _, job_id = (known or "").rpartition("|")
        if known is None or not await self.knows(job_id):
            return None
        if body != idempotency.body:
            raise other_body()
        return job_id

    async def knows(self, job_id: str) -> bool:
        """Whether there is a record of the job."""
        return bool(await self._read(self.redis.exists(f"{self.prefix}job:{job_id}")))

    async def may_run(self, job_id: str) -> bool:
        """Whether the job has not ended, or may be replayed: it still needs what was put by for it."""
        values = await self._read(self.redis.hmget(f"{self.prefix}job:{job_id}", ["state", "dead_letter"]))
        return values[0] is not None and (values[0] != "ended" or values[1] == "1")

    async def payload(self, job_id: str) -> str | None:
        """What the job was submitted with; None when it is gone: after success, cancel and expiry it is dropped."""
        payload: str | None = await self._read(self.redis.hget(f"{self.prefix}job:{job_id}", "payload"))
        return payload

    async def tombstone(self, job_id: str) -> str | None:
        """The owner of a job that ended, for as long as its id is remembered."""
        text: str | None = await self._read(self.redis.get(f"{self.prefix}tomb:{job_id}"))
        return text.partition("|")[2] if text else None

    async def list(
        self,
        owner: str | None,
        *,
        kind: str | None = None,
        status: Status | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> Page:
        """Jobs of one owner (None: of all), newest first.

        Raises `InvalidRequest` for a cursor that is not from `Page.next_cursor`.
        """
        after = cursors.unwrap(cursor) if cursor else ""
        found: list[JobRecord] = []
        for _ in range(_SCANS):
            rows = await self._answer(
                scripts.listing(
                    self._link,
                    owner=owner or "",
                    kind=kind or "",
                    status=status or "",
                    after=after,
                    limit=limit - len(found),
                    scan=_SCAN,
                    fields=RECORD_FIELDS,
                )
            )
            after = cast(str, rows[0])
            found += [record(row) for row in rows[1:]]
            if not after or len(found) >= limit:
                break
        return Page(found, cursors.wrap(after) if after else None)

    async def dead_letters(self, limit: int = 100) -> list_[JobRecord]:
        """Failed jobs that can be replayed, the latest first."""
        ids: list_[str] = await self._read(self.redis.zrevrange(f"{self.prefix}dead", 0, limit - 1))
        jobs = [await self.get(job_id) for job_id in ids]
        return [job for job in jobs if job is not None]

    async def events(self, job_id: str, after: str = "0", *, limit: int = 1_000) -> list_[Event]:
        """Events of a job that came after the one of id `after`, in order.

        Raises `InvalidRequest` when `after` is not an event's id.
        """
        if not _EVENT_ID.fullmatch(after):
            raise InvalidRequest("Last-Event-ID is not the id of an event of this service.")
        rows: list_[tuple[str, dict[str, str]]] = await self._read(
            self.redis.xrange(f"{self.prefix}events:{job_id}", f"({after}", "+", count=limit)
        )
        return [Event(event_id, row["type"], json.loads(row["data"])) for event_id, row in rows]

    async def position(self, job_id: str) -> int | None:
        """About how many jobs go before this one under fair turns; None when it is not ready to be served."""
        before = await self._answer(scripts.position(self._link, id=job_id, sample=_RING))
        return before if before >= 0 else None

    async def lanes(self) -> list_[LaneStats]:
        """Every lane with queued jobs."""
        return (await self.stats()).lanes

    async def stats(self) -> BrokerStats:
        """The numbers for metrics."""
        lanes, tally, totals, delayed, waiting, leases, dead = cast(Any, await self._answer(scripts.stats(self._link)))
        ever = [(name.rpartition("|"), int(count)) for name, count in _pairs(totals)]
        return BrokerStats(
            lanes=_merged([LaneStats(name, *map(int, numbers)) for name, *numbers in lanes]),
            jobs={cast(Status, status): int(count) for status, count in _pairs(tally)},
            ended={(kind, cast(Status, status)): count for (kind, _, status), count in ever if kind},
            requeued={reason: count for (kind, _, reason), count in ever if not kind},
            delayed=delayed,
            waiting=waiting,
            leases=leases,
            dead_letters=dead,
        )

    async def usage(self, owner: str) -> Usage:
        """What an owner has open, and has asked for today."""
        return Usage(*await self._answer(scripts.usage(self._link, owner=owner)))

    async def subscribe(self) -> Listener:
        """One connection that hears what changes, for a whole process. Close it with `aclose`, or use `async with`.

        Raises `Unavailable` when Redis is out of reach; once it runs it outlives outages.
        """
        return await Listener.start(self.redis, self.prefix, self._patience_s)


list_ = list
"""`list` itself, which the method of that name hides in the class body above."""


def _merged(lanes: list_[LaneStats]) -> list_[LaneStats]:
    """Shards counted in the lane of their jobs."""
    found: dict[str, LaneStats] = {}
    for one in lanes:
        name = base_lane(one.lane)
        before = found.get(name, LaneStats(name, 0, 0, 0, 0))
        found[name] = LaneStats(
            name,
            before.depth + one.depth,
            before.queued + one.queued,
            max(before.oldest_age_ms, one.oldest_age_ms),
            before.solo + one.solo,
        )
    return list(found.values())


def _pairs(flat: list[str]) -> zip[tuple[str, str]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _terms(limits: BrokerLimits) -> dict[str, Any]:
    """What every script is given: limits, and the problems it may have to store, each a JSON text of its own."""
    problems = {
        "cancel_problem": JobCancelled("The job was cancelled before it ended."),
        "dependency_problem": DependencyFailed(""),
        "death_problem": EngineDied("The engine process died while it ran this job, as often as is allowed."),
        "hang_problem": EngineHung(
            "The engine made no progress while it ran this job and was ended, as often as is allowed."
        ),
        "lapse_problem": LeaseLapsed("Workers were lost while they ran this job, as often as is allowed."),
        "expiry_problem": Expired("No worker served the job in the time that a job may wait."),
    }
    return {
        "aging_ms": limits.aging_ms,
        "backoff_base_ms": limits.backoff_base_ms,
        "backoff_cap_ms": limits.backoff_cap_ms,
        "max_group_deaths": limits.max_group_deaths,
        "queue_ttl_ms": limits.queue_ttl_ms,
        "result_ttl_ms": limits.result_ttl_ms,
        "tombstone_ttl_ms": limits.tombstone_ttl_ms,
        "idempotency_ttl_ms": limits.idempotency_ttl_ms,
        "events_kept": limits.events_kept,
        "reap_batch": limits.reap_batch,
        **{name: json.dumps(error.problem()) for name, error in problems.items()},
    }
