"""Converted adapters on the worker's own disk, so that one that is used again is not downloaded again.

    <data_dir>/adapters/<digest>/            a whole PEFT folder; its time is that of its last use
    <data_dir>/adapters/.<digest>.<…>/       one in the making, locked by its maker, or one on its way out
    <data_dir>/adapters/.locks/<xx>          held by whoever makes or removes a folder whose digest begins so

Several workers may share a data folder. Who asks gets hard links of his own, so that a folder that is removed to make
room takes nothing from a job that runs. Files are verified by their SHA-256 when they come, by their size when they
are used, and by their SHA-256 again the first time that a process uses them, and after an engine has refused them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bathyscope.errors import Expired, Unavailable
from bathyscope_backplane.artifacts import ROLES, ArtifactStore, Blobs


class AdapterCache:
    """The cache of one worker, at most `max_bytes` large beyond what is being used."""

    def __init__(self, folder: Path, store: ArtifactStore, max_bytes: int) -> None:
        self._folder = folder
        self._store = store
        self._max_bytes = max_bytes
        self._verified: set[str] = set()

    async def place(self, digest: str, blobs: Blobs, target: Path) -> Path:
        """Put the adapter of a digest at `target`, a folder that is made. `blobs` are its files in the store.

        Raises `Expired` when they have gone, and `Unavailable`.
        """
        if not await asyncio.to_thread(self._link, digest, blobs, target):
            await self._download(digest, blobs, target)
            await asyncio.to_thread(self._make_room, keep=digest)
        return target

    async def distrust(self, digest: str, blobs: Blobs, placed: Path) -> bool:
        """Whether the files that were put at `placed` are not those of the store: what is kept is then verified again,
        byte by byte, before it is used.
        """
        rotten = not await asyncio.to_thread(_equal, placed, blobs)
        if rotten:
            self._verified.discard(digest)
        return rotten

    async def sweep(self) -> None:
        """Remove what processes that died left half made, and what is beyond the bound."""
        await asyncio.to_thread(self._sweep)

    def _link(self, digest: str, blobs: Blobs, target: Path) -> bool:
        """Whether the folder is here, and whole: then its files are linked at `target`."""
        home = self._folder / digest
        with self._locked(digest):
            if not home.is_dir():
                return False
            if not self._is_whole(digest, home, blobs):
                shutil.rmtree(home, ignore_errors=True)
                return False
            os.utime(home)
            target.mkdir()
            for name in ROLES.values():
                os.link(home / name, target / name)
        return True

    def _is_whole(self, digest: str, home: Path, blobs: Blobs) -> bool:
        try:
            if any((home / ROLES[role]).stat().st_size != blob.bytes for role, blob in blobs.items()):
                return False
            if digest not in self._verified:
                if not _equal(home, blobs):
                    return False
                self._verified.add(digest)
        except OSError:
            return False
        return True

    async def _download(self, digest: str, blobs: Blobs, target: Path) -> None:
        making, lock = await asyncio.to_thread(self._begin, digest)
        try:
            for role, blob in blobs.items():
                path = making / ROLES[role]
                try:
                    await self._fetch(blob.key, path)
                except FileNotFoundError:
                    raise Expired(f"The adapter {digest[:12]}…, which this job needs, was deleted.") from None
                if await asyncio.to_thread(_sha256, path) != blob.sha256:
                    raise Unavailable("An adapter's file did not arrive as it was stored; the job is tried again.")
            await asyncio.to_thread(self._finish, digest, making, blobs, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, making, ignore_errors=True)
            os.close(lock)

    async def _fetch(self, key: str, path: Path) -> None:
        local = self._store.local_path(key)
        if local is not None:
            with contextlib.suppress(OSError):  # another disk, or deleted in this moment
                os.link(local, path)
                return
        await self._store.download(key, path)

    def _begin(self, digest: str) -> tuple[Path, int]:
        """A folder to make an adapter in, and the lock that says that its maker lives."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            making = Path(tempfile.mkdtemp(prefix=f".{digest}.", dir=self._folder))
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(making, os.O_RDONLY | os.O_DIRECTORY)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if making.is_dir():
                    return making, lock
                os.close(lock)  # another worker, as it swept, took it for a dead one's

    def _finish(self, digest: str, making: Path, blobs: Blobs, target: Path) -> None:
        home = self._folder / digest
        target.mkdir()
        with self._locked(digest):
            for name in ROLES.values():
                os.link(making / name, target / name)
            if home.is_dir() and self._is_whole(digest, home, blobs):
                return  # another was faster
            shutil.rmtree(home, ignore_errors=True)
            making.rename(home)
            self._verified.add(digest)

    # --- room ---------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        for path in self._folder.glob(".*.*"):
            with contextlib.suppress(OSError):
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(folder)
        self._make_room()

    def _make_room(self, keep: str = "") -> None:
        """Remove folders, those used longest ago first, until the rest fits."""
        found: list[tuple[float, int, Path]] = []
        for home in self._folder.glob("[0-9a-f]*"):
            with contextlib.suppress(OSError):
                size = sum(path.stat().st_size for path in home.iterdir())
                found.append((home.stat().st_mtime, size, home))
        total = sum(size for _, size, _ in found)
        for used, size, home in sorted(found):
            if total <= self._max_bytes:
                return
            if home.name == keep:
                continue
            with self._locked(home.name), contextlib.suppress(OSError):
                if home.stat().st_mtime == used:  # else it has been used meanwhile
                    doomed = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=self._folder))
                    home.rename(doomed)  # whole or not at all, for whoever looks
                    shutil.rmtree(doomed, ignore_errors=True)
                    self._verified.discard(home.name)
                    total -= size

    @contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        locks = self._folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (locks / digest[:2]).open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the descriptor, and with a process that dies
            yield


def _equal(folder: Path, blobs: Blobs) -> bool:
    try:
        return all(_sha256(folder / ROLES[role]) == blob.sha256 for role, blob in blobs.items())
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
