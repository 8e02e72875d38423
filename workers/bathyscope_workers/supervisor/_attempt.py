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

from bathyscope.errors import InternalError, ProblemError, Unavailable, from_problem
from bathyscope_backplane.broker import Lease, Renewal
from bathyscope_backplane.plane import Backplane
from bathyscope_workers.jobs import JobKind, JobWork
from bathyscope_workers.models.spec import ModelSpec

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

    confirmed: float = field(default_factory=time.monotonic)
    """When Redis last said that the lease is ours; a stopped process' clock goes on."""

    lost: bool = False
    """The lease is gone: neither write nor settle."""

    cancelled: bool = False
    """The job's owner wants it stopped."""

    outcome: asyncio.Future[dict[str, Any]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """The engine's last word: `done`, `failed` or `cancelled`."""

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
            await self._settle(lambda: broker.finish(ref, resource=resource, timings=self._timings()))
        except (EngineGone, LostLease):
            raise
        except asyncio.CancelledError:
            raise
        except _Stopped:
            await self._settle(lambda: broker.acknowledge_cancel(ref))
        except ProblemError as error:
            retry = isinstance(error, Unavailable) or error.extra.pop("retry", False) is True
            problem = error.problem()
            _log.warning("job.failed", job=self.lease.job_id, problem=problem["type"], retry=retry)
            await self._settle(lambda: broker.fail(ref, problem, retry=retry))
        except Exception as error:
            _log.error("job.fault", job=self.lease.job_id, exc_info=error)
            problem = InternalError("A fault of the worker; it was logged and can be reported.").problem()
            await self._settle(lambda: broker.fail(ref, problem, retry=True))

    def hear(self, event: dict[str, Any]) -> None:
        """An event of the engine about this job."""
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
            self._reporting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._reporting
        if self.outcome.done() and not self.outcome.cancelled():
            self.outcome.exception()  # seen
        await asyncio.to_thread(shutil.rmtree, self.scratch, ignore_errors=True)

    async def _work(self) -> str | None:
        """The path of what was made."""
        lease = self.lease
        if lease.resource_id is not None and (lease.attempt > 1 or lease.solo):
            # An earlier attempt may have got as far as the commit and died before it said so.
            committed = await self.plane.catalogue.committed(lease.resource_id)
            if committed is not None:
                await self.plane.catalogue.index(committed)
                return self.kind.path(lease.resource_id)
        payload = orjson.loads(lease.payload)
        work = JobWork(self.plane, lease, payload, self.scratch, self.resident)
        self.scratch.mkdir()
        commands = await self.kind.commands(work)
        if self.cancelled:
            raise _Stopped
        if not self.outcome.done():  # else the engine died or the lease went while this was prepared
            for command in commands:
                self.send(command)
        event = await self.outcome
        if self.cancelled:
            raise _Stopped
        if event["ev"] == "cancelled":  # nobody asked for it: the engine is ending
            await self._settle(lambda: self.plane.broker.release(lease.ref, reason="drain"))
            raise LostLease(lease.job_id)
        if event["ev"] == "failed":
            raise _reported(event)
        self._engine_timings = event.get("timings", {})
        if lease.resource_id is None:
            await self.kind.conclude(work, event)
            return self.kind.path(None)
        resource = await self._patiently(lambda: self.kind.conclude(work, event))
        assert resource is not None
        resource.private["timings"] = self._timings()
        try:
            await self._require_lease()
        except (LostLease, _Stopped):
            for blob in resource.blobs.values():
                await self.plane.store.delete(blob.key)
            raise
        await self._patiently(lambda: self.plane.catalogue.commit(resource))
        if payload.get("rows_key"):
            with contextlib.suppress(Unavailable):  # the sweep removes it later
                await self.plane.store.delete(payload["rows_key"])
        return self.kind.path(lease.resource_id)

    def _timings(self) -> dict[str, float]:
        """Seconds: `queue` until taken, `load`, `inference`, `total` since it was submitted."""
        queued = max(0.0, (self.lease.started_at - self.lease.created_at) / 1000)
        here = asyncio.get_running_loop().time() - self._started
        measured = {name: value for name, value in self._engine_timings.items() if name in ("load", "inference")}
        return {"queue": queued, **measured, "total": queued + here}

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

    async def _settle(self, write: Callable[[], Awaitable[bool]]) -> None:
        if not self.lost and not await self._patiently(write):
            _log.warning("job.lease_lost", job=self.lease.job_id)

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
