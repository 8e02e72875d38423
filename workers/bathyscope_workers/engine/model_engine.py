"""The engine of kind model: extractions on resident models, batch after batch.

One thread does everything but reading the pipe. Each turn of its loop takes the commands that have come, starts
jobs whose model is resident and whose adapters are attached (loading and attaching them if need be), tokenises for a
moment, runs one batch. It blocks on the pipe only when nothing is active.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from bathyscope import errors
from bathyscope_workers.adapters.bank import RowsNotApart
from bathyscope_workers.engine import answers, handlers
from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.problems import DeviceFault, problem_of
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.engine.readying import Readying
from bathyscope_workers.engine.residents import Residents
from bathyscope_workers.engine.scheduler import Active, Row, Scheduler
from bathyscope_workers.engine.telling import Telling
from bathyscope_workers.extraction.batch import run_batch, tokens_of
from bathyscope_workers.extraction.cache import CacheOptions, RowCache
from bathyscope_workers.extraction.extraction import Extraction
from bathyscope_workers.extraction.spec import ExtractionSpec
from bathyscope_workers.extraction.template import ChatRenderer
from bathyscope_workers.models.device import Device, is_device_fault, is_out_of_memory
from bathyscope_workers.models.load import quiet_libraries
from bathyscope_workers.models.resident import Resident
from bathyscope_workers.models.source import LoadFault
from bathyscope_workers.models.spec import ModelSpec
from bathyscope_workers.models.versions import versions

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class ModelEngineSettings:
    """Arguments of `python -m bathyscope_workers.engine --kind model`."""

    batch_tokens: int | None = None
    """Padded tokens a batch; None leaves it to what was measured when the model was loaded."""
    memory_bytes: int | None = None
    """Bound of resident models; None is a share of what the device has."""
    force_cpu: bool = False
    template_seconds: float = 5.0
    """Deadline of rendering one chat template."""
    cache: CacheOptions | None = None
    """Where rows are kept for the next request; without it none are."""


class ModelEngine:
    """Serves one pipe until it closes."""

    def __init__(
        self,
        channel: Channel,
        settings: ModelEngineSettings | None = None,
        *,
        finishers: Mapping[str, str | handlers.Handler] | None = None,
    ) -> None:
        settings = settings or ModelEngineSettings()
        self._channel = channel
        self._finishers = handlers.FINISHERS if finishers is None else finishers
        self.device = Device.pick(limit_bytes=settings.memory_bytes, force_cpu=settings.force_cpu)
        self.renderer = ChatRenderer(seconds=settings.template_seconds)
        self.cache = None if settings.cache is None else RowCache(settings.cache)
        self._tell = Telling(channel, self.cache)
        self.residents = Residents(
            self.device,
            self.renderer,
            lambda: self._jobs.values(),
            send=channel.send,
            beat=self._tell.beat,
            announce=self._tell.announce,
        )
        self.residency = self.residents.residency
        self.scheduler = Scheduler(batch_tokens=settings.batch_tokens)
        self._jobs: dict[str, Active] = {}
        """In order of arrival."""
        self._readying = Readying(self._jobs, self._tell, self._fail)
        self._stopping = False

    # --- the loop ---

    def run(self) -> None:
        """Serve until `shutdown` or until the pipe closes. Raises DeviceFault."""
        quiet_libraries()
        self._channel.send(
            {
                "ev": "ready",
                "kind": "model",
                "pid": os.getpid(),
                "device": self.device.name,
                "device_name": self.device.description,
                "memory_limit_bytes": self.device.limit_bytes,
                "versions": versions(),
            }
        )
        try:
            while not self._stopping:
                self._take_commands()
                if self._jobs and not self._stopping:
                    self._start_jobs()
                    self._readying.before()
                    self._complete()
                    self._run_batch()
        finally:
            self._drop_all()
            self._readying.close()
            self.renderer.close()
            if self.cache is not None:
                self.cache.close()

    def _take_commands(self) -> None:
        untidy = self.cache is not None and self.cache.tidy()
        if not self._jobs:
            self._tell.announce([])
            if self.cache is not None and self.cache.untold:
                self._tell.beat()
        while not self._stopping:
            command = self._channel.get(block=not self._jobs and not untidy)
            if command is None:
                self._stopping = self._channel.closed
                return
            self._do(command)

    def _do(self, command: dict[str, Any]) -> None:
        match command.get("op"):
            case "run":
                job = RunJob.from_wire(command["job"])
                self._jobs[job.id] = Active(job, received=time.monotonic())
            case "cancel":
                active = self._jobs.get(command["id"])
                if active is not None:
                    self._remove(active)
                    self._channel.send({"ev": "cancelled", "id": active.job.id})
            case "load":
                self.residents.load(command["resident"])
            case "unload":
                self.residents.unload(command["key"])
            case "drop_all":
                self._drop_all()
            case "shutdown":
                self._stopping = True
            case other:
                _log.warning("command.unknown", op=str(other)[:40])

    # --- jobs ---

    def _start_jobs(self) -> None:
        """Give each new job its resident, in order of arrival; one that must wait for memory holds back the next."""
        for active in [one for one in self._jobs.values() if one.extraction is None]:
            started = time.monotonic()
            with bound_contextvars(**active.job.names):
                if not self._start_job(active):
                    return
            if time.monotonic() - started > 1.0:
                # A load took its time: the commands that came meanwhile go first.
                return

    def _start_job(self, active: Active) -> bool:
        """False when its model or its adapters must wait for memory."""
        job = active.job
        try:
            spec = self._spec_of(job)
            resident = self.residents.get(spec)
            if resident is None:
                return False
            if not self.residents.attach(resident, job):
                return False
            active.started = active.last_progress = time.monotonic()
            active.timings["load"] = active.started - active.received
            active.stages.note("load", active.arrived, time.time())
            handler = handlers.resolve(handlers.MODEL_HANDLERS, job.kind)
            if handler is not None:
                self._handle(active, resident, handler)
                return True
            active.extraction = Extraction(
                ExtractionSpec.from_wire(job.spec),
                resident,
                inputs=job.inputs,
                inputs_path=job.inputs_path,
                scratch=job.scratch,
                renderer=self.renderer,
                max_result_bytes=job.extra.get("max_result_bytes"),
                variants=[one and one["digest"] for one in job.extra.get("variants") or [None]],
                paired=bool(job.spec.get("paired")),
                first_input=job.extra.get("first_input", 0),
                owner=job.owner,
                solo=job.solo,
                cache=self.cache,
            )
        except LoadFault as fault:
            self.residents.load_failed(job.resident if isinstance(job.resident, str) else spec.key, fault)
            self._fail(active, fault)
        except Exception as error:
            self._fail(active, error)
        return True

    def _handle(self, active: Active, resident: Resident, handler: handlers.Handler) -> None:
        """A job that is no extraction, done at once: a few forward passes."""
        started, began = time.monotonic(), time.time()
        context = handlers.JobContext(active.job, beat=self._tell.beat, progress=lambda *_: self._tell.beat())
        wire = handler(active.job, resident, context)
        active.timings["inference"] = time.monotonic() - started
        active.stages.note("forward", began, time.time())
        self._done(active, wire)

    def _spec_of(self, job: RunJob) -> ModelSpec:
        if isinstance(job.resident, dict):
            return ModelSpec.from_wire(job.resident)
        if not job.resident:
            raise errors.InternalError("the job names no model")
        return self.residency.spec(job.resident)

    def _run_batch(self) -> None:
        turn = self.scheduler.next_turn(self._jobs.values())
        if turn is None:
            return
        rows = turn.rows
        if not rows:
            self._answer(turn.leader)
            return
        with self._readying.beside(list(dict.fromkeys(one.active.job.id for one in rows))):
            self._forward(rows)
        self._tell.beat()
        for active in dict.fromkeys(one.active for one in rows):
            if not self._is_active(active):
                continue
            extraction = active.running
            if not extraction.complete:
                self._tell.progress(active, "forward", extraction.done_rows, extraction.total_rows)
        self._complete()

    def _complete(self) -> None:
        """Go on with jobs that have nothing left to compute; one whose rows were all there waits for no batch."""
        for active in [one for one in self._jobs.values() if one.tokenised and one.running.complete]:
            self._tell.announce([active.job.id])
            try:
                filled = active.running.fill_step()
            except Exception as error:
                self._fail(active, error)
                continue
            if filled:
                self._finish(active)
            else:
                self._tell.beat()

    def _answer(self, active: Active) -> None:
        """Go on with a job's answers in words for a moment."""
        self._tell.announce([active.job.id])
        generation = active.running.generation
        assert generation is not None
        budget = self.scheduler.budget(active.running.resident)
        fault = answers.go_on(active, budget, self._tell.batches, self.device)
        self._tell.beat()
        if fault is not None:
            self._fail(active, fault)
        elif generation.waiting:
            self._tell.progress(active, "generate", generation.done, generation.total)
        else:
            self._finish(active)

    def _forward(self, rows: list[Row]) -> None:
        """Run a batch; halve it when memory runs out, run its jobs apart when something else goes wrong."""
        rows = [one for one in rows if self._is_active(one.active)]
        if not rows:
            return
        actives = list(dict.fromkeys(one.active for one in rows))
        started, began = time.monotonic(), time.time()
        try:
            padded = run_batch(_shares(rows, actives), budget=self.scheduler.budget(actives[0].running.resident))
        except Exception as error:
            if is_device_fault(error):
                raise DeviceFault(str(error)) from error
            split = self._split(rows, actives, error)
        else:
            seconds = time.monotonic() - started
            if self.cache is not None:
                self.cache.earn(seconds)
            for active in actives:
                active.running.computed([one.row for one in rows if one.active is active])
                active.timings["inference"] += seconds
                active.stages.note("forward", began, began + seconds)
            self._count(rows, padded, seconds)
            return
        # Outside of the handler: the exception's frames hold the failed batch's tensors.
        if split:
            self.device.give_back()
            for part in split:
                self._forward(part)

    def _count(self, rows: list[Row], padded: int, seconds: float) -> None:
        # Of texts that begin alike fewer went through the model than they have.
        tokens = min(padded, sum(one.active.running.row_ids(one.row).size for one in rows))
        resident = rows[0].active.running.resident
        self._tell.batches.add(resident.key, rows=len(rows), tokens=tokens, padded=padded, seconds=seconds)

    def _split(self, rows: list[Row], actives: list[Active], error: Exception) -> list[list[Row]]:
        """What to try after a failure; nothing when the one job to blame was failed."""
        if is_out_of_memory(error):
            resident = rows[0].active.running.resident
            widest = max(len(one.active.running.row_ids(one.row)) for one in rows)
            for active in actives:
                _log.warning("batch.out_of_memory", **active.job.names, rows=len(rows), tokens=widest)
            if len(rows) > 1:
                tokens = tokens_of(_shares(rows, actives)) // 2
                resident.token_budget = max(1, min(tokens, self.scheduler.budget(resident)))
                half = len(rows) // 2
                return [rows[:half], rows[half:]]
            # Without what is kept of beginnings, and without keeping any, it is tried once more.
            if resident.kept.clear() or actives[0].running.ahead(rows[0].row):
                actives[0].running.keep_nothing()
                return [rows]
            text = f"a text of {widest} tokens does not fit into memory by itself; send shorter ones or set max_length"
            self._fail(actives[0], errors.OutOfMemory(text, tokens=widest))
        elif isinstance(error, RowsNotApart):
            _log.warning("batch.rows_not_apart", reason=str(error))
            actives[0].running.resident.adapters.stop_mixing()
            by_adapter: dict[str | None, list[Row]] = {}
            for one in rows:
                by_adapter.setdefault(one.active.running.adapter_of(one.row), []).append(one)
            return list(by_adapter.values())
        elif len(actives) > 1:
            return [[one for one in rows if one.active is active] for active in actives]
        else:
            self._fail(actives[0], error)
        return []

    def _finish(self, active: Active) -> None:
        job = active.job
        with bound_contextvars(**job.names):
            try:
                result = active.running.finish()
                finisher = handlers.resolve(self._finishers, job.kind)
                if finisher is None:
                    wire = result.to_wire()
                else:
                    context = handlers.JobContext(job, beat=self._tell.beat, progress=lambda *_: self._tell.beat())
                    wire = finisher(job, result, context)
            except Exception as error:
                self._fail(active, error)
                return
        self._done(active, wire)

    def _done(self, active: Active, wire: dict[str, Any]) -> None:
        total = time.monotonic() - active.received
        self._forget(active)
        self._channel.send(
            {
                "ev": "done",
                "id": active.job.id,
                "result": wire,
                "timings": {**_rounded(active.timings), "total": round(total, 6)},
                "stages": active.stages.times,
            }
        )

    def _fail(self, active: Active, error: Exception) -> None:
        if is_device_fault(error):
            raise DeviceFault(str(error)) from error
        with bound_contextvars(**active.job.names):
            problem, retry = problem_of(error)
        self._remove(active)
        self._channel.send(
            {
                "ev": "failed",
                "id": active.job.id,
                "problem": problem,
                "retry": retry,
                "stages": active.stages.times,
            }
        )

    def _remove(self, active: Active) -> None:
        if active.extraction is not None:
            active.extraction.discard()
        self._forget(active)

    def _forget(self, active: Active) -> None:
        self._jobs.pop(active.job.id, None)
        if active.extraction is not None:
            resident = active.extraction.resident
            running = [one for one in self._jobs.values() if one.extraction is not None]
            resident.kept.only({one.job.owner for one in running if one.running.resident is resident})
        self.residents.unload_idle()

    def _drop_all(self) -> None:
        for active in list(self._jobs.values()):
            self._remove(active)

    def _is_active(self, active: Active) -> bool:
        return self._jobs.get(active.job.id) is active


def _shares(rows: list[Row], actives: list[Active]) -> list[tuple[Extraction, list[int]]]:
    return [(active.running, [one.row for one in rows if one.active is active]) for active in actives]


def _rounded(timings: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 6) for name, seconds in timings.items()}
