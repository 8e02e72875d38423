"""The catalogue: which resources exist and whose they are.

The manifest in the store is the truth; Redis holds a copy of it under the resource's id, a list per kind and owner, and
a tombstone for what expired.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

import orjson
from redis.asyncio import Redis, RedisCluster

from bathyscope.errors import InvalidRequest
from bathyscope_backplane.artifacts._store import ArtifactStore, Blob
from bathyscope_backplane.broker import answer

_PATIENCE_S = 8.0
"""Seconds that a reply of Redis may take, retries included."""

_TIES = 65
"""Entries read beyond a page, for those made in the cursor's own millisecond."""


@dataclass(slots=True)
class Resource:
    """What a job made."""

    id: str
    """`ext_…`, `prb_…`, …"""

    kind: str
    """`extraction`, `probe`, `prediction`, …"""

    owner: str
    """Id of the API key it belongs to."""

    job: str
    """The job that made it."""

    created_ms: int
    """Unix time of the commit."""

    expires_ms: int | None
    """Unix time after which it is gone; null is never."""

    body: dict[str, Any]
    """The wire object."""

    blobs: dict[str, Blob] = field(default_factory=dict)
    """Its large objects by role."""

    private: dict[str, Any] = field(default_factory=dict)
    """What the service needs and does not show, as the layout of a file."""

    @property
    def manifest_key(self) -> str:
        """Where its manifest lies in the store."""
        return manifest_key(self.id)

    def dump(self) -> bytes:
        """As JSON."""
        return orjson.dumps(
            {
                "id": self.id,
                "kind": self.kind,
                "owner": self.owner,
                "job": self.job,
                "created_ms": self.created_ms,
                "expires_ms": self.expires_ms,
                "body": self.body,
                "blobs": {role: blob.as_json() for role, blob in self.blobs.items()},
                "private": self.private,
            }
        )

    @classmethod
    def parse(cls, data: bytes | str) -> Resource:
        """The reverse of `dump`."""
        document = orjson.loads(data)
        document["blobs"] = {role: Blob(**blob) for role, blob in document["blobs"].items()}
        return cls(**document)


def manifest_key(resource_id: str) -> str:
    """Where the manifest of a resource lies in the store."""
    return f"manifests/{resource_id}.json"


class Catalogue:
    """Resources by id and by owner."""

    def __init__(
        self, redis: Redis | RedisCluster, store: ArtifactStore, namespace: str, *, tombstone_days: float = 30.0
    ) -> None:
        self._redis: Any = redis  # replies are decoded
        self._store = store
        self._prefix = f"{{{namespace}}}:res"
        self._tombstone_seconds = max(1, int(tombstone_days * 86_400))  # Redis refuses 0

    async def commit(self, resource: Resource) -> Resource:
        """Make a resource visible, or return the one that another attempt of the same job committed first.

        The loser's blobs are removed.
        """
        if not await self._store.commit(resource.manifest_key, resource.dump()):
            winner = await self.committed(resource.id)
            if winner is not None:
                kept = {blob.key for blob in winner.blobs.values()}
                for blob in resource.blobs.values():
                    if blob.key not in kept:
                        await self._store.delete(blob.key)
                resource = winner
        await self.index(resource)
        return resource

    async def committed(self, resource_id: str) -> Resource | None:
        """The resource as the store knows it: the truth, slower than `get`."""
        data = await self._store.get(manifest_key(resource_id))
        return Resource.parse(data) if data is not None else None

    async def index(self, resource: Resource) -> None:
        """Enter a committed resource into Redis."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(f"{self._prefix}:{resource.id}", resource.dump())
            for owner in (resource.owner, ""):
                pipe.zadd(f"{self._prefix}list:{resource.kind}:{owner}", {resource.id: resource.created_ms})
            if resource.expires_ms is not None:
                pipe.zadd(f"{self._prefix}expiry", {resource.id: resource.expires_ms})
            await answer(pipe.execute(), _PATIENCE_S)

    async def get(self, resource_id: str) -> Resource | None:
        """A resource by id, null when there is none, whoever asks: the caller checks the owner."""
        data = await self._ask(self._redis.get(f"{self._prefix}:{resource_id}"))
        if data is None:
            return None
        resource = Resource.parse(data)
        return None if resource.expires_ms is not None and resource.expires_ms <= time.time() * 1000 else resource

    async def tombstone(self, resource_id: str) -> str | None:
        """The owner of a resource that expired, null when there never was one or it was deleted."""
        owner: str | None = await self._ask(self._redis.get(f"{self._prefix}tomb:{resource_id}"))
        if owner is None and (data := await self._ask(self._redis.get(f"{self._prefix}:{resource_id}"))) is not None:
            owner = Resource.parse(data).owner  # expired, not swept yet
        return owner

    async def list(
        self, kind: str, owner: str | None, *, limit: int, cursor: str | None
    ) -> tuple[list[Resource], str | None]:
        """One page, newest first, of one owner or (None) of all; and the next page's cursor."""
        key = f"{self._prefix}list:{kind}:{owner or ''}"
        below = _decode_cursor(cursor) if cursor is not None else None
        found: list[Resource] = []
        highest: float | str = "+inf" if below is None else below[0]
        ids = await self._ask(
            self._redis.zrevrangebyscore(key, highest, "-inf", start=0, num=limit + _TIES, withscores=True)
        )
        entries = [(str(member), int(score)) for member, score in ids]
        if below is not None:  # ids sort by time, so they break ties of the same millisecond
            entries = [entry for entry in entries if (entry[1], entry[0]) < below]
        page = entries[:limit]
        if page:
            values = await self._ask(self._redis.mget([f"{self._prefix}:{member}" for member, _ in page]))
            found = [Resource.parse(value) for value in values if value is not None]
        last = page[-1] if page and len(entries) > limit else None
        return found, _encode_cursor(last) if last is not None else None

    async def delete(self, resource: Resource, *, expired: bool = False) -> None:
        """Remove a resource: from Redis first, then the manifest, then the blobs."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(f"{self._prefix}:{resource.id}")
            for owner in (resource.owner, ""):
                pipe.zrem(f"{self._prefix}list:{resource.kind}:{owner}", resource.id)
            if expired:
                pipe.set(f"{self._prefix}tomb:{resource.id}", resource.owner, ex=self._tombstone_seconds)
            await answer(pipe.execute(), _PATIENCE_S)
        await self._store.delete(resource.manifest_key)
        for blob in resource.blobs.values():
            await self._store.delete(blob.key)
        await self._ask(self._redis.zrem(f"{self._prefix}expiry", resource.id))

    async def sweep(self, limit: int = 100) -> int:
        """Remove what has expired; how many."""
        now = int(time.time() * 1000)
        due = await self._ask(self._redis.zrangebyscore(f"{self._prefix}expiry", "-inf", now, start=0, num=limit))
        for member in due:
            data = await self._ask(self._redis.get(f"{self._prefix}:{member}"))
            resource = Resource.parse(data) if data is not None else await self.committed(member)
            if resource is not None:
                await self.delete(resource, expired=True)
            else:
                await self._ask(self._redis.zrem(f"{self._prefix}expiry", member))
        return len(due)

    async def _ask(self, awaitable: Awaitable[Any]) -> Any:
        """A reply of Redis; raises `errors.Unavailable`."""
        return await answer(awaitable, _PATIENCE_S)


def _encode_cursor(entry: tuple[str, int]) -> str:
    return base64.urlsafe_b64encode(f"{entry[1]}:{entry[0]}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> tuple[int, str]:
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
        score, _, member = text.partition(":")
        if not member or not score.isdigit() or len(score) > 15:
            raise ValueError(cursor)
        return int(score), member
    except ValueError:
        raise InvalidRequest(
            "The cursor is not one that this list gave.",
            errors=[{"pointer": "/cursor", "detail": "take next_cursor from the page before"}],
        ) from None
