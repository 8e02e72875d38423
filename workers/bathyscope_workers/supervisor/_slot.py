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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from bathyscope.errors import InternalError, ModelUnknown, ProblemError, Unavailable
from bathyscope_backplane.broker import Bell, Lease, LeaseRef, ReleaseReason
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.registry import ModelFacts
from bathyscope_workers.jobs import KINDS, ModelJob
from bathyscope_workers.models.spec import ModelSpec
from bathyscope_workers.supervisor._attempt import Attempt, EngineGone, LostLease
from bathyscope_workers.supervisor._engine import EngineProcess

_log = structlog.get_logger(__name__)

_IDLE_SECONDS = 1.0
"""Longest time between two looks at the queues, should a bell be lost."""


@dataclass(slots=True)
class Resident:
    """A model in the engine's memory."""

    spec: ModelSpec
    state: Literal["hot", "loading"]
    facts: dict[str, Any] | None = None


class Slot:
    """An engine process, restarted when it dies, and the attempts that run in it."""

    def __init__(
        self,
        kind: Literal["model", "cpu"],
        plane: Backplane,
        bell: Bell,
        *,
        worker: str,
        scratch: Path,
        arguments: list[str],
        changed: Callable[[], None],
    ) -> None:
        self.kind: Literal["model", "cpu"] = kind
        self.attempts: dict[str, Attempt] = {}
        self.residents: dict[str, Resident] = {}
        self.device: dict[str, Any] = {}
        """The engine's `ready` event."""
        self._plane = plane
        self._bell = bell
        self._worker = worker
        self._scratch = scratch
        self._arguments = arguments
        self._changed = changed
        self._engine: EngineProcess | None = None
        self._ready = asyncio.Event()
        self._running: set[str] = set()
        self._alone: str | None = None
        self._last_beat = 0.0
        self._quiet_since = 0.0
        self._looked_at = 0.0
        self._last_lane = ""
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
        if self.kind == "cpu":
            # Jobs of this engine take turns anyway: holding more than a few keeps them from other workers.
            return await self._take_from(["cpu"], min(free, max(0, 2 - len(self.attempts))))
        now = asyncio.get_running_loop().time()
        if not self.attempts and not self._quiet_since:
            self._quiet_since = now
        if now - self._looked_at >= _IDLE_SECONDS:
            self._looked_at = now
            starving = await self._lane_to_adopt(int(settings.starvation_seconds * 1000))
            if starving is not None and await self._take_from([starving], 1):
                return True
        if await self._take_from(self._resident_lanes(), free):
            return True
        rested = not self.attempts and now - self._quiet_since >= (settings.adopt_seconds if self.residents else 0)
        lane = await self._lane_to_adopt(0) if rested else None
        return lane is not None and await self._take_from([lane], free)

    async def _take_from(self, lanes: list[str], n: int) -> bool:
        if not lanes or n <= 0:
            return False
        lease_ms = int(self._plane.settings.jobs.lease_seconds * 1000)
        taken = await self._plane.broker.take(self._worker, lanes, n, lease_ms=lease_ms, engine_idle=not self.attempts)
        for lease in taken.leases:
            if lease.kind in KINDS:
                self._start(lease)
            else:
                problem = InternalError(f"This worker knows no jobs of kind {lease.kind}.").problem()
                await self._plane.broker.fail(lease.ref, problem, retry=False)
        if taken.leases:
            self._quiet_since = 0.0
            self._last_lane = taken.leases[0].lane
        return bool(taken.leases)

    def _resident_lanes(self) -> list[str]:
        """The lanes of resident models, beginning after the one served last: a take gives one lane's jobs."""
        lanes: list[str] = []
        for resident in self.residents.values():
            spec = resident.spec
            for dtype in dict.fromkeys((spec.compute_dtype, "auto")):
                lane = f"model:{spec.name}:{spec.quantization}:{dtype}"
                if self._resolved(lane) == resident.spec.key:
                    lanes.append(lane)
        turn = lanes.index(self._last_lane) + 1 if self._last_lane in lanes else 0
        return lanes[turn:] + lanes[:turn]

    async def _lane_to_adopt(self, least_age_ms: int) -> str | None:
        """Of the lanes of models that are not resident the one that has waited longest, and so long; null for none."""
        resident = set(self._resident_lanes())
        waiting = [
            (lane.oldest_age_ms, lane.lane)
            for lane in await self._plane.broker.lanes()
            if lane.depth
            and lane.oldest_age_ms >= least_age_ms
            and lane.lane not in resident
            and self._resolved(lane.lane) is not None
        ]
        return max(waiting)[1] if waiting else None

    def _waiting_to_adopt(self) -> bool:
        now = asyncio.get_running_loop().time()
        return (
            self.kind == "model"
            and bool(self._quiet_since)
            and now - self._quiet_since < self._plane.settings.worker.adopt_seconds
        )

    def spec_of(self, lane: str) -> ModelSpec | None:
        """The model of a lane, as this worker's registry knows it; null when it is none or not offered here."""
        head, _, rest = lane.partition(":")
        name, quantization, dtype = rest.rsplit(":", 2) if rest.count(":") >= 2 else ("", "", "")
        if head != "model":
            return None
        try:
            entry = self._plane.registry.get(name)
            return ModelSpec(
                name=name,
                source=entry.source,
                revision=entry.revision,
                quantization=quantization,  # type: ignore[arg-type]
                compute_dtype=dtype,  # type: ignore[arg-type]
                llm_int8_threshold=entry.llm_int8_threshold,
                max_length=entry.max_length,
                data_dir=str(self._plane.settings.data_dir),
            )
        except (ModelUnknown, ProblemError):
            return None

    def _resolved(self, lane: str) -> str | None:
        spec = self.spec_of(lane)
        if spec is None:
            return None
        return spec.resolved("cpu" if self.device.get("device", "cpu") == "cpu" else "cuda").key

    # --- attempts -----------------------------------------------------------------------------------------

    def _start(self, lease: Lease) -> None:
        attempt = Attempt(
            plane=self._plane,
            lease=lease,
            kind=KINDS[lease.kind],
            scratch=self._scratch / f"{lease.job_id}.{lease.ref.token}",
            resident=self.spec_of(lease.lane),
            send=self._send,
        )
        if not self.attempts:
            self._last_beat = asyncio.get_running_loop().time()
        self.attempts[lease.job_id] = attempt
        task = asyncio.create_task(self._attempt(attempt), name=lease.job_id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _attempt(self, attempt: Attempt) -> None:
        try:
            await attempt.run()
        except (EngineGone, LostLease):
            pass
        except Unavailable as error:  # Redis is away for long: the lease lapses and the job is taken anew
            _log.error("job.unsettled", job=attempt.lease.job_id, error=error.detail)
        finally:
            if self.attempts.get(attempt.lease.job_id) is attempt:
                del self.attempts[attempt.lease.job_id]
            await attempt.close()
            self._bell.wake()

    def refs(self) -> list[LeaseRef]:
        """The leases to renew."""
        return [attempt.lease.ref for attempt in self.attempts.values() if not attempt.lost]

    def renewed(self, ref: LeaseRef, renewal: str, asked: float) -> None:
        """What a renewal said, and when it was asked for (`time.monotonic`)."""
        attempt = self.attempts.get(ref.job_id)
        if attempt is None or attempt.lease.ref != ref:
            return
        if renewal == "lost":
            _log.warning("job.lease_lost", job=ref.job_id)
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
            self._engine = EngineProcess(self._arguments, on_event=self._hear, on_exit=self._exited)
            self._last_beat = asyncio.get_running_loop().time()
            await self._engine.start()
        if not self._ready.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._ready.wait()
        return self._ready.is_set()

    def _send(self, command: Any) -> None:
        if self._engine is not None:
            self._engine.send(command)

    def _hear(self, event: dict[str, Any]) -> None:
        self._last_beat = asyncio.get_running_loop().time()
        match event["ev"]:
            case "ready":
                self.device = event
                self._deaths = 0
                self._ready.set()
                self._bell.wake()
                self._changed()
            case "running":
                self._running = set(event["ids"])
                self._tell_alone()
            case "loading":
                spec = self._spec_of_key(event["asked"]) or self._spec_of_key(event["key"])
                if spec is not None:
                    resolved = spec.resolved("cpu" if self.device["device"] == "cpu" else "cuda")
                    self.residents[event["key"]] = Resident(resolved, "loading")
                    self._changed()
            case "loaded":
                self._loaded(event)
            case "load_failed" | "unloaded":
                self.residents.pop(event["key"], None)
                self._changed()
                self._tell_model_jobs(event)
            case "progress" | "done" | "failed" | "cancelled":
                attempt = self.attempts.get(event["id"])
                if attempt is not None:
                    attempt.hear(event)

    def _spec_of_key(self, key: str) -> ModelSpec | None:
        return self.spec_of(f"model:{key}")

    def _loaded(self, event: dict[str, Any]) -> None:
        spec = self._spec_of_key(event["key"])
        if spec is not None:
            self.residents[event["key"]] = Resident(spec, "hot", event["facts"])
            facts = ModelFacts.model_validate(event["facts"])
            self._spawn(self._plane.workers.keep_facts(spec.name, facts))
        self._changed()
        self._tell_model_jobs(event)

    def _tell_model_jobs(self, event: dict[str, Any]) -> None:
        """Jobs that load or unload a model hear how that went."""
        for attempt in list(self.attempts.values()):
            if isinstance(attempt.kind, ModelJob) and attempt.resident is not None:
                keys = {attempt.resident.key, self._resolved(attempt.lease.lane)}
                outcome = attempt.kind.outcome(attempt.lease, event)
                if outcome is not None and keys & {event["key"], event.get("asked")}:
                    attempt.hear(outcome)

    def _tell_alone(self) -> None:
        """Keep the broker's note of a job that runs alone, so that a lapse of its lease is judged right."""
        alone = next(iter(self._running)) if len(self._running) == 1 and len(self.attempts) == 1 else None
        if alone == self._alone:
            return
        for job_id, state in ((self._alone, False), (alone, True)):
            attempt = self.attempts.get(job_id) if job_id is not None else None
            if attempt is not None and not attempt.outcome.done():
                self._spawn(self._plane.broker.mark_alone(attempt.lease.ref, state))
        self._alone = alone

    def _spawn(self, call: Any) -> None:
        async def quietly() -> None:
            with contextlib.suppress(Unavailable):
                await call

        task = asyncio.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check_hang(self) -> None:
        """End an engine that made no step for too long."""
        settings = self._plane.settings.worker
        waiting = any(not attempt.outcome.done() for attempt in self.attempts.values())
        busy = waiting or not self._ready.is_set()
        if self._engine is None or not self._engine.alive or not busy:
            return
        loading = not self._ready.is_set() or any(item.state == "loading" for item in self.residents.values())
        silence = asyncio.get_running_loop().time() - self._last_beat
        if silence > (settings.load_seconds if loading else settings.hang_seconds):
            _log.error("engine.hung", kind=self.kind, pid=self._engine.pid, silent_seconds=round(silence))
            self._engine.kill()

    def _exited(self, code: int) -> None:
        """The engine is gone: put its jobs back, the suspects apart."""
        self._ready.clear()
        loading = [key for key, item in self.residents.items() if item.state == "loading"]
        self.residents.clear()
        suspects = {job_id for job_id in self._running if job_id in self.attempts}
        if not suspects and (loading or not self._running):  # while loading, or in no step at all: all of them
            suspects = set(self.attempts)
        self._running, self._alone = set(), None
        if not self._draining or self.attempts:
            self._deaths += 1
            _log.error("engine.died", kind=self.kind, code=code, jobs=len(self.attempts), suspects=len(suspects))
        together: ReleaseReason = "engine_died_alone" if len(suspects) == 1 else "engine_died_together"
        if self._draining and code == 0:  # it ended as it was told to
            together = "drain"
        for job_id, attempt in list(self.attempts.items()):
            if attempt.outcome.done():
                continue  # the engine had finished it: its result is being committed
            attempt.outcome.set_exception(EngineGone(job_id))
            self._spawn(self._put_back(attempt, together if job_id in suspects else "drain"))
        self._changed()
        self._bell.wake()

    async def _put_back(self, attempt: Attempt, reason: ReleaseReason) -> None:
        if not attempt.lost:
            await self._plane.broker.release(attempt.lease.ref, reason=reason)

    async def stop(self, grace: float, hurry: asyncio.Event) -> None:
        """Let the attempts end within the grace, put the others back, end the engine."""
        deadline = asyncio.get_running_loop().time() + grace
        while self.attempts and not hurry.is_set() and asyncio.get_running_loop().time() < deadline:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await hurry.wait()
        for attempt in list(self.attempts.values()):
            if not attempt.outcome.done():
                with contextlib.suppress(Unavailable):
                    await self._plane.broker.release(attempt.lease.ref, reason="drain")
                attempt.drop()
        if self._engine is not None:
            await self._engine.stop(0.0 if hurry.is_set() else 5.0)
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=10)
