"""Keys: who may ask, and that nobody sees another's things."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bathyscope.types import ExtractionRequest
from bathyscope_backplane.broker import Broker, NewJob, connect
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.settings import Settings
from tests.files import contents_below
from tests.service.test_manners import problem
from tests.stack import Stack, stack


def run_keys(stack: Stack, *words: str, fails: bool = False) -> str:
    """What `bathyscope keys …` prints, or with `fails` its one sentence."""
    ended = subprocess.run(
        [sys.executable, "-m", "bathyscope.cli", "keys", *words],
        env=stack.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode != 0) == fails, ended.stderr
    return ended.stderr if fails else ended.stdout


def make_key(stack: Stack, name: str, *options: str) -> str:
    """A new key, which stands alone on stdout."""
    [key] = run_keys(stack, "create", name, *options).split()
    assert key.startswith("bsk_")
    return key


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A service with keys, and no worker: jobs stay queued."""
    with stack(tmp_path_factory.mktemp("keyed"), workers=0, models=models) as made:
        yield made


@pytest.fixture(scope="module")
def keys(keyed: Stack) -> dict[str, str]:
    return {
        "anna": make_key(keyed, "anna"),
        "bert": make_key(keyed, "bert"),
        "boss": make_key(keyed, "boss", "--scope", "admin"),
        "meter": make_key(keyed, "meter", "--scope", "metrics"),
    }


def as_user(stack: Stack, key: str | None) -> httpx2.Client:
    return httpx2.Client(base_url=stack.url, headers={"Authorization": f"Bearer {key}"} if key else {})


def test_only_the_open_routes_answer_without_a_key(keyed: Stack, keys: dict[str, str]) -> None:
    document = keyed.client.get("/openapi.json").json()
    with as_user(keyed, None) as nobody, as_user(keyed, "bsk_wrong") as stranger:
        for path, operations in document["paths"].items():
            for method in operations:
                where = path.replace("{", "").replace("}", "")
                for client in (nobody, stranger):
                    answer = client.request(method, where)
                    if path in ("/healthz", "/readyz"):
                        assert answer.status_code in (200, 503)
                    else:
                        problem(answer, 401, "unauthorized")
                        assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/docs", "/openapi.json", "/"):
            assert nobody.get(path).status_code == 200


def test_nobody_sees_anothers_jobs(keyed: Stack, keys: dict[str, str]) -> None:
    with (
        as_user(keyed, keys["anna"]) as anna,
        as_user(keyed, keys["bert"]) as bert,
        as_user(keyed, keys["boss"]) as boss,
    ):
        job = anna.post("/v1/extractions", json={"model": "tiny", "inputs": ["mine"]}).json()
        for method, path in (
            ("GET", f"/v1/jobs/{job['id']}"),
            ("POST", f"/v1/jobs/{job['id']}/cancel"),
            ("GET", f"/v1/jobs/{job['id']}/events"),
        ):
            problem(bert.request(method, path), 404, "not-found")
        assert anna.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued"
        assert job["id"] not in [entry["id"] for entry in bert.get("/v1/jobs").json()["data"]]
        assert job["id"] in [entry["id"] for entry in boss.get("/v1/jobs").json()["data"]]
        assert boss.get(f"/v1/jobs/{job['id']}").status_code == 200


def test_one_keys_idempotency_key_is_not_anothers(keyed: Stack, keys: dict[str, str]) -> None:
    body = {"model": "tiny", "inputs": ["same"]}
    with as_user(keyed, keys["anna"]) as anna, as_user(keyed, keys["bert"]) as bert:
        first = anna.post("/v1/extractions", json=body, headers={"Idempotency-Key": "guess"}).json()
        second = bert.post("/v1/extractions", json=body, headers={"Idempotency-Key": "guess"}).json()
    assert first["id"] != second["id"]


def test_scopes(keyed: Stack, keys: dict[str, str]) -> None:
    with (
        as_user(keyed, keys["anna"]) as anna,
        as_user(keyed, keys["meter"]) as meter,
        as_user(keyed, keys["boss"]) as boss,
    ):
        problem(anna.get("/metrics"), 403, "forbidden")
        assert meter.get("/metrics").status_code == 200
        problem(meter.get("/v1/jobs"), 403, "forbidden")
        problem(anna.post("/v1/models/tiny/load", json={}), 403, "forbidden")
        assert boss.post("/v1/models/tiny/load", json={}).status_code == 202
        assert anna.get("/v1/whoami").json()["name"] == "anna"


def test_a_revoked_key_is_refused_at_once(keyed: Stack, keys: dict[str, str]) -> None:
    key = make_key(keyed, "short")
    with as_user(keyed, key) as client:
        assert client.get("/v1/whoami").status_code == 200
        run_keys(keyed, "revoke", "short")
        problem(client.get("/v1/whoami"), 401, "unauthorized")


def test_a_metrics_key_reads_metrics_and_nothing_else(keyed: Stack, keys: dict[str, str]) -> None:
    document = keyed.client.get("/openapi.json").json()
    with as_user(keyed, keys["meter"]) as meter:
        for path, operations in document["paths"].items():
            for method in operations:
                answer = meter.request(method, path.replace("{", "").replace("}", ""))
                if path == "/metrics":
                    assert answer.status_code == 200
                elif path not in ("/healthz", "/readyz"):
                    problem(answer, 403, "forbidden")
        problem(meter.get("/nothing"), 403, "forbidden")


def test_a_rotated_key_overlaps_with_its_former_secret(keyed: Stack, keys: dict[str, str]) -> None:
    made = json.loads(run_keys(keyed, "create", "turning", "--json"))
    assert made["webhook_secret"].startswith("whsec_")
    with as_user(keyed, made["key"]) as former:
        job = former.post("/v1/extractions", json={"model": "tiny", "inputs": ["mine"]}).json()
        rotated = json.loads(run_keys(keyed, "rotate", "turning", "--overlap", "1h", "--json"))
        assert rotated["id"] == made["id"]
        assert rotated["webhook_secret"] != made["webhook_secret"]
        with as_user(keyed, rotated["key"]) as now:
            for client in (former, now):
                assert client.get("/v1/whoami").json()["id"] == made["id"]
                assert client.get(f"/v1/jobs/{job['id']}").status_code == 200
            run_keys(keyed, "rotate", "turning")
            for client in (former, now):
                problem(client.get("/v1/whoami"), 401, "unauthorized")
    listed = json.loads(run_keys(keyed, "list", "--json"))
    [entry] = [one for one in listed if one["name"] == "turning"]
    assert entry["last_used_on"] == time.strftime("%Y-%m-%d", time.gmtime())
    assert not {"key", "webhook_secret", "webhook_salt"} & set(entry)


def test_a_key_lapses(keyed: Stack, keys: dict[str, str]) -> None:
    made = json.loads(run_keys(keyed, "create", "brief", "--expires-in", "4s", "--json"))
    with as_user(keyed, made["key"]) as brief:
        first = brief.get("/v1/whoami")
        assert first.status_code == 401 or first.json()["expires_at"].startswith(made["expires_at"][:19])
        deadline = time.monotonic() + 30
        while (answer := brief.get("/v1/whoami")).status_code != 401:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        problem(answer, 401, "unauthorized")
    assert "--expires-in" in run_keys(keyed, "rotate", "brief", fails=True)
    renewed = run_keys(keyed, "rotate", "brief", "--expires-at", "2999-01-31").strip()
    with as_user(keyed, renewed) as again:
        assert again.get("/v1/whoami").json()["expires_at"] == "2999-01-31T00:00:00.000Z"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "anna"], "already"),
        (["create", "late", "--expires-at", "2001-01-01"], "lapsed"),
        (["create", "when", "--expires-in", "soon"], "90d"),
        (["create", "both", "--expires-in", "1d", "--expires-at", "2999-01-01"], "exclude"),
        (["create", "less", "--max-jobs", "-1"], "max-jobs"),
        (["limit", "anna"], "--max-jobs"),
        (["limit", "anna", "--no-limit", "fun"], "inputs-per-day"),
        (["rotate", "nobody"], "nobody"),
        (["revoke", "nobody"], "nobody"),
    ],
)
def test_faults_of_the_command_are_one_sentence(
    keyed: Stack, keys: dict[str, str], words: list[str], said: str
) -> None:
    sentence = run_keys(keyed, *words, fails=True)
    assert said in sentence
    assert "Traceback" not in sentence


def test_quotas(keyed: Stack, keys: dict[str, str]) -> None:
    one = {"model": "tiny", "inputs": ["a", "b", "c"]}
    limited = make_key(keyed, "limited", "--max-jobs", "3", "--max-inputs-per-day", "10", "--max-bytes", "9999")
    with as_user(keyed, limited) as client:

        def use() -> dict[str, int]:
            found: dict[str, int] = client.get("/v1/whoami").json()["use"]
            return {name: found[name] for name in ("queued_jobs", "inputs_per_day", "stored_bytes")}

        limits = client.get("/v1/whoami").json()["limits"]
        assert (limits["queued_jobs"], limits["inputs_per_day"], limits["stored_bytes"]) == (3, 10, 9999)
        first = client.post("/v1/extractions", json=one, headers={"Idempotency-Key": "once"})
        assert first.status_code == 202
        assert client.post("/v1/extractions", json=one, headers={"Idempotency-Key": "once"}).status_code == 202
        assert use() == {"queued_jobs": 1, "inputs_per_day": 3, "stored_bytes": 0}

        # The inputs of a probe's own extraction count once, with the probe; those of a refused one do not.
        data = {"model": "tiny", "inputs": [f"text {number}" for number in range(6)], "layers": [1]}
        probe = {"data": data, "labels": [0, 1] * 3, "folds": 2}
        assert client.post("/v1/probes", json=probe).status_code == 202
        assert use() == {"queued_jobs": 3, "inputs_per_day": 9, "stored_bytes": 0}
        refused = client.post("/v1/extractions", json={"model": "tiny", "inputs": ["a"]})
        problem(refused, 429, "quota-exceeded")
        assert {name: refused.json()[name] for name in ("quota", "used", "limit")} == {
            "quota": "jobs",
            "used": 3,
            "limit": 3,
        }
        assert int(refused.headers["retry-after"]) >= 1
        run_keys(keyed, "limit", "limited", "--no-limit", "jobs")
        for body, path in ((one, "/v1/extractions"), (probe, "/v1/probes")):
            refused = client.post(path, json=body)
            problem(refused, 429, "quota-exceeded")
            asked = len(body.get("inputs", data["inputs"]))  # type: ignore[arg-type]
            assert {name: refused.json()[name] for name in ("quota", "used", "limit", "asked")} == {
                "quota": "inputs_per_day",
                "used": 9,
                "limit": 10,
                "asked": asked,
            }
            left = 86_400 - time.time() % 86_400
            assert abs(int(refused.headers["retry-after"]) - left) < 60
        assert use() == {"queued_jobs": 3, "inputs_per_day": 9, "stored_bytes": 0}
        assert len(client.get("/v1/jobs").json()["data"]) == 3  # a refused probe leaves no extraction
        run_keys(keyed, "limit", "limited", "--no-limit", "inputs-per-day")
        assert client.post("/v1/extractions", json=one).status_code == 202
        assert client.get("/v1/whoami").json()["use"]["promised_bytes"] == (3 + 3) * 5 * 32 * 4 + 6 * 32 * 4


def test_stored_bytes_count_with_what_open_jobs_may_add(live: Stack) -> None:
    """On the running installation, whose key of no name has made nothing here, with keys for as long as this takes."""
    made = json.loads(run_keys(live, "create", "hoarder", "--max-bytes", "3000", "--json"))
    try:
        with as_user(live, made["key"]) as client:
            client.timeout = 90
            body = {"model": "tiny", "inputs": [f"text {number}" for number in range(10)], "layers": [1]}

            def extract() -> dict[str, Any]:
                answer = client.post("/v1/extractions", json=body, headers={"Prefer": "wait=60"})
                assert answer.status_code == 200, answer.text
                job: dict[str, Any] = answer.json()
                return job

            first = extract()
            assert first["status"] == "succeeded"
            size = client.get(first["resource"]).json()["bytes"]
            assert client.get("/v1/whoami").json()["use"]["stored_bytes"] == size
            refused = client.post("/v1/extractions", json=body)
            problem(refused, 429, "quota-exceeded")
            estimate = 10 * 32 * 4
            assert (refused.json()["quota"], refused.json()["used"], refused.json()["asked"]) == (
                "bytes",
                size,
                estimate,
            )
            for number in ("3,000", f"{size:,}", f"{estimate:,}"):
                assert number in refused.json()["detail"]
            assert client.delete(first["resource"]).status_code == 204
            assert extract()["status"] == "succeeded"
    finally:
        run_keys(live, "revoke", made["id"])


async def test_the_worker_holds_what_is_left_of_a_quota(live: Stack) -> None:
    """Where the front end could not tell the size, the job says how much is left."""
    request = ExtractionRequest(model="tiny", inputs=["a", "b"], layers=[1])
    spec = request.model_dump(exclude={"inputs", "dataset", "priority", "webhook"})
    redis = connect(live.environment["BATHYSCOPE_REDIS_URL"])
    try:
        for most, status in ((1 << 20, "succeeded"), (2 * 32 * 4 - 1, "failed")):
            job = NewJob(
                id=new_id("job"),
                kind="extraction",
                lane="model:tiny:none:auto",
                owner="local",
                payload=json.dumps({"spec": spec, "rows": ["a", "b"], "most_bytes": most}),
                resource_id=new_id("ext"),
            )
            await Broker(redis).submit(job)
            ended = await asyncio.to_thread(live.job, job.id)
            assert ended["status"] == status, ended
            if status == "failed":
                assert ended["error"]["type"] == "/problems/too-large"
    finally:
        await redis.aclose()


def test_keys_are_not_kept(keyed: Stack, keys: dict[str, str]) -> None:
    for path, content in contents_below(keyed.data_dir):
        for key in keys.values():
            assert key.encode() not in content, path


def test_it_refuses_to_start_in_public_without_keys(tmp_path: Path) -> None:
    made = Stack(tmp_path)
    name = socket.gethostname()
    public = ["0.0.0.0", "::", "", "0"]
    if not ipaddress.ip_address(socket.gethostbyname(name)).is_loopback:
        public.append(name)
    try:
        for host in public:
            assert "keys create" in made.refusal("service", "--host", host), host
    finally:
        made.down()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "file://"},
        {"Origin": "http://[broken"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "rebound.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "evil.example:80@127.0.0.1"},
        {"Host": ""},
    ],
    ids=str,
)
def test_a_page_of_another_site_gets_nothing_of_a_service_without_keys(live: Stack, headers: dict[str, str]) -> None:
    body = {"model": "tiny", "inputs": ["cross-site"]}
    before = live.client.get("/v1/jobs?limit=200").json()["data"]
    form = {**headers, "Content-Type": "text/plain"}
    for answer in (
        live.client.get("/v1/jobs", headers=headers),
        live.client.get("/metrics", headers=headers),
        live.client.post("/v1/extractions", json=body, headers=headers),
        live.client.post("/v1/extractions", content=json.dumps(body), headers=form),
        live.client.post("/v1/jobs/job_01jd3v9yhhk5t2m0r8q4x7w6nz/cancel", headers=form),
        live.client.delete("/v1/extractions/ext_01jd3v9yhhk5t2m0r8q4x7w6nz", headers=headers),
    ):
        assert answer.status_code in (400, 403), answer.text
        if answer.status_code == 403:
            problem(answer, 403, "forbidden")
        assert not [name for name in answer.headers if name.startswith("access-control")]
    asked = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = live.client.options("/v1/extractions", headers=asked)
    assert preflight.status_code >= 400
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert live.client.get("/v1/jobs?limit=200").json()["data"] == before


def test_a_form_is_no_request_even_from_nowhere(live: Stack) -> None:
    body = json.dumps({"model": "tiny", "inputs": ["form"]})
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = live.client.post("/v1/extractions", content=body, headers={"Content-Type": media_type})
        problem(answer, 415, "unsupported-media")


def test_a_program_of_this_machine_is_served_without_keys(live: Stack) -> None:
    own = {"Origin": live.url, "Sec-Fetch-Site": "same-origin"}
    assert live.client.get("/v1/jobs", headers=own).status_code == 200
    assert live.client.get("/v1/jobs", headers={"Sec-Fetch-Site": "none"}).status_code == 200
    for host in ("localhost", f"localhost:{live.port}", "[::1]:80", "127.9.9.9"):
        assert live.client.get("/v1/jobs", headers={"Host": host}).status_code == 200


def test_settings_are_checked_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bathyscope.errors import SetupError
    from bathyscope_backplane.settings import load_settings

    file = tmp_path / "settings.toml"
    monkeypatch.delenv("BATHYSCOPE_CONFIG", raising=False)
    file.write_text("prot = 1\n")
    with pytest.raises(SetupError, match="did you mean port"):
        load_settings(file)
    file.write_text("[limits]\nmax_row = 5\n")
    with pytest.raises(SetupError, match="did you mean max_rows"):
        load_settings(file)
    file.write_text("port = 9000\n[limits]\nmax_rows = 5\n")
    monkeypatch.setenv("BATHYSCOPE_LIMITS__MAX_JSON_BYTES", "77")
    settings: Settings = load_settings(file, port=9001)
    assert (settings.port, settings.limits.max_rows, settings.limits.max_json_bytes) == (9001, 5, 77)
