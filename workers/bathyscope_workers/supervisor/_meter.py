"""What a worker tells of its work: numbers in its heartbeat, names in its log, spans of its attempts.

The engine has no part in it but to say what it did: `batches` come with its beats, `stages` with the end of a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter as Count
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.registry import CollectorRegistry
from structlog.contextvars import bound_contextvars

from bathyscope_backplane.broker import base_lane
from bathyscope_backplane.meters import LONG_SECONDS, OTHERS, disk_bytes, dump, folders, meter_store
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.tracing import Span
from bathyscope_workers.engine.protocol import EXIT_DEVICE_FAULT

if TYPE_CHECKING:
    from bathyscope_workers.supervisor._attempt import Attempt
    from bathyscope_workers.supervisor._slot import Slot

LOOK_SECONDS = 10.0
"""How often disks and processes are looked at."""

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_LANES = 64
"""Lanes that are told apart by name, in the order of their first batch."""


class Meter:
    """The numbers of one worker."""

    def __init__(self, plane: Backplane, scratch: Path) -> None:
        self._plane = plane
        self._scratch = scratch
        self._lanes: dict[str, str] = {}
        self._metrics = registry = CollectorRegistry()
        meter_store(plane.store, registry, "bathyscope_worker")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"bathyscope_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"bathyscope_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: Iterable[float] = LONG_SECONDS) -> Histogram:
            return Histogram(f"bathyscope_{name}", text, labels, buckets=tuple(buckets), registry=registry)

        self._running = gauge("running_jobs", "Jobs in work.", "lane")
        self._queue = histogram("job_queue_seconds", "Time from a job's queuing to its first attempt.", "kind")
        self._total = histogram("job_seconds", "Time from a job's queuing to its success.", "kind")
        self._attempts = counter("attempts", "Attempts that ended.", "kind", "outcome")
        self._losses = counter("lease_losses", "Jobs that went to another worker while this one had them.")
        self._rows = histogram("batch_rows", "Texts of a forward pass.", buckets=_ROWS)
        self._tokens = counter("forward_tokens", "Tokens of texts that went through a model.", "lane")
        self._padded = counter("forward_padded_tokens", "The same with the padding of their batches.", "lane")
        self._seconds = counter("forward_seconds", "Time of forward passes.", "lane")
        self._cache_rows = counter("cache_rows", "Rows of requests, by whether they had to be computed.", "outcome")
        self._cache_evicted = counter("cache_evicted_rows", "Rows that made room for others.")
        self._cache_bytes = gauge("cache_bytes", "Bytes of the cache of rows that are in use.")
        self._loads = histogram("model_load_seconds", "Time to make a model resident.")
        self._swaps = histogram("model_swap_seconds", "The same where another model was evicted for it.")
        self._load_failures = counter("model_load_failures", "Loads that failed.")
        self._unloads = counter("model_unloads", "Models that gave their memory back.", "reason")
        self._ends = counter("engine_ends", "Engines that ended unasked.", "engine", "cause")
        self._up = gauge("engine_up", "Whether the engine runs.", "engine")
        self._scratch_bytes = gauge("scratch_bytes", "Disk space of results in the making.")
        self._free = gauge("worker_disk_free_bytes", "Free bytes of a folder's disk.", "folder")
        self._size = gauge("worker_disk_size_bytes", "Size of a folder's disk.", "folder")
        self._memory = gauge("worker_memory_bytes", "Resident memory of a process of the worker.", "process")
        self._files = gauge("worker_open_fds", "Open files of a process of the worker.", "process")
        for reason in ("asked", "evicted"):
            self._unloads.labels(reason)
        for name in ("model", "cpu", "fetch"):
            for cause in ("died", "hung", "device"):
                self._ends.labels(name, cause)  # alerts look at the rise, which begins at 0

    # --- what happens -------------------------------------------------------------------------------------

    async def watch(self, attempt: Attempt, work: Awaitable[None]) -> None:
        """Do the work of an attempt: its names in every line of the log, a span, and the count of how it ended."""
        lease = attempt.lease
        start = lease.started_at / 1000
        names: dict[str, Any] = {"job": lease.job_id, "kind": lease.kind, "lane": lease.lane, "attempt": lease.attempt}
        tracing = self._plane.tracing
        if lease.trace is not None:
            queued = tracing.span("queue", parent=lease.trace, start=lease.enqueued_at / 1000, **names)
            queued.end(max(start, lease.enqueued_at / 1000))  # a split job began before it was ready to be joined
        if lease.attempt == 1 and not lease.solo:
            self._queue.labels(lease.kind).observe(max(0.0, start - lease.created_at / 1000))
        attempt.span = tracing.span(
            "attempt",
            parent=lease.trace,
            **names,
            key=lease.owner,
            worker=lease.ref.worker,
            solo=lease.solo,
        )
        try:
            with bound_contextvars(**attempt.names):
                await work
        finally:
            self._attempts.labels(lease.kind, attempt.ended).inc()
            if attempt.ended == "succeeded":
                self._total.labels(lease.kind).observe(max(0.0, time.time() - lease.created_at / 1000))
            elif attempt.ended != "moved":
                attempt.span.fail(attempt.ended)
            if attempt.ended == "lost":
                self._losses.inc()
            attempt.span.set(outcome=attempt.ended)
            attempt.span.end()

    def hear(self, event: dict[str, Any]) -> None:
        """An event of an engine."""
        match event["ev"]:
            case "beat":
                for resident, rows, tokens, padded, seconds in event.get("batches", ()):
                    lane = self._lane(f"model:{resident}")
                    self._rows.observe(rows)
                    self._tokens.labels(lane).inc(tokens)
                    self._padded.labels(lane).inc(padded)
                    self._seconds.labels(lane).inc(seconds)
                if (cache := event.get("cache")) is not None:
                    for outcome, name in (("hit", "hits"), ("duplicate", "duplicates"), ("miss", "misses")):
                        self._cache_rows.labels(outcome).inc(cache[name])
                    self._cache_evicted.inc(cache["evicted"])
                    self._cache_bytes.set(cache["bytes"])
            case "loaded" if "seconds" in event:
                (self._swaps if event.get("swapped") else self._loads).observe(event["seconds"])
            case "load_failed":
                self._load_failures.inc()
            case "unloaded" if event["reason"] != "missing":
                self._unloads.labels(event["reason"]).inc()

    def engine_ended(self, kind: str, code: int, *, hung: bool) -> None:
        """An engine ended unasked."""
        cause = "hung" if hung else "device" if code == EXIT_DEVICE_FAULT else "died"
        self._ends.labels(kind, cause).inc()

    def _lane(self, lane: str) -> str:
        if lane not in self._lanes:
            self._lanes[lane] = lane if len(self._lanes) < _LANES else OTHERS
            if len(self._lanes) > 16 * _LANES:
                del self._lanes[lane]
                return OTHERS
        return self._lanes[lane]

    # --- what is told -------------------------------------------------------------------------------------

    def samples(self, slots: Iterable[Slot]) -> list[Any]:
        """All numbers, for the heartbeat."""
        self._running.clear()
        running = Count(base_lane(attempt.lease.lane) for slot in slots for attempt in slot.attempts.values())
        for lane, count in running.items():
            self._running.labels(lane).set(count)
        for slot in slots:
            self._up.labels(slot.kind).set(slot.pid is not None)
        return dump(self._metrics)

    async def look(self, slots: Iterable[Slot]) -> None:
        """Look at disks and processes."""
        processes = {"supervisor": None} | {f"{slot.kind}-engine": slot.pid for slot in slots if slot.pid is not None}
        await asyncio.to_thread(self._look, processes)

    def _look(self, processes: dict[str, int | None]) -> None:
        self._memory.clear()
        self._files.clear()
        for name, pid in processes.items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                self._memory.labels(name).set(process.memory_info().rss)
                self._files.labels(name).set(process.num_fds())
        for name, folder in folders(self._plane.settings.data_dir, self._plane.store).items():
            with contextlib.suppress(OSError):
                free, size = disk_bytes(folder)
                self._free.labels(name).set(free)
                self._size.labels(name).set(size)
        self._scratch_bytes.set(_bytes_below(self._scratch))


def _bytes_below(folder: Path) -> int:
    """Bytes on disk: files are laid out in full before they are filled."""
    total = 0
    for home, _, names in os.walk(folder):  # unlike rglob, not disturbed by folders that vanish meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(home, name)).st_blocks * 512
    return total


def trace_stages(span: Span, event: dict[str, Any]) -> None:
    """The engine's part of an attempt as spans: when each stage began and ended."""
    timings = event.get("timings", {})
    result = event.get("result", {})
    tokens = result.get("tokens", {})
    more: dict[str, dict[str, Any]] = {
        "forward": {
            "busy_seconds": timings.get("inference"),
            "rows": result.get("inputs"),
            "tokens": tokens.get("total"),
            "padded_tokens": tokens.get("computed"),
        },
        "tokenise": {"busy_seconds": timings.get("tokenise")},
    }
    for stage, (start, end) in event.get("stages", {}).items():
        span.record(stage, start, end, **more.get(stage, {}))
