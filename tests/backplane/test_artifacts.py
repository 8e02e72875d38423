"""Artifacts in a folder and in S3 (moto's server): the commit, streaming, the catalogue, expiry."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from redis.asyncio import Redis

from bathyscope.errors import InvalidRequest, SetupError, Unavailable
from bathyscope_backplane.artifacts import ArtifactStore, Catalogue, Resource
from bathyscope_backplane.ids import new_id


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    client.create_bucket(Bucket="bathyscope")
    client.close()
    yield endpoint
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return ArtifactStore((tmp_path / "artifacts").as_uri())
    options = {
        "endpoint": request.getfixturevalue("s3"),
        "access_key_id": "a",
        "secret_access_key": "b",
        "region": "us-east-1",
    }
    return ArtifactStore(
        f"s3://bathyscope/{new_id('job')}",
        {**options, "client_options": {"allow_http": True}},  # type: ignore[dict-item]
    )


@pytest.fixture
async def catalogue(redis: Redis, store: ArtifactStore) -> Catalogue:
    return Catalogue(redis, store, new_id("job"))


def scratch(folder: Path, content: bytes) -> Path:
    path = folder / "scratch"
    path.write_bytes(content)
    return path


def made(owner: str = "anna", kind: str = "extraction", **changes: object) -> Resource:
    values: dict[str, object] = {
        "id": new_id("ext"),
        "kind": kind,
        "owner": owner,
        "job": new_id("job"),
        "created_ms": int(time.time() * 1000),
        "expires_ms": None,
        "body": {"n": 1},
        **changes,
    }
    return Resource(**values)  # type: ignore[arg-type]


async def test_a_large_file_moves_in_and_streams_out(store: ArtifactStore, tmp_path: Path) -> None:
    content = os.urandom(9 * 2**20 + 17)
    path = scratch(tmp_path, content)
    blob = await store.put_file("blobs/x/1", path)
    assert not path.exists()
    assert (blob.bytes, blob.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert b"".join([bytes(piece) async for piece in store.stream(blob.key, 0, blob.bytes)]) == content
    assert bytes(await store.read(blob.key, 100, 200)) == content[100:200]
    await store.download(blob.key, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


async def test_of_two_commits_one_wins(store: ArtifactStore) -> None:
    outcomes = await asyncio.gather(*(store.commit("manifests/one.json", str(k).encode()) for k in range(8)))
    assert sum(outcomes) == 1
    assert await store.get("manifests/one.json") == str(outcomes.index(True)).encode()


async def test_what_is_not_there(store: ArtifactStore) -> None:
    assert await store.get("none") is None
    assert await store.size("none") is None
    await store.delete("none")
    await store.check()


async def test_the_loser_of_a_commit_removes_its_blob(
    store: ArtifactStore, catalogue: Catalogue, tmp_path: Path
) -> None:
    first, second = made(), made()
    second.id = first.id
    for number, resource in enumerate((first, second)):
        blob = await store.put_file(f"blobs/{first.id}/{number}", scratch(tmp_path, b"same"))
        resource.blobs["states"] = blob
    assert (await catalogue.commit(first)).blobs["states"].key.endswith("/0")
    assert (await catalogue.commit(second)).blobs["states"].key.endswith("/0")
    assert await store.size(f"blobs/{first.id}/1") is None
    assert await store.size(f"blobs/{first.id}/0") == 4


async def test_the_store_is_the_truth(store: ArtifactStore, redis: Redis, catalogue: Catalogue) -> None:
    resource = await catalogue.commit(made(body={"text": "🐟", "numbers": [1.5, None]}))
    other = Catalogue(redis, store, new_id("job"))
    assert await other.get(resource.id) is None
    assert await other.committed(resource.id) == resource
    await other.index(resource)
    assert await other.get(resource.id) == resource


async def test_lists_are_paged_without_loss_or_repetition(catalogue: Catalogue) -> None:
    same = int(time.time() * 1000)
    resources = [await catalogue.commit(made(created_ms=same + k // 4)) for k in range(11)]
    await catalogue.commit(made(owner="bert"))
    found: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = await catalogue.list("extraction", "anna", limit=3, cursor=cursor)
        found += [entry.id for entry in page]
        if cursor is None:
            break
    assert found == sorted((entry.id for entry in resources), key=lambda key: key, reverse=True)
    everything, _ = await catalogue.list("extraction", None, limit=50, cursor=None)
    assert len(everything) == 12


@pytest.mark.parametrize("cursor", ["", "x", "%00", "bm9uc2Vuc2U", "MTI6", "é"])
async def test_cursors_of_others_are_refused(catalogue: Catalogue, cursor: str) -> None:
    with pytest.raises(InvalidRequest):
        await catalogue.list("extraction", None, limit=5, cursor=cursor)


async def test_what_expires_is_swept_and_remembered(store: ArtifactStore, catalogue: Catalogue, tmp_path: Path) -> None:
    resource = made(expires_ms=int(time.time() * 1000) - 1)
    resource.blobs["states"] = await store.put_file(f"blobs/{resource.id}/0", scratch(tmp_path, b"old"))
    await catalogue.commit(resource)
    assert await catalogue.get(resource.id) is None
    assert await catalogue.tombstone(resource.id) == "anna"
    assert await catalogue.sweep() == 1
    assert await catalogue.sweep() == 0
    assert await catalogue.tombstone(resource.id) == "anna"
    assert await store.get(resource.manifest_key) is None
    assert await store.size(f"blobs/{resource.id}/0") is None
    assert await catalogue.list("extraction", "anna", limit=5, cursor=None) == ([], None)


async def test_a_deleted_one_leaves_nothing(store: ArtifactStore, catalogue: Catalogue) -> None:
    resource = await catalogue.commit(made())
    await catalogue.delete(resource)
    assert await catalogue.get(resource.id) is None
    assert await catalogue.tombstone(resource.id) is None
    assert [key async for key in store.keys("manifests/")] == []


async def test_a_store_out_of_reach_says_so() -> None:
    options = {"endpoint": "http://127.0.0.1:9", "access_key_id": "a", "secret_access_key": "b", "region": "x"}
    store = ArtifactStore(
        "s3://bathyscope/x",
        {**options, "client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}},  # type: ignore[dict-item]
    )
    with pytest.raises(Unavailable):
        await store.get("x")


def test_a_url_that_is_none() -> None:
    with pytest.raises(SetupError, match="cannot be opened"):
        ArtifactStore("nonsense://x")
