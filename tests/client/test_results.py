"""Hidden states: safetensors read, checked, mapped; broken transfers gone on with, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import os
import socketserver
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import save as to_safetensors

import bathyscope
from bathyscope import _results, errors


def artifact(rows: int = 3, offsets: list[int] | None = None, dtype: Any = np.float32) -> bytes:
    rng = np.random.default_rng(0)
    edges = np.array(offsets or range(0, 3 * rows + 1, 3), dtype=np.int64)
    arrays = {
        "hidden_states": rng.normal(size=(rows, 2, 4)).astype(dtype),
        "token_ids": np.arange(edges[-1], dtype=np.int64),
        "offsets": edges,
    }
    return to_safetensors(arrays, metadata={"model": "m"})


def states_of(content: bytes) -> np.ndarray[Any, Any]:
    from safetensors.numpy import load

    return load(content)["hidden_states"]


def fact(content: bytes, **more: Any) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **more}


def content_of(content: bytes, **headers: str) -> httpx2.Response:
    return httpx2.Response(200, content=content, headers=headers)


def test_a_small_artifact_is_fetched_once_and_copied(client: bathyscope.Client, wire: Any, answers: Any) -> None:
    content = artifact()
    wire.then(answers.ok(answers.extraction(**fact(content))), content_of(content))
    states = client.extractions.get("ext_1")
    first = states.hidden_states()
    np.testing.assert_array_equal(first, states_of(content))
    first[:] = 0  # an array of one's own
    np.testing.assert_array_equal(states.hidden_states(), states_of(content))
    assert states.token_ids().dtype == np.int64
    assert states.offsets().tolist() == [0, 3, 6, 9]
    assert [len(row) for row in states.by_input()] == [2, 2, 2]
    assert wire.calls == ["GET /v1/extractions/ext_1", "GET /v1/extractions/ext_1/hidden_states?format=safetensors"]
    assert wire.requests[1].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("small", [True, False])
def test_all_tokens_come_by_input(
    client: bathyscope.Client, wire: Any, answers: Any, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(_results, "IN_MEMORY", 10)
    content = artifact(rows=6, offsets=[0, 1, 4, 6])
    wire.then(answers.ok(answers.extraction(**fact(content), pooling="none")), content_of(content))
    parts = list(client.extractions.get("ext_1").by_input())
    assert [part.shape for part in parts] == [(1, 2, 4), (3, 2, 4), (2, 2, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), states_of(content))


@pytest.mark.parametrize(
    ("asked", "query"),
    [
        ({"layers": [8, np.int64(-1)]}, "layers=8%2C-1"),
        ({"layers": "all", "rows": "0-1"}, "layers=all&rows=0-1"),
        ({"rows": slice(None, 2)}, "rows=0-1"),
        ({"rows": slice(-2, None)}, "rows=1-2"),
        ({"rows": range(1, 3)}, "rows=1-2"),
        ({"rows": -1}, "rows=2-2"),
    ],
)
def test_a_part_is_fetched_as_a_part(
    client: bathyscope.Client, wire: Any, answers: Any, asked: dict[str, Any], query: str
) -> None:
    wire.then(answers.ok(answers.extraction()), content_of(artifact()))
    client.extractions.get("ext_1").hidden_states(**asked)
    assert wire.calls[1] == f"GET /v1/extractions/ext_1/hidden_states?format=safetensors&{query}"


@pytest.mark.parametrize("rows", [slice(0, 0), 3, range(0, 3, 2), slice(None, None, -1)])
def test_rows_that_are_none(client: bathyscope.Client, wire: Any, answers: Any, rows: Any) -> None:
    wire.then(answers.ok(answers.extraction()))
    with pytest.raises(errors.InvalidRequest, match="rows"):
        client.extractions.get("ext_1").hidden_states(rows=rows)


@pytest.mark.parametrize("small", [True, False])
def test_bfloat16_becomes_float32_exactly(
    client: bathyscope.Client, wire: Any, answers: Any, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(_results, "IN_MEMORY", 10)
        monkeypatch.setattr(_results, "_PIECE", 7)
    bits = np.random.default_rng(0).integers(0, 2**16, size=(5, 2, 4), dtype=np.uint16)
    bits[0, 0, :3] = 0x7F80, 0xFF80, 0x7FC0  # the infinities and NaN
    header = b'{"hidden_states":{"dtype":"BF16","shape":[5,2,4],"data_offsets":[0,80]}}'
    content = len(header).to_bytes(8, "little") + header + bits.tobytes()
    wire.then(answers.ok(answers.extraction(**fact(content), dtype="bfloat16")), content_of(content))
    array = client.extractions.get("ext_1").hidden_states()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array.view(np.uint32), bits.astype(np.uint32) * 2**16)
    assert np.isposinf(array[0, 0, 0])
    assert np.isnan(array[0, 0, 2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_large_artifact_is_mapped_and_may_be_written_to(
    client: bathyscope.Client, wire: Any, answers: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: Any
) -> None:
    monkeypatch.setattr(_results, "IN_MEMORY", 10)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(_results.tempfile, "tempdir", str(tmp_path))
    content = artifact(rows=1000, dtype=dtype)
    wire.then(answers.ok(answers.extraction(**fact(content))), content_of(content))
    states = client.extractions.get("ext_1")
    array = states.hidden_states()
    array[:] = 0
    again = states.hidden_states()
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing can be left behind
    del states, array
    gc.collect()
    np.testing.assert_array_equal(again, states_of(content))  # arrays outlive the object
    assert nameless_files(tmp_path) == 1
    del again
    gc.collect()
    assert nameless_files(tmp_path) == 0


def nameless_files(folder: Path) -> int:
    """Files in `folder` that this process still holds and that have no name any more."""
    held = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if target.startswith(str(folder)) and target.endswith("(deleted)"):
                held.add(target)
    return len(held)


def test_a_path_keeps_the_file(client: bathyscope.Client, wire: Any, answers: Any, tmp_path: Path) -> None:
    content = artifact()
    wire.then(answers.ok(answers.extraction(**fact(content))), content_of(content))
    kept = tmp_path / "states.safetensors"
    states = client.extractions.get("ext_1")
    array = states.hidden_states(path=kept)
    assert kept.read_bytes() == content
    states.hidden_states(path=kept)  # again, while the first is mapped
    np.testing.assert_array_equal(array, states_of(content))
    array[:] = 0
    assert kept.read_bytes() == content
    assert list(tmp_path.iterdir()) == [kept]


def test_save_knows_the_format_by_its_suffix(
    client: bathyscope.Client, wire: Any, answers: Any, tmp_path: Path
) -> None:
    content = artifact()
    wire.then(answers.ok(answers.extraction(**fact(content))), content_of(content))
    states = client.extractions.get("ext_1")
    assert states.save(tmp_path / "a.safetensors").read_bytes() == content
    states.save(tmp_path / "a.npy", rows=slice(0, 2))
    states.save(tmp_path / "b", format="arrow")
    assert [call.partition("?")[2] for call in wire.calls[1:]] == [
        "format=safetensors",
        "format=npy&rows=0-1",
        "format=arrow",
    ]
    with pytest.raises(errors.InvalidRequest, match="format"):
        states.save(tmp_path / "a.txt")
    wire.answers = [answers.problem("not-acceptable", 406, "bfloat16 comes as safetensors only")]
    with pytest.raises(errors.NotAcceptable):
        states.save(tmp_path / "c.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.safetensors", "b"]


def test_another_sha256_is_refused(client: bathyscope.Client, wire: Any, answers: Any, tmp_path: Path) -> None:
    content = artifact()
    wire.then(answers.ok(answers.extraction(**fact(content))), content_of(content[:-1] + b"x"))
    states = client.extractions.get("ext_1")
    with pytest.raises(errors.UnexpectedAnswer, match="SHA-256"):
        states.hidden_states()
    with pytest.raises(errors.UnexpectedAnswer, match="SHA-256"):
        states.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        (2**40).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"nope",
        (2).to_bytes(8, "little") + b"[]",
        *(
            len(header).to_bytes(8, "little") + header + bytes(16)
            for header in (
                b'{"hidden_states":{"dtype":"F32","shape":[4,2],"data_offsets":[0,32]}}',
                b'{"hidden_states":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}}',
                b'{"hidden_states":{"dtype":"F99","shape":[4],"data_offsets":[0,16]}}',
                b'{"hidden_states":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
                b'{"hidden_states":7}',
                b'{"other":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            )
        ),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(
    client: bathyscope.Client, wire: Any, answers: Any, content: bytes
) -> None:
    wire.then(answers.ok(answers.extraction(**fact(content))), content_of(content))
    with pytest.raises(errors.UnexpectedAnswer):
        client.extractions.get("ext_1").hidden_states()


def test_the_weights_of_a_probe(client: bathyscope.Client, wire: Any, answers: Any, tmp_path: Path) -> None:
    content = to_safetensors({"weight": np.ones((1, 4), np.float32), "bias": np.zeros(1, np.float64)})
    wire.then(answers.ok(answers.probe()), content_of(content))
    trained = client.probes.get("prb_1")
    assert trained.save_weights(tmp_path / "probe.safetensors").read_bytes() == content
    assert sorted(trained.weights()) == ["bias", "weight"]
    assert wire.calls[1:] == ["GET /v1/probes/prb_1/weights?format=safetensors", "GET /v1/probes/prb_1/weights"]


# A server whose connections break, over real sockets.


class Faulty(ThreadingHTTPServer):
    """Serves one artifact with `Range`; breaks off after so many bytes, a break an answer."""

    daemon_threads = True

    def __init__(self, content: bytes, breaks: list[int], *, etag: str = '"a"', ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.breaks, self.etag, self.ranges = content, breaks, etag, ranges
        self.swap: tuple[bytes, str] | None = None
        self.seen: list[str | None] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Faulty
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        if "/hidden_states" not in self.path:
            self.send_answer(200, self.fact().encode(), {"Content-Type": "application/json"})
            return
        asked = self.headers.get("Range")
        server.seen.append(asked)
        start, status = 0, 200
        headers = {"ETag": server.etag} if server.etag else {}
        if asked and server.ranges and self.headers.get("If-Range") == server.etag:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
        body = server.content[start:]
        cut = server.breaks.pop(0) if server.breaks else None
        if server.swap and cut is not None:
            server.content, server.etag = server.swap
        self.send_answer(status, body, headers, cut)

    def fact(self) -> str:
        return json.dumps(EXTRACTION | fact(self.server.content))

    def send_answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


EXTRACTION: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _fill(answers: Any) -> None:
    EXTRACTION.update(answers.extraction())


@pytest.fixture
def serve() -> Iterator[Any]:
    running: list[socketserver.BaseServer] = []

    def start(*args: Any, **kwargs: Any) -> Faulty:
        running.append(Faulty(*args, **kwargs))
        return running[-1]  # type: ignore[return-value]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("small", [True, False])
def test_a_broken_transfer_goes_on_where_it_broke(
    serve: Any, wire: Any, monkeypatch: pytest.MonkeyPatch, kind: str, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(_results, "IN_MEMORY", 1000)
    content = artifact(rows=20_000)
    # Many more breaks than retries: each brings something, so the count begins anew.
    server = serve(content, [100_000, 50_000, 0, 70_000, 1, 1, 1, 1, 1, 1])
    if kind == "sync":
        with bathyscope.Client(server.url) as client:
            array = client.extractions.get("ext_1").hidden_states()
    else:

        async def call() -> Any:
            async with bathyscope.AsyncClient(server.url) as client:
                return await (await client.extractions.get("ext_1")).hidden_states()

        array = asyncio.run(call())
    np.testing.assert_array_equal(array, states_of(content))
    assert server.seen[0] is None
    begins = [int(asked.removeprefix("bytes=")[:-1]) for asked in server.seen[1:] if asked]
    assert len(begins) == 10
    assert begins == sorted(begins)
    assert begins[-1] == 100_000 + 50_000 + 70_000 + 6


@pytest.mark.parametrize("how", ["no etag", "weak etag", "no ranges", "changed"])
def test_where_it_cannot_go_on_it_begins_again(serve: Any, wire: Any, tmp_path: Path, how: str) -> None:
    content, other = artifact(rows=2000), artifact(rows=3000)
    etag = {"no etag": "", "weak etag": 'W/"a"'}.get(how, '"a"')
    server = serve(content, [50_000], etag=etag, ranges=how != "no ranges")
    with bathyscope.Client(server.url) as client:
        states = client.extractions.get("ext_1")
        if how == "changed":
            server.swap = (other, '"b"')
        path = tmp_path / "part.safetensors"
        states.save(path, layers="all")  # a part, of which no SHA-256 is known
    assert path.read_bytes() == (other if how == "changed" else content)


def test_a_transfer_that_never_comes_through(serve: Any, wire: Any, tmp_path: Path) -> None:
    server = serve(artifact(rows=2000), [100] + [0] * 100)
    with bathyscope.Client(server.url) as client, pytest.raises(errors.ConnectionFailed):
        client.extractions.get("ext_1").save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert len(server.seen) == 5  # the first, and four more


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_memory_does_not_grow_with_the_result(tmp_path: Path, answers: Any, dtype: str) -> None:
    """A result of 400 MB; the process that reads it may grow by a tenth of that."""
    code = textwrap.dedent(
        """
        import hashlib, json, re, sys, threading
        from http.server import BaseHTTPRequestHandler, HTTPServer
        import httpx2, numpy, bathyscope

        dtype, extraction, cache = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
        width = {"F32": 4, "BF16": 2}[dtype]
        size, piece = 400 * 2**20, bytes(range(1, 129)) * 8192
        header = json.dumps({"hidden_states": {"dtype": dtype, "shape": [size // width // 1024, 2, 512],
                                               "data_offsets": [0, size]}}).encode()
        head = len(header).to_bytes(8, "little") + header
        digest = hashlib.sha256(head)
        for _ in range(400):
            digest.update(piece)
        extraction |= {"bytes": len(head) + size, "sha256": digest.hexdigest()}

        class Body(httpx2.SyncByteStream):
            def __iter__(self):
                yield head
                for _ in range(400):
                    yield piece

        def answer(request):
            if "hidden_states" not in request.url.path:
                return httpx2.Response(200, json=extraction)
            return httpx2.Response(200, headers={"content-length": str(extraction["bytes"])}, stream=Body())

        def anonymous():
            return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

        client = bathyscope.Client("http://t", transport=httpx2.MockTransport(answer), cache_dir=cache)
        states = client.extractions.get("ext_1")
        before, peak, done = anonymous(), 0.0, threading.Event()

        def watch():
            global peak
            while not done.wait(0.01):
                peak = max(peak, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        array = states.hidden_states()
        total = sum(float(array[i : i + 1000].astype("f8").max()) for i in range(0, len(array), 1000))
        done.set()
        watcher.join()
        print(json.dumps([peak - before, array.nbytes / 2**20]))
        """
    )
    extraction = json.dumps(answers.extraction())
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, dtype, extraction, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    grown, size = json.loads(ran.stdout)
    assert size >= 400
    assert grown < 60
    assert list(tmp_path.iterdir()) == []
