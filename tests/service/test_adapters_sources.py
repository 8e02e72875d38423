"""Adapters of the hub, of buckets and of the import folder through the whole installation, with a real worker."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from redis import Redis
from safetensors.torch import save

from tests.files import contents_below
from tests.hub_standin import SHA, HubStandin, Repository
from tests.service.test_adapters import files, traces
from tests.service.test_adapters_live import ALPHA, MODULES, RANK, archive, tensors
from tests.stack import Stack

TOKEN = f"hf_{secrets.token_hex(16)}"
MOST = 4 << 20


def adapter(layout: str, seed: int) -> dict[str, bytes]:
    """The files of an adapter for the tiny model."""
    config: dict[str, Any] = {"peft_type": "LORA", "bias": "none", "r": RANK, "lora_alpha": ALPHA}
    config["target_modules"] = (
        "all-linear" if layout == "tinker" else sorted(name.rpartition(".")[2] for name in MODULES)
    )
    found = {"adapter_model.safetensors": save(tensors(seed)), "adapter_config.json": json.dumps(config).encode()}
    return {**found, "checkpoint_complete": b""} if layout == "tinker" else found


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandin]:
    with HubStandin() as server:
        server.repositories["org/tinker"] = Repository(adapter("tinker", 1))
        server.repositories["org/peft"] = Repository(adapter("peft", 1))
        server.repositories["org/private"] = Repository(adapter("peft", 2), token=TOKEN)
        server.repositories["org/large"] = Repository(adapter("peft", 1), sizes={"adapter_model.safetensors": MOST + 1})
        yield server


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    for bucket in ("adapters", "secrets"):
        client.create_bucket(Bucket=bucket)
        for name, content in adapter("peft", 1).items():
            client.put_object(Bucket=bucket, Key=f"team/one/{name}", Body=content)
    client.put_object(Bucket="adapters", Key="team/two.tar.gz", Body=archive(1, "tinker", "tar.gz"))
    client.close()
    yield url
    server.stop()


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, models: str, hub: HubStandin, endpoint: str
) -> Iterator[tuple[Stack, Path]]:
    folder = tmp_path_factory.mktemp("import")
    for layout in ("tinker", "peft"):
        (folder / layout).mkdir()
        for name, content in adapter(layout, 1).items():
            (folder / layout / name).write_bytes(content)
    (folder / "packed.zip").write_bytes(archive(1, "peft", "zip"))
    options = {"endpoint": endpoint, "allow_http": "true", "region": "us-east-1"}
    made = Stack(
        tmp_path_factory.mktemp("sources"),
        models=models,
        worker__adopt_seconds=0,
        log_level="debug",
        jobs__max_attempts=1,
        adapters__hub_url=hub.url,
        adapters__max_bytes=MOST,
        adapters__import_dir=folder,
        adapters__allowed_buckets=json.dumps(["s3://adapters/team"]),
        adapters__store_options=json.dumps({**options, "access_key_id": "a", "secret_access_key": "b"}),
    )
    made.environment |= {"HF_HUB_OFFLINE": "0"}  # the libraries' word for a machine that reaches no hub
    made.environment.pop("HF_TOKEN", None)
    try:
        yield made.up(), folder
    finally:
        made.down()


def ended(stack: Stack, source: str, **headers: str) -> dict[str, Any]:
    answer = stack.post("/v1/adapters", {"source": source, "base_model": "tiny"}, **headers)
    assert answer.status_code in (200, 202), answer.text
    return stack.job(answer.json()["id"])


def refused(stack: Stack, slug: str, source: str, **headers: str) -> str:
    """What the problem says that ends the job; nothing is left."""
    job = ended(stack, source, **headers)
    assert job["status"] == "failed", job
    assert job["error"]["type"] == f"/problems/{slug}", job["error"]
    deadline = time.monotonic() + 10
    while traces(stack) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not traces(stack)
    assert not files(stack)
    return str(job["error"]["detail"])


def test_the_same_weights_are_one_adapter_wherever_they_come_from(live: tuple[Stack, Path]) -> None:
    stack, folder = live
    sources = [
        "hf://org/tinker",
        f"hf://org/peft@{SHA}",
        "s3://adapters/team/one",
        "s3://adapters/team/two.tar.gz",
        f"file://{folder}/tinker",
        f"file://{folder}/packed.zip",
    ]
    jobs = [ended(stack, source) for source in sources]
    assert [job["status"] for job in jobs] == ["succeeded"] * len(jobs), jobs
    [path] = {job["resource"] for job in jobs}
    found = stack.client.get(path).json()
    assert (found["source"], found["format"], found["tinker"]) == (sources[0], "tinker", None)
    assert found["tensors"] == {"read": 24, "applied": 24}
    assert any(SHA in note for note in found["conversion"])
    assert len(files(stack)) == 2
    stack.client.delete(path)
    assert not files(stack)


def test_a_private_repository_opens_to_the_requests_token(live: tuple[Stack, Path], hub: HubStandin) -> None:
    stack, _ = live
    assert "X-HF-Token" in refused(stack, "adapter-source-missing", "hf://org/private")
    refused(stack, "adapter-source-missing", "hf://org/private", **{"X-HF-Token": "hf_another"})
    job = ended(stack, "hf://org/private", **{"X-HF-Token": TOKEN})
    assert job["status"] == "succeeded", job
    stack.client.delete(job["resource"])
    redirected = [headers for path, headers in hub.requests if path.startswith("/store/")]
    assert redirected
    assert not any("authorization" in headers for headers in redirected)
    with Redis.from_url(stack.environment["BATHYSCOPE_REDIS_URL"]) as redis:
        for name in redis.scan_iter(count=1000):
            assert TOKEN.encode() not in (redis.dump(name) or b"")
    for path, content in contents_below(stack.data_dir):
        assert TOKEN.encode() not in content, path


@pytest.mark.parametrize(
    ("source", "slug", "words"),
    [
        ("hf://org/large", "adapter-too-large", "adapters.max_bytes"),
        ("hf://org/none", "adapter-source-missing", "org/none"),
        ("hf://org/peft@none", "adapter-source-missing", "no revision none"),
        ("s3://secrets/team/one", "adapter-source-forbidden", "adapters.allowed_buckets"),
        ("s3://adapters/team/none", "adapter-source-missing", "nothing at s3://adapters/team/none"),
        ("file:///etc/passwd", "adapter-source-forbidden", "import folder"),
    ],
)
def test_what_is_refused(live: tuple[Stack, Path], hub: HubStandin, source: str, slug: str, words: str) -> None:
    stack, _ = live
    before = len(hub.requests)
    assert words in refused(stack, slug, source)
    assert not [path for path, _ in hub.requests[before:] if not path.startswith("/api/")]  # not a byte of it


def test_links_do_not_lead_out_of_the_import_folder(live: tuple[Stack, Path], tmp_path: Path) -> None:
    stack, folder = live
    for name, content in adapter("peft", 3).items():
        (tmp_path / name).write_bytes(content)
    (folder / "out").symlink_to(tmp_path)
    assert "links resolved" in refused(stack, "adapter-source-forbidden", f"file://{folder}/out")
