"""The moment of the commit: what happens to a result whose lease is lost between the last look and the manifest.

No kill from outside hits that moment, so the attempt is run here by itself, on a real server and a real store, and the
world changes while it puts its manifest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bathyscope_backplane.artifacts import Resource
from bathyscope_backplane.broker import Lease, NewJob
from bathyscope_backplane.embedded import EmbeddedServer
from bathyscope_backplane.ids import new_id
from bathyscope_backplane.plane import Backplane, open_backplane
from bathyscope_backplane.settings import Settings
from bathyscope_workers.jobs import JobWork
from bathyscope_workers.supervisor._attempt import Attempt


class Making:
    """A kind of job whose result is three bytes."""

    def path(self, resource_id: str | None) -> str | None:
        return f"/v1/extractions/{resource_id}"

    async def commands(self, work: JobWork) -> list[Any]:
        return [work.run_command()]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> Resource:
        (path := work.scratch / "result").write_bytes(b"abc")
        return work.resource({}, blobs={"states": await work.keep(path, ".bin")})


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Backplane]:
    with EmbeddedServer(tmp_path):
        async with open_backplane(Settings(data_dir=tmp_path, jobs={"max_attempts": 1})) as opened:
            yield opened


async def take(plane: Backplane) -> Lease:
    (lease,) = (await plane.broker.take("w", ["cpu"], 1, lease_ms=30_000, engine_idle=True)).leases
    return lease


def attempt_at(plane: Backplane, lease: Lease, scratch: Path) -> Attempt:
    async def never(lane: str, problem: dict[str, Any]) -> bool:
        return False

    made = Attempt(
        plane=plane,
        lease=lease,
        kind=Making(),
        scratch=scratch,
        resident=None,
        send=lambda command: None,
        is_for_another=never,
        confirmed=float("inf"),
    )
    made.hear({"ev": "done", "id": lease.job_id, "result": {}, "timings": {}})
    return made


async def lapse(plane: Backplane) -> None:
    plane.broker.clock_skew_ms += 31_000
    await plane.broker.reap()


def stored(plane: Backplane) -> list[str]:
    folder = plane.settings.data_dir / "artifacts"
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file())


@pytest.mark.parametrize("fate", ["cancelled", "taken anew", "done by another"])
async def test_a_lease_lost_while_the_manifest_is_put(
    plane: Backplane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    job = NewJob(
        id=new_id("job"), kind="extraction", lane="cpu", owner="key_a", payload='{"spec": {}}', resource_id="ext_1"
    )
    await plane.broker.submit(job)
    attempt = attempt_at(plane, await take(plane), tmp_path / "first")
    commit = plane.catalogue.commit

    async def meanwhile(resource: Resource) -> Resource:
        monkeypatch.undo()
        await lapse(plane)
        if fate == "cancelled":
            await plane.broker.cancel(job.id)
        elif fate == "done by another":
            await attempt_at(plane, await take(plane), tmp_path / "second").run()
        return await commit(resource)

    monkeypatch.setattr(plane.catalogue, "commit", meanwhile)
    await attempt.run()
    if fate == "taken anew":
        assert (await plane.broker.get(job.id)).status == "queued"  # type: ignore[union-attr]
        await attempt_at(plane, await take(plane), tmp_path / "second").run()
    record = await plane.broker.get(job.id)
    assert record is not None
    if fate == "cancelled":
        assert record.status == "cancelled"
        assert stored(plane) == []
        assert await plane.catalogue.get("ext_1") is None
    else:
        assert record.status == "succeeded"
        blob, manifest = stored(plane)
        assert manifest == "manifests/ext_1.json"
        kept = await plane.catalogue.get("ext_1")
        assert kept is not None
        assert [one.key for one in kept.blobs.values()] == [blob]
