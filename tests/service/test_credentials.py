"""Credentials of a request reach its job, and nothing else: sealed in the queue, gone with the end, in no log."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.service.test_manners import problem
from tests.stack import Stack

TINKER, HUB = f"tml-{secrets.token_hex(16)}", f"hf_{secrets.token_hex(16)}"
GIVEN = {"X-Tinker-Api-Key": TINKER, "X-HF-Token": HUB}


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


@pytest.fixture(scope="module")
def noting(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A whole installation whose worker notes what its jobs were given; debug logs."""
    made = Stack(
        tmp_path_factory.mktemp("noting"),
        models=models,
        worker_module="tests.service.noting_worker",
        jobs__max_attempts=2,
        log_level="debug",
    )
    made.environment["NOTES"] = str(made.data_dir / "notes.jsonl")
    try:
        yield made.up()
    finally:
        made.down()


def notes(stack: Stack, job_id: str) -> list[dict[str, Any]]:
    lines = Path(stack.environment["NOTES"]).read_text().splitlines()
    return [note for note in map(json.loads, lines) if note["job"] == job_id]


def hash_of(stack: Stack, job_id: str) -> dict[str, str]:
    with Redis.from_url(stack.environment["BATHYSCOPE_REDIS_URL"], decode_responses=True) as redis:
        found: dict[str, str] = redis.hgetall(f"{{bathyscope}}:job:{job_id}")  # type: ignore[assignment]
        return found


def test_they_reach_the_job_and_stay_sealed_until_it_ends(noting: Stack) -> None:
    body = {"model": "tiny", "inputs": ["again"]}
    job = noting.client.post("/v1/extractions", json=body, headers=GIVEN).json()
    ended = noting.job(job["id"])
    assert ended["status"] == "failed"
    given = {"tinker_api_key": digest(TINKER), "hf_token": digest(HUB)}
    assert [(note["attempt"], note["given"]) for note in notes(noting, job["id"])] == [(1, given), (2, given)]
    assert "secret" not in hash_of(noting, job["id"])

    answer = noting.client.post(f"/v1/jobs/{job['id']}/replay")
    problem(answer, 409, "state-conflict")
    assert "X-Tinker-Api-Key and X-HF-Token" in answer.json()["detail"]
    partly = noting.client.post(f"/v1/jobs/{job['id']}/replay", headers={"X-HF-Token": HUB})
    problem(partly, 409, "state-conflict")
    assert "X-HF-Token" not in partly.json()["detail"]
    assert noting.client.post(f"/v1/jobs/{job['id']}/replay", headers=GIVEN).status_code == 200
    assert noting.job(job["id"])["status"] == "failed"
    assert [note["given"] for note in notes(noting, job["id"])] == [given] * 4


@pytest.mark.parametrize("end", ["succeeded", "cancelled"])
def test_they_are_gone_when_the_job_has_ended(noting: Stack, end: str) -> None:
    body = {"model": "tiny", "inputs": [f"fine {end}"]}
    if end == "cancelled":
        body["model"] = "minilm"
        noting.processes["worker0"].send_signal(19)  # it takes nothing while it is stopped
    try:
        job = noting.client.post("/v1/extractions", json=body, headers={"X-HF-Token": HUB}).json()
        if end == "cancelled":
            assert "secret" in hash_of(noting, job["id"])
            noting.client.post(f"/v1/jobs/{job['id']}/cancel")
    finally:
        noting.processes["worker0"].send_signal(18)
    assert noting.job(job["id"])["status"] == end
    assert "secret" not in hash_of(noting, job["id"])
    if end == "succeeded":
        assert [note["given"] for note in notes(noting, job["id"])] == [{"hf_token": digest(HUB)}]


def test_both_jobs_of_a_probe_are_sealed_for_themselves(noting: Stack) -> None:
    data = {"model": "tiny", "inputs": [f"text {number}" for number in range(8)], "layers": [1]}
    body = {"data": data, "labels": [0, 1] * 4, "folds": 2, "bootstrap": 10}
    job = noting.post("/v1/probes", body, **GIVEN).json()
    assert noting.job(job["id"])["status"] == "succeeded"
    [parent] = hash_of(noting, job["id"])["parents"].split()
    assert [set(note["given"]) for note in notes(noting, parent)] == [{"tinker_api_key", "hf_token"}]
    for one in (job["id"], parent):
        found = hash_of(noting, one)
        assert "secret" not in found
        assert found["credentials"] == "tinker_api_key hf_token"


@pytest.mark.parametrize("value", ["", "with space", "x" * 1025, "tab\there", "umläut".encode().decode("latin-1")])
def test_a_value_that_is_none_is_refused_and_not_repeated(noting: Stack, value: str) -> None:
    headers = [(b"X-HF-Token", value.encode("latin-1"))]
    body = {"model": "tiny", "inputs": ["x"]}
    before = len(noting.client.get("/v1/jobs").json()["data"])
    answer = noting.client.post("/v1/extractions", json=body, headers=headers)
    problem(answer, 422, "invalid-request")
    assert "X-HF-Token" in answer.json()["detail"]
    assert len(value) < 2 or value not in answer.text
    twice = [(b"X-HF-Token", b"one"), (b"X-HF-Token", b"two")]
    problem(noting.client.post("/v1/extractions", json=body, headers=twice), 422, "invalid-request")
    assert len(noting.client.get("/v1/jobs").json()["data"]) == before


_ROWS = {"inputs": [f"text {number}" for number in range(8)], "labels": [0, 1] * 4, "folds": 2, "bootstrap": 0}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/extractions", {"model": "tiny", "inputs": ["x"]}),
        ("/v1/comparisons", {"model": "tiny", "quantizations": ["none", "8bit"], **_ROWS}),
        ("/v1/experiments", {"model": {"name": "tiny"}, "dataset": {"name": "arithmetic", "limit": 40}}),
    ],
)
def test_it_is_refused_too_where_the_idempotency_key_is_known(noting: Stack, path: str, body: dict[str, Any]) -> None:
    first = noting.post(path, body, wait=0, **{"Idempotency-Key": "known"})
    assert first.status_code == 202, first.text
    again = noting.post(path, body, wait=0, **{"Idempotency-Key": "known", "X-HF-Token": "with space"})
    problem(again, 422, "invalid-request")
    assert "X-HF-Token" in again.json()["detail"]
    fine = noting.post(path, body, wait=0, **{"Idempotency-Key": "known", "X-HF-Token": HUB})
    assert fine.json()["id"] == first.json()["id"]
    noting.client.post(f"/v1/jobs/{first.json()['id']}/cancel")


def test_a_worker_with_another_master_key_says_which_setting(tmp_path: Path, models: str) -> None:
    made = Stack(tmp_path, models=models, jobs__max_attempts=1)
    other = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    try:
        made.start("service", "service")
        made.start("worker", "worker", BATHYSCOPE_MASTER_KEY=other)
        made.wait_ready()
        body = {"model": "tiny", "inputs": ["x"]}
        job = made.client.post("/v1/extractions", json=body, headers=GIVEN).json()
        ended = made.job(job["id"])
        assert (ended["status"], ended["error"]["type"]) == ("failed", "/problems/credential-unreadable")
        assert "BATHYSCOPE_MASTER_KEY" in ended["error"]["detail"]
        assert made.extract(["x"], model="tiny")["inputs"] == 1  # it works on all that has no credential
    finally:
        made.down()


@pytest.mark.parametrize("fault", ["open", "malformed"])
@pytest.mark.parametrize("role", ["service", "worker"])
def test_neither_process_starts_with_a_faulty_master_key(tmp_path: Path, role: str, fault: str) -> None:
    made = Stack(tmp_path)
    path = tmp_path / "master.key"
    path.write_text("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n" if fault == "open" else "none\n")
    path.chmod(0o644 if fault == "open" else 0o600)
    try:
        told = made.refusal(role)
    finally:
        made.down()
    assert "master.key" in told


def test_they_are_in_clear_nowhere(noting: Stack) -> None:
    """Last in this module: whatever the tests above left behind is searched, the queue's file with it."""
    with Redis.from_url(noting.environment["BATHYSCOPE_REDIS_URL"]) as redis:
        for key in redis.scan_iter(count=1000):
            dumped = redis.dump(key)
            assert isinstance(dumped, bytes)
            for secret in (TINKER, HUB):
                assert secret.encode() not in dumped
            kind = redis.type(key)
            text = {
                b"string": lambda key=key: redis.get(key),
                b"hash": lambda key=key: redis.hgetall(key),
                b"stream": lambda key=key: redis.xrange(key),
                b"set": lambda key=key: redis.smembers(key),
                b"zset": lambda key=key: redis.zrange(key, 0, -1),
            }[kind]()
            for secret in (TINKER, HUB):
                assert secret not in str(text), key
    files = [path for path in noting.data_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name.endswith(".aof") for path in files)
    assert any(path.parent.name == "logs" for path in files)
    sealed = 0
    for path in files:
        content = path.read_bytes()
        for secret in (TINKER, HUB):
            assert secret.encode() not in content, path
        sealed += content.count(b"v1.") if path.name.endswith(".aof") else 0
    assert sealed >= 5  # the envelopes were there to be found
