"""A split extraction on real engines: equal to the unsplit one, also when a worker is killed in the midst of it, when
the one that joins it is, and when either had committed and not said so."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from tests.service.test_shards import ask_redis, left, shards, until
from tests.stack import Stack, stack

SHARD = 20
WORDS = "the deeper one dives, the darker the water gets. "
TEXTS = [f"Text {number}: " + WORDS * (number % 5) for number in range(90)]
BODY: dict[str, Any] = {"model": "tiny", "inputs": TEXTS, "layers": [0, 2, 4], "pooling": "mean"}


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, models: str, gates: Path) -> Iterator[Stack]:
    os.environ["TEST_GATES"] = str(gates)
    try:
        with stack(
            tmp_path_factory.mktemp("shards"),
            workers=2,
            models=models,
            worker_module="tests.faults.gated_worker",
            jobs__shard_inputs=SHARD,
            jobs__lease_seconds=2.5,
            worker__adopt_seconds=0,
            worker__threads=1,
            cache__max_bytes=0,
        ) as running:
            expected = []
            for start in range(0, len(TEXTS), 2 * SHARD):
                made = running.extract(**{**BODY, "inputs": TEXTS[start : start + 2 * SHARD]})
                assert not shards(running, made["job"])
                expected.append(states(running, made))
            running.expected = {  # type: ignore[attr-defined]
                name: np.concatenate([one[name] for one in expected]) for name in ("hidden_states", "token_ids")
            }
            yield running
    finally:
        del os.environ["TEST_GATES"]


@contextmanager
def closed(gates: Path, name: str) -> Iterator[Path]:
    """A gate that is closed; gives the file that appears when somebody has come to it."""
    (gates / name).touch()
    try:
        yield gates / f"{name}.reached"
    finally:
        (gates / name).unlink(missing_ok=True)
        (gates / f"{name}.reached").unlink(missing_ok=True)


def states(running: Stack, extraction: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return load(running.client.get(extraction["links"]["hidden_states"]).content)


def submit(running: Stack) -> str:
    answer = running.client.post("/v1/extractions", json=BODY)
    assert answer.status_code == 202, answer.text
    job_id = str(answer.json()["id"])
    assert len(shards(running, job_id)) > 2
    return job_id


def lease(running: Stack, job_id: str) -> Any:
    """When it ends."""
    return ask_redis(running, "ZSCORE", "{bathyscope}:leases", job_id)


def restart(running: Stack, name: str) -> None:
    running.kill(name)
    running.start(name, "worker", BATHYSCOPE_WORKER__NAME=name)


def check(running: Stack, job_id: str) -> dict[str, Any]:
    """Succeeded, right, and nothing left over."""
    job = running.job(job_id)
    assert job["status"] == "succeeded", job
    extraction = running.client.get(job["resource"]).json()
    found = states(running, extraction)
    assert np.array_equal(found["token_ids"], running.expected["token_ids"])  # type: ignore[attr-defined]
    expected = running.expected["hidden_states"]  # type: ignore[attr-defined]
    error = np.linalg.norm(found["hidden_states"] - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= 1e-5
    assert len(left(running, f"blobs/{extraction['id']}")) == 1
    until(lambda: not left(running, "shards") and not left(running, "inputs"))
    until(lambda: not list((running.data_dir / "scratch").glob("*/job_*")))
    assert (job["progress"]["done"], job["progress"]["total"]) == (len(TEXTS), len(TEXTS))
    assert ask_redis(running, "HGETALL", "{bathyscope}:shards_running") in ({}, [])
    return job


def test_it_equals_the_unsplit_one(two: Stack) -> None:
    job = check(two, submit(two))
    assert job["attempt"] == 1
    assert job["timings"]["inference"] > 0


def test_a_worker_is_killed_with_a_shard(two: Stack, gates: Path) -> None:
    with closed(gates, "shard") as reached:  # its result is in the store, and nobody knows
        job_id = submit(two)
        until(reached.exists)
        running = [shard for shard in shards(two, job_id) if shard["state"] == "running"]
        victim = running[0]["worker"]
        restart(two, victim)
    job = check(two, job_id)
    assert job["attempt"] >= 1
    two.wait_ready()


def test_an_engine_is_killed_with_a_shard(two: Stack) -> None:
    job_id = submit(two)
    until(lambda: any(shard["state"] == "running" for shard in shards(two, job_id)))
    engines = two.engines()
    os.kill(engines[0], signal.SIGKILL)
    check(two, job_id)


@pytest.mark.parametrize("gate", ["join", "commit"])
def test_the_joiner_is_killed(two: Stack, gates: Path, gate: str) -> None:
    with closed(gates, gate) as reached:
        job_id = submit(two)
        until(reached.exists)
        joiner = ask_redis(two, "HGET", "{bathyscope}:job:" + job_id, "worker")
        assert two.client.get(f"/v1/jobs/{job_id}").json()["status"] == "running"
        two.kill(joiner)
    two.start(joiner, "worker", BATHYSCOPE_WORKER__NAME=joiner)
    check(two, job_id)


def test_the_joiner_is_told_to_stop(two: Stack, gates: Path) -> None:
    with closed(gates, "join") as reached:
        job_id = submit(two)
        until(reached.exists)
        answer = two.client.post(f"/v1/jobs/{job_id}/cancel")
        assert answer.status_code == 200, answer.text
        for _ in range(2):  # the worker hears of it with a renewal, and has read that answer when it renews again
            before = lease(two, job_id)
            until(lambda: lease(two, job_id) != before)  # noqa: B023 - called at once
    assert two.job(job_id)["status"] == "cancelled"
    until(lambda: not left(two, "shards") and not left(two, "inputs"))
    until(lambda: not list((two.data_dir / "scratch").glob("*/job_*")))
    assert not [path for path in left(two, "blobs") if time.time() - path.stat().st_mtime < 1]
