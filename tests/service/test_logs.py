"""The logs of a real installation at its most talkative: JSON, with names on every line, and no contents."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2

from tests.faults.test_kills import until_halfway
from tests.service.test_keys import make_key
from tests.stack import Stack

SECRET = "MARKER"
LABELS = [f"{SECRET}-label-{number % 2}" for number in range(40)]
TEXTS = [f"{SECRET}-text {number}: the deeper one dives, the darker the water. " * 3 for number in range(40)]


def broken(tiny_dir: Path, folder: Path) -> Path:
    """A model whose weights are no weights."""
    shutil.copytree(tiny_dir, folder)
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    return folder


def post(stack: Stack, client: httpx2.Client, path: str, body: Any, **headers: str) -> dict[str, Any]:
    answer = client.post(f"{path}?note={SECRET}-query", json=body, headers={"X-Note": f"{SECRET}-header", **headers})
    assert answer.status_code in (200, 202), answer.text
    return dict(answer.json())


def test_every_line_says_what_it_is_about_and_none_tells_contents(tmp_path: Path, tiny_dir: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    running = Stack(
        data,
        models=f"tiny={tiny_dir},broken={broken(tiny_dir, tmp_path / 'broken')}",
        log_level="debug",
        worker__adopt_seconds=0,
    )
    try:
        key = make_key(running, "boss", "--scope", "admin")
        running.up()
        running.client.headers["Authorization"] = f"Bearer {key}"
        extraction = {"inputs": TEXTS, "layers": [0, 2], "metadata": {"note": f"{SECRET}-metadata"}}
        made = post(running, running.client, "/v1/extractions", {"model": "tiny", **extraction})
        states = running.job(made["id"])
        assert states["status"] == "succeeded", states
        probe = {"extraction": states["resource"].rpartition("/")[2], "labels": LABELS, "bootstrap": 10}
        probed = running.job(post(running, running.client, "/v1/probes", probe)["id"])
        assert probed["status"] == "succeeded", probed
        failed = running.job(post(running, running.client, "/v1/extractions", {"model": "broken", **extraction})["id"])
        assert failed["error"]["type"] == "/problems/model-load-failed"
        killed = post(running, running.client, "/v1/extractions", {"model": "smollm2", **extraction, "layers": "all"})
        until_halfway(running, killed["id"])
        [engine] = running.engines()
        os.kill(engine, signal.SIGKILL)
        assert running.job(killed["id"])["status"] == "succeeded"
        refused = [
            running.client.post("/v1/extractions", json={"model": "tiny", "inputs": [SECRET], "layers": [SECRET]}),
            running.client.post("/v1/extractions", content=f'{{"inputs": "{SECRET}'.encode()),
            running.client.get(f"/v1/models/{SECRET}-path"),
            running.client.get(f"/{SECRET}-nowhere"),
            running.client.get("/v1/jobs", headers={"Authorization": f"Bearer {SECRET}-key"}),
        ]
        assert [answer.status_code for answer in refused] == [422, 415, 404, 404, 401]
        named = running.client.get("/v1/whoami", headers={"X-Request-Id": "mine-1"})
        unnamed = running.client.head("/v1/whoami", headers={"X-Request-Id": "not / valid"})
        drawn = unnamed.headers["x-request-id"]
        assert named.headers["x-request-id"] == "mine-1"
        assert re.fullmatch("[0-9a-f]{32}", drawn)
    finally:
        running.down()

    everything = "".join(path.read_text() for path in running.logs.glob("*.log"))
    assert SECRET not in everything
    assert key not in everything
    lines = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in running.logs.glob("*")}
    said = [line for name in lines for line in lines[name]]
    assert all({"event", "level", "timestamp", "process"} <= set(line) for line in said)
    assert {line["process"] for line in said} >= {"service", "worker"}
    assert all(line["worker"] == "worker0" for line in lines["worker0"])

    about_jobs = [line for line in said if "job" in line]
    for line in about_jobs:
        assert {"job", "attempt", "lane", "key", "worker"} <= set(line), line
        assert line["key"].startswith("key_"), line
    job_events = {(line["event"], line["job"]) for line in about_jobs}
    for job in (states, probed, failed):
        assert ("job.queued", job["id"]) in job_events
    assert {
        ("job.succeeded", states["id"]),
        ("job.succeeded", probed["id"]),
        ("job.failed", failed["id"]),
    } <= job_events
    [again] = [line for line in about_jobs if line["event"] == "job.succeeded" and line["job"] == killed["id"]]
    assert again["attempt"] == 2
    assert any(line["event"] == "engine.died" for line in lines["worker0"])
    engines = [line for line in about_jobs if line["process"] == "model-engine"]
    assert any(line["job"] == failed["id"] for line in engines), "the engine said why the model could not be loaded"

    requests = [line for line in said if line["event"] == "http.request"]
    for line in lines["service"]:
        if line["event"] in ("http.request", "job.queued"):
            assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", line["request"])
    for line in requests:
        assert {"method", "route", "status", "seconds", "key"} <= set(line)
    by_request = {line["request"]: line for line in requests}
    assert by_request["mine-1"]["route"] == "/v1/whoami"
    assert (by_request[drawn]["method"], by_request[drawn]["status"]) == ("HEAD", 200)
    assert {line["status"] for line in requests} >= {200, 401, 404, 415, 422}
    assert all(line["key"] is None for line in requests if line["status"] == 401)
    assert all(line["level"] == "debug" for line in requests if line["route"] == "/readyz" and line["status"] == 200)


SAYS = """
import asyncio, logging, sys, threading, warnings
import structlog
from bathyscope_backplane import logs

library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
library.propagate = False
logs.configure("info", process="test")
logs.name_worker("w")
structlog.contextvars.bind_contextvars(job="job_1")

class Stubborn:
    def __del__(self):
        raise KeyError("MARKER")

async def forgotten():
    async def fails():
        raise ValueError("MARKER")
    task = asyncio.create_task(fails())
    await asyncio.sleep(0.01)

library.warning("its own words\\nMARKER in a second line")
library.info("not heard")
logging.getLogger("bathyscope_workers.x").info("heard")
logging.getLogger("library").error("%d", "no number")
warnings.warn("careful")
try:
    try:
        int("MARKER")
    except ValueError as error:
        raise OSError(28, "No space left on device") from error
except OSError:
    structlog.get_logger().exception("fault")
thread = threading.Thread(target=lambda: {}["MARKER"])
thread.start(); thread.join()
Stubborn()
asyncio.run(forgotten())
float("MARKER")
"""


def test_whatever_speaks_a_line_is_json_and_tells_no_value() -> None:
    script = SAYS
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert "MARKER" not in ended.stderr
    assert "not heard" not in ended.stderr
    assert {(line["process"], line["worker"]) for line in lines if "process" in line} == {("test", "w")}
    assert sum(line.get("job") == "job_1" for line in lines) >= 6
    found = {line["event"]: line for line in lines}
    assert {"its own words", "heard", "fault", "thread.fault", "object.fault", "process.fault"} <= set(found)
    assert "OSError: [Errno 28] No space left on device" in found["fault"]["exception"]
    assert found["fault"]["exception"].splitlines()[2] == "ValueError"
    assert found["process.fault"]["exception"].splitlines()[0] == "ValueError"
    assert found["Task exception was never retrieved"]["exception"].startswith("ValueError\n")


def test_a_line_fits_into_what_a_pipe_takes_at_once() -> None:
    script = (
        "import structlog\n"
        "from bathyscope_backplane import logs\n"
        "logs.configure('info', process='test')\n"
        "def deep(n):\n"
        "    if n: deep(n - 1)\n"
        "    raise RuntimeError('x' * 10_000)\n"
        "try: deep(400)\n"
        "except RuntimeError: structlog.get_logger().exception('fault')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    [line] = ended.stderr.splitlines()
    assert len(line) < 4096
    assert json.loads(line)["exception"].startswith("RuntimeError: xxx")
