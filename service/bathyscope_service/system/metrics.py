"""`/metrics`: what this front end counted, and what Redis knows of queues and workers at the moment of asking.

Whatever does not answer in time is left out, and `bathyscope_redis_up` and `bathyscope_store_up` say so: the answer is
never an error. What Redis knows is the same whichever front end is asked, so sums over front ends count it twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bathyscope_backplane.broker import BrokerStats, LaneStats
from bathyscope_backplane.meters import OTHERS, disk_bytes, folders, gather, own
from bathyscope_backplane.registry import ModelRegistry
from bathyscope_service.context import Context

T = TypeVar("T")

_SECONDS = 3.0
"""How long a part is waited for."""

_LANES = 500
"""Lanes that are told apart, those with most jobs: where every hub model may be asked for there is no end of them."""


@dataclass(slots=True)
class Found:
    """What the parts answered; null of what did not."""

    stats: BrokerStats | None = None
    workers: dict[str, dict[str, Any]] | None = None
    memory: dict[str, int] = field(default_factory=dict)
    """Redis' memory, `used` and, when there is a bound, `max`."""
    store_up: bool = False


async def metrics(context: Context) -> tuple[bytes, str]:
    """The exposition text and its media type."""
    plane = context.plane
    stats, workers, memory, store = await asyncio.gather(
        soon(plane.broker.stats()),
        soon(plane.workers.alive()),
        soon(_redis_memory(plane.redis)),
        soon(plane.space.store_answers()),
    )
    found = Found(stats, workers, memory or {}, store is True)
    content = await asyncio.to_thread(generate_latest, _Snapshot(context, found, list(_places(context))))
    return content, CONTENT_TYPE_LATEST


async def soon(part: Awaitable[T]) -> T | None:
    """The answer of a part, null when it gives none in time."""
    try:
        async with asyncio.timeout(_SECONDS):
            return await part
    except Exception:
        return None


async def _redis_memory(redis: Any) -> dict[str, int]:
    """Bytes of all servers that hold data."""
    info = await redis.info("memory")
    servers = [info] if "used_memory" in info else list(info.values())  # of a cluster: by node
    most = [int(server.get("maxmemory", 0)) for server in servers]
    return {"used": sum(int(server["used_memory"]) for server in servers)} | ({"max": sum(most)} if all(most) else {})


class _Snapshot(Collector):
    def __init__(self, context: Context, found: Found, places: list[Metric]) -> None:
        self._context = context
        self._found = found
        self._places = places

    def collect(self) -> Iterator[Metric]:
        """Every metric with its present value."""
        yield from own(self._context.meters.registry)
        yield from self._places
        plane = self._context.plane
        yield from _disks(folders(plane.settings.data_dir, plane.store))
        found = self._found
        up = found.stats is not None and found.workers is not None
        yield GaugeMetricFamily("bathyscope_redis_up", "Whether Redis answered.", value=up)
        yield GaugeMetricFamily("bathyscope_store_up", "Whether the artifact store answered.", value=found.store_up)
        for name, text in (("used", "Memory that Redis uses."), ("max", "Memory that Redis may use.")):
            if name in found.memory:
                yield GaugeMetricFamily(f"bathyscope_redis_memory_{name}_bytes", text, value=found.memory[name])
        if found.stats is not None:
            yield from _lanes(found.stats.lanes, _lanes_on_offer(plane.registry))
            yield from _jobs(found.stats)
        if found.workers is not None:
            yield from _workers(found.workers)
            yield from gather({name: info.get("metrics", []) for name, info in found.workers.items()})


def _places(context: Context) -> Iterator[Metric]:
    for name, text, places in (
        ("waiting_requests", "Requests that wait for a job", context.waiting),
        ("event_streams", "Event streams that are open", context.streams),
    ):
        yield GaugeMetricFamily(f"bathyscope_{name}", f"{text}.", value=places.taken.total())
        yield GaugeMetricFamily(f"bathyscope_{name}_limit", f"{text}, at most.", value=places.total)


def _disks(watched: Mapping[str, Path]) -> Iterator[Metric]:
    free = GaugeMetricFamily("bathyscope_disk_free_bytes", "Free bytes of a folder's disk.", labels=["folder"])
    size = GaugeMetricFamily("bathyscope_disk_size_bytes", "Size of a folder's disk.", labels=["folder"])
    for name, folder in watched.items():
        try:
            left, total = disk_bytes(folder)
        except OSError:
            continue
        free.add_metric([name], left)
        size.add_metric([name], total)
    yield free
    yield size


def _lanes_on_offer(registry: ModelRegistry) -> list[str]:
    """The lanes of the models that are listed: they are shown when they are empty too, for scalers and alerts."""
    return ["cpu"] + [
        f"model:{entry.name}:{quantization}:{entry.compute_dtype}"
        for entry in map(registry.get, registry.names())
        for quantization in entry.quantizations
    ]


def _lanes(lanes: Iterable[LaneStats], on_offer: Iterable[str]) -> Iterator[Metric]:
    depth = GaugeMetricFamily("bathyscope_lane_depth", "Jobs ready to be served.", labels=["lane"])
    oldest = GaugeMetricFamily(
        "bathyscope_lane_oldest_seconds", "Age of the job that has been ready longest.", labels=["lane"]
    )
    present = sorted(lanes, key=lambda lane: lane.depth, reverse=True)
    for lane in present[:_LANES]:
        depth.add_metric([lane.lane], lane.depth)
        oldest.add_metric([lane.lane], lane.oldest_age_ms / 1000)
    if rest := present[_LANES:]:
        depth.add_metric([OTHERS], sum(lane.depth for lane in rest))
        oldest.add_metric([OTHERS], max(lane.oldest_age_ms for lane in rest) / 1000)
    shown = {lane.lane for lane in present}
    for name in dict.fromkeys(on_offer):
        if name not in shown and len(depth.samples) <= _LANES:
            depth.add_metric([name], 0)
            oldest.add_metric([name], 0)
    yield depth
    yield oldest


def _jobs(stats: BrokerStats) -> Iterator[Metric]:
    jobs = GaugeMetricFamily("bathyscope_jobs", "Jobs that can be read now.", labels=["status"])
    for status, count in stats.jobs.items():
        jobs.add_metric([status], count)
    yield jobs
    ended = CounterMetricFamily("bathyscope_jobs_ended", "Jobs that ended.", labels=["kind", "status"])
    for (kind, status), count in stats.ended.items():
        ended.add_metric([kind, status], count)
    yield ended
    requeued = CounterMetricFamily(
        "bathyscope_jobs_requeued", "Jobs put back into their queue after they were taken.", labels=["reason"]
    )
    for reason, count in stats.requeued.items():
        requeued.add_metric([reason], count)
    yield requeued
    for name, text, value in (
        ("delayed", "Jobs that wait for their next attempt.", stats.delayed),
        ("waiting", "Jobs that wait for other jobs.", stats.waiting),
        ("leases", "Jobs held by workers.", stats.leases),
        ("dead_letters", "Failed jobs that can be replayed.", stats.dead_letters),
    ):
        yield GaugeMetricFamily(f"bathyscope_{name}", text, value=value)


def _workers(workers: Mapping[str, dict[str, Any]]) -> Iterator[Metric]:
    yield GaugeMetricFamily("bathyscope_workers", "Workers alive.", value=len(workers))
    draining = sum(1 for info in workers.values() if info.get("draining"))
    yield GaugeMetricFamily("bathyscope_workers_draining", "Workers that end and take no more jobs.", value=draining)
    resident = GaugeMetricFamily(
        "bathyscope_resident_bytes",
        "Memory of a resident model.",
        labels=["worker", "model", "quantization", "compute_dtype"],
    )
    limit = GaugeMetricFamily(
        "bathyscope_resident_limit_bytes", "Memory that resident models may take.", labels=["worker"]
    )
    loading = GaugeMetricFamily("bathyscope_models_loading", "Models being loaded.", labels=["worker"])
    for worker, info in workers.items():
        residents = info.get("residents", [])
        for one in residents:
            if one.get("state") != "loading":
                labels = [worker, one["model"], one["quantization"], one["compute_dtype"]]
                resident.add_metric(labels, one.get("memory_bytes") or 0)
        loading.add_metric([worker], sum(1 for one in residents if one.get("state") == "loading"))
        if info.get("memory_limit_bytes"):
            limit.add_metric([worker], info["memory_limit_bytes"])
    yield resident
    yield limit
    yield loading
