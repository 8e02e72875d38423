"""Limits: each is told with its numbers before any work, and holds against clients that are slow, silent or many."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from bathyscope.errors import QuotaExceeded
from bathyscope_service.context import Memory, Places
from tests.service.test_hostile_more import GOOD, ask, get, held, post, raw
from tests.service.test_manners import problem
from tests.stack import Stack, stack

SMALL = {
    "max_resampled": 100_000,
    "max_body_bytes": 100_000,
    "max_rows": 50,
    "max_tokens": 2000,
    "max_values": 1000,
    "max_result_bytes": 20_000_000,
    "max_json_bytes": 20_000,
    "max_header_bytes": 8192,
    "max_headers": 20,
    "max_url_bytes": 1024,
    "max_connections": 40,
    "max_waiting": 3,
    "max_waiting_per_key": 2,
    "max_event_streams": 3,
    "max_event_streams_per_key": 2,
    "head_seconds": 1,
    "body_seconds": 1,
    "stall_seconds": 1,
    "max_buffered_bytes": 16 * 2**20,
    "max_buffered_bytes_per_key": 12 * 2**20,
    "key_jobs": 40,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    limits: dict[str, Any] = {f"limits__{name}": value for name, value in SMALL.items()}
    with stack(tmp_path_factory.mktemp("limits"), noop=True, models=models, **limits) as running:
        yield running


def refused(small: Stack, body: Any, status: int, slug: str, *, path: str = "/v1/extractions") -> dict[str, Any]:
    answer = small.client.post(path, json=body)
    return problem(answer, status, slug)


@pytest.mark.parametrize(
    ("members", "limit", "estimate"),
    [
        ({"inputs": ["a"] * 51}, 50, 51),
        ({"inputs": ["a" * 100] * 20}, 2000, 20 * 104),
        ({"inputs": ["a" * 4000] * 5, "max_length": 500, "truncation": "left"}, 2000, 2500),
        ({"inputs": [{"token_ids": [1] * 201}] * 10}, 1000, None),
        ({"inputs": [{"messages": [{"role": "user", "content": "a" * 400}]}] * 5}, 2000, None),
        ({"model": "smollm2", "inputs": ["a" * 100] * 18, "pooling": "none"}, 20_000_000, 18 * 104 * 31 * 576 * 4),
        ({"inputs": ["a" * 200_000]}, 100_000, None),
        ({"metadata": {"a": [[]] * 2000}}, 1000, None),
    ],
)
def test_sizes_are_told_with_their_numbers(small: Stack, members: Any, limit: int, estimate: int | None) -> None:
    before = len(small.client.get("/v1/jobs").json()["data"])
    body = {"model": "tiny", "inputs": ["a"], **members}
    for path, sent in (("/v1/extractions", body), ("/v1/probes", {"data": body, "labels": [0, 1]})):
        document = refused(small, sent, 413, "too-large", path=path)
        assert document["limit"] == limit
        assert document["estimate"] > limit
        assert estimate is None or document["estimate"] == estimate
        assert f"{limit:,}" in document["detail"]
        assert f"{document['estimate']:,}" in document["detail"]
    assert len(small.client.get("/v1/jobs").json()["data"]) == before


def test_texts_may_hold_as_many_commas_as_they_like(small: Stack) -> None:
    body = {"model": "tiny", "inputs": ['[{,,,\\"' * 50] * 4, "max_length": 400, "truncation": "right"}
    assert small.client.post("/v1/extractions", json=body).status_code == 202


def test_predictions_have_the_same_bounds(small: Stack) -> None:
    states = small.extract(["a", "b", "c", "d"], model="tiny")
    job = small.post("/v1/probes", {"extraction": states["id"], "labels": [0, 1, 0, 1], "folds": 2}).json()
    path = f"{job['resource']}/predict"
    assert refused(small, {"inputs": ["a"] * 51}, 413, "too-large", path=path)["limit"] == 50
    assert refused(small, {"inputs": ["a" * 500] * 5}, 413, "too-large", path=path)["limit"] == 2000


def test_heads_are_told_with_their_numbers(small: Stack) -> None:
    for content, status, limit in (
        (get("/v1/jobs", *(f"X-{number}: 1" for number in range(20))), 431, 20),
        (get("/v1/jobs", "X: " + "y" * 9000), 431, 8192),
        (get("/v1/jobs?cursor=" + "a" * 1100), 414, 1024),
    ):
        answer = ask(small.port, content)
        assert (answer.status, orjson.loads(answer.body)["limit"]) == (status, limit)
    # Exactly at a limit is within it: 19 fields and Host.
    assert ask(small.port, get("/v1/jobs", *(f"X-{number}: 1" for number in range(19)))).status == 200


def test_a_body_nested_too_deep_is_told_how_deep(small: Stack) -> None:
    document = problem(small.client.post("/v1/extractions", content=b"[" * 300, headers=JSON), 400, "malformed-body")
    assert document["limit"] == 201


JSON = {"Content-Type": "application/json"}


def open_to(small: Stack, *, buffer: int | None = None) -> socket.socket:
    made = socket.socket()
    if buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    made.settimeout(30)
    made.connect(("127.0.0.1", small.port))
    return made


def answer_on(connection: socket.socket) -> tuple[int, bytes]:
    found = http.client.HTTPResponse(connection)
    found.begin()
    return found.status, found.read()


def test_a_head_that_does_not_arrive(small: Stack) -> None:
    with open_to(small) as silent, open_to(small) as slow:
        slow.sendall(b"GET /v1/jobs HTTP/1.1\r\nHost: loc")
        status, body = answer_on(slow)
        assert (status, orjson.loads(body)["type"]) == (408, "/problems/request-timeout")
        assert silent.recv(1) == b""


def test_a_head_that_never_ends(small: Stack) -> None:
    with open_to(small) as endless:
        endless.sendall(b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\n")
        with contextlib.suppress(OSError):
            for _ in range(1000):
                endless.sendall(b"X: " + b"y" * 1000 + b"\r\n")
        status, body = answer_on(endless)
        assert (status, orjson.loads(body)["type"]) == (431, "/problems/headers-too-large")


@pytest.mark.parametrize(
    ("before", "more"),
    [
        (get("/healthz") + get("/v1/jobs/{job}", "Prefer: wait=60") + b"GET / HTTP/1.1\r\nX: ", b"y" * 1000),
        (post(b"1\r\n{\r\n0\r\n", "Transfer-Encoding: chunked") + b"X: ", b"y" * 1000),
        (post(b"1;", "Transfer-Encoding: chunked"), b"y" * 1000),
        (post(b"1\r\n{\r\n0\r\n", "Transfer-Encoding: chunked"), b"X: y\r\n" * 100),
    ],
    ids=["behind a wait", "a trailer", "a chunk's extension", "trailers"],
)
def test_what_is_no_content_is_bounded_too(small: Stack, before: bytes, more: bytes) -> None:
    body = {"model": "tiny", "inputs": ["a"], "metadata": {"noop_seconds": 60}}
    job = small.post("/v1/extractions", body, wait=0).json()["id"]
    sent = 0
    with open_to(small) as endless, contextlib.suppress(OSError):
        endless.sendall(before.replace(b"{job}", job.encode()))
        for _ in range(20_000):
            endless.sendall(more)
            sent += len(more)
    assert sent < 10 * 2**20  # buffers of sockets included
    small.client.post(f"/v1/jobs/{job}/cancel")
    assert "request.fault" not in small.said()


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_body_that_does_not_arrive(small: Stack, encoding: str) -> None:
    content = gzip.compress(GOOD) if encoding == "gzip" else GOOD
    with open_to(small) as slow:
        slow.sendall(post(content, f"Content-Encoding: {encoding}")[:-5])
        status, body = answer_on(slow)
        assert (status, orjson.loads(body)["type"]) == (408, "/problems/request-timeout")


def test_pipelined_requests_are_answered_in_order(small: Stack) -> None:
    with open_to(small) as connection:
        connection.sendall(get("/healthz") + get("/v1/jobs/none") + get("/healthz"))
        found = [answer_on_more(connection) for _ in range(3)]
    assert found == [200, 404, 200]


def answer_on_more(connection: socket.socket) -> int:
    """The status of the next of several answers: read byte by byte, so that nothing of the one after is taken."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while length:
        length -= len(connection.recv(length))
    return int(head.split()[1])


def test_pipelining_without_end_is_ended(small: Stack) -> None:
    with open_to(small) as connection:
        with contextlib.suppress(OSError):
            for _ in range(200):
                connection.sendall(get("/v1/jobs") * 500)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                pass
    assert small.client.get("/healthz").status_code == 200


def test_a_closed_connection_gives_its_places_back(small: Stack) -> None:
    """Also when another request was sent behind the one that waits."""
    slow = small.post("/v1/extractions", {"model": "tiny", "inputs": ["a"], "metadata": {"noop_seconds": 60}}, wait=0)
    job = slow.json()["id"]
    for behind in (b"", get("/healthz"), get("/healthz") * 4):
        for path in (f"/v1/jobs/{job}/events", f"/v1/jobs/{job}"):
            with open_to(small) as connection:
                connection.sendall(get(path, "Prefer: wait=60") + behind)
                assert until(lambda: sum(in_use(small).values()) == 1), in_use(small)
            assert until(lambda: not sum(in_use(small).values())), (path, behind, in_use(small))
    assert small.client.post(f"/v1/jobs/{job}/cancel").status_code == 200


def in_use(small: Stack) -> dict[str, int]:
    use = small.client.get("/v1/whoami").json()["use"]
    return {name: use[name] for name in ("waiting_requests", "event_streams")}


def until(true: Any, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


def test_event_streams_and_waits_are_bounded(small: Stack) -> None:
    body = {"model": "tiny", "inputs": ["a"], "metadata": {"noop_seconds": 60}}
    job = small.post("/v1/extractions", body, wait=0).json()["id"]
    with contextlib.ExitStack() as opened:
        for path in (f"/v1/jobs/{job}/events", f"/v1/jobs/{job}"):
            for _ in range(2):
                opened.enter_context(open_to(small)).sendall(get(path, "Prefer: wait=60"))
        assert until(lambda: in_use(small) == {"waiting_requests": 2, "event_streams": 2}), in_use(small)
        document = problem(small.client.get(f"/v1/jobs/{job}/events"), 429, "quota-exceeded")
        assert (document["limit"], document["estimate"]) == (2, 3)
        answer = small.client.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=60"})  # past the bound: at once
        assert answer.json()["status"] in ("queued", "running")
    assert small.client.post(f"/v1/jobs/{job}/cancel").status_code == 200


def test_a_download_that_is_never_read_is_ended(small: Stack) -> None:
    states = small.extract(["a" * 90] * 2, model="smollm2", pooling="none")
    path = f"/v1/extractions/{states['id']}/hidden_states"
    assert states["bytes"] > 12 * 10**6  # more than the buffers of a socket
    with contextlib.ExitStack() as opened:
        for _ in range(2):
            opened.enter_context(open_to(small, buffer=4096)).sendall(get(path))
        document = problem(until_refused(small, path), 429, "quota-exceeded")
        assert document["limit"] == SMALL["max_buffered_bytes_per_key"]
        assert until(lambda: small.client.get(path).status_code == 200)  # the reader that does not read is let go


def until_refused(small: Stack, path: str) -> Any:
    """Ask for a copy as JSON's size would be until the memory of the key is full."""
    with contextlib.ExitStack() as opened:
        for _ in range(40):
            opened.enter_context(open_to(small, buffer=4096)).sendall(get(path))
            answer = small.client.get(path)
            if answer.status_code == 429:
                return answer
    raise AssertionError("it was never refused")


def test_idle_connections_make_room(small: Stack) -> None:
    with contextlib.ExitStack() as opened:
        idle = [opened.enter_context(open_to(small)) for _ in range(3 * int(SMALL["max_connections"]))]
        assert ask(small.port, get("/healthz")).status == 200
        assert held(small)["files"] < 2 * int(SMALL["max_connections"])
        assert idle[0].recv(1) == b""


def test_with_every_connection_busy_a_new_one_is_told(small: Stack) -> None:
    length = f"Content-Length: {len(GOOD)}"
    told: list[int] = []
    with contextlib.ExitStack() as opened:
        connections = []
        for _ in range(60):
            connection = opened.enter_context(open_to(small))
            with contextlib.suppress(OSError):
                connection.sendall(raw("POST", "/v1/extractions", b"{", "Content-Type: application/json", length))
            connections.append(connection)
        for connection in reversed(connections):
            with contextlib.suppress(OSError, http.client.HTTPException):
                told.append(answer_on(connection)[0])
    assert 503 in told, told
    assert until(lambda: small.client.get("/healthz").status_code == 200)


def test_intervals_that_would_take_too_long(small: Stack) -> None:
    extraction = small.extract([f"text {number}" for number in range(10)], model="tiny", layers=[1, 2])
    body = {"extraction": extraction["id"], "labels": [0, 1] * 5}
    document = problem(small.post("/v1/probes", body | {"bootstrap": 10_000}), 422, "invalid-request")
    assert document["errors"][0]["pointer"] == "/bootstrap"
    assert "ask for 5,000 at most" in document["errors"][0]["detail"]
    answer = small.post("/v1/probes", body | {"bootstrap": 10_000, "layers": [1]}, wait=0)
    assert answer.status_code == 202, answer.text


def test_a_key_has_so_many_jobs(small: Stack) -> None:
    body = {"model": "tiny", "inputs": ["a"], "metadata": {"noop_seconds": 60}}
    answers = [small.post("/v1/extractions", body, wait=0) for _ in range(45)]
    document = problem(answers[-1], 429, "quota-exceeded")
    assert "40" in document["detail"]
    for answer in answers:
        if answer.status_code == 202:
            small.client.post(f"/v1/jobs/{answer.json()['id']}/cancel")


def test_clients_that_come_and_go_do_not_stop_it(small: Stack) -> None:
    """Many connections that come and go at once, some halfway through a request."""

    def storm() -> None:
        for number in range(30):
            with contextlib.suppress(OSError), open_to(small) as connection:
                connection.sendall((post(GOOD), get("/v1/jobs"), b"\x00" * 100)[number % 3][: 10 + 7 * number])

    threads = [threading.Thread(target=storm) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert until(lambda: ask(small.port, get("/healthz")).status == 200)
    assert small.extract(["after"], model="tiny")["inputs"] == 1
    assert "request.fault" not in small.said()


def test_memory_is_counted_by_key_and_in_all() -> None:
    places = Places(100, 60)
    anna, berta = Memory(places, "anna"), Memory(places, "berta")
    anna.hold(60)
    with pytest.raises(QuotaExceeded):
        anna.hold(1)
    berta.hold(40)
    with pytest.raises(QuotaExceeded):
        berta.hold(1)
    anna.release()
    anna.release()
    berta.hold(20)
    assert places.taken == {"berta": 60}


def test_the_data_folder_holds_nothing_of_what_was_refused(small: Stack) -> None:
    inputs = small.data_dir / "artifacts" / "inputs"
    assert not inputs.exists() or not list(Path(inputs).glob("*"))
