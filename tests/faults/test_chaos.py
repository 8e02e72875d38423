"""Two workers, many jobs of every kind, and a blow every few seconds: each job still ends succeeded, once, and right.

In `make test` a short form runs on one server; `make faults` runs the whole on both. The plan comes from a seed that is
printed first; `BATHYSCOPE_FAULTS_SEED` repeats it.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from bathyscope_backplane.artifacts import Resource, sweep
from bathyscope_backplane.plane import open_backplane
from bathyscope_backplane.settings import Settings
from tests.faults import WHOLE
from tests.faults.chaos import HANG_SECONDS, LEASE_SECONDS, Chaos, plan
from tests.faults.test_kills import SERVERS
from tests.faults.work import BLOCK, Run, work
from tests.files import matching
from tests.stack import Stack, stack

SERVER_NAMES = sorted(SERVERS) if WHOLE else ["valkey"]
BLOCKS, KILLS, APART = (10, 15, 10.0) if WHOLE else (2, 6, 5.0)
BOUND = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("server", SERVER_NAMES)
def test_nothing_is_lost_or_doubled_whatever_is_killed(
    server: str, tmp_path: Path, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("BATHYSCOPE_FAULTS_SEED") or (random.SystemRandom().randrange(10**6) if WHOLE else 7))
    with capsys.disabled():
        print(f"\nBATHYSCOPE_FAULTS_SEED={seed} ({server})")
    items = work(seed, BLOCKS)
    with stack(
        tmp_path,
        workers=2,
        binary=Path(SERVERS[server]),
        models=models,
        jobs__lease_seconds=LEASE_SECONDS,
        # A job may be hit more often here than an operator would allow; that poison ends is another test's matter.
        jobs__max_attempts=30,
        jobs__max_group_deaths=30,
        worker__hang_seconds=HANG_SECONDS,
        worker__load_seconds=60,
        worker__adopt_seconds=0.2,
        worker__starvation_seconds=5,
        worker__threads=1,
        limits__inline_payload_bytes=4096,  # so that many jobs have their inputs in the store
    ) as running:
        undisturbed = Run(running, items, key="undisturbed")
        undisturbed.wait()
        expected = undisturbed.results()
        assert totals(running) == BLOCKS * BLOCK

        blows = plan(seed, KILLS, apart=APART)
        run = Run(running, items, key="chaos", seconds=0.9 * sum(blow.after for blow in blows))
        with capsys.disabled(), Chaos(running, blows) as chaos:
            run.wait()
            chaos.wait()
            running.wait_ready()
        assert len(chaos.done) == KILLS
        assert chaos.unasked == []

        failed = {name: made for name, made in run.made.items() if made["status"] != "succeeded"}
        assert not failed
        assert totals(running) == 2 * BLOCKS * BLOCK
        compare(run.results(), expected)
        nothing_is_left(running)
        asyncio.run(sweep_store(running))
    assert family(tmp_path) == {}


def totals(running: Stack) -> int:
    """Jobs that ever ended, as the broker counts; all of them must have succeeded."""
    with redis.Redis.from_url(running.valkey.url, decode_responses=True) as client:
        counted = client.hgetall("{bathyscope}:totals")
    ended = {name: int(number) for name, number in counted.items() if not name.startswith("|")}
    assert all(name.endswith("|succeeded") for name in ended), ended
    return sum(ended.values())


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every vector within the bound, relative to its norm; probabilities within it as they are."""
    assert found.keys() == expected.keys()
    far = {}
    for name, numbers in found.items():
        for part, array in numbers.items():
            other = expected[name][part]
            assert array.shape == other.shape, (name, part)
            if part == "probabilities":
                error = np.abs(array - other).max()
            else:
                norm = np.linalg.norm(other, axis=-1)
                error = (np.linalg.norm(array - other, axis=-1) / np.where(norm == 0, 1, norm)).max()
            if not error <= BOUND:
                far[name, part] = error
    assert not far


def nothing_is_left(running: Stack) -> None:
    """No job, lease, waiting entry, scratch file, blob or engine is there that nothing explains."""
    with redis.Redis.from_url(running.valkey.url, decode_responses=True) as client:
        prefix = "{bathyscope}:"
        for name in ("leases", "delayed", "waiting", "dead", "lane_load", "owner_load", "aged"):
            assert not client.exists(prefix + name), name
        statuses = client.hgetall(prefix + "tally")
        assert set(statuses) == {"succeeded"}, statuses
        gone = ("children", "ready", "turns", "passed", "age", "solo")
        left = [key for key in client.scan_iter(count=1000) if key.removeprefix(prefix).partition(":")[0] in gone]
        assert left == []

    # The folders of the living are there and empty; who was killed last may still be starting.
    workers = {f"{name}-{process.pid}" for name, process in running.processes.items() if name != "service"}
    scratch = running.data_dir / "scratch"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        folders = {path.name for path in scratch.iterdir() if path.is_dir()}
        files = matching(scratch, "*/*")
        if folders == workers and not files:
            break
        time.sleep(0.2)
    assert files == []
    assert folders == workers

    # Each living worker has its three engines, and nobody else has any.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        engines = {
            pid: parent
            for pid, (parent, words) in family(running.data_dir).items()
            if "bathyscope_workers.engine" in words
        }
        parents = sorted(engines.values())
        alive = sorted(3 * [process.pid for name, process in running.processes.items() if name != "service"])
        if parents == alive:
            break
        time.sleep(0.3)
    assert parents == alive


async def sweep_store(running: Stack) -> None:
    """Every blob belongs to a manifest, once those are swept that a kill left between an upload and its commit."""
    folder = running.data_dir / "artifacts"
    settings = Settings(data_dir=running.data_dir, redis_url=running.valkey.url)
    async with open_backplane(settings) as plane:
        swept = await sweep(plane.store, plane.broker.knows, grace_s=0)
        assert swept.blobs + swept.uploads + swept.inputs <= KILLS
        manifests = [Resource.parse(path.read_bytes()) for path in folder.glob("manifests/*")]
        assert len(manifests) == 2 * BLOCKS * BLOCK
        named = {blob.key: blob.bytes for resource in manifests for blob in resource.blobs.values()}
        assert {str(path.relative_to(folder)): path.stat().st_size for path in folder.glob("blobs/*/*")} == named
        for resource in manifests:
            assert await plane.catalogue.get(resource.id) is not None
    # Inputs go when their job has ended; of one killed just then they go with the job's record.
    assert len(list(folder.glob("inputs/*"))) <= KILLS


def family(data_dir: Path) -> dict[int, tuple[int, list[str]]]:
    """Every process that was started over this data folder, however far down: parent and command line."""
    found = {}
    mark = f"BATHYSCOPE_DATA_DIR={data_dir}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    found[int(folder.name)] = (int(stat[1]), words)
        except OSError:
            continue
    return found
