"""Traces of a real installation, received as a collector receives them: by OTLP over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from bathyscope.errors import SetupError
from bathyscope_backplane.settings import TracingSettings, load_settings
from bathyscope_backplane.tracing import NOTHING, OFF, open_tracing, trace_of
from tests.faults.test_kills import BODY, until_halfway
from tests.stack import Stack, free_port, stack

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
MARKER = "MARKER-of-the-trace"


@dataclass
class Received:
    """One span."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]


@dataclass
class Collector:
    """The spans of everyone who sent some."""

    port: int
    spans: list[Received] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Received(
                            names["service.name"],
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            span.status.code == Status.STATUS_CODE_ERROR,
                            {
                                one.key: getattr(one.value, str(one.value.WhichOneof("value")))
                                for one in span.attributes
                            },
                        )
                    )

    def of(self, trace: str, *wanted: str) -> dict[str, list[Received]]:
        """The spans of a trace by name, when all of those wanted have come."""
        deadline = time.monotonic() + 20
        while True:
            found: dict[str, list[Received]] = defaultdict(list)
            for span in list(self.spans):
                if span.trace == trace:
                    found[span.name].append(span)
            if all(len(found[name]) >= wanted.count(name) for name in wanted):
                return found
            assert time.monotonic() < deadline, (wanted, {name: len(spans) for name, spans in found.items()})
            time.sleep(0.1)


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                collector.take(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(
        tmp_path_factory.mktemp("traced"),
        models=models,
        worker__adopt_seconds=0,
        tracing__otlp_endpoint=f"http://127.0.0.1:{collector.port}",
    ) as running:
        yield running


def extraction(inputs: list[str]) -> dict[str, Any]:
    return {"model": "tiny", "inputs": inputs, "layers": "all", "metadata": {"note": MARKER}}


def below(parent: Received, *spans: Received) -> bool:
    return all(span.parent == parent.id and span.trace == parent.trace for span in spans)


def test_one_trace_from_the_caller_to_the_engine(traced: Stack, collector: Collector) -> None:
    answer = traced.post("/v1/extractions", extraction([MARKER]), traceparent=f"00-{TRACE}-{PARENT}-01")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-request-id"] == TRACE
    wanted = ("queue", "attempt", "load", "tokenise", "forward", "upload", "commit")
    spans = collector.of(TRACE, "POST /v1/extractions", "submit", *wanted)
    [request], [submit] = spans["POST /v1/extractions"], spans["submit"]
    queue, attempt, load, tokenise, forward, upload, commit = (spans[name][0] for name in wanted)
    assert request.parent == PARENT
    assert below(request, submit)
    assert below(submit, queue, attempt)
    assert below(attempt, load, tokenise, forward, upload, commit)
    assert sum(map(len, spans.values())) == 9
    assert {span.service for span in (request, submit)} == {"bathyscope-service"}
    assert {span.service for span in (queue, attempt, forward, commit)} == {"bathyscope-worker"}
    assert queue.end <= attempt.end
    assert submit.start <= load.start <= tokenise.start <= forward.start <= forward.end <= commit.end <= attempt.end
    job = answer.json()
    assert request.attributes["http.response.status_code"] == 200
    assert submit.attributes["bathyscope.job"] == attempt.attributes["bathyscope.job"] == job["id"]
    assert (submit.attributes["bathyscope.rows"], forward.attributes["bathyscope.rows"]) == (1, 1)
    assert forward.attributes["bathyscope.tokens"] > 1
    assert attempt.attributes["bathyscope.outcome"] == "succeeded"
    assert not any(span.failed for span in collector.spans if span.trace == TRACE)
    assert not any(MARKER.encode() in body for body in collector.bodies)


def test_a_killed_engine_gives_two_attempts_of_one_trace(traced: Stack, collector: Collector) -> None:
    trace = "aaaabbbbccccddddaaaabbbbccccdddd"
    answer = traced.post("/v1/extractions", BODY, wait=0, traceparent=f"00-{trace}-{PARENT}-01")
    job_id = answer.json()["id"]
    until_halfway(traced, job_id)
    [engine] = traced.engines()
    os.kill(engine, signal.SIGKILL)
    assert traced.job(job_id)["attempt"] == 2
    spans = collector.of(trace, "submit", "queue", "queue", "attempt", "attempt", "forward", "commit")
    [submit] = spans["submit"]
    first, second = sorted(spans["attempt"], key=lambda span: span.start)
    assert below(submit, first, second, *spans["queue"])
    assert [span.attributes["bathyscope.attempt"] for span in (first, second)] == [1, 2]
    assert [span.failed for span in (first, second)] == [True, False]
    assert first.attributes["bathyscope.outcome"] == "engine_died_alone"
    assert below(second, *spans["forward"], *spans["commit"])
    assert first.end <= second.start


def test_each_request_begins_a_trace_of_its_own(traced: Stack, collector: Collector) -> None:
    before = {span.trace for span in collector.spans}
    answer = traced.client.get("/v1/whoami", headers={"traceparent": "00-nonsense-01"})
    assert answer.status_code == 200
    traced.client.get("/healthz")
    deadline = time.monotonic() + 20
    while not (found := [one for one in collector.spans if one.name == "GET /v1/whoami" and one.trace not in before]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert found[0].parent == ""
    assert not any("healthz" in one.name for one in collector.spans)


def test_a_collector_that_is_not_there_disturbs_nothing(tmp_path: Path, models: str) -> None:
    with stack(
        tmp_path,
        models=models,
        worker__adopt_seconds=0,
        tracing__otlp_endpoint=f"http://127.0.0.1:{free_port()}",
    ) as running:
        assert running.extract(["alone"], model="tiny", layers=[1])["inputs"] == 1
        for name, process in list(running.processes.items()):
            process.terminate()
            assert process.wait(30) == 0, name


def test_off_imports_nothing(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from bathyscope_backplane.plane import open_backplane\n"
        "from bathyscope_backplane.settings import load_settings\n"
        "import bathyscope_service.app, bathyscope_workers.supervisor\n"
        "async def main():\n"
        "    async with open_backplane(load_settings(redis_url='redis://127.0.0.1:1'), traced_as='service') as plane:\n"
        "        with plane.tracing.span('a', parent=None).child('b') as span: span.set(job='x')\n"
        "        assert span.carrier is None\n"
        "asyncio.run(main())\n"
        "ours = ('opentelemetry.exporter', 'opentelemetry.sdk.trace')\n"  # redis-py imports others by itself
        "assert not [name for name in sys.modules if name.startswith(ours)]\n"
    )
    environment = {**os.environ, "BATHYSCOPE_DATA_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_an_endpoint_without_the_packages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SetupError, match=r"pip install 'bathyscope\[tracing\]'"):
        open_tracing(TracingSettings(otlp_endpoint="http://localhost:4318"), "service")
    assert open_tracing(TracingSettings(), "service") is OFF
    assert OFF.span("x", parent=None) is NOTHING


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(SetupError, match=r"tracing\.otlp_endpoint"):
        load_settings(tracing={"otlp_endpoint": "collector:4318"})


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        f"00-{TRACE}-{PARENT}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n",
    ],
)
def test_what_is_no_traceparent(given: str | None) -> None:
    assert trace_of(given) is None


def test_what_is_a_traceparent() -> None:
    assert trace_of(f"00-{TRACE}-{PARENT}-00") == TRACE
    assert trace_of(f"01-{TRACE}-{PARENT}-00-later") == TRACE
