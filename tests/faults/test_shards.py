"""A split extraction on real engines: equal to the unsplit one, also when a worker is killed in the midst of it, when
the one that joins it is, and when either had committed and not said so. One that fails or is cancelled leaves nothing.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from tests.files import matching
from tests.service.test_shards import ask_redis, left, only_records_left, shards, until
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


def submit(running: Stack, body: dict[str, Any] = BODY) -> str:
    answer = running.client.post("/v1/extractions", json=body)
    assert answer.status_code == 202, answer.text
    job_id = str(answer.json()["id"])
    assert len(shards(running, job_id)) > 2
    return job_id


def lease(running: Stack, job_id: str) -> Any:
    """When it ends."""
    return ask_redis(running, "ZSCORE", "{bathyscope}:leases", job_id)


def heard(running: Stack, *jobs: str) -> None:
    """Wait until workers know that these are cancelled: they hear of it with a renewal, and have read that answer when
    they renew again."""
    for job_id in jobs:
        for _ in range(2):
            before = lease(running, job_id)
            until(lambda: lease(running, job_id) != before)  # noqa: B023 - called at once


def other(worker: str) -> str:
    return {"worker0": "worker1", "worker1": "worker0"}[worker]


def revive(running: Stack, worker: str) -> None:
    """Start a worker that was killed, and wait until it serves again."""
    running.start(worker, "worker", BATHYSCOPE_WORKER__NAME=worker)
    until(lambda: both_serve(running), 60)


def both_serve(running: Stack) -> bool:
    """Whether each worker runs shards; one whose engine is just starting does not."""
    job_id = submit(running)
    assert running.job(job_id)["status"] == "succeeded"
    return {shard["worker"] for shard in shards(running, job_id)} == {"worker0", "worker1"}


def engine(running: Stack, worker: str) -> int:
    """Process id of a worker's model engine, 0 when it has none."""
    for pid in running.engines():
        with suppress(OSError):
            if parent(pid) == running.processes[worker].pid:
                return pid
    return 0


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextmanager
def held(running: Stack, body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A split job of which each worker's engine has one shard, and stands still with it: the job's id, and what lets a
    worker's engine go on. At the end all do."""
    until(lambda: both_serve(running), 60)
    engines = {worker: until(lambda: engine(running, worker)) for worker in ("worker0", "worker1")}  # noqa: B023 - called at once

    def go_on(worker: str) -> None:
        with suppress(ProcessLookupError):
            os.kill(engines[worker], signal.SIGCONT)

    for pid in engines.values():
        os.kill(pid, signal.SIGSTOP)
    try:
        job_id = submit(running, body)
        until(lambda: set(at_work(running, job_id)) == set(engines))
        yield job_id, {worker: partial(go_on, worker) for worker in engines}
    finally:
        for worker in engines:
            go_on(worker)


def at_work(running: Stack, job_id: str) -> dict[str, int]:
    """The shard that each worker has."""
    found = enumerate(shards(running, job_id))
    return {shard["worker"]: number for number, shard in found if shard["state"] == "running"}


def begun(shard: dict[str, str]) -> int:
    """How often a shard was taken: some deaths are no attempt of its own."""
    return int(shard["attempt"]) + int(shard["group_deaths"])


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
    until(lambda: not matching(running.data_dir / "scratch", "*/job_*"))
    assert (job["progress"]["done"], job["progress"]["total"]) == (len(TEXTS), len(TEXTS))
    assert ask_redis(running, "HGETALL", "{bathyscope}:shards_running") in ({}, [])
    return job


def test_it_equals_the_unsplit_one(two: Stack) -> None:
    job_id = submit(two)
    job = check(two, job_id)
    assert job["attempt"] == 1
    assert job["timings"]["inference"] > 0
    assert {begun(shard) for shard in shards(two, job_id)} == {1}


def test_a_worker_is_killed_with_a_shard_in_its_engine(two: Stack) -> None:
    with held(two, BODY) as (job_id, go_on):
        lost, last = at_work(two, job_id)["worker0"], len(shards(two, job_id)) - 1
        go_on["worker1"]()
        until(lambda: Counter(shard["status"] for shard in shards(two, job_id)) == {"succeeded": last, "running": 1})
        assert at_work(two, job_id) == {"worker0": lost}
        two.kill("worker0")
    assert two.job(job_id)["status"] == "succeeded"  # by the one that is left
    assert {shard["worker"] for shard in shards(two, job_id)} == {"worker1"}
    assert [begun(shard) for shard in shards(two, job_id)] == [1 + (number == lost) for number in range(last + 1)]
    revive(two, "worker0")
    check(two, job_id)


def test_a_worker_is_killed_that_had_committed_a_shard(two: Stack, gates: Path) -> None:
    with closed(gates, "shard") as reached:  # its result is in the store, and nobody knows
        job_id = submit(two)
        until(reached.exists)
        [document, *_] = until(lambda: [path for path in left(two, f"shards/{job_id}") if path.suffix == ".json"])
        number = int(document.stem)
        victim = shards(two, job_id)[number]["worker"]
        assert shards(two, job_id)[number]["state"] == "running"
        two.kill(victim)
    assert two.job(job_id)["status"] == "succeeded"
    shard = shards(two, job_id)[number]
    assert (shard["worker"], begun(shard)) == (other(victim), 2)
    revive(two, victim)
    check(two, job_id)


def test_an_engine_is_killed_with_a_shard(two: Stack) -> None:
    with held(two, BODY) as (job_id, _):
        number = at_work(two, job_id)["worker0"]
        os.kill(engine(two, "worker0"), signal.SIGKILL)
        until(lambda: at_work(two, job_id).get("worker0") != number)
    check(two, job_id)
    assert begun(shards(two, job_id)[number]) == 2


@pytest.mark.parametrize("gate", ["join", "commit"])
def test_the_joiner_is_killed(two: Stack, gates: Path, gate: str) -> None:
    with closed(gates, gate) as reached:
        job_id = submit(two)
        until(reached.exists)
        joiner = ask_redis(two, "HGET", "{bathyscope}:job:" + job_id, "worker")
        assert two.client.get(f"/v1/jobs/{job_id}").json()["status"] == "running"
        two.kill(joiner)
    assert two.job(job_id)["status"] == "succeeded"
    assert ask_redis(two, "HGET", "{bathyscope}:job:" + job_id, "worker") == other(joiner)
    assert {begun(shard) for shard in shards(two, job_id)} == {1}  # none was run again
    revive(two, joiner)
    check(two, job_id)


def nothing_left(running: Stack, job_id: str) -> None:
    """On disk nothing, in Redis its own records, which lapse."""
    until(lambda: {shard["state"] for shard in shards(running, job_id)} == {"ended"})
    until(lambda: not left(running, "shards") and not left(running, "inputs"))
    until(lambda: not matching(running.data_dir / "scratch", "*/job_*"))
    resource = ask_redis(running, "HGET", "{bathyscope}:job:" + job_id, "resource_id")
    assert resource
    assert not left(running, f"blobs/{resource}")
    only_records_left(running, job_id)


def test_one_shard_fails_while_another_is_run(two: Stack) -> None:
    """What is run meanwhile is cancelled, and so is what was not begun."""
    inputs = [*TEXTS]
    inputs[63] = "x" * 5000
    with held(two, {**BODY, "inputs": inputs}) as (job_id, go_on):
        stopped = at_work(two, job_id)["worker1"]
        go_on["worker0"]()
        job = two.job(job_id)
        heard(two, f"{job_id}+{stopped}")
    assert job["status"] == "failed"
    assert job["error"]["type"] == "/problems/invalid-input"
    assert job["error"]["errors"][0]["pointer"] == "/inputs/63"
    nothing_left(two, job_id)
    how = [shard["status"] for shard in shards(two, job_id)]
    assert how[stopped] == "cancelled"
    assert Counter(how)["failed"] == 1
    assert "succeeded" in how
    assert two.extract(["after"], model="tiny", layers=[0])["inputs"] == 1


def test_a_cancel_ends_what_engines_have(two: Stack) -> None:
    with held(two, BODY) as (job_id, _):
        running = set(at_work(two, job_id).values())
        assert two.client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
        waiting = [shard for number, shard in enumerate(shards(two, job_id)) if number not in running]
        assert len(waiting) >= 3
        assert {shard["status"] for shard in waiting} == {"cancelled"}
        assert two.job(job_id)["status"] == "cancelled"
        heard(two, *(f"{job_id}+{number}" for number in running))
    nothing_left(two, job_id)
    assert {shard["status"] for shard in shards(two, job_id)} == {"cancelled"}
    assert two.extract(["after"], model="tiny", layers=[0])["inputs"] == 1


def test_the_joiner_is_told_to_stop(two: Stack, gates: Path) -> None:
    with closed(gates, "join") as reached:
        job_id = submit(two)
        until(reached.exists)
        answer = two.client.post(f"/v1/jobs/{job_id}/cancel")
        assert answer.status_code == 200, answer.text
        heard(two, job_id)
    assert two.job(job_id)["status"] == "cancelled"
    nothing_left(two, job_id)
