"""One leased job, from its payload to the commit of its result."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson
import structlog

from bathyscope.errors import CredentialUnreadable, InternalError, OutOfSpace, ProblemError, Unavailable, from_problem
from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.broker import Lease, Renewal
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.tracing import NOTHING, Span
from bathyscope_backplane.vault import Credentials
from bathyscope_workers.disk import out_of_space
from bathyscope_workers.jobs import AdapterJob, Existing, Handover, JobKind, JobWork, ShardResult, shard
from bathyscope_workers.jobs._base import Undecided
from bathyscope_workers.models.spec import ModelSpec
from bathyscope_workers.supervisor._meter import trace_stages
from bathyscope_workers.supervisor._tasks import end_tasks

_log = structlog.get_logger(__name__)

T = TypeVar("T")

_PATIENCE_SECONDS = 600.0
"""How long a finished result waits for a store or a Redis that is out of reach."""


class LostLease(Exception):
    """The job belongs to another worker now, or was cancelled: nothing of this attempt may be written."""


class EngineGone(Exception):
    """The engine died with this job in it; the slot puts the job back."""


@dataclass(slots=True, eq=False)
class Attempt:
    """An attempt at a job. The slot feeds it the engine's events; it settles the lease itself."""

    plane: Backplane
    lease: Lease
    kind: JobKind
    scratch: Path
    """A folder for this attempt alone, removed at its end."""

    resident: ModelSpec | None
    """The base model of its lane."""

    send: Callable[[Any], None]
    """Sends a command to the engine."""

    is_for_another: Callable[[str, dict[str, Any]], Awaitable[bool]]
    """Whether a job of that lane, failed with that problem, should be left to another worker."""

    confirmed: float
    """When Redis was last asked and said that the lease is ours, in `time.monotonic`, which goes on for a stopped
    process."""

    sent: bool = False
    """The engine has been told of it."""

    lost: bool = False
    """The lease is gone: neither write nor settle."""

    cancelled: bool = False
    """The job's owner wants it stopped."""

    ended: str = "drain"
    """How it ended: `succeeded`, `failed`, `retried`, `cancelled`, `moved`, `lost`, or why the job was put back."""

    span: Span = NOTHING

    outcome: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The engine's last word: `done`, `failed` or `cancelled`."""

    _job: JobWork | None = None

    _committed: Resource | None = None
    """What this very attempt made visible."""

    _progress: dict[str, Any] | None = None
    _reporting: asyncio.Task[None] | None = None
    _started: float = 0.0
    _engine_timings: dict[str, float] = field(default_factory=dict)

    async def run(self) -> None:
        """Do it and settle the lease. Raises `EngineGone`, for the slot to settle; nothing else."""
        self._started = asyncio.get_running_loop().time()
        broker, ref = self.plane.broker, self.lease.ref
        try:
            resource = await self._work()
            await self._settle("succeeded", lambda: broker.finish(ref, resource=resource, timings=self._timings()))
            if self.ended != "succeeded":
                await self._withdraw()
                await self.discard_if_ended()
                return
            _log.info("job.succeeded", kind=self.lease.kind)
            if self._split:
                await self._clear_split()
            elif self.lease.shard is None:
                await self._drop_rows()
        except (EngineGone, LostLease):
            raise
        except asyncio.CancelledError:
            raise
        except _Stopped:
            await self._settle("cancelled", lambda: broker.acknowledge_cancel(ref))
            await self.discard_if_ended()
        except Undecided as error:
            await self._postpone(Unavailable(str(error)))
        except ProblemError as error:
            reported = error.extra.pop("retry", None)  # of the engine's own problems
            if isinstance(error, OutOfSpace) or (reported is None and isinstance(error, Unavailable)):
                await self._postpone(error)
                return
            retry = isinstance(error, Unavailable) or reported is True
            problem = error.problem()
            _log.warning("job.failed", problem=problem["type"], retry=retry)
            await self._settle("retried" if retry else "failed", lambda: broker.fail(ref, problem, retry=retry))
            await self.discard_if_ended()
        except Exception as error:
            if (full := out_of_space(error)) is not None:
                await self._postpone(full)
                return
            _log.error("job.fault", exc_info=error)
            problem = InternalError("A fault of the worker; it was logged and can be reported.").problem()
            await self._settle("retried", lambda: broker.fail(ref, problem, retry=True))

    @property
    def names(self) -> dict[str, Any]:
        """What every line of the log about it says; those of its own task do by themselves."""
        lease = self.lease
        return {"job": lease.job_id, "attempt": lease.attempt, "lane": lease.lane, "key": lease.owner}

    def hear(self, event: dict[str, Any]) -> None:
        """An event of the engine about this job."""
        trace_stages(self.span, event)
        if event["ev"] == "progress":
            self._progress = event
            if self._reporting is None or self._reporting.done():
                self._reporting = asyncio.create_task(self._report())
        elif not self.outcome.done():
            self.outcome.set_result(event)

    def stop(self) -> None:
        """The job's owner cancelled it: the engine stops at its next batch."""
        self.cancelled = True
        self.send({"op": "cancel", "id": self.lease.job_id})

    def drop(self) -> None:
        """The lease is gone: stop, and write nothing more."""
        self.lost = True
        self.send({"op": "cancel", "id": self.lease.job_id})
        if not self.outcome.done():
            self.outcome.set_exception(LostLease(self.lease.job_id))

    async def close(self) -> None:
        """Remove the scratch folder and end the reporting."""
        if self._reporting is not None:
            await end_tasks([self._reporting])
            if not self._reporting.cancelled():
                self._reporting.exception()  # seen
        if self.outcome.done() and not self.outcome.cancelled():
            self.outcome.exception()  # seen
        await asyncio.to_thread(shutil.rmtree, self.scratch, ignore_errors=True)

    async def _work(self) -> str | None:
        """The path of what was made."""
        lease = self.lease
        again = lease.attempt > 1 or lease.solo
        if again and lease.shard is not None:
            if await shard.is_done(self.plane.store, lease):
                return None
        elif again and lease.resource_id is not None:
            # An earlier attempt may have got as far as the commit and died before it said so.
            committed = await self.plane.catalogue.committed(lease.resource_id)
            if committed is not None:
                await self.plane.catalogue.index(committed)
                return self.kind.path(lease.resource_id)
        payload = orjson.loads(lease.payload)
        work = self._job = JobWork(self.plane, lease, payload, self.scratch, self.resident, self._credentials())
        self.scratch.mkdir()
        if self._split and lease.shard is None:
            if not self.outcome.done():
                self.outcome.set_result({"ev": "done"})  # no engine has a part in it: its end is none of the job's
            with self.span.child("join"):
                event = await shard.join(work, self._check)
        else:
            commands = await self.kind.commands(work)
            if self.cancelled:
                raise _Stopped
            if not commands and not self.outcome.done():
                self.outcome.set_result({"ev": "done"})  # no engine has a part in it
            if not self.outcome.done():  # else the engine died or the lease went while this was prepared
                self.sent = True
                for command in commands:
                    self.send(command)
            event = await self.outcome
        if self.cancelled:
            raise _Stopped
        if event["ev"] == "cancelled":  # nobody asked for it: the engine is ending
            await self._settle("drain", lambda: self.plane.broker.release(lease.ref, reason="drain"))
            await self.discard_if_ended()
            raise LostLease(lease.job_id)
        if event["ev"] == "failed":
            if await self.is_for_another(lease.lane, event["problem"]):
                _log.warning("job.left_to_another")
                await self._settle("elsewhere", lambda: self.plane.broker.release(lease.ref, reason="elsewhere"))
                await self.discard_if_ended()
                raise LostLease(lease.job_id)
            if isinstance(self.kind, AdapterJob) and (smaller := self.kind.smaller(work, event["problem"])) is not None:
                await self._hand_over(smaller)
                raise LostLease(lease.job_id)
            if "/adapter-" in event["problem"]["type"] and await work.distrust():
                _log.warning("adapter.rotten", adapters=list(work.placed))
                event["retry"] = True
            raise _reported(event)
        self._engine_timings = event.get("timings", {})
        if lease.resource_id is None:
            await self.kind.conclude(work, event)
            return self.kind.path(None)
        await self._require_lease()  # a worker that slept must not even upload
        with self.span.child("upload"):
            resource = await self._patiently(lambda: self.kind.conclude(work, event))
        assert resource is not None
        if isinstance(resource, Existing):
            await self._require_lease()
            return resource.path
        if isinstance(resource, Handover):
            await self._hand_over(resource)
            raise LostLease(lease.job_id)
        if isinstance(resource, ShardResult):
            try:
                await self._require_lease()
            except (LostLease, _Stopped):
                await resource.drop(self.plane.store)
                raise
            await self._patiently(lambda: resource.commit(self.plane.store))
            return None
        resource.private["timings"] = self._timings()
        try:
            await self._require_lease()
        except (LostLease, _Stopped):
            await self.plane.catalogue.drop(resource)
            raise
        with self.span.child("commit"):
            if await self._patiently(lambda: self.plane.catalogue.commit(resource)) is resource:
                self._committed = resource
        return self.kind.path(lease.resource_id)

    async def _hand_over(self, handover: Handover) -> None:
        """The job goes on in another lane."""
        await self._require_lease()
        payload = orjson.dumps(handover.payload).decode()
        await self._settle("moved", lambda: self.plane.broker.move(self.lease.ref, lane=handover.lane, payload=payload))
        # A cancel that came in this moment ended the job instead.
        await self.discard_if_ended()
        if self.ended == "moved":
            _log.info("job.moved", to=handover.lane, **self.names)
            for key in handover.drop:
                with contextlib.suppress(Unavailable):  # the sweep removes it later
                    await self.plane.store.delete(key)

    async def discard_if_ended(self) -> None:
        """Remove what was put by for an adapter that comes to nothing; one that is tried again needs it.

        Any way of giving a lease back ends a job whose owner has cancelled it, and to a renewal the lease of a job that
        has just ended is lost: so the queue is asked what became of it.
        """
        if self._split:
            await self._clear_split()
        if not isinstance(self.kind, AdapterJob) or self._job is None:
            return
        with contextlib.suppress(Unavailable):  # the sweep removes it later
            record = await self.plane.broker.get(self.lease.job_id)
            if record is not None and record.ended and record.status != "succeeded" and not record.dead_letter:
                await self.kind.discard(self._job)

    @property
    def _split(self) -> bool:
        """Whether this is a shard, or the joining of shards."""
        return bool(orjson.loads(self.lease.payload).get("shards"))

    async def _clear_split(self) -> None:
        """Remove what a split job needed when it has ended for good; one that may be replayed needs it again.

        Every attempt at a part of it looks, for another that ended it may not have seen what this one left.
        """
        with contextlib.suppress(Unavailable):  # the sweep removes it later
            record = await self.plane.broker.get(self.lease.whole_id)
            if record is None or (record.ended and not record.dead_letter):
                await shard.clear(self.plane.store, self.lease, orjson.loads(self.lease.payload))

    def _check(self) -> None:
        """Raise when the lease is gone or the job's owner cancelled it."""
        if self.lost:
            raise LostLease(self.lease.job_id)
        if self.cancelled:
            raise _Stopped

    def _credentials(self) -> Credentials:
        """What the request gave. Raises `CredentialUnreadable`: another worker may have the right master key."""
        try:
            return Credentials.unsealed(self.plane.vault, self.lease.secret, self.lease.job_id)
        except CredentialUnreadable as error:
            error.extra["retry"] = True
            raise

    def _timings(self) -> dict[str, float]:
        """Seconds: `queue` until taken, `load`, `inference`, `total` since it was submitted."""
        queued = max(0.0, (self.lease.started_at - self.lease.created_at) / 1000)
        here = asyncio.get_running_loop().time() - self._started
        measured = {name: value for name, value in self._engine_timings.items() if name in ("load", "inference")}
        if self._split and self.lease.shard is None:  # it began with the first of its shards, and is joined now
            before = max(queued, (self.lease.enqueued_at - self.lease.created_at) / 1000)
        else:
            before = queued
        return {"queue": queued, **measured, "total": before + here}

    async def _require_lease(self) -> None:
        """Raise unless the lease is ours: a worker that slept must not publish. Redis is asked, unless it just said so.

        Raises `LostLease`, or `_Stopped` when the job's owner cancelled it.
        """
        renewal: Renewal = "held"
        if time.monotonic() - self.confirmed >= self.plane.settings.jobs.lease_seconds / 2:
            lease_ms = int(self.plane.settings.jobs.lease_seconds * 1000)
            [renewal] = await self._patiently(lambda: self.plane.broker.renew([self.lease.ref], lease_ms))
        if self.lost or renewal == "lost":
            raise LostLease(self.lease.job_id)
        if self.cancelled or renewal == "cancelled":
            raise _Stopped

    async def _settle(self, how: str, write: Callable[[], Awaitable[bool]]) -> None:
        if self.lost:
            return
        if await self._patiently(write):
            self.ended = how
        else:
            self.ended = "lost"
            _log.warning("job.lease_lost")

    async def _drop_rows(self) -> None:
        """Remove the job's rows from the store: not before it has ended, since another attempt would need them."""
        payload = orjson.loads(self.lease.payload)
        for key in (payload.get("rows_key"), payload.get("archive_key")):
            if key is not None:
                with contextlib.suppress(Unavailable):  # the sweep removes it later
                    await self.plane.store.delete(key)

    async def _withdraw(self) -> None:
        """Take a result back that was committed in the moment in which the lease was lost, when its job was ended
        otherwise meanwhile. Where the job goes on, whoever has it now finds the result and is done.
        """
        if self._committed is None:
            return
        record = await self._patiently(lambda: self.plane.broker.get(self.lease.job_id))
        if record is None or (record.ended and record.status != "succeeded"):
            await self.plane.catalogue.delete(self._committed)

    async def _postpone(self, error: ProblemError) -> None:
        """What was wanting, room or the store, is no fault of the job."""
        problem = error.problem()
        _log.warning("job.postponed", problem=problem["type"], detail=error.detail)
        await self._settle("postponed", lambda: self.plane.broker.postpone(self.lease.ref, problem))
        await self.discard_if_ended()

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call again while Redis or the store is out of reach: the work is done and must not be lost."""
        deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        pause = 0.2
        while True:
            try:
                return await call()
            except Unavailable:
                if self.lost or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)

    async def _report(self) -> None:
        """Write the newest progress; what comes meanwhile is written once."""
        while self._progress is not None and not self.lost:
            event, self._progress = self._progress, None
            with contextlib.suppress(Unavailable):
                await self.plane.broker.progress(
                    self.lease.ref, stage=event["stage"], done=event["done"], total=event["total"], unit=event["unit"]
                )


class _Stopped(Exception):
    """The engine stopped the job as its owner wished."""


def _reported(event: dict[str, Any]) -> ProblemError:
    error = from_problem(event["problem"])
    error.extra["retry"] = bool(event["retry"])
    return error
