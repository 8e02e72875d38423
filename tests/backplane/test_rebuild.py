"""`bathyscope store`: the catalogue made anew from the store, and what is not believed there."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis

from bathyscope_backplane.artifacts import ArtifactStore, Blob, Catalogue, Rebuilt, Resource, check, rebuild
from bathyscope_backplane.ids import KIND_PREFIX, new_id
from tests.stack import Stack

CONTENT = b"states"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "artifacts").as_uri())


@pytest.fixture
def catalogue(redis: Redis, store: ArtifactStore) -> Catalogue:
    return Catalogue(redis, store, new_id("job"))


async def stored(store: ArtifactStore, *, kind: str = "extraction", **changes: Any) -> Resource:
    """A resource with its blob and manifest in the store, and nothing in Redis."""
    resource_id, job = new_id(KIND_PREFIX[kind]), new_id("job")
    values: dict[str, Any] = {
        "id": resource_id,
        "kind": kind,
        "owner": "anna",
        "job": job,
        "created_ms": int(time.time() * 1000),
        "expires_ms": int(time.time() * 1000) + 60_000,
        "body": {"id": resource_id, "job": job, "text": "🐟"},
        "blobs": {"states": Blob(f"blobs/{resource_id}/0f.safetensors", len(CONTENT), "ab" * 32)},
        **changes,
    }
    resource = Resource(**values)
    await store.put(f"blobs/{resource_id}/0f.safetensors", CONTENT)
    await store.commit(resource.manifest_key, resource.dump())
    return resource


async def test_everything_comes_back_once(store: ArtifactStore, catalogue: Catalogue) -> None:
    kinds = ["extraction"] * 40 + ["probe"] * 5 + ["prediction"] * 5
    resources = [
        await stored(store, kind=kind, owner="anna" if k % 2 else "bert", created_ms=1_700_000_000_000 + k)
        for k, kind in enumerate(kinds)
    ]
    told: list[int] = []

    def tell(found: Rebuilt) -> None:
        told.append(found.manifests)

    first = await rebuild(store, catalogue, tell)
    assert (first.manifests, first.entered, first.known, first.refused) == (50, 50, 0, 0)
    assert (first.bytes, first.owners) == (50 * len(CONTENT), {"anna": 25, "bert": 25})
    assert told == list(range(1, 51))
    again = await rebuild(store, catalogue)
    assert (again.entered, again.known) == (0, 50)
    for resource in resources:
        assert await catalogue.get(resource.id) == resource
    for owner in ("anna", "bert"):
        own = [resource for resource in resources if resource.owner == owner and resource.kind == "extraction"]
        assert (await catalogue.list("extraction", owner, limit=50, cursor=None))[0] == own[::-1]
        assert await catalogue.bytes_stored(owner) == 25 * len(CONTENT)
    assert len((await catalogue.list("probe", None, limit=50, cursor=None))[0]) == 5


async def test_what_expired_is_expired(store: ArtifactStore, catalogue: Catalogue) -> None:
    old = await stored(store, expires_ms=int(time.time() * 1000) - 1)
    never = await stored(store, expires_ms=None)
    found = await rebuild(store, catalogue)
    assert (found.entered, found.expired) == (2, 1)
    assert await catalogue.get(old.id) is None
    assert await catalogue.tombstone(old.id) == "anna"  # 410, not 404
    assert (await catalogue.list("extraction", "anna", limit=5, cursor=None))[0] == [never]
    assert await catalogue.sweep() == 1
    assert await store.get(old.manifest_key) is None
    assert await store.size(old.blobs["states"].key) is None
    assert await catalogue.bytes_stored("anna") == len(CONTENT)


OTHER = "ext_01jd3v0000000000000000000a"
FORGED: dict[str, dict[str, Any]] = {
    "its id is not": {"id": OTHER},
    "another kind": {"kind": "probe"},
    "no such kind": {"kind": "key"},
    "its owner is none": {"owner": "a b"},
    "an owner that ends elsewhere": {"owner": ""},
    "its job is none": {"job": "../../etc"},
    "made at no time": {"created_ms": "1"},
    "made in the future": {"created_ms": 2**50},
    "a time that is true": {"created_ms": True},
    "expires at no time": {"expires_ms": 1.5},
    "body": {"body": []},
    "of another resource": {"body": {"id": OTHER}},
    "private": {"private": None},
    "blobs": {"blobs": []},
    "another's blob": {"blobs": {"states": {"key": f"blobs/{OTHER}/0", "bytes": 1, "sha256": "ab" * 32}}},
    "a blob out of the store": {"blobs": {"s": {"key": "{own}../../x", "bytes": 1, "sha256": "ab" * 32}}},
    "a manifest as a blob": {"blobs": {"s": {"key": f"manifests/{OTHER}.json", "bytes": 1, "sha256": "ab" * 32}}},
    "a size below nothing": {"blobs": {"s": {"key": "{own}0f.safetensors", "bytes": -6, "sha256": "ab" * 32}}},
    "another size": {"blobs": {"s": {"key": "{own}0f.safetensors", "bytes": 7, "sha256": "ab" * 32}}},
    "no digest": {"blobs": {"s": {"key": "{own}0f.safetensors", "bytes": 6, "sha256": "x"}}},
    "a blob that is missing": {"blobs": {"s": {"key": "{own}1f.safetensors", "bytes": 6, "sha256": "ab" * 32}}},
    "a field more": {"extra": 1},
}


@pytest.mark.parametrize("name", FORGED)
async def test_a_manifest_that_does_not_fit_its_place_is_named_and_left(
    store: ArtifactStore, catalogue: Catalogue, name: str
) -> None:
    good, forged = await stored(store), await stored(store)
    text = orjson.dumps({**orjson.loads(forged.dump()), **FORGED[name]}).replace(
        b"{own}", f"blobs/{forged.id}/".encode()
    )
    await store.put(forged.manifest_key, text)
    found = await rebuild(store, catalogue)
    assert (found.entered, found.refused) == (1, 1)
    assert found.faults[0].key == forged.manifest_key
    assert await catalogue.get(good.id) == good
    for resource_id in (forged.id, OTHER):
        assert await catalogue.get(resource_id) is None
    assert await store.get(forged.manifest_key) == text
    assert await store.get(f"blobs/{forged.id}/0f.safetensors") == CONTENT
    assert (await check(store)).refused == 1


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("manifests/notes.txt", b"hello"),
        ("manifests/deep/ext_01jd3v0000000000000000000a.json", b"{}"),
        ("manifests/key_01jd3v0000000000000000000a.json", b"{}"),
        (f"manifests/{OTHER}.json", b""),
        (f"manifests/{OTHER}.json", b"[" * 100_000),
        (f"manifests/{OTHER}.json", b"\xff\xfe"),
        (f"manifests/{OTHER}.json", b"[]"),
    ],
)
async def test_what_is_no_manifest_is_named_and_left(
    store: ArtifactStore, catalogue: Catalogue, key: str, data: bytes
) -> None:
    good = await stored(store)
    await store.put(key, data)
    found = await rebuild(store, catalogue)
    assert (found.entered, [fault.key for fault in found.faults]) == (1, [key])
    assert await catalogue.get(good.id) == good
    assert await store.get(key) == data


async def test_beside_a_working_service(store: ArtifactStore, catalogue: Catalogue) -> None:
    """Rebuilds, commits and deletes at the same time: what was deleted stays so, the rest is there and counted once."""
    resources = [await stored(store) for _ in range(60)]
    for resource in resources:
        await catalogue.index(resource)

    async def work() -> None:
        for resource in resources[::2]:
            await catalogue.delete(resource)
            await catalogue.commit(await stored(store, owner="bert"))

    found, _, _ = await asyncio.gather(rebuild(store, catalogue), rebuild(store, catalogue), work())
    assert found.refused == 0
    left = (await catalogue.list("extraction", "anna", limit=99, cursor=None))[0]
    assert [resource.id for resource in left] == [resource.id for resource in resources[1::2]][::-1]
    assert await catalogue.bytes_stored("anna") == 30 * len(CONTENT)
    assert await catalogue.bytes_stored("bert") == 30 * len(CONTENT)
    await rebuild(store, catalogue)
    assert (await catalogue.list("extraction", "anna", limit=99, cursor=None))[0] == left


# --- a whole installation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, models: str) -> Iterator[Stack]:
    installation = Stack(tmp_path_factory.mktemp("rebuild"), models=models, packaged_model="false")
    try:
        forgotten = installation.data_dir / "artifacts" / "blobs" / new_id("ext") / "0.safetensors"
        forgotten.parent.mkdir(parents=True)
        forgotten.write_bytes(b"of two days ago")
        subprocess.run(["touch", "-d", "2 days ago", forgotten], check=True)
        yield installation.up()
    finally:
        installation.down()


def bathyscope(running: Stack, *words: str, code: int = 0) -> tuple[Any, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bathyscope.cli", *words, "--json"],
        env=running.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout), done.stderr


def everything(running: Stack, probe: str, extraction: str) -> dict[str, Any]:
    """All that can be read of the two, as it is told and byte by byte."""
    paths = [
        f"/v1/extractions/{extraction}",
        "/v1/extractions",
        f"/v1/extractions/{extraction}/hidden_states",
        f"/v1/extractions/{extraction}/hidden_states?format=npy&layers=2&rows=1-3",
        f"/v1/probes/{probe}",
        "/v1/probes",
        f"/v1/probes/{probe}/weights",
    ]
    found = {}
    for path in paths:
        answer = running.client.get(path)
        assert answer.status_code == 200, (path, answer.text)
        found[path] = answer.content
    return found


def predicted(running: Stack, probe: str, extraction: str) -> list[list[float]]:
    answer = running.post(f"/v1/probes/{probe}/predict", {"extraction": extraction})
    assert answer.status_code == 200, answer.text
    prediction = running.client.get(answer.json()["resource"]).json()
    probabilities: list[list[float]] = prediction["probabilities"]
    return probabilities


def test_a_worker_sweeps_by_itself(running: Stack) -> None:
    deadline = time.monotonic() + 60
    while list((running.data_dir / "artifacts" / "blobs").rglob("0.safetensors")):
        assert time.monotonic() < deadline, running.said()
        time.sleep(0.1)


def test_results_outlive_the_queue_and_all_it_held(running: Stack) -> None:
    texts = [f"{word} number {k}" for k in range(12) for word in ("deep", "shallow")]
    extraction = running.extract(texts, model="tiny", layers=[1, 2])["id"]
    body = {"extraction": extraction, "labels": [0, 1] * 12, "bootstrap": 10, "folds": 2, "baselines": []}
    answer = running.post("/v1/probes", body)
    assert answer.status_code == 200, answer.text
    probe = answer.json()["resource"].rpartition("/")[2]
    before, numbers = everything(running, probe, extraction), predicted(running, probe, extraction)

    running.valkey.stop()
    for path in running.valkey.folder.iterdir():
        if path.name.startswith(("appendonly", "dump")):
            subprocess.run(["rm", "-r", path], check=True)
    running.valkey.start()
    running.wait_ready()
    assert running.client.get(f"/v1/extractions/{extraction}").status_code == 404
    assert running.client.get("/v1/extractions").json()["data"] == []

    found, _ = bathyscope(running, "store", "rebuild")
    assert (found["entered"], found["known"], found["refused"]) == (3, 0, 0)
    assert everything(running, probe, extraction) == before
    assert predicted(running, probe, extraction) == numbers
    again, _ = bathyscope(running, "store", "rebuild")
    assert (again["entered"], again["known"], again["owners_without_key"]) == (0, 4, [])


def test_the_words_of_a_rebuild(running: Stack) -> None:
    store = ArtifactStore((running.data_dir / "artifacts").as_uri())
    lost = asyncio.run(stored(store, owner="key_01jd3v0000000000000000000a"))
    (running.data_dir / "artifacts" / "manifests" / "\x1b[31m.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "bathyscope.cli", "store", "rebuild"],
        env=running.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "1 resources entered" in done.stdout
    assert "API keys, jobs and tombstones are not in the store" in done.stderr
    assert lost.owner in done.stderr
    assert "its name is not that of a manifest; left out" in done.stderr
    assert "\x1b" not in done.stderr
    checked, _ = bathyscope(running, "store", "check", code=1)
    assert checked["refused"] == 1


def test_a_sweep_by_hand(running: Stack) -> None:
    orphan = running.data_dir / "artifacts" / "blobs" / new_id("ext") / "0.safetensors"
    orphan.parent.mkdir()
    orphan.write_bytes(b"x" * 1000)
    young, _ = bathyscope(running, "store", "sweep", "--grace", "1")
    assert (young["blobs"], young["young"]) == (0, 1)
    subprocess.run(["touch", "-d", "2 hours ago", orphan], check=True)
    assert bathyscope(running, "store", "sweep")[0]["blobs"] == 0  # a day, by default
    looked, _ = bathyscope(running, "store", "sweep", "--grace", "1", "--dry-run")
    assert (looked["blobs"], looked["bytes"], orphan.exists()) == (1, 1000, True)
    swept, _ = bathyscope(running, "store", "sweep", "--grace", "1")
    assert (swept["blobs"], swept["bytes"], orphan.exists()) == (1, 1000, False)
