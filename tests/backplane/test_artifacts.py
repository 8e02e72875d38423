"""Artifacts in a folder and in S3 (moto's server): the commit, streaming, the catalogue, expiry."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import boto3
import orjson
import pytest
from moto.server import ThreadedMotoServer
from redis.asyncio import Redis

from bathyscope.errors import InvalidRequest, SetupError, Unavailable
from bathyscope_backplane.artifacts import ArtifactStore, Blob, Catalogue, Resource, sweep
from bathyscope_backplane.artifacts._store import Entry
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.settings import Settings
from bathyscope_backplane.space import Space


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


def sized(size: int, **changes: object) -> Resource:
    """A resource that says it has so many bytes."""
    resource = made(**changes)
    resource.body = {"id": resource.id, "job": resource.job}
    resource.blobs["states"] = Blob(f"blobs/{resource.id}/0.safetensors", size, "0" * 64)
    return resource


async def test_bytes_are_counted_once_whatever_is_repeated(catalogue: Catalogue) -> None:
    assert await catalogue.bytes_stored("anna") == 0
    first, second, other = sized(1000), sized(0), sized(5, owner="bert")
    for resource in (first, first, second, other):
        await catalogue.commit(resource)
    assert [await catalogue.index(first) for _ in range(3)] == ["known"] * 3
    assert (await catalogue.bytes_stored("anna"), await catalogue.bytes_stored("bert")) == (1000, 5)
    await catalogue.delete(second)
    await asyncio.gather(*(catalogue.delete(first) for _ in range(5)))
    assert (await catalogue.bytes_stored("anna"), await catalogue.bytes_stored("bert")) == (0, 5)


async def test_who_enters_what_was_deleted_meanwhile_enters_nothing(catalogue: Catalogue) -> None:
    resource = sized(1000)
    assert await catalogue.index(resource) == "new"
    await asyncio.gather(catalogue.delete(resource), *(catalogue.index(resource) for _ in range(5)))
    assert await catalogue.index(resource) == "deleted"
    assert await catalogue.get(resource.id) is None
    assert await catalogue.bytes_stored("anna") == 0
    assert await catalogue.list("extraction", None, limit=5, cursor=None) == ([], None)


async def test_expired_bytes_are_not_counted_after_the_sweep(catalogue: Catalogue) -> None:
    await catalogue.commit(sized(1000, expires_ms=int(time.time() * 1000) - 1))
    kept = await catalogue.commit(sized(7))
    assert await catalogue.sweep() == 1
    assert await catalogue.bytes_stored("anna") == 7
    assert (await catalogue.list("extraction", "anna", limit=5, cursor=None))[0] == [kept]


async def test_what_shards_left_is_swept_with_their_job(store: ArtifactStore) -> None:
    running, over = new_id("job"), new_id("job")
    for job in (running, over):
        await store.put(f"shards/{job}/0.json", b"{}")
        await store.put(f"shards/{job}/0.token.safetensors", b"states")
    await store.put("shards/else", b"")

    async def may_run(job_id: str) -> bool:
        return job_id == running

    assert (await sweep(store, may_run, grace_s=3600, job_open=may_run)).young == 2
    swept = await sweep(store, may_run, grace_s=-1, job_open=may_run)
    assert (swept.shards, swept.bytes, swept.foreign) == (2, 8, 1)
    assert [key async for key in store.keys(f"shards/{over}/")] == []
    assert len([key async for key in store.keys(f"shards/{running}/")]) == 2
    await store.drop_shards(running)
    await store.drop_shards(running)
    assert [key async for key in store.keys(f"shards/{running}/")] == []


async def test_a_delete_that_was_cut_short_is_ended_by_the_sweep(
    redis: Redis, store: ArtifactStore, tmp_path: Path
) -> None:
    class Breaks(ArtifactStore):
        async def delete(self, key: str) -> None:
            raise Unavailable("cut")

    namespace = new_id("job")
    catalogue = Catalogue(redis, store, namespace)
    resource = made()
    resource.blobs["states"] = await store.put_file(f"blobs/{resource.id}/0", scratch(tmp_path, b"x" * 100))
    await catalogue.commit(resource)
    broken = Catalogue(redis, Breaks((tmp_path / "elsewhere").as_uri()), namespace)
    with pytest.raises(Unavailable):
        await broken.delete(resource)
    assert await catalogue.get(resource.id) is None
    assert await store.size(f"blobs/{resource.id}/0") == 100
    assert await catalogue.sweep() == 1
    assert await catalogue.sweep() == 0
    assert await store.size(f"blobs/{resource.id}/0") is None
    assert await store.get(resource.manifest_key) is None
    assert await catalogue.tombstone(resource.id) is None  # it was deleted and did not expire


async def never(job_id: str) -> bool:
    return False


async def aged(store: ArtifactStore, seconds: float) -> None:
    """Make every object of a folder store older."""
    folder = store.folder
    assert folder is not None
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


async def test_inputs_go_with_the_end_of_their_job(store: ArtifactStore) -> None:
    """A job that was cancelled while no worker had it is known for days, and needs its archive no more."""
    ended, replayable = new_id("job"), new_id("job")
    for job in (ended, replayable):
        await store.put(f"inputs/{job}.archive", b"archive")

    async def known(job_id: str) -> bool:
        return True

    async def may_run(job_id: str) -> bool:
        return job_id == replayable

    assert (await sweep(store, known, grace_s=3600, job_open=may_run)).young == 1
    assert (await sweep(store, known, grace_s=-1)).inputs == 0
    assert (await sweep(store, known, grace_s=-1, job_open=may_run)).inputs == 1
    assert [key async for key in store.keys("inputs/")] == [f"inputs/{replayable}.archive"]


async def test_a_sweep_takes_orphans_and_nothing_else(
    store: ArtifactStore, catalogue: Catalogue, tmp_path: Path
) -> None:
    kept, lost, job, queued = made(), new_id("ext"), new_id("job"), new_id("job")
    kept.body = {"id": kept.id, "job": kept.job}
    kept.blobs["states"] = await store.put_file(f"blobs/{kept.id}/a", scratch(tmp_path, b"kept"))
    await catalogue.commit(kept)
    await store.put(f"blobs/{kept.id}/loser", b"of an attempt that came second")
    await store.put(f"blobs/{lost}/a", b"lost")
    await store.put("blobs/somebody/elses", b"!")
    await store.put("inputs/somebody", b"!")
    await store.put(f"inputs/{job}.jsonl", b"rows")
    await store.put(f"inputs/{queued}.jsonl", b"rows")

    async def known(job_id: str) -> bool:
        return job_id == queued

    young = await sweep(store, known, grace_s=3600)
    assert (young.blobs, young.inputs, young.young, young.foreign) == (0, 0, 2, 2)
    looked = await sweep(store, known, grace_s=-1, dry_run=True)
    assert (looked.blobs, looked.inputs, looked.bytes) == (2, 1, 30 + 4 + 4)
    assert await store.size(f"blobs/{lost}/a") == 4
    assert await sweep(store, known, grace_s=-1) == looked
    left = {key async for key in store.keys("blobs/")} | {key async for key in store.keys("inputs/")}
    assert left == {f"blobs/{kept.id}/a", "blobs/somebody/elses", "inputs/somebody", f"inputs/{queued}.jsonl"}
    if store.folder is not None:
        assert not (store.folder / "blobs" / lost).exists()


async def test_a_blob_whose_manifest_comes_during_the_sweep_is_kept(
    store: ArtifactStore, catalogue: Catalogue, tmp_path: Path
) -> None:
    """Two attempts of one job commit in the middle of a sweep that has seen both blobs and no manifest."""
    attempts = [made(), made()]
    attempts[1].id = attempts[0].id
    for number, resource in enumerate(attempts):
        resource.body = {"id": resource.id, "job": resource.job}
        blob = await store.put_file(f"blobs/{resource.id}/{number}", scratch(tmp_path, b"same"))
        resource.blobs["states"] = blob

    class Watched(ArtifactStore):
        def __init__(self) -> None:
            self._store, self._folder = store._store, store.folder

        async def entries(self, prefix: str) -> AsyncIterator[Entry]:
            found = [entry async for entry in store.entries(prefix)]
            if prefix == "blobs/":
                await asyncio.gather(*(catalogue.commit(resource) for resource in attempts))
            for entry in found:
                yield entry

    swept = await sweep(Watched(), never, grace_s=-1)
    winner = await catalogue.committed(attempts[0].id)
    assert winner is not None
    assert await store.size(winner.blobs["states"].key) == 4
    assert swept.blobs <= 1  # the loser's, when the sweep was before the loser itself
    assert [key async for key in store.keys("blobs/")] == [winner.blobs["states"].key]


async def test_an_old_result_that_waited_for_the_store_is_young_in_it(tmp_path: Path) -> None:
    store = ArtifactStore((tmp_path / "artifacts").as_uri())
    path = scratch(tmp_path, b"computed long ago")
    os.utime(path, (time.time() - 7 * 86_400,) * 2)
    resource_id = new_id("ext")
    await store.put_file(f"blobs/{resource_id}/0", path)
    assert (await sweep(store, never, grace_s=3600)).young == 1
    assert await store.size(f"blobs/{resource_id}/0") == 17


async def test_uploads_that_were_cut_short_are_swept_from_a_folder(tmp_path: Path) -> None:
    store = ArtifactStore((tmp_path / "artifacts").as_uri())
    key = f"inputs/{new_id('job')}.jsonl"
    await store.put(key, b"rows")
    (tmp_path / "artifacts" / "inputs" / "x.jsonl#1").write_bytes(b"half")
    (tmp_path / "artifacts" / "inputs" / "y.jsonl#2").write_bytes(b"going on")
    await aged(store, 7200)
    os.utime(tmp_path / "artifacts" / "inputs" / "y.jsonl#2")
    swept = await sweep(store, never, grace_s=3600)
    assert (swept.uploads, swept.inputs, swept.young, swept.bytes) == (1, 1, 1, 8)
    names = {path.name for path in (tmp_path / "artifacts" / "inputs").iterdir()}
    assert names == {"y.jsonl#2"}


async def test_one_worker_sweeps_at_a_time(catalogue: Catalogue) -> None:
    assert sum(await asyncio.gather(*(catalogue.claim_sweep(60) for _ in range(5)))) == 1


async def test_a_folder_that_is_gone_is_out_of_reach_until_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    store = ArtifactStore(folder.as_uri())
    await store.check()
    folder.rename(tmp_path / "away")
    folder.mkdir()  # the mount point that stays when the mount is lost
    path = scratch(tmp_path, b"result")
    for attempt in (
        store.check(),
        store.put("inputs/x", b"x"),
        store.put_file("blobs/x/y", path),
        store.commit("manifests/x.json", b"{}"),
    ):
        with pytest.raises(Unavailable, match="out of reach"):
            await attempt
    assert list(folder.iterdir()) == []
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    await store.put_file("blobs/x/y", path)
    assert await store.get("blobs/x/y") == b"result"


async def test_a_store_that_hears_and_does_not_answer_is_told_in_time() -> None:
    def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    options = {"endpoint": address, "access_key_id": "a", "secret_access_key": "b", "region": "x"}
    space = Space(Settings(), ArtifactStore("s3://bathyscope/x", {**options, "allow_http": "true"}))
    async with asyncio.timeout(10):
        answers = await asyncio.gather(*(space.require() for _ in range(50)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unavailable}
    assert len(held) == 1  # fifty requests ask once
    for writer in held:
        writer.close()
    server.close()


async def test_options_as_the_environment_gives_them(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"endpoint": s3, "access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
    monkeypatch.setenv("BATHYSCOPE_STORE_OPTIONS", orjson.dumps({**options, "allow_http": "true"}).decode())
    monkeypatch.setenv("BATHYSCOPE_STORE_URL", "s3://bathyscope/options")
    settings = Settings()
    store = ArtifactStore(settings.artifacts_url, settings.store_options)
    await store.put("x", b"y")
    assert await store.get("x") == b"y"
    with pytest.raises(SetupError, match="nonsense"):
        ArtifactStore("s3://bathyscope/x", {"nonsense": "1"})
