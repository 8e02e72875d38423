"""What front ends and workers share of metrics: the store's timings, and samples that travel.

A worker opens no port. Its samples go into its heartbeat (`dump`), and whichever front end is asked renders them with
the worker's name as a label (`gather`). Labels are bounded: kinds, lanes, models of the operator's list, never an id.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from bathyscope_backplane.artifacts import ArtifactStore

SHORT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets of requests and of calls to the store."""

LONG_SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Buckets of jobs and loads."""

OTHERS = "(others)"
"""The label of all that go beyond a bound."""


def meter_store(store: ArtifactStore, registry: CollectorRegistry, prefix: str) -> None:
    """Count the calls of a store and their seconds in `registry`."""
    seconds = Histogram(
        f"{prefix}_store_seconds",
        "Time of calls to the artifact store.",
        ["operation"],
        buckets=SHORT_SECONDS,
        registry=registry,
    )
    failures = Counter(
        f"{prefix}_store_failures", "Calls to the artifact store that failed.", ["operation"], registry=registry
    )

    def watch(operation: str, took: float, failed: bool) -> None:
        seconds.labels(operation).observe(took)
        if failed:
            failures.labels(operation).inc()

    store.watch = watch


def own(collector: Collector) -> Iterator[Metric]:
    """The metrics of a registry without the times at which its counters were made."""
    for family in collector.collect():
        family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        yield family


def dump(registry: CollectorRegistry) -> list[Any]:
    """A registry as JSON: `[name, help, type, [[suffix, labels, value], …]]` of each metric."""
    return [
        [
            family.name,
            family.documentation,
            family.type,
            [[one.name.removeprefix(family.name), one.labels, one.value] for one in family.samples],
        ]
        for family in own(registry)
    ]


def gather(dumps: Mapping[str, list[Any]]) -> Iterator[Metric]:
    """The metrics of several workers, by name, each sample with the label `worker`.

    Two versions of a worker may live at a time: of a metric that they describe differently the first is kept.
    """
    families: dict[str, Metric] = {}
    for worker, metrics in dumps.items():
        for name, text, kind, samples in metrics:
            family = families.setdefault(name, Metric(name, text, kind))
            if family.type == kind:
                for suffix, labels, value in samples:
                    family.add_sample(name + suffix, {"worker": worker, **labels}, value)
    yield from families.values()


def folders(data_dir: Path, store: ArtifactStore) -> dict[str, Path]:
    """The folders whose disks fill up: the data folder, and the store's when it is one."""
    return {"data": data_dir} | ({"store": store.folder} if store.folder is not None else {})


def disk_bytes(folder: Path) -> tuple[int, int]:
    """Free bytes, as far as this user may write, and all bytes of a folder's disk. Raises OSError."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
