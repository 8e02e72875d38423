"""The contract's manners: problems, idempotency, waiting, cancelling, listening, what is not offered yet."""

from __future__ import annotations

import gzip
import json
import threading
import time
import zlib
from typing import Any, ClassVar

import httpx2
import pytest

from tests.files import matching
from tests.stack import Stack


def problem(answer: httpx2.Response, status: int, slug: str) -> dict[str, Any]:
    """Check that the answer is a problem document, and give it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"/problems/{slug}"
    assert document["status"] == status
    assert document["title"]
    assert document["detail"]
    assert document["instance"]
    return document


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({"model": "tiny", "inputs": ["a"], "layer": [1]}, ["/layer"]),
        ({"model": "tiny"}, [""]),
        ({"inputs": ["a"]}, ["/model"]),
        ({"model": "tiny", "inputs": []}, ["/inputs"]),
        ({"model": "tiny", "inputs": ["a", 5, {"text": "b"}]}, ["/inputs/1", "/inputs/2"]),
        ({"model": "tiny", "inputs": ["a", {"token_ids": [1.5]}]}, ["/inputs/1/token_ids/0"]),
        ({"model": "tiny", "inputs": [{"messages": [{"role": "user"}]}]}, ["/inputs/0/messages/0/content"]),
        ({"model": "tiny", "inputs": ["a"], "layers": "some"}, ["/layers"]),
        ({"model": "tiny", "inputs": ["a"], "layers": [1, 1]}, ["/layers"]),
        ({"model": "tiny", "inputs": ["a"], "layers": [1, -4]}, ["/layers/1"]),
        ({"model": "tiny", "inputs": ["a"], "layers": [5]}, ["/layers/0"]),
        ({"model": "tiny", "inputs": ["a"], "pooling": "median"}, ["/pooling"]),
        ({"model": "tiny", "inputs": ["a"], "positions": {"tokens": [1]}}, [""]),
        ({"model": "tiny", "inputs": ["a"], "quantization": "2bit"}, ["/quantization"]),
        ({"model": "tiny", "inputs": ["a"], "max_length": 0}, ["/max_length"]),
        ({"model": "tiny", "inputs": [{"token_ids": []}]}, ["/inputs/0"]),
        ({"model": "tiny", "inputs": [{"token_ids": [300]}]}, ["/inputs/0/token_ids"]),
        (["not", "an", "object"], [""]),
    ],
)
def test_bad_fields_are_named(live: Stack, body: Any, pointers: list[str]) -> None:
    answer = live.client.post("/v1/extractions", json=body)
    slug = answer.json()["type"].rpartition("/")[2]
    assert slug in ("invalid-request", "invalid-input")
    document = problem(answer, 422, slug)
    assert [error["pointer"] for error in document["errors"]] == pointers
    assert all(error["detail"] for error in document["errors"])


def test_an_unknown_model_names_what_is_near(live: Stack) -> None:
    document = problem(live.post("/v1/extractions", {"model": "smolm2", "inputs": ["a"]}), 404, "model-unknown")
    assert "smollm2" in document["detail"]
    assert document["errors"][0]["pointer"] == "/model"


@pytest.mark.parametrize(
    ("content", "headers", "status", "slug"),
    [
        (b'{"model": "tiny"', {}, 400, "malformed-body"),
        (b'{"model": "tiny", "inputs": ["a"], "metadata": {"x": NaN}', {}, 400, "malformed-body"),
        (b'{"model": "tiny", "inputs": ["\\ud800"]}', {}, 400, "malformed-body"),
        (b"\xff\xfe", {}, 400, "malformed-body"),
        (b"[" * 100_000, {}, 400, "malformed-body"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported-media"),
        (b"{}", {"Content-Encoding": "br"}, 415, "unsupported-media"),
        (b"not gzip", {"Content-Encoding": "gzip"}, 400, "malformed-body"),
        (gzip.compress(b"{}" * 9, mtime=0)[:-9], {"Content-Encoding": "gzip"}, 400, "malformed-body"),
        (gzip.compress(b" " * (65 * 2**20), mtime=0), {"Content-Encoding": "gzip"}, 413, "too-large"),
        (zlib.compress(b" " * (65 * 2**20)), {"Content-Encoding": "deflate"}, 413, "too-large"),
    ],
)
def test_bodies_that_are_not_what_they_say(
    live: Stack, content: bytes, headers: dict[str, str], status: int, slug: str
) -> None:
    answer = live.client.post(
        "/v1/extractions", content=content, headers={"Content-Type": "application/json", **headers}
    )
    problem(answer, status, slug)


@pytest.mark.parametrize(
    ("content", "pointers"),
    [
        (b'{"model": "tiny", "inputs": ["a"], "metadata": {"x": NaN}}', ["/metadata/x"]),
        (b'{"model": "tiny", "inputs": ["a"], "metadata": {"a/b": [1, -Infinity, Infinity]}}',
         ["/metadata/a~1b/1", "/metadata/a~1b/2"]),
        (b"NaN", [""]),
        (b'{"inputs": [' + b"NaN," * 9_999 + b"NaN]}", [f"/inputs/{number}" for number in range(50)]),
    ],
)  # fmt: skip
def test_what_json_does_not_have_is_named_with_its_place(live: Stack, content: bytes, pointers: list[str]) -> None:
    answer = live.client.post("/v1/extractions", content=content, headers={"Content-Type": "application/json"})
    errors = problem(answer, 422, "invalid-request")["errors"]
    assert [error["pointer"] for error in errors] == pointers
    assert all("JSON has no" in error["detail"] and "leave" in error["detail"] for error in errors)


def test_the_limit_holds_for_chunked_bodies(live: Stack) -> None:
    def chunks() -> Any:
        for _ in range(70):
            yield b" " * 2**20

    answer = live.client.post("/v1/extractions", content=chunks(), headers={"Content-Type": "application/json"})
    problem(answer, 413, "too-large")


def test_a_compressed_body_is_read(live: Stack) -> None:
    content = gzip.compress(json.dumps({"model": "tiny", "inputs": ["a"], "layers": [0]}).encode())
    answer = live.client.post(
        "/v1/extractions", content=content, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}
    )
    assert answer.status_code == 202


def test_sizes_are_judged_before_anything_is_queued(live: Stack) -> None:
    rows = problem(live.post("/v1/extractions", {"model": "tiny", "inputs": ["a"] * 100_001}), 413, "too-large")
    assert "100,001" in rows["detail"]
    assert "100,000" in rows["detail"]
    huge = {"model": "smollm2", "pooling": "none", "inputs": ["word " * 1600] * 200}
    document = problem(live.post("/v1/extractions", huge), 413, "too-large")
    assert document["estimate"] > document["limit"]
    assert f"{document['estimate']:,}" in document["detail"]


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/v1/nothing", 404, "not-found"),
        ("GET", "/v1/jobs/job_1", 404, "not-found"),
        ("GET", "/v1/jobs/%2e%2e", 404, "not-found"),
        ("GET", "/v1/extractions/ext_00000000000000000000000000", 404, "not-found"),
        ("GET", "/v1/extractions/job_00000000000000000000000000", 404, "not-found"),
        ("GET", "/v1/models/none", 404, "model-unknown"),
        ("PUT", "/v1/jobs", 405, "method-not-allowed"),
        ("GET", "/v1/jobs?limit=0", 422, "invalid-request"),
        ("GET", "/v1/jobs?limit=x", 422, "invalid-request"),
        ("GET", "/v1/jobs?cursor=%00", 422, "invalid-request"),
        ("GET", "/v1/extractions?cursor=bm9uc2Vuc2U", 422, "invalid-request"),
        ("GET", "/v1/jobs?kind=cake", 422, "invalid-request"),
        ("GET", "/problems/none", 404, "not-found"),
    ],
)
def test_wrong_addresses(live: Stack, method: str, path: str, status: int, slug: str) -> None:
    problem(live.client.request(method, path), status, slug)


def test_every_problem_type_leads_to_a_page(live: Stack) -> None:
    from bathyscope.errors import PROBLEMS

    for slug in PROBLEMS:
        answer = live.client.get(f"/problems/{slug}")
        assert answer.status_code == 200
        assert slug in answer.text


def test_an_accepted_job_says_where_it_is(live: Stack) -> None:
    answer = live.post("/v1/extractions", {"model": "tiny", "inputs": ["a"], "layers": [0]}, wait=0)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert job["kind"] == "extraction"
    assert job["request"]["inputs"] == 1
    ended = live.job(job["id"])
    assert ended["resource"].startswith("/v1/extractions/ext_")
    assert ended["created_at"].endswith("Z")
    assert ended["expires_at"] > ended["finished_at"] >= ended["started_at"] >= ended["created_at"]


def test_prefer_wait_gives_the_finished_job(live: Stack) -> None:
    answer = live.post("/v1/extractions", {"model": "tiny", "inputs": ["a"], "layers": [0]})
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait"
    assert answer.json()["status"] == "succeeded"
    assert float(answer.headers["x-total-time"]) > 0


class TestIdempotency:
    BODY: ClassVar = {"model": "tiny", "inputs": ["once"], "layers": [0]}

    def post(self, live: Stack, key: str, **changes: Any) -> httpx2.Response:
        return live.client.post(
            "/v1/extractions", json={**self.BODY, **changes}, headers={"Idempotency-Key": key, "Prefer": "wait=30"}
        )

    def test_the_same_request_gives_the_same_job(self, live: Stack) -> None:
        first = self.post(live, "same")
        second = self.post(live, "same")
        assert "idempotent-replayed" not in first.headers
        assert second.headers["idempotent-replayed"] == "true"
        assert first.json()["id"] == second.json()["id"]

    def test_another_body_is_refused(self, live: Stack) -> None:
        self.post(live, "other")
        problem(self.post(live, "other", inputs=["twice"]), 422, "idempotency-mismatch")

    def test_two_at_the_same_moment_make_one_job(self, live: Stack) -> None:
        found: list[str] = []
        threads = [
            threading.Thread(target=lambda: found.append(self.post(live, "race").json()["id"])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert len(set(found)) == 1

    def test_a_refused_request_leaves_no_key(self, live: Stack) -> None:
        problem(self.post(live, "refused", model="none"), 404, "model-unknown")
        assert self.post(live, "refused").status_code == 200

    def test_large_inputs_of_a_replay_are_not_left_in_the_store(self, live: Stack) -> None:
        inputs = ["deep " * 50] * 400
        first = self.post(live, "large", inputs=inputs)
        self.post(live, "large", inputs=inputs)
        live.job(first.json()["id"])
        left = list((live.data_dir / "artifacts" / "inputs").glob("*"))
        assert not left

    def test_too_long_a_key(self, live: Stack) -> None:
        problem(self.post(live, "k" * 256), 422, "invalid-request")


def test_cancel_a_running_job_and_again_and_a_finished_one(live: Stack) -> None:
    body = {"model": "smollm2", "inputs": ["deep water " * 60] * 400}
    job = live.post("/v1/extractions", body, wait=0).json()
    while live.client.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued":
        time.sleep(0.05)
    assert live.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200
    ended = live.job(job["id"])
    assert ended["status"] == "cancelled"
    assert live.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200
    done = live.post("/v1/extractions", {"model": "tiny", "inputs": ["a"], "layers": [0]}).json()
    problem(live.client.post(f"/v1/jobs/{done['id']}/cancel"), 409, "state-conflict")
    assert not matching(live.data_dir / "scratch", "*/job_*")


def test_events_tell_of_progress_and_end(live: Stack) -> None:
    job = live.post("/v1/extractions", {"model": "smollm2", "inputs": ["deep water " * 40] * 60}, wait=0).json()
    names, last = [], ""
    with live.client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("id: "):
                last = line[4:]
            elif line.startswith("event: "):
                names.append(line[7:])
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                assert data["id"] == job["id"]
    assert names[-1] == "done"
    assert set(names[:-1]) == {"progress"}
    assert data["status"] == "succeeded"
    with live.client.stream("GET", f"/v1/jobs/{job['id']}/events", headers={"Last-Event-ID": last}) as answer:
        assert [line for line in answer.iter_lines() if line.startswith("event")] == ["event: done"]


def test_job_lists_can_be_filtered(live: Stack) -> None:
    live.extract(["listed"], model="tiny", layers=[0])
    page = live.client.get("/v1/jobs", params={"kind": "extraction", "status": "succeeded", "limit": 5}).json()
    assert page["data"]
    assert {job["status"] for job in page["data"]} == {"succeeded"}
    times = [job["created_at"] for job in page["data"]]
    assert times == sorted(times, reverse=True)


class TestKeyless:
    """Without keys, loopback is trusted and web pages are not."""

    def test_another_host_name_is_refused(self, live: Stack) -> None:
        problem(live.client.get("/v1/jobs", headers={"Host": "evil.example"}), 403, "forbidden")
        problem(live.client.get("/healthz", headers={"Host": "evil.example"}), 403, "forbidden")

    @pytest.mark.parametrize(
        "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
    )
    def test_another_site_is_refused(self, live: Stack, headers: dict[str, str]) -> None:
        answer = live.client.post("/v1/extractions", json={"model": "tiny", "inputs": ["a"]}, headers=headers)
        problem(answer, 403, "forbidden")

    def test_its_own_pages_are_served(self, live: Stack) -> None:
        answer = live.client.get("/v1/jobs", headers={"Origin": live.url})
        assert answer.status_code == 200


def test_docs_reach_no_other_host(live: Stack) -> None:
    import re

    page = live.client.get("/docs").text
    found = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert found
    for address in found:
        assert address.startswith("/"), address
        assert live.client.get(address).status_code == 200


def test_every_operation_is_described(live: Stack) -> None:
    document = live.client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation.get("summary"), where
            assert operation.get("description"), where
            if "requestBody" in operation:
                contents = operation["requestBody"]["content"]
                assert contents.get("application/json", {"example": "a file is sent"})["example"], where
            if path.startswith("/v1"):
                codes = set(operation["responses"])
                assert {"401", "403", "503"} <= codes, where
                for code in codes - {"200", "201", "202", "204", "206", "304"}:
                    content = operation["responses"][code]["content"]
                    assert list(content) == ["application/problem+json"], where
    text = json.dumps(document)
    for name in {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], name


def test_the_service_about_itself(live: Stack) -> None:
    assert live.client.get("/healthz").json() == {"status": "ok"}
    ready = live.client.get("/readyz").json()
    assert ready["ready"]
    assert ready["workers"] == 1
    me = live.client.get("/v1/whoami").json()
    assert me["name"] == "local"
    versions = live.client.get("/v1/version").json()
    assert versions["workers"][0]["packages"]["torch"]
    metrics = live.client.get("/metrics").text
    assert "bathyscope_workers 1.0" in metrics
    assert 'bathyscope_jobs_ended_total{kind="extraction",status="succeeded"}' in metrics


@pytest.mark.parametrize(
    ("path", "status"),
    [("/healthz", 200), ("/v1/jobs", 200), ("/docs", 200), ("/v1/models/none", 404), ("/v1/models/tiny/load", 404)],
)
def test_head_is_where_get_is(live: Stack, path: str, status: int) -> None:
    head, get = live.client.head(path), live.client.get(path)
    assert (head.status_code, head.content) == (status, b"")
    assert get.status_code == status
    assert head.headers["content-type"] == get.headers["content-type"]
    assert live.client.head(path).status_code == status  # the connection is still good


def test_head_ends_on_a_stream_without_end(live: Stack) -> None:
    job = live.post("/v1/extractions", {"model": "smollm2", "inputs": ["deep water " * 40] * 60}, wait=0).json()
    head = live.client.head(f"/v1/jobs/{job['id']}/events")
    assert head.headers["content-type"].startswith("text/event-stream")
    assert live.client.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200


def test_a_very_long_wait_is_taken_as_sixty_seconds(live: Stack) -> None:
    body = {"model": "tiny", "inputs": ["a"], "layers": [0]}
    for seconds in ("99999999999", "9" * 150, "00000000000060"):
        answer = live.client.post("/v1/extractions", json=body, headers={"Prefer": f"wait={seconds}"})
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


def test_the_list_of_models_is_paged(live: Stack) -> None:
    first = live.client.get("/v1/models", params={"limit": 2}).json()
    second = live.client.get("/v1/models", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [model["name"] for model in first["data"] + second["data"]] == ["minilm", "smollm2", "tiny"]
    assert second["next_cursor"] is None
    problem(live.client.get("/v1/models", params={"cursor": "_"}), 422, "invalid-request")


def test_loading_points_at_nothing_that_the_body_lacks(live: Stack) -> None:
    document = problem(live.post("/v1/models/none/load", {}), 404, "model-unknown")
    assert "errors" not in document
