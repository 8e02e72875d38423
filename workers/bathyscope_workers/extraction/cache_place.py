"""Where a worker's cache of rows lies, and who may use it together.

    <folder>/gate          held while a worker looks for its place
    <folder>/<n>/lock      held, shared, by each engine that uses the place; its text says where these run
    <folder>/<n>/data.mdb  the rows
    <folder>/<n>/lock.mdb  LMDB's own lock file, made anew by the first who comes

Workers of one machine share a place, so that what one has computed serves the others, whichever of them takes the next
job. LMDB's locks hold among processes that see each other's numbers: workers in containers of their own, or on other
hosts over a network disk, find the place taken by strangers and go on to the next one. A place outlives its workers.

Whoever comes first reads the whole file before LMDB does: a damaged one could end the process. That is done in a child
process, since it takes seconds for a large file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)

DATA, LOCK = "data.mdb", "lock.mdb"
_PLACES = 64
_CHECK_SECONDS = 120.0
_CHECK = "import sys; from lmdb.verify import verify; sys.exit(1 if verify(sys.argv[1]) else 0)"


@dataclass(slots=True)
class Place:
    """A folder for LMDB; it is kept as long as `lock`, a descriptor, is open."""

    folder: Path
    lock: int

    def close(self) -> None:
        """Give it up."""
        os.close(self.lock)

    def clear(self) -> None:
        """Remove the rows. Whoever has the file open goes on with it until it closes it."""
        for name in (DATA, LOCK):
            (self.folder / name).unlink(missing_ok=True)


def find_place(root: Path, *, max_bytes: int) -> Place | None:
    """The place that this process shares with its like, whole and no larger than `max_bytes`; raises OSError."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (root / "gate").open("wb") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        for number in range(_PLACES):
            folder = root / str(number)
            folder.mkdir(exist_ok=True, mode=0o700)
            place = Place(folder, os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            try:
                if _take(place, max_bytes):
                    return place
            except BaseException:
                place.close()
                raise
            place.close()
    return None


def _take(place: Place, max_bytes: int) -> bool:
    here = _here()
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(place.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (place.folder / LOCK).unlink(missing_ok=True)
        _require_whole(place, max_bytes)
        os.ftruncate(place.lock, 0)
        os.pwrite(place.lock, here, 0)
        fcntl.flock(place.lock, fcntl.LOCK_SH)  # nobody comes between: the gate is ours
        return True
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(place.lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.pread(place.lock, 1000, 0) == here
    return False


def _here() -> bytes:
    """Equal for processes that see each other's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()
    except OSError:
        return platform.node().encode()


def _require_whole(place: Place, max_bytes: int) -> None:
    """Clear a place whose file is damaged or too large."""
    path = place.folder / DATA
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        reason = "larger than it may be" if size > max_bytes else "" if _is_whole(path) else "damaged"
        if reason:
            _log.warning("cache.dropped", reason=reason, bytes=size, folder=str(place.folder))
            place.clear()


def _is_whole(path: Path) -> bool:
    try:
        checked = subprocess.run(
            [sys.executable, "-I", "-c", _CHECK, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_CHECK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return checked.returncode == 0
