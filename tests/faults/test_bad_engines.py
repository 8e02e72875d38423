"""Engines that die, hang, freeze or talk nonsense: found out, ended, and blamed on the right job only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import WHOLE
from tests.stack import Stack, stack

HANG_SECONDS = 12
"""Long enough for the first job of a new engine on a busy machine."""

whole = pytest.mark.skipif(not WHOLE, reason="part of `make faults`")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """One worker whose engine does itself harm at certain words. A load may take an hour: no test waits for it."""
    with stack(
        tmp_path_factory.mktemp("bad"),
        models=models,
        worker_module="tests.faults.bad_worker",
        jobs__lease_seconds=3,
        jobs__max_attempts=2,
        worker__hang_seconds=HANG_SECONDS,
        worker__load_seconds=3600,
        worker__adopt_seconds=0,
        worker__batch_tokens=4096,
    ) as running:
        running.extract(["warm"], model="tiny", layers=[0])
        yield running


def submit(running: Stack, text: str, *, size: int = 1, model: str = "tiny", **body: Any) -> str:
    """A job of `size` texts, none of which begin alike."""
    inputs = [f"{k} {text}" for k in range(size)]
    answer = running.client.post("/v1/extractions", json={"model": model, "inputs": inputs, "layers": [0], **body})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def engine(running: Stack, kind: str = "model") -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := running.engines(kind):
            return found[0]
        time.sleep(0.05)
    raise TimeoutError(running.said())


def test_poison_ends_with_its_reason_and_its_batch_mates_succeed(bad: Stack) -> None:
    # Queued while the engine is busy, so that all of them come into one batch.
    before = submit(bad, "deep water " * 20, size=400, layers="all")
    innocent = [submit(bad, f"innocent {k}") for k in range(10)]
    poison = submit(bad, "MARK die")
    innocent += [submit(bad, f"innocent {k}") for k in range(10, 20)]
    ended = bad.job(poison)
    assert (ended["status"], ended["attempt"]) == ("failed", 2), ended
    assert ended["error"]["type"] == "/problems/engine-died"
    for job_id in [before, *innocent]:
        job = bad.job(job_id)
        assert (job["status"], job["attempt"]) == ("succeeded", 1), job


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("freeze", "engine-hung"),
        ("garbage", "engine-died"),
        pytest.param("hang", "engine-hung", marks=whole),
        pytest.param("half", "engine-hung", marks=whole),
        pytest.param("nonsense", "engine-died", marks=whole),
        pytest.param("close", "engine-died", marks=whole),
    ],
)
def test_an_engine_that_is_of_no_use_is_ended(bad: Stack, deed: str, reason: str) -> None:
    ended = bad.job(submit(bad, f"MARK {deed}", size=2))
    assert (ended["status"], ended["attempt"]) == ("failed", 2), ended
    assert ended["error"]["type"] == f"/problems/{reason}"


def test_a_result_that_is_none_fails_its_job_only(bad: Stack) -> None:
    mate, poison = submit(bad, "innocent", size=50), submit(bad, "MARK empty")
    assert bad.job(poison)["error"]["type"] == "/problems/internal-error"
    assert bad.job(mate)["status"] == "succeeded"


def test_a_frozen_cpu_engine_is_found_and_ended(bad: Stack) -> None:
    inputs = [f"{'bright' if k % 2 else 'dark'} water {k}" for k in range(20)]
    states = bad.extract(inputs, model="tiny", layers=[2])
    fit = {
        "extraction": states["id"],
        "labels": [bool(k % 2) for k in range(20)],
        "C": [1.0],
        "bootstrap": 0,
        "near_duplicates": None,
    }
    assert bad.job(bad.post("/v1/probes", fit).json()["id"])["status"] == "succeeded"
    os.kill(pid := engine(bad, "cpu"), signal.SIGSTOP)
    job = bad.job(bad.post("/v1/probes", fit).json()["id"])
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("deed", ["freeze", *(pytest.param(deed, marks=whole) for deed in ("hang", "die"))])
def test_an_engine_that_hangs_in_a_load_is_found_long_before_the_load_is_over(bad: Stack, deed: str) -> None:
    restart(bad, TEST_AT_LOAD=f"minilm={deed}")
    # The load is the fault of those that want that model: who only waited in the engine is not blamed.
    busy = submit(bad, "deep water " * 20, size=3000, layers="all")
    while bad.client.get(f"/v1/jobs/{busy}").json()["progress"]["stage"] != "forward":
        time.sleep(0.02)
    cold = submit(bad, "deep water", model="minilm")
    assert bad.job(cold)["error"]["type"] == ("/problems/engine-died" if deed == "die" else "/problems/engine-hung")
    job = bad.job(busy)
    assert (job["status"], job["attempt"]) == ("succeeded", 1)


def test_a_long_load_that_goes_on_is_left_alone(bad: Stack) -> None:
    restart(bad, TEST_AT_LOAD="minilm=slog")
    job = bad.job(submit(bad, "deep water", model="minilm"))
    assert (job["status"], job["attempt"]) == ("succeeded", 1)


def restart(running: Stack, **environment: str) -> None:
    running.processes["worker0"].terminate()
    assert running.processes["worker0"].wait(60) == 0
    running.start("worker0", "worker", BATHYSCOPE_WORKER__NAME="worker0", **environment)
    running.wait_ready()
