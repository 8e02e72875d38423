"""Datasets of the hub: read in a process of their own, and kept for a while as lines in the data folder."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import orjson

from bathyscope.datasets import Rows
from bathyscope.datasets._hub import source_of, taken
from bathyscope.datasets._rows import fault
from bathyscope.errors import DatasetOutOfReach, NotBuilt, TooLarge, from_problem
from bathyscope.types import DatasetRef
from bathyscope_backplane.settings import Settings

_PIECE_BYTES = 1 << 20
_LAST_BYTES = 1 << 16
_AT_ONCE = 2
"""Datasets that one process has read at the same time; others wait."""

_LONG_AGO = 3600
"""Seconds after which a folder in the making is that of a dead process."""

_TIMES = 4
"""Bytes of memory for a byte of the lines, read."""

_PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy", "HF_ENDPOINT")

_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


async def read_hub(settings: Settings, ref: DatasetRef, hold: Callable[[int], None]) -> Rows:
    """The rows of a dataset of the hub. `hold` is told how much memory they take.

    Raises `DatasetOutOfReach` (502), `InvalidRequest`, `TooLarge` and `NotBuilt`.
    """
    if not settings.datasets.hub:
        raise NotBuilt("Datasets of the hub are switched off here; upload the rows.")
    source = source_of(ref)  # refuses what can be told without it
    folder, most = settings.data_dir / "hub", settings.limits.max_rows
    what = [source.repository, source.config, source.split, source.revision, ref.columns, ref.name, most]
    kept = folder / f"{hashlib.sha256(orjson.dumps(what, option=orjson.OPT_SORT_KEYS)).hexdigest()}.jsonl"
    with contextlib.suppress(FileNotFoundError):
        if time.time() - kept.stat().st_mtime < settings.datasets.cache_hours * 3600:
            return await _rows(kept, ref, most, hold)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    places = _places.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(_AT_ONCE))
    async with places:
        return await _read(settings, ref, kept, most, hold)


async def _read(settings: Settings, ref: DatasetRef, kept: Path, most: int, hold: Callable[[int], None]) -> Rows:
    folder = kept.parent
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        found = Path(scratch) / "rows"
        await _fetch(settings, ref, found, most + 1)
        rows = await _rows(found, ref, most, hold)
        if 0 < found.stat().st_size <= settings.datasets.cache_bytes:
            found.rename(kept)
    await asyncio.to_thread(_trim, folder, settings.datasets.cache_bytes)
    return rows


async def _rows(path: Path, ref: DatasetRef, most: int, hold: Callable[[int], None]) -> Rows:
    hold(_TIMES * await asyncio.to_thread(os.path.getsize, path))

    def read() -> Rows:
        counted = 0

        def lines() -> Iterator[dict[str, Any]]:
            nonlocal counted
            with path.open("rb") as file:
                for counted, line in enumerate(file, 1):
                    if counted > most:
                        break
                    yield orjson.loads(line)

        rows = taken(lines(), ref)
        if counted > most and ref.limit is None:
            raise TooLarge(
                f"The split has more than {most:,} rows, as many as a request may have; give a `limit`: so many are "
                f"drawn from its first {most:,}.",
                limit=most,
            )
        return rows

    return await asyncio.to_thread(read)


async def _fetch(settings: Settings, ref: DatasetRef, target: Path, most: int) -> None:
    """Have the rows written to `target`, one JSON object a line."""
    own, bound = settings.datasets, settings.limits.max_dataset_bytes
    asked = {
        "ref": ref.model_dump(exclude={"limit", "seed", "category"}, exclude_none=True),
        "most": most,
        "folder": None if own.folder is None else str(own.folder.resolve()),
        "memory_bytes": own.memory_bytes,
    }
    home = target.parent / "home"
    home.mkdir()
    environment = {name: os.environ[name] for name in (*_PASSED, *_PROXIES) if name in os.environ}
    environment |= {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    environment |= {"HF_ENDPOINT": own.hub_url} if own.hub_url is not None else {}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bathyscope_backplane.datasets.hub_child", orjson.dumps(asked).decode()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=home,
        env=environment,
    )
    assert child.stdout is not None
    size, last = 0, b""
    try:
        async with asyncio.timeout(own.seconds):
            with target.open("wb") as file:
                while piece := await child.stdout.read(_PIECE_BYTES):
                    size += len(piece)
                    if size > bound:
                        raise TooLarge(
                            f"The rows have more than {bound:,} bytes; upload those that are needed.", limit=bound
                        )
                    last = (last + piece)[-_LAST_BYTES:]
                    await asyncio.to_thread(file.write, piece)
            await child.wait()
    except TimeoutError:
        raise DatasetOutOfReach(
            f"Reading the dataset took more than {own.seconds:g} seconds; try again later, or upload its rows.",
            retry_after=30,
        ) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    line = last.rstrip(b"\n").rpartition(b"\n")[2]
    try:
        end = orjson.loads(line)
    except orjson.JSONDecodeError:
        end = {}
    if "problem" in end:
        raise from_problem(end["problem"])
    if end != {"end": True}:
        raise fault("name", "reading it takes more memory than it may, or the library failed")
    with target.open("r+b") as file:
        file.truncate(size - len(line) - 1)


def _trim(folder: Path, most: int) -> None:
    """Remove the rows used longest ago, and what processes that died left."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            status = path.stat()
            if path.is_file():
                found.append((status.st_mtime, status.st_size, path))
            elif time.time() - status.st_mtime > _LONG_AGO:
                shutil.rmtree(path, ignore_errors=True)
    size = 0
    for _, bytes_, path in sorted(found, reverse=True):
        size += bytes_
        if size > most:
            path.unlink(missing_ok=True)
