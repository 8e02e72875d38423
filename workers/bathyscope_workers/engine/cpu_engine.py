"""The engine of kind cpu: jobs that need no model, one after another.

They run here and not in a model engine so that they never wait behind a forward pass, nor it behind them. What
a kind of job does is its handler's matter (`handlers`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.contextvars import bound_contextvars

from bathyscope import errors
from bathyscope_workers.disk import out_of_space
from bathyscope_workers.engine import handlers
from bathyscope_workers.engine.account import Stages
from bathyscope_workers.engine.channel import Channel
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.models.versions import versions

_log = structlog.get_logger(__name__)

_PROGRESS_SECONDS = 0.5
_BEAT_SECONDS = 0.2
"""Handlers may beat in a tight loop; more often than this is not passed on."""


class CpuEngine:
    """Serves one pipe until it closes."""

    def __init__(self, channel: Channel, *, registry: Mapping[str, str | handlers.Handler] | None = None) -> None:
        self._channel = channel
        self._registry = handlers.CPU_HANDLERS if registry is None else registry
        self._waiting: dict[str, tuple[RunJob, float]] = {}
        self._current: str | None = None
        self._stop_current = False
        self._stopping = False
        self._last_beat = self._last_progress = 0.0

    def run(self) -> None:
        """Serve until `shutdown` or until the pipe closes."""
        self._channel.send(
            {
                "ev": "ready",
                "kind": "cpu",
                "pid": os.getpid(),
                "device": "cpu",
                "device_name": f"{os.cpu_count()} CPUs",
                "memory_limit_bytes": 0,
                "versions": versions(),
            }
        )
        while not self._stopping:
            self._take_commands(block=not self._waiting)
            if self._waiting and not self._stopping:
                self._run_next()

    def _take_commands(self, *, block: bool) -> None:
        while not self._stopping:
            command = self._channel.get(block=block)
            if command is None:
                self._stopping = self._channel.closed
                return
            block = False
            self._do(command)

    def _do(self, command: dict[str, Any]) -> None:
        match command.get("op"):
            case "run":
                job = RunJob.from_wire(command["job"])
                self._waiting[job.id] = (job, time.monotonic())
            case "cancel":
                if command["id"] == self._current:
                    self._stop_current = True
                elif self._waiting.pop(command["id"], None) is not None:
                    self._channel.send({"ev": "cancelled", "id": command["id"]})
            case "drop_all":
                self._waiting.clear()
                self._current = None
            case "shutdown":
                self._stopping = True
            case other:
                _log.warning("command.unknown", op=str(other)[:40])

    def _run_next(self) -> None:
        job, received = self._waiting.pop(next(iter(self._waiting)))
        with bound_contextvars(**job.names):
            self._run(job, received)

    def _run(self, job: RunJob, received: float) -> None:
        identifier, stages = job.id, Stages()
        self._current, self._stop_current = identifier, False
        self._last_progress = started = time.monotonic()
        self._channel.send({"ev": "running", "ids": [identifier]})
        context = handlers.JobContext(job, beat=self._step, progress=self._progress)
        event: dict[str, Any]
        try:
            handler = handlers.resolve(self._registry, job.kind)
            if handler is None:
                raise errors.InternalError(f"this worker has no handler for jobs of kind {job.kind}")
            with stages.during("compute"):
                result = handler(job, context)
        except handlers.JobStopped:
            event = {"ev": "cancelled", "id": identifier}
        except errors.ProblemError as error:
            retry = isinstance(error, errors.Unavailable)
            event = {"ev": "failed", "id": identifier, "problem": error.problem(), "retry": retry}
        except MemoryError:
            _log.warning("job.out_of_memory", exc_info=True)
            problem = errors.OutOfMemory("the worker ran out of memory").problem()
            event = {"ev": "failed", "id": identifier, "problem": problem, "retry": False}
        except Exception as error:
            _log.exception("job.failed")
            fault = out_of_space(error) or errors.InternalError("the engine failed at this job; its log says where")
            event = {"ev": "failed", "id": identifier, "problem": fault.problem(), "retry": True}
        else:
            now = time.monotonic()
            timings = {"load": 0.0, "tokenise": 0.0, "inference": now - started, "total": now - received}
            event = {"ev": "done", "id": identifier, "result": result, "timings": timings}
        if event["ev"] in ("done", "failed"):
            event["stages"] = stages.times
        if self._current == identifier:  # else it was dropped: no answer
            self._channel.send(event)
        self._current = None
        self._channel.send({"ev": "running", "ids": []})

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= _BEAT_SECONDS:
            self._last_beat = now
            self._channel.send({"ev": "beat"})
        self._take_commands(block=False)
        if self._stop_current or self._current is None or self._stopping:
            raise handlers.JobStopped

    def _progress(self, stage: str, done: int, total: int, unit: str) -> None:
        self._step()
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            event = {"ev": "progress", "id": self._current, "stage": stage, "done": done, "total": total, "unit": unit}
            self._channel.send(event)
