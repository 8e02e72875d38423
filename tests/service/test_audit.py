"""The audit log: who did what, without contents; in Redis and on stderr, whatever becomes of Redis."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from tests.service.test_keys import as_user, make_key, run_keys
from tests.service.test_manners import problem
from tests.stack import Stack

TEXT, LABEL = "a text that nobody may see", "a-label-of-the-request"


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("audited"), models=models, noop=True, log_level="error")
    try:
        yield made.up()
    finally:
        made.down()


@pytest.fixture(scope="module")
def keys(audited: Stack) -> dict[str, str]:
    return {
        "anna": make_key(audited, "anna"),
        "boss": make_key(audited, "boss", "--scope", "admin"),
        "meter": make_key(audited, "meter", "--scope", "metrics"),
    }


@pytest.fixture
def boss(audited: Stack, keys: dict[str, str]) -> Iterator[httpx2.Client]:
    with as_user(audited, keys["boss"]) as client:
        yield client


def until(found: Callable[[], Any]) -> Any:
    """What `found` gives once it gives something: the log is written in the background."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (value := found()) is not None:
            return value
        time.sleep(0.05)
    raise TimeoutError("it never came")


def entries(boss: httpx2.Client, **query: Any) -> list[dict[str, Any]]:
    found, cursor = [], None
    while True:
        page = boss.get("/v1/audit", params={**query, **({"cursor": cursor} if cursor else {})}).json()
        found += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found


def the_one(boss: httpx2.Client, **wanted: Any) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        for entry in entries(boss):
            if all(entry[name] == value for name, value in wanted.items()):
                return entry
        return None

    found: dict[str, Any] = until(look)
    return found


def on_stderr(stack: Stack) -> list[dict[str, Any]]:
    lines = (stack.logs / "service.log").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry.get("logger") == "audit"]


def test_what_was_done_is_noted_with_its_ids(audited: Stack, keys: dict[str, str], boss: httpx2.Client) -> None:
    with as_user(audited, keys["anna"]) as anna:
        me = anna.get("/v1/whoami").json()["id"]
        made = anna.post(
            "/v1/extractions",
            json={"model": "tiny", "inputs": [TEXT], "metadata": {"label": LABEL}},
            headers={"Prefer": "wait=60", "X-HF-Token": "hf_of_the_request"},
        ).json()
        assert made["status"] == "succeeded", made
        ext = made["resource"].rpartition("/")[2]
        anna.get(f"/v1/extractions/{ext}/hidden_states?format=npy", headers={"Range": "bytes=0-9"})
        anna.get(f"/v1/jobs/{made['id']}")
        anna.delete(f"/v1/extractions/{ext}")
    entry = the_one(boss, method="POST", route="/v1/extractions")
    assert entry["ids"] == [made["id"], ext]
    assert (entry["key"], entry["key_name"], entry["client"]) == (me, "anna", "127.0.0.1")
    assert (entry["status"], entry["problem"]) == (200, None)
    read = the_one(boss, route="/v1/extractions/{extraction_id}/hidden_states")
    assert (read["method"], read["status"], read["ids"]) == ("GET", 206, [ext])
    assert the_one(boss, method="DELETE", route="/v1/extractions/{extraction_id}")["ids"] == [ext]
    assert all(entry["route"] != "/v1/jobs/{job_id}" for entry in entries(boss))
    assert [entry["ids"] for entry in entries(boss, key=me) if entry["method"] == "POST"] == [[made["id"], ext]]


def test_what_was_refused_is_noted(audited: Stack, keys: dict[str, str], boss: httpx2.Client) -> None:
    hers = "ext_01jd3v9yhhk5t2m0r8q4x7w6nz"
    with as_user(audited, None) as nobody, as_user(audited, "bsk_guess") as guesser:
        nobody.get(f"/v1/extractions/{hers}")
        guesser.post("/v1/probes", json={"extraction": hers})
        nobody.get(f"/{TEXT}")
    refused = the_one(boss, route="/v1/extractions/{extraction_id}", status=401)
    assert (refused["key"], refused["problem"], refused["ids"]) == (None, "unauthorized", [hers])
    assert the_one(boss, route="/v1/probes", status=401)["method"] == "POST"
    assert the_one(boss, route=None, status=401)["ids"] == []
    with as_user(audited, keys["meter"]) as meter, as_user(audited, keys["anna"]) as anna:
        meter.get("/v1/jobs")
        anna.get("/v1/audit")
        anna.get(f"/v1/probes/{hers.replace('ext', 'prb')}")
        anna.get(f"/v1/jobs/{hers.replace('ext', 'job')}")
        anna.post("/v1/extractions", json={"model": TEXT})
    assert the_one(boss, route="/v1/jobs", status=403)["key_name"] == "meter"
    assert the_one(boss, route="/v1/audit", status=403, key_name="anna")["problem"] == "forbidden"
    assert the_one(boss, route="/v1/probes/{probe_id}", status=404)["problem"] == "not-found"
    assert the_one(boss, route="/v1/jobs/{job_id}", status=404)["key_name"] == "anna"
    assert the_one(boss, route="/v1/extractions", status=422)["problem"] == "invalid-request"


def test_changes_of_keys_are_noted(audited: Stack, boss: httpx2.Client) -> None:
    made = json.loads(run_keys(audited, "create", "passing", "--json"))
    run_keys(audited, "limit", "passing", "--max-jobs", "3")
    run_keys(audited, "rotate", made["id"])
    run_keys(audited, "revoke", "passing")
    about = [entry for entry in entries(boss, key="cli") if made["id"] in entry["ids"]]
    assert [entry["route"] for entry in about] == ["keys revoke", "keys rotate", "keys limit", "keys create"]
    assert {(entry["method"], entry["status"]) for entry in about} == {("CLI", 0)}
    shown = json.loads(run_keys(audited, "audit", "--key", "cli", "--limit", "4", "--json"))
    assert shown == about


def test_pages_and_times(audited: Stack, keys: dict[str, str], boss: httpx2.Client) -> None:
    began = datetime.now(UTC).isoformat()
    with as_user(audited, keys["anna"]) as anna, as_user(audited, None) as nobody:
        for number in range(14):
            # One at a time: the two kinds have streams of their own, which do not tell who came first in a millisecond.
            (nobody if number % 2 else anna).delete("/v1/extractions/none")
            until(lambda known=number: len(entries(boss, since=began)) > known or None)
    everything = entries(boss, since=began, limit=100)
    mixed = [entry for entry in everything if entry["route"] == "/v1/extractions/{extraction_id}"]
    assert [entry["status"] for entry in mixed].count(401) == 7
    assert [entry["at"] for entry in mixed] == sorted((entry["at"] for entry in mixed), reverse=True)
    for size in (1, 3):
        paged = [entry for entry in entries(boss, since=began, limit=size) if entry["method"] == "DELETE"]
        assert paged == mixed
    me = anna_id(audited, keys)
    for size in (1, 3):
        own = entries(boss, since=began, limit=size, key=me)
        assert [entry["status"] for entry in own] == [404] * 7
    assert entries(boss, since="2999-01-01T00:00:00Z") == []
    assert entries(boss, key="nobody") == []
    for wrong in ({"cursor": "x"}, {"cursor": "LTEtMS0x"}, {"since": "yesterday"}, {"limit": 0}, {"limit": 5000}):
        problem(boss.get("/v1/audit", params=wrong), 422, "invalid-request")


def anna_id(stack: Stack, keys: dict[str, str]) -> str:
    with as_user(stack, keys["anna"]) as anna:
        return str(anna.get("/v1/whoami").json()["id"])


def test_the_log_holds_no_contents(audited: Stack, keys: dict[str, str], boss: httpx2.Client) -> None:
    """After the tests above: of all that they sent, nothing but ids and names of keys is in it."""
    everything = json.dumps(entries(boss)) + json.dumps(on_stderr(audited))
    for secret in (TEXT, "nobody may see", LABEL, "hf_of_the_request", "bsk_", "bytes=0-9", *keys.values()):
        assert secret not in everything, secret
    assert {"POST", "GET", "DELETE"} <= {entry["method"] for entry in on_stderr(audited)}


def test_neither_a_flood_nor_a_lost_redis_slows_or_fails_a_request(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = Stack(tmp_path_factory.mktemp("away"), log_level="error", audit_entries=100)
    try:
        made.up(workers=0)
        anna, boss_key = make_key(made, "anna"), make_key(made, "boss", "--scope", "admin")
        with as_user(made, anna) as client, as_user(made, None) as nobody, as_user(made, boss_key) as boss:
            client.delete("/v1/extractions/none")
            for _ in range(600):
                assert nobody.get("/v1/jobs").status_code == 401
            the_one(boss, key_name="anna", method="DELETE")  # the flood pushed nothing of hers out
            kept = [entry for entry in entries(boss, limit=1000) if entry["key"] is None]
            assert 100 <= len(kept) < 500
            made.valkey.stop()
            problem(client.delete("/v1/extractions/none"), 503, "unavailable")
            assert on_stderr(made)[-1]["status"] == 503
            made.valkey.start()
            until(lambda: client.get("/v1/whoami").status_code == 200 or None)
            the_one(boss, method="DELETE", status=503)  # it waited for Redis
            assert len([entry for entry in on_stderr(made) if entry["status"] == 401]) == 600
    finally:
        made.down()
