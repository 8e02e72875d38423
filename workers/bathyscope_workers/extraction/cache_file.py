"""The LMDB file of the cache of rows: opened beside other work, read and written, dropped when it cannot be trusted.

LMDB is told not to wait for the disk: a process that is killed leaves what it had committed, since the kernel has it,
and a machine that loses power may leave a damaged file, which is noticed (`cache_place`, and the sum of each record)
and dropped. The map is as large as the cache may become, so no fault of the reckoning makes the file larger.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import structlog

from bathyscope_workers.extraction.cache_place import DATA, Place, find_place
from bathyscope_workers.extraction.cache_record import PAGE, Damaged

_log = structlog.get_logger(__name__)

T = TypeVar("T")

_OPEN_SECONDS = 5.0
"""How long the first question waits for a file that is still being looked at."""
_GUARD_SECONDS = 0.05
"""How long a write waits for another worker's: then it is left out."""
_REST_SECONDS = 30.0
"""Without writes, after one for which there was no room."""
_FULL_TIMES = 2
_FAULTS = (
    lmdb.BadDbiError,
    lmdb.BadTxnError,
    lmdb.CorruptedError,
    lmdb.CursorFullError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
    Damaged,
)
"""Errors that say something against the file; the others are of the disk, or of another worker."""


class CacheFile:
    """Three tables in one file: `rows`, `stamps` and `used`."""

    def __init__(self, folder: Path, max_bytes: int, min_free_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._env: lmdb.Environment | None = None
        self._place: Place | None = None
        self._guard = -1
        self._resting_until = 0.0
        self._full = 0
        self._waited = False
        self.rows: Any = None
        self.stamps: Any = None
        self.used: Any = None
        self._opening = threading.Thread(target=self._open_first, name="cache", daemon=True)
        self._opening.start()

    @property
    def ready(self) -> bool:
        """Whether rows can be read and written."""
        if self._opening.is_alive():
            self._opening.join(0.0 if self._waited else _OPEN_SECONDS)
            self._waited = True
            if self._opening.is_alive():
                return False
        return self._env is not None

    def _open_first(self) -> None:
        try:
            self._place = find_place(self._folder, max_bytes=self._max_bytes)
            if self._place is None:
                _log.warning("cache.off", reason="no place is free", folder=str(self._folder))
                return
            self._guard = os.open(self._place.folder / "guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._open()
        except (lmdb.Error, OSError, _Busy) as error:
            _log.warning("cache.off", reason=str(error), folder=str(self._folder))

    def _open(self) -> None:
        assert self._place is not None
        env = lmdb.open(
            str(self._place.folder),
            map_size=self._max_bytes // PAGE * PAGE,
            max_dbs=3,
            mode=0o600,
            sync=False,
            metasync=False,
            readahead=False,
        )
        try:
            env.reader_check()
            with self._guarded(_OPEN_SECONDS):
                self.rows, self.stamps, self.used = (env.open_db(name) for name in (b"rows", b"stamps", b"used"))
        except BaseException:
            env.close()
            raise
        self._env = env

    @property
    def resting(self) -> bool:
        """Whether nothing is to be written for a while."""
        return time.monotonic() < self._resting_until

    def close(self) -> None:
        """Let go of it."""
        self._opening.join(_OPEN_SECONDS)
        if self._env is not None:
            self._env.close()
            self._env = None
        if self._guard >= 0:
            os.close(self._guard)
            self._guard = -1
        if self._place is not None:
            self._place.close()
            self._place = None

    def _drop(self, reason: str) -> None:
        """Begin anew: what is in the file cannot be trusted."""
        assert self._place is not None
        _log.warning("cache.dropped", reason=reason, folder=str(self._place.folder))
        if self._env is not None:
            self._env.close()
            self._env = None
        try:
            self._place.clear()
            self._open()
        except (lmdb.Error, OSError, _Busy) as error:
            _log.warning("cache.off", reason=str(error), folder=str(self._place.folder))

    # --- transactions -------------------------------------------------------------------------------------

    def read(self, work: Callable[[Any], None]) -> None:
        """Do some work in a transaction that reads; it ends early where the file cannot be read. The file is ready."""
        assert self._env is not None
        try:
            with self._env.begin(db=self.rows, buffers=True) as txn:
                work(txn)
        except _FAULTS as error:
            self._drop(str(error))
        except lmdb.Error as error:
            self._unable(error)

    def change(self, work: Callable[[Any], T], otherwise: T, make_room: Callable[[Any], object]) -> T:
        """Do some work in a transaction that writes; `otherwise` when nothing came of it. The file is ready.

        `make_room` is called in one of its own when the map is full.
        """
        assert self._env is not None
        try:
            with self._guarded(_GUARD_SECONDS), self._env.begin(write=True, buffers=True) as txn:
                done = work(txn)
        except _Busy:
            return otherwise
        except lmdb.MapFullError:
            self._full += 1
            if self._full > _FULL_TIMES:
                self._full = 0
                self._drop("its free pages are in too many pieces")
            else:
                self._make_room(make_room)
            return otherwise
        except _FAULTS as error:
            self._drop(str(error))
            return otherwise
        except lmdb.Error as error:
            self._unable(error)
            return otherwise
        self._full = 0
        return done

    def _make_room(self, work: Callable[[Any], object]) -> None:
        assert self._env is not None
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(lmdb.Error, _Busy))
            stack.enter_context(self._guarded(_GUARD_SECONDS))
            work(stack.enter_context(self._env.begin(write=True, buffers=True)))

    @contextmanager
    def _guarded(self, seconds: float) -> Iterator[None]:
        """LMDB's own lock waits for ever, for a process that was stopped too."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _Busy from None
                time.sleep(0.001)
        try:
            yield
        finally:
            fcntl.flock(self._guard, fcntl.LOCK_UN)

    def _unable(self, error: Exception) -> None:
        """A disk that is full, or another worker whose cache may be larger."""
        self._resting_until = time.monotonic() + _REST_SECONDS
        _log.warning("cache.unable", error=str(error))
        if isinstance(error, lmdb.MapResizedError) and self._env is not None:
            with contextlib.suppress(lmdb.Error):
                self._env.set_mapsize(0)

    # --- room ---------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Of the pages that hold something."""
        if not self.ready:
            return 0
        assert self._env is not None
        try:
            with self._env.begin() as txn:
                return self.used_in(txn)
        except lmdb.Error:
            return 0

    def used_in(self, txn: Any) -> int:
        """The same, as a transaction sees it."""
        stats = [txn.stat(db) for db in (self.rows, self.stamps, self.used)]
        pages: int = sum(one["branch_pages"] + one["leaf_pages"] + one["overflow_pages"] for one in stats)
        return PAGE * pages

    def disk_has_room(self, used: int, wanted: int) -> bool:
        """Whether so many bytes may join those in use, by what the disk is to keep free; if not, writing rests."""
        assert self._place is not None
        with contextlib.suppress(OSError):
            facts = os.statvfs(self._place.folder)
            inside = (self._place.folder / DATA).stat().st_size - used
            growth = wanted - max(0, inside) // 2  # free pages are not always where they are needed
            if growth > 0 and facts.f_bavail * facts.f_frsize - growth < self._min_free_bytes:
                self._resting_until = time.monotonic() + _REST_SECONDS
                return False
        return True


class _Busy(Exception):
    """Another worker writes."""
