"""Adapters in the SDK and the CLI: against a real service, and what asks Tinker against a fake of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx2
import pytest

import bathyscope
from bathyscope import errors
from tests.stack import Stack, stack


@pytest.fixture(scope="module")
def noop(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("sdk"), noop=True, models=models, worker__adopt_seconds=0) as running:
        yield running


@pytest.fixture
def service(noop: Stack) -> Iterator[bathyscope.Client]:
    with bathyscope.Client(noop.url) as client:
        yield client


def packed(folder: Path, seed: str, **more: Any) -> Path:
    path = folder / "adapter.tar"
    path.write_text(json.dumps({"seed": seed, **more}))
    return path


def test_from_a_file_and_back(service: bathyscope.Client, tmp_path: Path) -> None:
    path = packed(tmp_path, "sdk", filler="x" * 3_000_000)  # more than one piece
    job = service.adapters.create(file=path, base_model="tiny", name="mine", metadata={"a": [1]})
    adapter = job.wait()
    assert isinstance(adapter, bathyscope.Adapter)
    assert (adapter.name, adapter.base_model, adapter.metadata) == ("mine", "tiny", {"a": [1]})
    assert adapter.effect is not None
    assert not adapter.effect.is_noop
    assert service.adapters.get(adapter.id).digest == adapter.digest
    assert [one.id for one in service.adapters.list()] == [adapter.id]
    folder = adapter.export(tmp_path / "out" / "peft")
    assert (folder / "adapter_model.safetensors").read_bytes() == path.read_bytes()
    assert sorted(one.name for one in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert [one.name for one in folder.parent.iterdir()] == ["peft"]
    assert adapter.export(folder) == folder  # again, over what is there
    assert adapter.export(tmp_path / "a.tar").stat().st_size % 512 == 0
    states = service.extractions.create(model="tiny", inputs=["a", "bb"], adapter=["base", adapter.id]).wait()
    array = states.hidden_states()
    assert array.shape == (2, 2, 5, 32)
    assert [one.shape for one in states.by_input()] == [(2, 5, 32)] * 2
    alone = service.extractions.create(model="tiny", inputs=["a"], adapter=adapter).wait()
    assert alone.adapter == adapter.id
    adapter.delete()
    with pytest.raises(errors.NotFound):
        service.adapters.get(adapter.id)


async def test_awaited(noop: Stack, tmp_path: Path) -> None:
    async with bathyscope.AsyncClient(noop.url) as client:
        job = await client.adapters.create(file=packed(tmp_path, "async"), base_model="tiny")
        adapter = await job.wait()
        assert isinstance(adapter, bathyscope.AsyncAdapter)
        folder = await adapter.export(tmp_path / "peft")
        assert len(list(folder.iterdir())) == 2
        assert [one.id async for one in client.adapters.list()] == [adapter.id]
        await client.adapters.delete(adapter.id)


def test_what_cannot_be_sent(service: bathyscope.Client, tmp_path: Path) -> None:
    for given in ({}, {"source": "hf://a/b", "file": tmp_path / "x"}, {"file": tmp_path}, {"file": tmp_path / "none"}):
        with pytest.raises(errors.InvalidRequest):
            service.adapters.create(**given)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidRequest) as refused:
        service.adapters.create(source="hf://a/b", name="a\n")
    assert [one["pointer"] for one in refused.value.errors] == ["/name"]


def test_a_file_that_is_refused_raises_its_own_error(service: bathyscope.Client, tmp_path: Path) -> None:
    job = service.adapters.create(file=packed(tmp_path, "bad", refuse=True), base_model="tiny")
    with pytest.raises(errors.AdapterTensorsUnmatched) as refused:
        job.wait()
    assert refused.value.names == ["lora_A"]


@pytest.mark.parametrize("kind", [bathyscope.Client, bathyscope.AsyncClient])
def test_an_upload_is_sent_again_after_a_fault(kind: Any, tmp_path: Path) -> None:
    bodies: list[bytes] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(request.content)
        assert request.headers["content-length"] == str(len(bodies[-1]))
        assert request.headers["content-type"].startswith("multipart/form-data; boundary=")
        if len(bodies) == 1:
            return httpx2.Response(503)
        job = {"id": "job_1", "kind": "adapter", "status": "queued", "created_at": "2026-01-01T00:00:00Z"}
        return httpx2.Response(202, json=job)

    def read(request: httpx2.Request) -> httpx2.Response:
        request.read()
        return answer(request)

    async def aread(request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        return answer(request)

    path = packed(tmp_path, "x")
    if kind is bathyscope.Client:
        with kind("http://service.test", transport=httpx2.MockTransport(read)) as client:
            client.adapters.create(file=path, name="n")
    else:

        async def send() -> None:
            async with kind("http://service.test", transport=httpx2.MockTransport(aread)) as client:
                await client.adapters.create(file=path, name="n")

        asyncio.run(send())
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]
    assert path.read_bytes() in bodies[0]
    assert b"adapter.tar" not in bodies[0]


def test_credentials_go_where_they_are_needed_and_nowhere_else() -> None:
    seen: list[tuple[str, str | None, str | None]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append((request.url.path, request.headers.get("x-tinker-api-key"), request.headers.get("x-hf-token")))
        job = {"id": "job_1", "kind": "adapter", "status": "queued", "created_at": "2026-01-01T00:00:00Z"}
        return httpx2.Response(202, json=job)

    given: dict[str, Any] = {"tinker_api_key": "tml-secret", "hf_token": "hf_secret"}
    with bathyscope.Client("http://service.test", transport=httpx2.MockTransport(answer), **given) as client:
        client.adapters.create(source="tinker://run/external_weights/final")
        client.adapters.create(source="hf://org/repo")
        client.adapters.create(source="s3://bucket/key")
        client.extractions.create(model="m", inputs=["a"])
        client.jobs.cancel("job_1")
        assert "secret" not in repr(client) + repr(vars(client)) + repr(client._connection.target)
    assert [row[1:] for row in seen] == [("tml-secret", None), (None, "hf_secret"), *[(None, None)] * 3]
    with pytest.raises(errors.SetupError):
        bathyscope.Client("http://service.test", tinker_api_key="tml-\u00e9")


def run(noop: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BATHYSCOPE_URL": noop.url}
    return subprocess.run(
        [sys.executable, "-m", "bathyscope.cli", "adapters", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_commands(noop: Stack, tmp_path: Path) -> None:
    path = packed(tmp_path, "cli")
    added = run(noop, "add", str(path), "-m", "tiny", "--name", "from the cli", "--json")
    assert added.returncode == 0, added.stderr
    adapter = json.loads(added.stdout)
    assert adapter["name"] == "from the cli"
    listed = run(noop, "list")
    assert adapter["id"] in listed.stdout
    assert "from the cli" in listed.stdout
    shown = run(noop, "show", adapter["id"])
    assert "2 of 2 applied" in shown.stdout
    exported = run(noop, "export", adapter["id"], str(tmp_path / "peft"))
    assert exported.stdout.strip() == str(tmp_path / "peft")
    assert (tmp_path / "peft" / "adapter_model.safetensors").read_bytes() == path.read_bytes()
    assert run(noop, "rm", adapter["id"]).returncode == 0
    gone = run(noop, "show", adapter["id"])
    assert gone.returncode == 1
    assert "There is no adapter" in gone.stderr
    refused = run(noop, "add", "ftp://x/y")
    assert refused.returncode == 1
    assert "/source" in refused.stderr


# --- Tinker -----------------------------------------------------------------------------------------------


def test_download_and_convert(noop: Stack, service: bathyscope.Client, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = "tinker://run:train:0/external_weights/final"
    path = service.tinker.download_and_convert_weights(source, "tiny", out)
    assert path == out / "peft_adapter"
    assert sorted(one.name for one in out.iterdir()) == ["checkpoint_info.json", "peft_adapter"]
    info = json.loads((out / "checkpoint_info.json").read_text())
    [adapter] = service.adapters.list()
    assert info == {
        "tinker_path": source,
        "base_model": "tiny",
        "training_dataset": None,
        "training_date": None,
        "local_path": str(path),
        "rank": 4,
        "digest": adapter.digest,
    }
    assert adapter.source == source

    async def awaited() -> Path:
        async with bathyscope.AsyncClient(noop.url) as client:
            return await client.tinker.download_and_convert_weights(source, "tiny", out, cleanup_archive=False)

    assert asyncio.run(awaited()) == path
    assert (out / "peft_adapter.tar").is_file()
    adapter.delete()


RUN = "01234567-89ab-cdef-0123-456789abcdef:train:0"


class FakeTinker(BaseHTTPRequestHandler):
    """The few routes that questions go to."""

    slow = False
    status = 200
    archives: ClassVar[list[int]] = []

    def log_message(self, *words: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer({})

    def do_GET(self) -> None:
        base = f"http://127.0.0.1:{self.server.server_address[1]}"
        if type(self).slow:
            time.sleep(3)
        checkpoints = [
            ("sampler_weights/both", "sampler"),
            ("external_weights/both", "external"),
            ("sampler_weights/old", "sampler"),
            ("weights/only", "training"),
        ]
        if self.path.endswith("/archive"):
            status = type(self).archives.pop(0) if type(self).archives else 410
            self._answer({"detail": "no"}, status, {"Location": f"{base}/signed"} if status == 302 else {})
        elif self.path.endswith("/external_weights_urls"):
            urls = {"adapter_model.safetensors": f"{base}/signed/1", "adapter_config.json": f"{base}/signed/2"}
            self._answer({"urls": urls, "expires": "2030-01-01T00:00:00Z"})
        elif self.path.endswith("/checkpoints"):
            found = [
                {
                    "checkpoint_id": name,
                    "checkpoint_type": kind,
                    "time": "2026-01-01T00:00:00Z",
                    "tinker_path": f"tinker://{RUN}/{name}",
                    "public": False,
                }
                for name, kind in checkpoints
            ]
            self._answer({"checkpoints": found})
        elif self.path.endswith("/get_server_capabilities"):
            models = [{"model_name": name, "max_context_length": 32768} for name in ("Qwen/Qwen3-8B", "org/tiny:peft")]
            self._answer({"supported_models": models}, type(self).status)
        else:
            self._answer({"detail": "Not Found"}, 404)

    def _answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-should-retry", "false")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def fake_tinker(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    FakeTinker.slow, FakeTinker.status, FakeTinker.archives = False, 200, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeTinker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("TINKER_BASE_URL", url)
    monkeypatch.setenv("TINKER_API_KEY", "tml-of-the-environment")
    yield url
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def service_alone(folder: Path, models: str, url: str) -> Iterator[Stack]:
    """A service that has no key of its own for Tinker."""
    made = Stack(folder, models=models, adapters__tinker_url=url)
    made.environment.pop("TINKER_API_KEY", None)
    made.start("service", "service")
    try:
        made.wait_alive()
        yield made
    finally:
        made.down()


def test_what_the_service_says_of_tinker(fake_tinker: str, tmp_path: Path, models: str) -> None:
    hub = f"{models},org/tiny={dict(pair.split('=') for pair in models.split(','))['tiny']}"
    with service_alone(tmp_path, hub, fake_tinker) as running:
        headers = {"X-Tinker-Api-Key": "tml-anna"}
        answer = running.client.get("/v1/tinker/models", headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        assert [(one["name"], one["model"]) for one in answer.json()["data"]] == [
            ("Qwen/Qwen3-8B", None),
            ("org/tiny:peft", "org/tiny"),
        ]
        FakeTinker.status = 403
        assert running.client.get("/v1/tinker/models", headers=headers, timeout=60).status_code == 200  # kept a minute
        refused = running.client.get("/v1/tinker/models", headers={"X-Tinker-Api-Key": "tml-bert"}, timeout=60)
        assert (refused.status_code, refused.json()["type"]) == (502, "/problems/tinker-out-of-reach")
        assert "tml-bert" not in refused.text + running.said()
        missing = running.client.get("/v1/tinker/models")
        assert (missing.status_code, missing.json()["type"]) == (503, "/problems/tinker-not-set-up")
        assert "X-Tinker-Api-Key" in missing.json()["detail"]


def test_questions_to_tinker(fake_tinker: str) -> None:
    with bathyscope.Client("http://service.test", tinker_api_key="tml-mine") as client:
        assert [one.model_name for one in client.tinker.supported_models()] == ["Qwen/Qwen3-8B", "org/tiny:peft"]
        assert [one.checkpoint_id for one in client.tinker.checkpoints(RUN)][:2] == [
            "sampler_weights/both",
            "external_weights/both",
        ]
        files = {"adapter_model.safetensors", "adapter_config.json"}
        assert set(client.tinker.archive_url(f"tinker://{RUN}/external_weights/both")) == files
        assert set(client.tinker.archive_url(f"tinker://{RUN}/sampler_weights/both")) == files
        FakeTinker.archives = [302]
        assert client.tinker.archive_url(f"tinker://{RUN}/sampler_weights/old") == {
            "archive.tar": f"{fake_tinker}/signed"
        }
        with pytest.raises(errors.TinkerNotDownloadable, match="save_weights_external") as refused:
            client.tinker.archive_url(f"tinker://{RUN}/sampler_weights/old")
        assert "weights/only" in str(refused.value)
        with pytest.raises(errors.InvalidRequest):
            client.tinker.archive_url("tinker://run/other/x")
        FakeTinker.slow = True
        with pytest.raises(errors.TinkerOutOfReach):
            client.tinker.supported_models(timeout=0.5)


async def test_questions_to_tinker_awaited(fake_tinker: str) -> None:
    async with bathyscope.AsyncClient("http://service.test", tinker_api_key="tml-mine") as client:
        assert len(await client.tinker.supported_models()) == 2
        assert len(await client.tinker.checkpoints(RUN)) == 4


def test_a_key_that_is_none(fake_tinker: str) -> None:
    with (
        bathyscope.Client("http://service.test", tinker_api_key="dummy") as client,
        pytest.raises(errors.TinkerKeyRefused),
    ):
        client.tinker.supported_models()
