"""Upkeep of the store: the catalogue made anew from it, faults in it named, what belongs to nothing removed.

Manifests are the truth and everything follows from them, so all of this may run beside a working service and may be
cut short and begun again. What is not understood is named and left alone.

An orphan is a blob that no manifest names, or inputs, or what shards left, of a job that has ended or that the queue
does not know. A folder
of an adapter's files is one when no manifest names it and every job that brought it or has a share in it has come to
its end.
Every blob is one for a while, between its upload and the commit of its manifest, so only those older than a grace are
removed, each after one more look at the manifest that might name it by now.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bathyscope_backplane.artifacts._catalogue import Catalogue
from bathyscope_backplane.artifacts._resource import (
    MANIFESTS,
    BrokenManifest,
    Resource,
    manifest_key,
    place_of,
    read_manifest,
)
from bathyscope_backplane.artifacts._shelf import ROLES, SHELF, Shelf
from bathyscope_backplane.artifacts._store import SHARDS, ArtifactStore, Entry
from bathyscope_backplane.ids import KIND_PREFIX, is_id

_AT_ONCE = 16
"""Manifests that are read at the same time."""

_LARGEST_MANIFEST = 64 * 2**20

_WEIGHTS = ROLES["weights"]

_NAMED = 1000
"""Faults that are named; beyond that they are counted."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in the store that is not as it should be."""

    key: str
    reason: str


@dataclass(slots=True)
class Rebuilt:
    """What a rebuild, or a check, found."""

    manifests: int = 0
    """Looked at."""
    entered: int = 0
    """Resources that Redis did not know."""
    known: int = 0
    """Resources that it knew."""
    expired: int = 0
    """Of both, those whose time is over: the next sweep removes them."""
    deleted: int = 0
    """Deleted lately, by Redis' account, and left so."""
    bytes: int = 0
    """Of the blobs of all resources that are good."""
    owners: dict[str, int] = field(default_factory=dict)
    """Good resources of each owner."""
    refused: int = 0
    """Manifests that are not believed, or whose blobs are not as they say."""
    faults: list[Fault] = field(default_factory=list)
    """The first of these by name."""


@dataclass(slots=True)
class Swept:
    """What a sweep removed, or with `dry_run` would have."""

    blobs: int = 0
    inputs: int = 0
    shards: int = 0
    """What shards of jobs that have ended left."""
    uploads: int = 0
    """Files of uploads to a folder store that were cut short."""
    bytes: int = 0
    young: int = 0
    """Orphans within the grace: of work that goes on, or to be removed later."""
    foreign: int = 0
    """Objects that are not named as this service names its own; left alone."""


async def rebuild(
    store: ArtifactStore, catalogue: Catalogue, tell: Callable[[Rebuilt], None] = lambda found: None
) -> Rebuilt:
    """Enter every good resource of the store into Redis. `tell` hears how far it is, after each manifest."""
    await catalogue.shelf.rebuilding(True)
    found = await _walk(store, catalogue, tell)
    await catalogue.shelf.rebuilding(False)  # a rebuild that was cut short leaves it: another one is due
    return found


async def check(store: ArtifactStore, tell: Callable[[Rebuilt], None] = lambda found: None) -> Rebuilt:
    """Look at every manifest and at whether its blobs are there; nothing is changed."""
    return await _walk(store, None, tell)


async def sweep(
    store: ArtifactStore,
    job_known: Callable[[str], Awaitable[bool]],
    *,
    grace_s: float,
    dry_run: bool = False,
    shelf: Shelf | None = None,
    job_open: Callable[[str], Awaitable[bool]] | None = None,
) -> Swept:
    """Remove orphans that were put longer than `grace_s` ago, by the store's clock.

    `job_open` says whether a job may go on: of those that may not, inputs are swept while their records are still
    known. With it and the `shelf`, adapters' files are swept too.
    """
    needs_inputs = job_open or job_known
    swept = Swept()
    before_ms = time.time() * 1000 - grace_s * 1000
    await _sweep_blobs(store, swept, before_ms, dry_run)
    if shelf is not None and job_open is not None:
        await _sweep_shelf(store, shelf, job_open, swept, before_ms, dry_run)
    async for entry in store.entries("inputs/"):
        job_id, _, suffix = entry.key.removeprefix("inputs/").partition(".")
        if suffix not in ("jsonl", "archive") or not is_id(job_id, "job"):
            swept.foreign += 1
        elif not await needs_inputs(job_id):
            if entry.modified_ms >= before_ms:
                swept.young += 1
                continue
            swept.inputs += 1
            swept.bytes += entry.bytes
            if not dry_run:
                await store.delete(entry.key)
    async for entry in store.entries(SHARDS):
        job_id, _, name = entry.key.removeprefix(SHARDS).partition("/")
        if not is_id(job_id, "job") or not name:
            swept.foreign += 1
        elif await needs_inputs(job_id):
            continue
        elif entry.modified_ms >= before_ms:
            swept.young += 1
        else:
            swept.shards += 1
            swept.bytes += entry.bytes
            if not dry_run:
                await store.delete(entry.key)
    for path, entry in await store.leftovers():
        if entry.modified_ms >= before_ms:
            swept.young += 1
            continue
        swept.uploads += 1
        swept.bytes += entry.bytes
        if not dry_run:
            await asyncio.to_thread(_unlink, path)
    return swept


async def _walk(store: ArtifactStore, catalogue: Catalogue | None, tell: Callable[[Rebuilt], None]) -> Rebuilt:
    found = Rebuilt()
    async for item in _manifests(store):
        if item is None:  # deleted since it was listed
            continue
        found.manifests += 1
        if isinstance(item, Fault):
            found.refused += 1
            if len(found.faults) < _NAMED:
                found.faults.append(item)
        else:
            entered = await catalogue.index(item) if catalogue is not None else "known"
            if entered == "deleted":
                found.deleted += 1
            else:
                found.entered += entered == "new"
                found.known += entered == "known"
                found.expired += item.expired
                found.bytes += item.bytes
                found.owners[item.owner] = found.owners.get(item.owner, 0) + 1
        tell(found)
    return found


async def _manifests(store: ArtifactStore) -> AsyncIterator[Resource | Fault | None]:
    """Every manifest of the store, read some at a time."""
    reading: deque[asyncio.Task[Resource | Fault | None]] = deque()
    try:
        async for entry in store.entries(MANIFESTS):
            reading.append(asyncio.create_task(_read(store, entry)))
            if len(reading) >= _AT_ONCE:
                yield await reading.popleft()
        while reading:
            yield await reading.popleft()
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


async def _read(store: ArtifactStore, entry: Entry) -> Resource | Fault | None:
    """The resource of a manifest, what is wrong with it, or null when it has gone."""
    if entry.bytes > _LARGEST_MANIFEST:
        return Fault(entry.key, f"it has {entry.bytes:,} bytes, more than any manifest")
    try:
        place_of(entry.key)  # the store may hold names that cannot be asked for
        data = await store.get(entry.key)
        if data is None:
            return None
        resource = read_manifest(entry.key, data)
    except BrokenManifest as error:
        return Fault(entry.key, str(error))
    for blob in resource.blobs.values():
        size = await store.size(blob.key)
        if size != blob.bytes:
            if await store.size(entry.key) is None:
                return None  # it is being deleted: manifests go before their blobs
            how = "is missing" if size is None else f"has {size:,} bytes and should have {blob.bytes:,}"
            return Fault(entry.key, f"its blob {blob.key} {how}")
    return resource


async def _sweep_blobs(store: ArtifactStore, swept: Swept, before_ms: float, dry_run: bool) -> None:
    committed = {key.removeprefix(MANIFESTS).removesuffix(".json") async for key in store.keys(MANIFESTS)}
    group: list[Entry] = []
    async for entry in store.entries("blobs/"):
        if group and _resource_id(group[0]) != _resource_id(entry):
            await _sweep_group(store, swept, group, committed, before_ms, dry_run)
            group = []
        group.append(entry)
    if group:
        await _sweep_group(store, swept, group, committed, before_ms, dry_run)


async def _sweep_group(
    store: ArtifactStore, swept: Swept, group: list[Entry], committed: set[str], before_ms: float, dry_run: bool
) -> None:
    """Sweep the blobs of one id."""
    resource_id = _resource_id(group[0])
    if resource_id is None:
        swept.foreign += len(group)
        return
    if resource_id in committed and len(group) == 1:
        return  # all that there is: a manifest whose blob is another is named by `check`
    old = [entry for entry in group if entry.modified_ms < before_ms]
    if resource_id not in committed:
        swept.young += len(group) - len(old)
    if not old:
        return
    data = await store.get(manifest_key(resource_id))  # it may have been committed since they were listed
    try:
        named = {blob.key for blob in read_manifest(manifest_key(resource_id), data).blobs.values()} if data else set()
    except BrokenManifest:
        return  # what it names is not known
    for entry in old:
        if entry.key not in named:
            swept.blobs += 1
            swept.bytes += entry.bytes
            if not dry_run:
                await store.delete(entry.key)


async def _sweep_shelf(
    store: ArtifactStore,
    shelf: Shelf,
    job_open: Callable[[str], Awaitable[bool]],
    swept: Swept,
    before_ms: float,
    dry_run: bool,
) -> None:
    folders: dict[str, list[Entry]] = {}
    async for entry in store.entries(SHELF):
        parts = entry.key.split("/")
        if len(parts) != 4 or not is_id(parts[2].partition(".")[0], "job"):
            swept.foreign += 1
        else:
            folders.setdefault("/".join(parts[:3]), []).append(entry)
    old = {key: files for key, files in folders.items() if all(entry.modified_ms < before_ms for entry in files)}
    unnamed = old and await _unnamed(store, set(old))
    swept.young += len(folders) - len(old)
    for folder in sorted(unnamed):
        _, digest, name = folder.split("/")
        weights = f"{folder}/{_WEIGHTS}"
        holders = await shelf.holders(weights)
        jobs = {name.partition(".")[0], *(holder.job for holder in holders)}
        if any([await job_open(job) for job in jobs]):
            swept.young += 1
            continue
        if dry_run:
            gone = True
        else:
            dead = [holder for holder in holders if await store.size(manifest_key(holder.id)) is None]
            # Whose claims these were is not known here; those of ended jobs do not count when they are met.
            gone = await shelf.release(dead, "", digest, "", None, weights)
        if gone:
            swept.blobs += len(old[folder])
            swept.bytes += sum(entry.bytes for entry in old[folder])
            for entry in () if dry_run else old[folder]:
                await store.delete(entry.key)


async def _unnamed(store: ArtifactStore, folders: set[str]) -> set[str]:
    """Those that no manifest of an adapter names. Of one that cannot be read, what stands in it counts as named."""
    async for key in store.keys(MANIFESTS):
        if folders and key.startswith(f"{MANIFESTS}ad_"):
            data = await store.get(key) or b""
            folders -= {folder for folder in folders if folder.encode() in data}
    return folders


def _resource_id(entry: Entry) -> str | None:
    """The resource that a blob is of; null when it is not named like one."""
    parts = entry.key.split("/")
    known = len(parts) == 3 and any(is_id(parts[1], prefix) for prefix in KIND_PREFIX.values())
    return parts[1] if known else None


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
