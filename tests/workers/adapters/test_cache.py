"""Converted adapters on the worker's own disk: kept from sweeps while they are made, and not believed when they rot."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bathyscope_backplane.artifacts import ROLES, ArtifactStore, Blobs
from bathyscope_workers.adapters.cache import AdapterCache

DIGEST = hashlib.sha256(b"weights").hexdigest()
LARGE = 2**30

MAKER = f"""
import asyncio, sys, time
from pathlib import Path
from bathyscope_backplane.artifacts import ArtifactStore, Blob
from bathyscope_workers.adapters.cache import AdapterCache

async def stuck(key, path):
    path.write_bytes(b"half")
    time.sleep(3600)

folder = Path(sys.argv[1])
cache = AdapterCache(folder / "adapters", ArtifactStore((folder / "store").as_uri()), {LARGE})
cache._fetch = stuck
asyncio.run(cache.place("{DIGEST}", {{"weights": Blob("adapters/x", 8, "{DIGEST}")}}, folder / "placed"))
"""


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore((tmp_path / "store").as_uri())


@pytest.fixture
def cache(tmp_path: Path, store: ArtifactStore) -> AdapterCache:
    return AdapterCache(tmp_path / "adapters", store, LARGE)


async def brought(store: ArtifactStore, tmp_path: Path) -> Blobs:
    found = {}
    for role, name in ROLES.items():
        (path := tmp_path / name).write_bytes(role.encode() * 100)
        found[role] = await store.put_file(f"adapters/{DIGEST}/job.token/{name}", path)
    return found


def made(tmp_path: Path) -> list[Path]:
    """Folders in the making."""
    return list((tmp_path / "adapters").glob(f".{DIGEST}.*"))


def test_what_another_process_makes_is_not_swept(cache: AdapterCache, tmp_path: Path) -> None:
    (dead := tmp_path / "adapters" / f".{DIGEST}.1.dead").mkdir(parents=True)  # pid 1 lives, and makes no adapter
    maker = subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not any((folder / ROLES["weights"]).exists() for folder in made(tmp_path)):
            assert maker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        asyncio.run(cache.sweep())
        assert not dead.exists()
        [making] = made(tmp_path)
        assert (making / ROLES["weights"]).read_bytes() == b"half"
    finally:
        maker.kill()
        maker.wait()
    asyncio.run(cache.sweep())
    assert made(tmp_path) == []


async def test_what_has_rotted_is_fetched_again(cache: AdapterCache, store: ArtifactStore, tmp_path: Path) -> None:
    blobs = await brought(store, tmp_path)
    weights = tmp_path / "adapters" / DIGEST / ROLES["weights"]
    good = await cache.place(DIGEST, blobs, tmp_path / "first")
    assert not await cache.distrust(DIGEST, blobs, good)
    content = weights.read_bytes()
    weights.unlink()  # its links, in the store and in scratch, stay as they are
    weights.write_bytes(b"rotten" + content[6:])
    bad = await cache.place(DIGEST, blobs, tmp_path / "second")
    assert (bad / ROLES["weights"]).read_bytes() != content  # of the right size, and not read again by this process
    assert await cache.distrust(DIGEST, blobs, bad)
    again = await cache.place(DIGEST, blobs, tmp_path / "third")
    assert (again / ROLES["weights"]).read_bytes() == weights.read_bytes() == content
    (again / ROLES["config"]).unlink()
    assert await cache.distrust(DIGEST, blobs, again)
