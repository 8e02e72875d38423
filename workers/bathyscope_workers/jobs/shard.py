"""Shards of an extraction: what each leaves in the store, and the extraction that is made of them.

A shard's files lie below `shards/<job>/`, each attempt's under names of its own, and a small document there that is put
if there is none: as with whole jobs, that is the commit, and who comes second removes his own files. When the job has
ended for good, so does the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from bathyscope.errors import InternalError
from bathyscope_backplane.artifacts import ArtifactStore
from bathyscope_backplane.artifacts._store import SHARDS
from bathyscope_backplane.broker import Lease
from bathyscope_workers.jobs._base import JobWork, ShardResult
from bathyscope_workers.jobs.extraction import run_command
from bathyscope_workers.jobs.joining import Joiner, Part


class ShardJob:
    """A part of an extraction."""

    def path(self, resource_id: str | None) -> str | None:
        """A shard is nothing by itself."""
        return None

    async def commands(self, work: JobWork) -> list[Any]:
        """Run it in the engine, as any extraction."""
        assert work.lease.shard is not None
        return [await run_command(work, first_input=work.lease.shard.first)]

    async def conclude(self, work: JobWork, event: dict[str, Any]) -> ShardResult:
        """Upload the states."""
        result = dict(event["result"])
        files = {"states": (result.pop("path"), ".safetensors")}
        if result.get("choices") is not None:
            choices = result["choices"] = dict(result["choices"])
            files["choices"] = (choices.pop("choices_path"), ".choices.jsonl")
            files["choices_index"] = (choices.pop("choices_index_path"), ".choices.index")
        keys = {}
        for role, (path, suffix) in files.items():
            keys[role] = await _keep(work, Path(path), suffix)
        timings = {name: event.get("timings", {}).get(name, 0.0) for name in ("load", "inference")}
        return ShardResult(
            document=_document(work.lease),
            content=orjson.dumps({"result": result, "keys": keys, "timings": timings}),
            keys=tuple(keys.values()),
        )


async def is_done(store: ArtifactStore, lease: Lease) -> bool:
    """Whether an earlier attempt at a shard committed it."""
    return await store.get(_document(lease)) is not None


async def join(work: JobWork, check: Callable[[], None]) -> dict[str, Any]:
    """What an engine would have said of the whole job, whose shards are done; the files are in the scratch folder."""
    store, parts = work.plane.store, []
    for number in range(work.payload["shards"]):
        data = await store.get(f"{SHARDS}{work.lease.job_id}/{number}.json")
        if data is None:
            raise InternalError(f"Part {number} of the job's result is gone from the store.")
        parts.append(Part(**orjson.loads(data)))
    result = await Joiner(store, parts, work.scratch, check).join(work.most_bytes)
    timings = {name: sum(part.timings[name] for part in parts) for name in ("load", "inference")}
    return {"ev": "done", "id": work.lease.job_id, "result": result, "timings": timings}


async def clear(store: ArtifactStore, lease: Lease, payload: dict[str, Any]) -> None:
    """Remove all that a split job needed, which has ended: what its shards left, and its inputs."""
    await store.drop_shards(lease.whole_id)
    if (rows := payload.get("rows_key")) is not None:
        await store.delete(rows)


def _document(lease: Lease) -> str:
    assert lease.shard is not None
    return f"{SHARDS}{lease.whole_id}/{lease.shard.number}.json"


async def _keep(work: JobWork, path: Path, suffix: str) -> str:
    """As `JobWork.keep`, in the job's folder of shards; the digest is for what is published."""
    lease = work.lease
    assert lease.shard is not None
    if path not in work.kept:
        key = f"{SHARDS}{lease.whole_id}/{lease.shard.number}.{lease.ref.token}{suffix}"
        work.kept[path] = await work.plane.store.put_file(key, path, digest=False)
    return work.kept[path].key
