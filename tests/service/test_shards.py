"""Large extractions are split over workers, and nobody can tell but by the time they take."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import hypothesis.strategies as st
import numpy as np
import orjson
import pytest
import redis
from hypothesis import given
from safetensors.numpy import load

from bathyscope_backplane.settings import JobSettings
from bathyscope_service.jobs.sharding import split
from tests.files import matching, paths_below
from tests.service.test_keys import make_key
from tests.stack import Stack, stack

PREFIX = "{bathyscope}:"
SHARD = 10
TEXTS = [f"{chr(97 + number % 26)} text of {number} letters " + "z" * (number % 7) for number in range(75)]
"""Of about 30 bytes each: seven or eight shards."""
SLOW = {"metadata": {"noop_seconds": 1}}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(
        tmp_path_factory.mktemp("shards"),
        workers=2,
        noop=True,
        models=models,
        jobs__shard_inputs=SHARD,
        worker__adopt_seconds=0,
        jobs__lease_seconds=3,
    ) as running:
        yield running


def ask_redis(running: Stack, *command: str) -> Any:
    with redis.Redis.from_url(running.valkey.url, decode_responses=True) as client:
        return client.execute_command(*command)


def shards(running: Stack, job_id: str) -> list[dict[str, str]]:
    """What the broker holds of a job's shards."""
    many = int(ask_redis(running, "HGET", f"{PREFIX}job:{job_id}", "shards") or 0)
    found = []
    with redis.Redis.from_url(running.valkey.url, decode_responses=True) as client:
        for number in range(many):
            found.append(client.hgetall(f"{PREFIX}job:{job_id}+{number}"))
    return found


def submit(running: Stack, **body: Any) -> str:
    answer = running.post("/v1/extractions", {"model": "tiny", "layers": [0, 2], **body}, wait=0)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def states(running: Stack, extraction: dict[str, Any], **query: Any) -> dict[str, np.ndarray[Any, Any]]:
    answer = running.client.get(extraction["links"]["hidden_states"], params=query)
    assert answer.status_code == 200, answer.text
    return load(answer.content)


def until(so: Any, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := so():
            return answer
        time.sleep(0.02)
    raise TimeoutError("it never was so")


def left(running: Stack, folder: str) -> list[Path]:
    return [path for path in paths_below(running.data_dir / "artifacts" / folder) if path.is_file()]


def only_records_left(running: Stack, job_id: str) -> None:
    """Of a job that has ended Redis holds its records, which lapse, and lists of what has ended: nothing that is still
    to be done.
    """
    names = {"job", "events", "tomb"}
    listed = set()
    with redis.Redis.from_url(running.valkey.url, decode_responses=True) as client:
        for key in client.scan_iter(f"{PREFIX}*", count=1000):
            name, _, rest = key.removeprefix(PREFIX).partition(":")
            if rest == job_id or rest.startswith(f"{job_id}+"):
                assert name in names, key
                assert client.ttl(key) > 0, key
            elif client.type(key) in ("zset", "set"):
                members = client.zrange(key, 0, -1) if client.type(key) == "zset" else client.smembers(key)
                if any(member == job_id or member.startswith(f"{job_id}+") for member in members):
                    listed.add(name)
    assert listed == {"jobs", "expiry"}
    assert not ask_redis(running, "HGETALL", f"{PREFIX}shards_running")


def whole_and_pieces(running: Stack, inputs: list[Any], **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The extraction of all inputs, which is split, and extractions of pieces that are not."""
    whole = running.extract(inputs, model="tiny", layers=[0, 2], **options)
    assert len(shards(running, whole["job"])) > 2
    pieces = [
        running.extract(inputs[start : start + 2 * SHARD], model="tiny", layers=[0, 2], **options)
        for start in range(0, len(inputs), 2 * SHARD)
    ]
    assert not any(shards(running, piece["job"]) for piece in pieces)
    return whole, pieces


@given(
    inputs=st.lists(st.text(max_size=40), min_size=1, max_size=60),
    shard_inputs=st.integers(1, 20),
    shard_bytes=st.integers(1, 2000),
    max_shards=st.integers(1, 8),
)
def test_shards_are_all_of_it(inputs: list[str], shard_inputs: int, shard_bytes: int, max_shards: int) -> None:
    settings = JobSettings(shard_inputs=shard_inputs, shard_bytes=shard_bytes, max_shards=max_shards)
    lines = b"\n".join(orjson.dumps(text) for text in inputs)
    found = split(lines, len(inputs), 3, settings)
    small = len(inputs) <= 2 * shard_inputs and len(lines) <= 2 * shard_bytes
    assert not found if small or max_shards == 1 or len(inputs) == 1 else len(found) <= max_shards
    if found:
        parts = [[orjson.loads(line) for line in lines[one.start : one.end].splitlines()] for one in found]
        assert [text for part in parts for text in part] == inputs
        assert [len(part) for part in parts] == [one.inputs for one in found]
        assert [one.first for one in found] == [sum(map(len, parts[:number])) for number in range(len(parts))]
        assert [one.number for one in found] == list(range(len(found)))
        assert all(one.inputs and one.rows == 3 * one.inputs for one in found)


def test_shards_are_about_equal_in_bytes() -> None:
    inputs = ["x" * (10 if number < 900 else 1000) for number in range(1000)]
    lines = b"\n".join(orjson.dumps(text) for text in inputs)
    found = split(lines, len(inputs), 1, JobSettings(shard_inputs=100))
    assert len(found) == 10
    costs = [one.end - one.start + 32 * one.inputs for one in found]
    assert max(costs) - min(costs) <= 2 * 1035


@pytest.mark.parametrize("pooling", ["last", "none"])
def test_the_result_is_that_of_an_unsplit_job(two: Stack, pooling: str) -> None:
    whole, pieces = whole_and_pieces(two, TEXTS, pooling=pooling, dtype="float16")
    found, expected = states(two, whole), [states(two, piece) for piece in pieces]
    for name in ("hidden_states", "token_ids"):
        assert np.array_equal(found[name], np.concatenate([one[name] for one in expected]))
    assert np.array_equal(np.diff(found["offsets"]), np.concatenate([np.diff(one["offsets"]) for one in expected]))
    assert found["offsets"][0] == 0
    assert whole["inputs"] == len(TEXTS)
    assert whole["shape"] == list(found["hidden_states"].shape)
    assert whole["tokens"] == {name: sum(one["tokens"][name] for one in pieces) for name in whole["tokens"]}
    assert whole["cache"] == {name: sum(one["cache"][name] for one in pieces) for name in whole["cache"]}
    same = ("model", "layers", "identity", "dtype", "pooling", "versions", "relative_change", "variants", "scored")
    assert {name: whole[name] for name in same} == {name: pieces[0][name] for name in same}
    content = two.client.get(whole["links"]["hidden_states"]).content
    assert len(content) == whole["bytes"]
    # Parts of it are read where they lie.
    rows = slice(37, 42) if pooling == "last" else slice(int(found["offsets"][37]), int(found["offsets"][42]))
    part = states(two, whole, rows="37-41", layers="2")["hidden_states"]
    assert np.array_equal(part, found["hidden_states"][rows, 1:])
    assert not left(two, "shards")
    assert not left(two, "inputs")
    assert not matching(two.data_dir / "scratch", "*/job_*")


def test_scores_of_choices(two: Stack) -> None:
    inputs = [{"prompt": text, "choices": ["A", "B"], "answer": number % 2} for number, text in enumerate(TEXTS)]
    whole = two.extract(inputs, model="tiny", layers=[0], score_choices=True)
    assert len(shards(two, whole["job"])) > 2
    rows = two.client.get(whole["links"]["choices"]).json()["data"]
    assert [row["index"] for row in rows] == list(range(len(inputs)))
    [row] = two.client.get(whole["links"]["choices"], params={"rows": "41-41"}).json()["data"]
    assert row["index"] == 41
    assert whole["scored"]["answered"] == len(inputs)
    assert whole["scored"]["confidence"] == pytest.approx(0.5)


def test_the_user_sees_one_job(two: Stack) -> None:
    before = two.client.get("/v1/jobs").json()["data"]
    job_id = submit(two, inputs=TEXTS, **SLOW)
    until(lambda: two.client.get(f"/v1/jobs/{job_id}").json()["status"] == "running")
    listed = two.client.get("/v1/jobs").json()["data"]
    assert [job["id"] for job in listed] == [job_id, *(job["id"] for job in before)][: len(listed)]
    assert two.client.get(f"/v1/jobs/{job_id}+0").status_code == 404
    assert two.client.get("/v1/whoami").json()["use"]["queued_jobs"] == 1
    seen = [two.client.get(f"/v1/jobs/{job_id}").json()]
    while seen[-1]["status"] not in ("succeeded", "failed"):
        seen.append(two.client.get(f"/v1/jobs/{job_id}").json())
        time.sleep(0.02)
    assert seen[-1]["status"] == "succeeded"
    assert {job["status"] for job in seen} == {"running", "succeeded"}
    assert {job["attempt"] for job in seen} == {1}
    assert len({job["started_at"] for job in seen}) == 1
    done = [job["progress"]["done"] for job in seen]
    assert done == sorted(done)
    assert done[-1] == len(TEXTS) == seen[-1]["progress"]["total"]
    assert len(set(done)) > 3
    timings = seen[-1]["timings"]
    many = len(shards(two, job_id))
    assert timings["inference"] >= many * 0.9  # summed over shards, which ran beside each other
    assert timings["total"] < timings["inference"]
    assert len(two.client.get("/v1/jobs").json()["data"]) == len(before) + 1
    assert two.client.get("/v1/whoami").json()["use"]["queued_jobs"] == 0
    events = two.client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "0"}).text
    assert events.count("event: done") == 1


def test_workers_share_it(two: Stack) -> None:
    job_id = submit(two, inputs=TEXTS, **SLOW)
    assert two.job(job_id)["status"] == "succeeded"
    assert {shard["worker"] for shard in shards(two, job_id)} == {"worker0", "worker1"}


def test_a_small_job_of_the_same_key_does_not_wait_for_the_shards(two: Stack) -> None:
    large = submit(two, inputs=TEXTS, **SLOW)
    until(lambda: two.client.get(f"/v1/jobs/{large}").json()["status"] == "running")
    small = submit(two, inputs=["small"])
    assert two.job(small)["status"] == "succeeded"
    assert two.client.get(f"/v1/jobs/{large}").json()["status"] == "running"
    assert two.job(large)["status"] == "succeeded"


def test_a_fault_names_the_input_of_the_whole_job(two: Stack) -> None:
    inputs: list[Any] = [*TEXTS]
    inputs[63] = "x" * 5000
    job = two.job(submit(two, inputs=inputs, **SLOW))
    assert job["status"] == "failed"
    assert job["error"]["type"] == "/problems/invalid-input"
    assert job["error"]["errors"][0]["pointer"] == "/inputs/63"
    assert job["error"]["instance"] == f"/v1/jobs/{job['id']}"
    until(lambda: all(shard["state"] == "ended" for shard in shards(two, job["id"])))
    assert {shard["status"] for shard in shards(two, job["id"])} <= {"failed", "cancelled", "succeeded"}
    assert "cancelled" in {shard["status"] for shard in shards(two, job["id"])}
    until(lambda: not left(two, "shards") and not left(two, "inputs"))
    only_records_left(two, job["id"])


def test_a_cancel_ends_all(two: Stack) -> None:
    job_id = submit(two, inputs=TEXTS, metadata={"noop_seconds": 2})
    until(lambda: sum(shard["state"] == "running" for shard in shards(two, job_id)) == 2)
    answer = two.client.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.json()["status"] == "cancelled", answer.text
    assert two.client.post(f"/v1/jobs/{job_id}/cancel").status_code == 200
    until(lambda: {shard["status"] for shard in shards(two, job_id)} == {"cancelled"})
    assert two.client.get("/v1/whoami").json()["use"]["queued_jobs"] == 0
    until(lambda: not left(two, "shards") and not left(two, "inputs"))
    only_records_left(two, job_id)
    assert two.extract(["after"], model="tiny", layers=[0])["inputs"] == 1


def test_a_probe_on_a_split_extraction(two: Stack) -> None:
    answer = two.post(
        "/v1/probes",
        {
            "data": {"model": "tiny", "layers": [0], "inputs": TEXTS},
            "labels": [number % 2 for number in range(len(TEXTS))],
            "folds": 2,
        },
    )
    assert answer.json()["status"] == "succeeded", answer.text


def test_formats_of_a_joined_result(two: Stack) -> None:
    whole = two.extract(TEXTS, model="tiny", layers=[0, 2])
    content = two.client.get(whole["links"]["hidden_states"], params={"format": "npy"}).content
    assert np.array_equal(np.load(io.BytesIO(content)), states(two, whole)["hidden_states"])
    answer = two.client.get(whole["links"]["hidden_states"], params={"format": "json", "rows": "70-74"})
    assert len(orjson.loads(answer.content)["hidden_states"]) == 5


def test_idempotency_and_quotas(two: Stack) -> None:
    """The last one here: from now on the service asks for keys."""
    key = make_key(two, "anna", "--max-jobs", "1", "--max-inputs-per-day", str(len(TEXTS) + 1))
    body = {"model": "tiny", "layers": [0], "inputs": TEXTS, **SLOW}
    with httpx2.Client(base_url=two.url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as anna:
        until(lambda: anna.get("/v1/whoami").status_code == 200)
        first, again = (anna.post("/v1/extractions", json=body, headers={"Idempotency-Key": "1"}) for _ in range(2))
        assert first.json()["id"] == again.json()["id"]
        assert again.headers["idempotent-replayed"] == "true"
        assert anna.post("/v1/extractions", json=body).status_code == 429
        until(lambda: anna.get(f"/v1/jobs/{first.json()['id']}").json()["status"] == "succeeded")
        use = anna.get("/v1/whoami").json()["use"]
        assert (use["queued_jobs"], use["inputs_per_day"]) == (0, len(TEXTS))
