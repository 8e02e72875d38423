"""A table of requests that mean harm, byte for byte on a socket: each gets its problem, and the service goes on."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import os
import pickle
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from tests.stack import Stack, stack

HOST = "localhost"
NO_ID = "0" * 26


class Case(NamedTuple):
    """One request: its name, its bytes, and the answer."""

    name: str
    raw: bytes
    status: int
    slug: str


def raw(method: str, path: str, body: bytes | None = None, *headers: str, host: str | None = HOST) -> bytes:
    """A request as it stands on the wire."""
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *headers]
    if body is not None and not any(line.lower().startswith(("content-length", "transfer-enc")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def post(body: bytes, *headers: str, path: str = "/v1/extractions", kind: str | None = "application/json") -> bytes:
    """A POST of JSON, or of what calls itself that."""
    return raw("POST", path, body, *([f"Content-Type: {kind}"] if kind is not None else []), *headers)


def send(**members: Any) -> bytes:
    """An extraction with these members."""
    return post(orjson.dumps({"model": "tiny", "inputs": ["a"], **members}))


def get(path: str, *headers: str) -> bytes:
    """A GET."""
    return raw("GET", path, None, *headers)


def packed(content: bytes, encoding: str = "gzip") -> bytes:
    """A POST with a Content-Encoding."""
    return post(content, f"Content-Encoding: {encoding}")


GOOD = b'{"model": "tiny", "inputs": ["a"]}'
BODY, REQUEST, FIELDS, LARGE, MEDIA, LOST = (
    (400, "malformed-body"),
    (400, "malformed-request"),
    (422, "invalid-request"),
    (413, "too-large"),
    (415, "unsupported-media"),
    (404, "not-found"),
)
YAML_BOMB = b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nmodel: *c\n"
ZSTD = bytes.fromhex("28b52ffd0058080000") + bytes(64)

BODIES: list[tuple[str, bytes, tuple[int, str]]] = [
    ("no body at all", post(b""), BODY),
    ("null", post(b"null"), FIELDS),
    ("a list", post(b"[1, 2]"), FIELDS),
    ("a number", post(b"7"), FIELDS),
    ("cut short", post(GOOD[:-3]), BODY),
    ("two documents", post(GOOD + GOOD), BODY),
    ("NaN", post(b'{"model": "tiny", "inputs": ["a"], "metadata": {"x": NaN}}'), FIELDS),
    ("a lone surrogate", post(b'{"model": "tiny", "inputs": ["\\ud800"]}'), BODY),
    ("bytes that are no UTF-8", post(b'{"model": "\xc3\x28", "inputs": ["a"]}'), BODY),
    ("UTF-16", post('{"model": "tiny"}'.encode("utf-16")), BODY),
    ("lists in lists", post(b"[" * 100_000), BODY),
    ("objects in objects", post(b'{"a":' * 300 + b"1" + b"}" * 300), BODY),
    ("metadata in metadata", post(b'{"metadata":' + b'{"a":' * 250 + b"1" + b"}" * 251), BODY),
    ("five million values", post(b"[" + b"[]," * 4_500_000 + b"1]"), LARGE),
    ("a number of 40 digits", send(max_length=10**19 - 1), FIELDS),
    ("a number beyond all", post(b'{"model":"tiny","inputs":["a"],"metadata":{"a":1e999}}'), FIELDS),
    ("a hundred thousand fields", send(**{f"x{number}": 0 for number in range(100_000)}), FIELDS),
    ("the same field again", post(b'{"model":"tiny","inputs":["a"],"model":"none"}'), (404, "model-unknown")),
    ("a NUL in a name", send(model="tiny\0"), (404, "model-unknown")),
    ("a very long name", send(model="x" * 300), FIELDS),
    ("a path as a name", send(model="../../etc/passwd"), (404, "model-unknown")),
    ("inputs that are a text", send(inputs="a" * 1000), FIELDS),
    ("too many inputs", send(inputs=["a"] * 100_001), LARGE),
    ("too large a result", send(model="smollm2", pooling="none", inputs=["word " * 1600] * 200), LARGE),
    ("too much metadata", send(metadata={"a": "x" * 17_000}), FIELDS),
    ("too many layers", send(layers=list(range(5000))), FIELDS),
    ("layers by nothing", send(layers="every:0"), FIELDS),
    ("layers of a long word", send(layers="every:" + "9" * 10_000), FIELDS),
    ("both kinds of position", send(positions={"span": [0, 1], "tokens": [1]}), FIELDS),
    ("too many positions", send(pooling="none", positions={"tokens": list(range(5000))}), FIELDS),
    ("a token below zero", send(inputs=[{"token_ids": [-1]}]), FIELDS),
    ("a token beyond the vocabulary", send(inputs=[{"token_ids": [2**31 - 1]}]), (422, "invalid-input")),
    ("too many turns", send(inputs=[{"messages": [{"role": "user", "content": ""}] * 1025}]), FIELDS),
    ("a long role", send(inputs=[{"messages": [{"role": "r" * 65, "content": ""}]}]), FIELDS),
    ("an unknown priority", send(priority="urgent"), FIELDS),
    (
        "labels of a megabyte",
        post(orjson.dumps({"extraction": "x", "labels": ["l" * 2**20]}), path="/v1/probes"),
        FIELDS,
    ),
    ("YAML as JSON", post(b"model: tiny\ninputs: [a]\n"), BODY),
    ("YAML", post(b"model: tiny\ninputs: [a]\n", kind="application/yaml"), MEDIA),
    ("YAML aliases", post(YAML_BOMB, kind="application/x-yaml"), MEDIA),
    ("YAML for a probe", post(YAML_BOMB, kind="text/yaml", path="/v1/probes"), MEDIA),
    ("YAML tags", post(b"!!python/object/apply:os.system [id]", path="/v1/models/tiny/load"), BODY),
    ("a pickle", post(pickle.dumps(Path("/")), kind="application/octet-stream"), MEDIA),
    ("a form", post(b"model=tiny&inputs=a", kind="application/x-www-form-urlencoded"), MEDIA),
    ("parts", post(b"--b\r\n\r\n--b--", kind="multipart/form-data; boundary=b"), MEDIA),
    ("no type", post(GOOD, kind=None), MEDIA),
    ("a bomb of gzip", packed(gzip.compress(bytes(65 * 2**20), 9)), LARGE),
    ("a bomb of deflate", packed(zlib.compress(bytes(65 * 2**20), 9), "deflate"), LARGE),
    (
        "a bomb in chunks",
        post(b"", "Transfer-Encoding: chunked") + b"4000001\r\n" + bytes(2**26 + 1) + b"\r\n0\r\n\r\n",
        LARGE,
    ),
    (
        "a length beyond the limit",
        raw("POST", "/v1/extractions", b"", "Content-Type: application/json", f"Content-Length: {2**40}"),
        LARGE,
    ),
    ("a bomb of several members", packed(gzip.compress(GOOD) * 3), BODY),
    ("gzip in gzip", packed(gzip.compress(gzip.compress(GOOD))), BODY),
    ("two encodings", packed(gzip.compress(gzip.compress(GOOD)), "gzip, gzip"), MEDIA),
    ("gzip cut short", packed(gzip.compress(GOOD)[:-4]), BODY),
    ("gzip with a false sum", packed(gzip.compress(GOOD)[:-8] + bytes(8)), BODY),
    ("gzip with a name without end", packed(b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"n" * 10_000), BODY),
    ("no gzip", packed(b"plain"), BODY),
    ("no deflate", packed(b"plain", "deflate"), BODY),
    ("brotli", packed(b"\x0b\x02\x80{}\x03", "br"), MEDIA),
    ("zstd", packed(ZSTD, "zstd"), MEDIA),
    ("an encoding of a thousand letters", packed(GOOD, "x" * 1000), MEDIA),
    ("an empty idempotency key", post(GOOD, "Idempotency-Key: "), FIELDS),
    ("a long idempotency key", post(GOOD, f"Idempotency-Key: {'k' * 256}"), FIELDS),
]

HEADS: list[tuple[str, bytes, tuple[int, str]]] = [
    (
        "a hundred and one fields",
        get("/v1/jobs", *(f"X-{number}: 1" for number in range(101))),
        (431, "headers-too-large"),
    ),
    ("a field of 70 kB", get("/v1/jobs", "X: " + "y" * 70_000), (431, "headers-too-large")),
    ("a field name of 70 kB", get("/v1/jobs", "y" * 70_000 + ": x"), (431, "headers-too-large")),
    ("a URL of 40 kB", get("/v1/jobs?cursor=" + "a" * 40_000), (414, "url-too-long")),
    ("no host", raw("GET", "/v1/jobs", host=None), REQUEST),
    ("two hosts", get("/v1/jobs", "Host: evil.example"), REQUEST),
    ("another host", raw("GET", "/v1/jobs", host="evil.example"), (403, "forbidden")),
    ("another host in the URL", raw("GET", "http://evil.example/v1/jobs", host="evil.example"), (403, "forbidden")),
    ("a host that is none", raw("GET", "/v1/jobs", host="[::1"), (403, "forbidden")),
    ("another origin", post(GOOD, "Origin: https://evil.example"), (403, "forbidden")),
    ("a NUL in a field", get("/v1/jobs", "X: a\0b"), REQUEST),
    ("a field without a colon", get("/v1/jobs", "nonsense"), REQUEST),
    ("a space before the colon", get("/v1/jobs", "X-A : b"), REQUEST),
    ("a bare line feed in a field", get("/v1/jobs", "X: a\nX-B:\x01c"), REQUEST),
    ("length and chunks", post(GOOD, "Transfer-Encoding: chunked", "Content-Length: 5"), REQUEST),
    ("two lengths", post(GOOD, "Content-Length: 5", "Content-Length: 6"), REQUEST),
    ("a length below zero", post(GOOD, "Content-Length: -1"), REQUEST),
    ("a length that is no number", post(GOOD, "Content-Length: 0x10"), REQUEST),
    ("a length beyond 64 bits", post(GOOD, f"Content-Length: {10**30}"), REQUEST),
    ("an unknown transfer encoding", post(GOOD, "Transfer-Encoding: gzip"), REQUEST),
    ("a chunk of no number", post(b"zz\r\nhello\r\n", "Transfer-Encoding: chunked"), REQUEST),
    ("a chunk beyond 64 bits", post(b"f" * 20 + b"\r\n", "Transfer-Encoding: chunked"), REQUEST),
    ("a chunk longer than it says", post(b"2\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), REQUEST),
    ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", REQUEST),
    ("HTTP/0.9", b"GET /v1/jobs\r\n\r\n", REQUEST),
    ("HTTP/9.9", b"GET /v1/jobs HTTP/9.9\r\nHost: localhost\r\n\r\n", REQUEST),
    ("TLS", bytes.fromhex("16030100c8010000c40303") + bytes(64), REQUEST),
    ("noise", bytes(range(255, 0, -1)), REQUEST),
    ("the words of another protocol", b"EHLO localhost\r\n\r\n", REQUEST),
    ("a method in small letters", raw("get", "/v1/jobs"), REQUEST),
    ("a method of its own", raw("BREW", "/v1/jobs"), REQUEST),
    ("CONNECT", raw("CONNECT", "evil.example:443"), REQUEST),
    ("TRACE", raw("TRACE", "/v1/jobs"), (405, "method-not-allowed")),
    ("PUT", raw("PUT", "/v1/jobs", b""), (405, "method-not-allowed")),
    ("a star", raw("OPTIONS", "*"), LOST),
    ("a path of no letters", b"GET /v1/jobs\x80\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", REQUEST),
]

PATHS: list[tuple[str, bytes, tuple[int, str]]] = [
    ("a path that climbs", get("/v1/../../../../etc/passwd"), LOST),
    ("a path that climbs in disguise", get("/static-offline-docs/%2e%2e/%2e%2e/app.py"), LOST),
    ("a path of 8,000 letters", get("/v1/jobs/" + "a" * 8000), LOST),
    ("an id that is no UTF-8", get("/v1/jobs/%ff%fe"), LOST),
    ("an id with a NUL", get("/v1/jobs/job_%00"), LOST),
    ("an id with a line", get("/v1/jobs/job_%0d%0aSet-Cookie:%20a=b"), LOST),
    ("an id with a star", get("/v1/jobs/job_*"), LOST),
    ("an id of other digits", get(f"/v1/jobs/job_{'%D9%A1' * 26}"), LOST),
    ("an id that was never made", get(f"/v1/extractions/ext_{NO_ID}"), LOST),
    ("an id of another kind", get(f"/v1/probes/job_{NO_ID}/weights"), LOST),
    ("an id with a colon", get("/v1/extractions/ext_1:manifest/hidden_states"), LOST),
    ("an id that is a script", get("/v1/predictions/<script>alert(1)</script>"), LOST),
    ("a model that is a path", get("/v1/models/..%2f..%2fetc%2fpasswd"), (404, "model-unknown")),
    ("a cursor with a NUL", get("/v1/jobs?cursor=%00"), FIELDS),
    ("a cursor that is no UTF-8", get("/v1/jobs?cursor=%ff%fe"), FIELDS),
    ("a cursor too long", get("/v1/extractions?cursor=" + "a" * 300), FIELDS),
    ("a cursor of another list", get("/v1/models?cursor=_"), FIELDS),
    ("a cursor of a script", get("/v1/probes?cursor=bm9uc2Vuc2U"), FIELDS),
    ("a limit of nothing", get("/v1/jobs?limit=0"), FIELDS),
    ("a limit below zero", get("/v1/jobs?limit=-1"), FIELDS),
    ("a limit beyond 64 bits", get("/v1/jobs?limit=" + "9" * 40), FIELDS),
    ("a limit of 5,000 digits", get("/v1/jobs?limit=" + "9" * 5000), FIELDS),
    ("a kind that is none", get("/v1/jobs?kind=cake"), FIELDS),
    ("a range beyond the end", get("{states}", "Range: bytes=99999999999-"), (416, "range-not-satisfiable")),
    ("a range of nothing", get("{states}", "Range: bytes=-0"), (416, "range-not-satisfiable")),
    ("rows in reverse", get("{states}?rows=3-1"), FIELDS),
    ("rows beyond the end", get("{states}?rows=0-99999999999"), FIELDS),
    ("rows of other digits", get("{states}?rows=%C2%B2-%C2%B3"), FIELDS),
    ("a layer that is not held", get("{states}?layers=99"), FIELDS),
    ("a layer of 4,000 digits", get("{states}?layers=" + "9" * 4000), FIELDS),
    ("a layer a thousand times", get("{states}?layers=" + "1," * 1000 + "1"), FIELDS),
    ("layers of nothing", get("{states}?layers=,,,"), FIELDS),
    ("a format that runs code", get("{states}?format=pickle"), FIELDS),
    ("a type that is not given", get("{states}", "Accept: image/png"), (406, "not-acceptable")),
    (
        "a thousand types",
        get("{states}", "Accept: " + ",".join(f"a/{number};q=1" for number in range(1000))),
        (406, "not-acceptable"),
    ),
]
CASES = [Case(name, content, *answer) for name, content, answer in (*BODIES, *HEADS, *PATHS)]


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(port: int, content: bytes, *, seconds: float = 60) -> Answer:
    """Send bytes, read one answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it was all sent
            connection.sendall(content)
        found = http.client.HTTPResponse(connection)
        found.begin()
        body = found.read()
        return Answer(found.status, {name.lower(): value for name, value in found.headers.items()}, body)


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("hostile"), noop=True, models=models) as running:
        yield running


@pytest.fixture(scope="module")
def states(noop: Stack) -> str:
    """Path of the hidden states of an extraction."""
    return f"/v1/extractions/{noop.extract(['a', 'b', 'c', 'd'], model='tiny')['id']}/hidden_states"


def held(noop: Stack) -> dict[str, int]:
    """Anonymous memory in MiB, open files and threads of the service."""
    folder = Path(f"/proc/{noop.processes['service'].pid}")
    status = (folder / "status").read_text()
    return {
        "MiB": int(status.partition("RssAnon:")[2].split()[0]) // 1024,
        "files": len(os.listdir(folder / "fd")),
        "threads": int(status.partition("Threads:")[2].split()[0]),
    }


def check(noop: Stack, case: Case, states: str) -> None:
    answer = ask(noop.port, case.raw.replace(b"{states}", states.encode()))
    assert answer.status == case.status, (case.name, answer)
    assert answer.headers["content-type"] == "application/problem+json", (case.name, answer)
    document = orjson.loads(answer.body)
    assert document["type"] == f"/problems/{case.slug}", (case.name, document)
    assert document["status"] == case.status, (case.name, document)
    assert document["detail"], (case.name, document)
    assert len(answer.body) < 20_000, case.name


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_each_gets_its_problem(noop: Stack, states: str, case: Case) -> None:
    check(noop, case, states)
    assert noop.client.get("/healthz").status_code == 200


def settled(noop: Stack, most: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """What the service holds once closed connections are gone, or after some seconds."""
    for _ in range(50):
        if most(found := held(noop)):
            break
        time.sleep(0.1)
    return found


def test_nothing_is_left_of_them(noop: Stack, states: str) -> None:
    """All of them twice: what the second round adds is what each of a million would."""
    for case in CASES:
        check(noop, case, states)
    jobs = len(noop.client.get("/v1/jobs", params={"limit": 200}).json()["data"])
    before = held(noop)
    for case in CASES:
        check(noop, case, states)
    after = settled(noop, lambda found: found["files"] <= before["files"])
    assert after["MiB"] <= before["MiB"] + 24, (before, after)
    assert after["files"] <= before["files"] + 2, (before, after)
    assert after["threads"] <= before["threads"] + 2, (before, after)
    assert len(noop.client.get("/v1/jobs", params={"limit": 200}).json()["data"]) == jobs  # none of them made one
    assert noop.extract(["still here"], model="tiny")["shape"] == [1, 5, 32]
    assert "request.fault" not in noop.said()
    assert "Traceback" not in noop.said()
