"""Files that adapters share: claimed, counted, swept and rebuilt, with a real server, in a real folder and in S3."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import orjson
import pytest
from moto.server import ThreadedMotoServer
from redis.asyncio import Redis

from bathyscope_backplane.artifacts import (
    ROLES,
    ArtifactStore,
    Blob,
    Blobs,
    Catalogue,
    Claim,
    Resource,
    Taken,
    rebuild,
    sweep,
)
from bathyscope_backplane.artifacts._resource import BrokenManifest, read_manifest
from bathyscope_backplane.ids import new_id

DIGEST = hashlib.sha256(b"weights").hexdigest()
BASE = "tiny"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path.as_uri())


@pytest.fixture
def catalogue(redis: Redis, store: ArtifactStore) -> Catalogue:
    return Catalogue(redis, store, f"shelf{time.monotonic_ns()}")


def a_claim() -> Claim:
    return Claim(new_id("ad"), new_id("job"))


async def brought(store: ArtifactStore, job: str, digest: str = DIGEST) -> Blobs:
    found = {}
    for role, name in ROLES.items():
        content = f"{role} of {digest}".encode()
        key = f"adapters/{digest}/{job}.token/{name}"
        await store.put(key, content)
        found[role] = Blob(key, len(content), hashlib.sha256(content).hexdigest())
    return found


def adapter(claim: Claim, blobs: Blobs, owner: str = "key_a", name: str | None = None, base: str = BASE) -> Resource:
    body = {"id": claim.id, "job": claim.job, "digest": DIGEST, "base_model": base, "name": name}
    return Resource(claim.id, "adapter", owner, claim.job, int(time.time() * 1000), None, body, blobs)


async def made(
    catalogue: Catalogue, store: ArtifactStore, owner: str = "key_a", name: str | None = None, base: str = BASE
) -> Resource:
    """As a worker does it."""
    claim = a_claim()
    own = await brought(store, claim.job)
    blobs = await catalogue.shelf.claim(claim, owner, DIGEST, base, name, own)
    assert isinstance(blobs, dict)
    if blobs != own:
        for blob in own.values():
            await store.delete(blob.key)
    return await catalogue.commit(adapter(claim, blobs, owner, name, base))


async def keys(store: ArtifactStore) -> set[str]:
    return {key async for key in store.keys("adapters/")}


async def test_the_last_one_takes_the_files_along(catalogue: Catalogue, store: ArtifactStore) -> None:
    first, second = await made(catalogue, store, "key_a"), await made(catalogue, store, "key_b")
    assert first.blobs == second.blobs
    files = {blob.key for blob in first.blobs.values()}
    await catalogue.delete(first)
    assert await keys(store) == files
    await catalogue.delete(first)  # once more, as after a crash
    assert await keys(store) == files
    third = await made(catalogue, store, "key_a")
    await catalogue.delete(second)
    assert await keys(store) == files
    await catalogue.delete(third)
    assert await keys(store) == set()
    fresh = await made(catalogue, store)
    assert fresh.blobs != third.blobs  # a folder that was given up is not used again
    assert await keys(store) == {blob.key for blob in fresh.blobs.values()}


async def test_a_share_holds_the_files_before_the_commit(catalogue: Catalogue, store: ArtifactStore) -> None:
    first, waiting = await made(catalogue, store), a_claim()
    assert await catalogue.shelf.hold(DIGEST, waiting) == first.blobs
    await catalogue.delete(first)
    assert len(await keys(store)) == 2
    assert await catalogue.shelf.release([waiting], "key_b", DIGEST, BASE, None, first.blobs["weights"].key)
    assert await catalogue.shelf.hold(DIGEST, a_claim()) is None


async def test_digest_and_name_are_an_owners_once(catalogue: Catalogue, store: ArtifactStore) -> None:
    first = await made(catalogue, store, name="n")
    mine, other = Claim(first.id, first.job), a_claim()
    blobs = await brought(store, other.job)
    assert await catalogue.shelf.claim(other, "key_a", DIGEST, BASE, None, blobs) == Taken("digest", mine)
    elsewhere = hashlib.sha256(b"other").hexdigest()
    named = await brought(store, other.job, elsewhere)
    assert await catalogue.shelf.claim(other, "key_a", elsewhere, BASE, "n", named) == Taken("name", mine)
    assert await catalogue.shelf.with_digest("key_a", elsewhere, BASE) is None  # all or nothing
    assert await catalogue.shelf.claim(other, "key_a", elsewhere, BASE, "n", named, [mine]) == named
    assert await catalogue.shelf.with_name("key_a", "n") == other
    await catalogue.delete(first)  # which takes back no claim but its own
    assert await catalogue.shelf.with_name("key_a", "n") == other
    assert await catalogue.shelf.with_digest("key_a", DIGEST, BASE) is None


async def test_each_base_has_its_own(catalogue: Catalogue, store: ArtifactStore, redis: Redis) -> None:
    """What is claimed for one base stands in nobody's way for another, and is not given for it."""
    shelf = catalogue.shelf
    first = await made(catalogue, store, base="org/model")
    assert await shelf.with_digest("key_a", DIGEST, "org/model@b") is None
    second = await made(catalogue, store, base="org/model@b")
    assert second.blobs == first.blobs
    claims = {one.body["base_model"]: Claim(one.id, one.job) for one in (first, second)}
    for known in ("as it was", "rebuilt"):
        if known == "rebuilt":
            await redis.flushdb()
            await rebuild(store, catalogue)
        assert {base: await shelf.with_digest("key_a", DIGEST, base) for base in claims} == claims
    await catalogue.delete(first)
    assert await shelf.with_digest("key_a", DIGEST, "org/model") is None
    assert await shelf.with_digest("key_a", DIGEST, "org/model@b") == claims["org/model@b"]
    assert len(await keys(store)) == 2
    await catalogue.delete(second)
    assert await keys(store) == set()


async def test_rebuilt_it_is_as_before(catalogue: Catalogue, store: ArtifactStore, redis: Redis) -> None:
    first, second = await made(catalogue, store, "key_a", "n"), await made(catalogue, store, "key_b")
    await redis.flushdb()
    found = await rebuild(store, catalogue)
    assert (found.entered, found.refused) == (2, 0)
    assert await catalogue.shelf.with_name("key_a", "n") == Claim(first.id, first.job)
    third = await made(catalogue, store, "key_c")
    assert third.blobs == first.blobs
    for one in (first, third):
        await catalogue.delete(one)
    assert len(await keys(store)) == 2
    await catalogue.delete(second)
    assert await keys(store) == set()


async def test_while_it_is_rebuilt_no_file_goes(catalogue: Catalogue, store: ArtifactStore, redis: Redis) -> None:
    """One that is known is deleted; another one of the same files is not known yet."""
    first, second = await made(catalogue, store, "key_a"), await made(catalogue, store, "key_b")
    await redis.flushdb()
    await catalogue.shelf.rebuilding(True)
    await catalogue.index(first)
    await catalogue.delete(first)
    assert len(await keys(store)) == 2
    await rebuild(store, catalogue)
    await catalogue.delete(second)
    assert await keys(store) == set()


async def test_the_sweep_takes_what_came_to_nothing(catalogue: Catalogue, store: ArtifactStore) -> None:
    open_jobs: set[str] = set()

    async def job_open(job: str) -> bool:
        return job in open_jobs

    async def swept(grace: float = -1, **more: Any) -> Any:
        return await sweep(store, job_open, grace_s=grace, shelf=catalogue.shelf, job_open=job_open, **more)

    kept, lost = await made(catalogue, store), a_claim()
    other = hashlib.sha256(b"other").hexdigest()
    blobs = await brought(store, lost.job, other)
    await catalogue.shelf.claim(lost, "key_a", other, BASE, "n", blobs)
    open_jobs.add(lost.job)
    assert (await swept()).blobs == 0  # it may go on
    open_jobs.clear()
    late = a_claim()
    await catalogue.shelf.hold(other, late)
    open_jobs.add(late.job)
    assert (await swept()).blobs == 0  # another one has a share
    open_jobs.clear()
    assert (await swept(3600)).blobs == 0
    assert (await swept(dry_run=True)).blobs == 2
    assert (await swept()).blobs == 2
    assert await keys(store) == {blob.key for blob in kept.blobs.values()}
    assert await catalogue.shelf.hold(other, a_claim()) is None
    await store.put("adapters/what/is/this", b"")
    assert (await swept()).foreign == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda blobs: blobs["weights"].update(key="blobs/x/y"),
        lambda blobs: blobs["weights"].update(key=f"adapters/{'0' * 64}/job.token/adapter_model.safetensors"),
        lambda blobs: blobs["weights"].update(key=f"adapters/{DIGEST}/../job/adapter_model.safetensors"),
        lambda blobs: blobs["weights"].update(key=f"adapters/{DIGEST}/job.token/adapter_config.json"),
        lambda blobs: blobs["weights"].update(key=f"adapters/{DIGEST}/another/adapter_model.safetensors"),
        lambda blobs: blobs.pop("config"),
        lambda blobs: blobs.update(more=blobs["config"]),
    ],
)
async def test_manifests_that_lie(store: ArtifactStore, change: Any) -> None:
    claim = a_claim()
    resource = adapter(claim, await brought(store, claim.job))
    assert read_manifest(resource.manifest_key, resource.dump()) == resource
    document = orjson.loads(resource.dump())
    change(document["blobs"])
    with pytest.raises(BrokenManifest):
        read_manifest(resource.manifest_key, orjson.dumps(document))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    client.create_bucket(Bucket="shelf")
    client.close()
    yield endpoint
    server.stop()


async def test_in_a_bucket_it_is_the_same(redis: Redis, bucket: str, tmp_path: Path) -> None:
    """Uploaded as a worker does, shared by the second of equal digest, swept, gone with the last."""
    options: dict[str, Any] = {"endpoint": bucket, "access_key_id": "a", "secret_access_key": "b"}
    options |= {"region": "us-east-1", "client_options": {"allow_http": True}}
    store = ArtifactStore(f"s3://shelf/{new_id('job')}", options)
    catalogue = Catalogue(redis, store, f"shelf{time.monotonic_ns()}")

    async def job_open(job: str) -> bool:
        return False

    async def uploaded(claim: Claim) -> Blobs:
        found = {}
        for role, name in ROLES.items():
            path = tmp_path / name
            path.write_bytes(role.encode() * (3 << 20))  # of more than one part
            found[role] = await store.put_file(f"adapters/{DIGEST}/{claim.job}.token/{name}", path)
        return found

    first = a_claim()
    own = await uploaded(first)
    assert await catalogue.shelf.claim(first, "key_a", DIGEST, BASE, "n", own) == own
    one = await catalogue.commit(adapter(first, own, "key_a", "n"))
    second = await made(catalogue, store, "key_b")
    assert second.blobs == one.blobs == own
    files = {blob.key for blob in own.values()}
    assert await keys(store) == files
    await store.download(own["weights"].key, tmp_path / "back")
    assert hashlib.sha256((tmp_path / "back").read_bytes()).hexdigest() == own["weights"].sha256
    await brought(store, new_id("job"))  # of an attempt that was killed
    swept = await sweep(store, job_open, grace_s=-1, shelf=catalogue.shelf, job_open=job_open)
    assert swept.blobs == 2
    await catalogue.delete(one)
    assert await keys(store) == files
    await catalogue.delete(second)
    assert await keys(store) == set()
