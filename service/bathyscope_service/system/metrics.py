"""Prometheus metrics, made when asked for from what Redis knows: the same whichever front end is asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bathyscope_backplane.broker import BrokerStats


def render(stats: BrokerStats, workers: dict[str, dict[str, Any]]) -> tuple[bytes, str]:
    """The exposition text and its media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats, workers))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Snapshot(Collector):
    def __init__(self, stats: BrokerStats, workers: dict[str, dict[str, Any]]) -> None:
        self._stats = stats
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """Every metric with its present value."""
        depth = GaugeMetricFamily("bathyscope_lane_depth", "Jobs ready to be served.", labels=["lane"])
        oldest = GaugeMetricFamily(
            "bathyscope_lane_oldest_seconds", "Age of the job that has been ready longest.", labels=["lane"]
        )
        for lane in self._stats.lanes:
            depth.add_metric([lane.lane], lane.depth)
            oldest.add_metric([lane.lane], lane.oldest_age_ms / 1000)
        yield depth
        yield oldest
        jobs = GaugeMetricFamily("bathyscope_jobs", "Jobs that can be read now.", labels=["status"])
        for status, count in self._stats.jobs.items():
            jobs.add_metric([status], count)
        yield jobs
        ended = CounterMetricFamily("bathyscope_jobs_ended", "Jobs that ended.", labels=["kind", "status"])
        for (kind, status), count in self._stats.ended.items():
            ended.add_metric([kind, status], count)
        yield ended
        for name, text, value in (
            ("delayed", "Jobs that wait for their next attempt.", self._stats.delayed),
            ("waiting", "Jobs that wait for other jobs.", self._stats.waiting),
            ("leases", "Jobs held by workers.", self._stats.leases),
            ("dead_letters", "Failed jobs that can be replayed.", self._stats.dead_letters),
        ):
            yield GaugeMetricFamily(f"bathyscope_{name}", text, value=value)
        yield GaugeMetricFamily("bathyscope_workers", "Workers alive.", value=len(self._workers))
        memory = GaugeMetricFamily(
            "bathyscope_resident_bytes",
            "Memory of a resident model.",
            labels=["worker", "model", "quantization", "compute_dtype"],
        )
        for worker, info in self._workers.items():
            for resident in info.get("residents", []):
                labels = [worker, resident["model"], resident["quantization"], resident["compute_dtype"]]
                memory.add_metric(labels, resident.get("memory_bytes") or 0)
        yield memory
