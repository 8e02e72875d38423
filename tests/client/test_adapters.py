"""Adapters in the SDK and the CLI, against a real service whose engines compute nothing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
