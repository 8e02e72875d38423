"""The object store behind artifacts: a folder by default, S3, GCS or Azure by URL.

How a result becomes visible: it is written to scratch, uploaded in parts under a key that no other attempt uses
(`blobs/<id>/<attempt>`), and then a small JSON manifest is put at `manifests/<id>.json` *if nothing is there yet*.
That conditional put is the commit. Two attempts that race therefore end with one manifest, and the loser removes its
own blob. Redis only caches the manifests; they can be listed from here.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, from_url

from bathyscope.errors import OutOfSpace, SetupError, Unavailable
from bathyscope_backplane.artifacts._watch import Watch, watched

CHUNK_BYTES = 4 * 2**20
"""Size of the pieces in which objects are read."""

SHARDS = "shards/"
"""Where the results of a split job's shards lie until they are joined, in a folder of the job."""

_PART_BYTES = 16 * 2**20
"""Size of the parts of an upload; S3 wants 5 MiB at least."""

_PATIENCE_S = 8.0
"""Seconds that a small object may take, retries included; a request waits for it."""

_SLOWEST = 4 * 2**20
"""Bytes a second that a store is taken to move at least: what larger objects may take beyond that."""

_RETRY = {
    "max_retries": 10,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
}
"""A moment's fault of the store passes unnoticed. An outage is told: who can wait longer waits by himself."""

_CLIENT = {"connect_timeout": "3s", "timeout": "30s"}
"""Of each single request; a part of an upload is one."""

_CLIENT_OPTIONS = frozenset(
    {
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "read_timeout",
        "root_certificate",
        "timeout",
        "user_agent",
    }
)
"""Options that obstore takes apart from those of the kind of store, and that an operator may need."""

_MARKER = ".bathyscope-store"
"""Lies in a folder store. Where it is missing the folder is gone, or what was mounted there."""

_STAGED = re.compile(r".*#\d+")
"""Names of files that obstore is writing to a folder; a process that died leaves them."""

_FULL = re.compile(r"os error (28|122)\b|StorageFull|QuotaExceeded|Insufficient ?Storage")
"""In the words of a store: no space, or no quota, left."""

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


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as a listing shows it."""

    key: str
    bytes: int

    modified_ms: int
    """Unix time when it was put, by the clock of the store."""


@watched("put", "put_file", "commit", "get", "read", "size", "delete")
class ArtifactStore:
    """Objects by key.

    Every method raises `errors.Unavailable` when the store cannot be reached, `errors.OutOfSpace` when it is full.
    `options` are obstore's, those of its client and of the kind of store together.
    """

    watch: Watch | None = None
    """Told of each call, when it is set."""

    def __init__(self, url: str, options: dict[str, str] | None = None) -> None:
        self._folder: Path | None = None
        try:
            if url.startswith("file://"):
                self._folder = Path(unquote(urlparse(url).path))
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                with suppress(OSError):  # read-only or full: `check` says so as long as it is
                    (self._folder / _MARKER).touch(mode=0o600)
                self._store: Any = LocalStore(prefix=self._folder)
            else:
                self._store = from_url(url, **_options(options or {}))
        except (BaseError, OSError, ValueError) as error:
            raise SetupError(f"The artifact store {url} cannot be opened: {error}.") from error

    @property
    def folder(self) -> Path | None:
        """The folder of a folder store."""
        return self._folder

    async def put(self, key: str, data: bytes) -> None:
        """Write a small object, replacing what was there."""
        await self._require_folder()
        await self._run(obstore.put_async(self._store, key, data), len(data))
        await self._settle(key)

    async def put_file(self, key: str, path: Path, *, digest: bool = True) -> Blob:
        """Move a scratch file into the store under a new key; the file is gone afterwards.

        Read twice at most (digest, upload), in pieces; never held in memory. Without `digest` the blob's is empty.
        """
        await self._require_folder()
        target = self._folder / key if self._folder is not None else None
        with _told(but=(FileNotFoundError,)):
            sha256, size, adopted = await asyncio.to_thread(_digest_and_adopt, path, target, digest)
        if adopted:
            return Blob(key, size, sha256)
        upload = obstore.put_async(self._store, key, path, chunk_size=_PART_BYTES, max_concurrency=4)
        await self._run(upload, size)
        await self._settle(key)
        await asyncio.to_thread(path.unlink, missing_ok=True)
        return Blob(key, size, sha256)

    async def commit(self, key: str, manifest: bytes) -> bool:
        """Put a manifest if there is none; False when another attempt was first."""
        await self._require_folder()
        try:
            await self._run(obstore.put_async(self._store, key, manifest, mode="create"), len(manifest))
        except AlreadyExistsError:
            return False
        await self._settle(key)
        return True

    async def get(self, key: str) -> bytes | None:
        """A small object, null when there is none."""
        try:
            answer = await self._run(obstore.get_async(self._store, key))
            return bytes(await self._run(answer.bytes_async(), int(answer.meta["size"])))
        except FileNotFoundError:
            return None

    async def read(self, key: str, start: int, end: int) -> memoryview:
        """Bytes `[start, end)` of an object."""
        if end <= start:
            return memoryview(b"")
        return memoryview(await self._run(obstore.get_range_async(self._store, key, start=start, end=end), end - start))

    async def stream(self, key: str, start: int, end: int) -> AsyncIterator[memoryview]:
        """Bytes `[start, end)` in pieces of at most `CHUNK_BYTES`, the next one read while the last is used."""
        ahead: asyncio.Task[memoryview] | None = None
        try:
            while start < end:
                stop = min(start + CHUNK_BYTES, end)
                piece = await (self.read(key, start, stop) if ahead is None else ahead)
                start, after = stop, min(stop + CHUNK_BYTES, end)
                ahead = asyncio.create_task(self.read(key, start, after)) if start < end else None
                yield piece
        finally:
            if ahead is not None:
                ahead.cancel()
                with suppress(BaseException):
                    await ahead

    async def download(self, key: str, path: Path, *, span: tuple[int, int] | None = None) -> None:
        """Copy an object, or the bytes `[start, end)` of it, into a file."""
        size = await self.size(key)
        if size is None:
            raise FileNotFoundError(key)
        with path.open("wb") as file:
            async for piece in self.stream(key, *(span or (0, size))):
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
        if self._folder is not None and key.startswith(("blobs/", "adapters/", SHARDS)):
            with suppress(OSError):  # another blob of the resource is in it
                (self._folder / key).parent.rmdir()
                if key.startswith("adapters/"):
                    (self._folder / key).parent.parent.rmdir()

    async def drop_shards(self, job_id: str) -> None:
        """Remove what the shards of a split job left; nothing there is no error."""
        for key in [key async for key in self.keys(f"{SHARDS}{job_id}/")]:
            await self.delete(key)

    async def entries(self, prefix: str) -> AsyncIterator[Entry]:
        """Every object below a prefix, those of one folder together."""
        with _told():
            if self._folder is not None:  # obstore stops at the first name that it would not write itself
                folders = [self._folder / prefix]
                while folders:
                    found, deeper = await asyncio.to_thread(_list, self._folder, folders.pop())
                    folders += deeper
                    for entry in found:
                        yield entry
                return
            async for page in obstore.list(self._store, prefix=prefix, chunk_size=1000):
                for item in page:
                    yield Entry(item["path"], item["size"], int(item["last_modified"].timestamp() * 1000))

    async def keys(self, prefix: str) -> AsyncIterator[str]:
        """Every key below a prefix."""
        async for entry in self.entries(prefix):
            yield entry.key

    async def leftovers(self) -> list[tuple[Path, Entry]]:
        """Files of uploads to a folder store that were cut short, or are still going on."""
        if self._folder is None:  # of a bucket, a lifecycle rule of the store itself removes them
            return []
        return await asyncio.to_thread(_staged, self._folder)

    async def check(self) -> None:
        """Raise `Unavailable` unless the store answers and, as far as can be told, can be written."""
        await self._require_folder()
        await self.size("health")

    async def _require_folder(self) -> None:
        """Raise unless a folder store is where it was: obstore would make it anew, and below a lost mount."""
        if self._folder is not None:
            with _told():
                async with asyncio.timeout(_PATIENCE_S):
                    await asyncio.to_thread(_look_at, self._folder)

    async def _run(self, awaitable: Any, size: int = 0) -> Any:
        """The answer of the store about an object of `size` bytes."""
        with _told(but=(AlreadyExistsError, FileNotFoundError)):
            async with asyncio.timeout(_PATIENCE_S + size / _SLOWEST):
                return await awaitable

    async def _settle(self, key: str) -> None:
        """A folder's files are flushed to the disk, as an object store's are: 'succeeded' must survive a power cut."""
        if self._folder is not None:
            with _told():
                await asyncio.to_thread(_flush, self._folder / key)


@contextmanager
def _told(but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Faults of the store in this block as problems. Its own words hold addresses that are no business of a client:
    they go to the log."""
    try:
        yield
    except but:
        raise
    except (BaseError, OSError) as error:  # a timeout is an OSError
        _log.error("store.fault", error=str(error)[:2000] or type(error).__name__)
        if _is_full(error):
            raise OutOfSpace(
                "The artifact store has no room left; delete results, or wait until there is.", retry_after=30
            ) from error
        raise Unavailable("The artifact store is out of reach; try again in a moment.", retry_after=5) from error


def _is_full(error: BaseException) -> bool:
    """Whether a fault of a disk or a store says that it is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, BaseError) and _FULL.search(str(error)) is not None


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `obstore.store.from_url` takes: options of the client apart, bounds of time where none are given."""
    rest = dict(given)
    client = {**_CLIENT, **{name: rest.pop(name) for name in _CLIENT_OPTIONS & rest.keys()}}
    client |= rest.pop("client_options", {})
    return {"retry_config": _RETRY, "client_options": client, **rest}


def _look_at(folder: Path) -> None:
    (folder / _MARKER).stat()
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "the folder store cannot be written", str(folder))


def _list(root: Path, folder: Path) -> tuple[list[Entry], list[Path]]:
    """The files of one folder by name, apart from those being written, and its folders; links are neither."""
    found, deeper = [], []
    try:
        items = sorted(os.scandir(folder), key=lambda item: item.name)
    except FileNotFoundError:
        return [], []
    for item in items:
        if item.is_dir(follow_symlinks=False):
            deeper.append(Path(item.path))
        elif item.is_file(follow_symlinks=False) and not _STAGED.fullmatch(item.name):
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                facts = item.stat()
                key = os.fsencode(os.path.relpath(item.path, root)).decode("utf-8", "replace")
                found.append(Entry(key, facts.st_size, int(facts.st_mtime * 1000)))
    return found, deeper[::-1]


def _staged(folder: Path) -> list[tuple[Path, Entry]]:
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            if _STAGED.fullmatch(name):
                with suppress(OSError):  # it was finished meanwhile
                    path = Path(place, name)
                    facts = path.stat()
                    entry = Entry(str(path.relative_to(folder)), facts.st_size, int(facts.st_mtime * 1000))
                    found.append((path, entry))
    return found


def _digest_and_adopt(path: Path, target: Path | None, digest: bool) -> tuple[str, int, bool]:
    """In one thread's turn: a small result waits for no second one."""
    sha256, size = _digest(path) if digest else ("", path.stat().st_size)
    return sha256, size, target is not None and _adopt(path, target)


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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.utime(path)  # its age there counts from now: the result may have waited long for the store
        path.rename(target)
    except OSError:
        return False
    return True
