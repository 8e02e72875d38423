"""The catalogue: which resources exist and whose they are.

The manifest in the store is the truth. Redis holds, below `{namespace}:res`, what can be made again from it:

    :<id>                  the manifest
    list:<kind>:<owner>    ids by time of making; with no owner those of all
    expiry                 ids by the time they go
    sizes, bytes           bytes of each resource and of each owner
    tomb:<id>              owner of one that expired
    gone:<id>              it was deleted within the last hour

and what adapters share and claim (`Shelf`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from importlib.resources import files
from typing import Any, Literal

from redis.asyncio import Redis, RedisCluster

from bathyscope_backplane.artifacts._resource import Resource, manifest_key
from bathyscope_backplane.artifacts._shelf import SHELF, Claim, Shelf, dump
from bathyscope_backplane.artifacts._store import ArtifactStore
from bathyscope_backplane.broker import answer
from bathyscope_backplane.cursors import unwrap, wrap
from bathyscope_backplane.scripts import SmallScript

_PATIENCE_S = 8.0
"""Seconds that a reply of Redis may take, retries included."""

_TIES = 65
"""Entries read beyond a page, for those made in the cursor's own millisecond."""

_GONE_SECONDS = 3600
"""How long a deleted resource cannot be entered again: longer than anyone holds a manifest before entering it."""

_INDEX, _REMOVE = (
    SmallScript(files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8"))
    for name in ("index", "remove")
)

Entered = Literal["deleted", "known", "new"]
"""What became of a resource that was entered; one that was deleted lately stays deleted."""

_ENTERED: tuple[Entered, ...] = ("deleted", "known", "new")


class Catalogue:
    """Resources by id and by owner."""

    def __init__(
        self, redis: Redis | RedisCluster, store: ArtifactStore, namespace: str, *, tombstone_days: float = 30.0
    ) -> None:
        self._redis: Any = redis  # replies are decoded
        self._store = store
        self._prefix = f"{{{namespace}}}:res"
        self._tombstone_seconds = max(1, int(tombstone_days * 86_400))  # Redis refuses 0
        self.shelf = Shelf(redis, self._prefix, self._ask)

    async def commit(self, resource: Resource) -> Resource:
        """Make a resource visible, or return the one that another attempt of the same job committed first.

        The loser's blobs are removed, unless they may be others' too.
        """
        if not await self._store.commit(resource.manifest_key, resource.dump()):
            winner = await self.committed(resource.id)
            if winner is not None:
                kept = {blob.key for blob in winner.blobs.values()}
                for blob in resource.blobs.values():
                    if blob.key not in kept and not blob.key.startswith(SHELF):
                        await self._store.delete(blob.key)
                resource = winner
        await self.index(resource)
        return resource

    async def drop(self, resource: Resource) -> None:
        """Remove the blobs of a resource that is not committed, those that may be others' apart."""
        for blob in resource.blobs.values():
            if not blob.key.startswith(SHELF):
                await self._store.delete(blob.key)

    async def committed(self, resource_id: str) -> Resource | None:
        """The resource as the store knows it: the truth, slower than `get`."""
        data = await self._store.get(manifest_key(resource_id))
        return Resource.parse(data) if data is not None else None

    async def index(self, resource: Resource) -> Entered:
        """Enter a committed resource into Redis; once or many times makes no difference."""
        shelved = _shelved(resource)
        outcome: int = await self._ask(
            _INDEX.run(
                self._redis,
                [self._prefix],
                resource.id,
                resource.kind,
                resource.owner,
                resource.created_ms,
                "" if resource.expires_ms is None else resource.expires_ms,
                resource.bytes,
                resource.dump(),
                resource.job,
                *(shelved or ("", "", "")),
                dump(resource.blobs) if shelved else "",
            )
        )
        return _ENTERED[outcome]

    async def bytes_stored(self, owner: str) -> int:
        """Bytes of all blobs of an owner's resources."""
        return int(await self._ask(self._redis.hget(f"{self._prefix}bytes", owner)) or 0)

    async def get(self, resource_id: str) -> Resource | None:
        """A resource by id, null when there is none, whoever asks: the caller checks the owner."""
        data = await self._ask(self._redis.get(f"{self._prefix}:{resource_id}"))
        if data is None:
            return None
        resource = Resource.parse(data)
        return None if resource.expired else resource

    async def standing(self, resource_id: str, kind: str, owner: str) -> Literal["own", "expired", "none"]:
        """Whether a resource is this owner's, was until it expired, or is not, without a look at the resource.

        So another's takes exactly as long as one that never was.
        """
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zscore(f"{self._prefix}list:{kind}:{owner}", resource_id)
            pipe.get(f"{self._prefix}tomb:{resource_id}")
            listed, buried = await self._ask(pipe.execute())
        if listed is not None:
            return "own"
        return "expired" if buried == owner else "none"

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
        below = unwrap(cursor, _entry) if cursor is not None else None
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
            found = [resource for resource in found if not resource.expired]
        last = page[-1] if page and len(entries) > limit else None
        return found, wrap(f"{last[1]}:{last[0]}") if last is not None else None

    async def delete(self, resource: Resource, *, expired: bool = False) -> None:
        """Remove a resource: from Redis first, then the manifest, then the blobs.

        What is cut short by an outage the sweep ends; the resource is not seen any more in any case.
        """
        await self._ask(
            _REMOVE.run(
                self._redis,
                [self._prefix],
                resource.id,
                resource.kind,
                resource.owner,
                int(time.time() * 1000),
                _GONE_SECONDS,
                self._tombstone_seconds if expired else 0,
            )
        )
        shelved, alone = _shelved(resource), True
        if shelved:
            claim = Claim(resource.id, resource.job)
            alone = await self.shelf.release([claim], resource.owner, *shelved, resource.blobs["weights"].key)
        await self._store.delete(resource.manifest_key)
        for blob in resource.blobs.values():
            if alone:
                await self._store.delete(blob.key)
        await self._ask(self._redis.zrem(f"{self._prefix}expiry", resource.id))

    async def sweep(self, limit: int = 100) -> int:
        """Remove what has expired, and end deletes that were cut short; how many."""
        now = int(time.time() * 1000)
        due = await self._ask(self._redis.zrangebyscore(f"{self._prefix}expiry", "-inf", now, start=0, num=limit))
        for member in due:
            data = await self._ask(self._redis.get(f"{self._prefix}:{member}"))
            resource = Resource.parse(data) if data is not None else await self.committed(member)
            if resource is not None:
                await self.delete(resource, expired=data is not None)
            else:
                await self._ask(self._redis.zrem(f"{self._prefix}expiry", member))
        return len(due)

    async def claim_sweep(self, seconds: int) -> bool:
        """Whether the store is to be swept of orphans by this process now: one does, once in so many seconds."""
        return bool(await self._ask(self._redis.set(f"{self._prefix}swept", "1", nx=True, ex=seconds)))

    async def _ask(self, awaitable: Awaitable[Any]) -> Any:
        """A reply of Redis; raises `errors.Unavailable`."""
        return await answer(awaitable, _PATIENCE_S)


def _shelved(resource: Resource) -> tuple[str, str, str] | None:
    """Digest, base model and name of an adapter, null for anything else."""
    if resource.kind != "adapter" or "weights" not in resource.blobs:
        return None
    body = resource.body
    return str(body["digest"]), str(body.get("base_model") or ""), str(body.get("name") or "")


def _entry(text: str) -> tuple[int, str]:
    """Time and id of the last entry of a page. Raises `ValueError`."""
    score, _, member = text.partition(":")
    if not member or not text.isascii() or not score.isdigit() or len(score) > 15:
        raise ValueError(text)
    return int(score), member
