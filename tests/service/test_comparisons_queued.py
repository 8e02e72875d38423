"""Comparisons that no worker takes: what is queued for them, asked again, dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from tests.service.test_manners import problem
from tests.stack import Stack, stack
from tests.tinker_standin import KEY, Standin

ROWS = {
    "inputs": [f"The city of number {number} is in country {number % 7}." for number in range(40)],
    "labels": [number % 2 == 0 for number in range(40)],
    "bootstrap": 0,
}


@pytest.fixture(scope="module")
def standin() -> Iterator[Standin]:
    with Standin() as server:
        yield server


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory, models: str, standin: Standin) -> Iterator[Stack]:
    """A service, and no worker."""
    tiny = dict(pair.split("=") for pair in models.split(","))["tiny"]
    with stack(
        tmp_path_factory.mktemp("queued"),
        workers=0,
        models=f"org/tiny={tiny}",
        adapters__tinker_url=standin.url,
        adapters__tinker_api_key=KEY,
        limits__inline_payload_bytes=1024,
    ) as made:
        yield made


def jobs(idle: Stack) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in idle.client.get("/v1/jobs?limit=200").json()["data"]}


def comparison_of(standin: Standin, *names: str) -> tuple[Any, dict[str, Any]]:
    """A run with checkpoints of these names, and the request that compares them."""
    run = standin.add_run(base_model="org/tiny", rank=4)
    for name in names:
        run.add_checkpoint("external_weights", name, {})
    return run, {**ROWS, "model": "org/tiny", "variants": ["base", f"tinker://{run.id}/*"]}


def test_cancelled_what_was_queued_for_it_ends_too(idle: Stack, standin: Standin) -> None:
    _, body = comparison_of(standin, "1", "2")
    before = jobs(idle)
    job = idle.post("/v1/comparisons", body, wait=0).json()
    made = {id: one for id, one in jobs(idle).items() if id not in before}
    assert sorted(one["kind"] for one in made.values()) == ["adapter", "adapter", "comparison", "extraction"]
    assert set(job["request"]["jobs"]) == set(made) - {job["id"]}
    rows = idle.data_dir / "artifacts" / "inputs"
    assert len(list(rows.glob("*"))) >= 1
    answer = idle.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert answer.json()["status"] == "cancelled"
    assert {jobs(idle)[id]["status"] for id in made} == {"cancelled"}
    assert list(rows.glob("*")) == []
    assert idle.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200  # again is no fault


def test_a_cancelled_probe_ends_the_extraction_of_its_own_and_no_other(idle: Stack) -> None:
    data = {"model": "org/tiny", "inputs": ROWS["inputs"]}
    own = idle.post("/v1/probes", {"data": data, "labels": ROWS["labels"]}, wait=0).json()
    states = idle.post("/v1/extractions", data, wait=0).json()
    other = idle.post("/v1/probes", {"extraction": states["id"], "labels": ROWS["labels"]}, wait=0).json()
    for probe in (own, other):
        assert idle.client.post(f"/v1/jobs/{probe['id']}/cancel").json()["status"] == "cancelled"
    assert [jobs(idle)[one]["status"] for one in own["request"]["jobs"]] == ["cancelled"]
    assert jobs(idle)[states["id"]]["status"] == "queued"
    idle.client.post(f"/v1/jobs/{states['id']}/cancel")


def test_the_same_key_asks_tinker_once(idle: Stack, standin: Standin) -> None:
    run, body = comparison_of(standin, "1")
    first = idle.post("/v1/comparisons", body, wait=0, **{"Idempotency-Key": "once"})
    asked = len(standin.state.requests)
    run.add_checkpoint("external_weights", "2", {})
    second = idle.post("/v1/comparisons", body, wait=0, **{"Idempotency-Key": "once"})
    assert (second.status_code, second.headers["Idempotent-Replayed"]) == (202, "true")
    assert second.headers["Location"] == first.headers["Location"]
    assert second.json()["request"] == first.json()["request"]
    other = {**body, "folds": 3}
    problem(idle.post("/v1/comparisons", other, wait=0, **{"Idempotency-Key": "once"}), 422, "idempotency-mismatch")
    assert len(standin.state.requests) == asked
    idle.client.post(f"/v1/jobs/{first.json()['id']}/cancel")


def test_a_request_that_died_half_way_and_a_run_that_went_on(idle: Stack, standin: Standin) -> None:
    """The first request queued all but the comparison itself; when it comes again the run has one checkpoint more."""
    run, body = comparison_of(standin, "1")
    first = idle.post("/v1/comparisons", body, wait=0, **{"Idempotency-Key": "half"}).json()
    scope = "\0".join(("local", "/v1/comparisons", "half", ""))
    with Redis.from_url(idle.environment["BATHYSCOPE_REDIS_URL"]) as redis:
        assert redis.delete(f"{{bathyscope}}:idem:{hashlib.sha256(scope.encode()).hexdigest()}") == 1
    run.add_checkpoint("external_weights", "2", {})
    again = idle.post("/v1/comparisons", body, wait=0, **{"Idempotency-Key": "half"}).json()
    assert again["id"] != first["id"]
    assert again["request"]["compared"] == ["base", "1", "2"]
    known = jobs(idle)
    [states] = [one for one in again["request"]["jobs"] if known[one]["kind"] == "extraction"]
    assert len(known[states]["request"]["adapter"]) == 3
    fetched = [one for one in again["request"]["jobs"] if known[one]["kind"] == "adapter"]
    assert fetched[0] in first["request"]["jobs"]  # what the first one queued is taken
    for one in (first, again):
        idle.client.post(f"/v1/jobs/{one['id']}/cancel")


@pytest.mark.parametrize("how", ["many runs", "a long run"])
def test_what_is_too_much_is_told_before_it_is_looked_up(idle: Stack, standin: Standin, how: str) -> None:
    run, body = comparison_of(standin, *(map(str, range(200)) if how == "a long run" else "1"))
    if how == "many runs":
        body["variants"] = ["base", *(f"tinker://{run.id}-{number}/*" for number in range(40))]
    asked, before = len(standin.state.requests), jobs(idle)
    found = problem(idle.post("/v1/comparisons", body, wait=0), 422, "invalid-request")
    [error] = found["errors"]
    assert error["pointer"] == ("/variants/1" if how == "a long run" else "/variants")
    assert "2 to 16" in error["detail"]
    assert len(standin.state.requests) - asked <= 4
    assert jobs(idle) == before
