"""The object store behind artifacts: a folder by default, S3, GCS or Azure by URL.

How a result becomes visible: it is written to scratch, uploaded in parts under a key that no other attempt uses
(`blobs/<id>/<attempt>`), and then a small JSON manifest is put at `manifests/<id>.json` *if nothing is there yet*.
That conditional put is the commit. Two attempts that race therefore end with one manifest, and the loser removes its
own blob. Redis only caches the manifests; they can be listed from here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from bathyscope.errors import SetupError, Unavailable

CHUNK_BYTES = 4 * 2**20
"""Size of the pieces in which objects are read."""

_PART_BYTES = 16 * 2**20
"""Size of the parts of an upload; S3 wants 5 MiB at least."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Blob:
    """A large object of a resource."""

    key: str
    """Key in the store."""

    bytes: int
    """Size."""

    sha256: str
    """Digest of the content, hex."""

    def as_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {"key": self.key, "bytes": self.bytes, "sha256": self.sha256}


class ArtifactStore:
    """Objects by key. Every method raises `errors.Unavailable` when the store cannot be reached."""

    def __init__(self, url: str, options: dict[str, str] | None = None) -> None:
        self._folder: Path | None = None
        try:
            if url.startswith("file://"):
                self._folder = Path(unquote(urlparse(url).path))
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._store: Any = LocalStore(prefix=self._folder)
            else:
                self._store = from_url(url, **(options or {}))  # type: ignore[call-overload]
        except (BaseError, OSError, ValueError) as error:
            raise SetupError(f"The artifact store {url} cannot be opened: {error}.") from error

    async def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing what was there."""
        await self._run(obstore.put_async(self._store, key, data))
        await self._settle(key)

    async def put_file(self, key: str, path: Path) -> Blob:
        """Move a scratch file into the store under a new key; the file is gone afterwards.

        Read twice at most (digest, upload), in pieces; never held in memory.
        """
        target = self._folder / key if self._folder is not None else None
        digest, size, adopted = await asyncio.to_thread(_digest_and_adopt, path, target)
        if adopted:
            return Blob(key, size, digest)
        await self._run(obstore.put_async(self._store, key, path, chunk_size=_PART_BYTES, max_concurrency=4))
        await self._settle(key)
        await asyncio.to_thread(path.unlink, missing_ok=True)
        return Blob(key, size, digest)

    async def commit(self, key: str, manifest: bytes) -> bool:
        """Put a manifest if there is none; False when another attempt was first."""
        try:
            await self._run(obstore.put_async(self._store, key, manifest, mode="create"))
        except AlreadyExistsError:
            return False
        await self._settle(key)
        return True

    async def get(self, key: str) -> bytes | None:
        """A small object, null when there is none."""
        try:
            answer = await self._run(obstore.get_async(self._store, key))
            return bytes(await self._run(answer.bytes_async()))
        except FileNotFoundError:
            return None

    async def read(self, key: str, start: int, end: int) -> memoryview:
        """Bytes `[start, end)` of an object."""
        if end <= start:
            return memoryview(b"")
        return memoryview(await self._run(obstore.get_range_async(self._store, key, start=start, end=end)))

    async def stream(self, key: str, start: int, end: int) -> AsyncIterator[memoryview]:
        """Bytes `[start, end)` in pieces of at most `CHUNK_BYTES`."""
        while start < end:
            stop = min(start + CHUNK_BYTES, end)
            yield await self.read(key, start, stop)
            start = stop

    async def download(self, key: str, path: Path) -> None:
        """Copy an object into a file."""
        size = await self.size(key)
        if size is None:
            raise FileNotFoundError(key)
        with path.open("wb") as file:
            async for piece in self.stream(key, 0, size):
                await asyncio.to_thread(file.write, piece)

    def local_path(self, key: str) -> Path | None:
        """Where an object lies when the store is a folder of this machine, else null; for reading only."""
        path = self._folder / key if self._folder is not None else None
        return path if path is not None and path.is_file() else None

    async def size(self, key: str) -> int | None:
        """Size in bytes, null when there is no such object."""
        try:
            return int((await self._run(obstore.head_async(self._store, key)))["size"])
        except FileNotFoundError:
            return None

    async def delete(self, key: str) -> None:
        """Remove an object; none there is no error."""
        try:
            await self._run(obstore.delete_async(self._store, key))
        except FileNotFoundError:
            return

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        """Every key below a prefix."""
        try:
            async for page in obstore.list(self._store, prefix=prefix):
                for entry in page:
                    yield entry["path"]
        except BaseError as error:
            raise _unavailable(error) from error

    async def check(self) -> None:
        """Raise `Unavailable` unless the store answers."""
        await self.size("health")

    async def _run(self, awaitable: Any) -> Any:
        try:
            return await awaitable
        except (AlreadyExistsError, FileNotFoundError):
            raise
        except (BaseError, OSError) as error:
            raise _unavailable(error) from error

    async def _settle(self, key: str) -> None:
        """A folder's files are flushed to the disk, as an object store's are: 'succeeded' must survive a power cut."""
        if self._folder is not None:
            await asyncio.to_thread(_flush, self._folder / key)


def _unavailable(error: BaseException) -> Unavailable:
    """The store's own words hold addresses that are no business of a client: they go to the log."""
    _log.error("store.fault", error=str(error)[:2000])
    return Unavailable("The artifact store is out of reach; try again in a moment.", retry_after=5)


def _digest_and_adopt(path: Path, target: Path | None) -> tuple[str, int, bool]:
    """In one thread's turn: a small result waits for no second one."""
    return *_digest(path), target is not None and _adopt(path, target)


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _adopt(path: Path, target: Path) -> bool:
    """Rename a file into a folder store; False when they lie on different file systems."""
    _flush(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.rename(target)
    except OSError:
        return False
    return True
