"""The job queue: what submits, serves and ends jobs.

A job's hash is the truth; everything else is an index that the same script keeps in step (`lua/common.lua` lists the
keys). A worker holds a job by a lease: it names worker and token, is renewed while the work goes on, and every write
of the worker is a compare-and-set on it, so whoever lost a job learns so and changes nothing.

                 submit                take                    finish
    (new) ─┬──────────────► ready ───────────────► running ───────────────► succeeded
           │ parents          ▲  ▲   release, lapse   │ │ fail, retry
           └──► waiting ──────┘  └────────────────────┘ └──► delayed ──► ready (reap)
                                                        └──► failed (and a dead letter when attempts ran out)

A running job of two parts is handed over (`move`): it is ready again, in another lane.

A job may be split (`NewJob.shards`): each shard has a state of its own by the same rules, in the lane
`shards_of(lane)`, and nobody sees it but workers. The job is `split` meanwhile, running as soon as one of them is; with
the last it is ready, to be joined; one that fails fails it. Whatever ends it ends them.

Every method is one round trip. Each may be sent twice, as a connection that breaks before the answer does: the
second is answered like the first. All of them raise `errors.Unavailable` when Redis is out of reach.
"""

from __future__ import annotations

import json
import math
import random
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, cast

from bathyscope.errors import LaneFull, QuotaExceeded, StateConflict

from . import _scripts as scripts
from ._reader import Reader, other_body
from ._records import LEASE_FIELDS, hash_fields, lease
from ._types import Cancelled, Lease, LeaseRef, NewJob, Reaped, ReleaseReason, Renewal, Submitted, Taken, shards_of

_FULL_RETRY_AFTER_S = 5.0
_BYTES_RETRY_AFTER_S = 60.0  # open jobs may turn out smaller than estimated
_EXPIRY_RETRY_AFTER_S = 3600.0  # nothing is freed before results are deleted or expire
_RENEWALS: dict[int, Renewal] = {0: "lost", 1: "held", 2: "cancelled"}


class Broker(Reader):
    """The queue of one installation.

    `redis`: a client from `connect` (or any with `decode_responses=True`), shared with others or not.
    `namespace`: begins every key. `limits`: bounds and times. `clock_skew_ms`: added to the server's clock.
    `patience_s`: the longest that a method waits for Redis, retries of the connection included.
    """

    async def submit(self, job: NewJob) -> Submitted:
        """Queue a job.

        With a known idempotency key the first job's id is returned and nothing is queued. A job whose parents have
        all succeeded is ready at once; one with a parent that failed, or is not there, is failed at once.

        Raises `LaneFull` or `QuotaExceeded` (429) when the lane or the owner has too many jobs, or the owner would go
        beyond its inputs of the day or its bytes (what is refused counts nowhere), and
        `IdempotencyMismatch` (422) when the key came with another body before.
        """
        idempotency = job.idempotency
        owner_limit = self.limits.owner_open if job.owner_limit is None else job.owner_limit
        outcome, value, *rest = await self._answer(
            scripts.submit(
                self._link,
                id=job.id,
                fields=hash_fields(job),
                lane=job.lane,
                owner=job.owner,
                priority=job.priority,
                parents=list(dict.fromkeys(job.parents)),
                idempotency_key=idempotency.key if idempotency else "",
                idempotency_body=idempotency.body if idempotency else "",
                lane_limit=self.limits.lane_queued if job.lane_limit is None else job.lane_limit,
                owner_limit=owner_limit,
                inputs=job.inputs,
                inputs_limit=-1 if job.inputs_limit is None else job.inputs_limit,
                bytes=job.bytes,
                bytes_limit=-1 if job.bytes_limit is None else job.bytes_limit,
                bytes_stored=job.bytes_stored,
                shard_lane=shards_of(job.lane),
                shards=[[json.dumps(shard.as_json()), shard.rows] for shard in job.shards],
            )
        )
        if outcome == "lane_full":
            raise LaneFull(
                f"{value} jobs are queued for {job.lane}, as many as it takes; try again later.",
                retry_after=_FULL_RETRY_AFTER_S,
            )
        if outcome == "owner_full":
            raise QuotaExceeded(
                f"This key has {value} unfinished jobs and may have {owner_limit}; wait until some have ended.",
                retry_after=_FULL_RETRY_AFTER_S,
                quota="jobs",
                used=int(value),
                limit=owner_limit,
            )
        if outcome in ("inputs_full", "bytes_full"):
            raise _over_quota(job, outcome, int(value), rest)
        if outcome == "mismatch":
            raise other_body()
        return Submitted(value, replayed=value != job.id)

    async def take(
        self,
        worker: str,
        lanes: Sequence[str],
        n: int,
        *,
        lease_ms: int,
        engine_idle: bool,
        shard_lanes: Sequence[str] = (),
    ) -> Taken:
        """Lease up to `n` jobs, all from the first of `lanes` that has any, for `lease_ms`.

        One of them is a shard, from the first of `shard_lanes` that has any: a worker that took all shards at once
        would leave none to others.

        Owners of a lane take turns, better priorities first; whoever was passed over for long gets every second
        turn. A job that must run alone is given only to an idle engine and only by itself; when it is the next in
        turn and the engine is busy, nothing after it is given either and `solo_waiting` says why.
        """
        token = secrets.token_hex(8)
        solo_waiting, *rows = await self._answer(
            scripts.take(
                self._link,
                worker=worker,
                token=token,
                lanes=list(lanes),
                shard_lanes=list(shard_lanes),
                n=n,
                lease_ms=lease_ms,
                engine_idle=engine_idle,
                fields=LEASE_FIELDS,
            )
        )
        leases: list[Lease] = [lease(cast(list[str | None], row), worker, token) for row in rows]
        return Taken(leases, solo_waiting == 1)

    async def renew(self, refs: Sequence[LeaseRef], lease_ms: int) -> list[Renewal]:
        """Extend leases to `lease_ms` from now; one answer for each, in order.

        `lost`: stop, the job is somebody else's or has ended. `cancelled`: stop, then `acknowledge_cancel`.
        """
        if not refs:
            return []
        replies = await self._answer(
            scripts.renew(self._link, refs=[[ref.job_id, ref.worker, ref.token] for ref in refs], lease_ms=lease_ms)
        )
        return [_RENEWALS[reply] for reply in replies]

    async def mark_alone(self, ref: LeaseRef, alone: bool) -> bool:
        """Say whether the job runs alone in its engine now, so that a lapse of its lease is judged rightly.

        Jobs taken as `solo` are marked already. False: the lease is lost.
        """
        return bool(await self._answer(scripts.mark_alone(self._link, **_named(ref), alone=alone)))

    async def progress(self, ref: LeaseRef, *, stage: str, done: int, total: int | None, unit: str) -> bool:
        """Store and announce how far the job is; callers throttle. False: the lease is lost."""
        text = json.dumps({"stage": stage, "done": done, "total": total, "unit": unit})
        return bool(await self._answer(scripts.progress(self._link, **_named(ref), progress=text)))

    async def finish(self, ref: LeaseRef, *, resource: str | None, timings: Mapping[str, float]) -> bool:
        """End the job as succeeded: `resource` is the path of what was made, `timings` are seconds by stage.

        Jobs that waited only for this one become ready. False: the lease is lost, and so is the result.
        """
        return bool(
            await self._answer(
                scripts.finish(self._link, **_named(ref), resource=resource or "", timings=json.dumps(dict(timings)))
            )
        )

    async def fail(self, ref: LeaseRef, problem: Mapping[str, Any], *, retry: bool) -> bool:
        """End the attempt with an RFC 9457 problem.

        With `retry` the job is tried again after a pause that doubles, until its attempts are used up; then, and
        without `retry` at once, it is failed, and the jobs that need it with it. Used-up jobs become dead letters.
        False: the lease is lost.
        """
        return bool(
            await self._answer(
                scripts.fail(
                    self._link,
                    **_named(ref),
                    problem=json.dumps(dict(problem)),
                    retry=retry,
                    jitter=random.random(),
                )
            )
        )

    async def release(self, ref: LeaseRef, *, reason: ReleaseReason) -> bool:
        """Put the job back into its lane, before those that came after it.

        `drain`, `elsewhere`: the worker stops, or leaves the job to another; the attempt does not count.
        `engine_died_alone`, `engine_hung_alone`: it counts. `engine_died_together`, `engine_hung_together`: it does
        not count, but the number of such ends is bounded. After an engine's end the job runs alone.
        False: the lease is lost.
        """
        return bool(await self._answer(scripts.release(self._link, **_named(ref), reason=reason)))

    async def postpone(self, ref: LeaseRef, problem: Mapping[str, Any]) -> bool:
        """Put the job back for a later attempt, for want of room or of the store: the attempt does not count.

        The pause doubles each time. `problem` says what was wanting. False: the lease is lost.
        """
        return bool(
            await self._answer(
                scripts.postpone(self._link, **_named(ref), problem=json.dumps(dict(problem)), jitter=random.random())
            )
        )

    async def move(self, ref: LeaseRef, *, lane: str, payload: str) -> bool:
        """Hand the job over to another lane, with what it needs there; the attempt goes on and counts once.

        Its credentials are erased: they were for the part of the work that is done. The lane's own bound does not hold
        the job up, since it was accepted long ago. False: the lease is lost.
        """
        return bool(await self._answer(scripts.move(self._link, **_named(ref), lane=lane, payload=payload)))

    async def cancel(self, job_id: str) -> Cancelled:
        """End a queued job now, with the jobs that need it; ask the worker of a running one to stop."""
        return cast(Cancelled, await self._answer(scripts.cancel(self._link, id=job_id)))

    async def acknowledge_cancel(self, ref: LeaseRef) -> bool:
        """The worker has stopped the job: it ends as cancelled. False: the lease is lost."""
        return bool(await self._answer(scripts.acknowledge_cancel(self._link, **_named(ref))))

    async def reap(self) -> Reaped:
        """Do what time has made due; every supervisor calls it about once a second.

        Pauses that are over, leases that lapsed, jobs that nobody served, records whose time is over.
        """
        promoted, lapsed, expired, purged, more = cast(Any, await self._answer(scripts.reap(self._link)))
        return Reaped(promoted, lapsed, expired, purged, bool(more))

    async def replay(self, job_id: str, *, secret: str | None = None) -> bool:
        """Put a dead letter back into its lane, all counters cleared. False: it is none.

        `secret`: its credentials, sealed anew; those that it came with were erased.
        """
        return bool(await self._answer(scripts.replay(self._link, id=job_id, secret=secret or "")))

    async def forget(self, job_id: str) -> bool:
        """Remove an ended job's record before its time; its tombstone stays. False: there is none.

        Raises `StateConflict` while the job has not ended.
        """
        done = await self._answer(scripts.forget(self._link, id=job_id))
        if done < 0:
            raise StateConflict("The job has not ended; cancel it first.")
        return bool(done)


def _over_quota(job: NewJob, outcome: str, used: int, rest: list[str]) -> QuotaExceeded:
    if outcome == "inputs_full":
        return QuotaExceeded(
            f"This key has asked for {used:,} inputs today and may ask for {job.inputs_limit:,} a day (UTC); "
            f"{job.inputs:,} more are too many: ask for fewer, or tomorrow.",
            retry_after=math.ceil(float(rest[0]) / 1000),
            quota="inputs_per_day",
            used=used,
            limit=job.inputs_limit,
            asked=job.inputs,
        )
    return QuotaExceeded(
        f"This key may store {job.bytes_limit:,} bytes: it has {job.bytes_stored:,}, its open jobs may add {used:,}, "
        f"and this one {job.bytes:,}; delete results, or wait until some expire.",
        retry_after=_BYTES_RETRY_AFTER_S if used else _EXPIRY_RETRY_AFTER_S,
        quota="bytes",
        used=job.bytes_stored + used,
        limit=job.bytes_limit,
        asked=job.bytes,
    )


def _named(ref: LeaseRef) -> dict[str, Any]:
    return {"id": ref.job_id, "worker": ref.worker, "token": ref.token}
