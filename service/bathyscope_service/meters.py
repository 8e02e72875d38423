"""What one front end counts of its own doing. The rest of `/metrics` is read from Redis when it is asked for."""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import CollectorRegistry

from bathyscope_backplane.meters import SHORT_SECONDS


class Meters:
    """Counters of a front end, and the registry in which other parts of it may make theirs."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Gauge(
            "bathyscope_build_info", "Version of the front end; always 1.", ["version"], registry=self.registry
        ).labels(version("bathyscope")).set(1)
        self.requests = Counter(
            "bathyscope_http_requests",
            "Requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "bathyscope_http_request_seconds",
            "Time until a request was answered to its end, waits for a job included.",
            ["route"],
            buckets=SHORT_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("bathyscope_http_requests_in_flight", "Requests being answered.", registry=self.registry)
