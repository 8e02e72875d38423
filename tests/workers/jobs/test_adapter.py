"""The supervisor's part of an adapter's job, with a real catalogue and store, between steps that tests choose."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bathyscope_backplane.artifacts import ROLES, Blobs, Resource
from bathyscope_backplane.broker import Lease, LeaseRef
from bathyscope_backplane.embedded import EmbeddedServer
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.plane import Backplane, open_backplane
from bathyscope_backplane.settings import Settings
from bathyscope_workers.jobs import AdapterJob, JobWork

EFFECT = {"result": {"effect": {"relative_change": [0.0, 0.1], "max": 0.1, "is_noop": False}}}


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Backplane]:
    with EmbeddedServer(tmp_path) as server:
        async with open_backplane(Settings(data_dir=tmp_path, redis_url=server.url)) as opened:
            yield opened


async def second_part(plane: Backplane, owner: str, name: str | None = None, seed: int = 0) -> JobWork:
    """A job whose adapter is converted, brought to the store and attached, and not described yet."""
    job, resource, now = new_id("job"), new_id("ad"), int(time.time() * 1000)
    digest = hashlib.sha256(f"weights {seed}".encode()).hexdigest()
    blobs: Blobs = {}
    for role, file in ROLES.items():
        path = plane.settings.data_dir / file
        path.write_bytes(f"{role} {seed}".encode())
        blobs[role] = await plane.store.put_file(f"adapters/{digest}/{job}.token/{file}", path)
    lease = Lease(
        ref=LeaseRef(job, "worker", "token"),
        kind="adapter",
        lane="model:tiny:none:auto",
        owner=owner,
        priority="normal",
        payload="",
        resource_id=resource,
        attempt=1,
        max_attempts=3,
        solo=False,
        secret=None,
        created_at=now,
        enqueued_at=now,
        started_at=now,
    )
    converted = {"digest": digest, "base_model": "tiny", "rank": 4, "alpha": 32.0, "target_modules": []}
    payload = {
        "spec": {"name": name},
        "converted": {**converted, "format": "peft", "tensors": {"read": 2, "applied": 2}},
        "staged": {role: blob.as_json() for role, blob in blobs.items()},
    }
    return JobWork(plane, lease, payload, plane.settings.data_dir, None, attached=blobs)


async def described(work: JobWork) -> Resource:
    made = await AdapterJob().conclude(work, EFFECT)
    assert isinstance(made, Resource)
    return made


async def keys(plane: Backplane) -> set[str]:
    return {key async for key in plane.store.keys("adapters/")}


async def test_claims_stay_when_ones_own_files_are_not_needed(plane: Backplane) -> None:
    """Another key has the same adapter, and its files are named: until the commit digest and name are kept all the
    same, so that no other job of this key makes a second one of either."""
    first = await second_part(plane, "key_a")
    kept = await plane.catalogue.commit(await described(first))
    mine = await second_part(plane, "key_b", "mine")
    resource = await described(mine)
    assert resource.blobs == kept.blobs
    assert await keys(plane) == {blob.key for blob in kept.blobs.values()}
    claim = await plane.catalogue.shelf.with_digest("key_b", resource.body["digest"], "tiny")
    assert claim is not None
    assert claim.id == mine.lease.resource_id
    assert await plane.catalogue.shelf.with_name("key_b", "mine") == claim
    # Redis or the store was away in between: it is described once more.
    assert (await described(mine)).blobs == kept.blobs
    await plane.catalogue.delete(kept)
    await plane.catalogue.commit(resource)
    assert await keys(plane) == {blob.key for blob in kept.blobs.values()}
    await plane.catalogue.delete(resource)
    assert await keys(plane) == set()


async def test_discarded_it_gives_claims_and_files_back(plane: Backplane) -> None:
    first = await plane.catalogue.commit(await described(await second_part(plane, "key_a")))
    mine = await second_part(plane, "key_b", "mine")
    await described(mine)
    await AdapterJob().discard(mine)
    shelf = plane.catalogue.shelf
    assert await shelf.with_name("key_b", "mine") is None
    assert await shelf.with_digest("key_b", first.body["digest"], "tiny") is None
    await plane.catalogue.delete(first)
    assert await keys(plane) == set()
