"""Keys: who may ask, and that nobody sees another's things."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from bathyscope_backplane.settings import Settings
from tests.service.test_manners import problem
from tests.stack import Stack


def make_key(stack: Stack, name: str, *options: str) -> str:
    """A new key, as the command prints it."""
    made = subprocess.run(
        [sys.executable, "-m", "bathyscope.cli", "keys", "create", name, *options],
        env=stack.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return next(word for word in made.stdout.split() if word.startswith("bsk_"))


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    """A service with keys, and no worker: jobs stay queued."""
    made = Stack(tmp_path_factory.mktemp("keyed"), models=models)
    try:
        made.start("service", "service")
        made.wait_alive()
        yield made
    finally:
        made.down()


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
        subprocess.run(
            [sys.executable, "-m", "bathyscope.cli", "keys", "revoke", "short"],
            env=keyed.environment,
            capture_output=True,
            check=True,
            timeout=60,
        )
        problem(client.get("/v1/whoami"), 401, "unauthorized")


def test_keys_are_not_kept(keyed: Stack, keys: dict[str, str]) -> None:
    for path in keyed.data_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for key in keys.values():
                assert key.encode() not in content, path


def test_it_refuses_to_start_in_public_without_keys(tmp_path: Path) -> None:
    made = Stack(tmp_path)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "bathyscope.cli", "service", "--host", "0.0.0.0"],
            env=made.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        made.down()
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "keys create" in ended.stderr


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
