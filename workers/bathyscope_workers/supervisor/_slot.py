"""One engine and its jobs: what it takes, and what becomes of its jobs when it dies or hangs.

Placement (model engine). The lanes of resident models are served first. When they have been empty for a moment, the
lane whose head has waited longest is adopted: its jobs carry their model, which the engine loads, evicting by least
recent use. A lane whose head has waited past the starvation bound is adopted at once, whatever else runs.

Blame. The engine says which jobs share the present step before it makes it. When it dies, those are suspects: one
alone is charged with an attempt, several are retried alone without a charge. Jobs that only waited in the engine go
back as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from bathyscope.errors import InternalError, Unavailable
from bathyscope_backplane.broker import Bell, Lease, LeaseRef, ReleaseReason, Taken, base_lane, shards_of
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.registry import ModelFacts
from bathyscope_workers.jobs import KINDS, ModelJob
from bathyscope_workers.supervisor._attempt import Attempt, EngineGone, LostLease
from bathyscope_workers.supervisor._engine import ENGINE_MODULE, EngineProcess
from bathyscope_workers.supervisor._meter import Meter
from bathyscope_workers.supervisor._placement import Placement
from bathyscope_workers.supervisor._residents import Residents
from bathyscope_workers.supervisor._tasks import end_tasks
from bathyscope_workers.supervisor._watchdog import Watchdog

_log = structlog.get_logger(__name__)

_COMMIT_SECONDS = 10.0
"""How long a draining worker waits for results that are being committed."""

_PUT_BACKS = 60
"""How often it is tried to put a job back; each waits for Redis for a while."""

_IDLE_SECONDS = 1.0
"""Longest time between two looks at the queues, should a bell be lost."""


SlotKind = Literal["model", "cpu", "fetch"]
"""What an engine is for; the last two are one program, so that downloads and probes do not wait for each other."""


class Slot:
    """An engine process, restarted when it dies, and the attempts that run in it."""

    def __init__(
        self,
        kind: SlotKind,
        plane: Backplane,
        bell: Bell,
        *,
        worker: str,
        scratch: Path,
        arguments: list[str],
        changed: Callable[[], None],
        meter: Meter,
        engine_module: str = ENGINE_MODULE,
    ) -> None:
        self.kind: SlotKind = kind
        self.attempts: dict[str, Attempt] = {}
        self._plane = plane
        self._bell = bell
        self._placement = Placement(plane, worker)
        self.residents = Residents(self._placement)
        self._watchdog = Watchdog(
            hang_seconds=plane.settings.worker.hang_seconds, load_seconds=plane.settings.worker.load_seconds
        )
        self._hung = False
        self._worker = worker
        self._scratch = scratch
        self._arguments = arguments
        self._engine_module = engine_module
        self._changed = changed
        self._meter = meter
        self._engine: EngineProcess | None = None
        self._ready = asyncio.Event()
        self._running: set[str] = set()
        self._alone: str | None = None
        self._marking = asyncio.Lock()
        self._quiet_since = 0.0
        self._looked_at = 0.0
        self._last_lane = ""
        self._took_shard = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._deaths = 0

    # --- taking -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take jobs until told to drain."""
        while not self._draining:
            try:
                worked = await self._ensure_engine() and await self._take()
            except Unavailable as error:
                _log.warning("worker.redis_out_of_reach", error=error.detail)
                await asyncio.sleep(0.5)
                continue
            if not worked:
                await self._bell.wait(_IDLE_SECONDS if not self._waiting_to_adopt() else 0.05)

    def drain(self) -> None:
        """Take nothing more."""
        self._draining = True
        self._bell.wake()

    async def _take(self) -> bool:
        """Take what there is for this engine; whether anything was taken."""
        settings = self._plane.settings.worker
        free = settings.concurrent_jobs - len(self.attempts)
        if free <= 0 or any(attempt.lease.solo for attempt in self.attempts.values()):
            return False
        if not await self._plane.space.has_room():  # the jobs stay where another worker finds them
            return False
        if self.kind != "model":
            # Jobs of such an engine take turns anyway: holding more than a few keeps them from other workers.
            return await self._take_from([self.kind], min(free, max(0, 2 - len(self.attempts))))
        now = asyncio.get_running_loop().time()
        if not self.attempts and not self._quiet_since:
            self._quiet_since = now
        if now - self._looked_at >= _IDLE_SECONDS:
            self._looked_at = now
            starving = await self._placement.to_adopt(
                self.residents.lanes(self._last_lane), int(settings.starvation_seconds * 1000)
            )
            if starving is not None and await self._take_from([starving], 1):
                return True
        if await self._take_from(self.residents.lanes(self._last_lane), free):
            return True
        rested = not self.attempts and now - self._quiet_since >= (settings.adopt_seconds if self.residents else 0)
        lane = await self._placement.to_adopt(self.residents.lanes(self._last_lane), 0) if rested else None
        return lane is not None and await self._take_from([lane], free)

    async def _take_from(self, lanes: list[str], n: int) -> bool:
        if not lanes or n <= 0:
            return False
        asked = time.monotonic()
        # With one place only, others have their turn between two shards.
        shards_last = n == 1 and self._took_shard
        taken = await self._lease(lanes, n, shards=not shards_last)
        if shards_last and not taken.leases and not taken.solo_waiting:
            taken = await self._lease(lanes, n, shards=True)
        self._took_shard = any(lease.shard is not None for lease in taken.leases)
        if taken.leases and self._engine is not None and not self._engine.alive:
            # It died while they were taken: what it had is put back already, and to these its end would not be told.
            for lease in taken.leases:
                self._spawn(self._surely(partial(self._plane.broker.release, lease.ref, reason="drain")))
            return False
        for lease in taken.leases:
            if lease.kind in KINDS:
                self._start(lease, asked)
            else:
                problem = InternalError(f"This worker knows no jobs of kind {lease.kind}.").problem()
                await self._plane.broker.fail(lease.ref, problem, retry=False)
        if taken.leases:
            self._quiet_since = 0.0
            self._last_lane = base_lane(taken.leases[-1].lane)
        return bool(taken.leases)

    async def _lease(self, lanes: list[str], n: int, *, shards: bool) -> Taken:
        """Lease up to `n` jobs of a lane, with `shards` one shard among them.

        Of each lane the engine has one unfinished shard at a time: with more it would be no faster, and other workers
        could not have them.
        """
        held = {
            attempt.lease.lane
            for attempt in self.attempts.values()
            if attempt.lease.shard is not None and not attempt.outcome.done()
        }
        shard_lanes = [shards_of(lane) for lane in lanes if self.kind == "model" and shards_of(lane) not in held]
        return await self._plane.broker.take(
            self._worker,
            lanes,
            n,
            lease_ms=int(self._plane.settings.jobs.lease_seconds * 1000),
            engine_idle=not self.attempts,
            shard_lanes=shard_lanes if shards else [],
        )

    def _waiting_to_adopt(self) -> bool:
        now = asyncio.get_running_loop().time()
        return (
            self.kind == "model"
            and bool(self._quiet_since)
            and now - self._quiet_since < self._plane.settings.worker.adopt_seconds
        )

    # --- attempts -----------------------------------------------------------------------------------------

    def _start(self, lease: Lease, asked: float) -> None:
        attempt = Attempt(
            plane=self._plane,
            lease=lease,
            kind=KINDS[lease.kind],
            scratch=self._scratch / f"{lease.job_id}.{lease.ref.token}",
            resident=self._placement.spec_of(lease.lane),
            send=self._send,
            is_for_another=self._placement.is_for_another,
            confirmed=asked,
        )
        self.attempts[lease.job_id] = attempt
        task = asyncio.create_task(self._meter.watch(attempt, self._attempt(attempt)), name=lease.job_id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attempt(self, attempt: Attempt) -> None:
        try:
            await attempt.run()
        except (EngineGone, LostLease):
            pass
        except Unavailable as error:  # Redis is away for long: the lease lapses and the job is taken anew
            _log.error("job.unsettled", error=error.detail)
        finally:
            if self.attempts.get(attempt.lease.job_id) is attempt:
                del self.attempts[attempt.lease.job_id]
            await attempt.close()
            self._bell.wake()

    @property
    def device(self) -> dict[str, Any]:
        """The engine's `ready` event."""
        return self._placement.device

    @property
    def pid(self) -> int | None:
        """Process id of the engine, null when none runs."""
        return self._engine.pid if self._engine is not None and self._engine.alive else None

    def refs(self) -> list[LeaseRef]:
        """The leases to renew."""
        return [attempt.lease.ref for attempt in self.attempts.values() if not attempt.lost]

    def renewed(self, ref: LeaseRef, renewal: str, asked: float) -> None:
        """What a renewal said, and when it was asked for (`time.monotonic`)."""
        attempt = self.attempts.get(ref.job_id)
        if attempt is None or attempt.lease.ref != ref:
            return
        if renewal == "lost":
            _log.warning("job.lease_lost", **attempt.names)
            attempt.ended = "lost"
            attempt.drop()
        elif renewal == "cancelled" and not attempt.cancelled:
            attempt.stop()
        else:
            attempt.confirmed = asked

    def cancel(self, job_id: str) -> None:
        """A job's owner cancelled it."""
        attempt = self.attempts.get(job_id)
        if attempt is not None and not attempt.cancelled:
            attempt.stop()

    # --- the engine ---------------------------------------------------------------------------------------

    async def _ensure_engine(self) -> bool:
        """Whether the engine can take commands; starts one when there is none."""
        if self._engine is None or not self._engine.alive:
            if self._deaths:  # not faster than it can start
                await asyncio.sleep(min(0.2 * 2 ** min(self._deaths, 6), 10.0))
            self._ready.clear()
            self._engine = EngineProcess(
                self._arguments, on_event=self._hear, on_exit=self._exited, module=self._engine_module
            )
            self._hung = False
            self._watchdog.step()
            await self._engine.start()
        if not self._ready.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._ready.wait()
        return self._ready.is_set() and self._engine.open

    def _send(self, command: Any) -> None:
        if self._engine is not None:
            self._engine.send(command)

    def _hear(self, event: dict[str, Any]) -> None:
        self._watchdog.step()
        self._meter.hear(event)
        match event["ev"]:
            case "ready":
                self._placement.device = event
                self._deaths = 0
                self._ready.set()
                self._bell.wake()
                self._changed()
            case "running":
                self._running = set(event["ids"])
                self._tell_alone()
            case "loading" | "loaded" | "load_failed" | "unloaded":
                self._residency(event)
            case "progress" | "done" | "failed" | "cancelled":
                attempt = self.attempts.get(event["id"])
                if attempt is not None:
                    attempt.hear(event)
                    if attempt.lease.shard is not None and attempt.outcome.done():
                        self._bell.wake()  # the next one is run while this one is put into the store

    def _residency(self, event: dict[str, Any]) -> None:
        """A model is loaded, or is not any more."""
        spec = self.residents.hear(event)
        if spec is not None and event["ev"] == "loaded":
            facts = event["facts"]
            self._spawn(self._plane.workers.keep_memory(event["key"], facts["memory_bytes"]))
            self._spawn(self._plane.workers.keep_facts(spec.name, ModelFacts.model_validate(facts)))
        self._changed()
        self._tell_model_jobs(event)

    def _tell_model_jobs(self, event: dict[str, Any]) -> None:
        """Jobs that load or unload a model hear how that went."""
        for attempt in list(self.attempts.values()):
            if isinstance(attempt.kind, ModelJob) and attempt.resident is not None:
                keys = {attempt.resident.key, self._placement.resolved(attempt.lease.lane)}
                outcome = attempt.kind.outcome(attempt.lease, event)
                if outcome is not None and keys & {event["key"], event.get("asked")}:
                    attempt.hear(outcome)

    def _tell_alone(self) -> None:
        """Keep the broker's note of a job that runs alone, so that a lapse of its lease is judged right."""
        alone = next(iter(self._running)) if len(self._running) == 1 and len(self.attempts) == 1 else None
        if alone == self._alone:
            return
        marks = [
            (self.attempts[job_id].lease.ref, state)
            for job_id, state in ((self._alone, False), (alone, True))
            if job_id in self.attempts and not self.attempts[job_id].outcome.done()
        ]
        self._alone = alone
        self._spawn(self._mark_alone(marks))

    async def _mark_alone(self, marks: list[tuple[LeaseRef, bool]]) -> None:
        async with self._marking:  # in their order
            for ref, state in marks:
                await self._plane.broker.mark_alone(ref, state)

    def _spawn(self, call: Any) -> None:
        async def quietly() -> None:
            with contextlib.suppress(Unavailable):
                await call

        task = asyncio.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check_hang(self) -> None:
        """End an engine that hangs."""
        if self._engine is None or self._engine.pid is None or not self._engine.alive or self._hung:
            return
        loading = not self._ready.is_set() or bool(self.residents.loading())
        silence = self._watchdog.look(self._engine.pid, busy=loading or bool(self._in_engine()), loading=loading)
        if silence is not None:
            _log.error("engine.hung", kind=self.kind, pid=self._engine.pid, silent_seconds=round(silence))
            self._hung = True
            self._engine.kill()

    def _in_engine(self) -> set[str]:
        """Jobs that the engine has and has not finished."""
        return {job_id for job_id, attempt in self.attempts.items() if attempt.sent and not attempt.outcome.done()}

    def _exited(self, code: int) -> None:
        """The engine is gone: put its jobs back, the suspects apart."""
        self._ready.clear()
        suspects = self._suspects()
        self.residents.clear()
        self._running, self._alone = set(), None
        if not self._draining or self.attempts:
            self._deaths += 1
            self._meter.engine_ended(self.kind, code, hung=self._hung)
            _log.error("engine.died", kind=self.kind, code=code, jobs=len(self.attempts), suspects=len(suspects))
        reason: ReleaseReason
        if self._draining and code == 0:  # it ended as it was told to
            reason = "drain"
        elif self._hung:
            reason = "engine_hung_alone" if len(suspects) == 1 else "engine_hung_together"
        else:
            reason = "engine_died_alone" if len(suspects) == 1 else "engine_died_together"
        for job_id, attempt in list(self.attempts.items()):
            if attempt.outcome.done():
                continue  # the engine had finished it: its result is being committed
            attempt.outcome.set_exception(EngineGone(job_id))
            attempt.ended = reason if job_id in suspects else "drain"
            self._spawn(self._surely(partial(self._put_back, attempt, reason if job_id in suspects else "drain")))
        self._changed()
        self._bell.wake()

    def _suspects(self) -> set[str]:
        """Jobs that the engine's end may be the fault of: those of the step it was in, or of the model it was loading,
        else all that it had not finished.
        """
        unfinished = self._in_engine()
        loading = self.residents.loading()
        waited = {
            job_id for job_id in unfinished if self._placement.resolved(self.attempts[job_id].lease.lane) in loading
        }
        return self._running & unfinished or waited or (set() if self._running else unfinished)

    async def _put_back(self, attempt: Attempt, reason: ReleaseReason) -> None:
        if not attempt.lost:
            await self._plane.broker.release(attempt.lease.ref, reason=reason)
            await attempt.discard_if_ended()

    async def _surely(self, put_back: Callable[[], Awaitable[Any]]) -> None:
        """Put a job back while Redis is out of reach, too: a lease that lapsed would be held against it."""
        for _ in range(_PUT_BACKS):
            try:
                await put_back()
                return
            except Unavailable:
                await asyncio.sleep(1)

    async def stop(self, grace: float, hurry: asyncio.Event) -> None:
        """Let the attempts end within the grace, put the others back, end the engine."""
        await self._rest(grace, hurry)
        await self._put_all_back([attempt for attempt in self.attempts.values() if not attempt.outcome.done()])
        # What is left has its result and is committing it: a moment, unless the store or Redis is away.
        await self._rest(_COMMIT_SECONDS, hurry)
        await self._put_all_back(list(self.attempts.values()))
        if self._engine is not None:
            await self._engine.stop(0.0 if hurry.is_set() else 5.0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_COMMIT_SECONDS)
        await end_tasks(self._tasks)

    async def _rest(self, seconds: float, hurry: asyncio.Event) -> None:
        """Wait until no attempt is left, or so long, or until hurried."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self.attempts and not hurry.is_set() and asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await hurry.wait()

    async def _put_all_back(self, attempts: list[Attempt]) -> None:
        async def put_back(attempt: Attempt) -> None:
            with contextlib.suppress(Unavailable):
                await self._put_back(attempt, "drain")
            attempt.drop()

        await asyncio.gather(*(put_back(attempt) for attempt in attempts))
