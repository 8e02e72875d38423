"""What the kinds of jobs share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import orjson

from bathyscope.errors import Expired, InternalError
from bathyscope_backplane.artifacts import ArtifactStore, Blob, Blobs, Resource
from bathyscope_backplane.broker import Lease
from bathyscope_backplane.plane import Backplane
from bathyscope_backplane.reuse import stage_digest
from bathyscope_backplane.times import rfc3339
from bathyscope_backplane.vault import Credentials
from bathyscope_workers.adapters.cache import AdapterCache
from bathyscope_workers.engine.protocol import RunJob
from bathyscope_workers.models.spec import ModelSpec

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Handover:
    """The job's work here is done, and goes on in another lane."""

    lane: str
    payload: dict[str, Any]
    """What it needs there."""

    drop: tuple[str, ...] = ()
    """Keys of the store that it does not need there."""


@dataclass(frozen=True, slots=True)
class Existing:
    """What the job was to make is there already."""

    path: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What an attempt at a shard made: in the store, and not committed."""

    document: str
    """Key of the document."""

    content: bytes
    keys: tuple[str, ...]
    """Its files."""

    async def commit(self, store: ArtifactStore) -> None:
        """Make it the shard's, unless another attempt was first."""
        if not await store.commit(self.document, self.content) and await store.get(self.document) != self.content:
            await self.drop(store)

    async def drop(self, store: ArtifactStore) -> None:
        """Remove the files."""
        for key in self.keys:
            await store.delete(key)


class Undecided(Exception):
    """What the job waits for is another job's to decide: it gives its place up, and is tried again later."""


@dataclass(slots=True)
class JobWork:
    """One attempt, as the module of its kind sees it."""

    plane: Backplane
    lease: Lease
    payload: dict[str, Any]
    """`spec`, and `rows` or `rows_key`."""

    scratch: Path
    """A folder for this attempt alone."""

    resident: ModelSpec | None
    """The base model of the job's lane, null on a lane without one."""

    credentials: Credentials = field(default_factory=Credentials)
    """What the request gave to reach other services with."""

    attached: Blobs | None = None
    """The files of the adapter that a job of that kind makes, as soon as they are in the store."""

    kept: dict[Path, Blob] = field(default_factory=dict)
    """Result files that are uploaded: `conclude` is called again when the store or Redis is away in the midst of it."""

    placed: dict[str, Blobs] = field(default_factory=dict)
    """The files, by digest, of the adapters that were put into the scratch folder."""

    earlier: Resource | None = None
    """What an earlier experiment made in the stage that this job is."""

    async def place(self, digest: str, blobs: Blobs) -> Path:
        """Where the files of an adapter lie on this machine, for this job alone."""
        folder = self.scratch / digest
        if digest not in self.placed:
            await adapter_cache(self.plane).place(digest, blobs, folder)
            self.placed[digest] = blobs
        return folder

    async def distrust(self) -> bool:
        """Whether an adapter came from this machine's disk other than it is in the store; another try has it anew."""
        cache, placed = adapter_cache(self.plane), self.placed.items()
        return any([await cache.distrust(digest, blobs, self.scratch / digest) for digest, blobs in placed])

    @property
    def spec(self) -> dict[str, Any]:
        """What was asked for, apart from the rows."""
        spec: dict[str, Any] = self.payload["spec"]
        return spec

    @property
    def most_bytes(self) -> int:
        """The largest result that is allowed: the service's limit, or what is left of the key's quota."""
        limit = self.plane.settings.limits.max_result_bytes
        return min(limit, int(self.payload.get("most_bytes", limit)))

    async def rows_path(self) -> str | None:
        """The rows as a JSON-lines file, when they were too many for the payload."""
        key = self.payload.get("rows_key")
        if key is None:
            return None
        path, shard = self.scratch / "rows.jsonl", self.lease.shard
        await self.plane.store.download(key, path, span=(shard.start, shard.end) if shard is not None else None)
        return str(path)

    async def rows(self) -> list[Any]:
        """The rows themselves: labels and the like, not texts by the hundred thousand."""
        key = self.payload.get("rows_key")
        if key is None:
            found: list[Any] = self.payload.get("rows") or []
            return found
        data = await self.plane.store.get(key)
        if data is None:
            raise InternalError("The request's rows are gone from the store.")
        return [orjson.loads(line) for line in data.splitlines()]

    async def blob_path(self, resource: Resource, role: str) -> str:
        """A resource's blob as a file of this machine, for reading only."""
        blob = resource.blobs[role]
        path = self.plane.store.local_path(blob.key)
        if path is None:
            path = self.scratch / f"{resource.id}.{role}"
            await self.plane.store.download(blob.key, path)
        return str(path)

    async def needed(self, resource_id: str) -> Resource:
        """A resource that the job reads, by its id or by that of the job that made it. Raises `Expired` when it has
        gone meanwhile."""
        if resource_id.startswith("job_"):
            resource_id = await self.made_by(resource_id)
        resource = await self.plane.catalogue.get(resource_id)
        if resource is None:
            resource = await self.plane.catalogue.committed(resource_id)
        if resource is None:
            raise Expired(f"{resource_id}, which this job reads, has expired or was deleted.")
        return resource

    async def made_by(self, job_id: str) -> str:
        """Id of what another job made. Raises `Expired` when its record is gone."""
        record = await self.plane.broker.get(job_id)
        if record is None or record.resource is None:
            raise Expired(f"The record of {job_id}, which this job follows, has gone; send the request again.")
        return record.resource.rpartition("/")[2]

    async def has_earlier(self, *parts: Any) -> bool:
        """Whether this is a stage of an experiment, and an earlier one has made the same: of what `reuse` in the spec
        stands for, and of these parts."""
        stage = self._stage(parts)
        found = await self.plane.reuse.get(self.lease.owner, stage) if stage is not None else None
        self.earlier = await self.plane.catalogue.get(found) if found is not None else None
        return self.earlier is not None

    async def noted(self, resource: Resource, *parts: Any) -> Resource:
        """The same, for later stages to find."""
        if (stage := self._stage(parts)) is not None:
            resource.private["stage"] = stage
            await self.plane.reuse.put(self.lease.owner, stage, resource.id)
        return resource

    def _stage(self, parts: tuple[Any, ...]) -> str | None:
        basis = self.spec.get("reuse")
        return None if basis is None else stage_digest(basis, *parts)

    def run_command(self, **rest: Any) -> dict[str, Any]:
        """The engine's `run` command for this job; `rest` are further members of `RunJob`."""
        job = RunJob(
            id=self.lease.job_id,
            kind="extraction" if self.lease.shard is not None else self.lease.kind,
            lane=self.lease.lane,
            owner=self.lease.owner,
            priority=self.lease.priority,
            attempt=self.lease.attempt,
            scratch=str(self.scratch),
            solo=self.lease.solo,
            **rest,
        )
        return {"op": "run", "job": job.to_wire()}

    async def keep(self, path: Path, suffix: str) -> Blob:
        """Upload a result file under a key that no other attempt uses; a second call gives what the first one kept."""
        if path not in self.kept:
            key = f"blobs/{self.lease.resource_id}/{self.lease.ref.token}{suffix}"
            self.kept[path] = await self.plane.store.put_file(key, path)
        return self.kept[path]

    def resource(self, body: dict[str, Any], **rest: Any) -> Resource:
        """The resource that the job made."""
        assert self.lease.resource_id is not None
        now = int(time.time() * 1000)
        expires = now + int(self.plane.settings.jobs.result_days * _DAY_MS)
        kind = self.lease.kind
        return Resource(
            id=self.lease.resource_id,
            kind=kind,
            owner=self.lease.owner,
            job=self.lease.job_id,
            created_ms=now,
            expires_ms=expires,
            body={
                "id": self.lease.resource_id,
                "job": self.lease.job_id,
                **body,
                "created_at": rfc3339(now),
                "expires_at": rfc3339(expires),
            },
            **rest,
        )


_caches: WeakKeyDictionary[Any, AdapterCache] = WeakKeyDictionary()


def adapter_cache(plane: Backplane) -> AdapterCache:
    """The cache of converted adapters of this worker."""
    store = plane.store
    if store not in _caches:
        settings = plane.settings
        _caches[store] = AdapterCache(settings.data_dir / "adapters", store, settings.worker.adapter_cache_bytes)
    return _caches[store]


class JobKind(Protocol):
    """What a worker does for one kind of job."""

    def path(self, resource_id: str | None) -> str | None:
        """Where the result is found over HTTP."""
        ...

    async def commands(self, work: JobWork) -> list[Any]:
        """What to send to the engine. Raises problems for what cannot be done."""
        ...

    async def conclude(
        self, work: JobWork, event: dict[str, Any]
    ) -> Resource | Handover | Existing | ShardResult | None:
        """Make the resource of the engine's `done` event: its blobs are uploaded, it is not committed."""
        ...
