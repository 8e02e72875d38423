"""Requests that no honest client sends: each is a problem document, and costs the service next to nothing."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from bathyscope.errors import SetupError
from bathyscope_backplane.settings import load_settings
from tests.service.test_keys import as_user, keyed, keys
from tests.service.test_manners import problem
from tests.stack import Stack

__all__ = ["keyed", "keys"]  # fixtures

NINES = int("9" * 40)


def peak_mib(stack: Stack, *, reset: bool = False) -> int:
    """The most memory that the service has held since the last reset."""
    folder = Path(f"/proc/{stack.processes['service'].pid}")
    if reset:
        (folder / "clear_refs").write_text("5")
    status = (folder / "status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/extractions", {"model": "tiny", "inputs": [0] * 500_000}, 413),
        ("/v1/probes", {"data": {"model": "tiny", "inputs": [0] * 500_000}, "labels": [0, 1]}, 413),
        ("/v1/extractions", {"model": "tiny", "inputs": [0] * 100_000}, 422),
        ("/v1/extractions", {"model": "tiny", "inputs": [{"token_ids": ["x"] * 500_000}]}, 422),
        ("/v1/extractions", {"model": "tiny", "inputs": ["a"], "adapter": [0] * 500_000}, 422),
        ("/v1/extractions", {"model": "tiny", "inputs": ["a"], **{f"x{k}": 0 for k in range(200_000)}}, 422),
        ("/v1/probes", {"extraction": "ext_1", "labels": [None] * 500_000}, 422),
        ("/v1/probes", {"extraction": "ext_1", "labels": [1], "groups": [None] * 500_000}, 422),
        ("/v1/probes", {"extraction": "ext_1", "labels": [1], "split": [None] * 500_000}, 422),
    ],
)
def test_a_body_full_of_faults_costs_little(live: Stack, path: str, body: Any, status: int) -> None:
    content = orjson.dumps(body)
    before = peak_mib(live, reset=True)
    answer = live.client.post(path, content=content, headers={"Content-Type": "application/json"})
    document = problem(answer, status, "too-large" if status == 413 else "invalid-request")
    assert len(document.get("errors", [])) <= 50
    assert peak_mib(live) - before < 150


def test_faults_that_follow_each_other_are_told_together(live: Stack) -> None:
    body = {"data": {"model": "tiny", "inputs": ["a", 1, "b", {"token_ids": ["x"]}]}, "labels": [0, None, 1, [2]]}
    document = problem(live.post("/v1/probes", body), 422, "invalid-request")
    assert {error["pointer"] for error in document["errors"]} >= {
        "/data/inputs/1",
        "/data/inputs/3/token_ids/0",
        "/labels/1",
        "/labels/3",
    }


def test_nothing_is_kept_of_what_follows_a_compressed_body(live: Stack) -> None:
    content = gzip.compress(b'{"model": "tiny", "inputs": ["a"]}') + bytes(100 * 2**20)
    before = peak_mib(live, reset=True)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = live.client.post("/v1/extractions", content=content, headers=headers)
    assert "after the end" in problem(answer, 400, "malformed-body")["detail"]
    assert peak_mib(live) - before < 50


@pytest.mark.parametrize(
    ("members", "pointer"),
    [
        (b'"max_length": %d' % NINES, "/max_length"),
        (b'"metadata": {"a": [1, {"b": %d}]}' % NINES, "/metadata/a/1/b"),
        (b'"metadata": {"a": -%d}' % NINES, "/metadata/a"),
        (b'"metadata": {"a": [1e999]}', "/metadata"),
        (b'"metadata": {"a": "%s"}' % (b"x" * 17_000), "/metadata"),
    ],
)
def test_numbers_beyond_64_bits_are_named(live: Stack, members: bytes, pointer: str) -> None:
    content = b'{"model": "tiny", "inputs": ["a"], %b}' % members
    answer = live.client.post("/v1/extractions", content=content, headers={"Content-Type": "application/json"})
    document = problem(answer, 422, "invalid-request")
    assert [error["pointer"] for error in document["errors"]] == [pointer]


@pytest.mark.parametrize("headers", [{"Host": "[::1"}, {"Origin": "http://["}, {"Host": "[::1]x", "Origin": "["}])
def test_addresses_that_are_none_are_refused(live: Stack, headers: dict[str, str]) -> None:
    problem(live.client.get("/v1/jobs", headers=headers), 403, "forbidden")


@pytest.mark.parametrize("host", ["127.0.0.2:80", "[::1]:9", "localhost", "[::ffff:127.0.0.1]"])
def test_every_name_of_loopback_is_its_own(live: Stack, host: str) -> None:
    if host == "[::ffff:127.0.0.1]" and sys.version_info < (3, 13):
        host = "127.255.0.1"
    assert live.client.get("/v1/jobs", headers={"Host": host}).status_code == 200


def test_with_keys_any_host_name_is_served(keyed: Stack, keys: dict[str, str]) -> None:
    with as_user(keyed, keys["anna"]) as anna:
        for host in ("bathyscope.example", "[::1"):
            assert anna.get("/v1/jobs", headers={"Host": host}).status_code == 200
            assert anna.get("/healthz", headers={"Host": host}).status_code == 200
            problem(anna.get("/v1/nothing", headers={"Host": host}), 404, "not-found")
            problem(anna.get("/v1/jobs?limit=x", headers={"Host": host}), 422, "invalid-request")
            content = {"model": "tiny", "inputs": ["a"]}
            made = anna.post("/v1/extractions", json=content, headers={"Host": host, "Idempotency-Key": "hosts"})
            assert made.status_code == 202


def test_a_position_in_no_stream_is_the_beginning(live: Stack) -> None:
    job = live.post("/v1/extractions", {"model": "tiny", "inputs": ["a"], "layers": [0]}).json()
    for last in ("99999999999999999999-0", "0-18446744073709551616", "²-0"):
        headers = {b"Last-Event-ID": last.encode()}
        answer = live.client.get(f"/v1/jobs/{job['id']}/events", headers=headers)
        assert "event: done" in answer.text


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [("BATHYSCOPE_MODELS", "garbage", "name=source"), ("BATHYSCOPE_LIMITS", "abc", "limits")],
)
def test_faulty_settings_are_said_in_one_sentence(tmp_path: Path, variable: str, value: str, said: str) -> None:
    made = Stack(tmp_path)
    try:
        told = made.refusal("service", **{variable: value})
    finally:
        made.down()
    assert said in told
    assert "unforeseen" not in told


def test_a_settings_file_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATHYSCOPE_CONFIG", "")
    file = tmp_path / "settings.toml"
    file.write_bytes(b'host = "\xff"\n')
    with pytest.raises(SetupError, match="not valid TOML"):
        load_settings(file)
