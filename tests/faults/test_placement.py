"""Which jobs a worker takes: lanes take turns, a cold model is not shut out, model jobs hear their own events only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.stack import Stack, stack


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A worker that holds one job at a time."""
    with stack(
        tmp_path_factory.mktemp("narrow"), models=models, worker__concurrent_jobs=1, worker__starvation_seconds=0
    ) as running:
        running.extract(["warm"], model="tiny", compute_dtype="float32")
        yield running


def submit(running: Stack, **body: Any) -> str:
    answer = running.client.post("/v1/extractions", json={"layers": [0], **body})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_a_backlog_shuts_nobody_out(narrow: Stack) -> None:
    # Many seconds of work beside a worker that looks for starving lanes once a second.
    long = {
        "model": "tiny",
        "compute_dtype": "float32",
        "inputs": [f"{k} " + "deep water " * 10 for k in range(500)],
        "layers": "all",
    }
    backlog = [submit(narrow, **long) for _ in range(40)]
    same_resident = submit(narrow, model="tiny", inputs=["mine"])
    cold = submit(narrow, model="minilm", inputs=["mine"])
    started = sorted((narrow.job(job)["started_at"], job) for job in [*backlog, same_resident, cold])
    order = [job for _, job in started]
    assert order.index(same_resident) < 10
    assert order.index(cold) < len(order) - 1
    assert all(narrow.job(job)["status"] == "succeeded" for job in order)


def test_load_and_unload_at_once(narrow: Stack) -> None:
    narrow.extract(["warm"], model="minilm", layers=[0])
    unload = narrow.client.post("/v1/models/minilm/unload", json={}).json()
    load = narrow.client.post("/v1/models/minilm/load", json={}).json()
    assert narrow.job(unload["id"])["status"] == "succeeded"
    assert narrow.job(load["id"])["status"] == "succeeded"
    assert narrow.client.get("/v1/models/minilm").json()["residency"] == "hot"
    narrow.job(narrow.client.post("/v1/models/minilm/unload", json={}).json()["id"])
    again = narrow.job(narrow.client.post("/v1/models/minilm/unload", json={}).json()["id"])
    assert again["error"]["type"] == "/problems/state-conflict"


def test_a_job_cancelled_as_it_is_taken_ends_cancelled(narrow: Stack) -> None:
    for _ in range(10):
        job = submit(narrow, model="tiny", inputs=[f"{k} " + "deep water " * 20 for k in range(3000)])
        narrow.client.post(f"/v1/jobs/{job}/cancel")
        assert narrow.job(job)["status"] == "cancelled"
