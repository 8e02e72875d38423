"""`/metrics` as Prometheus reads it: of a real installation at work, and of a front end that is all by itself."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import promql_parser
import pytest
import yaml
from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from redis import Redis

from bathyscope_backplane.broker import LaneStats
from bathyscope_backplane.meters import OTHERS, dump, gather
from bathyscope_service.system.metrics import _LANES, _lanes
from tests.faults.test_kills import BODY, until_halfway
from tests.service.test_keys import make_key
from tests.stack import Stack

ROOT = Path(__file__).parents[2]
SHORT = [f"short {letter}" for letter in "abcdefghij"]
LONG = [f"rather longer {letter}, and so the others are padded" for letter in "abcdefghij"]


def families(text: str) -> dict[str, Metric]:
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found), "each metric stands together"
    return {family.name: family for family in found}


def metrics(stack: Stack, **headers: str) -> dict[str, Metric]:
    answer = stack.client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return families(answer.text)


def value(found: dict[str, Metric], name: str, **labels: str) -> float:
    """The sum of the samples of that name whose labels are these, others aside."""
    family = next((one for one in found.values() if any(sample.name == name for sample in one.samples)), None)
    if family is None:
        return 0.0
    return sum(
        sample.value for sample in family.samples if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.fixture(scope="module")
def worked(live: Stack) -> tuple[dict[str, Metric], dict[str, Metric]]:
    """The numbers before and after an extraction of twenty texts of two lengths, a probe and a refused request."""
    live.extract(["before"], model="tiny", layers=[1])
    before = settled(live, 0)
    extraction = live.extract(SHORT + LONG, model="tiny", layers=[1])
    job = live.post("/v1/probes", {"extraction": extraction["id"], "labels": [0, 1] * 10, "bootstrap": 10}).json()
    ended = live.job(job["id"])
    assert ended["status"] == "succeeded", ended
    assert live.client.get("/v1/jobs/job_nothing").status_code == 404
    return before, settled(live, 1 + value(before, "bathyscope_attempts_total", kind="probe"))


def settled(live: Stack, probes: float) -> dict[str, Metric]:
    """The numbers when the worker's heartbeat brought those of so many probes and of all that came before."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = metrics(live)
        attempts = value(found, "bathyscope_attempts_total", kind="extraction", outcome="succeeded")
        ended = value(found, "bathyscope_jobs_ended_total", kind="extraction", status="succeeded")
        if attempts >= ended and value(found, "bathyscope_attempts_total", kind="probe") >= probes:
            return found
        time.sleep(0.2)
    raise TimeoutError


def test_the_engine_tells_batches_tokens_and_padding(worked: tuple[dict[str, Metric], dict[str, Metric]]) -> None:
    before, after = worked

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    lane = "model:tiny:none:float32"
    tokens = grown("bathyscope_forward_tokens_total", lane=lane)
    padded = grown("bathyscope_forward_padded_tokens_total", lane=lane)
    assert 20 <= tokens <= sum(map(len, SHORT + LONG))  # a token is a byte at least
    assert tokens <= padded <= 20 * len(LONG[0])
    assert grown("bathyscope_batch_rows_sum") == 20
    assert 1 <= grown("bathyscope_batch_rows_count") <= 20
    assert grown("bathyscope_forward_seconds_total", lane=lane) > 0


def test_jobs_are_counted_once(worked: tuple[dict[str, Metric], dict[str, Metric]]) -> None:
    before, after = worked
    for kind in ("extraction", "probe"):
        for name, labels in (
            ("bathyscope_jobs_ended_total", {"kind": kind, "status": "succeeded"}),
            ("bathyscope_attempts_total", {"kind": kind, "outcome": "succeeded"}),
            ("bathyscope_job_queue_seconds_count", {"kind": kind}),
            ("bathyscope_job_seconds_count", {"kind": kind}),
        ):
            assert value(after, name, **labels) - value(before, name, **labels) == 1, name


def test_requests_are_counted_by_route_template(worked: tuple[dict[str, Metric], dict[str, Metric]]) -> None:
    before, after = worked
    labels = {"method": "GET", "route": "/v1/jobs/{job_id}", "status": "404"}
    grown = value(after, "bathyscope_http_requests_total", **labels) - value(
        before, "bathyscope_http_requests_total", **labels
    )
    assert grown == 1
    routes = {sample.labels["route"] for sample in after["bathyscope_http_requests"].samples}
    assert not any("job_" in route.replace("{job_id}", "") or "ext_" in route for route in routes)
    assert value(after, "bathyscope_http_request_seconds_count", route="/v1/probes") >= 1


def test_residency_disks_memory_and_places(worked: tuple[dict[str, Metric], dict[str, Metric]]) -> None:
    _, after = worked
    assert value(after, "bathyscope_resident_bytes", model="tiny", quantization="none", compute_dtype="float32") > 0
    assert value(after, "bathyscope_resident_limit_bytes") > 0
    assert value(after, "bathyscope_model_load_seconds_count") >= 1
    for folder in ("data", "store"):
        for prefix in ("bathyscope", "bathyscope_worker"):
            free = value(after, f"{prefix}_disk_free_bytes", folder=folder)
            assert 0 < free <= value(after, f"{prefix}_disk_size_bytes", folder=folder)
    for process in ("supervisor", "model-engine", "cpu-engine", "fetch-engine"):
        assert value(after, "bathyscope_worker_memory_bytes", process=process) > 2**20
    assert value(after, "bathyscope_redis_memory_used_bytes") > 0
    assert value(after, "bathyscope_waiting_requests_limit") == 256
    assert (value(after, "bathyscope_redis_up"), value(after, "bathyscope_store_up")) == (1, 1)
    assert (value(after, "bathyscope_workers"), value(after, "bathyscope_engine_up")) == (1, 3)
    assert value(after, "bathyscope_worker_store_seconds_count", operation="commit") >= 2
    assert value(after, "bathyscope_store_seconds_count") >= 1
    idle = [sample for sample in after["bathyscope_lane_depth"].samples if sample.labels["lane"] == "cpu"]
    assert [sample.value for sample in idle] == [0.0], "empty lanes are shown too: a scaler needs the zero"


# --- as promtool's `check metrics` and Prometheus' naming conventions have it --------------------------------

_OTHER_UNITS = re.compile(r"_(milliseconds|ms|minutes|hours|days|kilobytes|megabytes|kb|mb|percent|mib|gib)(_|$)")
_KINDS_IN_NAMES = re.compile(r"_(gauge|counter|histogram|summary|metric)(_|$)")
_RESERVED = ("_count", "_sum", "_bucket", "_total", "_created", "_info")
_LABELS = {
    "cause", "compute_dtype", "engine", "folder", "kind", "lane", "le", "method", "model", "operation", "outcome",
    "process", "quantization", "reason", "route", "status", "version", "worker",
}  # fmt: skip


def faults(family: Metric) -> Iterator[str]:
    if not re.fullmatch(r"(bathyscope|process)_[a-z0-9_]+", family.name):
        yield "is not in snake case below bathyscope_"
    if len(family.documentation) < 10 or not family.documentation.endswith("."):
        yield "has no help"
    if family.type not in ("counter", "gauge", "histogram"):
        yield f"is of type {family.type}"
    if found := _OTHER_UNITS.search(family.name):
        yield f"is in {found[1]}, not in a base unit"
    if found := _KINDS_IN_NAMES.search(family.name):
        yield f"names its type, {found[1]}"
    if family.type == "gauge" and family.name.endswith(_RESERVED) and not family.name.endswith("_build_info"):
        yield "has a suffix that is reserved"
    for sample in family.samples:
        if family.type == "counter" and not sample.name.endswith("_total"):
            yield f"is a counter with the sample {sample.name}"
        if family.type == "counter" and sample.value < 0:
            yield "is a counter below 0"
        if family.type != "histogram" and "le" in sample.labels:
            yield "has the label le"
        if unknown := set(sample.labels) - _LABELS:
            yield f"has the labels {unknown}; are their values bounded?"
        if any(re.search(r"(job|ext|prb|prd|key)_[0-9a-z]{20}", text) for text in sample.labels.values()):
            yield f"has an id as a label: {sample.labels}"
    if len({(sample.name, *sorted(sample.labels.items())) for sample in family.samples}) != len(family.samples):
        yield "has a sample twice"


def test_names_follow_the_conventions(worked: tuple[dict[str, Metric], dict[str, Metric]]) -> None:
    found = [
        f"{family.name} {fault}"
        for family in worked[1].values()
        if not family.name.startswith("process_")
        for fault in faults(family)
    ]
    assert found == []


def test_the_lint_finds_what_is_wrong() -> None:
    text = '# HELP bathyscope_wait_ms A wait.\n# TYPE bathyscope_wait_ms gauge\nbathyscope_wait_ms{user="x"} 1\n'
    [family] = text_string_to_metric_families(text)
    assert len(list(faults(family))) == 3


def test_every_metric_of_the_example_alerts_and_of_the_manual_exists(
    worked: tuple[dict[str, Metric], dict[str, Metric]],
) -> None:
    known = {sample.name for family in worked[1].values() for sample in family.samples}
    known |= {f"{name}_total" if family.type == "counter" else name for name, family in worked[1].items()}
    known |= {"bathyscope_redis_memory_max_bytes"}  # there when Redis has a bound: the test below
    rules = yaml.safe_load((ROOT / "docs" / "alerts.yml").read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 10
    for rule in rules:
        named = set(re.findall(r"bathyscope_[a-z0-9_]+", rule["expr"]))
        assert named, rule
        assert named <= known, (rule["alert"], named - known)
        assert rule["annotations"]["summary"]
        promql_parser.parse(rule["expr"])
    manual = (ROOT / "docs" / "operating.md").read_text()
    named = set(re.findall(r"`(bathyscope_[a-z0-9_]+)`", manual))
    assert named
    assert named <= known | {name.rpartition("_")[0] for name in known}, named - known


# --- a front end by itself -----------------------------------------------------------------------------------


def test_without_redis_the_rest_is_served_to_who_was_known(tmp_path: Path, models: str) -> None:
    made = Stack(tmp_path, models=models)
    try:
        made.up(workers=0)
        key = make_key(made, "prometheus", "--scope", "metrics")
        late = make_key(made, "late", "--scope", "metrics")
        headers = {"Authorization": f"Bearer {key}"}
        assert value(metrics(made, **headers), "bathyscope_redis_up") == 1
        pid = made.valkey.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # hears and does not answer, which is worse than gone
        found = metrics(made, **headers)
        os.kill(pid, signal.SIGKILL)
        assert value(metrics(made, **headers), "bathyscope_redis_up") == 0
        for stranger in (late, "bsk_" + "0" * 43):
            answer = made.client.get("/metrics", headers={"Authorization": f"Bearer {stranger}"})
            assert answer.status_code == 503
        assert made.client.get("/v1/whoami", headers=headers).status_code == 503
        assert value(found, "bathyscope_redis_up") == 0
        assert value(found, "bathyscope_store_up") == 1
        assert value(found, "bathyscope_http_requests_total", route="/metrics") >= 1
        assert value(found, "bathyscope_disk_free_bytes") > 0
        assert "bathyscope_lane_depth" not in found
        assert "bathyscope_workers" not in found
    finally:
        made.down()


def test_a_bound_of_redis_is_told(tmp_path: Path, models: str) -> None:
    made = Stack(tmp_path, models=models)
    try:
        made.up(workers=0)
        assert "bathyscope_redis_memory_max_bytes" not in metrics(made)
        with Redis.from_url(made.environment["BATHYSCOPE_REDIS_URL"]) as redis:
            redis.config_set("maxmemory", "512mb")
        assert value(metrics(made), "bathyscope_redis_memory_max_bytes") == 512 * 2**20
    finally:
        made.down()


def test_a_killed_engine_and_its_retry_are_counted(tmp_path: Path, models: str) -> None:
    made = Stack(tmp_path, models=models, worker__adopt_seconds=0)
    try:
        made.up()
        job_id = made.client.post("/v1/extractions", json=BODY).json()["id"]
        until_halfway(made, job_id)
        busy = metrics(made)
        assert value(busy, "bathyscope_running_jobs", lane="model:smollm2:none:auto") == 1
        [engine] = made.engines()
        os.kill(engine, signal.SIGKILL)
        assert made.job(job_id)["status"] == "succeeded"
        deadline = time.monotonic() + 20
        while not value(found := metrics(made), "bathyscope_attempts_total", outcome="succeeded"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert value(found, "bathyscope_engine_ends_total", engine="model", cause="died") == 1
        assert value(found, "bathyscope_engine_ends_total") == 1
        assert value(found, "bathyscope_jobs_requeued_total", reason="engine_died_alone") == 1
        assert value(found, "bathyscope_attempts_total", outcome="engine_died_alone") == 1
        assert value(found, "bathyscope_jobs_ended_total", status="succeeded") == 1
        assert value(found, "bathyscope_job_queue_seconds_count") == 1
        assert value(found, "bathyscope_running_jobs") == 0
    finally:
        made.down()


# --- bounds --------------------------------------------------------------------------------------------------


def test_lanes_beyond_the_bound_are_summed() -> None:
    lanes = [LaneStats(f"model:org/{number}:none:auto", number, number, number * 1000, 0) for number in range(2000)]
    depth, oldest = _lanes(lanes, ["cpu"])
    assert len(depth.samples) == len(oldest.samples) == _LANES + 1
    rest = {sample.labels["lane"]: sample.value for sample in depth.samples}
    assert rest[OTHERS] == sum(range(2000 - _LANES))
    assert sum(rest.values()) == sum(range(2000))
    assert max(sample.value for sample in oldest.samples) == 1999


def test_samples_of_workers_travel_as_they_are() -> None:
    def registry(times: int) -> CollectorRegistry:
        made = CollectorRegistry()
        counter = Counter("a_things", "Things.", ["kind"], registry=made)
        histogram = Histogram("a_seconds", "Time.", buckets=(1.0,), registry=made)
        for _ in range(times):
            counter.labels("x").inc()
            histogram.observe(0.5)
        return made

    sent: dict[str, Any] = orjson.loads(orjson.dumps({"one": dump(registry(1)), "two": dump(registry(2))}))
    found = {family.name: family for family in gather(sent)}
    counted = {sample.labels["worker"]: sample.value for sample in found["a_things"].samples}
    assert counted == {"one": 1, "two": 2}
    names = {sample.name for sample in found["a_seconds"].samples}
    assert names == {"a_seconds_bucket", "a_seconds_count", "a_seconds_sum"}
    other = CollectorRegistry()
    Histogram("a_things", "Things of another version.", registry=other)
    mixed = list(gather({**sent, "three": orjson.loads(orjson.dumps(dump(other)))}))
    assert {sample.labels["worker"] for sample in mixed[0].samples} == {"one", "two"}
