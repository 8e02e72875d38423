"""Adapters over HTTP: uploads within bounds, one resource for each digest, names, archives, deletes.

With engines that compute nothing (`tests/noop/adapters.py` says what an upload then means); what the numbers are worth
is proved in `test_adapters_live.py`.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.files import matching, paths_below
from tests.service.test_keys import as_user, make_key
from tests.service.test_manners import problem
from tests.stack import Stack, stack

LIMIT = 100_000


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(
        tmp_path_factory.mktemp("adapters"),
        noop=True,
        models=models,
        worker__adopt_seconds=0,
        limits__max_archive_bytes=LIMIT,
        limits__stall_seconds=2,
        limits__max_uploads_per_key=4,
    ) as running:
        yield running


def archive(seed: Any, **more: Any) -> bytes:
    return json.dumps({"seed": seed, **more}).encode()


def upload(client: httpx2.Client, content: bytes, wait: int = 60, headers: Any = None, **fields: str) -> Any:
    return client.post(
        "/v1/adapters",
        files={"file": ("../../etc/passwd", content)},
        data={"base_model": "tiny", **fields},
        headers={**({"Prefer": f"wait={wait}"} if wait else {}), **(headers or {})},
    )


def added(client: httpx2.Client, content: bytes, **fields: str) -> dict[str, Any]:
    answer = upload(client, content, **fields)
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert job["status"] == "succeeded", job
    return dict(client.get(job["resource"]).json())


def traces(stack: Stack) -> list[str]:
    """What lies in data folder and store that belongs to no adapter."""
    store = stack.data_dir / "artifacts"
    there = [*matching(stack.data_dir / "uploads", "*"), *matching(store / "inputs", "*")]
    there += matching(stack.data_dir / "scratch", "*/job_*")
    return [str(path) for path in there]


def left_behind(stack: Stack) -> list[str]:
    """What still lies there when the workers have had time to clear up: they do so after the job's end."""
    deadline = time.monotonic() + 20
    while (there := traces(stack)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return there


def files(stack: Stack) -> list[Path]:
    return [path for path in paths_below(stack.data_dir / "artifacts" / "adapters") if path.is_file()]


def test_from_upload_to_archive(noop: Stack) -> None:
    content = archive("first")
    answer = upload(noop.client, content, name="first", metadata='{"project": 7}')
    job = answer.json()
    assert (job["kind"], job["status"], job["attempt"]) == ("adapter", "succeeded", 1)
    assert job["request"]["file"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    adapter = noop.client.get(job["resource"]).json()
    assert adapter["id"].startswith("ad_")
    assert (adapter["name"], adapter["source"], adapter["base_model"]) == ("first", None, "tiny")
    assert adapter["tensors"] == {"read": 2, "applied": 2}
    assert len(adapter["effect"]["relative_change"]) == 5
    assert adapter["metadata"] == {"project": 7}
    assert adapter["expires_at"] is None
    assert noop.client.get("/v1/adapters").json()["data"][0] == adapter

    whole = noop.client.get(adapter["links"]["archive"])
    assert whole.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(whole.content)) as tar:
        assert sorted(tar.getnames()) == ["adapter_config.json", "adapter_model.safetensors"]
        member = tar.extractfile("adapter_model.safetensors")
        assert member is not None
        assert member.read() == content
    part = noop.client.get(adapter["links"]["archive"], headers={"Range": "bytes=500-1999"})
    assert part.status_code == 206
    assert part.content == whole.content[500:2000]
    tag = {"If-None-Match": whole.headers["etag"]}
    assert noop.client.get(adapter["links"]["archive"], headers=tag).status_code == 304
    assert left_behind(noop) == []

    noop.client.delete(f"/v1/adapters/{adapter['id']}")
    problem(noop.client.get(job["resource"]), 404, "not-found")
    problem(noop.client.get(adapter["links"]["archive"]), 404, "not-found")
    assert not files(noop)


def test_equal_weights_are_one_adapter(noop: Stack) -> None:
    mine = added(noop.client, archive("same"), name="a")
    again = added(noop.client, archive("same"))
    assert again == mine
    assert added(noop.client, archive("same"), name="another name") == mine
    at_once = [mine]

    def race(number: int) -> None:
        at_once.append(added(noop.client, archive("race", attach_seconds=0.3, nr=number)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(race, range(4)))
    assert len({adapter["id"] for adapter in at_once[1:]}) == 1
    assert left_behind(noop) == []
    for adapter in (mine, at_once[1]):
        assert noop.client.delete(f"/v1/adapters/{adapter['id']}").status_code == 204
    assert not files(noop)


def test_each_base_has_its_own_of_equal_weights(noop: Stack) -> None:
    """Two revisions of one repository are two bases, of which an adapter has the same files and the same digest."""
    content = archive("two bases", identity="org/model")
    made = [added(noop.client, content, base_model=base) for base in ("tiny", "minilm")]
    assert [adapter["base_model"] for adapter in made] == ["tiny", "minilm"]
    assert made[0]["digest"] == made[1]["digest"]
    assert [len(adapter["effect"]["relative_change"]) for adapter in made] == [5, 7]
    assert len(files(noop)) == 2
    assert [added(noop.client, content, base_model=base) for base in ("minilm", "tiny")] == made[::-1]
    noop.client.delete(f"/v1/adapters/{made[0]['id']}")
    assert noop.client.get(made[1]["links"]["archive"]).status_code == 200
    assert added(noop.client, content, base_model="minilm") == made[1]
    noop.client.delete(f"/v1/adapters/{made[1]['id']}")
    assert left_behind(noop) == []
    assert not files(noop)


def test_names_are_unique(noop: Stack) -> None:
    first = added(noop.client, archive("n1"), name="taken")
    problem(upload(noop.client, archive("n2"), name="taken"), 409, "state-conflict")
    assert added(noop.client, archive("n1"), name="taken") == first  # the same once more is no conflict
    slow = [archive(f"n{number}", attach_seconds=0.5) for number in (3, 4)]
    jobs = [upload(noop.client, content, wait=0, name="race").json() for content in slow]
    ended = [noop.job(job["id"]) for job in jobs]
    assert sorted(job["status"] for job in ended) == ["failed", "succeeded"]
    [lost] = [job for job in ended if job["status"] == "failed"]
    assert lost["error"]["type"] == "/problems/state-conflict"
    [won] = [job for job in ended if job["status"] == "succeeded"]
    for path in (f"/v1/adapters/{first['id']}", won["resource"]):
        noop.client.delete(path)
    freed = added(noop.client, archive("n2"), name="taken")
    noop.client.delete(f"/v1/adapters/{freed['id']}")
    assert not files(noop)
    assert left_behind(noop) == []


def test_files_are_shared_and_counted_beneath(tmp_path: Path, models: str) -> None:
    with stack(tmp_path, noop=True, models=models, worker__adopt_seconds=0) as running:
        anna, bert = make_key(running, "anna"), make_key(running, "bert")
        with as_user(running, anna) as hers, as_user(running, bert) as his:
            first, second = added(hers, archive("x"), name="n"), added(his, archive("x"), name="n")
            assert first["digest"] == second["digest"]
            assert first["id"] != second["id"]
            assert len(files(running)) == 2  # weights and config, once
            content = his.get(second["links"]["archive"]).content
            assert hers.delete(f"/v1/adapters/{first['id']}").status_code == 204
            assert his.get(second["links"]["archive"]).content == content
            third = added(hers, archive("x"))
            assert third["id"] != first["id"]
            assert len(files(running)) == 2
            problem(hers.get(f"/v1/adapters/{second['id']}"), 404, "not-found")
            problem(hers.delete(f"/v1/adapters/{second['id']}"), 404, "not-found")
            his.delete(f"/v1/adapters/{second['id']}")
            assert len(files(running)) == 2
            hers.delete(f"/v1/adapters/{third['id']}")
            assert not files(running)


BOUNDARY = "x" * 20


def multipart(*parts: tuple[str, bytes], end: bool = True) -> bytes:
    body = b""
    for disposition, content in parts:
        body += f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
    return body + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


FILE = ('form-data; name="file"; filename="a.tar"', b"content")
TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
WRONG = (422, "invalid-request")


@pytest.mark.parametrize(
    ("body", "status", "slug", "pointer"),
    [
        (multipart(FILE, ('form-data; name="source"', b"hf://a/b")), *WRONG, "/source"),
        (multipart(FILE, ('form-data; name="nonsense"', b"x")), *WRONG, "/nonsense"),
        (multipart(FILE, FILE), *WRONG, "/file"),
        (multipart(('form-data; name="name"', b"x")), *WRONG, "/file"),
        (multipart(('form-data; name="file"', b"")), *WRONG, "/file"),
        (multipart(FILE, ('form-data; name="name"', b"\xff")), *WRONG, "/name"),
        (multipart(FILE, ('form-data; name="name"', b"a\nb")), *WRONG, "/name"),
        (multipart(FILE, ('form-data; name="name"', b"n" * 129)), *WRONG, "/name"),
        (multipart(FILE, ('form-data; name="metadata"', b"[1")), *WRONG, "/metadata"),
        (multipart(FILE, ('form-data; name="metadata"', b"[1]")), *WRONG, "/metadata"),
        (multipart(FILE, ('form-data; name="metadata"', b'{"a": NaN}')), *WRONG, "/metadata"),
        (multipart(FILE, ('form-data; name="metadata"', b"[" * 60_000)), *WRONG, "/metadata"),
        (multipart(FILE, ('form-data; name="metadata"', b'{"a": [1, 1%s]}' % (b"0" * 20))), *WRONG, "/metadata/a/1"),
        (multipart(FILE, ('form-data; name="metadata"', b'{"a": "\\ud800"}')), *WRONG, "/metadata"),
        (multipart(FILE, ('form-data; name="metadata"', b'{"\\udfff": 1}')), *WRONG, "/metadata"),
        (multipart(FILE, ('form-data; name="priority"', b"urgent")), *WRONG, "/priority"),
        (multipart(FILE, ('form-data; name="webhook"', b"http://10.0.0.1/")), *WRONG, "/webhook"),
        (multipart(FILE, ('form-data; name="base_model"', b"none")), 404, "model-unknown", "/base_model"),
        (multipart(FILE, ("attachment", b"x")), 400, "malformed-body", None),
        (multipart(FILE, ('form-data; name="' + "n" * 100 + '"', b"x")), 400, "malformed-body", None),
        (multipart(FILE, end=False), 400, "malformed-body", None),
        (multipart(FILE)[:-20], 400, "malformed-body", None),
        (multipart(FILE) + b"and more" * 60_000, 413, "too-large", None),
        (b"no multipart at all", 400, "malformed-body", None),
        (b"", 400, "malformed-body", None),
        (multipart(FILE, ('form-data; name="name"\r\n' + "X-Y: z\r\n" * 50, b"x")), 400, "malformed-body", None),
        (multipart(FILE, ('form-data; name="name"; x="' + "y" * 9000 + '"', b"x")), 400, "malformed-body", None),
        (multipart(FILE, ('form-data; name="metadata"', b" " * 70_000)), 413, "too-large", None),
        (multipart(('form-data; name="file"', b"0" * (LIMIT + 1))), 413, "too-large", None),
    ],
)
def test_uploads_that_are_refused_leave_nothing(
    noop: Stack, body: bytes, status: int, slug: str, pointer: str | None
) -> None:
    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    before = noop.client.get("/v1/jobs").json()
    for content in (body, chunks()):  # with a Content-Length and without
        document = problem(noop.client.post("/v1/adapters", content=content, headers=TYPE), status, slug)
        assert [error["pointer"] for error in document.get("errors", [])] == ([pointer] if pointer else [])
    assert noop.client.get("/v1/jobs").json() == before
    assert left_behind(noop) == []


def test_too_large_is_told_before_it_arrives(noop: Stack) -> None:
    with socket.create_connection(("127.0.0.1", noop.port), 20) as connection:
        head = f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: {TYPE['Content-Type']}\r\n"
        connection.sendall(f"{head}Content-Length: {10**12}\r\n\r\n--".encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        document = json.loads(answer.read())
    assert (answer.status, document["type"], document["limit"]) == (413, "/problems/too-large", LIMIT)


@pytest.mark.parametrize("given", ["", "; boundary=", "; boundary=" + "b" * 71])
def test_a_body_without_a_boundary(noop: Stack, given: str) -> None:
    headers = {"Content-Type": f"multipart/form-data{given}"}
    problem(noop.client.post("/v1/adapters", content=multipart(FILE), headers=headers), 400, "malformed-body")


def test_compressed_as_a_whole_it_is_not_read(noop: Stack) -> None:
    headers = {**TYPE, "Content-Encoding": "gzip"}
    problem(noop.client.post("/v1/adapters", content=multipart(FILE), headers=headers), 415, "unsupported-media")


def test_an_upload_that_stalls_is_ended_and_uploads_have_places(noop: Stack) -> None:
    go_on = threading.Event()

    def slowly() -> Iterator[bytes]:
        yield multipart(FILE, end=False)
        go_on.wait(20)

    with ThreadPoolExecutor(4) as pool:
        stalled = [pool.submit(noop.client.post, "/v1/adapters", content=slowly(), headers=TYPE) for _ in range(4)]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and len(list((noop.data_dir / "uploads").glob("*"))) < 4:
            time.sleep(0.01)
        refused = noop.client.post("/v1/adapters", content=multipart(FILE), headers=TYPE)
        problem(refused, 429, "quota-exceeded")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and traces(noop):
            time.sleep(0.05)
        assert left_behind(noop) == []
        go_on.set()
        for one in stalled:
            problem(one.result(), 408, "request-timeout")


def test_the_same_upload_twice_is_one_job(noop: Stack) -> None:
    key = {"Idempotency-Key": "upload-1"}
    first = upload(noop.client, archive("idem"), headers=key)
    again = upload(noop.client, archive("idem"), headers=key)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json()["id"] == first.json()["id"]
    problem(upload(noop.client, archive("other"), headers=key), 422, "idempotency-mismatch")
    problem(upload(noop.client, archive("idem"), headers=key, name="n"), 422, "idempotency-mismatch")
    noop.client.delete(first.json()["resource"])
    assert left_behind(noop) == []


@pytest.mark.parametrize(
    "source",
    [
        "tinker://run/other_weights/x",
        "tinker://run/weights",
        "tinker://run/weights/../x",
        "hf://org",
        "hf://org/../x",
        "hf://org/repo@",
        "http://169.254.169.254/latest",
        "s3://b",
        "file://relative",
        "file:///etc/passwd",
        "file:///import/../etc/passwd",
        "",
        "x" * 2000,
    ],
)
def test_sources_that_are_none(noop: Stack, source: str) -> None:
    answer = noop.post("/v1/adapters", {"source": source})
    document = problem(answer, 422, "invalid-request")
    assert document["errors"][0]["pointer"] == "/source"


def test_an_adapter_that_is_refused_leaves_nothing(noop: Stack) -> None:
    job = upload(noop.client, archive("bad", refuse=True), name="bad").json()
    assert job["status"] == "failed"
    assert job["error"]["type"] == "/problems/adapter-tensors-unmatched"
    assert job["error"]["names"] == ["lora_A"]
    assert noop.client.get("/v1/adapters").json()["data"] == []
    deadline = time.monotonic() + 10
    while traces(noop) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(noop) == []
    assert not files(noop)
    adapter = added(noop.client, archive("good"), name="bad")  # the name was not used up
    noop.client.delete(f"/v1/adapters/{adapter['id']}")


def test_the_base_is_found_by_the_first_part(noop: Stack) -> None:
    content = archive("base", base="minilm")
    answer = noop.client.post("/v1/adapters", files={"file": content}, headers={"Prefer": "wait=60"})
    job = answer.json()
    assert job["status"] == "succeeded", job
    adapter = noop.client.get(job["resource"]).json()
    assert adapter["base_model"] == "minilm"
    noop.client.delete(job["resource"])
    refused = noop.client.post("/v1/adapters", files={"file": archive("b2")}, headers={"Prefer": "wait=60"}).json()
    assert refused["error"]["type"] == "/problems/adapter-base-mismatch"


@pytest.mark.parametrize("part", ["download", "attach"])
def test_cancelled_it_leaves_nothing(noop: Stack, part: str) -> None:
    seconds = {"download": {"fetch_seconds": 60}, "attach": {"attach_seconds": 60}}[part]
    job = upload(noop.client, archive(f"cancel {part}", **seconds), wait=0, name="cancelled").json()
    until_in(noop, job["id"], part)
    noop.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert noop.job(job["id"])["status"] == "cancelled"
    deadline = time.monotonic() + 10
    while (traces(noop) or files(noop)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(noop) == []
    assert not files(noop)
    assert noop.client.get("/v1/adapters").json()["data"] == []


def until_in(stack: Stack, job_id: str, stage: str) -> None:
    deadline = time.monotonic() + 60
    job: dict[str, Any] = {}
    while time.monotonic() < deadline:
        job = stack.client.get(f"/v1/jobs/{job_id}").json()
        assert job["status"] in ("queued", "running"), job
        if job["progress"]["stage"] == stage:
            return
        time.sleep(0.02)
    raise TimeoutError(job)


@pytest.mark.parametrize("part", ["download", "attach"])
def test_the_worker_is_killed(tmp_path: Path, models: str, part: str) -> None:
    seconds = {"download": {"fetch_seconds": 4}, "attach": {"attach_seconds": 4}}[part]
    with stack(tmp_path, noop=True, models=models, worker__adopt_seconds=0, jobs__lease_seconds=2) as running:
        job = upload(running.client, archive("kill", **seconds), wait=0, name="killed").json()
        until_in(running, job["id"], part)
        running.kill("worker0")
        assert running.client.get("/v1/adapters").json()["data"] == []
        running.start("worker1", "worker", BATHYSCOPE_WORKER__NAME="worker1")
        ended = running.job(job["id"])
        assert ended["status"] == "succeeded", ended
        [adapter] = running.client.get("/v1/adapters").json()["data"]
        assert adapter["name"] == "killed"
        assert f"/v1/adapters/{adapter['id']}" == ended["resource"]
        content = running.client.get(adapter["links"]["archive"]).content
        assert len(content) % 512 == 0
        assert len(files(running)) == 2
        deadline = time.monotonic() + 70  # scratch of the dead is swept by the living, as it starts
        while traces(running) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not traces(running)
        cached = tmp_path / "adapters"
        assert [path.name for path in cached.iterdir() if path.name != ".locks"] == [adapter["digest"]]
